// The discrete Fourier transform of any length along vectors, a vector of numbers of as many transforms at a time: what
// the C++ backends that need one share.
#pragma once

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <mutex>
#include <type_traits>
#include <vector>

#include "complex_cpu.h"
#include "fourier.h"

namespace oder {

// Transposes a square of complex numbers, given as rows.
template <class T>
ODER_INLINE void transpose_square(Cx<T>* rows) {
  vec<T> part[lanes<T>];
  for (int l = 0; l < lanes<T>; ++l) part[l] = rows[l].re;
  oder::transpose<T>(part);
  for (int l = 0; l < lanes<T>; ++l) rows[l].re = part[l];
  for (int l = 0; l < lanes<T>; ++l) part[l] = rows[l].im;
  oder::transpose<T>(part);
  for (int l = 0; l < lanes<T>; ++l) rows[l].im = part[l];
}

// Odd primes up to here have a butterfly of their own in registers; larger ones share one that works in memory.
constexpr int kLargestUnrolled = 7;

// Outputs k of a large butterfly that are summed at a time, with their counterparts radix - k: as many as the registers
// hold.
constexpr int kOutputs = 3;

// Cosines and sines of 2 pi j k / radix in the order in which large_butterfly takes them.
template <class T>
std::vector<T> large_roots(int radix) {
  const int half = (radix - 1) / 2;
  std::vector<T> roots;
  for (int k = 1; k <= half;) {
    const int count = half - k + 1 >= kOutputs ? kOutputs : 1;
    for (int64_t j = 1; j <= half; ++j) {
      for (const bool sine : {false, true}) {
        for (int o = 0; o < count; ++o) {
          const double angle = 6.283185307179586476925 * static_cast<double>(j * (k + o) % radix) / radix;
          roots.push_back(static_cast<T>(sine ? std::sin(angle) : std::cos(angle)));
        }
      }
    }
    k += count;
  }
  return roots;
}

template <class T>
struct Transform {
  FourierPlan plan;
  T scale;                            // 1 / sqrt(n)
  std::vector<std::vector<T>> tw;     // per stage [m, radix - 1] pairs: exp(-2 pi i q k / block)
  std::vector<std::vector<T>> roots;  // per stage of a large radix
  std::vector<int> position;          // of each frequency
  int largest;                        // radix in memory, or 1

  explicit Transform(int n)
      : plan(fourier_plan(n, kVecBytes == 64 ? 8 : 4)), scale(static_cast<T>(1 / std::sqrt(double(n)))), largest(1) {
    constexpr double turn = 6.283185307179586476925;
    int block = n;
    for (int s = 0; s < plan.n_stages; ++s) {
      const int radix = plan.radix[s], m = block / radix;
      std::vector<T> w, r;
      for (int64_t q = 0; q < m; ++q) {
        for (int64_t k = 1; k < radix; ++k) {
          const double angle = -turn * static_cast<double>(q * k % block) / block;
          w.push_back(static_cast<T>(std::cos(angle)));
          w.push_back(static_cast<T>(std::sin(angle)));
        }
      }
      if (radix > kLargestUnrolled) {
        largest = std::max(largest, radix);
        r = large_roots<T>(radix);
      }
      tw.push_back(std::move(w));
      roots.push_back(std::move(r));
      block = m;
    }
    for (int k = 0; k < n; ++k) position.push_back(fourier_position(plan, k));
  }

