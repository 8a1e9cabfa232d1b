// Vectors of the instruction set this file is compiled for, on the compiler's own vector types.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace oder {

#if defined(__AVX512F__)
constexpr int kVecBytes = 64;
#elif defined(__AVX2__)
constexpr int kVecBytes = 32;
#else
constexpr int kVecBytes = 16;
#endif

template <class T>
struct VecOf {
  typedef T type __attribute__((vector_size(kVecBytes)));
};
template <class T>
using vec = typename VecOf<T>::type;

template <class T>
constexpr int lanes = kVecBytes / static_cast<int>(sizeof(T));

constexpr int kLanes = lanes<float>;
using vf = vec<float>;
using vi = vec<int32_t>;

template <class T>
inline vec<T> load(const T* p) {
  vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
inline void store(T* p, vec<T> v) {
  std::memcpy(p, &v, sizeof v);
}
template <class T>
inline vec<T> splat(T a) {
  return vec<T>{} + a;
}
inline vf max0(vf a) {
#if defined(__AVX512F__)
  return reinterpret_cast<vf>(_mm512_max_ps(reinterpret_cast<__m512>(a), _mm512_setzero_ps()));
#elif defined(__AVX2__)
  return reinterpret_cast<vf>(_mm256_max_ps(reinterpret_cast<__m256>(a), _mm256_setzero_ps()));
#else
  return a > vf{} ? a : vf{};
#endif
}
inline vf sqrt_of(vf a) {
#if defined(__AVX512F__)
  return reinterpret_cast<vf>(_mm512_sqrt_ps(reinterpret_cast<__m512>(a)));
#elif defined(__AVX2__)
  return reinterpret_cast<vf>(_mm256_sqrt_ps(reinterpret_cast<__m256>(a)));
#else
  for (int l = 0; l < kLanes; ++l) a[l] = std::sqrt(a[l]);
  return a;
#endif
}
inline vec<double> sqrt_of(vec<double> a) {
  for (int l = 0; l < lanes<double>; ++l) a[l] = std::sqrt(a[l]);
  return a;
}
template <class V>
inline auto sum_lanes(V v) {
  double s = 0;
  for (unsigned l = 0; l < sizeof(V) / sizeof(v[0]); ++l) s += v[l];
  return s;
}

// Store past the caches: for results larger than they are. p is a multiple of kVecBytes.
inline void stream(float* p, vf v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, reinterpret_cast<__m512>(v));
#elif defined(__AVX2__)
  _mm256_stream_ps(p, reinterpret_cast<__m256>(v));
#else
  store(p, v);
#endif
}
inline void stream(double* p, vec<double> v) {
  vf as_float;
  std::memcpy(&as_float, &v, sizeof v);
  stream(reinterpret_cast<float*>(p), as_float);
}
inline void stream_fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// A window of 2 kLanes floats, and the floats of it that an index vector (0 .. 2 kLanes - 1) names: two register
// permutes take the place of a gather.
#if defined(__AVX512F__)
struct Window {
  __m512 lo, hi;
  explicit Window(const float* p) : lo(_mm512_loadu_ps(p)), hi(_mm512_loadu_ps(p + 16)) {}
  vf at(vi index) const {
    return reinterpret_cast<vf>(_mm512_permutex2var_ps(lo, reinterpret_cast<__m512i>(index), hi));
  }
};
#elif defined(__AVX2__)
struct Window {
  __m256 lo, hi;
  explicit Window(const float* p) : lo(_mm256_loadu_ps(p)), hi(_mm256_loadu_ps(p + 8)) {}
  vf at(vi index) const {
    const __m256i i = reinterpret_cast<__m256i>(index);
    const __m256 from_hi = _mm256_castsi256_ps(_mm256_slli_epi32(i, 28));
    return reinterpret_cast<vf>(
        _mm256_blendv_ps(_mm256_permutevar8x32_ps(lo, i), _mm256_permutevar8x32_ps(hi, i), from_hi));
  }
};
#else
struct Window {
  const float* p;
  explicit Window(const float* start) : p(start) {}
  vf at(vi index) const {
    vf v;
    for (int l = 0; l < kLanes; ++l) v[l] = p[index[l]];
    return v;
  }
};
#endif

// Integers as wide as T, to name the elements of two vectors: 0 .. 2 lanes - 1.
template <class T>
struct IndexOf;
template <>
struct IndexOf<float> {
  using type = vec<int32_t>;
};
template <>
struct IndexOf<double> {
  using type = vec<int64_t>;
};
template <class T>
using index_vec = typename IndexOf<T>::type;

template <class T>
inline vec<T> shuffle(vec<T> a, vec<T> b, index_vec<T> index) {
#if defined(__clang__)
  vec<T> v;
  for (int l = 0; l < lanes<T>; ++l) v[l] = index[l] < lanes<T> ? a[index[l]] : b[index[l] - lanes<T>];
  return v;
#else
  return __builtin_shuffle(a, b, index);
#endif
}

// One round of a transposition: interleaves vectors i and i + N / 2, in runs of `Run` numbers within spans of `Span`.
// log2(N) rounds transpose N x N runs of each span.
template <class T, int N, int Run, int Span>
inline void interleave(vec<T>* rows, int stride) {
  index_vec<T> low, high;
  for (int l = 0; l < lanes<T>; ++l) {
    const int run = l % Span / Run;
    low[l] = l / Span * Span + run / 2 * Run + l % Run + run % 2 * lanes<T>;
    high[l] = low[l] + Span / 2;
  }
  vec<T> next[N];
  for (int i = 0; i < N / 2; ++i) {
    next[2 * i] = shuffle<T>(rows[i * stride], rows[(i + N / 2) * stride], low);
    next[2 * i + 1] = shuffle<T>(rows[i * stride], rows[(i + N / 2) * stride], high);
  }
  for (int i = 0; i < N; ++i) rows[i * stride] = next[i];
}

// Transpose lanes x lanes numbers: within 128 bits, where a shuffle is one cheap instruction, then those 128 bits.
template <class T>
inline void transpose(vec<T>* rows) {
  constexpr int L = lanes<T>, P = 16 / static_cast<int>(sizeof(T)), parts = L / P;
  for (int group = 0; group < parts; ++group) {
    for (int round = 1; round < P; round *= 2) interleave<T, P, 1, P>(rows + group * P, 1);
  }
  if constexpr (parts > 1) {
    for (int i = 0; i < P; ++i) {
      for (int round = 1; round < parts; round *= 2) interleave<T, parts, P, L>(rows + i, P);
    }
  }
}

}  // namespace oder
