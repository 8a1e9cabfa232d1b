// What the CUDA backend of red_update offers to the bindings.
#pragma once

#include <cstdint>

namespace oder {

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
  double* partials;    // [batch, n_partials, 3]
  int64_t n_partials;
};

void red_update(int dtype, const void* image, const void* gradient, const RedOperands& red, int64_t batch, int64_t n,
                void* stream);

}  // namespace oder
