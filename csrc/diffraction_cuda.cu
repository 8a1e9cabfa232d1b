#include <algorithm>
#include <cmath>
#include <type_traits>

#include "complex_number.h"
#include "cuda_types.h"
#include "diffraction.h"

namespace oder {
namespace {

constexpr int kThreads = 64;
// Slices whose spectra and sums stay in registers; of more, those whose sums do.
constexpr int kWhole = 8;
constexpr int kPart = 16;
// Slices that are summed, or left out, together.
constexpr int kGroup = 4;
// Slices at depths of their own, which are kept in shared memory.
constexpr int64_t kMostDepths = 8192;
constexpr int kGramThreads = 128;

enum Kind { kForward, kAdjoint, kNormal };

using Number = Complex<float>;
using Pair = Pack<float, 2>;

ODER_DEVICE Number read(const Pair& a) { return {a.at[0], a.at[1]}; }
ODER_DEVICE void write(Pair& target, const Number& a) { target = {{a.re, a.im}}; }
ODER_DEVICE Number conjugate(const Number& a) { return {a.re, -a.im}; }
ODER_DEVICE void add_product(Number& sum, const Number& a, const Number& b) {
  sum.re = sum.re + a.re * b.re - a.im * b.im;
  sum.im = sum.im + a.re * b.im + a.im * b.re;
}

// e^{pi i a}: polynomials for a within 1/2, and the sign of the half turns.
ODER_DEVICE Number wave(float a) {
  constexpr float kRound = 12582912;  // 1.5 2^23
  const float shifted = a + kRound, t = a - (shifted - kRound), q = t * t;
  // (cos(pi t) - 1) / t^2 and sin(pi t) / t, interpolated at the Chebyshev points of t^2 in [0, 1/4]; exact at 0, since
  // steps from slice to slice are small and raised to powers.
  const float c =
      1 + q * (-4.934802197f + q * (4.058711415f + q * (-1.335239961f + q * (0.2350743683f + q * -0.02462711154f))));
  const float s =
      t * (3.14159264f + q * (-5.167710077f + q * (2.550077387f + q * (-0.5982904113f + q * 0.07765591224f))));
  const uint32_t sign = bits_of_float(shifted) << 31;
  return {float_of_bits(bits_of_float(c) ^ sign), float_of_bits(bits_of_float(s) ^ sign)};
}

// What all illuminations have in common.
struct Common {
  double row_step, cutoff_squared;
  float column_step, gain, half_turns, first, spacing, factor;
  int columns;  // of the half plane without half the sampling rate
  int tiles;    // blocks across a row
  int parts;    // blocks that share the slices
  int slices;   // of each of them
};

// An illumination at a row, and at that of the negative frequencies.
struct alignas(16) Light {
  int begin[2], end[2];  // where its pupil is, or that mirrored: columns of the half plane
  float row_term[2], column, rest, root;
  int l;           // -1 for none
  int64_t offset;  // of its half spectra

  ODER_DEVICE bool holds(int side, int j) const { return j >= begin[side] && j < end[side]; }
  // Seldom does a pupil begin beyond the first columns.
  ODER_DEVICE bool ends_after(int first) const { return end[0] > first || end[1] > first; }
};

// A row of the half plane, and the row of the negative frequencies.
struct Row {
  int i[2], number;
};

ODER_DEVICE Light light_of(const DiffractionScan& scan, const Common& common, const Row& row, int used) {
  const int64_t l = scan.illuminations ? scan.illuminations[used] : used;
  Light light{};
  light.l = -1;
  if (l < 0 || l >= scan.n_illuminations) return light;
  light.l = static_cast<int>(l);
  light.offset = l * scan.height * (scan.width / 2 + 1);
  for (int side = 0; side < 2; ++side) {
    const int32_t* const s = scan.support + 2 * (l * scan.height + row.i[side]);
    light.begin[side] = side ? 1 - s[1] : s[0];
    light.end[side] = side ? 1 - s[0] : s[1];
  }
  if (scan.stored) return light;
  const double* const f = static_cast<const double*>(scan.transfer) + 2 * l;
  const double u = row.number * common.row_step;
  const double rest = common.cutoff_squared - f[0] * f[0] - f[1] * f[1];
  light.row_term[0] = static_cast<float>(u * (u + 2 * f[0]));
  light.row_term[1] = static_cast<float>(u * (u - 2 * f[0]));
  light.column = static_cast<float>(f[1]);
  light.rest = static_cast<float>(rest);
  light.root = sqrtf(rest > 0 ? light.rest : 0.0f);
  return light;
}

// Takes the first of 64 numbers that are left; -1 after the last.
ODER_DEVICE int next_of(uint32_t (&left)[2]) {
  if (left[0] != 0) {
    const int m = lowest_bit(left[0]);
    left[0] &= left[0] - 1;
    return m;
  }
  if (left[1] == 0) return -1;
  const int m = lowest_bit(left[1]);
  left[1] &= left[1] - 1;
  return 32 + m;
}

// The transfer functions h of an illumination at a frequency u (side 0), or the conjugates of those at -u: at depth z
// i gain e^{pi i kappa z}.
struct Transfer {
  float kappa, gain;

