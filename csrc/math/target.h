// What the formula headers need to know of the compiler that reads them.
#pragma once

#include <type_traits>

#if defined(__CUDACC__)
#define FUSEDVAE_INLINE __host__ __device__ __forceinline__
#else
#define FUSEDVAE_INLINE inline __attribute__((always_inline))
#define FUSEDVAE_LAMBDA __attribute__((always_inline))
#endif

// Of what is so long that a call costs nothing beside it, and that loops of every kind would else have a copy of. GPUs
// call nothing: what a call leaves of the registers is not enough.
#if defined(__CUDACC__)
#define FUSEDVAE_OUTLINE FUSEDVAE_INLINE
#else
#define FUSEDVAE_OUTLINE __attribute__((noinline))
#endif

// The CPU kernels are compiled once an instruction set. Each copy lives in a namespace of its own, so that the linker
// can never put the AVX-512 version of an inline function where a machine without AVX-512 will call it.
#if defined(FUSEDVAE_ISA)
#define FUSEDVAE_NAMESPACE FUSEDVAE_ISA
#else
#define FUSEDVAE_NAMESPACE scalar
#endif

namespace fusedvae {
namespace FUSEDVAE_NAMESPACE {

// Whether T is float64, or a vector of it.
template <class T>
constexpr bool kIsDouble = std::is_same_v<T, double>;

// A number, or a vector with this number in all lanes.
template <class T>
FUSEDVAE_INLINE T number(double value);

}  // namespace FUSEDVAE_NAMESPACE
}  // namespace fusedvae
