// C++ backend of diffraction: intensity diffraction tomography among spectra.
//
// Computes        spectra of slices; half spectra of intensities S_l(u) = t_l(u) + conj t_l(-u), t_l = sum_z h_lz X_z;
//                 the conjugate transpose G_z = 2 sum_l conj(h_lz) S_l; (L / |B|) 2 sum_l conj(h_lz) (S_l - Y_l); the
//                 same with all illuminations through Gram matrices; images of spectra.
// Thread mapping  spectra: rows of the half plane of frequencies, the rows in turn to the next free thread. A vector of
//                 frequencies u is kept with its mirror image -u, through all illuminations. Transforms: some planes at
//                 a time, all threads in each of the two passes (tiles of columns, groups of rows).
// Shared memory   per thread the slices' X and G of two vectors, and one illumination's h: they stay in L1. Transforms:
//                 per thread a tile of columns, and what lies between the two passes.
// Accumulation    in the precision of the spectra, illuminations in the order given: equal bits for any number
//                 of threads.
// Preconditions   contiguous pairs of reals; one dtype; indices in range (checked by the caller); no pupil holds a
//                 frequency of half the sampling rate.
#include <algorithm>
#include <cmath>
#include <vector>

#include "diffraction_planes_cpu.h"

namespace oder {
namespace {

// Images that share the transfer functions made for one.
constexpr int64_t kImages = 4;

template <class T>
ODER_INLINE void multiply_add(Cx<T>& sum, const Cx<T>& a, const Cx<T>& b) {
  sum.re += a.re * b.re - a.im * b.im;
  sum.im += a.re * b.im + a.im * b.re;
}
// conj(a) b
template <class T>
ODER_INLINE void multiply_conjugate_add(Cx<T>& sum, const Cx<T>& a, const Cx<T>& b) {
  sum.re += a.re * b.re + a.im * b.im;
  sum.im += a.re * b.im - a.im * b.re;
}
template <class T>
ODER_INLINE Cx<T> conjugate(const Cx<T>& a) {
  return {a.re, -a.im};
}

// ---------------------------------------------------------------- waves

// Coefficients of the Taylor series of sin(x) / x (Odd) and cos(x) in the square of x.
template <class T, bool Odd>
constexpr T coefficient(int k) {
  double c = 1;
  for (int n = 1; n <= 2 * k + Odd; ++n) c /= n;
  return static_cast<T>(k % 2 ? -c : c);
}
template <class T, bool Odd, int K, int Terms>
ODER_INLINE vec<T> series(vec<T> square) {
  constexpr T c = coefficient<T, Odd>(K);
  if constexpr (K + 1 == Terms) {
    return splat(c);
  } else {
    return c + square * series<T, Odd, K + 1, Terms>(square);
  }
}

// e^{2 pi i t}, by the series within an eighth of a turn.
template <class T>
ODER_INLINE Cx<T> wave(vec<T> turns) {
  constexpr T kRound = sizeof(T) == 4 ? T(12582912) : T(6755399441055744);  // 1.5 2^23, 1.5 2^52
  constexpr int kTerms = sizeof(T) == 4 ? 5 : 10;
  const vec<T> quarters = 4 * turns, shifted = quarters + kRound, whole = shifted - kRound;
  index_vec<T> n;
  std::memcpy(&n, &shifted, sizeof n);
  const vec<T> x = (quarters - whole) * T(1.57079632679489661923), square = x * x;
  const vec<T> s = x * series<T, true, 0, kTerms>(square), c = series<T, false, 0, kTerms>(square);
  const auto odd = (n & 1) != 0;
  const vec<T> re = odd ? s : c, im = odd ? c : s;
  return {((n + 1) & 2) != 0 ? -re : re, (n & 2) != 0 ? -im : im};
}

// ---------------------------------------------------------------- frequencies side by side

// A row of the half plane, and the row of the negative frequencies.
struct Row {
  int64_t i, mirror, number;  // indices; signed number of i
  Row(int64_t index, int64_t height)
      : i(index), mirror(mirrored(index, height)), number(signed_frequency(index, height)) {}
};

// The columns j .. j + valid of a row and their mirror images.
struct Columns {
  int64_t j, width;
  int valid;

