// The transfer functions of intensity diffraction tomography, for host and device.
//
//   h(u) = i a e^{2 pi i z kappa} / kz(q),  q = u + f,  kappa = (kz(f) - kz(q)) / (2 pi),
//   kz(q) = 2 pi s sqrt(nu^2 - |q|^2)
//
// for the illumination's frequency f and a slice at depth z. Along evenly spaced slices they are a geometric
// progression.
#pragma once

#include <cmath>
#include <cstdint>

#include "complex_number.h"
#include "host_device.h"

namespace oder {

// A scan in intensity diffraction tomography; complex numbers are pairs of reals.
struct DiffractionScan {
  const void* transfer;    // double [n_illuminations, 2], or functions [n_illuminations, n_slices, height, width]
  bool stored;             // the latter
  const double* depths;    // [n_slices]
  const int32_t* support;  // [n_illuminations, height, 2] signed column frequencies of the pupil: begin, end
  const int64_t* blocks;   // [n_used] or null for all
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

// What one illumination brings to all frequencies of a row: the row's frequency is `sign` times that of row number k.
template <class T>
struct Illumination {
  T row_term;        // u_row (u_row + 2 f_row)
  T column, step;    // f_column, and sign times the distance of columns
  T squared, root;   // |f|^2, sqrt(nu^2 - |f|^2)
  T cutoff_squared;  // nu^2
  T gain, scale;     // a / (2 pi s), s

  Illumination() = default;
  ODER_HD Illumination(const DiffractionScan& scan, int64_t l, int64_t k, int sign) {
    const double* const f = static_cast<const double*>(scan.transfer) + 2 * l;
    const double u = sign * static_cast<double>(k) / (static_cast<double>(scan.height) * scan.pixel_size);
    const double f_squared = f[0] * f[0] + f[1] * f[1], rest = scan.cutoff * scan.cutoff - f_squared;
    row_term = static_cast<T>(u * (u + 2 * f[0]));
    column = static_cast<T>(f[1]);
    step = static_cast<T>(sign / (static_cast<double>(scan.width) * scan.pixel_size));
    squared = static_cast<T>(f_squared);
    root = static_cast<T>(sqrt(rest > 0 ? rest : 0.0));
    cutoff_squared = static_cast<T>(scan.cutoff * scan.cutoff);
    gain = static_cast<T>(scan.amplitude / (6.283185307179586476925 * scan.scale));
    scale = static_cast<T>(scan.scale);
  }
};

// kappa, and a / kz(q), at the column of number j. The difference of wavenumbers is taken without cancellation.
template <class T, class V, class Root>
ODER_HD void wave_at(const Illumination<T>& light, V j, const Root& root, V& kappa, V& gain) {
  const V u = j * light.step;
  const V more = u * (u + 2 * light.column) + light.row_term;  // |q|^2 - |f|^2
  const V axial = root((light.cutoff_squared - light.squared) - more);
  kappa = light.scale * more / (axial + light.root);
  gain = light.gain / axial;
}

}  // namespace oder
