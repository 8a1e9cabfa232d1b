// Images of slices to spectra and back, of which only the rows of frequencies in a pupil are ever made or read.
#pragma once

#include <algorithm>
#include <vector>

#include "diffraction.h"
#include "transform_cpu.h"

namespace oder {

// The row frequencies that count: those some pupil meets, or whose negative one does; all where there are no pupils.
inline std::vector<int64_t> rows_in_pupils(const DiffractionPlanes& p) {
  std::vector<int64_t> rows;
  const auto meets = [&p](int64_t i) {
    const int32_t* s = p.support + 2 * i;
    for (int64_t l = 0; l < p.n_illuminations; ++l, s += 2 * p.height) {
      if (s[0] < s[1]) return true;
    }
    return false;
  };
  for (int64_t i = 0; i < p.height; ++i) {
    if (!p.support || meets(i) || meets(mirrored(i, p.height))) rows.push_back(i);
  }
  return rows;
}

template <class T>
class PlaneTransform {
 public:
  PlaneTransform(const DiffractionPlanes& planes, int threads)
      : planes_(planes),
        threads_(threads),
        along_columns_(Transform<T>::of(planes.height)),
        along_rows_(Transform<T>::of(planes.width)),
        rows_(rows_in_pupils(planes)),
        groups_((static_cast<int64_t>(rows_.size()) + L - 1) / L),
        strips_((planes.width + L - 1) / L),
        tiles_((strips_ + kStrips - 1) / kStrips),
        // As many planes at a time as give each thread some tiles.
        together_(std::max<int64_t>(1, std::min<int64_t>(planes.count, (4 * threads + tiles_ - 1) / tiles_))),
        factor_(along_columns_.scale * along_rows_.scale) {}

  // The spectra in natural order. Rows in no pupil are left as they are.
  void forward(const T* image, T* spectrum) const {
    run([&](int64_t first, int64_t count, Cx<T>* between) {
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < count * tiles_; ++task) {
        columns_forward(image + offset(first + task / tiles_), task % tiles_, between + task / tiles_ * size());
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < count * groups_; ++task) {
        rows_forward(between + task / groups_ * size(), task % groups_, spectrum + offset(first + task / groups_));
      }
    });
  }