  // Whether the mirror images are columns width - j, ... and whole vectors.
  template <class T>
  bool whole() const {
    return j > 0 && valid == lanes<T>;
  }
  template <class T>
  int64_t last() const {
    return width - j - lanes<T> + 1;
  }
  // The negative of column j + l.
  int64_t negative(int l) const { return mirrored(j + l, width); }
};

// Lanes in the opposite order of columns.
template <class T>
ODER_INLINE Cx<T> reversed(const Cx<T>& a) {
  index_vec<T> back;
  for (int l = 0; l < lanes<T>; ++l) back[l] = lanes<T> - 1 - l;
  return {shuffle<T>(a.re, a.re, back), shuffle<T>(a.im, a.im, back)};
}

template <class T>
__attribute__((noinline, cold)) Cx<T> gather_mirrored(const T* row, const Columns& at) {
  T pairs[2 * lanes<T>] = {};
  for (int l = 0; l < at.valid; ++l) {
    pairs[2 * l] = row[2 * at.negative(l)];
    pairs[2 * l + 1] = row[2 * at.negative(l) + 1];
  }
  return load_complex<T>(pairs);
}
// The conjugates of a row of negative frequencies.
template <class T>
ODER_INLINE Cx<T> load_mirrored(const T* row, const Columns& at) {
  return conjugate<T>(at.whole<T>() ? reversed<T>(load_complex<T>(row + 2 * at.last<T>())) : gather_mirrored(row, at));
}

template <class T>
__attribute__((noinline, cold)) void scatter_mirrored(T* row, const Columns& at, const Cx<T>& v) {
  T pairs[2 * lanes<T>];
  store_complex<T>(pairs, v);
  for (int l = at.j == 0; l < at.valid; ++l) {
    row[2 * at.negative(l)] = pairs[2 * l];
    row[2 * at.negative(l) + 1] = pairs[2 * l + 1];
  }
}
// The reverse; column 0 is its own mirror image and left to its row.
template <class T>
ODER_INLINE void store_mirrored(T* row, const Columns& at, const Cx<T>& v) {
  if (at.whole<T>()) {
    store_complex<T>(row + 2 * at.last<T>(), reversed<T>(conjugate<T>(v)));
  } else {
    scatter_mirrored(row, at, conjugate<T>(v));
  }
}

// ---------------------------------------------------------------- transfer functions

// Columns [begin, end) of the half plane.
struct Interval {
  int64_t begin, end;
  bool meets(int64_t j, int n) const { return begin < j + n && j < end && begin < end; }
};

template <class T>
ODER_INLINE index_vec<T> columns_of(int64_t j) {
  index_vec<T> columns;
  for (int l = 0; l < lanes<T>; ++l) columns[l] = static_cast<int>(j) + column_of<T>(l);
  return columns;
}
template <class T>
ODER_INLINE vec<T> keep(index_vec<T> inside, vec<T> v) {
  return reinterpret_cast<vec<T>>(reinterpret_cast<index_vec<T>>(v) & inside);
}
template <class T>
ODER_INLINE Cx<T> keep(index_vec<T> inside, const Cx<T>& v) {
  return {keep<T>(inside, v.re), keep<T>(inside, v.im)};
}

// What one illumination brings to all frequencies of a row: the row's frequency is `sign` times that of row number k.
template <class T>
struct Illumination {
  T row_term;      // u_row (u_row + 2 f_row)
  T column, step;  // f_column, and sign times the distance of columns
  T rest, root;    // nu^2 - |f|^2 and its root
  T gain, scale;   // a / (2 pi s), s

