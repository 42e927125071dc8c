// SPDX-License-Identifier: Apache-2.0
// The golden answer: the equations of gatedelta/operator.hpp one after the other in float64, no tricks.
#include <cmath>
#include <vector>

#include "core/builtin_backends.hpp"
#include "core/elements.hpp"
#include "core/host_rows.hpp"
#include "core/host_window.hpp"

namespace gatedelta {
namespace {

double softplus(double x, const Config& config) {
  const double scaled = config.softplus_beta * x;
  return scaled > config.softplus_threshold ? x : std::log1p(std::exp(scaled)) / config.softplus_beta;
}

double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }

/// What one token of one head brings.
struct Token {
  std::vector<double> q, k;  // normalised
  double k_norm = 1;         // what that multiplied k with
  double g = 0, beta = 1;
};

Token load_token(const Call& call, std::int64_t b, std::int64_t s, std::int64_t h) {
  const Config& config = call.problem.config;
  const Arguments& in = *call.arguments;
  const std::int64_t H = config.heads(), K = config.key_dim, hq = h / (H / config.q_heads), hk = h / (H / config.k_heads);
  Token out{std::vector<double>(static_cast<std::size_t>(K)), std::vector<double>(static_cast<std::size_t>(K))};
  double q_norm = 1.0;
  if (config.qk_l2norm) {
    double q_squares = 0, k_squares = 0;
    for (std::int64_t i = 0; i < K; ++i) {
      q_squares += std::pow(load(in.q, b, s, hq, i), 2);
      k_squares += std::pow(load(in.k, b, s, hk, i), 2);
    }
    q_norm = 1.0 / std::sqrt(q_squares + config.l2_eps);
    out.k_norm = 1.0 / std::sqrt(k_squares + config.l2_eps);
  }
  for (std::int64_t i = 0; i < K; ++i) {
    out.q[i] = load(in.q, b, s, hq, i) * q_norm;
    out.k[i] = load(in.k, b, s, hk, i) * out.k_norm;
  }
  if (config.gate == GateForm::log_decay) out.g = load(in.g, b, s, h);
  if (config.gate == GateForm::raw)
    out.g = -std::exp(load(in.A_log, h)) *
            softplus(load(in.a, b, s, h) + (in.dt_bias.defined() ? load(in.dt_bias, h) : 0.0), config);
  if (config.beta == BetaForm::value) out.beta = load(in.beta, b, s, h);
  if (config.beta == BetaForm::logits) out.beta = sigmoid(load(in.b, b, s, h));
  if (config.beta == BetaForm::twice_logits) out.beta = 2 * sigmoid(load(in.b, b, s, h));
  return out;
}

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
        for (std::int64_t h = 0; h < config.heads(); ++h)
          call.problem.window ? replay_head(call, rows.rows()[n], h, state)
                              : run_head(call, rows, static_cast<std::int64_t>(n), h, state);
  }

  void commit(const Config& config, const CommitArguments& arguments) override { commit_on_host(config, arguments); }
  void accept(const Config& config, const AcceptArguments& arguments) override { accept_on_host(config, arguments); }
  void reset(const Config& config, const ResetArguments& arguments) override { reset_on_host(config, arguments); }
  void fold(const Config& config, const FoldArguments& arguments) override { fold_on_host(config, arguments); }
  void copy(const Config& config, const ForkArguments& arguments) override { copy_on_host(config, arguments); }

 private:
  static void run_head(const Call& call, const HostRows& rows, std::int64_t n, std::int64_t h, std::vector<double>& S) {
    const Config& config = call.problem.config;
    const Arguments& in = *call.arguments;
    const HostRow& row = rows.rows()[static_cast<std::size_t>(n)];
    const std::int64_t H = config.heads(), K = config.key_dim, V = config.value_dim;
    const std::int64_t hv = h / (H / config.v_heads);
    const double scale = config.effective_scale();

    const auto store_state = [&](const TensorView& to, auto... slot) {
      for (std::int64_t v = 0; v < V; ++v)
        for (std::int64_t i = 0; i < K; ++i) store(to, S[v * K + i], slot..., h, v, i);
    };

    for (std::int64_t v = 0; v < V; ++v)
      for (std::int64_t i = 0; i < K; ++i) S[v * K + i] = row.source ? load(*row.source, row.source_slot, h, v, i) : 0.0;

    for (std::int64_t t = 0; t < row.tokens; ++t) {
      const std::int64_t b = row.batch, s = row.first_token + t;
      const Token token = load_token(call, b, s, h);
      const double decay = std::exp(token.g);
      for (std::int64_t v = 0; v < V; ++v) {
        double* row_of_S = &S[v * K];
        double Sk = 0, Sq = 0;
        for (std::int64_t i = 0; i < K; ++i) Sk += (row_of_S[i] *= decay) * token.k[i];
        const double u = token.beta * (load(in.v, b, s, hv, v) - Sk);
        for (std::int64_t i = 0; i < K; ++i) Sq += (row_of_S[i] += u * token.k[i]) * token.q[i];
        store(in.o, scale * Sq, b, s, h, v);
      }
      if (in.snapshots.defined()) store_state(in.snapshots, n, t);
      if (const std::int64_t slot = rows.token_slot(n, t); slot >= 0) store_state(call.state_write, slot);
    }
    if (row.final_slot >= 0) store_state(call.state_write, row.final_slot);
  }

  /// With a window. Other tokens see an entry as it is stored, so that it makes no difference whether tokens come in one call
  /// or in several; a token's own output has its correction unrounded.
  static void replay_head(const Call& call, const HostRow& row, std::int64_t h, std::vector<double>& S) {
    const Config& config = call.problem.config;
    const Arguments& in = *call.arguments;
    const ReplayWindow& window = *in.window;
    const std::int64_t H = config.heads(), K = config.key_dim, V = config.value_dim, slot = row.source_slot;
    const std::int64_t hk = h / (H / config.k_heads), hv = h / (H / config.v_heads);
    if (row.tokens == 0) return;
    for (std::int64_t v = 0; v < V; ++v)
      for (std::int64_t i = 0; i < K; ++i) S[v * K + i] = load(*row.source, slot, h, v, i);
    for (std::int64_t j = 0; j < row.length; ++j) replay_entry(window, slot, h, place_of(window.record, slot, j), S);
    if (row.fold)
      for (std::int64_t v = 0; v < V; ++v)
        for (std::int64_t i = 0; i < K; ++i) store(call.state_write, S[v * K + i], slot, h, v, i);

    std::vector<std::vector<double>> after;  // the state after each token, in a tree
    for (std::int64_t t = 0; t < row.tokens; ++t) {
      const std::int64_t b = row.batch, s = row.first_token + t, place = place_of(window.record, slot, row.length + t);
      const std::int64_t parent = in.parent.defined() ? index_at(in.parent, b, s) : t - 1;
      std::vector<double> now = !in.parent.defined() || parent < 0 ? S : after[parent];
      const Token token = load_token(call, b, s, h);
      store(window.decays, token.g, slot, h, place);
      for (std::int64_t i = 0; i < K; ++i) store(window.keys, load(in.k, b, s, hk, i), slot, hk, place, i);
      const double decay = std::exp(load(window.decays, slot, h, place));
      double kq = 0;
      for (std::int64_t i = 0; i < K; ++i) kq += token.k[i] * token.q[i];
      for (std::int64_t v = 0; v < V; ++v) {
        double Sk = 0, Sq = 0;
        for (std::int64_t i = 0; i < K; ++i) {
          Sk += decay * now[v * K + i] * token.k[i];
          Sq += decay * now[v * K + i] * token.q[i];
        }
        const double u = token.beta * (load(in.v, b, s, hv, v) - Sk);
        store(in.o, config.effective_scale() * (Sq + u * kq), b, s, h, v);
        store(window.corrections, u * token.k_norm, slot, h, place, v);
      }
      replay_entry(window, slot, h, place, now);
      if (in.parent.defined())
        after.push_back(std::move(now));
      else
        S = std::move(now);
    }
  }
};

}  // namespace

std::unique_ptr<Backend> make_reference_backend() { return std::make_unique<ReferenceBackend>(); }

}  // namespace gatedelta
