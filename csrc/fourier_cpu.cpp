// C++ backend of fourier: coil-weighted Cartesian Fourier sampling, its adjoint and gradient.
//
// Computes        samples = M F (S_c x), its conjugate transpose, and (C / |B|) sum over the coils of B of
//                 conj(S_c) F^H M (F S_c x - y_c).
// Thread mapping  lines: strips of one vector of columns, of one image, each with all its coils; the strips in turn
//                 to the next free thread. Points: one plane of one coil at a time, all threads in each of its three
//                 passes (columns forward; rows forward, residual, rows inverse; columns inverse and sum).
// Shared memory   per thread a strip of the image, of the transform and of the sum (3 n vectors); for points one plane.
// Accumulation    in the image's precision, coils in the order given: equal bits for any number of threads.
// Preconditions   contiguous pairs of reals; one dtype; indices in range (checked by the caller).
#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "fourier.h"
#include "transform_cpu.h"

namespace oder {
namespace {

// ---------------------------------------------------------------- transform

// On the way from and to an image, the coil map between them.
template <class T>
struct FromImage {
  const Cx<T>*image, *map;
  Cx<T> operator()(int i) const { return times<T>(map[i], image[i]); }
};

template <class T>
struct ToImage {
  Cx<T>* sum;
  const Cx<T>* map;
  void operator()(int i, const Cx<T>& v) const { sum[i] = sum[i] + times_conjugate<T>(v, map[i]); }
};

// The last stage forward, residual(position, v), and the first stage back: they pass through registers together.
template <int R, class T, class Residual>
void turning_stage(const Transform<T>& t, Cx<T>* a, Cx<T>* work, const Residual& residual) {
  const int last = t.plan.n_stages - 1, radix = R ? R : t.plan.radix[last];
  Cx<T> few[R ? R : 1];
  for (int base = 0; base < t.plan.n; base += radix) {
    if (!residual.any(base)) {
      std::fill(a + base, a + base + radix, Cx<T>{});
      continue;
    }
    if constexpr (R > 0) {
      ODER_UNROLL
      for (int j = 0; j < R; ++j) few[j] = a[base + j];
      butterfly<R, false, T>(few);
      ODER_UNROLL
      for (int j = 0; j < R; ++j) few[j] = residual(base + j, few[j]);
      butterfly<R, true, T>(few);
      ODER_UNROLL
      for (int j = 0; j < R; ++j) a[base + j] = few[j];
    } else {
      large_butterfly<false, T>(a + base, radix, t.roots[last].data(), work);
      for (int j = 0; j < radix; ++j) a[base + j] = residual(base + j, a[base + j]);
      large_butterfly<true, T>(a + base, radix, t.roots[last].data(), work);
    }
  }
}

// in -> transform -> residual(position, v) -> inverse transform -> out.
template <class T, class In, class Residual, class Out>
void there_and_back(const Transform<T>& t, Cx<T>* a, Cx<T>* work, const In& in, const Residual& residual,
                    const Out& out) {
  const int last = t.plan.n_stages - 1;
  forward_stages(t, last, a, work, in);
  with_radix(t.plan.radix[last], [&](auto radix) { turning_stage<decltype(radix)::value>(t, a, work, residual); });
  inverse_stages(t, last, a, work, out);
}

// ---------------------------------------------------------------- scans

// Of the strips that a thread works on together, with their maps and sums.
constexpr int64_t kTileBytes = 384 * 1024;

template <class T>
struct Scan : FourierScan {
  const Transform<T>& transform;

  explicit Scan(const FourierScan& scan) : FourierScan(scan), transform(Transform<T>::of(scan.n)) {}

