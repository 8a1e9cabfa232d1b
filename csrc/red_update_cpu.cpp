// C++ backend of red_update.
//
// Computes        updated, extrapolated and the three reductions of the contract, in one pass over memory.
// Thread mapping  images one after another; each cut into runs of kRun numbers, a static share to each thread.
// Shared memory   none; results beyond kStreamBytes in all go past the caches.
// Accumulation    runs of 32 vectors in the image's precision, then double; runs in order: equal bits for any
//                 number of threads.
// Preconditions   contiguous; one dtype, complex as pairs of reals (checked by the caller).
#include <vector>

#include "red_update.h"
#include "vec.h"

namespace oder {
namespace {

constexpr int64_t kRun = 16384;
constexpr int64_t kStreamBytes = int64_t{4} << 20;

template <class T>
struct RedStep {
  T step, weight, momentum;  // weight = step * tau
  bool nonnegative;
};

// updated = x - step g - weight (x - denoised), projected where asked for; extrapolated = updated +
// momentum (updated - previous). Adds the three reductions of the contract to sums. Null previous: no momentum.
// Streams: results go past the caches; needs aligned results.
template <class T, bool Momentum, bool Streams>
void red_span(const T* x, const T* g, const T* denoised, const T* previous, const RedStep<T>& p, T* updated,
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

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % kVecBytes == 0; }

template <class T>
void red_update(const T* image, const T* gradient, const RedOperands& red, [[maybe_unused]] int threads) {
  const int64_t batch = red.batch, n = red.n;
  const bool rows_aligned = batch == 1 || n % lanes<T> == 0;
  const bool streams = batch * n * static_cast<int64_t>(sizeof(T)) >= kStreamBytes && rows_aligned &&
                       aligned(red.updated) && aligned(red.extrapolated);
  const auto span = red.previous ? (streams ? red_span<T, true, true> : red_span<T, true, false>)
                                 : (streams ? red_span<T, false, true> : red_span<T, false, false>);
  const int64_t runs = (n + kRun - 1) / kRun;
  std::vector<double> sums(static_cast<size_t>(3 * batch * runs));
#pragma omp parallel for schedule(static) num_threads(threads) if (batch * n > kRun)
  for (int64_t task = 0; task < batch * runs; ++task) {
    const int64_t b = task / runs, first = task % runs * kRun;
    const double size = *red.step_size;
    const RedStep<T> step{static_cast<T>(size), static_cast<T>(size * *red.tau),
                          static_cast<T>(red.momentum ? red.momentum[b] : 0.0), red.nonnegative};
    const auto from = [&](const void* a) { return a ? static_cast<const T*>(a) + b * n + first : nullptr; };
    const auto to = [&](void* a) { return a ? static_cast<T*>(a) + b * n + first : nullptr; };
    span(from(image), from(gradient), from(red.denoised), from(red.previous), step, to(red.updated),
         to(red.extrapolated), n - first < kRun ? n - first : kRun, sums.data() + 3 * task);
    if (streams) stream_fence();
  }
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t r = 0; r < 3; ++r) {
      double total = 0;
      for (int64_t k = b * runs; k < (b + 1) * runs; ++k) total += sums[static_cast<size_t>(3 * k + r)];
      red.reductions[3 * b + r] = total;
    }
  }
}

const Operator kRedUpdate("red_update", red_update<float>, red_update<double>);

}  // namespace
}  // namespace oder