  Illumination() = default;
  Illumination(const DiffractionScan& scan, int64_t l, int64_t k, int sign) {
    const double* const f = static_cast<const double*>(scan.transfer) + 2 * l;
    const double u = sign * static_cast<double>(k) / (static_cast<double>(scan.height) * scan.pixel_size);
    const double beyond = scan.cutoff * scan.cutoff - f[0] * f[0] - f[1] * f[1];
    row_term = static_cast<T>(u * (u + 2 * f[0]));
    column = static_cast<T>(f[1]);
    step = static_cast<T>(sign / (static_cast<double>(scan.width) * scan.pixel_size));
    rest = static_cast<T>(beyond);
    root = static_cast<T>(std::sqrt(beyond > 0 ? beyond : 0.0));
    gain = static_cast<T>(scan.amplitude / (6.283185307179586476925 * scan.scale));
    scale = static_cast<T>(scan.scale);
  }

  // kappa, and a / kz(q), at the columns of numbers j. The difference of wavenumbers is taken without cancellation.
  void waves(vec<T> j, vec<T>& kappa, vec<T>& gains) const {
    const vec<T> u = j * step;
    const vec<T> more = u * (u + 2 * column) + row_term;  // |q|^2 - |f|^2
    const vec<T> axial = sqrt_of(rest - more);
    kappa = scale * more / (axial + root);
    gains = gain / axial;
  }
};

// What the h of all slices at some columns follow from: amplitude and kappa, or with evenly spaced slices that of the
// first and the factor from one to the next.
template <class T>
struct Start {
  vec<T> gain, kappa;
  Cx<T> first, step;
};

// An illumination whose pupil meets a row, or with its mirror image the row of the negative frequencies.
template <class T>
struct Active {
  int64_t l;
  Interval here, there;
  Illumination<T> light_here, light_there;
  Start<T> start_here, start_there;

  index_vec<T> inside(index_vec<T> column, int sign) const {
    const Interval& interval = sign > 0 ? here : there;
    using Index = std::remove_reference_t<decltype(column[0])>;
    return (column >= static_cast<Index>(interval.begin)) & (column < static_cast<Index>(interval.end));
  }
};

template <class T>
struct Transfer {
  const DiffractionScan& scan;

  // Makes what the h at some columns follow from. All illuminations' come first, as they wait for nothing; the products
  // that use them wait for each other.
  void start(const Columns& columns, Active<T>& light, int sign) const {
    if (scan.stored) return;
    const index_vec<T> column = columns_of<T>(columns.j);
    vec<T> j;
    for (int l = 0; l < lanes<T>; ++l) j[l] = static_cast<T>(column[l]);
    vec<T> kappa, gain;
    (sign > 0 ? light.light_here : light.light_there).waves(j, kappa, gain);
    // conj(i e^{i p}) is -i e^{-i p}.
    const index_vec<T> inside = light.inside(column, sign);
    gain = keep<T>(inside, gain) * static_cast<T>(sign);
    kappa = keep<T>(inside, kappa) * static_cast<T>(sign);
    Start<T>& s = sign > 0 ? light.start_here : light.start_there;
    s.gain = gain;
    s.kappa = kappa;
    if (scan.spacing == 0) return;
    s.first = with_gain(gain, wave<T>(kappa * static_cast<T>(scan.first)));
    s.step = wave<T>(kappa * static_cast<T>(scan.spacing));
  }

