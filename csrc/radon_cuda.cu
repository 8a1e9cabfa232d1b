#include <algorithm>
#include <type_traits>

#include "cuda_types.h"
#include "radon.h"

namespace oder {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
// Lines (image rows or columns) that a projection sums at a time, as STRIP in oder_fast/ops/radon.py.
constexpr int kStrip = 32;
// Words of a line in shared memory, for all images of a block: three blocks fit beside each other on an H100.
constexpr int kLineWords = 584;
// Pixels kept left of a tile: the tap before its first pixel, and whole runs of four for aligned copies.
constexpr int kMargin = 4;
// Views of a block at a time.
constexpr int kProjectViews = 16;
constexpr int kGatherViews = 128;
// Edge of the square of pixels of a block that gathers.
constexpr int kTile = 32;
constexpr int kPixels = kTile * kTile / kThreads;
constexpr int kWindowBytes = 40 * 1024;

// Positions are 32.32 fixed-point numbers: the high word is an index, the low word the weight.
ODER_DEVICE int64_t fixed(double a) { return llrint(a * 4294967296.0); }
ODER_DEVICE int whole(int64_t a) { return static_cast<int>(a >> 32); }
// 1 + fraction: its leading 23 bits below the exponent of 1.
ODER_DEVICE float one_plus_fraction(int64_t a) {
  return float_of_bits(shift_right(static_cast<uint32_t>(a), 0x7fu, 9));
}

// Where row (b, v) of a sinogram of the used views begins.
ODER_DEVICE int64_t row_of(const RadonScan& scan, int64_t b, int v) { return (b * scan.n_used + v) * scan.n_bins; }

// How lines of `length` pixels are cut into tiles. A ray belongs to the tile in which its leftmost sample of a strip
// lies, and leaves it by less than a strip's height.
struct Tiling {
  int tiles, length, stride;
};

Tiling tiling_of(int length, bool rows, int words) {
  Tiling t{1, length, length + kMargin + 1};
  if (t.stride + 4 > words) {
    const int room = (words - 1 - kStrip - 2 * kMargin) / 4 * 4;
    t.tiles = (length + room - 1) / room;
    t.length = ((length + t.tiles - 1) / t.tiles + 3) / 4 * 4;
    t.stride = t.length + kStrip + 2 * kMargin;
  }
  // Rows are copied by aligned runs of four; columns are transposed, which an odd stride spreads over the banks.
  t.stride = rows ? (t.stride + 3) / 4 * 4 : t.stride | 1;
  return t;
}

// How a projection is laid out over the grid.
struct ProjectPlan {
  Tiling rows, columns;
  int n_strips;  // in a group
  int n_views;   // in a chunk
};

struct ProjectView {
  RadonRays rays;
  int64_t per_ray, per_line;
  float scale;
  int lanes;
  bool here, valid;  // marches the way of this block; has an angle
};

// The rays of one view that belong to one tile of one strip: [begin, end), of which [touch, touch_end) may touch it.
struct ProjectRays {
  int64_t origin;  // position of ray `touch` on the first line
  int begin, end, touch, touch_end;
};

ODER_DEVICE ProjectRays rays_of_tile(const RadonScan& scan, const ProjectView& view, int length, int line, int lines,
                                     int tile, const Tiling& tiling) {
  const double sigma = view.rays.sigma, slope = view.rays.slope;
  const double first = view.rays.centre + line * slope, last = view.rays.centre + (line + lines - 1) * slope;
  const double low = first < last ? first : last, high = first < last ? last : first;
  const double middle = radon_middle(scan);
  const int n_bins = scan.n_bins;
  // The first ray at or after a pixel, counted from a position of the middle ray. Steps may be too long for a quotient
  // to tell it from the ray before.
  const auto first_ray = [&](double pixel, double position) {
    const int e = clamp_to(ceil(middle + (pixel - position) / sigma), n_bins);
    return e < n_bins && (e - middle) * sigma + position < pixel ? e + 1 : e;
  };
  // Neighbouring tiles compute their common border alike.
  const auto border = [&](int at) {
    return at == 0 ? 0 : at == tiling.tiles ? n_bins : first_ray(static_cast<double>(at) * tiling.length, low);
  };
  ProjectRays r{0, border(tile), border(tile + 1), 0, 0};
  if (!view.valid || lines < 1) return r;
  const int touch = first_ray(-1, high), touch_end = first_ray(length, low);
  r.touch = touch > r.begin ? touch : r.begin;
  r.touch_end = touch_end < r.end ? touch_end : r.end;
  if (r.touch < r.touch_end)
    r.origin = fixed((r.touch - middle) * sigma + first - static_cast<double>(tile) * tiling.length + kMargin);
  return r;
}

// Copies one number to shared memory as float, zero where not `inside`; float32 arrives by wait_for_copies().
template <class T>
ODER_DEVICE void fetch(float* target, const T* base, int64_t offset, bool inside) {
  const T* const source = inside ? base + offset : base;
  if constexpr (std::is_same_v<T, float>) {
    copy_async<4>(target, source, inside);
  } else {
    *target = inside ? to_float(*source) : 0.0f;
  }
}

// The same for four numbers, both addresses aligned to them.
template <class T>
ODER_DEVICE void fetch_four(float* target, const T* base, int64_t offset, bool inside) {
  const T* const source = inside ? base + offset : base;
  if constexpr (std::is_same_v<T, float>) {
    copy_async<16>(target, source, inside);
  } else {
    Pack<float, 4> out{};
    if (inside) {
      const auto in = *reinterpret_cast<const Pack<T, 4>*>(source);
#pragma unroll
      for (int k = 0; k < 4; ++k) out.at[k] = to_float(in.at[k]);
    }
    *reinterpret_cast<Pack<float, 4>*>(target) = out;
  }
}

// Fetches pixels `from` on of lines [line, line + lines) of an image into a tile; zeros beside the image.
template <bool Rows, class T>
ODER_DEVICE void load_tile(const T* __restrict__ image, const RadonScan& scan, int line, int lines, int from,
                           int stride, float* __restrict__ tile) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int height = scan.height, width = scan.width;
  if (!Rows) {
#pragma unroll 4
    for (int x = warp; x < stride; x += kWarps) {
      const int i = from + x;
      const bool inside = i >= 0 && i < height && lane < lines;
      fetch(tile + lane * stride + x, image, static_cast<int64_t>(i) * width + line + lane, inside);
    }
    return;
  }
  const bool aligned = width % 4 == 0 && reinterpret_cast<uintptr_t>(image) % (4 * sizeof(T)) == 0;
  for (int r = warp; r < lines; r += kWarps) {
    const int64_t offset = static_cast<int64_t>(line + r) * width + from;
    float* const target = tile + r * stride;
    if (aligned) {
#pragma unroll 4
      for (int x = 4 * lane; x < stride; x += 128) {
        fetch_four(target + x, image, offset + x, from + x >= 0 && from + x < width);
      }
    } else {
#pragma unroll 2
      for (int x = lane; x < stride; x += 32) {
        fetch(target + x, image, offset + x, from + x >= 0 && from + x < width);
      }
    }
  }
}

