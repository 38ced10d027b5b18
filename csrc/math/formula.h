// What the formulas of the terms have in common. A formula is a struct of static members:
//
//   kName        as the Python side calls it
//   kInputs      how many inputs it has, at most kMostInputs
//   kScale       the input beside its mean: what is derived of that alone is derived once where it is uniform
//   kConstant    what `full` adds to each value
//   derive       of the scale: logarithms, exponentials and divisions, as far as they depend on nothing else
//   element      the value of an element, and its derivatives by the inputs, which are times a weight
//
// T is a number or a SIMD vector of numbers; a formula does not know which. It is written in terms of these functions,
// which are declared before its header is included: exponential(x), exponential(x, factor) for e^x times a constant
// (which costs nothing more), exponential_minus_1(x) and logarithm(x).
#pragma once

#include "math/target.h"

namespace fusedvae {

constexpr int kMostInputs = 4;

namespace FUSEDVAE_NAMESPACE {

template <class T, int inputs>
struct Element {
  T value;
  T grads[inputs];
};

}  // namespace FUSEDVAE_NAMESPACE
}  // namespace fusedvae
