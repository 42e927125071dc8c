// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "backends/cpu/step.hpp"

// The chunkwise form: C tokens at a time, everything as products of small dense matrices (the WY representation of Yang et
// al., "Parallelizing Linear Transformers with the Delta Rule over Sequence Length", arXiv 2406.06484, with the decays of arXiv
// 2412.06464). The state is kept transposed, S^T: [K, rows], so that value rows are vector lanes throughout:
//
//     W = e^{G} K S0^T,  P = e^{G} Q S0^T               [C, rows]
//     (I + A) U = diag(beta) (V - W)                     A[t,j] = beta_t e^{G_t-G_j} k_t.k_j, j < t
//     O = P + B U                                        B[t,j] = e^{G_t-G_j} q_t.k_j, j <= t
//     S^T = e^{G_C} S0^T + K^T diag(e^{G_C-G}) U
namespace gatedelta::cpu {
namespace {

// Rows of the triangular solve that are done one after the other; everything to the left of them is one product.
constexpr int64_t solve_rows_at_once = 8;

struct Chunk {
  int64_t tokens, padded_key, ld;  // ld: value rows rounded up to vectors
  float* vectors;                  // [2C][padded_key]: keys, then queries
  float* keys_turned;              // [K][C rounded up]
  float* mixes;                    // [2C][C rounded up]: -A, then B
  float* values;                   // [2C][ld]: V - W, becoming U; then P, becoming O
  float* decay;                    // [2C]: -e^{G_t}, then e^{G_t}
  float* rest;                     // [C]: e^{G_C-G_t}
  float* ones;                     // a 1, for products that add to what is there
  double* total;                   // [C]: G_t
  float* products;                 // [2C][ld]
};

/// e^{G_t-G_j} for j <= t, formed in the log domain.
inline void decay_row(const double* total, int64_t t, float* out) {
  for (int64_t j = 0; j <= t; ++j) out[j] = (float)(total[t] - total[j]);
  for (int64_t j = t + 1; j < round_up(t + 1, W); ++j) out[j] = 0;
  for (int64_t j = 0; j <= t; j += W) store(out + j, exponential(load(out + j)));
}

inline void load_chunk(const HeadWork& work, int64_t first, Chunk& chunk) {
  const int64_t C = chunk.tokens, padded = chunk.padded_key, ld_mix = round_up(C, W);
  float* queries = chunk.vectors + C * padded;
  double sum_of_g = 0;
  for (int64_t t = 0; t < C; ++t) {
    load_vector(work.k, first + t, work.key_dim, padded, work.qk_l2norm, work.l2_eps, 1.0, chunk.vectors + t * padded);
    load_vector(work.q, first + t, work.key_dim, padded, work.qk_l2norm, work.l2_eps, work.scale, queries + t * padded);
    sum_of_g += work.log_decay[first + t];
    chunk.total[t] = sum_of_g;
    // What the end of this chunk and the start of the next one touch.
    prefetch_run(work.o, first + t, work.rows);
    if (const int64_t next = first + C + t; next < work.tokens) {
      prefetch_run(work.k, next, work.key_dim);
      prefetch_run(work.q, next, work.key_dim);
      prefetch_run(work.v, next, work.rows);
    }
  }
  for (int64_t t = 0; t < C; ++t) {
    chunk.decay[C + t] = (float)chunk.total[t];
    chunk.rest[t] = (float)(sum_of_g - chunk.total[t]);
  }
  for (int64_t t = 0; t < C; t += W) {
    store(chunk.decay + C + t, exponential(load(chunk.decay + C + t)));
    store(chunk.rest + t, exponential(load(chunk.rest + t)));
  }
  for (int64_t t = 0; t < C; ++t) chunk.decay[t] = -chunk.decay[C + t];

  transpose(chunk.vectors, padded, C, work.key_dim, chunk.keys_turned, ld_mix);
  for (int64_t d = 0; d < work.key_dim; ++d)
    for (int64_t j = C; j < ld_mix; ++j) chunk.keys_turned[d * ld_mix + j] = 0;
  // Rows in groups, each only as wide as the triangle is there.
  for (int64_t half = 0; half < 2; ++half)
    for (int64_t t = 0; t < C; t += stage_rows) {
      const int64_t group = C - t < stage_rows ? C - t : stage_rows;
      multiply({.m = group,
                .n = round_up(t + group, W),
                .depth = work.key_dim,
                .a = chunk.vectors + (half * C + t) * padded,
                .row_a = padded,
                .col_a = 1,
                .b = chunk.keys_turned,
                .ld_b = ld_mix,
                .c = chunk.mixes + (half * C + t) * ld_mix,
                .ld_c = ld_mix,
                .alpha = nullptr,
                .alpha_stride = 0});
    }
  float row[round_up(chunk_tokens, 16)];
  for (int64_t t = 0; t < C; ++t) {
    decay_row(chunk.total, t, row);
    float* a = chunk.mixes + t * ld_mix;
    float* b = chunk.mixes + (C + t) * ld_mix;
    const vf minus_beta = set1(-(float)work.beta[first + t]);
    for (int64_t j = 0; j <= t; j += W) {
      store(a + j, minus_beta * (load(row + j) * load(a + j)));
      store(b + j, load(row + j) * load(b + j));
    }
    for (int64_t j = t; j < ld_mix; ++j) a[j] = 0;
    for (int64_t j = t + 1; j < ld_mix; ++j) b[j] = 0;
  }
}

/// U = (I + A)^-1 U in place, by blocks of rows: `minus_a` is -A.
inline void solve(const float* minus_a, int64_t ld_a, int64_t tokens, float* u, int64_t ld) {
  const float one = 1;
  for (int64_t t = 0; t < tokens; t += solve_rows_at_once) {
    const int64_t count = tokens - t < solve_rows_at_once ? tokens - t : solve_rows_at_once;
    if (t > 0)
      multiply({.m = count,
                .n = ld,
                .depth = t,
                .a = minus_a + t * ld_a,
                .row_a = ld_a,
                .col_a = 1,
                .b = u,
                .ld_b = ld,
                .c = u + t * ld,
                .ld_c = ld,
                .alpha = &one,
                .alpha_stride = 0});
    for (int64_t r = 0; r < ld; r += W) {
      float* column = u + t * ld + r;
      for (int64_t i = 1; i < count; ++i) {
        vf x = load(column + i * ld);
        for (int64_t j = 0; j < i; ++j) x = fma(set1(minus_a[(t + i) * ld_a + t + j]), load(column + j * ld), x);
        store(column + i * ld, x);
      }
    }
  }
}

/// One chunk: `state` is S^T [K][ld], updated in place; outputs are left in the second half of chunk.values.
inline void run_chunk(const HeadWork& work, int64_t first, Chunk& chunk, float* state, bool update) {
  const int64_t C = chunk.tokens, K = work.key_dim, ld = chunk.ld, padded = chunk.padded_key, ld_mix = round_up(C, W);
  load_chunk(work, first, chunk);

  float *u = chunk.values, *o = chunk.values + C * ld;
  multiply({.m = 2 * C,
            .n = ld,
            .depth = K,
            .a = chunk.vectors,
            .row_a = padded,
            .col_a = 1,
            .b = state,
            .ld_b = ld,
            .c = u,
            .ld_c = ld,
            .alpha = nullptr,
            .alpha_stride = 0});
  for (int64_t t = 0; t < C; ++t) {
    float* v = chunk.products;
    load_run(work.v, first + t, work.rows, v);
    for (int64_t r = work.rows; r < ld; ++r) v[r] = 0;
    const vf beta = set1((float)work.beta[first + t]), decay = set1(chunk.decay[t]);
    for (int64_t r = 0; r < ld; r += W) store(u + t * ld + r, beta * fma(decay, load(u + t * ld + r), load(v + r)));
  }
  solve(chunk.mixes, ld_mix, C, u, ld);
  multiply({.m = C,
            .n = ld,
            .depth = C,
            .a = chunk.mixes + C * ld_mix,
            .row_a = ld_mix,
            .col_a = 1,
            .b = u,
            .ld_b = ld,
            .c = o,
            .ld_c = ld,
            .alpha = chunk.decay + C,
            .alpha_stride = 1},
           true);
  if (!update) return;
  for (int64_t t = 0; t < C; ++t)
    for (int64_t r = 0; r < ld; r += W) store(u + t * ld + r, load(u + t * ld + r) * set1(chunk.rest[t]));
  multiply({.m = K,
            .n = ld,
            .depth = C,
            .a = chunk.vectors,
            .row_a = 1,
            .col_a = padded,
            .b = u,
            .ld_b = ld,
            .c = state,
            .ld_c = ld,
            .alpha = chunk.decay + 2 * C - 1,
            .alpha_stride = 0});
}

constexpr int64_t chunk_scratch_bytes(int64_t key_dim, int64_t rows) {
  const int64_t padded = round_up(key_dim, W), ld = round_up(rows, W), C = round_up(chunk_tokens, W);
  return 4 * (2 * C * padded + key_dim * C + 2 * C * C + 2 * C * ld + 4 * C + 2 * C + ld + key_dim * ld +
              stage_floats(padded > ld ? padded : ld)) +
         64 * 12;
}

inline void chunks(const HeadWork& work) {
  const int64_t padded = round_up(work.key_dim, W), ld = round_up(work.rows, W), C = round_up(chunk_tokens, W);
  Scratch scratch{work.scratch};
  Chunk chunk{};
  chunk.padded_key = padded;
  chunk.ld = ld;
  chunk.vectors = scratch.floats(2 * C * padded);
  chunk.keys_turned = scratch.floats(work.key_dim * C);
  chunk.mixes = scratch.floats(2 * C * C);
  chunk.values = scratch.floats(2 * C * ld);
  chunk.decay = scratch.floats(2 * C + W);
  chunk.rest = scratch.floats(C);
  chunk.total = (double*)scratch.floats(2 * C);
  chunk.products = scratch.floats(ld);
  float* state = scratch.floats(work.key_dim * ld);
  float* stage = scratch.floats(stage_floats(padded > ld ? padded : ld));

  for (int64_t d = 0; d < work.key_dim; ++d)
    for (int64_t r = work.rows; r < ld; ++r) state[d * ld + r] = 0;
  load_dense(transposed(work.source), work.key_dim, work.rows, state, ld, stage);

  const bool token_stores = work.token_targets || work.snapshots.data;
  const int64_t longest = token_stores ? 1 : chunk_tokens;
  for (int64_t first = 0; first < work.tokens; first += chunk.tokens) {
    chunk.tokens = work.tokens - first < longest ? work.tokens - first : longest;
    const bool last = first + chunk.tokens == work.tokens;
    run_chunk(work, first, chunk, state, !last || work.target.data || token_stores);
    for (int64_t t = 0; t < chunk.tokens; ++t) store_run(chunk.values + (chunk.tokens + t) * ld, work.o, first + t, work.rows);
    for_token_stores(work, first,
                     [&](const Matrix& to) { store_dense(state, ld, work.key_dim, work.rows, transposed(to), stage); });
  }
  if (work.target.data) store_dense(state, ld, work.key_dim, work.rows, transposed(work.target), stage);
}

}  // namespace
}  // namespace gatedelta::cpu