  // The way back. Rows in no pupil count as zero. A plane's spectrum is read before its image is written.
  void inverse(const T* spectrum, T* image) const {
    run([&](int64_t first, int64_t count, Cx<T>* between) {
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < count * groups_; ++task) {
        rows_inverse(spectrum + offset(first + task / groups_), task % groups_, between + task / groups_ * size());
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < count * tiles_; ++task) {
        columns_inverse(between + task / tiles_ * size(), task % tiles_, image + offset(first + task / tiles_));
      }
    });
  }

 private:
  static constexpr int L = lanes<T>;
  static constexpr int64_t kStrips = kTileRowBytes / static_cast<int64_t>(sizeof(Cx<T>));

  const DiffractionPlanes& planes_;
  int threads_;
  const Transform<T>&along_columns_, &along_rows_;
  std::vector<int64_t> rows_;
  int64_t groups_, strips_, tiles_, together_;
  T factor_;

  int64_t offset(int64_t plane) const { return 2 * plane * planes_.height * planes_.width; }

  // Between the axes; groups begin at different places of a page, or they would meet in the same few lines of the
  // cache.
  int64_t stride() const { return planes_.width + 3; }
  int64_t size() const { return groups_ * stride(); }
  int valid(int64_t strip) const { return static_cast<int>(std::min<int64_t>(L, planes_.width - strip * L)); }
  int64_t strips_of(int64_t tile) const { return std::min(kStrips, strips_ - tile * kStrips); }

  // Calls pass(first plane, planes, memory between their axes) by all threads.
  template <class Pass>
  void run(const Pass& pass) const {
    Cx<T>* const between =
        static_cast<Cx<T>*>(kept<PlaneTransform>(static_cast<size_t>(together_ * size()) * sizeof(Cx<T>)));
#pragma omp parallel num_threads(threads_)
    {
      for (int64_t first = 0; first < planes_.count; first += together_) {
        pass(first, std::min(together_, planes_.count - first), between);
      }
    }
  }

  // Per thread the strips of a tile, one that is being transformed, and a butterfly. The second begins elsewhere in a
  // page, or the processor would take loads from one for dependent on stores to the other.
  struct Work {
    Cx<T>*strips, *transform, *butterfly;
    explicit Work(const PlaneTransform& of) {
      constexpr int64_t kApart = 4096 / sizeof(Cx<T>) / 5 + 1;
      const int64_t height = of.planes_.height, length = std::max(height, of.planes_.width);
      const int64_t largest = std::max(of.along_columns_.largest, of.along_rows_.largest);
      strips = static_cast<Cx<T>*>(
          kept<Work>(static_cast<size_t>(kStrips * height + kApart + length + 3 * largest + 2) * sizeof(Cx<T>)));
      transform = strips + kStrips * height + kApart;
      butterfly = transform + length;
    }
  };

  struct FromStrip {
    const Cx<T>* strip;
    T factor;
    Cx<T> operator()(int i) const { return scaled<T>(strip[i], factor); }
  };

  void columns_forward(const T* image, int64_t tile, Cx<T>* between) const {
    const Work work(*this);
    load_rows(image, planes_.height, planes_.width, tile * kStrips, strips_of(tile), work.strips);
    for (int64_t v = 0; v < strips_of(tile); ++v) {
      const int64_t strip = tile * kStrips + v;
      forward_stages(along_columns_, along_columns_.plan.n_stages, work.transform, work.butterfly,
                     FromStrip{work.strips + v * planes_.height, factor_});
      strip_to_groups<T>(
          static_cast<int64_t>(rows_.size()),
          [&](int64_t r) { return work.transform[along_columns_.position[rows_[r]]]; }, between + strip * L, stride(),
          valid(strip));
    }
  }

  void rows_forward(Cx<T>* between, int64_t group, T* spectrum) const {
    const int64_t width = planes_.width;
    const Work work(*this);
    Cx<T>* const a = work.transform;
    forward_stages(along_rows_, along_rows_.plan.n_stages, a, work.butterfly, InPlace<T>{between + group * stride()});
    // Rows of frequencies are columns here: the strip of the group's rows.
    const int64_t first = group * L, count = std::min<int64_t>(L, static_cast<int64_t>(rows_.size()) - first);
    for (int64_t j = 0; j < width; j += L) {
      const int columns = static_cast<int>(std::min<int64_t>(L, width - j));
      Cx<T> square[L];
      for (int l = 0; l < L; ++l) {
        square[l] = column_of<T>(l) < columns ? a[along_rows_.position[j + column_of<T>(l)]] : Cx<T>{};
      }
      transpose_square<T>(square);
      for (int l = 0; l < L; ++l) {
        const int r = column_of<T>(l);
        if (r < count) store_complex<T>(spectrum + 2 * (rows_[first + r] * width + j), square[l], columns);
      }
    }
  }

  void rows_inverse(const T* spectrum, int64_t group, Cx<T>* between) const {
    const int64_t width = planes_.width;
    const Work work(*this);
    Cx<T>* const a = work.transform;
    const int64_t first = group * L, count = std::min<int64_t>(L, static_cast<int64_t>(rows_.size()) - first);
    for (int64_t j = 0; j < width; j += L) {
      const int columns = static_cast<int>(std::min<int64_t>(L, width - j));
      Cx<T> square[L];
      for (int l = 0; l < L; ++l) {
        const int r = column_of<T>(l);
        square[l] = r < count ? load_complex<T>(spectrum + 2 * (rows_[first + r] * width + j), columns) : Cx<T>{};
      }
      transpose_square<T>(square);
      for (int l = 0; l < L; ++l) {
        if (column_of<T>(l) < columns) a[along_rows_.position[j + column_of<T>(l)]] = square[l];
      }
    }
    inverse_stages(along_rows_, along_rows_.plan.n_stages, a, work.butterfly, InPlace<T>{between + group * stride()});
  }

  struct ToImage {
    T* numbers;
    int64_t row;
    T factor;
    int valid;
    void operator()(int i, const Cx<T>& v) const { store_complex<T>(numbers + i * row, scaled<T>(v, factor), valid); }
  };

  void columns_inverse(const Cx<T>* between, int64_t tile, T* image) const {
    const Work work(*this);
    const int64_t used = static_cast<int64_t>(rows_.size());
    for (int64_t v = 0; v < strips_of(tile); ++v) {
      const int64_t strip = tile * kStrips + v;
      if (used < planes_.height) std::fill(work.transform, work.transform + planes_.height, Cx<T>{});
      groups_to_strip<T>(between + strip * L, stride(), valid(strip), used, [&](int64_t r, const Cx<T>& value) {
        work.transform[along_columns_.position[rows_[r]]] = value;
      });
      inverse_stages(along_columns_, along_columns_.plan.n_stages, work.transform, work.butterfly,
                     ToImage{image + 2 * strip * L, 2 * planes_.width, factor_, valid(strip)});
    }
  }
};

}  // namespace oder