  static const Transform& of(int64_t n) {
    static std::mutex mutex;
    static std::map<int64_t, std::unique_ptr<Transform>> known;
    const std::lock_guard<std::mutex> guard(mutex);
    auto& one = known[n];
    if (!one) one = std::make_unique<Transform>(static_cast<int>(n));
    return *one;
  }
};

// Calls f with a radix known at compile time; 0 stands for the large ones.
template <class F>
ODER_INLINE void with_radix(int radix, F&& f) {
  using std::integral_constant;
  switch (radix) {
    case 1:
      return f(integral_constant<int, 1>{});
    case 2:
      return f(integral_constant<int, 2>{});
    case 3:
      return f(integral_constant<int, 3>{});
    case 4:
      return f(integral_constant<int, 4>{});
    case 5:
      return f(integral_constant<int, 5>{});
    case 7:
      return f(integral_constant<int, 7>{});
    case 8:
      return f(integral_constant<int, 8>{});
    default:
      return f(integral_constant<int, 0>{});
  }
}

// The butterfly of an odd radix in memory: a[0 .. radix), with 2 radix vectors of workspace.
template <bool Inverse, class T>
void large_butterfly(Cx<T>* a, int radix, const T* roots, Cx<T>* work) {
  const int half = (radix - 1) / 2;
  // Sum and difference of a pair side by side.
  const Cx<T> first = a[0];
  Cx<T> total = first;
  for (int j = 1; j <= half; ++j) {
    work[2 * j] = a[j] + a[radix - j];
    work[2 * j + 1] = turn<Inverse>(a[j] - a[radix - j]);
    total = total + work[2 * j];
  }
  const auto outputs = [&](int k, auto count) {
    constexpr int N = decltype(count)::value;
    Cx<T> c[N], s[N];
    for (int o = 0; o < N; ++o) {
      c[o] = first;
      s[o] = Cx<T>{};
    }
    for (int j = 1; j <= half; ++j, roots += 2 * N) {
      const Cx<T> sum = work[2 * j], difference = work[2 * j + 1];
      for (int o = 0; o < N; ++o) c[o] = {c[o].re + roots[o] * sum.re, c[o].im + roots[o] * sum.im};
      for (int o = 0; o < N; ++o) {
        s[o] = {s[o].re + roots[N + o] * difference.re, s[o].im + roots[N + o] * difference.im};
      }
    }
    for (int o = 0; o < N; ++o) {
      a[k + o] = c[o] + s[o];
      a[radix - k - o] = c[o] - s[o];
    }
    return N;
  };
  for (int k = 1; k <= half;) {
    k += half - k + 1 >= kOutputs ? outputs(k, std::integral_constant<int, kOutputs>{})
                                  : outputs(k, std::integral_constant<int, 1>{});
  }
  a[0] = total;
}

// Where a transform takes its numbers from and where it leaves them: a stage calls in(index) and out(index, value).
template <class T>
struct InPlace {
  Cx<T>* a;
  Cx<T> operator()(int i) const { return a[i]; }
  void operator()(int i, const Cx<T>& v) const { a[i] = v; }
};

// One stage on `blocks` blocks of radix * m vectors. Where m is 1 there is nothing to turn.
template <int R, bool Inverse, bool Turns, class T, class In, class Out>
void stage(const Transform<T>& t, int s, int blocks, int m, Cx<T>* work, const In in, const Out out) {
  const int radix = R ? R : t.plan.radix[s];
  Cx<T> few[R ? R : 1];
  Cx<T>* const a = R ? few : work;
  for (int q = 0; q < m; ++q) {
    const T* const w = t.tw[s].data() + static_cast<int64_t>(2) * (radix - 1) * q;
    // In registers for all blocks, where they fit.
    constexpr bool kHeld = R > 1 && R <= 4 * (kVecBytes / 32);
    Cx<T> held[kHeld ? R : 1];
    if (kHeld) {
      for (int k = 1; k < R; ++k) held[kHeld ? k : 0] = {splat(w[2 * k - 2]), splat(w[2 * k - 1])};
    }
    const auto turned = [&](const Cx<T>& v, int k) {
      if (kHeld) return Inverse ? times_conjugate<T>(v, held[k]) : times<T>(v, held[k]);
      return multiply(v, w[2 * k - 2], Inverse ? -w[2 * k - 1] : w[2 * k - 1]);
    };
    for (int b = 0; b < blocks; ++b) {
      const int base = b * radix * m + q;
      ODER_UNROLL
      for (int o = 0; o < radix; ++o) {
        // Even before odd, as a butterfly of 8 takes them: all would not fit the registers.
        const int j = R == 8 ? o % 4 * 2 + o / 4 : o;
        a[j] = in(base + j * m);
        if (Inverse && Turns && j > 0) a[j] = turned(a[j], j);
      }
      if constexpr (R > 0) {
        butterfly<R, Inverse, T>(a);
      } else {
        large_butterfly<Inverse, T>(a, radix, t.roots[s].data(), work + radix);
      }
      ODER_UNROLL
      for (int k = 0; k < radix; ++k) {
        if (!Inverse && Turns && k > 0) a[k] = turned(a[k], k);
        out(base + k * m, a[k]);
      }
    }
  }
}

template <bool Inverse, class T, class In, class Out>
void any_stage(const Transform<T>& t, int s, int blocks, int m, Cx<T>* work, const In& in, const Out& out) {
  with_radix(t.plan.radix[s], [&](auto radix) {
    constexpr int R = decltype(radix)::value;
    if constexpr (std::is_same_v<In, Out>) {
      if (m == 1) return stage<R, Inverse, false, T, In, Out>(t, s, blocks, m, work, in, out);
    }
    stage<R, Inverse, true, T, In, Out>(t, s, blocks, m, work, in, out);
  });
}

// Forward stages [0, n_stages) from `in` into a.
template <class T, class In>
void forward_stages(const Transform<T>& t, int n_stages, Cx<T>* a, Cx<T>* work, const In& in) {
  const InPlace<T> here{a};
  int blocks = 1, m = t.plan.n;
  for (int s = 0; s < n_stages; ++s) {
    m /= t.plan.radix[s];
    s == 0 ? any_stage<false>(t, s, blocks, m, work, in, here) : any_stage<false>(t, s, blocks, m, work, here, here);
    blocks *= t.plan.radix[s];
  }
  if (n_stages == 0) {
    for (int i = 0; i < t.plan.n; ++i) a[i] = in(i);
  }
}

// Inverse stages [0, n_stages), the last first, from a to `out`.
template <class T, class Out>
void inverse_stages(const Transform<T>& t, int n_stages, Cx<T>* a, Cx<T>* work, const Out& out) {
  const InPlace<T> here{a};
  int blocks = 1, m = t.plan.n;
  for (int s = 0; s < n_stages; ++s) {
    m /= t.plan.radix[s];
    blocks *= t.plan.radix[s];
  }
  for (int s = n_stages - 1; s >= 0; --s) {
    blocks /= t.plan.radix[s];
    s == 0 ? any_stage<true>(t, s, blocks, m, work, here, out) : any_stage<true>(t, s, blocks, m, work, here, here);
    m *= t.plan.radix[s];
  }
  if (n_stages == 0) {
    for (int i = 0; i < t.plan.n; ++i) out(i, a[i]);
  }
}

// ---------------------------------------------------------------- two axes

// Of a row of the strips that a thread works on together: a visit to a page of memory then serves them all.
constexpr int64_t kTileRowBytes = 256;

// Copies strips [first, first + strips) of `count` rows of `width` complex numbers, strip after strip, filled up with
// zeros at the edge.
template <class T>
void load_rows(const T* rows, int64_t count, int64_t width, int64_t first, int64_t strips, Cx<T>* to) {
  constexpr int kAhead = 16, L = lanes<T>;
  const T* row = rows + 2 * first * L;
  for (int64_t i = 0; i < count; ++i, row += 2 * width) {
    for (int64_t v = 0; v < strips; ++v) {
      __builtin_prefetch(row + 2 * (kAhead * width + v * L));
      to[v * count + i] =
          load_complex(row + 2 * v * L, static_cast<int>(std::min(int64_t{L}, width - (first + v) * L)));
    }
  }
}

// Between transforms along columns and along rows a plane lies as [groups of `lanes` rows, width]: of n rows, the
// strip's numbers at(row) into a plane from the strip's first column on.
template <class T, class At>
ODER_INLINE void strip_to_groups(int64_t n, const At& at, Cx<T>* plane, int64_t width, int valid) {
  constexpr int L = lanes<T>;
  for (int64_t first = 0; first < n; first += L, plane += width) {
    Cx<T> square[L];
    for (int l = 0; l < L; ++l) {
      const int64_t row = first + column_of<T>(l);
      square[l] = row < n ? at(row) : Cx<T>{};
    }
    transpose_square<T>(square);
    for (int l = 0; l < L; ++l) {
      if (column_of<T>(l) < valid) plane[column_of<T>(l)] = square[l];
    }
  }
}

// The reverse: calls put(row, v).
template <class T, class Put>
ODER_INLINE void groups_to_strip(const Cx<T>* plane, int64_t width, int valid, int64_t n, const Put& put) {
  constexpr int L = lanes<T>;
  for (int64_t first = 0; first < n; first += L, plane += width) {
    Cx<T> square[L];
    for (int l = 0; l < L; ++l) square[l] = column_of<T>(l) < valid ? plane[column_of<T>(l)] : Cx<T>{};
    transpose_square<T>(square);
    for (int l = 0; l < L; ++l) {
      const int64_t row = first + column_of<T>(l);
      if (row < n) put(row, square[l]);
    }
  }
}

}  // namespace oder
