// Cartesian scans, and the discrete Fourier transform of any length, for host and device: mixed radix in place, so that
// the forward transform leaves the frequencies in the order in which the inverse one takes them.
#pragma once

#include "complex_number.h"
#include "host_device.h"
#include "operator.h"

namespace oder {

// A Cartesian scan: the transform runs along an axis of length n, `width` is the length of the other. Complex numbers
// are pairs of reals. Sampled are lines[n_lines] of that axis (-1 pads; on the GPU, whatever lies outside 0 .. n - 1),
// or the points of a mask of the full transform along both; those of the image, or of all images where shared. Of the
// coils, coils[n_used] are used, or all where null; those outside 0 .. n_coils - 1 count as zero. Samples are [batch,
// n_coils, n_lines, width], or [batch, n_coils, width, n] of a mask; null for zeros in the gradient.
struct FourierScan {
  int maps_dtype;
  const void* maps;  // pairs of maps_dtype [batch or 1, n_coils, n, width]
  bool shared_maps;
  const void* sampling;  // int64 [batch or 1, n_lines], or bool [batch or 1, width, n] where n_lines is 0
  Int n_lines;
  bool shared_sampling;
  const int64_t* coils;  // [n_used] or null
  Int n_used;
  bool transposed;           // images are [batch, width, n], not [batch, n, width]
  const float* roots_n;      // exp(-2 pi i k / n), pairs [n], on the GPU
  const float* roots_width;  // the same for width, with a mask
  float* workspace;          // pairs [batch, n_used, n, width], with a mask
  Int batch, n_coils, n, width;
};

// A transform of length n as stages of n = radix[0] * ... * radix[n_stages - 1]. Stage s works on blocks of
// n / (radix[0] ... radix[s - 1]) numbers; the forward transform runs the stages in order, the inverse backward.
// Radices are 2, 4 and 8, then the odd primes in increasing order.
struct FourierPlan {
  static constexpr int kMaxStages = 24;
  int n, n_stages;
  int radix[kMaxStages];
};

// largest_power: 8, or 4 where the registers do not hold a butterfly of 8.
inline FourierPlan fourier_plan(int n, int largest_power = 8) {
  FourierPlan plan{n, 0, {}};
  int rest = n, twos = 0;
  const auto add = [&plan](int radix) { plan.radix[plan.n_stages++] = radix; };
  for (; rest % 2 == 0; rest /= 2) ++twos;
  // The one 8 that an odd power takes comes after the fours.
  int eights = twos % 2 == 1 && twos >= 3;
  if (largest_power == 8) eights = twos == 4 ? 0 : twos % 3 == 1 && twos >= 4 ? (twos - 4) / 3 : twos / 3;
  for (int rest_of_twos = twos - 3 * eights; rest_of_twos > 0; rest_of_twos -= 2) add(rest_of_twos == 1 ? 2 : 4);
  for (; eights > 0; --eights) add(8);
  for (int prime = 3; rest > 1; prime += 2) {
    for (; rest % prime == 0; rest /= prime) add(prime);
    if (static_cast<int64_t>(prime) * prime > rest && rest > 1) {
      add(rest);
      break;
    }
  }
  if (n == 1) add(1);
  return plan;
}

// Where the forward transform leaves frequency k.
ODER_HD int fourier_position(const FourierPlan& plan, int k) {
  int position = 0, block = plan.n;
  for (int s = 0; s < plan.n_stages; ++s) {
    block /= plan.radix[s];
    position += k % plan.radix[s] * block;
    k /= plan.radix[s];
  }
  return position;
}

// a times -i, or times i where Inverse.
template <bool Inverse, class V>
ODER_HD Complex<V> turn(const Complex<V>& a) {
  if constexpr (Inverse) return {-a.im, a.re};
  return {a.im, -a.re};
}

// Cosine and sine of 2 pi j / R for 0 <= j < R, R odd.
template <int R>
struct OddRoots {
  double c[R], s[R];
};

template <int R>
ODER_HD constexpr OddRoots<R> odd_roots() {
  OddRoots<R> roots{};
  for (int j = 0; j < R; ++j) {
    // Taylor series at an angle in (-pi, pi).
    const double x = 6.283185307179586476925 * (2 * j > R ? j - R : j) / R;
    double term = 1, c = 1, s = 0;
    for (int k = 1; k < 40; ++k) {
      term *= x / k;
      if (k % 2 == 0) c += k % 4 == 0 ? term : -term;
      if (k % 2 == 1) s += k % 4 == 1 ? term : -term;
    }
    roots.c[j] = c;
    roots.s[j] = s;
  }
  return roots;
}

// Replaces a[0 .. R) by its (unscaled) transform: a[k] = sum_j a[j] exp(-+ 2 pi i j k / R). `Real` is the type of the
// constants.
template <int R, bool Inverse, class Real, class V>
ODER_HD void butterfly(Complex<V>* a) {
  if constexpr (R == 1) {
    return;
  } else if constexpr (R == 2) {
    const Complex<V> d = a[0] - a[1];
    a[0] = a[0] + a[1];
    a[1] = d;
  } else if constexpr (R == 4) {
    const Complex<V> p = a[0] + a[2], q = a[0] - a[2], u = a[1] + a[3], v = turn<Inverse>(a[1] - a[3]);
    a[0] = p + u;
    a[1] = q + v;
    a[2] = p - u;
    a[3] = q - v;
  } else if constexpr (R == 8) {
    Complex<V> even[4] = {a[0], a[2], a[4], a[6]}, odd[4] = {a[1], a[3], a[5], a[7]};
    butterfly<4, Inverse, Real>(even);
    butterfly<4, Inverse, Real>(odd);
    const Real h = Real(0.70710678118654752440);
    const Complex<V> turned1 = turn<Inverse>(odd[1]), turned3 = turn<Inverse>(odd[3]);
    odd[1] = odd[1] + turned1;
    odd[3] = turned3 - odd[3];
    odd[2] = turn<Inverse>(odd[2]);
    ODER_UNROLL
    for (int k = 0; k < 4; ++k) {
      const Complex<V> o = k % 2 == 1 ? Complex<V>{odd[k].re * h, odd[k].im * h} : odd[k];
      a[k] = even[k] + o;
      a[k + 4] = even[k] - o;
    }
  } else {
    static_assert(R % 2 == 1, "a radix is 2, 4, 8 or odd");
    constexpr int H = (R - 1) / 2;
    constexpr OddRoots<R> roots = odd_roots<R>();
    Complex<V> sum[H], difference[H], first = a[0];
    ODER_UNROLL
    for (int j = 1; j <= H; ++j) {
      sum[j - 1] = a[j] + a[R - j];
      difference[j - 1] = turn<Inverse>(a[j] - a[R - j]);
      first = first + sum[j - 1];
    }
    ODER_UNROLL
    for (int k = 1; k <= H; ++k) {
      Complex<V> c = a[0], s{};
      ODER_UNROLL
      for (int j = 1; j <= H; ++j) {
        const Real cosine = Real(roots.c[j * k % R]), sine = Real(roots.s[j * k % R]);
        c = {c.re + cosine * sum[j - 1].re, c.im + cosine * sum[j - 1].im};
        s = {s.re + sine * difference[j - 1].re, s.im + sine * difference[j - 1].im};
      }
      a[k] = c + s;
      a[R - k] = c - s;
    }
    a[0] = first;
  }
}

}  // namespace oder
