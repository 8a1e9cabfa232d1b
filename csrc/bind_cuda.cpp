// Bindings of the CUDA faces: tensors arrive as addresses, null as 0, and the stream last.
#include <pybind11/pybind11.h>

#include <limits>

#include "radon_cuda.h"

namespace {

using oder::RadonScan;
using oder::RedOperands;
using Address = uintptr_t;

template <class T = void>
T* at(Address a) {
  return reinterpret_cast<T*>(a);
}

int narrow(int64_t value, const char* name) {
  // The kernels count in 32 bits along each axis, with room for what lies beside an image.
  if (value < 1 || value > std::numeric_limits<int>::max() / 4) {
    throw std::invalid_argument(std::string(name) + " must lie in 1..2^29, got " + std::to_string(value));
  }
  return static_cast<int>(value);
}

RadonScan scan_of(int64_t height, int64_t width, Address angles, int64_t n_views, Address views, int64_t n_used,
                  int64_t n_bins, double bin_spacing, double bin_offset, double pixel_size) {
  return {at<double>(angles),       at<int64_t>(views),       narrow(n_views, "n_views"),
          narrow(n_used, "n_used"), narrow(height, "height"), narrow(width, "width"),
          narrow(n_bins, "n_bins"), bin_spacing / pixel_size, bin_offset / pixel_size};
}

}  // namespace

PYBIND11_MODULE(ODER_MODULE, m) {
  namespace py = pybind11;
  using release = py::call_guard<py::gil_scoped_release>;

  m.def(
      "radon_forward",
      [](int dtype, Address image, Address sinogram, Address sums, int64_t n_sums, int64_t batch, int64_t height,
         int64_t width, Address angles, int64_t n_views, int64_t n_bins, double bin_spacing, double bin_offset,
         double pixel_size, Address stream) {
        const RadonScan scan =
            scan_of(height, width, angles, n_views, 0, n_views, n_bins, bin_spacing, bin_offset, pixel_size);
        oder::radon_forward(dtype, at(image), at(sinogram), at<float>(sums), n_sums, narrow(batch, "batch"), scan,
                            pixel_size, at(stream));
      },
      release());

  for (const bool matched : {true, false}) {
    m.def(
        matched ? "radon_adjoint" : "radon_backproject",
        [matched](int dtype, Address sinogram, Address image, int64_t batch, int64_t height, int64_t width,
                  Address angles, int64_t n_views, int64_t n_bins, double bin_spacing, double bin_offset,
                  double pixel_size, Address stream) {
          const RadonScan scan =
              scan_of(height, width, angles, n_views, 0, n_views, n_bins, bin_spacing, bin_offset, pixel_size);
          oder::radon_adjoint(dtype, at(sinogram), at(image), narrow(batch, "batch"), scan, pixel_size, matched,
                              at(stream));
        },
        release());
  }

  m.def(
      "radon_gradient",
      [](int dtype, Address image, Address measured, Address sums, int64_t n_sums, Address gradient, int64_t batch,
         int64_t height, int64_t width, Address angles, int64_t n_views, Address views, int64_t n_used, int64_t n_bins,
         double bin_spacing, double bin_offset, double pixel_size, Address stream) {
        const RadonScan scan =
            scan_of(height, width, angles, n_views, views, n_used, n_bins, bin_spacing, bin_offset, pixel_size);
        oder::radon_gradient(dtype, at(image), at(measured), at<float>(sums), n_sums, at(gradient),
                             narrow(batch, "batch"), scan, pixel_size, at(stream));
      },
      release());

  m.def(
      "radon_red_update",
      [](int dtype, Address image, Address measured, Address sums, int64_t n_sums, Address denoised, Address step_size,
         Address tau, Address previous, Address momentum, bool nonnegative, Address updated, Address extrapolated,
         Address reductions, Address partials, int64_t n_partials, int64_t batch, int64_t height, int64_t width,
         Address angles, int64_t n_views, Address views, int64_t n_used, int64_t n_bins, double bin_spacing,
         double bin_offset, double pixel_size, Address stream) {
        const RadonScan scan =
            scan_of(height, width, angles, n_views, views, n_used, n_bins, bin_spacing, bin_offset, pixel_size);
        const RedOperands red{at(denoised),           at<double>(step_size), at<double>(tau), at(previous),
                              at<double>(momentum),   nonnegative,           at(updated),     at(extrapolated),
                              at<double>(reductions), at<double>(partials),  n_partials};
        oder::radon_red_update(dtype, at(image), at(measured), at<float>(sums), n_sums, red, narrow(batch, "batch"),
                               scan, pixel_size, at(stream));
      },
      release());

  m.def(
      "red_update",
      [](int dtype, Address image, Address gradient, Address denoised, Address step_size, Address tau, Address previous,
         Address momentum, bool nonnegative, Address updated, Address extrapolated, Address reductions,
         Address partials, int64_t n_partials, int64_t batch, int64_t n, Address stream) {
        const RedOperands red{at(denoised),           at<double>(step_size), at<double>(tau), at(previous),
                              at<double>(momentum),   nonnegative,           at(updated),     at(extrapolated),
                              at<double>(reductions), at<double>(partials),  n_partials};
        oder::red_update(dtype, at(image), at(gradient), red, batch, n, at(stream));
      },
      release());
}
