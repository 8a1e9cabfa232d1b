// What the CUDA backend of diffraction offers to the bindings.
#pragma once

#include "diffraction.h"

namespace oder {

// Device addresses throughout, a cudaStream_t last; complex numbers are pairs of float32. Sizes of a scan and of Gram
// matrices fit in 29 bits; of illuminations, those outside 0 .. n_illuminations - 1 count as zero. Spectra are [batch,
// n_slices, height, width], half spectra [batch, n_illuminations, height, width / 2 + 1]; null for zeros.
void diffraction_forward(int dtype, const void* spectrum, void* half, int64_t batch, const DiffractionScan& scan,
                         void* stream);
void diffraction_adjoint(int dtype, const void* half, void* spectrum, int64_t batch, const DiffractionScan& scan,
                         void* stream);
void diffraction_gradient(int dtype, const void* spectrum, const void* half, void* gradient, int64_t batch,
                          const DiffractionScan& scan, void* stream);
void diffraction_gram(int dtype, const void* spectrum, const void* data, void* gradient, const DiffractionGram& gram,
                      int64_t batch, void* stream);

}  // namespace oder
