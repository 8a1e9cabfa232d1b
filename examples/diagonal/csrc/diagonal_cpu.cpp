// C++ backend of diagonal.
//
// Computes        data[b,k] = mask[k] * image[b,k].
// Thread mapping  an image at a time, a share of its pixels to each thread.
// Shared memory   none.
// Accumulation    none.
// Preconditions   contiguous; one dtype (checked by the caller).
#include "operator.h"

namespace oder {
namespace {

template <class T>
void diagonal(const T* image, const T* mask, T* data, int64_t batch, int64_t n, [[maybe_unused]] int threads) {
  for (int64_t b = 0; b < batch; ++b) {
#pragma omp parallel for num_threads(threads)
    for (int64_t k = 0; k < n; ++k) data[b * n + k] = mask[k] * image[b * n + k];
  }
}

const Operator kDiagonal("diagonal", diagonal<float>, diagonal<double>);

}  // namespace
}  // namespace oder
