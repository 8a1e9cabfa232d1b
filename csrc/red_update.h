// The operands of a RED step, for host and device.
#pragma once

#include "operator.h"

namespace oder {

// Beyond the point and the gradient; shapes [batch, n], complex numbers as pairs of reals, null where absent.
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
  double* partials;    // [batch, n_partials, 3]; on the GPU
  int64_t n_partials;
  int64_t batch, n;
};

}  // namespace oder
