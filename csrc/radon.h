// Geometry of parallel-beam rays in pixels, for host and device: oder_fast/reference/radon.py defines it.
#pragma once

#include <cmath>

#include "host_device.h"
#include "operator.h"

namespace oder {

// A scan, and which of its views are used: views[n_used], or all where views is null. Lengths are in pixels but for
// pixel_size, which scales projections.
struct RadonScan {
  const double* angles;  // [n_views], radians
  const int64_t* views;  // [n_used] or null
  Int n_views, n_used, n_sums, batch, height, width, n_bins;
  double bin_spacing, bin_offset, pixel_size;
  float* sums;  // [n_sums, batch, n_used, n_bins] of groups of lines, on the GPU
};

// As in the reference: views at 45 degrees march over rows although their cosines differ in the last bit.
constexpr double kRadonTieMargin = 1e-9;

struct RadonDirection {
  double c, s;  // cosine and sine
  bool rows;    // marches over rows, or over columns
  double step;  // length of a ray between two lines
  bool valid;   // false for a view index out of range and for an angle that is no number
};

ODER_HD RadonDirection radon_direction(const RadonScan& scan, Int used) {
  const int64_t v = scan.views ? scan.views[used] : used;
  RadonDirection r{1.0, 0.0, true, 1.0, false};
  if (v < 0 || v >= scan.n_views || !(fabs(scan.angles[v]) < 1e300)) return r;
  sincos(scan.angles[v], &r.s, &r.c);
  r.rows = fabs(r.c) + kRadonTieMargin >= fabs(r.s);
  r.step = 1.0 / fabs(r.rows ? r.c : r.s);
  r.valid = true;
  return r;
}

// Where the rays of a view cross the lines they march over: ray e crosses line m at pixel
// (e - middle) * sigma + m * slope + centre; counted from the middle, rays far apart lose no digits near the image.
// Rays are counted so that sigma > 0: ray e is bin n_bins - 1 - e where flip.
struct RadonRays {
  double sigma, slope, centre;
  bool flip;
};

ODER_HD double radon_middle(const RadonScan& scan) { return (scan.n_bins - 1) / 2.0; }

ODER_HD RadonRays radon_rays(const RadonScan& scan, const RadonDirection& r) {
  const double lines = r.rows ? scan.height : scan.width, length = r.rows ? scan.width : scan.height;
  const double per_bin = r.rows ? 1.0 / r.c : -1.0 / r.s;
  RadonRays rays;
  rays.sigma = r.step * scan.bin_spacing;
  rays.slope = r.rows ? r.s / r.c : r.c / r.s;
  rays.centre = (length - 1) / 2 - (lines - 1) / 2 * rays.slope + scan.bin_offset * per_bin;
  rays.flip = per_bin < 0;
  return rays;
}

// A bin or pixel number, or one past the last, of a coordinate that may lie far outside or be no number.
ODER_HD int clamp_to(double a, int high) { return a > 0 ? (a < high ? static_cast<int>(a) : high) : 0; }

// The bin coordinate of pixel (i, j): corner + i * per_row + j * per_column.
struct RadonBins {
  double corner, per_row, per_column;
};

ODER_HD RadonBins radon_bins(const RadonScan& scan, const RadonDirection& r) {
  RadonBins bins;
  bins.per_column = r.c / scan.bin_spacing;
  bins.per_row = -r.s / scan.bin_spacing;
  bins.corner = (scan.n_bins - 1) / 2.0 - scan.bin_offset / scan.bin_spacing - (scan.height - 1) / 2.0 * bins.per_row -
                (scan.width - 1) / 2.0 * bins.per_column;
  return bins;
}

}  // namespace oder
