// SPDX-License-Identifier: Apache-2.0
// 10,000 decode steps with a replay window stay with the float64 recurrence: within a bound, and as close as plain decoding
// with a bf16 state does. The keys are bf16 numbers, as those of models.
//
// The bound. With E the error of the state that checkpoint and entries stand for,
//     E_t = exp(g_t) E_{t-1} (I - beta k k^T) + D_t
// and the factor in brackets does not increase a norm. D_t is what a step rounds off: float32 arithmetic, at most
// f = 2^-24 (sqrt(K + V + W + 1) + 8) ||S_t|| as in long_run_test.cpp with the sum over the window's W entries, and the
// rounding of an entry u k^T. Its key is stored as given, which is exact. An element of the correction is off by at most the
// unit r of its dtype (2^-8 for bf16, 2^-24 for f32) times itself, so that u k^T is off by at most r ||u k^T|| = r ||u_t||,
// with u_t = beta (v - S k^) here, as the norm of k^ is at most 1. A fold
// rounds the checkpoint: at most c ||S_t||, with the unit c of the state's dtype, once in W steps. All of these are
// independent, so their squares add up:
//     limit_t^2 = exp(2 g_t) limit_{t-1}^2 + f^2 + r^2 ||u_t||^2 (+ c^2 ||S_t||^2 at a fold)
//
// Plain decoding with a bf16 state rounds c ||S_t|| at every step. Where the state holds many tokens, ||S_t|| is a multiple of
// ||u_t||, and the window has to be the closer one. Where the decay leaves hardly more than the last token, S_t is u k^T: plain
// decoding rounds the elements of that product, the window those of one factor. The roundings' relative errors have the same
// distribution, so the mean squares are the same, but for chance: one rounding serves K elements of a row. The relative
// squares of 99 samples of V roundings, weighted by u^2, vary by sqrt(3 * 1.8 / 6400) = 3 per cent (kurtosis 3 of u, 1.8 of
// the rounding), their root by half of that: 1.05 is three standard deviations.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "gatedelta/gatedelta.hpp"
#include "verify/random.hpp"

using namespace gatedelta;

namespace {

constexpr std::int64_t K = 64, V = 64, W = 16, steps = 10'000;

struct Decoder {
  GatedDeltaRule op;
  std::vector<float> pool_f32;
  std::vector<bfloat16> pool_bf16;
  TensorView pool;
  std::vector<std::byte> layer, record;
  ReplayWindow window;

  static Config config(DType state) {
    Config out;
    out.q_heads = out.k_heads = out.v_heads = 1;
    out.key_dim = K;
    out.value_dim = V;
    out.gate = GateForm::log_decay;
    out.beta = BetaForm::value;
    out.dtypes.state = state;
    out.num_threads = 1;
    return out;
  }

  Decoder(Backend& backend, DType state, bool with_window, DType entries) : op(config(state), backend) {
    pool_f32.assign(V * K, 0.0f);
    pool_bf16.assign(V * K, bfloat16{});
    pool = state == DType::f32 ? view(pool_f32.data(), {1, 1, V, K}) : view(pool_bf16.data(), {1, 1, V, K});
    if (!with_window) return;
    const WindowLayout layout = window_layout(op.config(), 1, W, entries, 1);
    layer.resize(layout.layer_bytes);
    record.resize(layout.record_bytes);
    window = window_at(layout, layer.data(), record.data());
    op.reset({.record = window.record});
  }

  void step(Arguments call) {
    call.state = pool;
    if (window.keys.defined()) call.window = &window;
    op.forward(call);
    if (!window.keys.defined()) return;
    const std::int32_t one = 1;
    AcceptArguments accept;
    accept.record = window.record;
    accept.accepted = view(&one, {1});
    accept.tokens = 1;
    op.accept(accept);
  }

