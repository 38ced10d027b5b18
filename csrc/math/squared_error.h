// The squared error, torch.nn.functional.mse_loss.
#pragma once

#include "math/formula.h"

namespace fusedvae {
namespace FUSEDVAE_NAMESPACE {

// (recon_x - x)^2. Inputs: recon_x, x.
struct Mse {
  static constexpr const char* kName = "mse";
  static constexpr int kInputs = 2, kUniform = -1;
  static constexpr int kScales = 0;

  template <class T>
  static FUSEDVAE_INLINE Nothing plain(const T* /*inputs*/) {
    return {};
  }
  template <class T>
  static FUSEDVAE_INLINE Element<T, 2> element(const T* inputs, const Nothing& /*spread*/, T weight) {
    const T error = inputs[0] - inputs[1], d_recon = (weight + weight) * error;
    return {error * error, {d_recon, -d_recon}};
  }
};

}  // namespace FUSEDVAE_NAMESPACE
}  // namespace fusedvae