  // The h of all slices (sign 1), or the conjugates of h at the negative frequencies (-1).
  void fill(const Row& row, const Columns& columns, const Active<T>& light, int sign, Cx<T>* h) const {
    const int64_t n = scan.n_slices;
    if (scan.stored) {
      const index_vec<T> inside = light.inside(columns_of<T>(columns.j), sign);
      const int64_t plane = 2 * scan.height * scan.width;
      const T* p =
          static_cast<const T*>(scan.transfer) + light.l * n * plane + 2 * scan.width * (sign > 0 ? row.i : row.mirror);
      for (int64_t z = 0; z < n; ++z, p += plane) {
        const Cx<T> v = sign > 0 ? load_complex<T>(p + 2 * columns.j, columns.valid) : load_mirrored<T>(p, columns);
        h[z] = keep<T>(inside, v);
      }
      return;
    }
    const Start<T>& s = sign > 0 ? light.start_here : light.start_there;
    if (scan.spacing == 0) {
      for (int64_t z = 0; z < n; ++z) h[z] = with_gain(s.gain, wave<T>(s.kappa * static_cast<T>(scan.depths[z])));
      return;
    }
    // Every other slice in a chain of its own.
    const Cx<T> two = times<T>(s.step, s.step);
    Cx<T> even = s.first, odd = times<T>(s.first, s.step);
    for (int64_t z = 0; z + 1 < n; z += 2) {
      h[z] = even;
      h[z + 1] = odd;
      even = times<T>(even, two);
      odd = times<T>(odd, two);
    }
    if (n % 2) h[n - 1] = even;
  }

  static Cx<T> with_gain(vec<T> gain, const Cx<T>& w) { return {-gain * w.im, gain * w.re}; }
};

// What a thread works in. Rows are copied in and out whole: the slices' planes often lie a power of two apart, and
// strided visits to all of them would meet in the same few lines of the cache.
template <class T>
struct Work {
  int64_t slices, vectors;
  Cx<T>*h_here, *h_there;
  Cx<T>*x_here, *x_there, *g_here, *g_there;  // [images, vectors, slices]
  Work(int64_t images, int64_t n_slices, int64_t n_vectors) : slices(n_slices), vectors(n_vectors) {
    const int64_t rows = images * vectors * slices;
    Cx<T>* next = static_cast<Cx<T>*>(kept<Work>(static_cast<size_t>(2 * slices + 4 * rows) * sizeof(Cx<T>)));
    for (Cx<T>** p : {&h_here, &h_there}) {
      *p = next;
      next += slices;
    }
    for (Cx<T>** p : {&x_here, &x_there, &g_here, &g_there}) {
      *p = next;
      next += rows;
    }
  }
  // Where the slices of an image and a vector of columns are.
  int64_t at(int64_t image, int64_t j) const { return (image * vectors + j / lanes<T>)*slices; }
};

template <class T>
struct Diffraction {
  const DiffractionScan& scan;
  int64_t columns, half;  // of the half plane without and with half the sampling rate

  explicit Diffraction(const DiffractionScan& s) : scan(s), columns((s.width + 1) / 2), half(s.width / 2 + 1) {}

  int64_t spectrum_row(int64_t b, int64_t z, int64_t i) const {
    return 2 * ((b * scan.n_slices + z) * scan.height + i) * scan.width;
  }
  int64_t half_row(int64_t b, int64_t l, int64_t i) const {
    return 2 * ((b * scan.n_illuminations + l) * scan.height + i) * half;
  }
  Columns columns_at(int64_t j) const {
    return {j, scan.width, static_cast<int>(std::min<int64_t>(lanes<T>, columns - j))};
  }

  Interval support(int64_t l, int64_t i, bool negated) const {
    const int32_t* const s = scan.support + 2 * (l * scan.height + i);
    const int64_t begin = negated ? 1 - s[1] : s[0], end = negated ? 1 - s[0] : s[1];
    return {std::max<int64_t>(begin, 0), s[0] < s[1] ? std::min(end, columns) : 0};
  }
  std::vector<Active<T>> active(const Row& row) const {
    std::vector<Active<T>> result;
    for (int64_t u = 0; u < scan.n_used; ++u) {
      const int64_t l = scan.illuminations ? scan.illuminations[u] : u;
      if (l < 0 || l >= scan.n_illuminations) continue;
      const Interval here = support(l, row.i, false), there = support(l, row.mirror, true);
      if (here.begin >= here.end && there.begin >= there.end) continue;
      Active<T>& light = result.emplace_back();
      light.l = l;
      light.here = here;
      light.there = there;
      if (scan.stored) continue;
      light.light_here = Illumination<T>(scan, l, row.number, 1);
      light.light_there = Illumination<T>(scan, l, row.number, -1);
    }
    return result;
  }

