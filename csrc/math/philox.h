// Philox4x32-10: a counter-based generator, so that any element of the noise can be made again anywhere.
//
// Source: Salmon, Moraes, Dror & Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3"; constants of Random123.
// Word is a 64-bit lane (or a vector of them) that carries a 32-bit word in its low half; what the upper half holds
// never matters. `mul32(a, m)` is the full product of the low halves. On x86 that is one instruction, vpmuludq, on as
// many lanes as the register has; compilers do not find it in 32-bit code by themselves.
#pragma once

#include <cstdint>

#include "math/target.h"

namespace fusedvae {
namespace FUSEDVAE_NAMESPACE {

constexpr int kPhiloxRounds = 10;

template <class Word>
struct PhiloxWords {
  Word w0, w1, w2, w3;
};

FUSEDVAE_INLINE uint64_t mul32(uint64_t a, uint32_t m) {
  return (a & 0xFFFFFFFFu) * m;
}

template <class Word>
FUSEDVAE_INLINE PhiloxWords<Word> philox4x32(Word c0, Word c1, Word c2, Word c3, uint64_t seed) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const Word p0 = mul32(c0, 0xD2511F53u), p1 = mul32(c2, 0xCD9E8D57u);
    c0 = (p1 >> 32) ^ c1 ^ static_cast<uint64_t>(k0);
    c2 = (p0 >> 32) ^ c3 ^ static_cast<uint64_t>(k1);
    c1 = p1;
    c3 = p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {c0, c1, c2, c3};
}

// Uniform in (0, 1] of a word shifted right by one, as a float: the smallest, 2^-32, puts the tails at 6.6 sigma.
template <class F>
FUSEDVAE_INLINE F unit_interval(F half_word) {
  return half_word * 0x1p-31f + 0x1p-32f;
}

// Box-Muller: two uniforms to two normals, sqrt(-2 ln u0) * (cos 2 pi u1, sin 2 pi u1).
template <class F>
struct NormalPair {
  F cosine, sine;
};

template <class F>
FUSEDVAE_INLINE NormalPair<F> box_muller(F u0, F u1) {
  const F radius = root(-2.0f * log_unit(u0));
  F c, s;
  sincos_turns(u1, &s, &c);
  return {radius * c, radius * s};
}

}  // namespace FUSEDVAE_NAMESPACE
}  // namespace fusedvae
