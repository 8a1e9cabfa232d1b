#include <algorithm>
#include <cmath>

#include "cuda_types.h"
#include "fourier.h"

namespace oder {
namespace {

constexpr int kThreads = 256;
// Transforms side by side in shared memory: half a warp reads 16 numbers of 8 bytes from all banks.
constexpr int kLanes = 16;
// What a block of many lanes may take of the shared memory, so that several fit beside each other; one of few may take
// all but what is static.
constexpr size_t kSharedBytes = 96 * 1024;
constexpr size_t kStaticBytes = 1024;
// Largest radix that is transformed in registers: by every kernel, and as the last stage by one that needs more of
// them.
constexpr int kRadix = 13;
constexpr int kLongRadix = 23;
// Largest radix whose outputs are kept in registers too.
constexpr int kWholeRadix = 8;

// What a kernel does, at run time: templates of it would take minutes to compile.
enum Kind { kForward, kAdjoint, kNormal };

using Number = Complex<float>;
using Pair = Pack<float, 2>;

template <class M>
ODER_DEVICE Number read(const Pack<M, 2>& a) {
  return {to_float(a.at[0]), to_float(a.at[1])};
}
ODER_DEVICE void write(Pair& target, const Number& a) { target = {{a.re, a.im}}; }

// A thread's share of the `lanes` transforms of length n in shared memory: every step-th butterfly of one lane.
struct Share {
  Pair* memory;
  int cells;  // where in memory: [n][pitch]
  int spare;  // [n][pitch], for dense stages
  int roots;  // [n]
  int n, pitch, lane, first, step;

