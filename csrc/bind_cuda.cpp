// Bindings of the CUDA backends: tensors arrive as addresses, null as 0, and the stream last.
#include <pybind11/pybind11.h>

#include <limits>

#include "diffraction_cuda.h"
#include "fourier_cuda.h"
#include "radon_cuda.h"
#include "red_update_cuda.h"

namespace {

namespace py = pybind11;
using oder::DiffractionGram;
using oder::DiffractionScan;
using oder::FourierScan;
using oder::RadonScan;
using oder::RedOperands;
using Address = uintptr_t;
using release = py::call_guard<py::gil_scoped_release>;

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

// Binds an operator of a Cartesian scan: all of them end with the same arguments.
template <class... First, class Launch>
void def_fourier(py::module_& m, const char* name, Launch launch) {
  m.def(
      name,
      [launch](int dtype, First... first, int maps_dtype, Address maps, bool shared_maps, Address sampling,
               int64_t n_lines, bool shared_sampling, Address coils, int64_t n_used, bool transposed, Address roots_n,
               Address roots_width, Address workspace, int64_t batch, int64_t n_coils, int64_t n, int64_t width,
               Address stream) {
        const FourierScan scan{maps_dtype,
                               at(maps),
                               shared_maps,
                               at(sampling),
                               n_lines == 0 ? 0 : narrow(n_lines, "n_lines"),
                               shared_sampling,
                               at<int64_t>(coils),
                               narrow(n_used, "n_used"),
                               transposed,
                               at<float>(roots_n),
                               at<float>(roots_width),
                               at<float>(workspace),
                               narrow(batch, "batch"),
                               narrow(n_coils, "n_coils"),
                               narrow(n, "n"),
                               narrow(width, "width")};
        launch(dtype, at(first)..., scan, at(stream));
      },
      release());
}

// The same of an operator of diffraction tomography.
template <class... First, class Launch>
void def_diffraction(py::module_& m, const char* name, Launch launch) {
  m.def(
      name,
      [launch](int dtype, First... first, Address transfer, bool stored, Address depths, Address support,
               Address illuminations, int64_t n_used, double pixel_size, double cutoff, double scale, double amplitude,
               double first_depth, double spacing, int64_t batch, int64_t n_illuminations, int64_t n_slices,
               int64_t height, int64_t width, Address stream) {
        const DiffractionScan scan{at(transfer),
                                   stored,
                                   at<double>(depths),
                                   at<int32_t>(support),
                                   at<int64_t>(illuminations),
                                   narrow(n_used, "n_used"),
                                   pixel_size,
                                   cutoff,
                                   scale,
                                   amplitude,
                                   first_depth,
                                   spacing,
                                   narrow(n_illuminations, "n_illuminations"),
                                   narrow(n_slices, "n_slices"),
                                   narrow(height, "height"),
                                   narrow(width, "width")};
        launch(dtype, at(first)..., narrow(batch, "batch"), scan, at(stream));
      },
      release());
}

}  // namespace

PYBIND11_MODULE(ODER_MODULE, m) {
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

  def_fourier<Address, Address>(m, "fourier_forward", oder::fourier_forward);
  def_fourier<Address, Address>(m, "fourier_adjoint", oder::fourier_adjoint);
  def_fourier<Address, Address, Address>(m, "fourier_gradient", oder::fourier_gradient);

  def_diffraction<Address, Address>(m, "diffraction_forward", oder::diffraction_forward);
  def_diffraction<Address, Address>(m, "diffraction_adjoint", oder::diffraction_adjoint);
  def_diffraction<Address, Address, Address>(m, "diffraction_gradient", oder::diffraction_gradient);
  m.def(
      "diffraction_gram",
      [](int dtype, Address spectrum, Address data, Address gradient, Address automatic, Address pairs, int64_t batch,
         int64_t n_slices, int64_t height, int64_t width, int64_t rows, int64_t columns, Address stream) {
        const DiffractionGram gram{at(automatic),
                                   at(pairs),
                                   narrow(n_slices, "n_slices"),
                                   narrow(height, "height"),
                                   narrow(width, "width"),
                                   narrow(rows, "rows"),
                                   narrow(columns, "columns")};
        oder::diffraction_gram(dtype, at(spectrum), at(data), at(gradient), gram, narrow(batch, "batch"), at(stream));
      },
      release());
}
