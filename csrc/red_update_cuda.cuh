// The RED step of one number and the reductions of a block, for red_update and for the epilogue of the CT
// back-projection.
#pragma once

#include "cuda_launch.h"
#include "red_update_cuda.h"

namespace oder {

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

constexpr int kRedThreads = 256;

// Sums of a block of kRedThreads threads, in an order that is always the same; thread 0 has the result.
ODER_DEVICE void red_block_sums(double sums[3]) {
  ODER_SHARED(double, warp_sums, 3 * kRedThreads / 32);
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
    for (int w = 0; w < kRedThreads / 32; ++w) sums[k] += warp_sums[3 * w + k];
  }
}

}  // namespace oder
