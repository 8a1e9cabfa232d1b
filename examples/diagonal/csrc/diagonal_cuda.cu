#include "cuda_types.h"

namespace oder {
namespace {

constexpr int kThreads = 256;

// CUDA backend of diagonal.
//
// Computes        data[b,k] = mask[k] * image[b,k].
// Thread mapping  grid (ceil(batch * n / 256)), block 256: a thread has a pixel.
// Shared memory   none.
// Accumulation    none; products in float32.
// Preconditions   contiguous; one dtype (checked by the caller).
template <class T>
ODER_KERNEL ODER_BOUNDS(kThreads, 8) diagonal_kernel(const T* image, const T* mask, T* data, int64_t n, int64_t count) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at < count) data[at] = from_float<T>(to_float(mask[at % n]) * to_float(image[at]));
}

template <class T>
void diagonal(const T* image, const T* mask, T* data, int64_t batch, int64_t n, void* stream) {
  const int64_t count = batch * n;
  ODER_LAUNCH(diagonal_kernel<T>, (count + kThreads - 1) / kThreads, kThreads, 0, stream, image, mask, data, n, count);
}

const Operator kDiagonal("diagonal", diagonal<float>, diagonal<Bfloat16>, diagonal<Float16>);

}  // namespace
}  // namespace oder
