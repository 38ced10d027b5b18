// The latent over the tiles of an extent: its sample, its divergence from the standard normal, and their gradients.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "cpu/elementwise.h"
#include "math/sample.h"

namespace fusedvae {
namespace FUSEDVAE_NAMESPACE {

template <class T>
struct LatentArrays {
  const T *mu, *logvar, *noise, *grad_z, *grad_kl;
  T *z, *kl, *grad_mu, *grad_logvar;
};

// sigma = e^(logvar/2) and e^logvar - 1 from one exponential: expm1(l) = t^2 + 2t with t = expm1(l/2). What overflows
// in t^2 does so in e^logvar.
FUSEDVAE_INLINE void deviation_of(vf logvar, vf* sigma, vf* expm1_logvar) {
  const ExpPair half = exp_pair(0.5f * logvar);
  *sigma = half.exp;
  *expm1_logvar = half.expm1 * half.expm1 + (half.expm1 + half.expm1);
}
FUSEDVAE_INLINE void deviation_of(double logvar, double* sigma, double* expm1_logvar) {
  *sigma = std::exp(0.5 * logvar);
  *expm1_logvar = std::expm1(logvar);
}

// Returns the sum of the KL.
template <class T>
double latent_arrays(const LatentArrays<T> a, int64_t count) {  // by value: no store can change it
  using P = typename Pack<T>::type;
  using Kl = KlStandardNormal;
  struct Fetched {
    P mu, logvar, noise, grad_z, grad_kl;
  };
  const auto fetch = [=](int64_t i, const auto& load) FUSEDVAE_LAMBDA {
    return Fetched{load(a.mu + i), load(a.logvar + i), a.noise ? load(a.noise + i) : P{},
                   a.grad_z ? load(a.grad_z + i) : P{}, a.grad_kl ? load(a.grad_kl + i) : P{}};
  };
  const auto visit = [=](int64_t i, const Fetched& in, const auto& store) FUSEDVAE_LAMBDA {
    P sigma, expm1_logvar;
    deviation_of(in.logvar, &sigma, &expm1_logvar);
    const P inputs[] = {in.mu, in.logvar};
    const Element<P, 2> kl = Kl::element(inputs, Kl::Scale<P>{expm1_logvar}, in.grad_kl);
    if (a.kl) store(a.kl + i, kl.value);
    const Sample<P> z = sample(in.mu, sigma, in.noise);
    if (a.z) store(a.z + i, z.value);
    if (a.grad_mu || a.grad_logvar) {
      // Only what comes in is added: nothing times a mean that is infinite would be a NaN.
      P d_mu = {}, d_logvar = {};
      if (a.grad_z) {
        d_mu = in.grad_z;
        d_logvar = in.grad_z * z.d_logvar;
      }
      if (a.grad_kl) {
        d_mu += kl.grads[0];
        d_logvar += kl.grads[1];
      }
      if (a.grad_mu) store(a.grad_mu + i, d_mu);
      if (a.grad_logvar) store(a.grad_logvar + i, d_logvar);
    }
    return kl.value;
  };
  return sum_of_packs<T, true>(count, fetch, visit);
}

// Runs the task, its loop by way of `run_loop`; `totals`, unless null, receives the KL of each sample.
template <class T>
void run_latent(const LatentTask& task, double* totals, const RunLoop& run_loop) {
  const Extent& e = task.extent;
  const Tiling tiling(e);
  ValueSums<T> values(totals, true, e, tiling);
  const uint64_t seed = task.seed ? static_cast<uint64_t>(*task.seed) : 0;
  for (const Operand* op : {&task.z, &task.grad_mu, &task.grad_logvar}) prefer_huge_pages(*op, e);

  const auto body = [&](int64_t first, int64_t last) {
    alignas(kLine) T mu_buffer[kTile], logvar_buffer[kTile], noise_buffer[kTile], d_z_buffer[kTile], d_kl_buffer[kTile];
    alignas(kLine) T z_buffer[kTile], kl_buffer[kTile], d_mu_buffer[kTile], d_logvar_buffer[kTile];
    alignas(kLine) float scratch[kTile + kNoisePad], made[kTile + kNoisePad];
    for (int64_t k = first; k < last; ++k) {
      const Tile t = tiling[k];
      const int64_t n = t.count();
      LatentArrays<T> a{};
      a.mu = read(task.mu, t, mu_buffer);
      a.logvar = read(task.logvar, t, logvar_buffer);
      if (task.seed) {
        const float* const noise = read_noise(task.index, t, seed, scratch, made);
        if constexpr (sizeof(T) == sizeof(float)) {
          a.noise = noise;
        } else {
          widen_array(noise, noise_buffer, n);
          a.noise = noise_buffer;
        }
      } else if (task.noise) {
        a.noise = read(task.noise, t, noise_buffer);
      }
      if (task.grad_z) a.grad_z = read(task.grad_z, t, d_z_buffer);
      if (task.grad_kl) a.grad_kl = read(task.grad_kl, t, d_kl_buffer);
      if (task.z) a.z = array_for(task.z, t, z_buffer, false);
      if (values.needs_values(t)) a.kl = kl_buffer;
      if (task.grad_mu) a.grad_mu = array_for(task.grad_mu, t, d_mu_buffer, false);
      if (task.grad_logvar) a.grad_logvar = array_for(task.grad_logvar, t, d_logvar_buffer, false);
      const double total = latent_arrays(a, n);
      if (task.z) write(task.z, t, a.z, z_buffer, false);
      if (task.grad_mu) write(task.grad_mu, t, a.grad_mu, d_mu_buffer, false);
      if (task.grad_logvar) write(task.grad_logvar, t, a.grad_logvar, d_logvar_buffer, false);
      values.take(k, t, total, kl_buffer);
    }
  };
  run_loop({tiling.count(), body}, e.count() * (task.seed ? 4 : 1));
  values.add_up();
}

inline void dispatch_latent(const LatentTask& task, double* totals, const RunLoop& run_loop) {
  if (task.in_double)
    run_latent<double>(task, totals, run_loop);
  else
    run_latent<float>(task, totals, run_loop);
}

}  // namespace FUSEDVAE_NAMESPACE
}  // namespace fusedvae
