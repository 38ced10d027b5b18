// The registry of formulas: every term that an objective can have, and every divergence that can be taken beside a
// sample. The number of one is its place in its list.
#pragma once

#include "math/formula.h"
// (what all have in common above, each of them below)
#include "math/absolute_error.h"
#include "math/bernoulli.h"
#include "math/discretized_logistic.h"
#include "math/gaussian.h"
#include "math/kl_normal.h"
#include "math/kl_standard_normal.h"
#include "math/laplace.h"
#include "math/negative_binomial.h"
#include "math/poisson.h"
#include "math/squared_error.h"

namespace fusedvae {
namespace FUSEDVAE_NAMESPACE {

template <class... Formula>
struct List {
  static constexpr int kSize = sizeof...(Formula);
  static constexpr const char* kNames[] = {Formula::kName...};
};

using Formulas = List<GaussianNll,                  //
                      LaplaceNll,                   //
                      BernoulliNll,                 //
                      BernoulliNllOfProbabilities,  //
                      Mse,                          //
                      L1,                           //
                      PoissonNll,                   //
                      PoissonNllInFull,             //
                      NegativeBinomialNll,          //
                      ZeroInflatedNegativeBinomialNll, DiscretizedLogisticNll,
                      KlStandardNormal,  //
                      KlNormal>;

using Divergences = List<KlStandardNormal,          //
                         KlNormal,                  //
                         KlStandardNormalAtSample,  //
                         KlNormalAtSample>;

template <class Formula>
struct Tag {
  using type = Formula;
};

// Calls visit(Tag<Formula>) with the formula of that number in the list.
template <class Visit, class... Formula>
FUSEDVAE_INLINE void with_formula(int number, const Visit& visit, List<Formula...>) {
  int k = 0;
  (void)((k++ == number && (visit(Tag<Formula>{}), true)) || ...);
}

}  // namespace FUSEDVAE_NAMESPACE
}  // namespace fusedvae
