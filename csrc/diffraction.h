// The transfer functions of intensity diffraction tomography, for host and device.
//
//   h(u) = i a e^{2 pi i z kappa} / kz(q),  q = u + f,  kappa = (kz(f) - kz(q)) / (2 pi),
//   kz(q) = 2 pi s sqrt(nu^2 - |q|^2)
//
// for the illumination's frequency f and a slice at depth z. Along evenly spaced slices they are a geometric
// progression.
#pragma once

#include "host_device.h"
#include "operator.h"

namespace oder {

// A scan in intensity diffraction tomography; complex numbers are pairs of reals. Spectra are [batch, n_slices, height,
// width], half spectra [batch, n_illuminations, height, width / 2 + 1]; null for zeros. Illuminations outside 0 ..
// n_illuminations - 1 count as zero.
struct DiffractionScan {
  const void* transfer;          // double [n_illuminations, 2], or functions [n_illuminations, n_slices, height, width]
  bool stored;                   // the latter
  const double* depths;          // [n_slices]
  const int32_t* support;        // [n_illuminations, height, 2] signed column frequencies of the pupil: begin, end
  const int64_t* illuminations;  // [n_used] or null for all
  Int n_used;
  double pixel_size, cutoff, scale, amplitude, first, spacing;  // spacing 0: see depths
  Int batch, n_illuminations, n_slices, height, width;
};

// Gram matrices: auto [n_slices, height, width], and pairs [n_slices, n_slices, rows, columns] with the row frequencies
// -(rows / 2) .. rows / 2 and the column frequencies 0 .. columns - 1.
struct DiffractionGram {
  const void *automatic, *pairs;
  Int batch, n_slices, height, width, rows, columns;
};

// Slices' images [count, height, width] that are transformed, and the pupils whose frequencies count of their spectra:
// signed column frequencies [n_illuminations, height, 2], begin and end; null for all frequencies. Spectra are
// orthonormal, in natural order; rows that no pupil meets (at neither sign) are neither written nor read.
struct DiffractionPlanes {
  const int32_t* support;
  Int n_illuminations, count, height, width;
};

// The frequency number of index i of a transform of length n, and the index of its negative.
ODER_HD int64_t signed_frequency(int64_t i, int64_t n) { return 2 * i < n ? i : i - n; }
ODER_HD int64_t mirrored(int64_t i, int64_t n) { return i == 0 ? 0 : n - i; }

}  // namespace oder