  Transfer() = default;
  ODER_DEVICE Transfer(const Common& common, const Light& light, int side, int j) {
    const float u = (side ? -j : j) * common.column_step;
    const float more = u * (u + 2 * light.column) + light.row_term[side];  // |q|^2 - |f|^2
    const float axial = root(light.rest - more);
    // conj(i e^{i p}) is -i e^{-i p}.
    kappa = quotient((side ? -common.half_turns : common.half_turns) * more, axial + light.root);
    gain = quotient(side ? -common.gain : common.gain, axial);
  }
  ODER_DEVICE Number at_depth(float depth) const {
    const Number w = wave(kappa * depth);
    return {-gain * w.im, gain * w.re};
  }
};

// Those of evenly spaced slices: start step^z.
template <bool Whole>
struct Progression {
  Number start, step;
  float turn;  // from slice to slice, in half turns

  Progression() = default;
  ODER_DEVICE Progression(const DiffractionScan&, const Common& common, const Light& light, int side, int j, int64_t,
                          const float*) {
    const Transfer h(common, light, side, j);
    start = h.at_depth(common.first);
    turn = h.kappa * common.spacing;
    step = wave(turn);
  }

  // sum_z h_z slice(z)
  template <class Slice>
  ODER_DEVICE Number scattered(int n, Slice slice) const {
    Number sum{0, 0};
    const auto add = [&](Number x) {
      add_product(x, sum, step);
      sum = x;
    };
    if (Whole) {
      if (n > kGroup) {
        sum = slice(kWhole - 1);
#pragma unroll
        for (int z = kWhole - 2; z >= kGroup; --z) add(slice(z));
      }
#pragma unroll
      for (int k = kGroup - 1; k >= 0; --k) add(slice(k));
    } else {
#pragma unroll 4
      for (int z = n - 1; z >= 0; --z) add(slice(z));
    }
    return multiply(sum, start.re, start.im);
  }

  // sums[k] += conj(h_z) residual, z = first_slice + k
  template <int Sums>
  ODER_DEVICE void add_back(Number (&sums)[Sums], int first_slice, int slices, const Number& residual) const {
    Number back = multiply(residual, start.re, -start.im);
    if (!Whole) {
      const Number w = wave(turn * first_slice);
      back = multiply(back, w.re, -w.im);
    }
#pragma unroll
    for (int group = 0; group < Sums; group += kGroup) {
      if (group >= slices) continue;
#pragma unroll
      for (int k = 0; k < kGroup; ++k) {
        sums[group + k] = sums[group + k] + back;
        back = multiply(back, step.re, -step.im);
      }
    }
  }
};

// Those of any slices, or functions in memory.
template <bool Whole>
struct Functions {
  Transfer waves;
  const Pair* stored;  // of the first slice, or null
  int64_t plane;
  bool conjugated;
  const float* depths;

