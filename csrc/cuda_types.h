// The dtypes of the CUDA backends: storage in 4 or 2 bytes, arithmetic in float.
#pragma once

#include <cstring>

#include "cuda_launch.h"
#include "operator.h"
#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

namespace oder {

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
constexpr Dtype dtype_of(const Bfloat16*) { return kBfloat16; }
constexpr Dtype dtype_of(const Float16*) { return kFloat16; }

ODER_DEVICE float to_float(float a) { return a; }

ODER_DEVICE float to_float(Bfloat16 a) { return float_of_bits(static_cast<uint32_t>(a.bits) << 16); }

ODER_DEVICE float to_float(Float16 a) {
#if defined(__CUDACC__)
  return __half2float(__ushort_as_half(a.bits));
#else
  const uint32_t magnitude = a.bits & 0x7fffu, sign = static_cast<uint32_t>(a.bits & 0x8000u) << 16;
  if (magnitude >= 0x7c00u) return float_of_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // As a subnormal-safe product: the exponent of half moved to that of float by 2^112.
  return float_of_bits(sign | bits_of_float(float_of_bits(magnitude << 13) * 0x1p112f));
#endif
}

template <class T>
ODER_DEVICE T from_float(float a);

template <>
ODER_DEVICE float from_float<float>(float a) {
  return a;
}

// Rounds to nearest, ties to even; a NaN stays one.
template <>
ODER_DEVICE Bfloat16 from_float<Bfloat16>(float a) {
  const uint32_t bits = bits_of_float(a);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>(bits >> 16 | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

template <>
ODER_DEVICE Float16 from_float<Float16>(float a) {
#if defined(__CUDACC__)
  return {__half_as_ushort(__float2half_rn(a))};
#else
  const uint32_t bits = bits_of_float(a), magnitude = bits & 0x7fffffffu;
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};
  // Below the normal numbers of half, adding 0.5 lets the float adder round at the right bit.
  if (magnitude < 0x38800000u)
    return {static_cast<uint16_t>(sign | (bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000u))};
  return {static_cast<uint16_t>(sign | (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13)};
#endif
}

// Runs of values that are read and written in one access; the address must be aligned to the whole run.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T at[N];
};
template <class T, int N>
constexpr Dtype dtype_of(const Pack<T, N>*) {
  return dtype_of(static_cast<const T*>(nullptr));
}

}  // namespace oder
