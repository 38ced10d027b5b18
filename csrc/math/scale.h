// The scales of formulas: what is made of an input that is some form of one. Formulas are written in the logarithm of a
// variance (of a Laplace distribution: of its scale).
#pragma once

#include "form.h"
#include "math/target.h"

namespace fusedvae {
namespace FUSEDVAE_NAMESPACE {

// A scale as formulas take it: its logarithm, a power of it, and the derivative of the logarithm by x; and whether the
// logarithm is what it comes from.
template <class T>
struct Scale {
  T log, power, slope;
  bool has_log;
};

// A value and its derivative.
template <class T>
struct Derived {
  T value, slope;
};

// A gradient by what a form has made of x, as one by x: none where the form is level, whatever it would be multiplied
// with.
template <class T>
FUSEDVAE_INLINE T through(T gradient, T slope) {
  return slope == 0.0f ? number<T>(0) : gradient * slope;
}

// log(1 + e^x) and its derivative, the logistic function.
template <class T>
FUSEDVAE_INLINE Derived<T> softplus(T x) {
  const T t = exponential(x < 0.0f ? x : -x), inverse = 1.0f / (1.0f + t);
  const T log = logarithm_of_1_plus(t, inverse);
  return {x < 0.0f ? log : x + log, x < 0.0f ? t * inverse : inverse};
}

// x within its bounds, and 1 if it was: at the bounds, too. NaN stays NaN; where there are bounds it counts as outside.
template <class N, class T>
FUSEDVAE_INLINE Derived<T> bounded(const FormIn<N>& form, T x) {
  if (!form.is_bounded()) return {x, number<T>(1)};
  const T low = number<T>(form.low), high = number<T>(form.high);
  const T above = x < low ? low : x;
  const T inside = x >= low ? number<T>(1) : number<T>(0);
  return {above > high ? high : above, x <= high ? inside : number<T>(0)};
}

// The base of x, which is within its bounds.
template <class N, class T>
FUSEDVAE_INLINE Derived<T> base_of(const FormIn<N>& form, T x) {
  const T one = number<T>(1), eps = number<T>(form.eps);
  switch (form.map) {
    case Map::exponential: {
      const T base = exponential(x);
      return {base + eps, base};
    }
    case Map::linear:
      return {x + eps, one};
    case Map::softplus: {
      const Derived<T> base = softplus(x);
      return {base.value + eps, base.slope};
    }
    default:
      return {x < eps ? eps : x, one};
  }
}

// The logarithm of the scale, of a form that has it.
template <class N, class T>
FUSEDVAE_INLINE Derived<T> log_of(const FormIn<N>& form, T given) {
  const Derived<T> x = bounded(form, given);
  return form.squared ? Derived<T>{x.value + x.value, x.slope + x.slope} : x;
}

// Of a scale that divides: its inverse if it has a logarithm, else itself, since a quotient is rounded but once.
constexpr int kDivisor = 2;

// The scale of x, with its first power, its inverse (power = -1), what it is more than 1 (power = 0), or kDivisor: of a
// form that has its logarithm, of one that has not, and of any.
template <int power, class N, class T>
FUSEDVAE_INLINE Scale<T> scale_of_log(const FormIn<N>& form, T given) {
  const Derived<T> log = log_of(form, given);
  if constexpr (power == 0)
    return {log.value, exponential_minus_1(log.value), log.slope, true};
  else
    return {log.value, exponential(power == 1 ? log.value : -log.value), log.slope, true};
}
template <int power, class N, class T>
FUSEDVAE_INLINE Scale<T> scale_of_base(const FormIn<N>& form, T given) {
  const Derived<T> x = bounded(form, given);
  const Derived<T> base = base_of(form, x.value);
  const T inverse = 1.0f / base.value, log = logarithm(base.value);
  // Infinity less its logarithm is no number, and no more is the derivative: that of the logarithm, 0, would hide it. A
  // scale that divides leaves nothing when it is infinite.
  const T unknown = power == 0 || power == 1 ? base.value - base.value : number<T>(0);
  const T slope = through(base.slope * inverse + unknown, x.slope);
  const T root = power < 0 ? inverse : base.value;
  const T more = root - 1.0f;  // near 1 to the last digit, which its square has not
  const T first = power == 0 ? more : root, second = power == 0 ? more * (root + 1.0f) : root * root;
  return {form.squared ? log + log : log, form.squared ? second : first, form.squared ? slope + slope : slope, false};
}
template <int power, class N, class T>
FUSEDVAE_INLINE Scale<T> scale_of(const FormIn<N>& form, T given) {
  return form.has_log() ? scale_of_log<power>(form, given) : scale_of_base<power>(form, given);
}

// The standard deviation of a variance in some form, and its derivative by x.
template <class N, class T>
FUSEDVAE_INLINE Derived<T> deviation_of(const FormIn<N>& form, T given) {
  const Derived<T> x = bounded(form, given);
  if (form.has_log()) {
    const T deviation = exponential(form.squared ? x.value : 0.5f * x.value);
    return {deviation, through(form.squared ? deviation : 0.5f * deviation, x.slope)};
  }
  const Derived<T> base = base_of(form, x.value);
  if (form.squared) return {base.value, through(base.slope, x.slope)};
  const T deviation = root(base.value);
  return {deviation, through(0.5f * base.slope / deviation, x.slope)};
}

}  // namespace FUSEDVAE_NAMESPACE
}  // namespace fusedvae
