// The reparameterised sample, with a divergence beside it. Source: Kingma & Welling 2014 (arXiv:1312.6114),
// section 2.4.
#pragma once

#include "math/formula.h"
#include "math/scale.h"

namespace fusedvae {
namespace FUSEDVAE_NAMESPACE {

// The element of a formula that depends on the sample too: its derivatives by the inputs where z stays the same, and
// that by z.
template <class T, int inputs>
struct AtSample {
  Element<T, inputs> element;
  T d_z;
};

// A divergence's element beside the sample z.
template <class Divergence, class T, class Spread>
FUSEDVAE_INLINE AtSample<T, Divergence::kInputs> divergence_at(const T* inputs, const Spread& spread, T z, T noise,
                                                               T weight) {
  if constexpr (Divergence::kIsAtSample)
    return Divergence::at_sample(inputs, spread, z, noise, weight);
  else
    return {Divergence::element(inputs, spread, weight), number<T>(0)};
}

}  // namespace FUSEDVAE_NAMESPACE
}  // namespace fusedvae
