// Marks inline functions that run on the host and on the device.
#pragma once

#if defined(__CUDACC__)
#define ODER_HD __host__ __device__ __forceinline__
#define ODER_UNROLL _Pragma("unroll")
#else
#define ODER_HD inline __attribute__((always_inline))
#define ODER_UNROLL _Pragma("GCC unroll 16")
#endif