// What a block of radon_project_kernel has to do.
struct ProjectBlock {
  int group, first_view, n_views, first_image;
};

template <class T, int Images, bool Rows>
ODER_DEVICE void project_strips(const T* image, const RadonScan& scan, const ProjectPlan& plan,
                                const ProjectBlock& block, const ProjectView* views, ProjectRays* bundles,
                                float* tiles) {
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int n_lines = Rows ? scan.height : scan.width, length = Rows ? scan.width : scan.height;
  const Tiling& tiling = Rows ? plan.rows : plan.columns;
  const int stride = tiling.stride, plane = kStrip * stride;
  const int strips = (n_lines + kStrip - 1) / kStrip, first_strip = block.group * plan.n_strips;
  const int last_strip = strips < first_strip + plan.n_strips ? strips : first_strip + plan.n_strips;
  int strip = first_strip;
  // At least once: a group without a strip of this direction still writes its zeros.
  do {
    const int line = strip * kStrip;
    const int lines = strip < strips ? (n_lines - line < kStrip ? n_lines - line : kStrip) : 0;
    for (int tile = 0; tile < tiling.tiles; ++tile) {
      __syncthreads();
      const int from = tile * tiling.length - kMargin;
#pragma unroll 1
      for (int k = 0; k < Images; ++k) {
        const int64_t b = block.first_image + k < scan.batch ? block.first_image + k : block.first_image;
        load_tile<Rows>(image + b * scan.height * scan.width, scan, line, lines, from, stride, tiles + k * plane);
      }
      if (thread < block.n_views) {
        bundles[thread] = rays_of_tile(scan, views[thread], length, line, lines, tile, tiling);
      }
      wait_for_copies();
      __syncthreads();

      int task = warp;
      for (int v = 0; v < block.n_views; ++v) {
        if (!views[v].here) continue;
        const ProjectRays& rays = bundles[v];
        const int lanes = views[v].lanes, tasks = (rays.end - rays.begin + lanes - 1) / lanes;
        const int64_t per_line = views[v].per_line;
        for (; task < tasks; task += kWarps) {
          const int e = rays.begin + task * lanes + lane;
          if (lane >= lanes || e >= rays.end) continue;
          float low[Images] = {}, high[Images] = {};
          const auto tap = [&](int64_t position) {
            const float fraction1 = one_plus_fraction(position);
            const float w0 = 2.0f - fraction1, w1 = fraction1 - 1.0f;
            const float* const at = tiles + whole(position);
#pragma unroll
            for (int k = 0; k < Images; ++k) {
              low[k] += w0 * at[k * plane];
              high[k] += w1 * at[k * plane + 1];
            }
          };
          if (e >= rays.touch && e < rays.touch_end) {
            int64_t position = rays.origin + (e - rays.touch) * views[v].per_ray;
            const unsigned limit = stride - 1;
            const unsigned first = whole(position);
            const unsigned last = whole(position + (lines - 1) * per_line) - (lines - 1) * stride;
            if (first < limit && last < limit) {
#pragma unroll(8 / Images)
              for (int m = 0; m < lines; ++m, position += per_line) tap(position);
            } else {
#pragma unroll 1
              for (int m = 0; m < lines; ++m, position += per_line) {
                if (static_cast<unsigned>(whole(position) - m * stride) < limit) tap(position);
              }
            }
          }
          const int d = views[v].rays.flip ? scan.n_bins - 1 - e : e;
#pragma unroll
          for (int k = 0; k < Images; ++k) {
            if (block.first_image + k >= scan.batch) continue;
            const int64_t plane_of = static_cast<int64_t>(block.group) * scan.batch + block.first_image + k;
            float* const out = scan.sums + row_of(scan, plane_of, block.first_view + v) + d;
            const float sum = (low[k] + high[k]) * views[v].scale;
            *out = strip == first_strip ? sum : *out + sum;
          }
        }
        task -= tasks;
      }
    }
  } while (++strip < last_strip);
}

