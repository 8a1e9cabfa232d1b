// What the CUDA backend of fourier offers to the bindings.
#pragma once

#include <cstdint>

namespace oder {

// A Cartesian scan: the transform runs along an axis of length n, `width` is the length of the other. Complex numbers
// are pairs of float32. Sampled are lines[n_lines] of that axis (what lies outside 0 .. n - 1 pads), or the points of a
// mask of the full transform along both; those of the image, or of all images where shared. Of the coils, coils[n_used]
// are used, or all where null; those outside 0 .. n_coils - 1 count as zero.
struct FourierScan {
  int maps_dtype;
  const void* maps;  // pairs of maps_dtype [batch or 1, n_coils, n, width]
  bool shared_maps;
  const void* sampling;  // int64 [batch or 1, n_lines], or bool [batch or 1, width, n] where n_lines is 0
  int n_lines;
  bool shared_sampling;
  const int64_t* coils;  // [n_used] or null
  int n_used;
  bool transposed;           // images are [batch, width, n], not [batch, n, width]
  const float* roots_n;      // exp(-2 pi i k / n), pairs [n]
  const float* roots_width;  // the same for width, with a mask
  float* workspace;          // pairs [batch, n_used, n, width], with a mask
  int batch, n_coils, n, width;
};

// Device addresses throughout, a cudaStream_t last. Samples are [batch, n_coils, n_lines, width], or [batch, n_coils,
// width, n] of a mask; null for zeros in the gradient.
void fourier_forward(int dtype, const void* image, void* samples, const FourierScan& scan, void* stream);
void fourier_adjoint(int dtype, const void* samples, void* image, const FourierScan& scan, void* stream);
void fourier_gradient(int dtype, const void* image, const void* samples, void* gradient, const FourierScan& scan,
                      void* stream);

}  // namespace oder
