// Complex numbers, or vectors of them, on the host and on the device.
#pragma once

#include "host_device.h"

namespace oder {

// A complex number, or a vector of them, as real and imaginary part.
template <class V>
struct Complex {
  V re, im;
};
template <class V>
ODER_HD Complex<V> operator+(const Complex<V>& a, const Complex<V>& b) {
  return {a.re + b.re, a.im + b.im};
}
template <class V>
ODER_HD Complex<V> operator-(const Complex<V>& a, const Complex<V>& b) {
  return {a.re - b.re, a.im - b.im};
}
template <class V, class W>
ODER_HD Complex<V> multiply(const Complex<V>& a, W re, W im) {
  return {a.re * re - a.im * im, a.re * im + a.im * re};
}

}  // namespace oder