  // Calls f(row, first image, images, work) for all rows and groups of images.
  template <class F>
  void for_rows([[maybe_unused]] int threads, const F& f) const {
    const int64_t groups = (scan.batch + kImages - 1) / kImages;
#pragma omp parallel num_threads(threads)
    {
      Work<T> work(std::min(scan.batch, kImages), scan.n_slices, (columns + lanes<T> - 1) / lanes<T>);
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < groups * scan.height; ++task) {
        const int64_t b = task / scan.height * kImages;
        f(Row(task % scan.height, scan.height), b, std::min(kImages, scan.batch - b), work);
      }
    }
  }

  void load_slices(const T* spectrum, const Row& row, int64_t b, int64_t images, Work<T>& w) const {
    for (int64_t n = 0; n < images; ++n) {
      for (int64_t z = 0; z < scan.n_slices; ++z) {
        const T* const here = spectrum + spectrum_row(b + n, z, row.i);
        const T* const there = spectrum + spectrum_row(b + n, z, row.mirror);
        for (int64_t j = 0; j < columns; j += lanes<T>) {
          const Columns at = columns_at(j);
          w.x_here[w.at(n, j) + z] = load_complex<T>(here + 2 * j, at.valid);
          w.x_there[w.at(n, j) + z] = load_mirrored<T>(there, at);
        }
      }
    }
  }

  void store_slices(T* spectrum, const Row& row, int64_t b, int64_t images, T factor, const Work<T>& w) const {
    for (int64_t n = 0; n < images; ++n) {
      for (int64_t z = 0; z < scan.n_slices; ++z) {
        T* const here = spectrum + spectrum_row(b + n, z, row.i);
        T* const there = spectrum + spectrum_row(b + n, z, row.mirror);
        for (int64_t j = 0; j < columns; j += lanes<T>) {
          const Columns at = columns_at(j);
          store_complex<T>(here + 2 * j, scaled<T>(w.g_here[w.at(n, j) + z], factor), at.valid);
          store_mirrored<T>(there, at, scaled<T>(w.g_there[w.at(n, j) + z], factor));
        }
        if (columns < half) here[2 * columns] = here[2 * columns + 1] = T(0);
      }
    }
  }

  static void start(const Transfer<T>& transfer, const Columns& at, std::vector<Active<T>>& lights) {
    for (Active<T>& light : lights) {
      if (light.here.meets(at.j, at.valid)) transfer.start(at, light, 1);
      if (light.there.meets(at.j, at.valid)) transfer.start(at, light, -1);
    }
  }

  // t(u) + conj t(-u)
  Cx<T> scattered(int64_t first, bool here, bool there, const Work<T>& w) const {
    // Products of real and of imaginary parts in sums of their own: shorter chains.
    Cx<T> sum{}, other{};
    const auto add = [&](const Cx<T>* h, const Cx<T>* x) {
      for (int64_t z = 0; z < scan.n_slices; ++z) {
        sum.re += h[z].re * x[z].re;
        sum.im += h[z].re * x[z].im;
        other.re -= h[z].im * x[z].im;
        other.im += h[z].im * x[z].re;
      }
    };
    if (here) add(w.h_here, w.x_here + first);
    if (there) add(w.h_there, w.x_there + first);
    return sum + other;
  }