  Functions() = default;
  ODER_DEVICE Functions(const DiffractionScan& scan, const Common& common, const Light& light, int side, int j,
                        int64_t at, const float* of_slices)
      : stored(nullptr), plane(int64_t{scan.height} * scan.width), conjugated(side == 1), depths(of_slices) {
    if (scan.stored) {
      stored = static_cast<const Pair*>(scan.transfer) + int64_t{light.l} * scan.n_slices * plane + at;
    } else {
      waves = Transfer(common, light, side, j);
    }
  }
  ODER_DEVICE Number at_slice(int z) const {
    if (!stored) return waves.at_depth(depths[z]);
    const Number h = read(stored[z * plane]);
    return conjugated ? conjugate(h) : h;
  }

  template <class Slice>
  ODER_DEVICE Number scattered(int n, Slice slice) const {
    Number sum{0, 0};
    if (Whole) {
#pragma unroll
      for (int z = 0; z < kWhole; ++z) {
        if (z < n) add_product(sum, at_slice(z), slice(z));
      }
    } else {
#pragma unroll 1
      for (int z = 0; z < n; ++z) add_product(sum, at_slice(z), slice(z));
    }
    return sum;
  }

  template <int Sums>
  ODER_DEVICE void add_back(Number (&sums)[Sums], int first_slice, int slices, const Number& residual) const {
#pragma unroll
    for (int k = 0; k < Sums; ++k) {
      if (k < slices) add_product(sums[k], conjugate(at_slice(first_slice + k)), residual);
    }
  }
};

// CUDA backend of diffraction_forward, diffraction_adjoint and diffraction_gradient.
//
// Computes        kForward: half spectra of intensities S_l(u) = t_l(u) + conj t_l(-u), t_l = sum_z h_lz X_z. kAdjoint:
//                 its conjugate transpose G_z = 2 sum_l conj(h_lz) S_l. kNormal: (L / |B|) 2 sum_l conj(h_lz) (S_l -
//                 Y_l).
// Thread mapping  grid (tiles of columns * parts of the slices * batch * rows, low frequencies first), block 64: a
//                 thread has a frequency u of the half plane and -u, X and G of up to 8 slices at both in registers; of
//                 more slices G of up to 16, while X is read for each illumination. h is made in registers: of evenly
//                 spaced slices sum_z h_lz X_z is a polynomial in the step from slice to slice, by Horner's scheme.
//                 A warp goes through the illuminations with a pupil at its columns.
// Shared memory   64 illuminations at this row; depths of unevenly spaced slices.
// Accumulation    float32, illuminations in the order given.
// Preconditions   contiguous; no pupil holds a frequency of half the sampling rate.
template <bool Whole, bool Even>
ODER_KERNEL ODER_BOUNDS(kThreads, (Whole && Even) ? 8 : 6)
    diffraction_kernel(Kind kind, const Pair* spectrum, Pair* half, Pair* out, DiffractionScan scan, Common common) {
  using H = std::conditional_t<Even, Progression<Whole>, Functions<Whole>>;
  constexpr int kSums = Whole ? kWhole : kPart;
  ODER_SHARED(Light, lights, kThreads);
  ODER_DYNAMIC_SHARED(float, depths);
  const int thread = threadIdx.x, lane = thread % 32, n = scan.n_slices;
  const int height = scan.height, width = scan.width, n_used = scan.n_used;

  unsigned place = blockIdx.x;
  const int tile = place % common.tiles;
  place /= common.tiles;
  const int first_slice = Whole ? 0 : static_cast<int>(place % common.parts) * common.slices;
  place /= common.parts;
  const int64_t b = place % scan.batch;
  const int rank = static_cast<int>(place / scan.batch);
  const int slices = Whole ? n : (n - first_slice < common.slices ? n - first_slice : common.slices);

  Row row;
  row.i[0] = rank % 2 ? height - (rank + 1) / 2 : rank / 2;
  row.i[1] = static_cast<int>(mirrored(row.i[0], height));
  row.number = static_cast<int>(signed_frequency(row.i[0], height));
  const int j = tile * kThreads + thread;
  const bool here = j < common.columns;
  const int64_t plane = int64_t{height} * width, half_width = width / 2 + 1;
  const int64_t at[2] = {int64_t{row.i[0]} * width + j, int64_t{row.i[1]} * width + mirrored(j, scan.width)};
  // The column of half the sampling rate, where there is one, goes with the last of the half plane.
  const bool has_edge = j + 1 == common.columns && width % 2 == 0;
  Pair* const row_of_half = half + (b * scan.n_illuminations * height + row.i[0]) * half_width + j;

  const int n_depths = Even || scan.stored ? 0 : n;
  for (int z = thread; z < n_depths; z += kThreads) depths[z] = static_cast<float>(scan.depths[z]);
  const Pair* const x = spectrum + b * n * plane;
  const auto slice = [&](int side, int z) {
    const Number a = read(x[z * plane + at[side]]);
    return side ? conjugate(a) : a;
  };
  Number xs[2][kWhole], sums[2][kSums];
#pragma unroll
  for (int side = 0; side < 2; ++side) {
#pragma unroll
    for (int z = 0; z < kWhole; ++z) {
      xs[side][z] = {0, 0};
      if (Whole && kind != kAdjoint && here && z < n) xs[side][z] = slice(side, z);
    }
#pragma unroll
    for (int k = 0; k < kSums; ++k) sums[side][k] = {0, 0};
  }

  for (int first = 0; first < n_used; first += kThreads) {
    __syncthreads();
    if (first + thread < n_used) lights[thread] = light_of(scan, common, row, first + thread);
    __syncthreads();
    const int count = n_used - first < kThreads ? n_used - first : kThreads;
    const auto concerns = [&](int m) {
      return m < count && (kind == kForward ? lights[m].l >= 0 : lights[m].ends_after(j - lane));
    };
    uint32_t left[kThreads / 32];
#pragma unroll
    for (int part = 0; part < kThreads / 32; ++part) left[part] = ballot(concerns(32 * part + lane));
    if (!here) continue;
    for (int m = next_of(left); m >= 0; m = next_of(left)) {
      const Light light = lights[m];
      const bool inside[2] = {light.holds(0, j), light.holds(1, j)};
      Pair* const measured = row_of_half + light.offset;
      if (kind == kForward && has_edge) write(measured[1], {0, 0});
      Number residual{0, 0};
      H h[2];
      if (inside[0] || inside[1]) {
        if (kind != kForward && half) residual = read(*measured);
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          if (inside[side]) h[side] = H(scan, common, light, side, j, at[side], depths);
        }
        if (kind != kAdjoint) {
          Number sum{0, 0};
#pragma unroll
          for (int side = 0; side < 2; ++side) {
            if (!inside[side]) continue;
            sum = sum + h[side].scattered(n, [&](int z) { return Whole ? xs[side][z] : slice(side, z); });
          }
          residual = sum - residual;
        }
      }
      if (kind == kForward) {
        write(*measured, residual);
        continue;
      }
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        if (inside[side]) h[side].add_back(sums[side], first_slice, slices, residual);
      }
    }
  }
  if (kind == kForward || !here) return;