  static constexpr int L = lanes<T>;
  int64_t strips() const { return (width + L - 1) / L; }
  // Strips that a tile takes: image, map and sum within the cache, and some tiles for each thread.
  int64_t strips_of_tile(int threads) const {
    const int64_t cached = kTileBytes / (3 * n * static_cast<int64_t>(sizeof(Cx<T>)));
    const int64_t shared = strips() * batch / (4 * int64_t{threads});
    return std::max<int64_t>(1, std::min({cached, shared, kTileRowBytes / static_cast<int64_t>(sizeof(Cx<T>))}));
  }
  int valid(int64_t first) const { return static_cast<int>(std::min<int64_t>(L, width - first)); }
  // The coil that is used as number u, or -1.
  int64_t coil(int64_t u) const {
    const int64_t c = coils ? coils[u] : u;
    return c >= 0 && c < n_coils ? c : -1;
  }
  T weight() const { return static_cast<T>(n_coils) / static_cast<T>(n_used); }
};

// The sampled lines of an image by their places after the transform.
template <class T>
struct Lines {
  std::vector<int64_t> row;     // [n] its row in the samples, or -1
  std::vector<uint8_t> blocks;  // [n] whether any is sampled of those that the last stage takes with it, from this on
  std::vector<int> position;    // [n_lines] its place, or -1

  Lines(const Scan<T>& scan, int64_t b) : row(scan.n, -1), blocks(scan.n, 0) {
    const int64_t* const lines =
        static_cast<const int64_t*>(scan.sampling) + (scan.shared_sampling ? 0 : b * scan.n_lines);
    for (int64_t l = 0; l < scan.n_lines; ++l) {
      const bool meant = lines[l] >= 0 && lines[l] < scan.n;
      const int at = meant ? scan.transform.position[static_cast<size_t>(lines[l])] : -1;
      if (meant && row[at] >= 0) {
        throw std::invalid_argument("fourier: line " + std::to_string(lines[l]) + " is given twice");
      }
      position.push_back(at);
      if (meant) row[at] = l;
      if (meant) blocks[at - at % scan.transform.plan.radix[scan.transform.plan.n_stages - 1]] = 1;
    }
  }
};

// v - data where a line was measured, else zero.
template <class T>
struct LineResidual {
  const int64_t* row;
  const uint8_t* blocks;
  const Cx<T>* data;  // [n_lines] or null
  bool any(int base) const { return blocks[base]; }
  Cx<T> operator()(int p, const Cx<T>& v) const {
    if (row[p] < 0) return Cx<T>{};
    return data ? v - data[row[p]] : v;
  }
};

template <class T>
std::vector<Lines<T>> lines_of(const Scan<T>& scan) {
  std::vector<Lines<T>> result;
  for (int64_t b = 0; b < (scan.shared_sampling ? 1 : scan.batch); ++b) result.emplace_back(scan, b);
  return result;
}

// Where strip `strip` of image b begins, in numbers.
template <class T>
int64_t strip_offset(const Scan<T>& scan, int64_t b, int64_t strip) {
  return b * scan.n * scan.width + strip * scan.L * (scan.transposed ? scan.n : 1);
}

// A strip of one vector of columns of image b; in memory [n, width], or [width, n] where transposed.
template <class T>
void load_strip(const Scan<T>& scan, const T* images, int64_t b, int64_t strip, T factor, Cx<T>* x) {
  constexpr int L = lanes<T>;
  const T* const image = images + 2 * strip_offset(scan, b, strip);
  const int valid = scan.valid(strip * L);
  if (!scan.transposed) {
    for (int64_t i = 0; i < scan.n; ++i) {
      x[i] = scaled(load_complex(image + 2 * i * scan.width, valid), factor);
    }
    return;
  }
  for (int64_t i = 0; i < scan.n; i += L) {
    const int count = static_cast<int>(std::min<int64_t>(L, scan.n - i));
    Cx<T> rows[L];
    for (int l = 0; l < L; ++l) {
      const int r = column_of<T>(l);
      rows[l] = r < valid ? scaled(load_complex(image + 2 * (r * scan.n + i), count), factor) : Cx<T>{};
    }
    transpose_square<T>(rows);
    for (int l = 0; l < L; ++l) {
      if (column_of<T>(l) < count) x[i + column_of<T>(l)] = rows[l];
    }
  }
}

// The reverse.
template <class T>
void store_strip(const Scan<T>& scan, const Cx<T>* x, int64_t b, int64_t strip, T factor, T* images) {
  constexpr int L = lanes<T>;
  T* const image = images + 2 * strip_offset(scan, b, strip);
  const int valid = scan.valid(strip * L);
  if (!scan.transposed) {
    for (int64_t i = 0; i < scan.n; ++i) store_complex(image + 2 * i * scan.width, scaled(x[i], factor), valid);
    return;
  }
  for (int64_t i = 0; i < scan.n; i += L) {
    const int count = static_cast<int>(std::min<int64_t>(L, scan.n - i));
    Cx<T> rows[L];
    for (int l = 0; l < L; ++l) {
      rows[l] = column_of<T>(l) < count ? scaled(x[i + column_of<T>(l)], factor) : Cx<T>{};
    }
    transpose_square<T>(rows);
    for (int l = 0; l < L; ++l) {
      const int r = column_of<T>(l);
      if (r < valid) store_complex(image + 2 * (r * scan.n + i), rows[l], count);
    }
  }
}

// Strips side by side, which a thread works on together: a visit to a page of memory then serves them all.
struct Tile {
  int64_t image, first, strips;
};

// What a thread works in. The arrays begin at different places of a page: equal ones would make the processor take a
// load from one for dependent on a store to another.
template <class T>
struct Work {
  Cx<T>*image, *map, *sum, *lines, *transform, *butterfly;

