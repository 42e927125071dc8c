// SPDX-License-Identifier: Apache-2.0
// Two sequences, two tokens with one key: the state first holds k -> 1, and the delta rule then replaces it by k -> 2.
#include <cmath>
#include <cstdio>
#include <gatedelta/gatedelta.hpp>
#include <vector>

int main() {
  const gatedelta::Config config{.q_heads = 2, .k_heads = 2, .v_heads = 4, .key_dim = 64, .value_dim = 64, .scale = 1.0};
  const gatedelta::GatedDeltaRule rule(config);  // the first backend that can; or GatedDeltaRule(config, "reference")

  std::vector<float> q(2 * 2 * 64, 1.0f), k = q, v(2 * 4 * 64), o = v, a(2 * 4, -9.0f), b(2 * 4, 9.0f), A_log(4);
  std::vector<float> pool(8 * 4 * 64 * 64);  // 8 slots, of which the two sequences have slots 5 and 2
  std::vector<std::int32_t> slots = {5, 2};

  gatedelta::Arguments step;  // views of the caller's memory: [batch, tokens, heads, width]
  step.q = gatedelta::view(q.data(), {2, 1, 2, 64}), step.k = gatedelta::view(k.data(), {2, 1, 2, 64});
  step.v = gatedelta::view(v.data(), {2, 1, 4, 64}), step.o = gatedelta::view(o.data(), {2, 1, 4, 64});
  step.a = gatedelta::view(a.data(), {2, 1, 4}), step.b = gatedelta::view(b.data(), {2, 1, 4});
  step.A_log = gatedelta::view(A_log.data(), {4});
  step.state = gatedelta::view(pool.data(), {8, 4, 64, 64});
  step.read_slots = gatedelta::view(slots.data(), {2});

  for (float value : {1.0f, 2.0f}) {
    v.assign(v.size(), value);
    rule.forward(step);
    std::printf("wrote %.0f, read %.3f\n", value, o[0]);
    if (std::abs(o[0] - value) > 1e-3f) return 1;
  }
}
