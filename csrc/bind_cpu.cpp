// Bindings of the C++ backends: tensors arrive as addresses, null as 0, and the number of threads last. Arguments
// without a name are workspaces of the GPU backends.
#include <pybind11/pybind11.h>

#include <vector>

#include "cpu_backend.h"

namespace {

using Address = uintptr_t;

template <class T = void>
T* at(Address a) {
  return reinterpret_cast<T*>(a);
}

// The instruction sets of this build that this processor runs, best first.
std::vector<const char*> supported_isas() {
  std::vector<const char*> isas;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    isas.push_back("avx512");
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) isas.push_back("avx2");
#endif
  isas.push_back("baseline");
  return isas;
}

// Defines an operator of a Cartesian scan: all of them end with the same arguments.
template <class... Head, class Call>
void define_fourier(pybind11::module_& m, const char* name, Call call) {
  m.def(
      name,
      [call](int dtype, Head... head, int, Address maps, bool shared_maps, Address sampling, int64_t n_lines,
             bool shared_sampling, Address coils, int64_t n_used, bool transposed, Address, Address, Address,
             int64_t batch, int64_t n_coils, int64_t n, int64_t width, int threads) {
        const oder::FourierScan scan{at(maps),
                                     at(sampling),
                                     at<int64_t>(coils),
                                     shared_maps,
                                     shared_sampling,
                                     transposed,
                                     n_lines,
                                     n_used,
                                     n_coils,
                                     n,
                                     width};
        call(dtype, at(head)..., batch, scan, threads);
      },
      pybind11::call_guard<pybind11::gil_scoped_release>());
}

// Defines an operator of diffraction tomography: all of them end with the same arguments.
template <class... Head, class Call>
void define_diffraction(pybind11::module_& m, const char* name, Call call) {
  m.def(
      name,
      [call](int dtype, Head... head, Address transfer, bool stored, Address depths, Address support,
             Address illuminations, int64_t n_used, double pixel_size, double cutoff, double scale, double amplitude,
             double first, double spacing, int64_t batch, int64_t n_illuminations, int64_t n_slices, int64_t height,
             int64_t width, int threads) {
        const oder::DiffractionScan scan{at(transfer),
                                         stored,
                                         at<double>(depths),
                                         at<int32_t>(support),
                                         at<int64_t>(illuminations),
                                         n_used,
                                         pixel_size,
                                         cutoff,
                                         scale,
                                         amplitude,
                                         first,
                                         spacing,
                                         n_illuminations,
                                         n_slices,
                                         height,
                                         width};
        call(dtype, at(head)..., batch, scan, threads);
      },
      pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace

PYBIND11_MODULE(ODER_MODULE, m) {
  namespace py = pybind11;
  using release = py::call_guard<py::gil_scoped_release>;

  m.def("supported_isas", [] {
    py::list names;
    for (const char* isa : supported_isas()) names.append(isa);
    return names;
  });

  m.def(
      "radon_forward",
      [](int dtype, Address image, Address sinogram, Address, int64_t, int64_t batch, int64_t height, int64_t width,
         Address angles, int64_t n_views, int64_t n_bins, double bin_spacing, double bin_offset, double pixel_size,
         int threads) {
        const oder::RadonGeometry g{height,  width,  at<double>(angles), n_views,    nullptr,
                                    n_views, n_bins, bin_spacing,        bin_offset, pixel_size};
        oder::radon_forward(dtype, at(image), at(sinogram), batch, g, threads);
      },
      release());

  for (const bool matched : {true, false}) {
    m.def(
        matched ? "radon_adjoint" : "radon_backproject",
        [matched](int dtype, Address sinogram, Address image, int64_t batch, int64_t height, int64_t width,
                  Address angles, int64_t n_views, int64_t n_bins, double bin_spacing, double bin_offset,
                  double pixel_size, int threads) {
          const oder::RadonGeometry g{height,  width,  at<double>(angles), n_views,    nullptr,
                                      n_views, n_bins, bin_spacing,        bin_offset, pixel_size};
          oder::radon_adjoint(dtype, at(sinogram), at(image), batch, g, matched, threads);
        },
        release());
  }

  m.def(
      "radon_gradient",
      [](int dtype, Address image, Address measured, Address, int64_t, Address gradient, int64_t batch, int64_t height,
         int64_t width, Address angles, int64_t n_views, Address views, int64_t n_used, int64_t n_bins,
         double bin_spacing, double bin_offset, double pixel_size, int threads) {
        const oder::RadonGeometry g{height, width,  at<double>(angles), n_views,    at<int64_t>(views),
                                    n_used, n_bins, bin_spacing,        bin_offset, pixel_size};
        oder::radon_gradient(dtype, at(image), at(measured), at(gradient), batch, g, threads);
      },
      release());

  m.def(
      "red_update",
      [](int dtype, Address image, Address gradient, Address denoised, Address step_size, Address tau, Address previous,
         Address momentum, bool nonnegative, Address updated, Address extrapolated, Address reductions, Address,
         int64_t, int64_t batch, int64_t n, int threads) {
        const oder::RedOperands red{at(denoised), at<double>(step_size), at<double>(tau),
                                    at(previous), at<double>(momentum),  nonnegative,
                                    at(updated),  at(extrapolated),      at<double>(reductions)};
        oder::red_update(dtype, at(image), at(gradient), red, batch, n, threads);
      },
      release());

  define_fourier<Address, Address>(m, "fourier_forward", oder::fourier_forward);
  define_fourier<Address, Address>(m, "fourier_adjoint", oder::fourier_adjoint);
  define_fourier<Address, Address, Address>(m, "fourier_gradient", oder::fourier_gradient);

  define_diffraction<Address, Address>(m, "diffraction_forward", oder::diffraction_forward);
  define_diffraction<Address, Address>(m, "diffraction_adjoint", oder::diffraction_adjoint);
  define_diffraction<Address, Address, Address>(m, "diffraction_gradient", oder::diffraction_gradient);
  for (const bool forward : {true, false}) {
    m.def(
        forward ? "diffraction_transform" : "diffraction_inverse",
        [forward](int dtype, Address from, Address to, Address support, int64_t n_illuminations, int64_t count,
                  int64_t height, int64_t width, int threads) {
          const oder::DiffractionPlanes planes{at<int32_t>(support), n_illuminations, count, height, width};
          (forward ? oder::diffraction_transform : oder::diffraction_inverse)(dtype, at(from), at(to), planes, threads);
        },
        release());
  }
  m.def(
      "diffraction_gram",
      [](int dtype, Address spectrum, Address data, Address gradient, Address automatic, Address pairs, int64_t batch,
         int64_t n_slices, int64_t height, int64_t width, int64_t rows, int64_t columns, int threads) {
        const oder::DiffractionGram gram{at(automatic), at(pairs), n_slices, height, width, rows, columns};
        oder::diffraction_gram(dtype, at(spectrum), at(data), at(gradient), gram, batch, threads);
      },
      release());
}
