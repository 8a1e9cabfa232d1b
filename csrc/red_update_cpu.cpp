// C++ face of red_update.
//
// Computes        updated, extrapolated and the three reductions of the contract, in one pass over memory.
// Thread mapping  images one after another; each cut into runs of kRun elements, a static share to each thread.
// Shared memory   none; results beyond kStreamBytes in all go past the caches.
// Accumulation    runs of 32 vectors in the image's precision, then double; runs in order: equal bits for any
//                 number of threads.
// Preconditions   contiguous; one dtype, complex as pairs of reals (checked by the caller).
#include "red_update_cpu.h"

#include <omp.h>

#include <vector>

namespace oder {
namespace {

constexpr int64_t kRun = 16384;
constexpr int64_t kStreamBytes = int64_t{4} << 20;

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % kVecBytes == 0; }

template <class T, bool Momentum, bool Streams>
void run(const T* image, const T* gradient, const RedOperands& red, int64_t batch, int64_t n, int threads) {
  const int64_t runs = (n + kRun - 1) / kRun;
  std::vector<double> partial(static_cast<size_t>(batch * runs * 3), 0.0);
  const T* denoised = static_cast<const T*>(red.denoised);
  const T* previous = static_cast<const T*>(red.previous);
  T* updated = static_cast<T*>(red.updated);
  T* extrapolated = static_cast<T*>(red.extrapolated);
#pragma omp parallel for schedule(static) num_threads(threads) if (batch * n > kRun)
  for (int64_t task = 0; task < batch * runs; ++task) {
    const int64_t b = task / runs, k = task % runs * kRun, o = b * n + k;
    red_span<T, Momentum, Streams>(image + o, gradient + o, denoised + o, Momentum ? previous + o : nullptr,
                                   red_step<T>(red, b), updated + o, Momentum ? extrapolated + o : nullptr,
                                   n - k < kRun ? n - k : kRun, partial.data() + task * 3);
    if (Streams) stream_fence();
  }
  for (int64_t b = 0; b < batch; ++b) {
    for (int r = 0; r < 3; ++r) {
      double s = 0;
      for (int64_t k = 0; k < runs; ++k) s += partial[static_cast<size_t>((b * runs + k) * 3 + r)];
      red.reductions[b * 3 + r] = s;
    }
  }
}

template <class T>
void choose(const void* image, const void* gradient, const RedOperands& red, int64_t batch, int64_t n, int threads) {
  const T* x = static_cast<const T*>(image);
  const T* g = static_cast<const T*>(gradient);
  const bool rows_aligned = batch == 1 || n % lanes<T> == 0;
  const bool streams = batch * n * static_cast<int64_t>(sizeof(T)) >= kStreamBytes && rows_aligned &&
                       aligned(red.updated) && aligned(red.extrapolated);
  if (red.previous) {
    streams ? run<T, true, true>(x, g, red, batch, n, threads) : run<T, true, false>(x, g, red, batch, n, threads);
  } else {
    streams ? run<T, false, true>(x, g, red, batch, n, threads) : run<T, false, false>(x, g, red, batch, n, threads);
  }
}

}  // namespace

void red_update(int dtype, const void* image, const void* gradient, const RedOperands& red, int64_t batch, int64_t n,
                int threads) {
  dtype == kFloat64 ? choose<double>(image, gradient, red, batch, n, threads)
                    : choose<float>(image, gradient, red, batch, n, threads);
}

}  // namespace oder