// CUDA backend of radon_forward, first stage.
//
// Computes        sums[g,b,v,d] = step_v * pixel_size * sum over the lines m of group g of the image at ray d's
//                 crossing of line m, interpolated linearly (oder_fast/reference/radon.py); radon_combine adds up the
//                 groups. Lines are rows or columns, whichever the ray is nearer to cross at right angles.
// Thread mapping  grid (2 * groups of strips * chunks of views * ceil(batch / Images)), block 256: a block keeps a tile
//                 of 32 lines of `Images` images in shared memory and projects the chunk's views through it, those over
//                 rows if its index is even, else those over columns. A thread takes a ray; a warp takes as many
//                 neighbouring rays as cross no more than 32 pixels of a line, so that none of its reads meet in a
//                 bank. The images of a block share positions and weights.
// Shared memory   the tile, Images * 32 lines of at most 584 / Images floats; tables of the chunk's views.
// Accumulation    float32 over 32 lines, then over the strips of a group in increasing order; positions in 32.32 fixed
//                 point from a float64 origin per tile.
// Preconditions   contiguous; n_sums groups cover all strips.
template <class T, int Images>
ODER_KERNEL ODER_BOUNDS(kThreads, 3)
    radon_project_kernel(const T* image, RadonScan scan, ProjectPlan plan, float pixel_size) {
  ODER_DYNAMIC_SHARED(float, tiles);
  ODER_SHARED(ProjectView, views, kProjectViews);
  ODER_SHARED(ProjectRays, bundles, kProjectViews);
  const bool rows = blockIdx.x % 2 == 0;
  const int stride = rows ? plan.rows.stride : plan.columns.stride;
  unsigned block = blockIdx.x / 2;
  ProjectBlock at;
  at.group = block % scan.n_sums;
  block /= scan.n_sums;
  const unsigned n_chunks = (scan.n_used + plan.n_views - 1) / plan.n_views;
  at.first_view = block % n_chunks * plan.n_views;
  at.first_image = block / n_chunks * Images;
  at.n_views = scan.n_used - at.first_view < plan.n_views ? scan.n_used - at.first_view : plan.n_views;

  const int thread = threadIdx.x;
  if (thread < at.n_views) {
    const RadonDirection direction = radon_direction(scan, at.first_view + thread);
    ProjectView& view = views[thread];
    view.rays = radon_rays(scan, direction);
    const double sigma = view.rays.sigma;
    // Where a step is longer, at most one ray touches the image, and any step will do.
    view.per_ray = fixed(sigma < 1073741824.0 ? sigma : 1073741824.0);
    view.per_line = fixed(view.rays.slope) + (static_cast<int64_t>(stride) << 32);
    view.scale = static_cast<float>(direction.step) * pixel_size;
    view.lanes = sigma > 1 && sigma <= 2 ? static_cast<int>(31 / sigma) + 1 : 32;
    view.here = direction.rows == rows;
    view.valid = direction.valid;
  }
  __syncthreads();
  bool any = false;
  for (int v = 0; v < at.n_views; ++v) any |= views[v].here;
  if (!any) return;
  if (rows) {
    project_strips<T, Images, true>(image, scan, plan, at, views, bundles, tiles);
  } else {
    project_strips<T, Images, false>(image, scan, plan, at, views, bundles, tiles);
  }
}

