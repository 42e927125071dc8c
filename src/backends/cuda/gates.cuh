// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "backends/cuda/elements.cuh"

// Decay and beta of a token, in the arithmetic of the caller. In float32 there are no branches, not even those of a division:
// across one, nothing else is computed, and a call of few sequences has to wait for every instruction of this.
namespace gatedelta::cuda {

__device__ inline double reciprocal(double x) { return 1 / x; }
/// Of no less than 2^-126, within 2 ulp; from 2^126 on zero.
__device__ inline float reciprocal(float x) { return __fdividef(1.0f, x); }

/// log(1 + exp(x)).
__device__ inline double softplus(double x) { return x > 0 ? x + log1p(exp(-x)) : log1p(exp(x)); }
__device__ inline float softplus(float x) {
  // With t = exp(-|x|) and s = t / (2 + t), which is at most 1/3: log(1 + t) = 2 artanh(s) = 2 (s + s^3 / 3 + s^5 / 5 + ...),
  // of which less than 2e-8 is left out.
  const float t = expf(-fabsf(x)), s = t * reciprocal(2.0f + t), square = s * s;
  float sum = 1.0f / 13;
#pragma unroll
  for (int power = 11; power >= 3; power -= 2) sum = sum * square + 1.0f / static_cast<float>(power);
  return fmaxf(x, 0.0f) + 2.0f * (s + s * square * sum);
}

/// What the two are computed from, so that the loads can be on their way early.
struct GateInputs {
  RawElement gate, dt_bias, A_log, beta_input;

  /// `common`: a raw gate and logits, both bfloat16.
  template <bool common = false, class P, class Index>
  __device__ void fetch(const P& p, Index batch, Index token, unsigned h) {
    if (common || p.gate_form != GateForm::none)
      gate.fetch(p.gate, dtype<common>(p.gate.dtype), offset_of(p.gate, batch, token, h));
    if (common || p.gate_form == GateForm::raw) {
      dt_bias.fetch_if_there(p.dt_bias, offset_of(p.dt_bias, h));
      A_log.fetch(p.A_log, offset_of(p.A_log, h));
    }
    if (common || p.beta_form != BetaForm::one)
      beta_input.fetch(p.beta, dtype<common>(p.beta.dtype), offset_of(p.beta, batch, token, h));
  }

  template <class Real, bool common = false, class P>
  __device__ Real log_decay(const P& p) const {
    if (!common && p.gate_form == GateForm::none) return 0;
    Real x = gate.value(dtype<common>(p.gate.dtype));
    if (!common && p.gate_form == GateForm::log_decay) return x;
    x += static_cast<Real>(dt_bias.value(p.dt_bias.dtype));  // zero where there is none
    const Real steep = static_cast<Real>(p.softplus_beta), steep_x = steep * x;
    const Real curved = softplus(steep_x) * reciprocal(steep);
    return -exp(static_cast<Real>(A_log.value(p.A_log.dtype))) *
           (steep_x > static_cast<Real>(p.softplus_threshold) ? x : curved);
  }

  template <class Real, bool common = false, class P>
  __device__ Real beta(const P& p) const {
    if (!common && p.beta_form == BetaForm::one) return 1;
    const Real x = beta_input.value(dtype<common>(p.beta.dtype));
    if (!common && p.beta_form == BetaForm::value) return x;
    const Real sigmoid = reciprocal(1 + exp(-x));
    return common || p.beta_form == BetaForm::logits ? sigmoid : 2 * sigmoid;
  }

 private:
  template <bool common>
  __device__ static DType dtype(DType of_tensor) {
    return common ? DType::bf16 : of_tensor;
  }
};

}  // namespace gatedelta::cuda
