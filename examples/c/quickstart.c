/* SPDX-License-Identifier: Apache-2.0 */
/* quickstart.cpp in C99: two sequences, two tokens with one key. It prints the same. */
#include <gatedelta/gatedelta.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

/* Ends the program with the library's message if a call failed. */
static void check(gatedelta_status status) {
  if (status == GATEDELTA_SUCCESS) return;
  fprintf(stderr, "%s: %s\n", gatedelta_status_name(status), gatedelta_last_error());
  exit(2);
}

static void fill(float* values, size_t count, float value) {
  for (size_t i = 0; i < count; ++i) values[i] = value;
}

int main(void) {
  static float q[2 * 2 * 64], k[2 * 2 * 64], v[2 * 4 * 64], o[2 * 4 * 64], a[2 * 4], b[2 * 4], A_log[4];
  static float pool[8 * 4 * 64 * 64]; /* 8 slots, of which the two sequences have slots 5 and 2 */
  int32_t slots[2] = {5, 2};
  fill(q, 2 * 2 * 64, 1), fill(k, 2 * 2 * 64, 1), fill(a, 2 * 4, -9), fill(b, 2 * 4, 9);

  gatedelta_config config;
  check(gatedelta_config_init(&config, sizeof config));
  config.q_heads = config.k_heads = 2, config.v_heads = 4;
  config.key_dim = config.value_dim = 64;
  config.scale = 1, config.has_scale = 1;
  gatedelta_rule* rule = NULL;
  check(gatedelta_rule_create(&config, NULL, &rule)); /* the first backend that can */

  const int64_t qk_shape[] = {2, 1, 2, 64}, v_shape[] = {2, 1, 4, 64}, gate_shape[] = {2, 1, 4}, head_shape[] = {4};
  const int64_t pool_shape[] = {8, 4, 64, 64}, row_shape[] = {2};
  const gatedelta_tensor q_view = gatedelta_view(q, GATEDELTA_F32, 4, qk_shape);
  const gatedelta_tensor k_view = gatedelta_view(k, GATEDELTA_F32, 4, qk_shape);
  const gatedelta_tensor v_view = gatedelta_view(v, GATEDELTA_F32, 4, v_shape);
  const gatedelta_tensor o_view = gatedelta_view(o, GATEDELTA_F32, 4, v_shape);
  const gatedelta_tensor a_view = gatedelta_view(a, GATEDELTA_F32, 3, gate_shape);
  const gatedelta_tensor b_view = gatedelta_view(b, GATEDELTA_F32, 3, gate_shape);
  const gatedelta_tensor A_log_view = gatedelta_view(A_log, GATEDELTA_F32, 1, head_shape);
  const gatedelta_tensor pool_view = gatedelta_view(pool, GATEDELTA_F32, 4, pool_shape);
  const gatedelta_tensor slots_view = gatedelta_view(slots, GATEDELTA_I32, 1, row_shape);

  gatedelta_arguments step;
  check(gatedelta_arguments_init(&step, sizeof step));
  step.q = &q_view, step.k = &k_view, step.v = &v_view, step.o = &o_view;
  step.a = &a_view, step.b = &b_view, step.A_log = &A_log_view;
  step.state = &pool_view, step.read_slots = &slots_view;

  int wrong = 0;
  for (int value = 1; value <= 2; ++value) {
    fill(v, 2 * 4 * 64, (float)value);
    check(gatedelta_forward(rule, &step));
    printf("wrote %d, read %.3f\n", value, o[0]);
    if (fabsf(o[0] - (float)value) > 1e-3f) wrong = 1;
  }
  gatedelta_rule_destroy(rule);
  return wrong;
}
