// The absolute error, torch.nn.functional.l1_loss.
#pragma once

#include "math/formula.h"

namespace fusedvae {
namespace FUSEDVAE_NAMESPACE {

// |recon_x - x|. Inputs: recon_x, x.
template <class T>
FUSEDVAE_INLINE Element<T, 2> absolute_error(const T* inputs, T weight) {
  const T error = inputs[0] - inputs[1];
  // The sign of the error: 0 where there is none, and where it is NaN, as PyTorch has it.
  const T d_recon = error > 0.0f ? weight : error < 0.0f ? -weight : 0.0f * weight;
  return {error < 0.0f ? -error : error, {d_recon, -d_recon}};
}

struct L1 {
  static constexpr const char* kName = "l1";
  static constexpr int kInputs = 2, kUniform = -1;
  static constexpr int kScales = 0;

  template <class T>
  static FUSEDVAE_INLINE Nothing plain(const T* /*inputs*/) {
    return {};
  }
  template <class T>
  static FUSEDVAE_INLINE Element<T, 2> element(const T* inputs, const Nothing& /*spread*/, T weight) {
    return absolute_error(inputs, weight);
  }
};

}  // namespace FUSEDVAE_NAMESPACE
}  // namespace fusedvae
