// The transfer functions of intensity diffraction tomography, for host and device.
//
//   h(u) = i a e^{2 pi i z kappa} / kz(q),  q = u + f,  kappa = (kz(f) - kz(q)) / (2 pi),
//   kz(q) = 2 pi s sqrt(nu^2 - |q|^2)
//
// for the illumination's frequency f and a slice at depth z. Along evenly spaced slices they are a geometric
// progression.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace oder {

// A scan in intensity diffraction tomography; complex numbers are pairs of reals.
struct DiffractionScan {
  const void* transfer;          // double [n_illuminations, 2], or functions [n_illuminations, n_slices, height, width]
  bool stored;                   // the latter
  const double* depths;          // [n_slices]
  const int32_t* support;        // [n_illuminations, height, 2] signed column frequencies of the pupil: begin, end
  const int64_t* illuminations;  // [n_used] or null for all
  int64_t n_used;
  double pixel_size, cutoff, scale, amplitude, first, spacing;  // spacing 0: see depths
  int64_t n_illuminations, n_slices, height, width;
};

// Gram matrices: auto [n_slices, height, width], and pairs [n_slices, n_slices, rows, columns] with the row frequencies
// -(rows / 2) .. rows / 2 and the column frequencies 0 .. columns - 1.
struct DiffractionGram {
  const void *automatic, *pairs;
  int64_t n_slices, height, width, rows, columns;
};

// The frequency number of index i of a transform of length n, and the index of its negative.
ODER_HD int64_t signed_frequency(int64_t i, int64_t n) { return 2 * i < n ? i : i - n; }
ODER_HD int64_t mirrored(int64_t i, int64_t n) { return i == 0 ? 0 : n - i; }

}  // namespace oder
