// How operators offer themselves to Python: a backend declares an Operator, and bind.cpp binds all there are. Tensors
// arrive as addresses, null as 0, without torch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace oder {

// Sizes along an axis. The GPU kernels count in 32 bits, with room for what lies beside an image.
#if defined(__CUDACC__) || defined(ODER_CUDA_HOST)
using Int = int;
#else
using Int = int64_t;
#endif
constexpr int64_t kMostInt = int64_t{1} << 29;

// As DTYPE_CODES in oder_fast/ops/backends.py.
enum Dtype { kFloat32 = 0, kFloat64 = 1, kBfloat16 = 2, kFloat16 = 3 };
constexpr Dtype dtype_of(const float*) { return kFloat32; }
constexpr Dtype dtype_of(const double*) { return kFloat64; }

// An argument from Python, which becomes what the kernel declares in its place.
struct Argument {
  int64_t whole;
  double real;
  bool is_real;

  operator int64_t() const {
    if (is_real) throw std::invalid_argument("expected a whole number or a tensor, got " + std::to_string(real));
    return whole;
  }
  operator int() const {
    const int64_t value = *this;
    if (value < 0 || value > kMostInt)
      throw std::invalid_argument("a size must lie in 0..2^29, got " + std::to_string(value));
    return static_cast<int>(value);
  }
  operator bool() const { return operator int64_t() != 0; }
  operator double() const { return is_real ? real : static_cast<double>(whole); }
  template <class T>
  operator T*() const {
    return reinterpret_cast<T*>(static_cast<uintptr_t>(operator int64_t()));
  }
};

// The number of fields of a struct without arrays, each of which takes an argument.
struct Anything {
  template <class T>
  operator T() const;
};
template <size_t>
using AnythingAt = Anything;
template <class T, class Places, class = void>
constexpr bool kTakes = false;
template <class T, size_t... I>
constexpr bool kTakes<T, std::index_sequence<I...>, std::void_t<decltype(T{AnythingAt<I>{}...})>> = true;
template <class T, size_t N = 1>
constexpr size_t count_fields() {
  if constexpr (kTakes<T, std::make_index_sequence<N + 1>>) return count_fields<T, N + 1>();
  return N;
}

class Operator {
 public:
  const char* const name;

  // Kernels of one operator: the dtype of each is that of its first parameter, the data; then come the other parameters
  // in the order in which oder_fast/ops passes them, and last the number of threads or the stream.
  template <class... Kernels>
  Operator(const char* its_name, Kernels*... kernels) : name(its_name), kernels_{kernel_of(kernels)...} {
    all().push_back(this);
  }

  void operator()(const std::vector<Argument>& arguments) const {
    for (const Kernel& kernel : kernels_) {
      if (arguments.empty() || static_cast<int64_t>(arguments[0]) != kernel.dtype) continue;
      if (arguments.size() != kernel.count + 1) {
        throw std::invalid_argument(std::string(name) + " takes " + std::to_string(kernel.count + 1) +
                                    " arguments, got " + std::to_string(arguments.size()));
      }
      return kernel.run(arguments.data() + 1);
    }
    throw std::invalid_argument(std::string(name) + " has no kernel for this dtype");
  }

  static std::vector<const Operator*>& all() {
    static std::vector<const Operator*> operators;
    return operators;
  }

 private:
  struct Kernel {
    int dtype;
    size_t count;
    std::function<void(const Argument*)> run;
  };
  std::vector<Kernel> kernels_;

  template <class T, size_t... I>
  static T take(const Argument*& next, std::index_sequence<I...>) {
    next += sizeof...(I);
    return T{(next - sizeof...(I))[I]...};
  }
  template <class... P>
  static void call(void (*kernel)(P...), const Argument* next) {
    // Braces: from left to right.
    std::apply(kernel, std::tuple<std::decay_t<P>...>{take<std::decay_t<P>>(
                           next, std::make_index_sequence<count_fields<std::decay_t<P>>()>{})...});
  }
  template <class... P>
  static Kernel kernel_of(void (*kernel)(P...)) {
    return {dtype_of(std::tuple_element_t<0, std::tuple<P...>>{}), (count_fields<std::decay_t<P>>() + ...),
            [kernel](const Argument* next) { call(kernel, next); }};
  }
};

}  // namespace oder
