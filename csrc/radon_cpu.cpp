// C++ backend of radon_forward, radon_adjoint, radon_backproject and radon_gradient.
//
// Computes        Joseph's projection and its exact transpose as oder_fast/reference/radon.py defines them. Views that
//                 march along columns work on transposed tiles, views whose positions fall with the bin on reversed
//                 rows, so one kernel serves every view: position = origin + k * inv + r * slope, inv > 0, for bin k
//                 and marching step r.
// Thread mapping  forward: a share of the views to each thread; back-projection: tiles of 64 x 64 pixels.
// Shared memory   none shared; a thread keeps a zero-bordered tile of 16 steps (forward) or two sums of a tile
//                 (adjoint), and all threads the minibatch's rows, padded with zeros as far as pixels can look.
// Accumulation    float32 or float64, views in one fixed order per pixel, steps in order per bin: equal bits for any
//                 number of threads. Positions in fixed point with 40 fraction bits, of which lanes keep 23; in float64
//                 where bins are too fine or too coarse for that.
// Preconditions   contiguous; image and sinogram of one dtype (checked by the caller). View indices are checked.
#if defined(_OPENMP)
#include <omp.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "radon.h"
#include "vec.h"

namespace oder {
namespace {

constexpr int kSteps = 16;                        // marching steps of a forward tile
constexpr int kBorderLow = 48, kBorderHigh = 64;  // zeros around a forward tile: slope, lanes and alignment
constexpr int kTile = 64;                         // edge of a back-projection tile
constexpr int kViewRun = 64;                      // views whose part of the sinogram a tile keeps in L1
constexpr int kMaxImages = 4;                     // images that share positions and weights

template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t n)
      : p_(static_cast<T*>(std::aligned_alloc(64, (static_cast<size_t>(n) * sizeof(T) / 64 + 2) * 64))) {
    if (!p_) throw std::bad_alloc();
  }
  T* get() const { return p_.get(); }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> p_;
};

int64_t fixed(double a) { return llrint(a * 1099511627776.0); }                       // 2^40
int32_t fixed_lane(double a) { return static_cast<int32_t>(llrint(a * 8388608.0)); }  // 2^23

// How the lanes of one vector find their two or four neighbours in a Window.
struct Walk {
  bool fits;      // false: the generic loop
  int64_t align;  // mask that starts the window at a multiple of a few floats
  int64_t rest;   // mask of what is left of a position in 23 fraction bits
  int32_t lane[kLanes];

  void plan(double step, int taps) {
    fits = false;
    for (const int a : {kLanes, kLanes / 2, 1}) {
      if ((kLanes - 1) * step + (taps - 1) + (a - 1) <= 2 * kLanes - 1 - 1e-3) {
        fits = true;
        align = ~static_cast<int64_t>(a - 1);
        rest = (static_cast<int64_t>(a) << 23) - 1;
        break;
      }
    }
    for (int l = 0; fits && l < kLanes; ++l) lane[l] = fixed_lane(l * step);
  }
};

struct View {
  bool by_rows;                       // marches over rows; else over columns
  bool reversed;                      // bins in reverse order
  int64_t source;                     // row of the sinogram
  int64_t slot;                       // place among the used views
  double inv, slope, centre, middle;  // of radon_rays; sigma is inv
  double origin;                      // position of bin 0 on step 0
  double weight;                      // length of a step
  int64_t f_origin, f_inv, f_slope;
  Walk forward;
  // Back-projection: bin position = b_origin + u * b_inv + r * b_slope for pixel u of step r; a bin at distance t
  // counts max(0, 1 - t * hat).
  double b_origin, b_inv, b_slope, hat;
  int64_t bf_slope;
  int taps;
  Walk back;
};

struct Plan {
  std::vector<View> views;  // those by rows first
  int64_t n_by_rows = 0;
  bool matched = true;              // weights of the projection; else linear interpolation along the detector
  int64_t pad_low = 0, stride = 0;  // of the padded rows, in elements
};

