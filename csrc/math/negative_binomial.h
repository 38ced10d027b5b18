// The negative binomial likelihood of counts, by mean and inverse dispersion, and the same with more zeros. The
// parameterisation and the smallest mean are those of scvi-tools (Gayoso et al. 2022, doi:10.1038/s41587-021-01206-w;
// log_nb_positive and log_zinb_positive), the distribution that of Lopez et al. 2018 (doi:10.1038/s41592-018-0229-2).
#pragma once

#include "math/formula.h"
#include "math/gamma.h"
#include "math/scale.h"

namespace fusedvae {
namespace FUSEDVAE_NAMESPACE {

// What is added to the mean and to theta where their logarithms are taken.
constexpr double kCountEps = 1e-8;

// A value, and its derivatives.
template <class T>
struct NegativeBinomial {
  T value, d_mu, d_x, d_theta;
};

// With m = mu + eps, a = theta + eps and s = theta + mu + eps:
//
//   theta log(s / a) + x log(s / m) - lgamma(x + theta) + lgamma(theta) + lgamma(x + 1)
//
// No log-gamma function is computed: where theta is large these would cancel, all but a part in a million. By
// Stirling's formula of 1 + x = k, of t = theta and of n = k + t - 1 (where theta < 1, of t = theta + 1 and n = k + t -
// 1, and the recurrence of the gamma function, `low`), the logarithms join those of the other terms:
//
//   -theta log(a n / (s t)) - x log(m n / (s k)) + log(2 pi k (n / t)^+-1) / 2 [- 1 + log((x + theta) / theta)]
//     + r(k) + r(t) - r(n)
//
// with Binet's function r. Of ratios next to 1 these are gaps (`log_of_ratio`) and first terms, whose sum is 1 - eps (x
// + theta) / s: a sum of parts that are small if the whole is. Source of the method: Loader 2000, "Fast and accurate
// computation of binomial probabilities". NaN but for finite mu >= 0, theta > 0, x >= 0.
template <class T>
FUSEDVAE_OUTLINE NegativeBinomial<T> negative_binomial(T mu, T x, T theta) {
  const T eps = number<T>(kCountEps), zero = number<T>(0), one = number<T>(1);
  const auto is_low = theta < 1.0f;
  const T low = is_low ? one : zero;
  const T k = x + 1.0f, t = theta + low, n = x + t, m = mu + eps, s = theta + m, total = x + theta;
  const T k_inverse = 1.0f / k, t_inverse = 1.0f / t, n_inverse = 1.0f / n, s_inverse = 1.0f / s;
  const T total_inverse = low / total;  // where it is needed

  const LogOfRatio<T> v =
      log_of_ratio(((theta + eps) * t_inverse) * (n * s_inverse),
                   (theta * t_inverse) * ((x - mu) * s_inverse) + ((eps * x - low * mu) * t_inverse) * s_inverse);
  const T w_ratio = (m * s_inverse) * (n * k_inverse);
  const LogOfRatio<T> w =
      log_of_ratio(w_ratio, ((theta * s_inverse) * (m - k) - (1.0f - low) * (m * s_inverse)) * k_inverse);
  const T spread = root(number<T>(6.28318530717958648) * k * (is_low ? t * n_inverse : n * t_inverse));
  const T log_spread = logarithm(is_low ? spread * (total / theta) : spread);
  const Binet<T> of_k = binet(k_inverse), of_t = binet(t_inverse), of_n = binet(n_inverse);
  const T slopes = x == 0.0f ? zero : of_n.slope - of_t.slope;  // of two that are equal, one may be rounded once more

  const T high_part = (theta * v.gap + k * w.gap) + (w.log - eps * (total * s_inverse));
  const T low_part = -(theta * v.log + x * w.log) - 1.0f;
  const T others = log_spread + (of_k.value + (of_t.value - of_n.value));
  const T value = (is_low ? low_part : high_part) + others;

  const T d_mu = (theta * s_inverse) * ((m - x) / m);
  const T d_theta = (v.gap + (low - eps) * (x * t_inverse) * s_inverse + eps * (mu * s_inverse) / (theta + eps)) -
                    ((0.5f * x * n_inverse) * t_inverse + slopes + x * total_inverse / theta);
  const T d_x = (of_k.slope - of_n.slope) - 0.5f * (k_inverse - n_inverse) - w.log + total_inverse;
  const T top = number<T>(INFINITY);
  const auto is_known = (mu >= 0.0f) & (mu < top) & (theta > 0.0f) & (theta < top) & (x >= 0.0f) & (x < top);
  const T valid = is_known ? one : number<T>(NAN);
  return {valid * (x == 0.0f ? -theta * v.log : value), valid * d_mu, valid * d_x, valid * d_theta};
}

// Inputs: recon_x (mu), x, theta (a scale).
struct NegativeBinomialNll {
  static constexpr const char* kName = "negative_binomial_nll";
  static constexpr int kInputs = 3, kUniform = -1;
  static constexpr int kScales = 1, kScaleOf[] = {2}, kPowers[] = {1};