// CUDA backend of radon_forward, second stage; residual of radon_gradient.
//
// Computes        out[b,v,d] = sum_g sums[g,b,v,d] - measured[b,views[v],d]; measured counts as zero where it is null
//                 and where the view is out of range.
// Thread mapping  grid (batch * n_used * ceil(n_bins / 256)), block 256: a thread has a bin.
// Shared memory   none.
// Accumulation    float32, groups in increasing order.
// Preconditions   contiguous; out may be scan.sums.
template <class T, class Out>
ODER_KERNEL ODER_BOUNDS(kThreads, 1) radon_combine_kernel(const T* measured, Out* out, RadonScan scan) {
  const unsigned parts = (scan.n_bins + kThreads - 1) / kThreads, row = blockIdx.x / parts;
  const int d = blockIdx.x % parts * kThreads + threadIdx.x;
  if (d >= scan.n_bins) return;
  const int b = row / scan.n_used, used = row % scan.n_used;
  const int64_t at = row_of(scan, b, used) + d, plane = row_of(scan, scan.batch, 0);
  float sum = 0;
#pragma unroll 8
  for (int g = 0; g < scan.n_sums; ++g) sum += scan.sums[g * plane + at];
  if (measured) {
    const int64_t view = scan.views ? scan.views[used] : used;
    if (view >= 0 && view < scan.n_views) {
      sum -= to_float(measured[(static_cast<int64_t>(b) * scan.n_views + view) * scan.n_bins + d]);
    }
  }
  out[at] = from_float<Out>(sum);
}

