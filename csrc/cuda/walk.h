// What a thread does with the elements of its share: the likelihood's formulas, and the latent's.
//
// A walk fetches the operands of an element (or vector of elements), and later applies the formulas to what it fetched.
#pragma once

#include <cstdint>

#include "cuda/access.h"
#include "cuda/arithmetic.h"
#include "cuda/noise.h"
#include "cuda/sums.h"
#include "math/gaussian.h"
#include "tasks.h"

namespace fusedvae {
namespace cuda {

// Blocks on a multiprocessor. Four leave a thread 64 registers, and put half of the threads on it that it can hold:
// with three operands of 16 bytes a thread, 48 KB are on their way, more than twice what the multiprocessor's share of
// the memory's latency asks for. Eight elements at a time need more registers, and with two blocks still have enough on
// their way. So do the elementary functions of float64, which is here for exactness, not speed.
template <class A>
constexpr int kWalkBlocks = A::V == 8 || std::is_same_v<typename A::T, double> ? 2
                            : A::V == 4                                        ? 4
                                                                               : 3;

// Runs a walk over the thread's share, with a few fetches under way at a time.
template <class A, class Walk>
__device__ __forceinline__ void run(Walk& walk, const Share& share, int team, const Extent& extent) {
  constexpr int kAhead = Walk::kAhead;
  for (int first = share.lane * A::V; first < share.length; first += kAhead * team * A::V) {
    typename Walk::Fetched fetched[kAhead];
    Position at[kAhead];
    FUSEDVAE_UNROLL
    for (int k = 0; k < kAhead; ++k) {
      const int offset = first + k * team * A::V;
      if (offset < share.length) fetched[k] = walk.fetch(at[k] = position_of(share.begin + offset, extent));
    }
    FUSEDVAE_UNROLL
    for (int k = 0; k < kAhead; ++k)
      if (first + k * team * A::V < share.length) walk.apply(at[k], fetched[k]);
  }
}

// What becomes of the gradient of spread: written an element at a time, or summed over what spread is broadcast along:
// over inner (and perhaps more), or over batch and outer alone, which leaves a value a column.
enum class SpreadGradient { none, element, summed, by_column };

template <class A, bool by_column>
class NllWalk {
 public:
  using T = typename A::T;
  struct Fetched {
    Bits recon_x, x, spread;
  };
  static constexpr int kAhead = A::V == 1 ? 2 : 1;
  T sum = 0, spread_sum = 0;  // of the values, of the gradients of spread
  Lanes<A> column_sums{};     // of the gradients of spread, for each of the columns that the thread is at

  __device__ __forceinline__ NllWalk(const NllTask& task, SpreadGradient spread_gradient)
      : task_(task), spread_gradient_(spread_gradient) {
    if (task.spread.is_uniform()) uniform_precision_ = precision_of(get<T>(task.spread, 0), &uniform_logvar_);
  }

  __device__ __forceinline__ Fetched fetch(const Position& at) const {
    return {cuda::fetch<A>(task_.recon_x, at), cuda::fetch<A>(task_.x, at),
            task_.spread.is_uniform() ? Bits{} : cuda::fetch<A>(task_.spread, at)};
  }

  __device__ __forceinline__ void apply(const Position& at, const Fetched& fetched) {
    const Lanes<A> recon_x = unpack<A>(task_.recon_x, fetched.recon_x), x = unpack<A>(task_.x, fetched.x);
    const Lanes<A> spread = unpack<A>(task_.spread, fetched.spread), weight = weight_.at(at);
    Lanes<A> value, d_recon, d_x, d_spread;
    FUSEDVAE_UNROLL
    for (int j = 0; j < A::V; ++j) {
      T logvar = uniform_logvar_, precision = uniform_precision_;
      if (!task_.spread.is_uniform()) precision = precision_of(spread.at[j], &logvar);
      const auto g = FUSEDVAE_NAMESPACE::gaussian_nll<T>(recon_x.at[j], x.at[j], logvar, T(0.5), T(0.5) * precision);
      const T w = task_.weight.given ? weight.at[j] : T(1);
      value.at[j] = g.value;
      d_recon.at[j] = w * g.d_recon;
      d_x.at[j] = -d_recon.at[j];
      d_spread.at[j] = w * (task_.is_variance ? g.d_logvar * precision : g.d_logvar);
      sum += g.value;
      if constexpr (by_column)
        column_sums.at[j] += d_spread.at[j];
      else
        spread_sum += d_spread.at[j];
    }
    write<A>(task_.value, at, value);
    write<A>(task_.grad_recon_x, at, d_recon);
    write<A>(task_.grad_x, at, d_x);
    if (spread_gradient_ == SpreadGradient::element) write<A>(task_.grad_spread, at, d_spread);
  }