  template <class T>
  struct Dispersion {
    T theta;
  };
  template <class T>
  static FUSEDVAE_INLINE Dispersion<T> plain(const T* inputs) {
    return {exponential(inputs[2])};
  }
  template <class T>
  static FUSEDVAE_INLINE Dispersion<T> derive(const Scale<T>* scales) {
    return {scales[0].power};
  }
  template <class T>
  static FUSEDVAE_INLINE Element<T, 3> element(const T* inputs, const Dispersion<T>& of, T weight) {
    const NegativeBinomial<T> nb = negative_binomial(inputs[0], inputs[1], of.theta);
    return {nb.value, {weight * nb.d_mu, weight * nb.d_x, weight * (nb.d_theta * of.theta)}};
  }
};

// -log of (1 - p) e^-nb, and for x < eps of p + (1 - p) e^-nb, with the probability p of a dropout of which zi_logits
// are the logits. Inputs: recon_x (mu), x, theta (a scale), zi_logits.
struct ZeroInflatedNegativeBinomialNll {
  static constexpr const char* kName = "zero_inflated_negative_binomial_nll";
  static constexpr int kInputs = 4, kUniform = -1;
  static constexpr int kScales = 1, kScaleOf[] = {2}, kPowers[] = {1};

  template <class T>
  using Dispersion = NegativeBinomialNll::Dispersion<T>;
  template <class T>
  static FUSEDVAE_INLINE Dispersion<T> plain(const T* inputs) {
    return NegativeBinomialNll::plain(inputs);
  }
  template <class T>
  static FUSEDVAE_INLINE Dispersion<T> derive(const Scale<T>* scales) {
    return NegativeBinomialNll::derive(scales);
  }
  template <class T>
  static FUSEDVAE_INLINE Element<T, 4> element(const T* inputs, const Dispersion<T>& of, T weight) {
    const T a = inputs[3], zero = number<T>(0);
    const auto is_zero = (inputs[1] < number<T>(kCountEps)) & (inputs[1] >= 0.0f);
    const NegativeBinomial<T> nb = negative_binomial(inputs[0], is_zero ? zero : inputs[1], of.theta);
    const Derived<T> dropout = softplus(a), kept = softplus(-a);
    // Of a zero: log(p + (1 - p) e^-nb) = log(1 + lost) with lost = (1 - p) (e^-nb - 1); where hardly anything is left
    // of the 1, log(e^a + e^-nb) - softplus(a).
    const T lost = kept.slope * exponential_minus_1(-nb.value), reached = a + nb.value;
    const auto is_near = lost > -0.5f;
    const T smaller = exponential(reached < 0.0f ? reached : -reached);
    const T log = logarithm_of_1_plus(is_near ? lost : smaller);
    const T larger = reached < 0.0f ? -nb.value : a;
    const T of_zero = is_near ? -log : (dropout.value - larger) - log;
    // The derivatives by nb and by a: the probability that it is no dropout, and how much less that has become.
    const T half = 1.0f / (1.0f + smaller);
    const T share = reached < 0.0f ? half : smaller * half, rest = reached < 0.0f ? smaller * half : half;
    const T d_a = is_near ? lost * dropout.slope / (1.0f + lost) : dropout.slope - rest;
    const T of_nb = weight * (is_zero ? share : number<T>(1));
    return {is_zero ? of_zero : nb.value + dropout.value,
            {of_nb * nb.d_mu, is_zero ? zero : of_nb * nb.d_x, of_nb * (nb.d_theta * of.theta),
             weight * (is_zero ? d_a : dropout.slope)}};
  }
};

}  // namespace FUSEDVAE_NAMESPACE
}  // namespace fusedvae