// Positions beyond this are far outside any image or detector: such views take the generic loop.
constexpr double kFar = 1e6;
// Beyond this many pixels from bin to bin, 23 bits of a bin no longer make a weight of float's precision.
constexpr double kCoarse = 8;

Plan make_plan(const RadonScan& g, bool matched) {
  Plan plan;
  plan.matched = matched;
  double low = 0, high = 0;
  for (int64_t n = 0; n < g.n_used; ++n) {
    View v{};
    v.source = g.views ? g.views[n] : n;
    v.slot = n;
    const RadonDirection direction = radon_direction(g, n);
    if (!direction.valid) throw std::invalid_argument("a view index is out of range, or its angle not finite");
    const RadonRays rays = radon_rays(g, direction);
    v.by_rows = direction.rows;
    v.reversed = rays.flip;
    v.inv = rays.sigma;
    v.slope = rays.slope;
    v.centre = rays.centre;
    v.middle = radon_middle(g);
    v.origin = v.centre - v.middle * v.inv;
    v.weight = matched ? g.pixel_size * direction.step : 1.0;
    v.hat = matched ? v.inv : 1.0;
    v.b_inv = 1 / v.inv;
    v.b_slope = -v.slope / v.inv;
    v.b_origin = -v.origin / v.inv;
    v.taps = v.hat >= 1 ? 2 : 4;
    const int64_t length = v.by_rows ? g.width : g.height, steps = v.by_rows ? g.height : g.width;
    // Corners of the image rounded up to whole tiles.
    const double l = length + kTile, r = steps + kTile;
    const double b0 = v.b_origin + std::min(0.0, r * v.b_slope),
                 b1 = v.b_origin + l * v.b_inv + std::max(0.0, r * v.b_slope);
    const bool near = std::fabs(v.origin) + g.n_bins * v.inv + r < kFar && b0 > -kFar && b1 < g.n_bins + kFar;
    if (near) {
      v.f_origin = fixed(v.origin);
      v.f_inv = fixed(v.inv);
      v.f_slope = fixed(v.slope);
      v.bf_slope = fixed(v.b_slope);
      v.forward.plan(v.inv, 2);
      // Where no pixel sees the detector, rows need no zeros as far as the image.
      const bool seen = b1 > -3 && b0 < g.n_bins + 2;
      if (seen && v.hat >= 0.5 && v.hat <= kCoarse) v.back.plan(v.b_inv, v.taps);
      if (v.back.fits) {
        low = std::min(low, b0);
        high = std::max(high, b1 - (g.n_bins - 1));
      }
    }
    plan.views.push_back(v);
  }
  std::stable_partition(plan.views.begin(), plan.views.end(), [](const View& v) { return v.by_rows; });
  for (const View& v : plan.views) plan.n_by_rows += v.by_rows;
  plan.pad_low = (static_cast<int64_t>(std::ceil(-low)) + 3 + 15) / 16 * 16;
  // An odd number of cache lines: neighbouring views fall into different sets of the cache.
  const int64_t lines = (plan.pad_low + g.n_bins + static_cast<int64_t>(std::ceil(high)) + 4 + 2 * kLanes + 15) / 16;
  plan.stride = (lines | 1) * 16;
  return plan;
}

// ------------------------------------------------------------------ forward