  void forward(const T* spectrum, T* result, int threads) const {
    const Transfer<T> transfer{scan};
    for_rows(threads, [&](const Row& row, int64_t b, int64_t images, Work<T>& w) {
      for (int64_t n = 0; n < images; ++n) {
        for (int64_t l = 0; l < scan.n_illuminations; ++l) {
          T* const to = result + half_row(b + n, l, row.i);
          std::fill(to, to + 2 * half, T(0));
        }
      }
      std::vector<Active<T>> lights = active(row);
      if (lights.empty()) return;
      load_slices(spectrum, row, b, images, w);
      for (int64_t j = 0; j < columns; j += lanes<T>) {
        const Columns at = columns_at(j);
        start(transfer, at, lights);
        for (const Active<T>& light : lights) {
          const bool here = light.here.meets(j, at.valid), there = light.there.meets(j, at.valid);
          if (!here && !there) continue;
          if (here) transfer.fill(row, at, light, 1, w.h_here);
          if (there) transfer.fill(row, at, light, -1, w.h_there);
          for (int64_t n = 0; n < images; ++n) {
            store_complex<T>(result + half_row(b + n, light.l, row.i) + 2 * j, scattered(w.at(n, j), here, there, w),
                             at.valid);
          }
        }
      }
    });
  }

  // With a spectrum the gradient, without one the adjoint of the half spectra.
  void back(const T* spectrum, const T* data, T* result, int threads) const {
    const Transfer<T> transfer{scan};
    const int64_t slices = scan.n_slices;
    const T factor = T(2) * static_cast<T>(scan.n_illuminations) / static_cast<T>(scan.n_used);
    for_rows(threads, [&](const Row& row, int64_t b, int64_t images, Work<T>& w) {
      std::vector<Active<T>> lights = active(row);
      std::fill(w.g_here, w.g_here + w.at(images, 0), Cx<T>{});
      std::fill(w.g_there, w.g_there + w.at(images, 0), Cx<T>{});
      if (spectrum && !lights.empty()) load_slices(spectrum, row, b, images, w);
      for (int64_t j = 0; j < columns && !lights.empty(); j += lanes<T>) {
        const Columns at = columns_at(j);
        start(transfer, at, lights);
        for (const Active<T>& light : lights) {
          const bool here = light.here.meets(j, at.valid), there = light.there.meets(j, at.valid);
          if (!here && !there) continue;
          if (here) transfer.fill(row, at, light, 1, w.h_here);
          if (there) transfer.fill(row, at, light, -1, w.h_there);
          for (int64_t n = 0; n < images; ++n) {
            const int64_t first = w.at(n, j);
            Cx<T> residual{};
            if (data) {
              const T* const p = data + half_row(b + n, light.l, row.i) + 2 * j;
              residual = load_complex<T>(p, at.valid);
              __builtin_prefetch(p + 4 * lanes<T>);
            }
            if (spectrum) residual = scattered(first, here, there, w) - residual;
            const auto add = [&](Cx<T>* g, const Cx<T>* h) {
              for (int64_t z = 0; z < slices; ++z) multiply_conjugate_add<T>(g[z], h[z], residual);
            };
            if (here) add(w.g_here + first, w.h_here);
            if (there) add(w.g_there + first, w.h_there);
          }
        }
      }
      store_slices(result, row, b, images, factor, w);
    });
  }
};

// ---------------------------------------------------------------- Gram matrices

template <class T>
struct Gram {
  const DiffractionGram& gram;
  const T *spectrum, *data;
  T* result;

  int64_t row_of(int64_t b, int64_t z, int64_t i) const {
    return 2 * ((b * gram.n_slices + z) * gram.height + i) * gram.width;
  }

  // Vectors of a row, the slices of each side by side: rows are copied whole, as in Work.
  template <class Load>
  void load_row(int64_t columns, Cx<T>* to, const Load& load_at) const {
    for (int64_t z = 0; z < gram.n_slices; ++z) {
      Cx<T>* p = to + z;
      for (int64_t j = 0; j < columns; j += lanes<T>, p += gram.n_slices) {
        *p = load_at(z, Columns{j, gram.width, static_cast<int>(std::min<int64_t>(lanes<T>, columns - j))});
      }
    }
  }

