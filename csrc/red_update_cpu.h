// The RED step on one run of memory, shared by red_update and by the epilogue of the CT back-projection.
#pragma once

#include "cpu_faces.h"
#include "vec.h"

namespace oder {

template <class T>
struct RedStep {
  T step, weight, momentum;  // weight = step * tau
  bool nonnegative;
};

// updated = x - step g - weight (x - denoised), projected where asked for; extrapolated = updated +
// momentum (updated - previous). Adds the three reductions of the contract to sums. Null previous: no momentum.
// Streams: results go past the caches; needs aligned results.
template <class T, bool Momentum, bool Streams>
inline void red_span(const T* x, const T* g, const T* denoised, const T* previous, const RedStep<T>& p, T* updated,
                     T* extrapolated, int64_t n, double* sums) {
  constexpr int L = lanes<T>;
  using V = vec<T>;
  const V floor = splat(p.nonnegative ? T(0) : T(-__builtin_inf()));
  int64_t k = 0;
  while (k + L <= n) {
    // Short runs in T, their sums in double: as exact as double throughout to far below float's rounding.
    const int64_t end = k + 32 * L < n ? k + 32 * L : n;
    V change2{}, norm2{}, uphill{};
    for (; k + L <= end; k += L) {
      const V xv = load(x + k);
      V u = xv - p.step * load(g + k) - p.weight * (xv - load(denoised + k));
      u = u < floor ? floor : u;
      const V change = u - xv;
      change2 += change * change;
      norm2 += u * u;
      if (Streams) {
        stream(updated + k, u);
      } else {
        store(updated + k, u);
      }
      if (Momentum) {
        const V direction = u - load(previous + k);
        uphill -= change * direction;
        if (Streams) {
          stream(extrapolated + k, u + p.momentum * direction);
        } else {
          store(extrapolated + k, u + p.momentum * direction);
        }
      }
    }
    sums[0] += sum_lanes(change2);
    sums[1] += sum_lanes(norm2);
    if (Momentum) sums[2] += sum_lanes(uphill);
  }
  for (; k < n; ++k) {
    T u = x[k] - p.step * g[k] - p.weight * (x[k] - denoised[k]);
    if (p.nonnegative && u < 0) u = 0;
    const T change = u - x[k];
    sums[0] += static_cast<double>(change) * change;
    sums[1] += static_cast<double>(u) * u;
    updated[k] = u;
    if (Momentum) {
      const T direction = u - previous[k];
      sums[2] -= static_cast<double>(change) * direction;
      extrapolated[k] = u + p.momentum * direction;
    }
  }
}

template <class T>
inline RedStep<T> red_step(const RedOperands& red, int64_t b) {
  const double step = *red.step_size;
  return {static_cast<T>(step), static_cast<T>(step * *red.tau), static_cast<T>(red.momentum ? red.momentum[b] : 0.0),
          red.nonnegative};
}

}  // namespace oder