// Copy steps r0.. and positions u0.. of one image into a tile, position u0 at kBorderLow, zeros around.
template <class T>
void load_tile(const T* image, const RadonScan& g, bool by_rows, int64_t r0, int64_t u0, int n_steps, int n_u, T* tile,
               int64_t stride) {
  for (int r = 0; r < n_steps; ++r) {
    T* row = tile + r * stride;
    std::fill(row, row + kBorderLow, T(0));
    if (by_rows) {
      const T* line = image + (r0 + r) * g.width + u0;
      std::copy(line, line + n_u, row + kBorderLow);
    }
    std::fill(row + kBorderLow + n_u, row + stride, T(0));
  }
  if (by_rows) return;
  int u = 0;
  if constexpr (std::is_same_v<T, float>) {
    for (; u + kLanes <= n_u && n_steps == kSteps; u += kLanes) {
      for (int r = 0; r < kSteps; r += kLanes) {
        vf block[kLanes];
        for (int k = 0; k < kLanes; ++k) block[k] = load(image + (u0 + u + k) * g.width + r0 + r);
        transpose<float>(block);
        for (int k = 0; k < kLanes; ++k) store(tile + (r + k) * stride + kBorderLow + u, block[k]);
      }
    }
  }
  for (; u < n_u; ++u) {
    const T* line = image + (u0 + u) * g.width + r0;
    for (int r = 0; r < n_steps; ++r) tile[r * stride + kBorderLow + u] = line[r];
  }
}

// Bins whose rays meet positions (u0 - 1, u0 + n_u) of steps r0 .. r0 + n - 1: first and one past the last.
void bins_of_tile(const View& v, int64_t n_bins, int64_t r0, int64_t n, int64_t u0, int64_t n_u, int64_t* from,
                  int64_t* to) {
  const double a = v.centre + r0 * v.slope, b = v.centre + (r0 + n - 1) * v.slope;
  const double lo = v.middle + (u0 - 1 - std::max(a, b)) / v.inv, hi = v.middle + (u0 + n_u - std::min(a, b)) / v.inv;
  *from = clamp_to(std::floor(lo), static_cast<int>(n_bins));
  *to = hi < 0 ? 0 : clamp_to(std::ceil(hi) + 1, static_cast<int>(n_bins));
}

// Add one tile to the rows of M images. Tiles of images are tile_size apart, rows row_size.
template <int M>
void project_fast(const View& v, const float* tile, int64_t stride, int64_t tile_size, int64_t r0, int n_steps,
                  int64_t u0, int64_t from, int64_t to, float* row, int64_t row_size) {
  const vi lane = load(v.forward.lane), mantissa = splat(0x7fffff), one_bits = splat(0x3f800000);
  const int64_t origin = v.f_origin + r0 * v.f_slope + (kBorderLow - u0) * (int64_t{1} << 40);
  for (int64_t k = from; k < to; k += kLanes) {
    constexpr int U = M == 1 ? 2 : 1;  // steps in flight, to cover the latency of the sums
    vf even[U][M], odd[U][M];
    for (int m = 0; m < M; ++m) {
      for (int j = 0; j < U; ++j) even[j][m] = odd[j][m] = vf{};
      even[0][m] = load(row + m * row_size + k);
    }
    int64_t p = origin + k * v.f_inv;
    const float* line = tile;
    const auto step = [&](int j) {
      const float* at = line + ((p >> 40) & v.forward.align);
      const int32_t start = static_cast<int32_t>((p >> 17) & v.forward.rest);
      const vi position = lane + start;
      const vi i0 = position >> 23, i1 = i0 + 1;
      const vf f1 = reinterpret_cast<vf>((position & mantissa) | one_bits);  // 1 + fraction
      const vf w0 = 2.0f - f1, w1 = f1 - 1.0f;
      for (int m = 0; m < M; ++m) {
        const Window window(at + m * tile_size);
        even[j][m] += w0 * window.at(i0);
        odd[j][m] += w1 * window.at(i1);
      }
      p += v.f_slope;
      line += stride;
    };
    int r = 0;
    for (; r + U <= n_steps; r += U) {
      step(0);
      if (U == 2) step(U - 1);
    }
    if (r < n_steps) step(0);
    for (int m = 0; m < M; ++m) {
      vf sum = even[0][m] + odd[0][m];
      if (U == 2) sum += even[U - 1][m] + odd[U - 1][m];
      store(row + m * row_size + k, sum);
    }
  }
}