  Pair* const result = out + (b * n + first_slice) * plane;
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
    if (k >= slices) continue;
    const Number g = sums[0][k], mirror = sums[1][k];
    write(result[k * plane + at[0]], {g.re * common.factor, g.im * common.factor});
    if (has_edge) write(result[k * plane + at[0] + 1], {0, 0});
    // Column 0 is its own mirror image, and left to its row.
    if (j > 0) write(result[k * plane + at[1]], {mirror.re * common.factor, -mirror.im * common.factor});
  }
}

// CUDA backend of diffraction_gram.
//
// Computes        the same gradient with all illuminations: at each frequency u a Hermitian Toeplitz matrix of auto(u)
//                 times X(u), plus pairs(u) times conj X(-u) where pairs has u, less the data.
// Thread mapping  grid (blocks of frequencies * parts of 8 slices * batch), block 128: a thread has a frequency of the
//                 half plane and its negative, 8 sums at both; of more slices, tiles of 8 x 8 of the matrices.
// Shared memory   none.
// Accumulation    float32, tiles in order.
// Preconditions   contiguous; where auto(u)[0] is zero, all of auto(u) is.
template <bool Whole>
ODER_KERNEL ODER_BOUNDS(kGramThreads, Whole ? 4 : 3)
    diffraction_gram_kernel(const Pair* spectrum, const Pair* data, Pair* out, DiffractionGram gram, int parts) {
  const int n = gram.n_slices, height = gram.height, width = gram.width;
  const int64_t plane = int64_t{height} * width, half_width = width / 2 + 1;

  unsigned place = blockIdx.x;
  const int64_t b = place % gram.batch;
  place /= gram.batch;
  const int y0 = Whole ? 0 : static_cast<int>(place % parts) * kWhole;
  const int64_t frequency = static_cast<int64_t>(place / parts) * kGramThreads + threadIdx.x;
  const int i = static_cast<int>(frequency / half_width), j = static_cast<int>(frequency % half_width);
  if (i >= height) return;
  const int mirror_i = static_cast<int>(mirrored(i, height));
  const int mirror_j = static_cast<int>(mirrored(j, gram.width));
  // Columns that are their own mirror images are left to their rows.
  const int sides = mirror_j == j ? 1 : 2;
  const int64_t at[2] = {int64_t{i} * width + j, int64_t{mirror_i} * width + mirror_j};
  const Pair* const x = spectrum + b * n * plane;
  const Pair* const auto_at = static_cast<const Pair*>(gram.automatic);
  const int64_t k = signed_frequency(i, height) + gram.rows / 2, pair_plane = int64_t{gram.rows} * gram.columns;
  const bool paired = k >= 0 && k < gram.rows && j < gram.columns;
  const Pair* const pair_at = static_cast<const Pair*>(gram.pairs) + k * gram.columns + j;

  bool used[2];
  Number sums[2][kWhole];
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    used[side] = false;
    if (side < sides) {
      const Number g = read(auto_at[at[side]]);
      used[side] = g.re != 0 || g.im != 0;
    }
#pragma unroll
    for (int y = 0; y < kWhole; ++y) sums[side][y] = {0, 0};
  }

  const auto slice = [&](int side, int z) {
    return (used[side] || paired) && z < n ? read(x[z * plane + at[side]]) : Number{0, 0};
  };
  // Of the Toeplitz matrix, and of the pairs.
  const auto distance = [&](int side, int d) {
    const int apart = d < 0 ? -d : d;
    const Number g = apart < n ? read(auto_at[apart * plane + at[side]]) : Number{0, 0};
    return d < 0 ? conjugate(g) : g;
  };
  const auto entry = [&](int y, int z) {
    return y < n && z < n ? read(pair_at[(static_cast<int64_t>(y) * n + z) * pair_plane]) : Number{0, 0};
  };

  if constexpr (Whole) {
    Number xs[2][kWhole];
#pragma unroll
    for (int side = 0; side < 2; ++side) {
#pragma unroll
      for (int z = 0; z < kWhole; ++z) xs[side][z] = slice(side, z);
      if (!used[side]) continue;
#pragma unroll
      for (int d = 0; d < kWhole; ++d) {
        if (d >= n) continue;
        const Number g = distance(side, d);
#pragma unroll
        for (int z = 0; z + d < kWhole; ++z) {
          add_product(sums[side][z + d], g, xs[side][z]);
          if (d > 0) add_product(sums[side][z], conjugate(g), xs[side][z + d]);
        }
      }
    }
    if (paired) {
#pragma unroll
      for (int y = 0; y < kWhole; ++y) {
        if (y >= n) continue;
#pragma unroll
        for (int z = 0; z < kWhole; ++z) {
          const Number m = entry(y, z);
          add_product(sums[0][y], m, conjugate(xs[1][z]));
          // At -u the matrix is the transposed one.
          add_product(sums[1][z], m, conjugate(xs[0][y]));
        }
      }
    }
  } else {
#pragma unroll 1
    for (int z = 0; z < n; ++z) {
      const Number here = slice(0, z), there = slice(1, z);
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        if (!used[side]) continue;
#pragma unroll
        for (int y = 0; y < kWhole; ++y) add_product(sums[side][y], distance(side, y0 + y - z), side ? there : here);
      }
      if (!paired) continue;
#pragma unroll
      for (int y = 0; y < kWhole; ++y) {
        add_product(sums[0][y], entry(y0 + y, z), conjugate(there));
        add_product(sums[1][y], entry(z, y0 + y), conjugate(here));
      }
    }
  }

