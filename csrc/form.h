// The forms of a scale: what the tensor beside a mean may hold.
#pragma once

#include <cmath>

#include "math/target.h"

namespace fusedvae {

enum class Map : int {
  exponential = 0,
  linear = 1,
  softplus = 2,
  bounded = 3,  // the larger of x and eps, of which the derivative knows nothing
};

// What is given, x, is bounded first, as torch.clamp does it; then the base is e^x, x or softplus(x), plus eps. The
// scale that a formula is written in is the base, or its square, as a variance is that of a standard deviation.
template <class N>
struct FormIn {
  Map map = Map::exponential;
  bool squared = false;
  N low = -INFINITY, high = INFINITY, eps = 0;

  FormIn() = default;
  FormIn(Map map, bool squared, N low, N high, N eps) : map(map), squared(squared), low(low), high(high), eps(eps) {}
  template <class M>
  explicit FormIn(const FormIn<M>& form)
      : FormIn(form.map, form.squared, static_cast<N>(form.low), static_cast<N>(form.high), static_cast<N>(form.eps)) {}

  // Whether the logarithm that formulas are written in is at hand, but for bounds and a factor.
  FUSEDVAE_INLINE bool has_log() const { return map == Map::exponential && eps == 0; }
  FUSEDVAE_INLINE bool is_bounded() const { return low != -INFINITY || high != INFINITY; }
  // Whether x is that logarithm.
  FUSEDVAE_INLINE bool is_plain() const { return has_log() && !squared && !is_bounded(); }
};
using Form = FormIn<double>;

}  // namespace fusedvae
