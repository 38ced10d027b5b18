// What likelihoods of counts are made of: the parts of log-gamma functions that are left when their logarithms have
// been put together, and a logarithm that has not lost what it is to be compared with.
#pragma once

#include "math/target.h"

namespace fusedvae {
namespace FUSEDVAE_NAMESPACE {

// The polynomial of these coefficients, the constant one first, at x.
template <class T>
FUSEDVAE_INLINE T polynomial(T /*x*/, double last) {
  return number<T>(last);
}
template <class T, class... Coefficients>
FUSEDVAE_INLINE T polynomial(T x, double first, Coefficients... others) {
  return polynomial(x, others...) * x + number<T>(first);
}

// Binet's function r(z) = ln gamma(z) - (z - 1/2) ln z + z - ln(2 pi) / 2, which Stirling's formula leaves out, and its
// derivative r'(z) = digamma(z) - ln z + 1 / (2 z).
template <class T>
struct Binet {
  T value, slope;
};

// Both at z >= 1, of which 1 / z is given: z r(z) and -z^2 r'(z) are smooth functions of that, fitted at Chebyshev's
// points of (0, 1], in float32 as polynomials, to 5e-9 and 2e-8; in float64, to the last bit, as rational functions of
// 1 / z^2. Source of the series: Abramowitz & Stegun 1964, 6.1.40 and 6.3.18.
template <class T>
FUSEDVAE_INLINE Binet<T> binet(T inverse) {
  const T y = inverse * inverse;
  T value, slope;
  if constexpr (kIsDouble<T>) {
    value =
        polynomial(y, 0.083333333333333332708, 1.699568641901633913, 12.00390897360027098, 37.474827894949182812,
                   54.795764794216287449, 36.659076162591562041, 10.132052401473506168, 0.90399395566993606937,
                   0.012299899347407984019) /
        polynomial(y, 1.0, 20.428157036152914986, 144.71832244155957155, 454.33446780036699691, 671.4512045153452642,
                   458.81399080341701663, 132.66031288633142716, 13.218542166333262904, 0.26673323077912195796);
    slope =
        polynomial(y, 0.083333333333333327527, 1.8947475899705531379, 15.001534800040488539, 52.797689873554892946,
                   87.512149658423467484, 66.662552767808492163, 21.004448730536242091, 2.116406874290534301,
                   0.029982130593297672924) /
        polynomial(y, 1.0, 22.836971079646385015, 182.25449566092115438, 650.76025322373338545, 1107.5939759821893247,
                   887.01116227007189775, 308.76281074899510364, 38.839326895341300087, 1.1057126041821516151);
  } else {
    value = polynomial(inverse, 0.08333333672, -3.497345344e-7, -0.002770688113, -6.090973309e-5, 0.001063533093,
                       -0.0006456698628, 0.0001422189407);
    slope = polynomial(inverse, 0.08333335173, -2.380851643e-6, -0.008280495156, -0.0004654275852, 0.006051482821,
                       -0.005104469462, 0.002006198234, -0.0003225929695);
  }
  return {inverse * value, -y * slope};
}

// A logarithm, and what it falls short of its first term by.
template <class T>
struct LogOfRatio {
  T log, gap;  // ln(1 + t), and t - ln(1 + t)
};

// Of a ratio 1 + t, both to about an ulp of their own: next to 1 the gap is s t - 2 s^3 (1/3 + s^2/5 + ...) with s =
// t / (2 + t), the series of 2 artanh s.
template <class T>
FUSEDVAE_INLINE LogOfRatio<T> log_of_ratio(T ratio, T t) {
  const auto is_near = (t < 0.25f) & (t > -0.25f);
  const T s = t / (t + 2.0f), z = s * s;
  const T series = polynomial(z, 1.0 / 3, 1.0 / 5, 1.0 / 7, 1.0 / 9, 1.0 / 11, 1.0 / 13, 1.0 / 15, 1.0 / 17);
  const T gap = s * (t - (z + z) * series), log = logarithm(ratio);
  return {is_near ? t - gap : log, is_near ? gap : t - log};
}

}  // namespace FUSEDVAE_NAMESPACE
}  // namespace fusedvae
