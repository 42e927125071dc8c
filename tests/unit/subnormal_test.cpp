// SPDX-License-Identifier: Apache-2.0
// States that decay below the normal range are stored as subnormal numbers, not as zero: some processors' conversion
// instructions would flush them.
#include <doctest/doctest.h>

#include <cmath>
#include <vector>

#include "gatedelta/gatedelta.hpp"

using namespace gatedelta;

namespace {

std::uint16_t half_bits(DType dtype, float x) { return dtype == DType::bf16 ? to_bfloat16(x).bits : to_float16(x).bits; }

}  // namespace

TEST_CASE("a state that decays into the subnormal range is kept") {
  constexpr std::int64_t K = 128, V = 128;
  for (Backend* backend : backends()) {
    if (!backend->availability().available || !backend->reaches(Device{})) {
      MESSAGE("skipped " << backend->name() << ": " << backend->availability().reason);
      continue;
    }
    for (const DType dtype : {DType::bf16, DType::f16}) {
      for (const std::int64_t T : {1, 2}) {
        CAPTURE(backend->name());
        CAPTURE(name_of(dtype));
        CAPTURE(T);
        Config config;
        config.q_heads = config.k_heads = config.v_heads = 1;
        config.key_dim = K;
        config.value_dim = V;
        config.dtypes.state = dtype;
        config.gate = GateForm::log_decay;
        config.beta = BetaForm::value;
        // One row in three becomes subnormal: bfloat16 below 2^-126, float16 below 2^-14.
        const float normal = dtype == DType::bf16 ? 0x1p-100f : 0x1p-2f, small = dtype == DType::bf16 ? 0x1p-120f : 0x1p-10f;
        std::vector<std::uint16_t> state(V * K), expected(V * K);
        for (std::int64_t v = 0; v < V; ++v)
          for (std::int64_t k = 0; k < K; ++k) {
            const float x = (v % 3 == 0 ? small : normal) * static_cast<float>(1 + k % 5);
            state[v * K + k] = half_bits(dtype, x);
            expected[v * K + k] = half_bits(dtype, x * 0x1p-8f);
          }
        const std::vector<float> ones(T * K, 1.0f), beta(T, 0.0f),
            g(T, static_cast<float>(std::log(0x1p-8) / static_cast<double>(T)));
        std::vector<float> o(T * V);
        Arguments call;
        call.q = call.k = view(ones.data(), {1, T, 1, K});
        call.v = view(ones.data(), {1, T, 1, V});
        call.o = view(o.data(), {1, T, 1, V});
        call.g = view(g.data(), {1, T, 1});
        call.beta = view(beta.data(), {1, T, 1});
        const std::int64_t shape[] = {1, 1, V, K};
        call.state = make_view(state.data(), dtype, shape);
        GatedDeltaRule(config, *backend).forward(call);
        CHECK(state == expected);
      }
    }
  }
}
