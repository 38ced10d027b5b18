// The registry of formulas: every term that an objective can have. A formula's number is its place in this list.
#pragma once

#include "math/formula.h"
// (what all have in common above, each of them below)
#include "math/gaussian.h"
#include "math/kl_normal.h"
#include "math/kl_standard_normal.h"
#include "math/laplace.h"

namespace fusedvae {
namespace FUSEDVAE_NAMESPACE {

template <class... Formula>
struct List {
  static constexpr int kSize = sizeof...(Formula);
  static constexpr const char* kNames[] = {Formula::kName...};
};

using Formulas = List<GaussianNll,            //
                      GaussianNllOfVariance,  //
                      LaplaceNll,             //
                      KlStandardNormal,       //
                      KlNormal>;

template <class Formula>
struct Tag {
  using type = Formula;
};

template <class Visit, class... Formula>
FUSEDVAE_INLINE void visit_formula(int number, const Visit& visit, List<Formula...>) {
  int k = 0;
  (void)((k++ == number && (visit(Tag<Formula>{}), true)) || ...);
}

// Calls visit(Tag<Formula>) with the formula of that number.
template <class Visit>
FUSEDVAE_INLINE void with_formula(int number, const Visit& visit) {
  visit_formula(number, visit, Formulas{});
}

}  // namespace FUSEDVAE_NAMESPACE
}  // namespace fusedvae
