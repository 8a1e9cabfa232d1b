// Vectors of complex numbers, and memory that threads keep: what the C++ backends of transforms share.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

#include "complex_number.h"
#include "vec.h"

#define ODER_INLINE inline __attribute__((always_inline))

namespace oder {

template <class T>
using Cx = Complex<vec<T>>;

// Pairs are split within 128 bits, the cheapest way: lane l of a vector then holds column column_of<T>(l) of those
// loaded. Everything that is loaded and stored so agrees.
template <class T>
constexpr int kPart = 16 / static_cast<int>(sizeof(T));

template <class T>
constexpr int column_of(int l) {
  const int part = l / kPart<T>, i = l % kPart<T>, half = kPart<T> / 2;
  return part * half + (i < half ? i : lanes<T> / 2 + i - half);
}

template <class T>
ODER_INLINE Cx<T> split(vec<T> a, vec<T> b) {
  index_vec<T> re, im;
  for (int l = 0; l < lanes<T>; ++l) {
    const int part = l / kPart<T>, i = l % kPart<T>, half = kPart<T> / 2;
    re[l] = (i < half ? 0 : lanes<T>)+part * kPart<T> + 2 * (i % half);
    im[l] = re[l] + 1;
  }
  return {shuffle<T>(a, b, re), shuffle<T>(a, b, im)};
}

template <class T>
ODER_INLINE void merge(const Cx<T>& v, vec<T>& a, vec<T>& b) {
  index_vec<T> low, high;
  for (int l = 0; l < lanes<T>; ++l) {
    const int part = l / kPart<T>, i = l % kPart<T>;
    low[l] = (i % 2 ? lanes<T> : 0) + part * kPart<T> + i / 2;
    high[l] = low[l] + kPart<T> / 2;
  }
  a = shuffle<T>(v.re, v.im, low);
  b = shuffle<T>(v.re, v.im, high);
}

// The edge of an image: `valid` complex numbers from p, and zeros.
template <class T>
__attribute__((noinline, cold)) Cx<T> load_part(const T* p, int valid) {
  T row[2 * lanes<T>] = {};
  for (int k = 0; k < 2 * valid; ++k) row[k] = p[k];
  return split<T>(load(row), load(row + lanes<T>));
}

template <class T>
__attribute__((noinline, cold)) void store_part(T* p, vec<T> a, vec<T> b, int valid) {
  T row[2 * lanes<T>];
  store(row, a);
  store(row + lanes<T>, b);
  for (int k = 0; k < 2 * valid; ++k) p[k] = row[k];
}

template <class T>
ODER_INLINE Cx<T> load_complex(const T* p, int valid = lanes<T>) {
  return __builtin_expect(valid < lanes<T>, 0) ? load_part(p, valid) : split<T>(load(p), load(p + lanes<T>));
}

template <class T>
ODER_INLINE void store_complex(T* p, const Cx<T>& v, int valid = lanes<T>) {
  vec<T> a, b;
  merge<T>(v, a, b);
  if (__builtin_expect(valid < lanes<T>, 0)) {
    store_part<T>(p, a, b, valid);
  } else {
    store(p, a);
    store(p + lanes<T>, b);
  }
}

// v where the bit of its lane is set, else zero.
template <class T>
ODER_INLINE Cx<T> where(unsigned bits, const Cx<T>& v) {
  index_vec<T> lane;
  for (int l = 0; l < lanes<T>; ++l) lane[l] = 1 << l;
  const index_vec<T> keep = ((index_vec<T>{} + static_cast<int>(bits)) & lane) == lane;
  return {reinterpret_cast<vec<T>>(reinterpret_cast<index_vec<T>>(v.re) & keep),
          reinterpret_cast<vec<T>>(reinterpret_cast<index_vec<T>>(v.im) & keep)};
}

template <class T>
ODER_INLINE Cx<T> times(const Cx<T>& a, const Cx<T>& b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
template <class T>
ODER_INLINE Cx<T> times_conjugate(const Cx<T>& a, const Cx<T>& b) {
  return {a.re * b.re + a.im * b.im, a.im * b.re - a.re * b.im};
}
template <class T>
ODER_INLINE Cx<T> scaled(const Cx<T>& a, T factor) {
  return {a.re * factor, a.im * factor};
}

// Memory that a thread keeps from call to call: fresh pages would cost more than the work on a small image. What a
// Slot of the same name gave before is lost.
template <class Slot>
void* kept(size_t bytes) {
  struct Free {
    void operator()(char* p) const { ::operator delete[](p, std::align_val_t{4096}); }
  };
  thread_local std::unique_ptr<char[], Free> memory;
  thread_local size_t size = 0;
  if (size < bytes) {
    memory.reset();
    memory.reset(new (std::align_val_t{4096}) char[bytes]);
    size = bytes;
  }
  return memory.get();
}

}  // namespace oder