// Call f(k, i, w) for each ray k of step r that crosses it among pixels i = -1 .. n_u - 1 from u0 on: pixel i counts
// 1 - w and the next one w. For any spacing and precision.
template <class T, class F>
void for_each_crossing(const View& v, int64_t n_bins, int64_t r, int64_t u0, int64_t n_u, F f) {
  int64_t from, to;
  bins_of_tile(v, n_bins, r, 1, u0, n_u, &from, &to);
  const double centre = v.centre + r * v.slope - u0, length = static_cast<double>(n_u);
  double from_middle = from - v.middle;
  for (int64_t k = from; k < to; ++k, from_middle += 1) {
    const double u = from_middle * v.inv + centre, floor = std::floor(u);
    if (u >= -1 && u < length) f(k, static_cast<int>(floor), static_cast<T>(u - floor));
  }
}

// Add one tile to the row of one image, for any spacing and precision.
template <class T>
void project_generic(const View& v, const T* tile, int64_t stride, int64_t r0, int n_steps, int64_t u0, int64_t n_u,
                     int64_t n_bins, T* row) {
  for (int r = 0; r < n_steps; ++r) {
    const T* line = tile + r * stride + kBorderLow;
    for_each_crossing<T>(v, n_bins, r0 + r, u0, n_u,
                         [&](int64_t k, int i, T w) { row[k] += (1 - w) * line[i] + w * line[i + 1]; });
  }
}

// Project M images through the views n = first, first + every, ..., into rows [view][image][stride] of raw sums.
template <class T, int M>
void project_images(const T* image, const RadonScan& g, const Plan& plan, int64_t first, int64_t every, T* tile,
                    int64_t tile_u, T* rows, int64_t row_stride) {
  const int64_t image_size = g.height * g.width, stride = tile_u + kBorderLow + kBorderHigh;
  const int64_t tile_size = stride * kSteps + 16;
  const int64_t n_views = static_cast<int64_t>(plan.views.size());
  for (const bool by_rows : {true, false}) {
    const int64_t begin = by_rows ? 0 : plan.n_by_rows, end = by_rows ? plan.n_by_rows : n_views;
    const int64_t start = begin + ((first - begin) % every + every) % every;
    if (start >= end) continue;
    const int64_t steps = by_rows ? g.height : g.width, length = by_rows ? g.width : g.height;
    for (int64_t r0 = 0; r0 < steps; r0 += kSteps) {
      const int n_steps = static_cast<int>(std::min<int64_t>(kSteps, steps - r0));
      for (int64_t u0 = 0; u0 < length; u0 += tile_u) {
        const int n_u = static_cast<int>(std::min(tile_u, length - u0));
        for (int m = 0; m < M; ++m)
          load_tile(image + m * image_size, g, by_rows, r0, u0, n_steps, n_u, tile + m * tile_size, stride);
        for (int64_t n = start; n < end; n += every) {
          const View& v = plan.views[static_cast<size_t>(n)];
          T* row = rows + v.slot * row_stride;
          const int64_t row_size = g.n_used * row_stride;
          if constexpr (std::is_same_v<T, float>) {
            if (v.forward.fits) {
              int64_t from, to;
              bins_of_tile(v, g.n_bins, r0, n_steps, u0, n_u, &from, &to);
              project_fast<M>(v, tile, stride, tile_size, r0, n_steps, u0, from, to, row, row_size);
              continue;
            }
          }
          for (int m = 0; m < M; ++m)
            project_generic(v, tile + m * tile_size, stride, r0, n_steps, u0, n_u, g.n_bins, row + m * row_size);
        }
      }
    }
  }
}

// ------------------------------------------------------------------ back-projection