// How a gathering reads the sinogram: through windows in shared memory, where a pixel takes at most two or four bins of
// a view, or, for bins finer than half a pixel or much coarser than one, bin by bin with weights in float64.
enum GatherKind { kTwoBins = 2, kFourBins = 4, kAnyBins = 0 };

GatherKind gather_kind(double bin_spacing, bool matched) {
  // Where sigma is above 8, the 23 bits of a fraction no longer make a weight of float's precision.
  if (!(bin_spacing >= 0.5 && bin_spacing <= 5.6)) return kAnyBins;
  return matched && bin_spacing < 1 - 1e-7 ? kFourBins : kTwoBins;
}

// One view as a tile of pixels sees it. A pixel takes a ray with the weight 1 - distance / reach, if that is positive.
struct GatherView {
  double sigma, slope, centre;  // of radon_rays, lines and pixels counted from the tile's first
  double reach;                 // in pixels
  float scale;
  int from;         // first bin of the view's window in shared memory
  bool flip, rows;  // as in RadonRays and RadonDirection
  bool seen;        // touches the tile
};

// What the threads read of a view with a window, in two accesses: u from the tile's first pixel, such that its high
// word counts from the first window. Steps of u, at most 2, are 3.29 fixed-point numbers: one multiply-add makes u.
struct alignas(16) GatherSteps {
  int64_t corner;
  int per_row, per_column;
  float sigma, before, after;  // 1 + sigma, 1 - 2 * sigma
};
constexpr int kStepScale = 8;
constexpr double kStepOne = 4294967296.0 / kStepScale;

// Prepares the `slot`-th view of those whose windows are in shared memory together; (i, j) is the tile's first pixel.
ODER_DEVICE void prepare_gather(const RadonScan& scan, int used, int i, int j, double scale, bool matched, int window,
                                int slot, GatherView& view, GatherSteps& steps) {
  const RadonDirection direction = radon_direction(scan, used);
  view.scale = static_cast<float>(matched ? scale * direction.step : scale);
  if (window == 0) {
    const RadonRays rays = radon_rays(scan, direction);
    view.sigma = rays.sigma;
    view.slope = rays.slope;
    view.centre = rays.centre + (direction.rows ? i * rays.slope - j : j * rays.slope - i);
    view.reach = matched ? 1.0 : rays.sigma;
    view.flip = rays.flip;
    view.rows = direction.rows;
    view.seen = direction.valid;
    return;
  }
  const double sigma = matched ? direction.step * scan.bin_spacing : 1.0;
  RadonBins bins = radon_bins(scan, direction);
  bins.corner += i * bins.per_row + j * bins.per_column;
  const double over_rows = (kTile - 1) * bins.per_row, over_columns = (kTile - 1) * bins.per_column;
  const double low = bins.corner + (over_rows < 0 ? over_rows : 0) + (over_columns < 0 ? over_columns : 0);
  const double high = bins.corner + (over_rows > 0 ? over_rows : 0) + (over_columns > 0 ? over_columns : 0);
  view.seen = direction.valid && high + 1 / sigma >= 0 && low - 1 / sigma <= scan.n_bins - 1;
  // One bin for the first tap, and one since rounded steps may lead below `low`. A view beside the tile has a window of
  // zeros.
  view.from = view.seen ? static_cast<int>(floor(low)) - 2 : scan.n_bins;
  steps.corner = static_cast<int64_t>(slot * window) << 32;
  steps.corner += view.seen ? fixed(bins.corner - view.from) : fixed(1);
  steps.per_row = view.seen ? static_cast<int>(llrint(bins.per_row * kStepOne)) : 0;
  steps.per_column = view.seen ? static_cast<int>(llrint(bins.per_column * kStepOne)) : 0;
  steps.sigma = static_cast<float>(sigma);
  steps.before = static_cast<float>(1 + sigma);
  steps.after = static_cast<float>(1 - 2 * sigma);
}