  double error(const std::vector<double>& exact) const {
    std::vector<float> state(V * K);
    if (window.keys.defined()) {
      const std::int32_t slot = 0;
      FoldArguments look;
      look.window = window;
      look.state = pool;
      look.slots = view(&slot, {1});
      look.out = view(state.data(), {1, 1, V, K});
      op.state_of(look);
    } else {
      for (std::int64_t i = 0; i < V * K; ++i) state[i] = pool.dtype == DType::f32 ? pool_f32[i] : to_float(pool_bf16[i]);
    }
    double squares = 0;
    for (std::int64_t i = 0; i < V * K; ++i) squares += std::pow(state[i] - exact[i], 2);
    return std::sqrt(squares);
  }
};

void run(Backend& backend, double slowest, double fastest) {
  verify::Random random(7, backend.name());
  struct Subject {
    DType state, entries;
    double squares = 0, sum = 0, worst = 0;
  };
  Subject subjects[] = {{DType::f32, DType::f32}, {DType::f32, DType::bf16}, {DType::bf16, DType::bf16}};
  std::vector<Decoder> decoders;
  for (const Subject& s : subjects) decoders.emplace_back(backend, s.state, true, s.entries);
  Decoder plain(backend, DType::bf16, false, DType::f32);
  double plain_sum = 0;
  std::vector<double> S(V * K, 0.0);
  std::vector<float> q(K), k(K), v(V), o(V);
  for (std::int64_t t = 0; t < steps; ++t) {
    for (float& x : q) x = static_cast<float>(random.normal());
    for (float& x : k) x = to_float(to_bfloat16(static_cast<float>(random.normal())));
    for (float& x : v) x = static_cast<float>(random.normal());
    const auto g = static_cast<float>(-random.uniform(slowest, fastest)), beta = static_cast<float>(random.uniform());
    Arguments call;
    call.q = view(q.data(), {1, 1, 1, K});
    call.k = view(k.data(), {1, 1, 1, K});
    call.v = view(v.data(), {1, 1, 1, V});
    call.o = view(o.data(), {1, 1, 1, V});
    call.g = view(&g, {1, 1, 1});
    call.beta = view(&beta, {1, 1, 1});
    for (Decoder& decoder : decoders) decoder.step(call);
    plain.step(call);

    double k_squares = 1e-6, S_squares = 0, u_squares = 0;
    for (const float x : k) k_squares += double{x} * x;
    for (std::int64_t r = 0; r < V; ++r) {
      double Sk = 0;
      for (std::int64_t i = 0; i < K; ++i) Sk += (S[r * K + i] *= std::exp(g)) * k[i] / std::sqrt(k_squares);
      const double u = beta * (v[r] - Sk);
      u_squares += u * u;
      for (std::int64_t i = 0; i < K; ++i) {
        S[r * K + i] += u * k[i] / std::sqrt(k_squares);
        S_squares += S[r * K + i] * S[r * K + i];
      }
    }
    for (Subject& s : subjects) {
      const double f = 0x1p-24 * (std::sqrt(static_cast<double>(K + V + W + 1)) + 8);
      const double r = s.entries == DType::bf16 ? 0x1p-8 : 0x1p-24, c = s.state == DType::bf16 ? 0x1p-8 : 0x1p-24;
      s.squares = std::exp(2.0 * g) * s.squares + f * f * S_squares + r * r * u_squares + (t % W == 0 ? c * c * S_squares : 0);
    }
    if (t % 101 != 100) continue;  // windows of all lengths
    CAPTURE(t);
    for (std::size_t i = 0; i < decoders.size(); ++i) {
      const double error = decoders[i].error(S), limit = std::sqrt(subjects[i].squares);
      subjects[i].sum += error;
      subjects[i].worst = std::max(subjects[i].worst, error / limit);
      CAPTURE(i);
      REQUIRE(error <= limit);
    }
    plain_sum += plain.error(S);
  }
  for (const Subject& s : subjects) {
    MESSAGE(backend.name() << ", decay " << slowest << ".." << fastest << ", " << name_of(s.state) << " state, "
                           << name_of(s.entries) << " entries: " << s.worst << " of the limit at most, mean error "
                           << s.sum / plain_sum << " of plain decoding with a bf16 state");
    CHECK(s.sum <= 1.05 * plain_sum);
  }
}

}  // namespace

TEST_CASE("10,000 decode steps with a window") {
  int runs = 0;
  for (Backend* backend : backends()) {
    if (!backend->availability().available || !backend->reaches({})) {
      MESSAGE(std::string(backend->name()) << " is skipped: it is unavailable or does not work on host memory");
      continue;
    }
    Problem problem;
    problem.config = Decoder::config(DType::f32);
    problem.window = true;
    if (const std::string reason = backend->unsupported_reason(problem); !reason.empty()) {
      MESSAGE(std::string(backend->name()) << " is skipped: " << reason);
      continue;
    }
    ++runs;
    run(*backend, 0, 2e-4);
    run(*backend, 0.5, 5);
    run(*backend, 60, 80);
  }
  CHECK(runs > 0);
}