#pragma unroll
  for (int side = 0; side < 2; ++side) {
    if (side >= sides) continue;
#pragma unroll
    for (int y = 0; y < kWhole; ++y) {
      if (y0 + y >= n) continue;
      const int64_t to = (b * n + y0 + y) * plane + at[side];
      write(out[to], data ? sums[side][y] - read(data[to]) : sums[side][y]);
    }
  }
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

void run(Kind kind, const Pair* spectrum, const Pair* half, Pair* out, const DiffractionScan& scan, void* stream) {
  const bool whole = scan.n_slices <= kWhole, uneven = scan.spacing == 0 && !scan.stored;
  if (uneven && scan.n_slices > kMostDepths) {
    throw std::invalid_argument("diffraction: the CUDA kernels take at most " + std::to_string(kMostDepths) +
                                " unevenly spaced slices, got " + std::to_string(scan.n_slices));
  }
  Common common{};
  common.row_step = 1 / (static_cast<double>(scan.height) * scan.pixel_size);
  common.cutoff_squared = scan.cutoff * scan.cutoff;
  common.column_step = static_cast<float>(1 / (static_cast<double>(scan.width) * scan.pixel_size));
  common.gain = static_cast<float>(scan.amplitude / (6.283185307179586476925 * scan.scale));
  common.half_turns = static_cast<float>(2 * scan.scale);
  common.first = static_cast<float>(scan.first);
  common.spacing = static_cast<float>(scan.spacing);
  common.factor = static_cast<float>(2 * static_cast<double>(scan.n_illuminations) / static_cast<double>(scan.n_used));
  common.columns = static_cast<int>((scan.width + 1) / 2);
  common.tiles = static_cast<int>(ceil_div(common.columns, kThreads));
  common.parts = whole || kind == kForward ? 1 : static_cast<int>(ceil_div(scan.n_slices, kPart));
  common.slices = static_cast<int>(ceil_div(scan.n_slices, common.parts));
  const int64_t blocks = int64_t{common.tiles} * common.parts * scan.batch * scan.height;
  Pair* const measured = const_cast<Pair*>(half);  // only read, but by kForward
  const auto evenly = whole ? diffraction_kernel<true, true> : diffraction_kernel<false, true>;
  const auto anyhow = whole ? diffraction_kernel<true, false> : diffraction_kernel<false, false>;
  const auto diffraction = scan.stored || uneven ? anyhow : evenly;
  ODER_LAUNCH(diffraction, blocks, kThreads, uneven ? static_cast<size_t>(scan.n_slices) * sizeof(float) : 0, stream,
              kind, spectrum, measured, out, scan, common);
}

