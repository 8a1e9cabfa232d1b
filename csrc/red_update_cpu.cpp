// C++ face of red_update.
//
// Computes        updated, extrapolated and the three reductions of the contract, in one pass over memory.
// Thread mapping  images one after another; each cut into runs of kRedRun elements, a static share to each thread.
// Shared memory   none; results beyond kStreamBytes in all go past the caches.
// Accumulation    runs of 32 vectors in the image's precision, then double; runs in order: equal bits for any
//                 number of threads.
// Preconditions   contiguous; one dtype, complex as pairs of reals (checked by the caller).
#include "red_update_cpu.h"

#include <omp.h>

namespace oder {
namespace {

constexpr int64_t kStreamBytes = int64_t{4} << 20;

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % kVecBytes == 0; }

template <class T>
void run(const void* image, const T* gradient, const RedOperands& red, int64_t batch, int64_t n, int threads) {
  const bool rows_aligned = batch == 1 || n % lanes<T> == 0;
  const bool streams = batch * n * static_cast<int64_t>(sizeof(T)) >= kStreamBytes && rows_aligned &&
                       aligned(red.updated) && aligned(red.extrapolated);
  const int64_t runs = (n + kRedRun - 1) / kRedRun;
  RedParts<T> parts(image, red, batch, runs);
#pragma omp parallel for schedule(static) num_threads(threads) if (batch * n > kRedRun)
  for (int64_t task = 0; task < batch * runs; ++task) {
    const int64_t b = task / runs, first = task % runs * kRedRun, at = b * n + first;
    const int64_t count = n - first < kRedRun ? n - first : kRedRun;
    if (streams) {
      parts.template step<true>(b, task % runs, at, gradient + at, count);
      stream_fence();
    } else {
      parts.step(b, task % runs, at, gradient + at, count);
    }
  }
  parts.reduce();
}

}  // namespace

void red_update(int dtype, const void* image, const void* gradient, const RedOperands& red, int64_t batch, int64_t n,
                int threads) {
  dtype == kFloat64 ? run(image, static_cast<const double*>(gradient), red, batch, n, threads)
                    : run(image, static_cast<const float*>(gradient), red, batch, n, threads);
}

}  // namespace oder