  Work(int64_t n, int64_t strips, int64_t n_lines, int largest) {
    const int64_t total = (3 * n + n_lines) * strips + n + 3 * int64_t{largest} + 2 + 6 * (kPage + kApart);
    next_ = static_cast<Cx<T>*>(kept<Work>(static_cast<size_t>(total) * sizeof(Cx<T>)));
    image = take(n * strips);
    map = take(n * strips);
    sum = take(n * strips);
    lines = take(n_lines * strips);
    transform = take(n);
    butterfly = take(3 * int64_t{largest} + 2);
  }

 private:
  static constexpr int64_t kPage = 4096 / sizeof(Cx<T>), kApart = kPage / 5 + 1;
  Cx<T>* next_;
  Cx<T>* take(int64_t n) {
    Cx<T>* const taken = next_;
    next_ += (n + kPage - 1) / kPage * kPage + kApart;
    return taken;
  }
};

template <class T>
void load_map(const Scan<T>& scan, const Tile& tile, int64_t c, Cx<T>* map) {
  const int64_t begin = ((scan.shared_maps ? 0 : tile.image) * scan.n_coils + c) * scan.n * scan.width;
  load_rows(static_cast<const T*>(scan.maps) + 2 * begin, scan.n, scan.width, tile.first, tile.strips, map);
}

template <class T>
void load_lines(const Scan<T>& scan, const Tile& tile, int64_t c, const T* samples, Cx<T>* lines) {
  const int64_t begin = (tile.image * scan.n_coils + c) * scan.n_lines * scan.width;
  load_rows(samples + 2 * begin, scan.n_lines, scan.width, tile.first, tile.strips, lines);
}

// ---------------------------------------------------------------- lines

// Calls f(tile, work) for the tiles of all images; those of the same columns, which may share their maps, in turn.
template <class T, class F>
void for_tiles(const Scan<T>& scan, int threads, const F& f) {
  const int64_t size = scan.strips_of_tile(threads), tiles = (scan.strips() + size - 1) / size;
#pragma omp parallel num_threads(threads)
  {
    Work<T> work(scan.n, size, scan.n_lines, scan.transform.largest);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tiles * scan.batch; ++task) {
      const int64_t first = task / scan.batch * size;
      f(Tile{task % scan.batch, first, std::min(size, scan.strips() - first)}, work);
    }
  }
}

template <class T>
void load_images(const Scan<T>& scan, const Tile& tile, const T* image, T factor, Cx<T>* to) {
  for (int64_t v = 0; v < tile.strips; ++v) {
    load_strip(scan, image, tile.image, tile.first + v, factor, to + v * scan.n);
  }
}

template <class T>
void forward_lines(const Scan<T>& scan, const T* image, T* samples, int threads) {
  const std::vector<Lines<T>> lines = lines_of(scan);
  for_tiles(scan, threads, [&](const Tile& tile, Work<T>& work) {
    const int64_t b = tile.image;
    Cx<T>* const a = work.transform;
    const std::vector<int>& position = lines[scan.shared_sampling ? 0 : b].position;
    load_images(scan, tile, image, scan.transform.scale, work.image);
    for (int64_t c = 0; c < scan.n_coils; ++c) {
      load_map(scan, tile, c, work.map);
      for (int64_t v = 0; v < tile.strips; ++v) {
        const int64_t column = (tile.first + v) * scan.L;
        forward_stages(scan.transform, scan.transform.plan.n_stages, a, work.butterfly,
                       FromImage<T>{work.image + v * scan.n, work.map + v * scan.n});
        T* const out = samples + 2 * ((b * scan.n_coils + c) * scan.n_lines * scan.width + column);
        for (int64_t l = 0; l < scan.n_lines; ++l) {
          store_complex(out + 2 * l * scan.width, position[l] >= 0 ? a[position[l]] : Cx<T>{}, scan.valid(column));
        }
      }
    }
  });
}

template <class T>
void adjoint_lines(const Scan<T>& scan, const T* samples, T* image, int threads) {
  const std::vector<Lines<T>> lines = lines_of(scan);
  for_tiles(scan, threads, [&](const Tile& tile, Work<T>& work) {
    const int64_t b = tile.image;
    Cx<T>* const a = work.transform;
    const Lines<T>& sampled = lines[scan.shared_sampling ? 0 : b];
    std::fill(work.sum, work.sum + tile.strips * scan.n, Cx<T>{});
    for (int64_t c = 0; c < scan.n_coils; ++c) {
      load_map(scan, tile, c, work.map);
      load_lines(scan, tile, c, samples, work.lines);
      for (int64_t v = 0; v < tile.strips; ++v) {
        const Cx<T>* const data = work.lines + v * scan.n_lines;
        for (int64_t p = 0; p < scan.n; ++p) a[p] = sampled.row[p] >= 0 ? data[sampled.row[p]] : Cx<T>{};
        inverse_stages(scan.transform, scan.transform.plan.n_stages, a, work.butterfly,
                       ToImage<T>{work.sum + v * scan.n, work.map + v * scan.n});
      }
    }
    for (int64_t v = 0; v < tile.strips; ++v) {
      store_strip(scan, work.sum + v * scan.n, b, tile.first + v, scan.transform.scale, image);
    }
  });
}

template <class T>
void gradient_lines(const Scan<T>& scan, const T* image, const T* samples, T* gradient, int threads) {
  const std::vector<Lines<T>> lines = lines_of(scan);
  for_tiles(scan, threads, [&](const Tile& tile, Work<T>& work) {
    const int64_t b = tile.image;
    const Lines<T>& sampled = lines[scan.shared_sampling ? 0 : b];
    load_images(scan, tile, image, scan.transform.scale, work.image);
    std::fill(work.sum, work.sum + tile.strips * scan.n, Cx<T>{});
    for (int64_t u = 0; u < scan.n_used; ++u) {
      const int64_t c = scan.coil(u);
      if (c < 0) continue;
      load_map(scan, tile, c, work.map);
      if (samples) load_lines(scan, tile, c, samples, work.lines);
      for (int64_t v = 0; v < tile.strips; ++v) {
        const int64_t at = v * scan.n;
        const LineResidual<T> residual{sampled.row.data(), sampled.blocks.data(),
                                       samples ? work.lines + v * scan.n_lines : nullptr};
        there_and_back(scan.transform, work.transform, work.butterfly, FromImage<T>{work.image + at, work.map + at},
                       residual, ToImage<T>{work.sum + at, work.map + at});
      }
    }
    for (int64_t v = 0; v < tile.strips; ++v) {
      store_strip(scan, work.sum + v * scan.n, b, tile.first + v, scan.weight() * scan.transform.scale, gradient);
    }
  });
}

// ---------------------------------------------------------------- points

// Three planes of an image, and the passes over them; every pass is called by all threads of a parallel region.
template <class T>
struct Planes {
  const Scan<T>& scan;
  const Transform<T>& rows;
  int64_t groups;  // of frequencies along n
  int64_t tile_strips, tile_groups;
  Cx<T>* spectrum;             // [groups, width] frequencies in order
  Cx<T>*image, *sum;           // [strips, n] scaled, and of the coils so far
  std::vector<uint16_t> mask;  // [batch or 1, groups, width] a bit for each lane
  std::vector<int> frequency;  // along the rows, of each position

