// The reparameterised sample. Source: Kingma & Welling 2014 (arXiv:1312.6114), section 2.4.
#pragma once

#include "math/target.h"

namespace fusedvae {
namespace FUSEDVAE_NAMESPACE {

// z = mu + sigma * noise, where sigma = e^(logvar / 2); d_logvar = dz/dlogvar, while dz/dmu = 1.
template <class T>
struct Sample {
  T value, d_logvar;
};

template <class T>
FUSEDVAE_INLINE Sample<T> sample(T mu, T sigma, T noise) {
  const T deviation = sigma * noise;
  return {mu + deviation, 0.5f * deviation};
}

}  // namespace FUSEDVAE_NAMESPACE
}  // namespace fusedvae
