// Philox4x32-10: a counter-based generator, so that any element of the noise can be made again anywhere.
//
// Source: Salmon, Moraes, Dror & Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3"; constants of Random123.
// Word is a 32-bit word; or a 64-bit lane (or a vector of them) that carries one in its low half, where what the upper
// half holds never matters. `mul32(a, m)` is the full product of the low halves. On x86 that is one instruction,
// vpmuludq, on as many lanes as the register has; compilers do not find it in 32-bit code by themselves.
#pragma once

#include <cstdint>
#include <type_traits>

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

// Its two halves.
template <class Word>
struct Product {
  Word low, high;
};
template <class Word>
FUSEDVAE_INLINE Product<Word> product_of(Word a, uint32_t m) {
  const Word whole = mul32(a, m);
  return {whole, whole >> 32};
}
FUSEDVAE_INLINE Product<uint32_t> product_of(uint32_t a, uint32_t m) {
#if defined(__CUDA_ARCH__)
  return {a * m, __umulhi(a, m)};  // of one 64-bit product the compiler would make 64-bit words
#else
  const uint64_t whole = static_cast<uint64_t>(a) * m;
  return {static_cast<uint32_t>(whole), static_cast<uint32_t>(whole >> 32)};
#endif
}

template <class Word>
FUSEDVAE_INLINE PhiloxWords<Word> philox4x32(Word c0, Word c1, Word c2, Word c3, uint64_t seed) {
  using Key = std::conditional_t<sizeof(Word) == 4, uint32_t, uint64_t>;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#if !defined(__CUDACC__)  // which unrolls it unasked
#pragma GCC unroll 10
#endif
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const auto p0 = product_of(c0, 0xD2511F53u), p1 = product_of(c2, 0xCD9E8D57u);
    c0 = p1.high ^ c1 ^ Key(k0);
    c2 = p0.high ^ c3 ^ Key(k1);
    c1 = p1.low;
    c3 = p0.low;
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
  const F radius = radius_of(u0);
  F c, s;
  sincos_turns(u1, &s, &c);
  return {radius * c, radius * s};
}

}  // namespace FUSEDVAE_NAMESPACE
}  // namespace fusedvae