// Add views n0 .. n1 - 1 to R steps of one column block of a tile, for M images. sums: [step][image][lane].
template <int M, int R, int Taps>
inline void gather_fast(const View* views, const int64_t* origins, int64_t n0, int64_t n1, int64_t r, const float* rows,
                        int64_t stride, int64_t row_size, float* sums) {
  const vi mantissa = splat(0x7fffff), one_bits = splat(0x3f800000);
  vf sum[R][M];
  for (int j = 0; j < R; ++j)
    for (int m = 0; m < M; ++m) sum[j][m] = load(sums + ((r + j) * M + m) * kLanes);
  for (int64_t n = n0; n < n1; ++n) {
    const View& v = views[n];
    const vi lane = load(v.back.lane);
    const float* row = rows + v.slot * stride;
    const float hat = static_cast<float>(v.hat);
    const int64_t slope = v.bf_slope;
    int64_t p = origins[n] + r * slope;
    for (int j = 0; j < R; ++j, p += slope) {
      const float* at = row + ((p >> 40) & v.back.align);
      const int32_t start = static_cast<int32_t>((p >> 17) & v.back.rest);
      const vi position = lane + start;
      const vi i0 = position >> 23;
      const vf f1 = reinterpret_cast<vf>((position & mantissa) | one_bits);
      vf w[Taps];
      for (int t = 0; t < Taps; ++t) {
        constexpr int h = Taps / 2;
        w[t] = t < h ? max0((1 - hat * (h - 2 - t)) - hat * f1) : max0((1 - hat * (t - h + 2)) + hat * f1);
      }
      for (int m = 0; m < M; ++m) {
        const Window window(at + m * row_size);
        for (int t = 0; t < Taps; ++t) sum[j][m] += w[t] * window.at(i0 + t);
      }
    }
  }
  for (int j = 0; j < R; ++j)
    for (int m = 0; m < M; ++m) store(sums + ((r + j) * M + m) * kLanes, sum[j][m]);
}

// Add a row to one step of a tile: the transpose of project_generic. sums: [block of lanes][stride].
template <class T>
void scatter_generic(const View& v, int64_t n_bins, int64_t r, int64_t u0, int n_u, const T* row, T* sums, int stride) {
  const auto at = [&](unsigned u) -> T& { return sums[u / kLanes * stride + u % kLanes]; };
  for_each_crossing<T>(v, n_bins, r, u0, n_u, [&](int64_t k, int i, T w) {
    if (i >= 0) at(i) += (1 - w) * row[k];
    if (i + 1 < n_u) at(i + 1) += w * row[k];
  });
}

// Add a row, interpolated linearly at the pixels' centres, to one step of a tile. sums as above.
template <class T>
void interpolate_generic(const View& v, int64_t n_bins, int64_t r, int64_t u0, int n_u, const T* row, T* sums,
                         int stride) {
  const double centre = v.centre + r * v.slope;
  for (int u = 0; u < n_u; ++u) {
    const double p = v.middle + (u0 + u - centre) / v.inv, floor = std::floor(p);
    if (!(floor >= -1 && floor < n_bins)) continue;
    const T* at = row + static_cast<int64_t>(floor);
    const T w = static_cast<T>(p - floor);
    sums[u / kLanes * stride + u % kLanes] += (1 - w) * at[0] + w * at[1];
  }
}

// Add the sums of views that march over columns to those of views that march over rows.
template <class T, int M>
void add_transposed(const T* from, T* to, int n_rows, int n_columns) {
  constexpr int kBlock = kTile * M * kLanes;
  for (int i = 0; i < n_rows; i += kLanes) {
    for (int j = 0; j < n_columns; j += kLanes) {
      for (int m = 0; m < M; ++m) {
        const T* in = from + i / kLanes * kBlock + (j * M + m) * kLanes;
        T* out = to + j / kLanes * kBlock + (i * M + m) * kLanes;
        if constexpr (std::is_same_v<T, float>) {
          vf block[kLanes];
          for (int k = 0; k < kLanes; ++k) block[k] = load(in + k * M * kLanes);
          transpose<float>(block);
          for (int k = 0; k < kLanes; ++k) store(out + k * M * kLanes, load(out + k * M * kLanes) + block[k]);
        } else {
          for (int k = 0; k < kLanes; ++k)
            for (int l = 0; l < kLanes; ++l) out[k * M * kLanes + l] += in[l * M * kLanes + k];
        }
      }
    }
  }
}

