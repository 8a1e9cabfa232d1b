// What the CUDA backend of radon offers to the bindings.
#pragma once

#include "radon.h"

namespace oder {

// Device addresses throughout; lengths in pixels but for pixel_size, which scales the result; a cudaStream_t last.
void radon_forward(int dtype, const void* image, void* sinogram, float* sums, int64_t n_sums, int batch,
                   const RadonScan& scan, double pixel_size, void* stream);
void radon_adjoint(int dtype, const void* sinogram, void* image, int batch, const RadonScan& scan, double pixel_size,
                   bool matched, void* stream);
void radon_gradient(int dtype, const void* image, const void* measured, float* sums, int64_t n_sums, void* gradient,
                    int batch, const RadonScan& scan, double pixel_size, void* stream);

}  // namespace oder