// Adds to the pixels of a thread the bins whose weights are not zero, of which there are at most Taps.
template <int Taps, int Images>
ODER_DEVICE void gather_windows(const Pack<float, Images>* windows, const GatherSteps* steps, int n_views, int row,
                                int column, float sums[kPixels][Images]) {
#pragma unroll 2
  for (int v = 0; v < n_views; ++v) {
    const GatherSteps step = steps[v];
    const int64_t per_row = static_cast<int64_t>(step.per_row) * kStepScale;
    const int64_t first = multiply_add(step.per_column, kStepScale * column, step.corner);
    int64_t u = multiply_add(step.per_row, kStepScale * row, first);
#pragma unroll
    for (int p = 0; p < kPixels; ++p, u += per_row) {
      const float fraction1 = one_plus_fraction(u);
      const Pack<float, Images>* const at = windows + whole(u);
#pragma unroll
      for (int tap = 1 - Taps / 2; tap <= Taps / 2; ++tap) {
        // 1 - abs(tap - fraction) * sigma
        const float weight = tap < 0    ? saturate(fmaf(-step.sigma, fraction1, 1.0f))
                             : tap == 0 ? saturate(fmaf(-step.sigma, fraction1, step.before))
                             : tap == 1 ? saturate(fmaf(step.sigma, fraction1, step.after))
                                        : saturate(fmaf(step.sigma, fraction1, step.after - step.sigma));
#pragma unroll
        for (int k = 0; k < Images; ++k) sums[p][k] = fmaf(weight, at[tap].at[k], sums[p][k]);
      }
    }
  }
}

// The same without windows, ray by ray.
template <class In, int Images>
ODER_DEVICE void gather_any(const In* sinogram, int64_t sinogram_size, int n_bins, int n_images, const GatherView& view,
                            int row, int column, float sums[kPixels][Images]) {
#pragma unroll
  for (int p = 0; p < kPixels; ++p) {
    const int line = view.rows ? row + p : column, pixel = view.rows ? column : row + p;
    const double middle = (n_bins - 1) / 2.0, centre = view.centre + line * view.slope - pixel;
    const int begin = clamp_to(ceil(middle - (view.reach + centre) / view.sigma), n_bins);
    const int end = clamp_to(floor(middle + (view.reach - centre) / view.sigma) + 1, n_bins);
#pragma unroll 1
    for (int e = begin; e < end; ++e) {
      const double weight = 1 - fabs((e - middle) * view.sigma + centre) / view.reach;
      if (weight <= 0) continue;
      const int d = view.flip ? n_bins - 1 - e : e;
      const float w = static_cast<float>(weight) * view.scale;
#pragma unroll
      for (int k = 0; k < Images; ++k) {
        if (k < n_images) sums[p][k] += w * to_float(sinogram[k * sinogram_size + d]);
      }
    }
  }
}