// Back-project M images into one tile. sums: two orientations of [block][step][image][lane].
template <class T, int M>
void gather_tile(const RadonScan& g, const Plan& plan, int64_t tile, const T* rows, int64_t b, T* image, T* sums,
                 int64_t* origins) {
  constexpr int kBlocks = kTile / kLanes, kBlock = kTile * M * kLanes;  // elements of one column block
  constexpr int kSide = kBlocks * kBlock;
  const int64_t tiles_w = (g.width + kTile - 1) / kTile;
  const int64_t i0 = tile / tiles_w * kTile, j0 = tile % tiles_w * kTile;
  const int rows_here = static_cast<int>(std::min<int64_t>(kTile, g.height - i0));
  const int columns_here = static_cast<int>(std::min<int64_t>(kTile, g.width - j0));
  const int64_t n_views = static_cast<int64_t>(plan.views.size()), row_size = g.n_used * plan.stride;
  std::fill(sums, sums + 2 * kSide, T(0));
  for (const bool by_rows : {true, false}) {
    const int64_t begin = by_rows ? 0 : plan.n_by_rows, end = by_rows ? plan.n_by_rows : n_views;
    const int64_t r0 = by_rows ? i0 : j0, u0 = by_rows ? j0 : i0;
    const int n_steps = by_rows ? rows_here : columns_here, n_u = by_rows ? columns_here : rows_here;
    T* side = sums + (by_rows ? 0 : kSide);
    const auto generic = [&](const View& v) {
      for (int r = 0; r < n_steps; ++r)
        for (int m = 0; m < M; ++m)
          (plan.matched ? scatter_generic<T>
                        : interpolate_generic<T>)(v, g.n_bins, r0 + r, u0, n_u,
                                                  rows + m * row_size + v.slot * plan.stride + plan.pad_low,
                                                  side + (r * M + m) * kLanes, kBlock);
    };
    if constexpr (std::is_same_v<T, float>) {
      constexpr int R = M == 1 ? 4 : 2;
      for (int64_t n0 = begin; n0 < end;) {
        // A run of views of one kind.
        const View& head = plan.views[static_cast<size_t>(n0)];
        if (!head.back.fits) {
          generic(head);
          ++n0;
          continue;
        }
        int64_t n1 = n0;
        for (; n1 < std::min(end, n0 + kViewRun / M); ++n1) {
          const View& v = plan.views[static_cast<size_t>(n1)];
          if (!v.back.fits || v.taps != head.taps) break;
        }
        for (int block = 0; block * kLanes < n_u; ++block) {
          for (int64_t n = n0; n < n1; ++n) {
            const View& v = plan.views[static_cast<size_t>(n)];
            origins[n] =
                fixed(v.b_origin + plan.pad_low - (v.taps / 2 - 1) + (u0 + block * kLanes) * v.b_inv + r0 * v.b_slope);
          }
          for (int r = 0; r < n_steps; r += R) {
            if (head.taps == 2) {
              gather_fast<M, R, 2>(plan.views.data(), origins, n0, n1, r, rows, plan.stride, row_size,
                                   side + block * kBlock);
            } else {
              gather_fast<M, R, 4>(plan.views.data(), origins, n0, n1, r, rows, plan.stride, row_size,
                                   side + block * kBlock);
            }
          }
        }
        n0 = n1;
      }
    } else {
      for (int64_t n = begin; n < end; ++n) generic(plan.views[static_cast<size_t>(n)]);
    }
  }
  add_transposed<T, M>(sums + kSide, sums, rows_here, columns_here);
  T line[kTile];
  for (int m = 0; m < M; ++m) {
    for (int i = 0; i < rows_here; ++i) {
      for (int block = 0; block < kBlocks; ++block) {
        const T* from = sums + block * kBlock + (i * M + m) * kLanes;
        std::copy(from, from + kLanes, line + block * kLanes);
      }
      std::copy(line, line + columns_here, image + ((b + m) * g.height + i0 + i) * g.width + j0);
    }
  }
}