  Planes(const Scan<T>& s, int threads)
      : scan(s),
        rows(Transform<T>::of(s.width)),
        groups((s.n + s.L - 1) / s.L),
        tile_strips(s.strips_of_tile(threads)),
        tile_groups(std::max<int64_t>(1, std::min(kTileRowBytes / int64_t{sizeof(Cx<T>)}, groups / (2 * threads)))),
        frequency(static_cast<size_t>(s.width)) {
    const int64_t strips = s.n * s.strips();
    spectrum = static_cast<Cx<T>*>(kept<Planes>(static_cast<size_t>(s.width * groups + 2 * strips) * sizeof(Cx<T>)));
    image = spectrum + s.width * groups;
    sum = image + strips;
    for (int k = 0; k < static_cast<int>(s.width); ++k) frequency[rows.position[k]] = k;
    const int64_t images = s.shared_sampling ? 1 : s.batch;
    mask.assign(static_cast<size_t>(images * groups * s.width), 0);
    for (int64_t row = 0; row < images * s.width; ++row) {
      const uint8_t* const flags = static_cast<const uint8_t*>(s.sampling) + row * s.n;
      uint16_t* const bits = mask.data() + row / s.width * groups * s.width + row % s.width;
      for (int64_t g = 0; g < groups; ++g) {
        for (int l = 0; l < s.L; ++l) {
          const int64_t k = g * s.L + column_of<T>(l);
          if (k < s.n) bits[g * s.width] |= static_cast<uint16_t>(flags[k] << l);
        }
      }
    }
  }

