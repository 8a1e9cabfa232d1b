// Binds the operators that this module is linked with.
#include <pybind11/pybind11.h>

#include "operator.h"

namespace py = pybind11;

namespace {

// The instruction sets of the C++ backends that this processor runs, best first.
py::list supported_isas() {
  py::list isas;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    isas.append("avx512");
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) isas.append("avx2");
#endif
  isas.append("baseline");
  return isas;
}

}  // namespace

// What a module keeps between calls is constant once it is loaded, a thread's own, or behind a mutex: it needs no lock
// of the interpreter.
PYBIND11_MODULE(ODER_MODULE, m, py::mod_gil_not_used()) {
  m.def("supported_isas", supported_isas);
  for (const oder::Operator* const op : oder::Operator::all()) {
    m.def(op->name, [op](const py::args& given) {
      std::vector<oder::Argument> arguments;
      for (const py::handle a : given) {
        const bool is_real = PyFloat_Check(a.ptr());
        arguments.push_back({is_real ? 0 : a.cast<int64_t>(), is_real ? a.cast<double>() : 0.0, is_real});
      }
      const py::gil_scoped_release release;
      (*op)(arguments);
    });
  }
}