// ------------------------------------------------------------------ whole operators

// Call f.template operator()<M>(b) for groups of images, largest first.
template <class F>
void for_image_groups(int64_t batch, F f) {
  int64_t b = 0;
  for (; b + 4 <= batch; b += 4) f(std::integral_constant<int, 4>{}, b);
  for (; b + 2 <= batch; b += 2) f(std::integral_constant<int, 2>{}, b);
  for (; b < batch; ++b) f(std::integral_constant<int, 1>{}, b);
}

// Run body on each thread; the first exception of any of them is thrown again afterwards.
template <class F>
void parallel([[maybe_unused]] int threads, F body) {
  std::exception_ptr error;
#pragma omp parallel num_threads(threads)
  {
    try {
      body();
    } catch (...) {
#pragma omp critical
      error = std::current_exception();
    }
  }
  if (error) std::rethrow_exception(error);
}

#if defined(_OPENMP)
int64_t thread_number() { return omp_get_thread_num(); }
int64_t team_size() { return omp_get_num_threads(); }
#else
int64_t thread_number() { return 0; }
int64_t team_size() { return 1; }
#endif

int64_t tile_width(int64_t length, int images) {
  const int64_t most = std::max(64, 512 / images);
  const int64_t pieces = (length + most - 1) / most;
  return ((length + pieces - 1) / pieces + 15) / 16 * 16;
}

// Raw sums of all images and used views into rows [image][slot][stride], bins from pad_low on; then finish(view,
// image, row) for each row, on the thread that made it.
template <class T, class Finish>
void project(const T* image, const RadonScan& g, const Plan& plan, T* rows, int threads, Finish finish) {
  const int team = static_cast<int>(std::min<int64_t>(threads, g.n_used));
  const int64_t image_size = g.height * g.width, n_views = static_cast<int64_t>(plan.views.size());
  const int64_t longest = std::max(g.height, g.width);
  const int64_t most = (tile_width(longest, 1) + kBorderLow + kBorderHigh) * kSteps + 64;
  parallel(team, [&] {
    const int64_t me = thread_number(), all = team_size();
    const Buffer<T> tile(kMaxImages * (most + (kBorderLow + kBorderHigh) * kSteps));
    for (int64_t n = me; n < n_views; n += all)
      for (int64_t b = 0; b < g.batch; ++b) {
        T* row = rows + (b * g.n_used + plan.views[static_cast<size_t>(n)].slot) * plan.stride;
        std::fill(row, row + plan.stride, T(0));
      }
    for_image_groups(g.batch, [&](auto images, int64_t b) {
      constexpr int M = decltype(images)::value;
      project_images<T, M>(image + b * image_size, g, plan, me, all, tile.get(), tile_width(longest, M),
                           rows + b * g.n_used * plan.stride + plan.pad_low, plan.stride);
    });
    for (int64_t n = me; n < n_views; n += all) {
      const View& v = plan.views[static_cast<size_t>(n)];
      for (int64_t b = 0; b < g.batch; ++b) finish(v, b, rows + (b * g.n_used + v.slot) * plan.stride + plan.pad_low);
    }
  });
}

