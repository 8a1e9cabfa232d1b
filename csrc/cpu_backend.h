// What the C++ backends offer to the bindings.
#pragma once

#include <cstdint>

#include "diffraction.h"

namespace oder {

enum Dtype { kFloat32 = 0, kFloat64 = 1 };

// Angles of all views (radians), and which of them are used: views[n_used], or all where it is null.
struct RadonGeometry {
  int64_t height, width;
  const double* angles;  // [n_views]
  int64_t n_views;
  const int64_t* views;  // [n_used] or null
  int64_t n_used;
  int64_t n_bins;
  double bin_spacing, bin_offset, pixel_size;
};

// A Cartesian scan: the transform runs along an axis of length n, `width` is the length of the other. Complex numbers
// are pairs of reals. Sampled are lines[n_lines] (-1 pads) of that axis, or the points of a mask of the full transform
// along both; those of the image, or of all images where shared. Of the coils, coils[n_used] are used, or all where
// null.
struct FourierScan {
  const void* maps;      // [batch or 1, n_coils, n, width]
  const void* sampling;  // int64 [batch or 1, n_lines], or bool [batch or 1, width, n] where n_lines is 0
  const int64_t* coils;  // [n_used] or null
  bool shared_maps, shared_sampling;
  bool transposed;  // images are [batch, width, n], not [batch, n, width]
  int64_t n_lines, n_used, n_coils, n, width;
};

// The operands of a RED step beyond the point and the gradient; shapes [batch, n], null where absent.
struct RedOperands {
  const void* denoised;
  const double* step_size;  // []
  const double* tau;        // []
  const void* previous;
  const double* momentum;  // [batch]
  bool nonnegative;
  void* updated;
  void* extrapolated;
  double* reductions;  // [batch, 3]
};

void radon_forward(int dtype, const void* image, void* sinogram, int64_t batch, const RadonGeometry& geometry,
                   int threads);
void radon_adjoint(int dtype, const void* sinogram, void* image, int64_t batch, const RadonGeometry& geometry,
                   bool matched, int threads);
void radon_gradient(int dtype, const void* image, const void* measured, void* gradient, int64_t batch,
                    const RadonGeometry& geometry, int threads);
void red_update(int dtype, const void* image, const void* gradient, const RedOperands& red, int64_t batch, int64_t n,
                int threads);

// Samples are [batch, n_coils, n_lines, width], or [batch, n_coils, width, n] of a mask; null for zeros.
void fourier_forward(int dtype, const void* image, void* samples, int64_t batch, const FourierScan& scan, int threads);
void fourier_adjoint(int dtype, const void* samples, void* image, int64_t batch, const FourierScan& scan, int threads);
void fourier_gradient(int dtype, const void* image, const void* samples, void* gradient, int64_t batch,
                      const FourierScan& scan, int threads);

// Slices' images [count, height, width] that are transformed, and the pupils whose frequencies count of their spectra:
// signed column frequencies [n_illuminations, height, 2], begin and end; null for all frequencies.
struct DiffractionPlanes {
  const int32_t* support;
  int64_t n_illuminations, count, height, width;
};

// Spectra are orthonormal, in natural order; rows that no pupil meets (at neither sign) are neither written nor read.
void diffraction_transform(int dtype, const void* image, void* spectrum, const DiffractionPlanes& planes, int threads);
void diffraction_inverse(int dtype, const void* spectrum, void* image, const DiffractionPlanes& planes, int threads);

// Spectra are [batch, n_slices, height, width], half spectra [batch, n_illuminations, height, width / 2 + 1]; null for
// zeros.
void diffraction_forward(int dtype, const void* spectrum, void* half, int64_t batch, const DiffractionScan& scan,
                         int threads);
void diffraction_adjoint(int dtype, const void* half, void* spectrum, int64_t batch, const DiffractionScan& scan,
                         int threads);
void diffraction_gradient(int dtype, const void* spectrum, const void* half, void* gradient, int64_t batch,
                          const DiffractionScan& scan, int threads);
void diffraction_gram(int dtype, const void* spectrum, const void* data, void* gradient, const DiffractionGram& gram,
                      int64_t batch, int threads);

}  // namespace oder
