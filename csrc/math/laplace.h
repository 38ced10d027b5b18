// The Laplace likelihood. Source: Kotz, Kozubowski & Podgórski 2001, "The Laplace distribution and generalizations",
// section 2.1; with `extra` as in Esser et al. 2021 (arXiv:2012.09841), whose perceptual loss joins the absolute error
// before both are divided by the scale.
#pragma once

#include "math/absolute_error.h"
#include "math/formula.h"
#include "math/scale.h"

namespace fusedvae {
namespace FUSEDVAE_NAMESPACE {

// (|recon_x - x| + extra) * e^-log_scale + log_scale. Inputs: recon_x, x, log_scale, extra.
struct LaplaceNll {
  static constexpr const char* kName = "laplace_nll";
  static constexpr int kInputs = 4, kUniform = 2;
  static constexpr int kScales = 1, kScaleOf[] = {2}, kPowers[] = {-1};

  template <class T>
  struct Spread {
    T log_scale, inverse;
  };
  template <class T>
  static FUSEDVAE_INLINE Spread<T> plain(const T* inputs) {
    return {inputs[2], exponential(-inputs[2])};
  }
  template <class T>
  static FUSEDVAE_INLINE Spread<T> derive(const Scale<T>* scales) {
    return {scales[0].log, scales[0].power};
  }
  template <class T>
  static FUSEDVAE_INLINE Element<T, 4> element(const T* inputs, const Spread<T>& spread, T weight) {
    const T pull = weight * spread.inverse;
    const Element<T, 2> distance = absolute_error(inputs, pull);
    const T relative = (distance.value + inputs[3]) * spread.inverse;
    return {relative + spread.log_scale, {distance.grads[0], distance.grads[1], weight - weight * relative, pull}};
  }
};

}  // namespace FUSEDVAE_NAMESPACE
}  // namespace fusedvae
