/* SPDX-License-Identifier: Apache-2.0 */
/* Draft tokens with a replay window: of each step's three tokens some stay, the others are dropped by setting a length, and no
 * state is written or copied for that. The state in the end is that of plain decoding of the tokens that stayed. */
#include <gatedelta/gatedelta.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { HEADS = 2, WIDTH = 16, DRAFTS = 3, STEPS = 5, WINDOW = 8 };

/* Ends the program with the library's message if a call failed. */
static void check(gatedelta_status status) {
  if (status == GATEDELTA_SUCCESS) return;
  fprintf(stderr, "%s: %s\n", gatedelta_status_name(status), gatedelta_last_error());
  exit(2);
}

/* `bytes` of memory after up to 255 more. */
static char* allocate(uint64_t bytes) {
  char* memory = malloc((size_t)bytes + 255);
  if (memory == NULL) exit(2);
  return memory;
}

static void* aligned(char* memory) { return memory + (256 - (uintptr_t)memory % 256) % 256; }

/* What a model would compute for token number `token`. */
static void fill(float* values, int token, int seed) {
  for (int i = 0; i < HEADS * WIDTH; ++i) values[i] = sinf((float)(token * 31 + seed * 7 + i * i));
}

int main(void) {
  static float q[DRAFTS * HEADS * WIDTH], k[DRAFTS * HEADS * WIDTH], v[DRAFTS * HEADS * WIDTH], o[DRAFTS * HEADS * WIDTH];
  static float g[DRAFTS * HEADS], pool[2 * HEADS * WIDTH * WIDTH], state[HEADS * WIDTH * WIDTH];
  static const int32_t kept[STEPS] = {2, 0, 3, 1, 3};
  int32_t slot = 0, accepted = 0;
  for (int i = 0; i < DRAFTS * HEADS; ++i) g[i] = -0.1f;

  gatedelta_config config;
  check(gatedelta_config_init(&config, sizeof config));
  config.q_heads = config.k_heads = config.v_heads = HEADS;
  config.key_dim = config.value_dim = WIDTH;
  config.gate = GATEDELTA_GATE_LOG_DECAY, config.beta = GATEDELTA_BETA_ONE;
  gatedelta_rule* rule = NULL;
  check(gatedelta_rule_create(&config, NULL, &rule));

  int64_t token_shape[] = {1, DRAFTS, HEADS, WIDTH}, gate_shape[] = {1, DRAFTS, HEADS};
  const int64_t pool_shape[] = {2, HEADS, WIDTH, WIDTH}, out_shape[] = {1, HEADS, WIDTH, WIDTH}, row_shape[] = {1};
  const gatedelta_tensor q_view = gatedelta_view(q, GATEDELTA_F32, 4, token_shape);
  const gatedelta_tensor k_view = gatedelta_view(k, GATEDELTA_F32, 4, token_shape);
  const gatedelta_tensor v_view = gatedelta_view(v, GATEDELTA_F32, 4, token_shape);
  const gatedelta_tensor o_view = gatedelta_view(o, GATEDELTA_F32, 4, token_shape);
  const gatedelta_tensor g_view = gatedelta_view(g, GATEDELTA_F32, 3, gate_shape);
  const gatedelta_tensor pool_view = gatedelta_view(pool, GATEDELTA_F32, 4, pool_shape);
  const gatedelta_tensor state_view = gatedelta_view(state, GATEDELTA_F32, 4, out_shape);
  const gatedelta_tensor slot_view = gatedelta_view(&slot, GATEDELTA_I32, 1, row_shape);
  const gatedelta_tensor accepted_view = gatedelta_view(&accepted, GATEDELTA_I32, 1, row_shape);

  gatedelta_window_layout layout; /* two slots, 8 entries, at most 3 tokens a step */
  check(gatedelta_window_layout_init(&layout, sizeof layout, &config, 2, WINDOW, GATEDELTA_F32, DRAFTS));
  char *layer = allocate(layout.layer_bytes), *record = allocate(layout.record_bytes);
  gatedelta_window window;
  check(gatedelta_window_init(&window, sizeof window));
  window.layout = &layout;
  window.layer = aligned(layer);   /* for each layer of a model */
  window.record = aligned(record); /* once for all layers */
  gatedelta_reset_arguments reset;
  check(gatedelta_reset_arguments_init(&reset, sizeof reset));
  reset.window = &window;
  check(gatedelta_window_reset(rule, &reset));

  gatedelta_arguments step;
  check(gatedelta_arguments_init(&step, sizeof step));
  step.q = &q_view, step.k = &k_view, step.v = &v_view, step.o = &o_view, step.g = &g_view;
  step.state = &pool_view, step.read_slots = &slot_view;
  gatedelta_accept_arguments accept;
  check(gatedelta_accept_arguments_init(&accept, sizeof accept));
  accept.window = &window, accept.slots = &slot_view, accept.accepted = &accepted_view, accept.tokens = DRAFTS;

  int token = 0;
  for (int i = 0; i < STEPS; ++i) {
    for (int t = 0; t < DRAFTS; ++t) {
      fill(q + t * HEADS * WIDTH, token + t, 1), fill(k + t * HEADS * WIDTH, token + t, 2);
      fill(v + t * HEADS * WIDTH, token + t, 3);
    }
    step.window = &window;
    check(gatedelta_forward(rule, &step)); /* for each layer */
    accepted = kept[i];
    check(gatedelta_window_accept(rule, &accept)); /* once for all layers */
    token += kept[i];
  }
  gatedelta_fold_arguments fold;
  check(gatedelta_fold_arguments_init(&fold, sizeof fold));
  fold.window = &window, fold.state = &pool_view, fold.slots = &slot_view, fold.out = &state_view;
  check(gatedelta_window_state_of(rule, &fold));

  /* The tokens that stayed, one by one, in slot 1. */
  token_shape[1] = gate_shape[1] = 1;
  slot = 1, step.window = NULL;
  for (int t = 0; t < token; ++t) {
    fill(q, t, 1), fill(k, t, 2), fill(v, t, 3);
    check(gatedelta_forward(rule, &step));
  }
  float difference = 0;
  for (int i = 0; i < HEADS * WIDTH * WIDTH; ++i)
    difference = fmaxf(difference, fabsf(state[i] - pool[HEADS * WIDTH * WIDTH + i]));
  printf("%d of %d tokens stayed; the states differ by %.0e\n", token, STEPS * DRAFTS, difference);
  gatedelta_rule_destroy(rule);
  free(layer), free(record);
  return token == 9 && difference < 1e-5f ? 0 : 1;
}