  // Slices with slices at the same frequency: a Hermitian Toeplitz matrix. Vectors in no pupil are left out.
  void distances(int64_t b, int64_t i, Cx<T>* g, Cx<T>* x, Cx<T>* out, std::vector<int64_t>& used) const {
    const int64_t slices = gram.n_slices, plane = 2 * gram.height * gram.width;
    const T* const first = static_cast<const T*>(gram.automatic) + 2 * i * gram.width;
    used.clear();
    for (int64_t j = 0; j < gram.width; j += lanes<T>) {
      const T* const p = first + 2 * j;
      if (std::any_of(p, p + 2 * std::min<int64_t>(lanes<T>, gram.width - j), [](T v) { return v != 0; })) {
        used.push_back(j);
      }
    }
    const auto valid = [&](int64_t j) { return static_cast<int>(std::min<int64_t>(lanes<T>, gram.width - j)); };
    for (int64_t z = 0; z < slices; ++z) {
      const T* const from = spectrum + row_of(b, z, i);
      for (size_t v = 0; v < used.size(); ++v) {
        g[v * slices + z] = load_complex<T>(first + z * plane + 2 * used[v], valid(used[v]));
        x[v * slices + z] = load_complex<T>(from + 2 * used[v], valid(used[v]));
      }
    }
    for (size_t v = 0; v < used.size(); ++v) {
      const Cx<T>*const row = g + v * slices, *const in = x + v * slices;
      for (int64_t y = 0; y < slices; ++y) {
        // Products of real and of imaginary parts in sums of their own: shorter chains.
        Cx<T> sum{}, below{}, above{};
        const auto add = [&](const Cx<T>& a, const Cx<T>& value, Cx<T>& other) {
          sum.re += a.re * value.re;
          sum.im += a.re * value.im;
          other.re += a.im * value.im;
          other.im += a.im * value.re;
        };
        for (int64_t z = 0; z <= y; ++z) add(row[y - z], in[z], below);
        for (int64_t z = y + 1; z < slices; ++z) add(row[z - y], in[z], above);
        out[v * slices + y] = {sum.re - below.re + above.re, sum.im + below.im - above.im};
      }
    }
    for (int64_t y = 0; y < slices; ++y) {
      const T* const from = data ? data + row_of(b, y, i) : nullptr;
      T* const to = result + row_of(b, y, i);
      size_t v = 0;
      for (int64_t j = 0; j < gram.width; j += lanes<T>) {
        Cx<T> sum{};
        if (v < used.size() && used[v] == j) sum = out[v++ * slices + y];
        if (from) sum = sum - load_complex<T>(from + 2 * j, valid(j));
        store_complex<T>(to + 2 * j, sum, valid(j));
      }
    }
  }

