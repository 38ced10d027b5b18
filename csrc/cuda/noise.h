// Noise by counter: a counter's four normals go to four consecutive elements.
#pragma once

#include <cstdint>

#include "cuda/arithmetic.h"
// (the arithmetic above, the formulas below)
#include "math/philox.h"

namespace fusedvae {
namespace cuda {

using FUSEDVAE_NAMESPACE::Rounding;

// Two words to two normals, for results that are rounded like this.
template <Rounding rounding>
__device__ __forceinline__ FUSEDVAE_NAMESPACE::NormalPair<float> normal_pair(uint32_t w0, uint32_t w1) {
  using namespace FUSEDVAE_NAMESPACE;
  const auto uniform = [](uint32_t word) { return unit_interval(static_cast<float>(word >> 1)); };
  if constexpr (rounding == Rounding::to_16_bits) {
    const float radius = approximate_radius(uniform(w0));
    float s, c;
    approximate_sincos(w1, &s, &c);
    return {radius * c, radius * s};
  } else {
    return box_muller(uniform(w0), uniform(w1));
  }
}

// The normals of elements index, index + 1, ..., of which there are N: 1, 2, 4 or a multiple of 4. The index is a
// multiple of N, or of 4.
template <int N, Rounding rounding = Rounding::to_32_bits>
__device__ __forceinline__ void normals(int64_t index, uint64_t seed, float* out) {
  for (int first = 0; first < N; first += 4) {
    const uint64_t counter = (static_cast<uint64_t>(index) >> 2) + static_cast<uint64_t>(first / 4);
    const auto w = FUSEDVAE_NAMESPACE::philox4x32<uint32_t>(static_cast<uint32_t>(counter),
                                                            static_cast<uint32_t>(counter >> 32), 0, 0, seed);
    if constexpr (N >= 4) {
      const auto p = normal_pair<rounding>(w.w0, w.w1), q = normal_pair<rounding>(w.w2, w.w3);
      out[first] = p.cosine;
      out[first + 1] = p.sine;
      out[first + 2] = q.cosine;
      out[first + 3] = q.sine;
    } else {
      const bool second = index & 2;
      const auto p = normal_pair<rounding>(second ? w.w2 : w.w0, second ? w.w3 : w.w1);
      if constexpr (N == 2) {
        out[0] = p.cosine;
        out[1] = p.sine;
      } else {
        out[0] = index & 1 ? p.sine : p.cosine;
      }
    }
  }
}

}  // namespace cuda
}  // namespace fusedvae
