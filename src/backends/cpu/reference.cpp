// SPDX-License-Identifier: Apache-2.0
// The golden answer: the equations of gatedelta/operator.hpp one after the other in float64, no tricks.
#include <cmath>
#include <vector>

#include "core/builtin_backends.hpp"
#include "core/elements.hpp"
#include "core/host_rows.hpp"

namespace gatedelta {
namespace {

double softplus(double x, const Config& config) {
  const double scaled = config.softplus_beta * x;
  return scaled > config.softplus_threshold ? x : std::log1p(std::exp(scaled)) / config.softplus_beta;
}

double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }

class ReferenceBackend final : public Backend {
 public:
  std::string_view name() const noexcept override { return "reference"; }
  std::string description() const override { return "sequential float64, the golden answer"; }
  Availability availability() const override { return {true, {}}; }
  bool reaches(Device device) const noexcept override { return device.type == DeviceType::cpu; }
  std::string unsupported_reason(const Problem&) const override { return {}; }

  void forward(const Call& call) override {
    const HostRows rows(call);
    const Config& config = call.problem.config;
    std::vector<double> state(static_cast<std::size_t>(config.value_dim * config.key_dim));
    rows.zero_padding();
    for (std::size_t n = 0; n < rows.rows().size(); ++n)
      if (!rows.rows()[n].padding)
        for (std::int64_t h = 0; h < config.heads(); ++h) run_head(call, rows, static_cast<std::int64_t>(n), h, state);
  }

  void commit(const Config& config, const CommitArguments& arguments) override { commit_on_host(config, arguments); }

 private:
  static void run_head(const Call& call, const HostRows& rows, std::int64_t n, std::int64_t h, std::vector<double>& S) {
    const Config& config = call.problem.config;
    const Arguments& in = *call.arguments;
    const HostRow& row = rows.rows()[static_cast<std::size_t>(n)];
    const std::int64_t H = config.heads(), K = config.key_dim, V = config.value_dim;
    const std::int64_t hq = h / (H / config.q_heads), hk = h / (H / config.k_heads), hv = h / (H / config.v_heads);
    const double scale = config.effective_scale();
    std::vector<double> q(static_cast<std::size_t>(K)), k(static_cast<std::size_t>(K));

    const auto store_state = [&](const TensorView& to, auto... slot) {
      for (std::int64_t v = 0; v < V; ++v)
        for (std::int64_t i = 0; i < K; ++i) store(to, S[v * K + i], slot..., h, v, i);
    };

    for (std::int64_t v = 0; v < V; ++v)
      for (std::int64_t i = 0; i < K; ++i) S[v * K + i] = row.source ? load(*row.source, row.source_slot, h, v, i) : 0.0;

    for (std::int64_t t = 0; t < row.tokens; ++t) {
      const std::int64_t b = row.batch, s = row.first_token + t;
      double q_norm = 1.0, k_norm = 1.0;
      if (config.qk_l2norm) {
        double q_squares = 0, k_squares = 0;
        for (std::int64_t i = 0; i < K; ++i) {
          q_squares += std::pow(load(in.q, b, s, hq, i), 2);
          k_squares += std::pow(load(in.k, b, s, hk, i), 2);
        }
        q_norm = 1.0 / std::sqrt(q_squares + config.l2_eps);
        k_norm = 1.0 / std::sqrt(k_squares + config.l2_eps);
      }
      for (std::int64_t i = 0; i < K; ++i) {
        q[i] = load(in.q, b, s, hq, i) * q_norm;
        k[i] = load(in.k, b, s, hk, i) * k_norm;
      }

      double g = 0;
      if (config.gate == GateForm::log_decay) g = load(in.g, b, s, h);
      if (config.gate == GateForm::raw)
        g = -std::exp(load(in.A_log, h)) *
            softplus(load(in.a, b, s, h) + (in.dt_bias.defined() ? load(in.dt_bias, h) : 0.0), config);
      double beta = 1;
      if (config.beta == BetaForm::value) beta = load(in.beta, b, s, h);
      if (config.beta == BetaForm::logits) beta = sigmoid(load(in.b, b, s, h));
      if (config.beta == BetaForm::twice_logits) beta = 2 * sigmoid(load(in.b, b, s, h));

      const double decay = std::exp(g);
      for (std::int64_t v = 0; v < V; ++v) {
        double* row_of_S = &S[v * K];
        double Sk = 0, Sq = 0;
        for (std::int64_t i = 0; i < K; ++i) Sk += (row_of_S[i] *= decay) * k[i];
        const double u = beta * (load(in.v, b, s, hv, v) - Sk);
        for (std::int64_t i = 0; i < K; ++i) Sq += (row_of_S[i] += u * k[i]) * q[i];
        store(in.o, scale * Sq, b, s, h, v);
      }
      if (in.snapshots.defined()) store_state(in.snapshots, n, t);
      if (const std::int64_t slot = rows.token_slot(n, t); slot >= 0) store_state(call.state_write, slot);
    }
    if (row.final_slot >= 0) store_state(call.state_write, row.final_slot);
  }
};

}  // namespace

std::unique_ptr<Backend> make_reference_backend() { return std::make_unique<ReferenceBackend>(); }

}  // namespace gatedelta
