// What the C++ faces of radon and red_update offer to the bindings.
#pragma once

#include <cstdint>

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
void radon_red_update(int dtype, const void* image, const void* measured, const RedOperands& red, int64_t batch,
                      const RadonGeometry& geometry, int threads);
void red_update(int dtype, const void* image, const void* gradient, const RedOperands& red, int64_t batch, int64_t n,
                int threads);

}  // namespace oder