  ODER_DEVICE Pair& cell(int row) const { return memory[cells + row * pitch + lane]; }
  ODER_DEVICE Pair& spare_cell(int row) const { return memory[spare + row * pitch + lane]; }
  template <bool Inverse>
  ODER_DEVICE Number turned(const Number& a, int root) const {
    const Pair w = memory[roots + root];
    return multiply(a, w.at[0], Inverse ? -w.at[1] : w.at[1]);
  }
};

template <int R>
struct Radix {
  static constexpr int value = R;
};

// Calls f with a radix that is transformed in registers, of the short ones or of the long ones.
template <bool Long, class F>
ODER_DEVICE void with_radix(int radix, F f) {
  if constexpr (Long) {
    if (radix == 17) return f(Radix<17>{});
    if (radix == 19) return f(Radix<19>{});
    f(Radix<23>{});
  } else {
    switch (radix) {
      case 1:
        return f(Radix<1>{});
      case 2:
        return f(Radix<2>{});
      case 3:
        return f(Radix<3>{});
      case 4:
        return f(Radix<4>{});
      case 5:
        return f(Radix<5>{});
      case 7:
        return f(Radix<7>{});
      case 8:
        return f(Radix<8>{});
      case 11:
        return f(Radix<11>{});
      case 13:
        return f(Radix<13>{});
    }
  }
}

// The butterfly of a large odd radix, which gives its outputs one after another: as an array they would not fit into
// the registers beside its inputs.
template <int R, bool Inverse, class Put>
ODER_DEVICE void long_butterfly(const Number* a, Put put) {
  constexpr int H = R / 2;
  constexpr OddRoots<R> roots = odd_roots<R>();
  Number sum[H], difference[H], first = a[0];
#pragma unroll
  for (int j = 1; j <= H; ++j) {
    sum[j - 1] = a[j] + a[R - j];
    difference[j - 1] = turn<Inverse>(a[j] - a[R - j]);
    first = first + sum[j - 1];
  }
  put(0, first);
#pragma unroll
  for (int k = 1; k <= H; ++k) {
    Number c = a[0], s{};
#pragma unroll
    for (int j = 1; j <= H; ++j) {
      const float cosine = static_cast<float>(roots.c[j * k % R]), sine = static_cast<float>(roots.s[j * k % R]);
      c = {c.re + cosine * sum[j - 1].re, c.im + cosine * sum[j - 1].im};
      s = {s.re + sine * difference[j - 1].re, s.im + sine * difference[j - 1].im};
    }
    put(k, c + s);
    put(R - k, c - s);
  }
}

// Calls f(j, row) for the butterflies of this thread, those of rows row, row + stride, ...; j counts them in a block.
template <class F>
ODER_DEVICE void each_butterfly(const Share& share, int radix, int stride, F f) {
  const int count = share.n / radix;
  const float inverse = 1.0f / stride;
#pragma unroll 1
  for (int u = share.first; u < count; u += share.step) {
    // Exact below 2^21.
    const int block = static_cast<int>((u + 0.5f) * inverse), j = u - block * stride;
    f(j, block * stride * radix + j);
  }
}

// One stage of the transform on blocks of `block` rows; get(row) gives its input, put(row, a) takes its output.
template <int R, bool Inverse, class Get, class Put>
ODER_DEVICE void stage(const Share& share, int block, Get get, Put put) {
  const int stride = block / R, unit = share.n / block;
  each_butterfly(share, R, stride, [&](int j, int row) {
    Number a[R];
#pragma unroll
    for (int k = 0; k < R; ++k) a[k] = get(row + k * stride);
    if (Inverse) {
#pragma unroll
      for (int k = 1; k < R; ++k) a[k] = share.turned<true>(a[k], j * k * unit);
    }
    const auto output = [&](int k, const Number& value) {
      put(row + k * stride, Inverse || k == 0 ? value : share.turned<false>(value, j * k * unit));
    };
    if constexpr (R > kWholeRadix) {
      long_butterfly<R, Inverse>(a, output);
    } else {
      butterfly<R, Inverse, float>(a);
#pragma unroll
      for (int k = 0; k < R; ++k) output(k, a[k]);
    }
  });
}

// The same of any odd radix, from share.cells to share.spare, which then change places.
template <bool Inverse>
ODER_DEVICE void dense_stage(Share& share, int radix, int block) {
  constexpr int kOutputs = 4;
  const int stride = block / radix, unit = share.n / block, spread = share.n / radix;
  const int half = radix / 2, groups = half / kOutputs + 1, n_tasks = spread * groups;
#pragma unroll 1
  for (int task = share.first; task < n_tasks; task += share.step) {
    const int u = task / groups, first_k = task % groups * kOutputs, j = u % stride;
    const int row = u / stride * block + j;
    const auto input = [&](int i) {
      const Number a = read(share.cell(row + i * stride));
      return Inverse ? share.turned<true>(a, j * i * unit) : a;
    };
    const auto output = [&](int k, const Number& a) {
      write(share.spare_cell(row + k * stride), Inverse ? a : share.turned<false>(a, j * k * unit));
    };
    // Of outputs k and radix - k at once: what they have in common, and what they have with opposite signs.
    Number common[kOutputs], opposite[kOutputs];
    int angle[kOutputs];
#pragma unroll
    for (int m = 0; m < kOutputs; ++m) {
      common[m] = input(0);
      opposite[m] = {0, 0};
      angle[m] = 0;
    }
#pragma unroll 1
    for (int i = 1; i <= half; ++i) {
      const Number a = input(i), b = input(radix - i), sum = a + b, difference = turn<Inverse>(a - b);
#pragma unroll
      for (int m = 0; m < kOutputs; ++m) {
        angle[m] += first_k + m;
        if (angle[m] >= radix) angle[m] -= radix;
        const Pair w = share.memory[share.roots + angle[m] * spread];
        common[m] = {common[m].re + w.at[0] * sum.re, common[m].im + w.at[0] * sum.im};
        opposite[m] = {opposite[m].re - w.at[1] * difference.re, opposite[m].im - w.at[1] * difference.im};
      }
    }
#pragma unroll
    for (int m = 0; m < kOutputs; ++m) {
      const int k = first_k + m;
      if (k > half) break;
      output(k, common[m] + opposite[m]);
      if (k > 0) output(radix - k, common[m] - opposite[m]);
    }
  }
  const int cells = share.cells;
  share.cells = share.spare;
  share.spare = cells;
}

template <bool Inverse>
ODER_DEVICE void inner_stage(Share& share, int radix, int block) {
  if (radix > kRadix) return dense_stage<Inverse>(share, radix, block);
  with_radix<false>(radix, [&](auto r) {
    stage<decltype(r)::value, Inverse>(
        share, block, [&](int row) { return read(share.cell(row)); },
        [&](int row, const Number& a) { write(share.cell(row), a); });
  });
}

// The last stage forward and the first one backward, on the same rows; between them change(row, a) gives what follows
// the number a of a row. kForward ends there, kAdjoint begins there.
template <bool Long, class Change>
ODER_DEVICE void middle_stage(Share& share, Kind kind, int radix, Change change) {
  if (!Long && radix > kRadix) {
    if (kind != kAdjoint) {
      dense_stage<false>(share, radix, radix);
      __syncthreads();
    }
    for (int row = share.first; row < share.n; row += share.step) {
      const Number a = change(row, kind == kAdjoint ? Number{} : read(share.cell(row)));
      if (kind != kForward) write(share.cell(row), a);
    }
    if (kind != kForward) {
      __syncthreads();
      dense_stage<true>(share, radix, radix);
    }
    return;
  }
  with_radix<Long>(radix, [&](auto r) {
    constexpr int R = decltype(r)::value;
    each_butterfly(share, R, 1, [&](int, int row) {
      Number a[R] = {};
      if constexpr (R > kWholeRadix) {
        // Through this thread's own cells; the inverse is the same with real and imaginary parts exchanged.
        const auto change_rows = [&] {
#pragma unroll 1
          for (int k = 0; k < R; ++k) {
            Pair& cell = share.cell(row + k);
            write(cell, change(row + k, kind == kAdjoint ? Number{} : read(cell)));
          }
        };
        const int begin = kind == kAdjoint ? 1 : 0, end = kind == kForward ? 1 : 2;
#pragma unroll 1
        for (int inverse = begin; inverse < end; ++inverse) {
          const auto exchange = [&](const Number& v) { return inverse ? Number{v.im, v.re} : v; };
          if (inverse) change_rows();
#pragma unroll
          for (int k = 0; k < R; ++k) a[k] = exchange(read(share.cell(row + k)));
          // From both ends: the addresses of the inputs would stay in registers until here.
          int up = share.cells + row * share.pitch + share.lane, down = up + R * share.pitch;
          long_butterfly<R, false>(a, [&](int k, const Number& v) {
            if (k > R / 2) {
              down -= share.pitch;
              write(share.memory[down], exchange(v));
            } else {
              write(share.memory[up], exchange(v));
              up += share.pitch;
            }
          });
        }
        if (kind == kForward) change_rows();
      } else {
        if (kind != kAdjoint) {
#pragma unroll
          for (int k = 0; k < R; ++k) a[k] = read(share.cell(row + k));
          butterfly<R, false, float>(a);
        }
#pragma unroll
        for (int k = 0; k < R; ++k) a[k] = change(row + k, a[k]);
        if (kind != kForward) {
          butterfly<R, true, float>(a);
#pragma unroll
          for (int k = 0; k < R; ++k) write(share.cell(row + k), a[k]);
        }
      }
    });
  });
}

// All stages from `first` on, and back to it; each begins with a barrier.
template <bool Long, class Change>
ODER_DEVICE void transform(Share& share, Kind kind, const FourierPlan& plan, int first, int block, Change change) {
  const int last = plan.n_stages - 1;
  if (kind != kAdjoint) {
    for (int s = first; s < last; ++s) {
      __syncthreads();
      inner_stage<false>(share, plan.radix[s], block);
      block /= plan.radix[s];
    }
  }
  __syncthreads();
  middle_stage<Long>(share, kind, plan.radix[last], change);
  if (kind != kForward) {
    block = plan.radix[last];
    for (int s = last - 1; s >= first; --s) {
      __syncthreads();
      block *= plan.radix[s];
      inner_stage<true>(share, plan.radix[s], block);
    }
  }
}

// Whether the first stage of a plan takes its input from the image, and the last one backward gives it to the sums.
ODER_DEVICE bool starts_in_registers(const FourierPlan& plan) {
  return plan.n_stages > 1 && plan.radix[0] <= 8 && plan.radix[0] % 2 == 0;
}

// Calls f with the radix of that stage and with the coil maps.
template <class F>
ODER_DEVICE void with_first_stage(const FourierPlan& plan, const FourierScan& scan, F f) {
  const auto with_maps = [&](auto r) {
    if (scan.maps_dtype == kFloat16) return f(r, static_cast<const Pack<Float16, 2>*>(scan.maps));
    f(r, static_cast<const Pack<float, 2>*>(scan.maps));
  };
  if (!starts_in_registers(plan)) return with_maps(Radix<1>{});
  if (plan.radix[0] == 8) return with_maps(Radix<8>{});
  if (plan.radix[0] == 4) return with_maps(Radix<4>{});
  with_maps(Radix<2>{});
}

// How the columns of an image are laid out over blocks.
struct Layout {
  int columns;  // of a block
  int slots;    // coils at a time
  int tiles;    // blocks across an image
  int rounds;   // of `slots` coils
  size_t shared;
};

// Which lines a scan samples, and what it is multiplied by.
struct Lines {
  const int64_t* at;  // [batch or 1, n], or null for all
  int n;
  float scale;  // of the samples; that of the image comes after
  float image_scale;
};

// CUDA backend of fourier_forward, fourier_adjoint and fourier_gradient along one axis.
//
// Computes        kForward: samples[b,u,l,j] = scale * sum_i w^(line[l] i) S[c,i,j] x[b,i,j], w = exp(-2 pi i / n), c =
//                 coils[u]. kAdjoint: its conjugate transpose. kNormal: that of the forward result less the measured
//                 samples[b,c,l,j].
// Thread mapping  grid (tiles of columns * batch, and rounds of coils for kForward), block 256: a block has `columns`
//                 columns of one image and `slots` coils at a time, each of these columns * slots <= 16 transforms a
//                 lane; a thread has every (256 / lanes)-th butterfly of one lane, reads the image, the coil map and
//                 the samples in the stages that need them, and stays with its rows through the residual.
// Shared memory   the transforms, sums of the coils, roots of unity, the line at each row; twice the transforms where n
//                 has a prime factor above 13, unless Long: then the last stage has radix 17, 19 or 23.
// Accumulation    float32, coils in increasing order.
// Preconditions   contiguous; each line once.
template <bool Long>
ODER_KERNEL ODER_BOUNDS(kThreads, Long ? 2 : 3)
    fourier_lines_kernel(Kind kind, const Pair* image, Pair* samples, Pair* out, FourierScan scan,
                         ODER_CONSTANT(FourierPlan) plan, Layout layout, Lines lines) {
  ODER_DYNAMIC_SHARED(Pair, memory);
  const int thread = threadIdx.x, n = scan.n, width = scan.width;
  const int columns = layout.columns, slots = layout.slots, lanes = columns * slots;
  const bool dense = !Long && plan.radix[plan.n_stages - 1] > kRadix;
  const int sums_at = n * lanes * (dense ? 2 : 1), roots_at = sums_at + (kind == kForward ? 0 : n * columns);
  Share share{memory, 0, n * lanes, roots_at, n, lanes, thread % lanes, thread / lanes, kThreads / lanes};
  Pair* const sums = memory + sums_at;
  int* const line_at = reinterpret_cast<int*>(memory + roots_at + n);

  unsigned place = blockIdx.x;
  const int tile = place % layout.tiles;
  place /= layout.tiles;
  const int rounds = kind == kForward ? layout.rounds : 1;
  const int first_round = place % rounds, last_round = kind == kForward ? first_round + 1 : layout.rounds;
  const int b = static_cast<int>(place / rounds);
  const int first_column = tile * columns, column = first_column + share.lane / slots, slot = share.lane % slots;
  const bool here = column < width;

  for (int k = thread; k < n; k += kThreads) {
    memory[roots_at + k] = reinterpret_cast<const Pair*>(scan.roots_n)[k];
    line_at[k] = -1;
  }
  __syncthreads();
  const int64_t* const line_of = lines.at && !scan.shared_sampling ? lines.at + int64_t{b} * lines.n : lines.at;
  for (int l = thread; l < lines.n; l += kThreads) {
    const int64_t line = line_of ? line_of[l] : l;
    if (line >= 0 && line < n) line_at[fourier_position(plan, static_cast<int>(line))] = l;
  }

  const int64_t plane = static_cast<int64_t>(n) * width;
  for (int round = first_round; round < last_round; ++round) {
    const int used = round * slots + slot;
    // A lane without a coil or a column goes along with its last neighbour that has one, without samples.
    const int nearest = used < scan.n_used ? used : scan.n_used - 1;
    const int64_t index = scan.coils ? scan.coils[nearest] : nearest;
    const bool known = index >= 0 && index < scan.n_coils, active = here && known && used < scan.n_used;
    const int coil = known ? static_cast<int>(index) : 0;
    // Addresses from few numbers: they would take registers through all stages.
    const auto map_at = [&] {
      return ((scan.shared_maps ? 0 : int64_t{b} * scan.n_coils) + coil) * plane + (here ? column : width - 1);
    };

    // The last round's products are summed; kAdjoint has the barrier of transform().
    if (kind != kAdjoint) __syncthreads();
    int first = 0, block = n;
    if (starts_in_registers(plan)) {
      first = 1;
      block /= plan.radix[0];
    }
    if (kind != kAdjoint) {
      with_first_stage(plan, scan, [&](auto r, auto maps) {
        const auto map = maps + map_at();
        const unsigned image_row = scan.transposed ? 1 : width, x_at = here ? column : width - 1;
        const Pair* const x = image + b * plane + (scan.transposed ? x_at * n : x_at);
        stage<decltype(r)::value, false>(
            share, n,
            [&](int row) {
              const Number s = read(map[static_cast<unsigned>(row) * width]);
              return multiply(read(x[row * image_row]), s.re, s.im);
            },
            [&](int row, const Number& v) { write(share.cell(row), v); });
      });
    }
    // The samples of all coils are measured; those between two kernels are of the coils in use.
    const int64_t sample_plane = kind == kNormal ? int64_t{b} * scan.n_coils + coil : int64_t{b} * scan.n_used + used;
    Pair* const mine = samples + sample_plane * lines.n * width + column;
    transform<Long>(share, kind, plan, first, block, [&](int row, const Number& a) {
      const int line = line_at[row];
      Number sample{0, 0};
      if (line < 0 || !active) return sample;
      Pair& measured = mine[static_cast<unsigned>(line) * width];
      if (kind == kForward) {
        write(measured, {a.re * lines.scale, a.im * lines.scale});
        return sample;
      }
      if (samples) sample = read(measured);
      if (kind == kNormal) sample = {a.re * lines.scale - sample.re, a.im * lines.scale - sample.im};
      return sample;
    });
    if (kind == kForward) continue;

    __syncthreads();
    with_first_stage(plan, scan, [&](auto r, auto maps) {
      const auto map = maps + map_at();
      stage<decltype(r)::value, true>(
          share, n, [&](int row) { return read(share.cell(row)); },
          [&](int row, const Number& v) {
            const Number s = read(map[static_cast<unsigned>(row) * width]);
            // Of an inactive lane all cells are zeros already, whatever its neighbour's map holds.
            if (active) write(share.cell(row), multiply(v, s.re, -s.im));
          });
    });
    __syncthreads();
    for (int k = thread; k < n * columns; k += kThreads) {
      Number sum = round == first_round ? Number{0, 0} : read(sums[k]);
      const Pair* const products = memory + share.cells + k * slots;
      if (slots == 1) sum = sum + read(products[0]);
      for (int m = 0; m + 1 < slots; m += 2) {
        const auto two = *reinterpret_cast<const Pack<float, 4>*>(products + m);
        sum = sum + Number{two.at[0], two.at[1]} + Number{two.at[2], two.at[3]};
      }
      write(sums[k], sum);
    }
  }

  if (kind == kForward) {
    const int used = first_round * slots + slot;
    if (!here || used >= scan.n_used) return;
    const int64_t index = scan.coils ? scan.coils[used] : used;
    const bool known = index >= 0 && index < scan.n_coils;
    if (known && !line_of) return;
    for (int pad = share.first; pad < lines.n; pad += share.step) {
      const int64_t line = line_of ? line_of[pad] : pad;
      if (known && line >= 0 && line < n) continue;
      write(samples[((int64_t{b} * scan.n_used + used) * lines.n + pad) * width + column], {0, 0});
    }
    return;
  }

  // Pixels in the order of memory.
  __syncthreads();
  for (int k = thread; k < n * columns; k += kThreads) {
    const int i = scan.transposed ? k % n : k / columns, j = scan.transposed ? k / n : k % columns;
    if (first_column + j >= width) continue;
    const Number sum = read(sums[i * columns + j]);
    const int64_t at = b * plane + (scan.transposed ? static_cast<int64_t>(first_column + j) * n + i
                                                    : static_cast<int64_t>(i) * width + first_column + j);
    out[at] = {{sum.re * lines.image_scale, sum.im * lines.image_scale}};
  }
}

// CUDA backend of fourier_forward, fourier_adjoint and fourier_gradient along the other axis, of a mask.
//
// Computes        kForward: samples[b,u,m,k] = mask[b,m,k] scale sum_j w^(m j) workspace[b,u,k,j], w = exp(-2 pi i /
//                 width). kAdjoint: workspace, by its conjugate transpose. kNormal: that of the forward result less the
//                 measured samples[b,c,m,k], c = coils[u], in place.
// Thread mapping  grid (tiles of rows k * n_used * batch), block 256: a block has up to 16 rows of one coil, each a
//                 lane; threads take butterflies as in fourier_lines_kernel, and 16 neighbours of a row to load and
//                 store them.
// Shared memory   the rows, transposed, with a gap after each 16 numbers that spreads them over the banks; roots of
//                 unity, the frequency at each place; twice the rows where width has a prime factor above 13, unless
//                 Long: then the last stage has radix 17, 19 or 23.
// Accumulation    float32.
// Preconditions   contiguous.
template <bool Long>
ODER_KERNEL ODER_BOUNDS(kThreads, Long ? 2 : 3)
    fourier_points_kernel(Kind kind, Pair* samples, FourierScan scan, ODER_CONSTANT(FourierPlan) plan, int lanes,
                          float scale) {
  ODER_DYNAMIC_SHARED(Pair, memory);
  const int thread = threadIdx.x, width = scan.width, n = scan.n, pitch = lanes | 1;
  const bool dense = !Long && plan.radix[plan.n_stages - 1] > kRadix;
  const int roots_at = width * pitch * (dense ? 2 : 1);
  Share share{memory, 0, width * pitch, roots_at, width, pitch, thread % lanes, thread / lanes, kThreads / lanes};
  int* const column_at = reinterpret_cast<int*>(memory + roots_at + width);

  const unsigned tiles = (n + lanes - 1) / lanes, plane = blockIdx.x / tiles;
  const int first_row = static_cast<int>(blockIdx.x % tiles) * lanes, k = first_row + share.lane;
  const int64_t b = plane / scan.n_used;
  const int used = plane % scan.n_used;
  const int64_t coil = scan.coils ? scan.coils[used] : used;
  const bool active = k < n && coil >= 0 && coil < scan.n_coils;
  const uint8_t* const mask =
      static_cast<const uint8_t*>(scan.sampling) + (scan.shared_sampling ? 0 : b * width * n) + k;
  Pair* const y = samples + (b * scan.n_coils + (active ? coil : 0)) * width * n + k;
  Pair* const rows = reinterpret_cast<Pair*>(scan.workspace) + (static_cast<int64_t>(plane) * n + first_row) * width;

  for (int m = thread; m < width; m += kThreads) {
    memory[roots_at + m] = reinterpret_cast<const Pair*>(scan.roots_width)[m];
    column_at[fourier_position(plan, m)] = m;
  }
  const auto each_number = [&](auto f) {
    for (int row = thread / 16; row < lanes && first_row + row < n; row += kThreads / 16) {
      for (int j = thread % 16; j < width; j += 16)
        f(memory[share.cells + j * pitch + row], rows[row * static_cast<int64_t>(width) + j]);
    }
  };
  if (kind != kAdjoint) each_number([](Pair& cell, Pair& number) { cell = number; });
  transform<Long>(share, kind, plan, 0, width, [&](int row, const Number& a) {
    const int64_t at = static_cast<int64_t>(column_at[row]) * n;
    Number sample{0, 0};
    if (!active || at < 0) return sample;
    const bool sampled = mask[at];
    if (kind == kForward) {
      write(y[at], sampled ? Number{a.re * scale, a.im * scale} : sample);
    } else if (sampled) {
      if (samples) sample = read(y[at]);
      if (kind == kNormal) sample = {a.re * scale - sample.re, a.im * scale - sample.im};
      sample = {sample.re * scale, sample.im * scale};
    }
    return sample;
  });
  if (kind == kForward) return;
  __syncthreads();
  each_number([](Pair& cell, Pair& number) { number = cell; });
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

size_t tile_bytes(const FourierPlan& plan, bool is_long, int cells, int sums) {
  const bool dense = !is_long && plan.radix[plan.n_stages - 1] > kRadix;
  return plan.n * (sizeof(Pair) * (cells * (dense ? 2 : 1) + sums + 1) + sizeof(int));
}

size_t room_of(int lanes) {
  const size_t room = shared_bytes() - kStaticBytes;
  return lanes > 4 ? std::min(room, kSharedBytes) : room;
}

[[noreturn]] void refuse(int n) {
  throw std::invalid_argument("fourier: a transform of length " + std::to_string(n) +
                              " does not fit into the shared memory of this GPU; use backend 'reference'");
}

Layout layout_of(const FourierScan& scan, const FourierPlan& plan, Kind kind, bool is_long) {
  // As many coils at a time, up to 4, as leave at most a fifth of the lanes idle in the last round.
  int most = 4;
  while (ceil_div(scan.n_used, most) * most * 4 > scan.n_used * int64_t{5}) most /= 2;
  const auto with = [&](int columns, int slots) {
    return Layout{columns, slots, static_cast<int>(ceil_div(scan.width, columns)),
                  static_cast<int>(ceil_div(scan.n_used, slots)),
                  tile_bytes(plan, is_long, columns * slots, kind == kForward ? 0 : columns)};
  };
  for (int lanes = kLanes; lanes > 0; lanes /= 2) {
    // 4 columns are 32 bytes of a row, the least that memory gives.
    const int slots = std::min(most, std::max(lanes / 4, 1));
    Layout layout = with(lanes / slots, slots);
    if (layout.shared > room_of(lanes)) continue;
    const bool idle = int64_t{layout.tiles} * scan.batch < 2 * processor_count();
    if (kind != kForward && lanes == kLanes && slots == 4 && layout.rounds > 1 && idle) return with(2, 8);
    return layout;
  }
  refuse(scan.n);
}

template <bool Long>
void lines_of(Kind kind, const Pair* image, Pair* samples, Pair* out, const FourierScan& scan, void* stream) {
  if (std::max<int64_t>(scan.n, scan.n_lines) * scan.width > 0xffffffff) {
    throw std::invalid_argument("fourier: the CUDA kernels take images and samples of a coil below 2^32 numbers");
  }
  const FourierPlan plan = fourier_plan(scan.n);
  const Layout layout = layout_of(scan, plan, kind, Long);
  const double scale = 1 / std::sqrt(static_cast<double>(scan.n));
  const double weight = static_cast<double>(scan.n_coils) / scan.n_used;
  const bool all = scan.n_lines == 0;
  const Lines sampled{all ? nullptr : static_cast<const int64_t*>(scan.sampling), all ? scan.n : scan.n_lines,
                      static_cast<float>(scale), static_cast<float>(scale * weight)};
  const int64_t blocks = int64_t{layout.tiles} * scan.batch * (kind == kForward ? layout.rounds : 1);
  if (scan.maps_dtype != kFloat32 && scan.maps_dtype != kFloat16) {
    throw std::invalid_argument("fourier: coil maps must be pairs of float32 or float16, got code " +
                                std::to_string(scan.maps_dtype));
  }
  ODER_LAUNCH(fourier_lines_kernel<Long>, blocks, kThreads, layout.shared, stream, kind, image, samples, out, scan,
              plan, layout, sampled);
}

// Whether the last stage, and no other, takes a long radix in registers.
bool ends_long(const FourierPlan& plan) {
  const int last = plan.n_stages - 1, radix = plan.radix[last];
  return radix > kRadix && radix <= kLongRadix && (last == 0 || plan.radix[last - 1] <= kRadix);
}

void lines(Kind kind, const Pair* image, Pair* samples, Pair* out, const FourierScan& scan, void* stream) {
  const bool is_long = ends_long(fourier_plan(scan.n));
  (is_long ? lines_of<true> : lines_of<false>)(kind, image, samples, out, scan, stream);
}

template <bool Long>
void points_of(Kind kind, Pair* samples, const FourierScan& scan, void* stream) {
  const FourierPlan plan = fourier_plan(scan.width);
  const double scale = 1 / std::sqrt(static_cast<double>(scan.width));
  for (int lanes = kLanes; lanes > 0; lanes /= 2) {
    const size_t shared = tile_bytes(plan, Long, lanes | 1, 0);
    if (shared > room_of(lanes)) continue;
    ODER_LAUNCH(fourier_points_kernel<Long>, ceil_div(scan.n, lanes) * scan.n_used * scan.batch, kThreads, shared,
                stream, kind, samples, scan, plan, lanes, static_cast<float>(scale));
    return;
  }
  refuse(scan.width);
}

void points(Kind kind, Pair* samples, const FourierScan& scan, void* stream) {
  const bool is_long = ends_long(fourier_plan(scan.width));
  (is_long ? points_of<true> : points_of<false>)(kind, samples, scan, stream);
}

Pair* workspace_of(const FourierScan& scan) { return reinterpret_cast<Pair*>(scan.workspace); }

void fourier_forward(const Pair* image, Pair* samples, const FourierScan& scan, void* stream) {
  if (scan.n_lines > 0) return lines(kForward, image, samples, nullptr, scan, stream);
  lines(kForward, image, workspace_of(scan), nullptr, scan, stream);
  points(kForward, samples, scan, stream);
}

void fourier_adjoint(const Pair* samples, Pair* image, const FourierScan& scan, void* stream) {
  Pair* const given = const_cast<Pair*>(samples);  // only read
  if (scan.n_lines > 0) return lines(kAdjoint, nullptr, given, image, scan, stream);
  points(kAdjoint, given, scan, stream);
  lines(kAdjoint, nullptr, workspace_of(scan), image, scan, stream);
}

void fourier_gradient(const Pair* image, const Pair* samples, Pair* gradient, const FourierScan& scan, void* stream) {
  Pair* const measured = const_cast<Pair*>(samples);  // only read
  if (scan.n_lines > 0) return lines(kNormal, image, measured, gradient, scan, stream);
  lines(kForward, image, workspace_of(scan), nullptr, scan, stream);
  points(kNormal, measured, scan, stream);
  lines(kAdjoint, nullptr, workspace_of(scan), gradient, scan, stream);
}

const Operator kOperators[] = {
    {"fourier_forward", fourier_forward},
    {"fourier_adjoint", fourier_adjoint},
    {"fourier_gradient", fourier_gradient},
};

}  // namespace
}  // namespace oder