  Work<T> work() const {
    return Work<T>(scan.n, tile_strips, tile_groups * scan.width / tile_strips + 1,
                   std::max(rows.largest, scan.transform.largest));
  }
  int valid(int64_t group) const { return static_cast<int>(std::min<int64_t>(scan.L, scan.n - group * scan.L)); }
  // The offset of frequency k along the rows in a plane of samples or of the mask.
  int64_t at(int64_t k, int64_t group) const { return k * scan.n + group * scan.L; }
  int64_t samples_of(int64_t b, int64_t c) const { return 2 * (b * scan.n_coils + c) * scan.width * scan.n; }
  const uint16_t* mask_at(int64_t b, int64_t group) const {
    return mask.data() + ((scan.shared_sampling ? 0 : b) * groups + group) * scan.width;
  }

  // Puts the image in place (null: none) and clears the sum.
  void begin(const T* x, int64_t b) const {
#pragma omp for schedule(static)
    for (int64_t strip = 0; strip < scan.strips(); ++strip) {
      if (x) load_strip(scan, x, b, strip, scan.transform.scale * rows.scale, image + strip * scan.n);
      std::fill(sum + strip * scan.n, sum + (strip + 1) * scan.n, Cx<T>{});
    }
  }

  // Calls f(tile) for the tiles of image b.
  template <class F>
  void for_tiles(int64_t b, const F& f) const {
#pragma omp for schedule(dynamic, 1)
    for (int64_t first = 0; first < scan.strips(); first += tile_strips) {
      f(Tile{b, first, std::min(tile_strips, scan.strips() - first)});
    }
  }

