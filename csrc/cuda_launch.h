// How kernels are launched, and what they may use: nvcc compiles them for the GPU, a C++ compiler for cuda_host.h.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#if defined(__CUDACC__)
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <utility>

#define ODER_KERNEL __global__ void
#define ODER_DEVICE __device__ __forceinline__
#define ODER_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define ODER_SHARED(type, name, count) __shared__ type name[count]
// A parameter that is indexed at run time, and would otherwise be copied to local memory.
#define ODER_CONSTANT(type) const __grid_constant__ type
// The shared memory whose size the launch gives.
#define ODER_DYNAMIC_SHARED(type, name)                           \
  extern __shared__ __align__(16) unsigned char dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(dynamic_shared)
#else
#include "cuda_host.h"
#endif

namespace oder {

#if defined(__CUDACC__)

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

inline int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}
inline int device_attribute(cudaDeviceAttr which) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, current_device()), "cudaDeviceGetAttribute");
  return value;
}
inline int processor_count() { return device_attribute(cudaDevAttrMultiProcessorCount); }
// What a block may have of the shared memory.
inline size_t shared_bytes() { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

// Lets a kernel have dynamic shared memory, and never less than before: another thread may be about to launch with it.
inline void allow_shared(const char* name, const void* kernel, size_t bytes) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, size_t> allowed;
  const std::lock_guard<std::mutex> guard(mutex);
  size_t& most = allowed[{kernel, current_device()}];
  if (bytes <= most) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)), name);
  most = bytes;
}

template <class... Parameters, class... Arguments>
void launch_checked(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared,
                    void* stream, Arguments&&... arguments) {
  // Beyond 48 KB, static shared memory included, a kernel must ask.
  if (shared > 32 * 1024) allow_shared(name, reinterpret_cast<const void*>(kernel), shared);
  kernel<<<dim3(static_cast<unsigned>(blocks)), threads, shared, static_cast<cudaStream_t>(stream)>>>(
      static_cast<Parameters>(arguments)...);
  check(cudaGetLastError(), name);
}

ODER_DEVICE float float_of_bits(uint32_t bits) { return __uint_as_float(bits); }
ODER_DEVICE uint32_t bits_of_float(float a) { return __float_as_uint(a); }
// Low word of (high:low) >> shift, for shift < 32.
ODER_DEVICE uint32_t shift_right(uint32_t low, uint32_t high, int shift) { return __funnelshift_r(low, high, shift); }
ODER_DEVICE float saturate(float a) { return __saturatef(a); }
// a * b + c in one instruction, which the compiler at times takes apart.
ODER_DEVICE int64_t multiply_add(int a, int b, int64_t c) {
  int64_t d;
  asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(d) : "r"(a), "r"(b), "l"(c));
  return d;
}
// Within a unit in the last place, in four instructions and one; numbers below 2^-126 count as zero, and divisors are
// below 2^126.
ODER_DEVICE float quotient(float a, float b) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(b));
  const float c = a * inverse;
  return fmaf(fmaf(-c, b, a), inverse, c);
}
ODER_DEVICE float root(float a) {
  float b;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(b) : "f"(a));
  return b;
}
ODER_DEVICE int lowest_bit(uint32_t a) { return __ffs(static_cast<int>(a)) - 1; }
// Bit k tells whether it holds in lane k of the warp, all of whose lanes take part.
ODER_DEVICE uint32_t ballot(bool a) { return __ballot_sync(0xffffffffu, a); }
ODER_DEVICE double shuffle_down(double a, int offset) { return __shfl_down_sync(0xffffffffu, a, offset); }

// Copies 4 or 16 bytes from global to shared memory, or writes zeros; seen by this thread after wait_for_copies(), by
// the others after a barrier too.
template <int Bytes>
ODER_DEVICE void copy_async(void* target, const void* source, bool copy) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(target));
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(source), "n"(Bytes),
               "r"(copy ? Bytes : 0)
               : "memory");
}
ODER_DEVICE void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

#endif

// Grids are one-dimensional: only the first axis takes more than 65535 blocks.
constexpr int64_t kMaxBlocks = 0x7fffffff;

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared, void* stream,
            Arguments&&... arguments) {
  if (blocks == 0) return;
  if (blocks < 0 || blocks > kMaxBlocks) {
    throw std::invalid_argument(std::string(name) + ": " + std::to_string(blocks) +
                                " blocks are more than a grid takes; use a smaller batch");
  }
  launch_checked(name, kernel, blocks, threads, shared, stream, static_cast<Arguments&&>(arguments)...);
}

}  // namespace oder

#define ODER_LAUNCH(kernel, ...) ::oder::launch(#kernel, kernel, __VA_ARGS__)