 private:
  // 1 / variance, and the variance's logarithm.
  __device__ __forceinline__ T precision_of(T spread, T* logvar) const {
    if (task_.is_variance) {
      const T eps = static_cast<T>(task_.eps), variance = spread < eps ? eps : spread;
      *logvar = FUSEDVAE_NAMESPACE::logarithm(variance);
      return T(1) / variance;
    }
    *logvar = spread;
    return FUSEDVAE_NAMESPACE::exponential(-spread);
  }

  const NllTask& task_;
  const SpreadGradient spread_gradient_;
  const Factor<A> weight_{task_.weight};
  T uniform_logvar_ = 0, uniform_precision_ = 0;
};

// `with_sample`: there may be noise and a gradient of z, else the KL alone. The factor multiplies grad_kl.
template <class A, bool with_sample>
class LatentWalk {
 public:
  using T = typename A::T;
  struct Fetched {
    Bits mu, logvar, noise, grad_z;
  };
  static constexpr int kAhead = A::V == 1 ? 2 : 1;
  T sum = 0;  // of the KL

  __device__ __forceinline__ LatentWalk(const LatentTask& task, T grad_kl_factor)
      : task_(task), grad_kl_factor_(grad_kl_factor) {
    if (with_sample && task.seed) seed_ = static_cast<uint64_t>(*task.seed);
  }

  __device__ __forceinline__ Fetched fetch(const Position& at) const {
    Fetched fetched{};
    fetched.mu = cuda::fetch<A>(task_.mu, at);
    fetched.logvar = cuda::fetch<A>(task_.logvar, at);
    if constexpr (with_sample) {
      fetched.noise = cuda::fetch<A>(task_.noise, at);
      fetched.grad_z = cuda::fetch<A>(task_.grad_z, at);
    }
    return fetched;
  }

  __device__ __forceinline__ void apply(const Position& at, const Fetched& fetched) {
    const Lanes<A> mu = unpack<A>(task_.mu, fetched.mu), logvar = unpack<A>(task_.logvar, fetched.logvar);
    const Lanes<A> grad_kl = grad_kl_.at(at);
    Lanes<A> noise{}, grad_z{}, z, d_mu, d_logvar;
    if constexpr (with_sample) {
      grad_z = unpack<A>(task_.grad_z, fetched.grad_z);
      if (task_.seed) {
        float made[A::V];
        const IndexStrides& index = task_.index;
        normals<A::V>(at.batch * index.batch + at.outer * index.outer + at.inner * index.inner, seed_, made);
        FUSEDVAE_UNROLL
        for (int j = 0; j < A::V; ++j) noise.at[j] = static_cast<T>(made[j]);
      } else {
        noise = unpack<A>(task_.noise, fetched.noise);
      }
    }
    FUSEDVAE_UNROLL
    for (int j = 0; j < A::V; ++j) {
      const T l = logvar.at[j];
      const auto kl =
          FUSEDVAE_NAMESPACE::kl_standard_normal<T>(mu.at[j], l, FUSEDVAE_NAMESPACE::exponential_minus_1(l));
      sum += kl.value;
      d_mu.at[j] = 0;
      d_logvar.at[j] = 0;
      if constexpr (with_sample) {
        const auto s =
            FUSEDVAE_NAMESPACE::sample<T>(mu.at[j], FUSEDVAE_NAMESPACE::exponential(T(0.5) * l), noise.at[j]);
        z.at[j] = s.value;
        if (task_.grad_z.given) {
          d_mu.at[j] = grad_z.at[j];
          d_logvar.at[j] = grad_z.at[j] * s.d_logvar;
        }
      }
      if (task_.grad_kl.given) {
        const T g = grad_kl.at[j] * grad_kl_factor_;
        d_mu.at[j] += g * kl.d_mu;
        d_logvar.at[j] += g * kl.d_logvar;
      }
    }
    if constexpr (with_sample) write<A>(task_.z, at, z);
    write<A>(task_.grad_mu, at, d_mu);
    write<A>(task_.grad_logvar, at, d_logvar);
  }

 private:
  const LatentTask& task_;
  const T grad_kl_factor_;
  const Factor<A> grad_kl_{task_.grad_kl};
  uint64_t seed_ = 0;
};

}  // namespace cuda
}  // namespace fusedvae
