// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "backends/cuda/elements.cuh"

// Decay and beta of a token, in the arithmetic of the caller.
namespace gatedelta::cuda {

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
    if (p.dt_bias.data != nullptr) x += static_cast<Real>(dt_bias.value(p.dt_bias.dtype));
    const Real steep = static_cast<Real>(p.softplus_beta);
    const Real softplus = steep * x > static_cast<Real>(p.softplus_threshold) ? x : log1p(exp(steep * x)) / steep;
    return -exp(static_cast<Real>(A_log.value(p.A_log.dtype))) * softplus;
  }

  template <class Real, bool common = false, class P>
  __device__ Real beta(const P& p) const {
    if (!common && p.beta_form == BetaForm::one) return 1;
    const Real x = beta_input.value(dtype<common>(p.beta.dtype));
    if (!common && p.beta_form == BetaForm::value) return x;
    const Real sigmoid = 1 / (1 + exp(-x));
    return common || p.beta_form == BetaForm::logits ? sigmoid : 2 * sigmoid;
  }

 private:
  template <bool common>
  __device__ static DType dtype(DType of_tensor) {
    return common ? DType::bf16 : of_tensor;
  }
};

}  // namespace gatedelta::cuda
