// SPDX-License-Identifier: Apache-2.0
// 10,000 decode steps with the state kept in f32 stay with the float64 recurrence.
//
// How far they may drift apart: the error E of the state obeys E_t = exp(g_t) E_{t-1} (I - beta k k^T) + D_t. The factor in
// brackets does not increase a norm (|k| = 1, beta <= 1), so older errors shrink with the decay, and D_t is what one step
// rounds off: at most 2^-24 * (sqrt(K + V + 1) + 8) * ||S_t||, the f32 term of the tests' tolerance for one token. The D_t
// are independent as the inputs are, so their squares add up:
//     limit_t^2 = exp(2 g_t) limit_{t-1}^2 + (2^-24 (sqrt(K + V + 1) + 8) ||S_t||)^2
// With a strong decay that is a constant; with decays near 1 it grows like sqrt(t) until the decay holds it. An error that is
// not independent (a bias of the decay, say) grows like t and shows.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "verify/golden.hpp"
#include "verify/memory.hpp"
#include "verify/random.hpp"

using namespace gatedelta;
using namespace gatedelta::verify;

namespace {

constexpr std::int64_t H = 2, K = 64, V = 64, segment = 100, segments = 100;

template <class Draw>
TensorSpec drawn(std::vector<std::int64_t> shape, Draw draw) {
  TensorSpec out = dense(DType::f32, std::move(shape));
  for (std::int64_t i = 0; i < out.elements(); ++i) out.values.push_back(rounded(DType::f32, draw()));
  return out;
}

/// The steps of one segment; the float64 state goes on from segment to segment unrounded.
Case make_segment(Random& random, double slowest, double fastest, const std::vector<double>& state) {
  Case c;
  c.name = "long run";
  Config& config = c.config;
  config.q_heads = config.k_heads = config.v_heads = H;
  config.key_dim = K;
  config.value_dim = V;
  config.gate = GateForm::log_decay;
  config.beta = BetaForm::value;
  config.num_threads = 1;  // results do not depend on it, and steps this small gain nothing from more
  const auto normal = [&] { return random.normal(); };
  c[Tensor::q] = drawn({1, segment, H, K}, normal);
  c[Tensor::k] = drawn({1, segment, H, K}, normal);
  c[Tensor::v] = drawn({1, segment, H, V}, normal);
  c[Tensor::g] = drawn({1, segment, H}, [&] { return -random.uniform(slowest, fastest); });
  c[Tensor::beta] = drawn({1, segment, H}, [&] { return random.uniform(); });
  c[Tensor::o] = dense(DType::f32, {1, segment, H, V});
  c[Tensor::state_in] = c[Tensor::state_out] = dense(DType::f32, {1, H, V, K});
  c[Tensor::state_in].values = state;
  return c;
}

double norm(const double* x, std::int64_t count) {
  double squares = 0;
  for (std::int64_t i = 0; i < count; ++i) squares += x[i] * x[i];
  return std::sqrt(squares);
}

std::vector<float> floats(const TensorSpec& from) { return {from.values.begin(), from.values.end()}; }

void run(Backend& backend, double slowest, double fastest) {
  Random random(42, backend.name());
  std::vector<double> exact(static_cast<std::size_t>(H * V * K), 0.0);
  std::vector<float> state(exact.size(), 0.0f);
  double squares[H] = {};  // of the limit
  double worst = 0;
  for (std::int64_t s = 0; s < segments; ++s) {
    Case c = make_segment(random, slowest, fastest, exact);
    const Golden expected = exact_answer(c);
    const std::vector<double> before = exact;
    exact = expected.find(Tensor::state_out)->values;

    std::vector<float> q = floats(c[Tensor::q]), k = floats(c[Tensor::k]), v = floats(c[Tensor::v]), g = floats(c[Tensor::g]),
                       beta = floats(c[Tensor::beta]), o(static_cast<std::size_t>(segment * H * V));
    const GatedDeltaRule op(c.config, backend);
    for (std::int64_t t = 0; t < segment; ++t) {
      Arguments step;
      step.q = view(&q[t * H * K], {1, 1, H, K});
      step.k = view(&k[t * H * K], {1, 1, H, K});
      step.v = view(&v[t * H * V], {1, 1, H, V});
      step.g = view(&g[t * H], {1, 1, H});
      step.beta = view(&beta[t * H], {1, 1, H});
      step.o = view(&o[t * H * V], {1, 1, H, V});
      step.state_in = step.state_out = view(state.data(), {1, H, V, K});
      op.forward(step);
    }

    const double rounding = 0x1p-24 * (std::sqrt(static_cast<double>(K + V + 1)) + 8);
    for (std::int64_t h = 0; h < H; ++h) {
      const double size = std::max(norm(&before[h * V * K], V * K), norm(&exact[h * V * K], V * K));
      double o_error = 0, o_limit = 0;
      for (std::int64_t t = 0; t < segment; ++t) {
        squares[h] = std::exp(2 * c[Tensor::g].values[t * H + h]) * squares[h] + std::pow(rounding * size, 2);
        // |q^| = 1, so the error of o is at most scale times that of the state.
        o_limit += squares[h] * std::pow(c.config.effective_scale(), 2);
        for (std::int64_t i = 0; i < V; ++i)
          o_error += std::pow(o[(t * H + h) * V + i] - expected.outputs[0].values[(t * H + h) * V + i], 2);
      }
      double error = 0;
      for (std::int64_t i = h * V * K; i < (h + 1) * V * K; ++i) error += std::pow(state[i] - exact[i], 2);
      worst = std::max(worst, std::sqrt(error / squares[h]));
      CAPTURE(s);
      CAPTURE(h);
      REQUIRE(std::sqrt(error) <= std::sqrt(squares[h]));
      REQUIRE(std::sqrt(o_error) <= std::sqrt(o_limit));
    }
  }
  MESSAGE("after " << segment * segments << " steps: state error " << worst << " of the limit at most");
}

}  // namespace

TEST_CASE("10,000 decode steps") {
  int runs = 0;
  for (Backend* backend : backends()) {
    const std::string name(backend->name());
    CAPTURE(name);
    if (!backend->availability().available || !backend->reaches({})) {
      MESSAGE(name << " is skipped: it is unavailable or does not work on host memory " << backend->availability().reason);
      continue;
    }
    ++runs;
    run(*backend, 0, 2e-4);
    run(*backend, 0.5, 5);
  }
  CHECK(runs > 0);
}