// CUDA backend of radon_adjoint, radon_backproject, and of the second half of radon_gradient.
//
// Computes        image[b,i,j] = sum_v scale_v sum_d max(0, 1 - abs(d - u_v(i,j)) sigma_v) sinogram[b,v,d] with the bin
//                 coordinate u of the pixel: the exact transpose of radon_forward where `matched`, linear interpolation
//                 along the detector where not.
// Thread mapping  grid (tiles of 32 x 32 pixels * ceil(batch / Images)), block 256: a warp has 4 rows of the tile, a
//                 thread 4 pixels of one column; each pixel is written once, no atomics. A view steps by at most one
//                 bin between lanes, so that their reads meet in no bank. The images share positions and weights.
// Shared memory   the bins of 128 views that the tile can see, times the scale of the view; a table of the views.
// Accumulation    float32, views in increasing order; bin coordinates in 32.32 fixed point from a float64 origin per
//                 tile, in float64 and ray by ray for bins finer than half a pixel or coarser than 5.6.
// Preconditions   contiguous.
template <class In, class Out, int Images>
ODER_KERNEL ODER_BOUNDS(kThreads, 3)
    radon_gather_kernel(const In* __restrict__ sinogram, Out* image, RadonScan scan, double scale, bool matched,
                        GatherKind kind, int chunk, int window) {
  using Bins = Pack<float, Images>;
  ODER_DYNAMIC_SHARED(Bins, windows);
  ODER_SHARED(GatherView, views, kGatherViews);
  ODER_SHARED(GatherSteps, steps, kGatherViews);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int across = (scan.width + kTile - 1) / kTile, down = (scan.height + kTile - 1) / kTile;
  const unsigned tiles = static_cast<unsigned>(across) * down, tile = blockIdx.x % tiles;
  const int first_image = blockIdx.x / tiles * Images;
  const int first_row = static_cast<int>(tile / across) * kTile, first_column = static_cast<int>(tile % across) * kTile;
  const int row = warp * kPixels;
  const int64_t sinogram_size = row_of(scan, 1, 0);

  float sums[kPixels][Images] = {};
  for (int first_view = 0; first_view < scan.n_used; first_view += chunk) {
    const int n_views = scan.n_used - first_view < chunk ? scan.n_used - first_view : chunk;
    __syncthreads();
    if (thread < n_views) {
      prepare_gather(scan, first_view + thread, first_row, first_column, scale, matched, window, thread, views[thread],
                     steps[thread]);
    }
    __syncthreads();
    if (kind == kAnyBins) {
      for (int v = 0; v < n_views; ++v) {
        if (!views[v].seen) continue;
        gather_any<In, Images>(sinogram + row_of(scan, first_image, first_view + v), sinogram_size, scan.n_bins,
                               scan.batch - first_image, views[v], row, lane, sums);
      }
      continue;
    }
    // Every thread fetches bins and then scales the same ones.
    for (int v = warp; v < n_views; v += kWarps) {
      const int64_t offset = row_of(scan, first_image, first_view + v) + views[v].from;
#pragma unroll 2
      for (int x = lane; x < window; x += 32) {
        const int d = views[v].from + x;
        const bool inside = d >= 0 && d < scan.n_bins;
#pragma unroll
        for (int k = 0; k < Images; ++k) {
          fetch(&windows[v * window + x].at[k], sinogram, offset + x + k * sinogram_size,
                inside && first_image + k < scan.batch);
        }
      }
    }
    wait_for_copies();
    for (int v = warp; v < n_views; v += kWarps) {
      const float view_scale = views[v].scale;
#pragma unroll 2
      for (int x = lane; x < window; x += 32) {
#pragma unroll
        for (int k = 0; k < Images; ++k) windows[v * window + x].at[k] *= view_scale;
      }
    }
    __syncthreads();
    if (kind == kTwoBins) {
      gather_windows<2, Images>(windows, steps, n_views, row, lane, sums);
    } else {
      gather_windows<4, Images>(windows, steps, n_views, row, lane, sums);
    }
  }

  const int j = first_column + lane;
#pragma unroll
  for (int k = 0; k < Images; ++k) {
    const int b = first_image + k;
    if (b >= scan.batch) break;
#pragma unroll
    for (int p = 0; p < kPixels; ++p) {
      const int i = first_row + row + p;
      if (i >= scan.height || j >= scan.width) continue;
      image[(static_cast<int64_t>(b) * scan.height + i) * scan.width + j] = from_float<Out>(sums[p][k]);
    }
  }
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T, int Images>
void project(const T* image, const RadonScan& scan, void* stream) {
  const int64_t groups = ceil_div(scan.batch, Images), n_sums = scan.n_sums;
  // As many views share a tile as leave every processor its three blocks.
  const int64_t chunk =
      std::clamp<int64_t>(ceil_div(scan.n_used * n_sums * groups, 3 * processor_count()), 1, kProjectViews);
  const int64_t strips = ceil_div(std::max(scan.height, scan.width), kStrip);
  const int words = kLineWords / Images;
  const ProjectPlan plan{tiling_of(scan.width, true, words), tiling_of(scan.height, false, words),
                         static_cast<int>(ceil_div(strips, n_sums)), static_cast<int>(chunk)};
  const int stride = std::max(plan.rows.stride, plan.columns.stride);
  const int64_t blocks = 2 * n_sums * ceil_div(scan.n_used, chunk) * groups;
  ODER_LAUNCH((radon_project_kernel<T, Images>), blocks, kThreads, sizeof(float) * Images * kStrip * stride, stream,
              image, scan, plan, static_cast<float>(scan.pixel_size));
}

template <class T, class Out>
void project_all(const T* image, const T* measured, Out* out, const RadonScan& scan, void* stream) {
  if (scan.n_sums < 1) throw std::invalid_argument("radon_project_kernel: n_sums must be at least 1");
  (scan.batch > 1 ? project<T, 2> : project<T, 1>)(image, scan, stream);
  const int64_t blocks = int64_t{scan.batch} * scan.n_used * ceil_div(scan.n_bins, kThreads);
  ODER_LAUNCH((radon_combine_kernel<T, Out>), blocks, kThreads, 0, stream, measured, out, scan);
}

template <class In, class Out, int Images>
void gather(const In* sinogram, Out* image, const RadonScan& scan, double scale, bool matched, void* stream) {
  const int64_t tiles = ceil_div(scan.height, kTile) * ceil_div(scan.width, kTile);
  const GatherKind kind = gather_kind(scan.bin_spacing, matched);
  // A tile sees its diagonal's worth of bins, two more before it, and the second tap and what rounding brings after it.
  const int window =
      kind == kAnyBins ? 0 : static_cast<int>(std::ceil((kTile - 1) * std::sqrt(2.0) / scan.bin_spacing)) + 6;
  const int64_t room = window ? kWindowBytes / (static_cast<int64_t>(sizeof(float)) * Images * window) : kGatherViews;
  const int64_t most = std::min<int64_t>({scan.n_used, room, kGatherViews});
  const int64_t chunk = ceil_div(scan.n_used, ceil_div(scan.n_used, most));
  const size_t shared = sizeof(float) * Images * window * chunk;
  ODER_LAUNCH((radon_gather_kernel<In, Out, Images>), tiles * ceil_div(scan.batch, Images), kThreads, shared, stream,
              sinogram, image, scan, scale, matched, kind, static_cast<int>(chunk), window);
}

template <class In, class Out>
void gather_all(const In* sinogram, Out* image, const RadonScan& scan, double scale, bool matched, void* stream) {
  (scan.batch > 1 ? gather<In, Out, 2> : gather<In, Out, 1>)(sinogram, image, scan, scale, matched, stream);
}

template <class T>
void radon_forward(const T* image, T* sinogram, const RadonScan& scan, void* stream) {
  project_all<T, T>(image, nullptr, sinogram, scan, stream);
}

template <class T, bool Matched>
void back(const T* sinogram, T* image, const RadonScan& scan, void* stream) {
  gather_all(sinogram, image, scan, Matched ? scan.pixel_size : 1.0, Matched, stream);
}

template <class T>
void radon_gradient(const T* image, const T* measured, T* gradient, const RadonScan& scan, void* stream) {
  const double scale = scan.pixel_size * static_cast<double>(scan.n_views) / static_cast<double>(scan.n_used);
  project_all(image, measured, scan.sums, scan, stream);
  gather_all(scan.sums, gradient, scan, scale, true, stream);
}

const Operator kOperators[] = {
    {"radon_forward", radon_forward<float>, radon_forward<Bfloat16>, radon_forward<Float16>},
    {"radon_adjoint", back<float, true>, back<Bfloat16, true>, back<Float16, true>},
    {"radon_backproject", back<float, false>, back<Bfloat16, false>, back<Float16, false>},
    {"radon_gradient", radon_gradient<float>, radon_gradient<Bfloat16>, radon_gradient<Float16>},
};

}  // namespace
}  // namespace oder