  // Coil c's image, transformed along n. Not inlined, nor is its inverse: which products are contracted, and so the
  // last bit, would depend on who calls.
  __attribute__((noinline)) void columns_forward(int64_t b, int64_t c, Work<T>& work) const {
    constexpr int L = lanes<T>;
    for_tiles(b, [&](const Tile& tile) {
      load_map(scan, tile, c, work.map);
      for (int64_t v = 0; v < tile.strips; ++v) {
        forward_stages(scan.transform, scan.transform.plan.n_stages, work.transform, work.butterfly,
                       FromImage<T>{image + (tile.first + v) * scan.n, work.map + v * scan.n});
        strip_to_groups<T>(
            scan.n, [&](int64_t k) { return work.transform[scan.transform.position[static_cast<size_t>(k)]]; },
            spectrum + (tile.first + v) * L, scan.width, scan.valid((tile.first + v) * L));
      }
    });
  }

  // The spectrum transformed back along n, and added to the sum.
  __attribute__((noinline)) void columns_inverse(int64_t b, int64_t c, Work<T>& work) const {
    constexpr int L = lanes<T>;
    for_tiles(b, [&](const Tile& tile) {
      load_map(scan, tile, c, work.map);
      for (int64_t v = 0; v < tile.strips; ++v) {
        groups_to_strip<T>(spectrum + (tile.first + v) * L, scan.width, scan.valid((tile.first + v) * L), scan.n,
                           [&](int64_t k, const Cx<T>& value) {
                             work.transform[scan.transform.position[static_cast<size_t>(k)]] = value;
                           });
        inverse_stages(scan.transform, scan.transform.plan.n_stages, work.transform, work.butterfly,
                       ToImage<T>{sum + (tile.first + v) * scan.n, work.map + v * scan.n});
      }
    });
  }

  // Calls f(group, row, data) for each group of rows, which lie side by side in the vectors of `row`; data are the
  // samples of the row, [width], or null.
  template <class F>
  void for_groups(const T* samples, Work<T>& work, const F& f) const {
#pragma omp for schedule(dynamic, 1)
    for (int64_t first = 0; first < groups; first += tile_groups) {
      const int64_t count = std::min(tile_groups, groups - first);
      if (samples) load_rows(samples, scan.width, scan.n, first, count, work.lines);
      for (int64_t v = 0; v < count; ++v) {
        const Cx<T>* const data = samples ? work.lines + v * scan.width : nullptr;
        f(first + v, spectrum + (first + v) * scan.width, data);
      }
    }
  }