template <class T>
void back_project(const T* rows, const RadonScan& g, const Plan& plan, int threads, T* image) {
  const int64_t tiles = ((g.height + kTile - 1) / kTile) * ((g.width + kTile - 1) / kTile);
  struct Task {
    int64_t tile, b;
    int images;
  };
  std::vector<Task> tasks;
  for_image_groups(g.batch, [&](auto images, int64_t b) {
    for (int64_t t = 0; t < tiles; ++t) tasks.push_back({t, b, decltype(images)::value});
  });
  const int64_t n_tasks = static_cast<int64_t>(tasks.size());
  const int team = static_cast<int>(std::min<int64_t>(threads, n_tasks));
  parallel(team, [&] {
    const Buffer<T> sums(2 * kTile * kTile * kMaxImages);
    std::vector<int64_t> origins(plan.views.size());
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t k = 0; k < n_tasks; ++k) {
      const Task task = tasks[static_cast<size_t>(k)];
      const T* mine = rows + task.b * g.n_used * plan.stride;
      const auto gather = [&](auto images) {
        gather_tile<T, decltype(images)::value>(g, plan, task.tile, mine, task.b, image, sums.get(), origins.data());
      };
      if (task.images == 4)
        gather(std::integral_constant<int, 4>{});
      else if (task.images == 2)
        gather(std::integral_constant<int, 2>{});
      else
        gather(std::integral_constant<int, 1>{});
    }
  });
}

template <class T>
void radon_forward(const T* image, T* sinogram, const RadonScan& g, int threads) {
  const Plan plan = make_plan(g, true);
  const Buffer<T> rows(g.batch * g.n_used * plan.stride);
  project(image, g, plan, rows.get(), threads, [&](const View& v, int64_t b, const T* row) {
    T* out = sinogram + (b * g.n_used + v.slot) * g.n_bins;
    const T weight = static_cast<T>(v.weight);
    if (v.reversed) {
      for (int64_t k = 0; k < g.n_bins; ++k) out[k] = weight * row[g.n_bins - 1 - k];
    } else {
      for (int64_t k = 0; k < g.n_bins; ++k) out[k] = weight * row[k];
    }
  });
}

template <class T, bool Matched>
void back(const T* sinogram, T* image, const RadonScan& g, int threads) {
  const Plan plan = make_plan(g, Matched);
  const Buffer<T> rows(g.batch * g.n_used * plan.stride);
  const int64_t n_rows = g.batch * g.n_used;
#pragma omp parallel for num_threads(threads)
  for (int64_t k = 0; k < n_rows; ++k) {
    const View& v = plan.views[static_cast<size_t>(k % g.n_used)];
    const int64_t at = k / g.n_used * g.n_used + v.slot;
    const T* in = sinogram + at * g.n_bins;
    T* row = rows.get() + at * plan.stride;
    std::fill(row, row + plan.stride, T(0));
    row += plan.pad_low;
    const T weight = static_cast<T>(v.weight);
    for (int64_t d = 0; d < g.n_bins; ++d) row[d] = weight * in[v.reversed ? g.n_bins - 1 - d : d];
  }
  back_project<T>(rows.get(), g, plan, threads, image);
}

template <class T>
void radon_gradient(const T* image, const T* measured, T* result, const RadonScan& g, int threads) {
  const Plan plan = make_plan(g, true);
  const Buffer<T> rows(g.batch * g.n_used * plan.stride);
  const double scale = static_cast<double>(g.n_views) / static_cast<double>(g.n_used);
  project(image, g, plan, rows.get(), threads, [&](const View& v, int64_t b, T* row) {
    const T square = static_cast<T>(v.weight * v.weight * scale), weight = static_cast<T>(v.weight * scale);
    if (!measured) {
      for (int64_t k = 0; k < g.n_bins; ++k) row[k] *= square;
    } else {
      const T* y = measured + (b * g.n_views + v.source) * g.n_bins;
      for (int64_t k = 0; k < g.n_bins; ++k) row[k] = square * row[k] - weight * y[v.reversed ? g.n_bins - 1 - k : k];
    }
    std::fill(row + g.n_bins, row - plan.pad_low + plan.stride, T(0));  // whole vectors wrote beyond the last bin
  });
  back_project<T>(rows.get(), g, plan, threads, result);
}

const Operator kOperators[] = {
    {"radon_forward", radon_forward<float>, radon_forward<double>},
    {"radon_adjoint", back<float, true>, back<double, true>},
    {"radon_backproject", back<float, false>, back<double, false>},
    {"radon_gradient", radon_gradient<float>, radon_gradient<double>},
};

}  // namespace
}  // namespace oder
