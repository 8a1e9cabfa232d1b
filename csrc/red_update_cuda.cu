#include "cuda_types.h"
#include "red_update.h"

namespace oder {
namespace {

constexpr int kThreads = 256;

// The numbers of one image's step, read on the device.
struct RedStep {
  float step, tau, momentum;
  bool nonnegative;
};

ODER_DEVICE RedStep red_step(const RedOperands& red, int64_t b) {
  return {static_cast<float>(*red.step_size), static_cast<float>(*red.tau),
          red.momentum ? static_cast<float>(red.momentum[b]) : 0.0f, red.nonnegative};
}

// Updates one number; the extrapolation and the sums take `updated` before it is rounded to its storage.
ODER_DEVICE void red_pixel(const RedStep& p, float x, float gradient, float denoised, float previous, bool has_previous,
                           float& updated, float& extrapolated, float sums[3]) {
  float u = x - p.step * (gradient + p.tau * (x - denoised));
  if (p.nonnegative && u < 0.0f) u = 0.0f;
  const float change = u - x;
  sums[0] += change * change;
  sums[1] += u * u;
  updated = u;
  if (has_previous) {
    const float direction = u - previous;
    extrapolated = u + p.momentum * direction;
    sums[2] -= change * direction;
  }
}

// Sums of a block of kThreads threads, in an order that is always the same; thread 0 has the result.
ODER_DEVICE void red_block_sums(double sums[3]) {
  ODER_SHARED(double, warp_sums, 3 * kThreads / 32);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
#pragma unroll
    for (int k = 0; k < 3; ++k) sums[k] += shuffle_down(sums[k], offset);
  }
  if (lane == 0) {
#pragma unroll
    for (int k = 0; k < 3; ++k) warp_sums[3 * warp + k] = sums[k];
  }
  __syncthreads();
  if (thread != 0) return;
#pragma unroll
  for (int k = 0; k < 3; ++k) {
    sums[k] = 0;
    for (int w = 0; w < kThreads / 32; ++w) sums[k] += warp_sums[3 * w + k];
  }
}

// CUDA backend of red_update.
//
// Computes        updated = P(x - step (g + tau (x - denoised))), extrapolated = updated + momentum (updated -
//                 previous), and for each part of an image the sums of (updated - x)^2, updated^2 and (x - updated)
//                 (updated - previous).
// Thread mapping  grid (batch * n_partials), block 256: block b * n_partials + part has an equal share of image b; its
//                 threads take runs of 16 bytes in turn, and one by one what precedes the first aligned run, what
//                 follows the last, and everything where the operands are not aligned alike.
// Shared memory   the sums of 8 warps.
// Accumulation    float32 over one run, float64 beyond; order fixed by the sizes alone.
// Preconditions   contiguous; one dtype; no operand overlaps an output.
template <class T>
ODER_KERNEL ODER_BOUNDS(kThreads, 4) red_update_kernel(const T* image, const T* gradient, RedOperands red) {
  constexpr int kRun = 16 / sizeof(T);
  using Run = Pack<T, kRun>;
  const int64_t n = red.n;
  const int64_t b = blockIdx.x / red.n_partials, part = blockIdx.x % red.n_partials;
  const int64_t share = ((n + red.n_partials - 1) / red.n_partials + kRun - 1) / kRun * kRun;
  const int64_t begin = part * share < n ? part * share : n;
  const int64_t length = n - begin < share ? n - begin : share;
  const int64_t origin = b * n + begin;
  const bool momentum = red.previous != nullptr;
  const RedStep step = red_step(red, b);

  const T* const x = image + origin;
  const T* const g = gradient + origin;
  const T* const denoised = static_cast<const T*>(red.denoised) + origin;
  const T* const previous = momentum ? static_cast<const T*>(red.previous) + origin : x;
  T* const updated = static_cast<T*>(red.updated) + origin;
  T* const extrapolated = momentum ? static_cast<T*>(red.extrapolated) + origin : updated;

  const auto phase = [](const T* p) { return reinterpret_cast<uintptr_t>(p) % 16; };
  const bool alike = phase(x) == phase(g) && phase(x) == phase(denoised) && phase(x) == phase(previous) &&
                     phase(x) == phase(updated) && phase(x) == phase(extrapolated);
  int64_t head = alike ? static_cast<int64_t>((16 - phase(x)) % 16 / sizeof(T)) : length;
  if (head > length) head = length;
  const int64_t runs = (length - head) / kRun, tail = head + runs * kRun;

  double sums[3] = {0, 0, 0};
  const auto one = [&](int64_t k) {
    float u, e = 0, part_sums[3] = {0, 0, 0};
    red_pixel(step, to_float(x[k]), to_float(g[k]), to_float(denoised[k]), to_float(previous[k]), momentum, u, e,
              part_sums);
    updated[k] = from_float<T>(u);
    if (momentum) extrapolated[k] = from_float<T>(e);
    for (int m = 0; m < 3; ++m) sums[m] += part_sums[m];
  };
  for (int64_t k = threadIdx.x; k < head; k += kThreads) one(k);
  for (int64_t k = tail + threadIdx.x; k < length; k += kThreads) one(k);

  const auto run_of = [head](const T* p) { return reinterpret_cast<const Run*>(p + head); };
#pragma unroll 2
  for (int64_t k = threadIdx.x; k < runs; k += kThreads) {
    const Run xs = run_of(x)[k], gs = run_of(g)[k], ds = run_of(denoised)[k];
    Run ps = xs, us, es;
    if (momentum) ps = run_of(previous)[k];
    float part_sums[3] = {0, 0, 0};
#pragma unroll
    for (int m = 0; m < kRun; ++m) {
      float u, e = 0;
      red_pixel(step, to_float(xs.at[m]), to_float(gs.at[m]), to_float(ds.at[m]), to_float(ps.at[m]), momentum, u, e,
                part_sums);
      us.at[m] = from_float<T>(u);
      es.at[m] = from_float<T>(e);
    }
    reinterpret_cast<Run*>(updated + head)[k] = us;
    if (momentum) reinterpret_cast<Run*>(extrapolated + head)[k] = es;
#pragma unroll
    for (int m = 0; m < 3; ++m) sums[m] += part_sums[m];
  }
  red_block_sums(sums);
  if (threadIdx.x == 0) {
    double* const out = red.partials + 3 * static_cast<int64_t>(blockIdx.x);
    for (int m = 0; m < 3; ++m) out[m] = sums[m];
  }
}

// Second stage of the reductions of red_update.
//
// Computes        reductions[b,m] = sum_p partials[b,p,m].
// Thread mapping  grid (batch), block 256: a thread adds every 256th partial sum of image b.
// Shared memory   the sums of 8 warps.
// Accumulation    float64; order fixed by n_partials alone.
// Preconditions   none.
ODER_KERNEL ODER_BOUNDS(kThreads, 1) red_finish_kernel(RedOperands red) {
  double sums[3] = {0, 0, 0};
  for (int64_t p = threadIdx.x; p < red.n_partials; p += kThreads) {
    const double* const partial = red.partials + 3 * (blockIdx.x * red.n_partials + p);
    for (int m = 0; m < 3; ++m) sums[m] += partial[m];
  }
  red_block_sums(sums);
  if (threadIdx.x == 0) {
    for (int m = 0; m < 3; ++m) red.reductions[3 * static_cast<int64_t>(blockIdx.x) + m] = sums[m];
  }
}

template <class T>
void red_update(const T* image, const T* gradient, const RedOperands& red, void* stream) {
  ODER_LAUNCH(red_update_kernel<T>, red.batch * red.n_partials, kThreads, 0, stream, image, gradient, red);
  ODER_LAUNCH(red_finish_kernel, red.batch, kThreads, 0, stream, red);
}

const Operator kRedUpdate("red_update", red_update<float>, red_update<Bfloat16>, red_update<Float16>);

}  // namespace
}  // namespace oder
