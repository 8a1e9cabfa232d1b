// The RED step of images whose gradient is made run by run: of red_update.
#pragma once

#include <vector>

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

// Numbers of a run where an image is cut into runs alone.
constexpr int64_t kRedRun = 16384;

// The RED step of a batch of images, of which each is made of `parts` parts. A part's sums are added up by the thread
// that has it, those of the parts in order at the end: equal bits for any number of threads.
template <class T>
class RedParts {
 public:
  RedParts(const void* image, const RedOperands& red, int64_t batch, int64_t parts)
      : image_(static_cast<const T*>(image)),
        red_(red),
        batch_(batch),
        parts_(parts),
        sums_(static_cast<size_t>(3 * batch * parts)) {}

  // Step on the n numbers from `at` on, which are of that part of image b and have the gradient g[n].
  template <bool Streams = false>
  void step(int64_t b, int64_t part, int64_t at, const T* g, int64_t n) {
    const double size = *red_.step_size;
    const RedStep<T> p{static_cast<T>(size), static_cast<T>(size * *red_.tau),
                       static_cast<T>(red_.momentum ? red_.momentum[b] : 0.0), red_.nonnegative};
    const auto operand = [at](const void* first) { return static_cast<const T*>(first) + at; };
    T* const updated = static_cast<T*>(red_.updated) + at;
    double* const sums = sums_.data() + 3 * (b * parts_ + part);
    if (red_.previous) {
      red_span<T, true, Streams>(image_ + at, g, operand(red_.denoised), operand(red_.previous), p, updated,
                                 static_cast<T*>(red_.extrapolated) + at, n, sums);
    } else {
      red_span<T, false, Streams>(image_ + at, g, operand(red_.denoised), nullptr, p, updated, nullptr, n, sums);
    }
  }

  void reduce() const {
    for (int64_t b = 0; b < batch_; ++b) {
      for (int64_t r = 0; r < 3; ++r) {
        double total = 0;
        for (int64_t k = b * parts_; k < (b + 1) * parts_; ++k) total += sums_[static_cast<size_t>(3 * k + r)];
        red_.reductions[3 * b + r] = total;
      }
    }
  }

 private:
  const T* image_;
  const RedOperands& red_;
  int64_t batch_, parts_;
  std::vector<double> sums_;  // [batch, parts, 3]
};

}  // namespace oder