  // What frequencies and their negatives bring to each other: each matrix is read once for both.
  void mirror_images(int64_t b, int64_t k, Cx<T>* here, Cx<T>* there, Cx<T>* sum) const {
    const int64_t slices = gram.n_slices, number = k - gram.rows / 2, plane = 2 * gram.rows * gram.columns;
    const int64_t i = number < 0 ? number + gram.height : number, mirror = mirrored(i, gram.height);
    const int64_t vectors = (gram.columns + lanes<T> - 1) / lanes<T>;
    const auto columns_at = [&](int64_t v) {
      const int64_t j = v * lanes<T>;
      return Columns{j, gram.width, static_cast<int>(std::min<int64_t>(lanes<T>, gram.columns - j))};
    };
    for (int64_t z = 0; z < slices; ++z) {
      for (int64_t v = 0; v < vectors; ++v) {
        const Columns at = columns_at(v);
        here[z * vectors + v] = load_complex<T>(spectrum + row_of(b, z, i) + 2 * at.j, at.valid);
        there[z * vectors + v] = load_mirrored<T>(spectrum + row_of(b, z, mirror), at);
      }
    }
    Cx<T>* const mirror_sum = sum + slices * vectors;
    std::fill(sum, mirror_sum + slices * vectors, Cx<T>{});
    for (int64_t y = 0; y < slices; ++y) {
      for (int64_t z = 0; z < slices; ++z) {
        const T* const m = static_cast<const T*>(gram.pairs) + (y * slices + z) * plane + 2 * k * gram.columns;
        for (int64_t v = 0; v < vectors; ++v) {
          const Columns at = columns_at(v);
          const Cx<T> value = load_complex<T>(m + 2 * at.j, at.valid);
          multiply_add<T>(sum[y * vectors + v], value, there[z * vectors + v]);
          multiply_conjugate_add<T>(mirror_sum[z * vectors + v], value, here[y * vectors + v]);
        }
      }
    }
    for (int64_t y = 0; y < slices; ++y) {
      T* const to = result + row_of(b, y, i);
      T* const mirror_to = result + row_of(b, y, mirror);
      for (int64_t v = 0; v < vectors; ++v) {
        const Columns at = columns_at(v);
        T* const p = to + 2 * at.j;
        store_complex<T>(p, load_complex<T>(p, at.valid) + sum[y * vectors + v], at.valid);
        store_mirrored<T>(mirror_to, at, load_mirrored<T>(mirror_to, at) + mirror_sum[y * vectors + v]);
      }
    }
  }

  void run([[maybe_unused]] int threads) const {
#pragma omp parallel num_threads(threads)
    {
      const int64_t row = (gram.width + lanes<T> - 1) / lanes<T> * gram.n_slices;
      Cx<T>* const a = static_cast<Cx<T>*>(kept<Gram>(static_cast<size_t>(4 * row) * sizeof(Cx<T>)));
      Cx<T>*const b = a + row, *const c = b + row;
      std::vector<int64_t> used;
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < gram.batch * gram.height; ++task) {
        distances(task / gram.height, task % gram.height, a, b, c, used);
      }
      // Two rows of opposite numbers write to different columns of both.
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < gram.batch * gram.rows; ++task)
        mirror_images(task / gram.rows, task % gram.rows, a, b, c);
    }
  }
};

template <class T>
void diffraction_transform(const T* image, T* spectrum, const DiffractionPlanes& planes, int threads) {
  PlaneTransform<T>(planes, threads).forward(image, spectrum);
}

template <class T>
void diffraction_inverse(const T* spectrum, T* image, const DiffractionPlanes& planes, int threads) {
  PlaneTransform<T>(planes, threads).inverse(spectrum, image);
}

template <class T>
void diffraction_forward(const T* spectrum, T* half, const DiffractionScan& scan, int threads) {
  Diffraction<T>(scan).forward(spectrum, half, threads);
}

template <class T>
void diffraction_adjoint(const T* half, T* spectrum, const DiffractionScan& scan, int threads) {
  Diffraction<T>(scan).back(nullptr, half, spectrum, threads);
}

template <class T>
void diffraction_gradient(const T* spectrum, const T* half, T* gradient, const DiffractionScan& scan, int threads) {
  Diffraction<T>(scan).back(spectrum, half, gradient, threads);
}

template <class T>
void diffraction_gram(const T* spectrum, const T* data, T* gradient, const DiffractionGram& gram, int threads) {
  Gram<T>{gram, spectrum, data, gradient}.run(threads);
}

const Operator kOperators[] = {
    {"diffraction_transform", diffraction_transform<float>, diffraction_transform<double>},
    {"diffraction_inverse", diffraction_inverse<float>, diffraction_inverse<double>},
    {"diffraction_forward", diffraction_forward<float>, diffraction_forward<double>},
    {"diffraction_adjoint", diffraction_adjoint<float>, diffraction_adjoint<double>},
    {"diffraction_gradient", diffraction_gradient<float>, diffraction_gradient<double>},
    {"diffraction_gram", diffraction_gram<float>, diffraction_gram<double>},
};

}  // namespace
}  // namespace oder