void diffraction_forward(const Pair* spectrum, Pair* half, const DiffractionScan& scan, void* stream) {
  run(kForward, spectrum, half, nullptr, scan, stream);
}

void diffraction_adjoint(const Pair* half, Pair* spectrum, const DiffractionScan& scan, void* stream) {
  run(kAdjoint, nullptr, half, spectrum, scan, stream);
}

void diffraction_gradient(const Pair* spectrum, const Pair* half, Pair* gradient, const DiffractionScan& scan,
                          void* stream) {
  run(kNormal, spectrum, half, gradient, scan, stream);
}

void diffraction_gram(const Pair* spectrum, const Pair* data, Pair* gradient, const DiffractionGram& gram,
                      void* stream) {
  const bool whole = gram.n_slices <= kWhole;
  const int parts = whole ? 1 : static_cast<int>(ceil_div(gram.n_slices, kWhole));
  const int64_t frequencies = int64_t{gram.height} * (gram.width / 2 + 1);
  const auto diffraction_gram = whole ? diffraction_gram_kernel<true> : diffraction_gram_kernel<false>;
  ODER_LAUNCH(diffraction_gram, ceil_div(frequencies, kGramThreads) * parts * gram.batch, kGramThreads, 0, stream,
              spectrum, data, gradient, gram, parts);
}

const Operator kOperators[] = {
    {"diffraction_forward", diffraction_forward},
    {"diffraction_adjoint", diffraction_adjoint},
    {"diffraction_gradient", diffraction_gradient},
    {"diffraction_gram", diffraction_gram},
};

}  // namespace
}  // namespace oder