  // Writes the sum down as image b, times `factor`.
  void end(int64_t b, T factor, T* result) const {
#pragma omp for schedule(dynamic, 1)
    for (int64_t strip = 0; strip < scan.strips(); ++strip) {
      store_strip(scan, sum + strip * scan.n, b, strip, factor * scan.transform.scale * rows.scale, result);
    }
  }
};

// v - data where the mask is, else zero.
template <class T>
struct PointResidual {
  const int* frequency;  // of each position
  const uint16_t* mask;  // [width] bits of the rows
  const Cx<T>* data;     // [width] or null
  bool any(int) const { return true; }
  Cx<T> operator()(int p, const Cx<T>& v) const {
    const int k = frequency[p];
    return where<T>(mask[k], data ? v - data[k] : v);
  }
};

template <class T>
void forward_points(const Scan<T>& scan, const T* image, T* samples, int threads) {
  const Planes<T> planes(scan, threads);
#pragma omp parallel num_threads(threads)
  {
    Work<T> work = planes.work();
    for (int64_t task = 0; task < scan.batch * scan.n_coils; ++task) {
      const int64_t b = task / scan.n_coils, c = task % scan.n_coils;
      if (c == 0) planes.begin(image, b);
      planes.columns_forward(b, c, work);
      planes.for_groups(nullptr, work, [&](int64_t g, Cx<T>* a, const Cx<T>*) {
        forward_stages(planes.rows, planes.rows.plan.n_stages, a, work.butterfly, InPlace<T>{a});
        for (int64_t k = 0; k < scan.width; ++k) {
          const Cx<T> v = where<T>(planes.mask_at(b, g)[k], a[planes.rows.position[static_cast<size_t>(k)]]);
          store_complex(samples + planes.samples_of(b, c) + 2 * planes.at(k, g), v, planes.valid(g));
        }
      });
    }
  }
}

template <class T>
void adjoint_points(const Scan<T>& scan, const T* samples, T* image, int threads) {
  const Planes<T> planes(scan, threads);
#pragma omp parallel num_threads(threads)
  {
    Work<T> work = planes.work();
    for (int64_t b = 0; b < scan.batch; ++b) {
      planes.begin(nullptr, b);
      for (int64_t c = 0; c < scan.n_coils; ++c) {
        planes.for_groups(samples + planes.samples_of(b, c), work, [&](int64_t g, Cx<T>* a, const Cx<T>* data) {
          for (int64_t k = 0; k < scan.width; ++k) {
            a[planes.rows.position[static_cast<size_t>(k)]] = where<T>(planes.mask_at(b, g)[k], data[k]);
          }
          inverse_stages(planes.rows, planes.rows.plan.n_stages, a, work.butterfly, InPlace<T>{a});
        });
        planes.columns_inverse(b, c, work);
      }
      planes.end(b, T(1), image);
    }
  }
}

template <class T>
void gradient_points(const Scan<T>& scan, const T* image, const T* samples, T* gradient, int threads) {
  const Planes<T> planes(scan, threads);
#pragma omp parallel num_threads(threads)
  {
    Work<T> work = planes.work();
    for (int64_t b = 0; b < scan.batch; ++b) {
      planes.begin(image, b);
      for (int64_t u = 0; u < scan.n_used; ++u) {
        const int64_t c = scan.coil(u);
        if (c < 0) continue;
        planes.columns_forward(b, c, work);
        planes.for_groups(
            samples ? samples + planes.samples_of(b, c) : nullptr, work, [&](int64_t g, Cx<T>* a, const Cx<T>* data) {
              there_and_back(planes.rows, a, work.butterfly, InPlace<T>{a},
                             PointResidual<T>{planes.frequency.data(), planes.mask_at(b, g), data}, InPlace<T>{a});
            });
        planes.columns_inverse(b, c, work);
      }
      planes.end(b, scan.weight(), gradient);
    }
  }
}

template <class T>
void fourier_forward(const T* image, T* samples, const FourierScan& fourier, int threads) {
  const Scan<T> scan(fourier);
  (scan.n_lines > 0 ? forward_lines<T> : forward_points<T>)(scan, image, samples, threads);
}

template <class T>
void fourier_adjoint(const T* samples, T* image, const FourierScan& fourier, int threads) {
  const Scan<T> scan(fourier);
  (scan.n_lines > 0 ? adjoint_lines<T> : adjoint_points<T>)(scan, samples, image, threads);
}

template <class T>
void fourier_gradient(const T* image, const T* samples, T* gradient, const FourierScan& fourier, int threads) {
  const Scan<T> scan(fourier);
  (scan.n_lines > 0 ? gradient_lines<T> : gradient_points<T>)(scan, image, samples, gradient, threads);
}

const Operator kOperators[] = {
    {"fourier_forward", fourier_forward<float>, fourier_forward<double>},
    {"fourier_adjoint", fourier_adjoint<float>, fourier_adjoint<double>},
    {"fourier_gradient", fourier_gradient<float>, fourier_gradient<double>},
};

}  // namespace
}  // namespace oder
