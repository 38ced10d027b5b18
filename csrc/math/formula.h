// What the formulas of the terms have in common. A formula is a struct of static members:
//
//   kName        as the Python side calls it
//   kInputs      how many inputs it has, at most kMostInputs
//   kScales      how many of them are scales: kScaleOf says which, kPowers what is wanted of each (see scale_of)
//   kUniform     the input that is most often one number for all elements; -1 for none
//   plain        of the inputs, where each scale is the logarithm of what the formula is written in: exponentials and
//                divisions, as far as they depend on scales alone
//   derive       the same, of scales in any form
//   element      the value of an element, and its derivatives by the inputs (by a scale: by its logarithm), which are
//                times a weight
//
// T is a number or a SIMD vector of numbers; a formula does not know which. It is written in terms of these functions,
// which are declared before its header is included: exponential(x), exponential(x, factor) for e^x times a constant
// (which costs nothing more), exponential_minus_1(x), logarithm(x), logarithm_of_1_plus(x) for x in [-1, 1], the
// same of an x in [0, 1] whose 1 / (1 + x) is known, root(x),
// and number<T>(value), a T that is this number in all lanes.
//
// A divergence can be taken beside a sample (math/sample.h), and says so: kIsAtSample is whether it depends on that.
// Then it has `at_sample` instead of `element`.
#pragma once

#include "math/target.h"

namespace fusedvae {

constexpr int kMostInputs = 4, kMostScales = 2;

namespace FUSEDVAE_NAMESPACE {

template <class T, int inputs>
struct Element {
  T value;
  T grads[inputs];
};

// What a formula without scales derives of them.
struct Nothing {};

}  // namespace FUSEDVAE_NAMESPACE
}  // namespace fusedvae
