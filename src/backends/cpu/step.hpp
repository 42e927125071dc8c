// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "backends/cpu/matrices.hpp"

// The recurrence by value rows. With the T tokens of a call (T <= max_step_tokens) and the state S0 before them,
//
//     u_t = beta_t (v_t - e^{G_t} S0 k_t - sum_{j<t} e^{G_t-G_j} (k_t.k_j) u_j)        G_t = g_0 + ... + g_t
//     o_t = e^{G_t} S0 q_t + sum_{j<=t} e^{G_t-G_j} (q_t.k_j) u_j                       (q carries the scale)
//     S   = e^{G_T} S0 + sum_t e^{G_T-G_t} u_t k_t^T
//
// so that a row of the state is read once for all products with keys and queries, and once more, from L1, for its update.
// Each row's arithmetic is the same wherever it stands, so no result depends on how rows are split over threads.
namespace gatedelta::cpu {
namespace {

constexpr int64_t row_group = 4;   // rows whose sums are reduced together
constexpr int64_t row_block = 16;  // rows that share one triangular solve
// Bytes of state ahead of the rows in work: into L1, and further ahead into L2. The requests are spread evenly over all work,
// since a core has few buffers for lines on their way into L1; in bursts they would wait for each other.
constexpr int64_t prefetch_near = 4096;
template <class S>
constexpr int64_t prefetch_far = sizeof(S) == 4 ? 16384 : 10240;

/// The tokens of one window, ready for use.
struct Window {
  int64_t tokens;
  float* keys;       // [T][padded], followed by
  float* queries;    // [T][padded]: one array of 2T vectors
  float* decay;      // [T]: e^{G_t}
  float* rest;       // [T]: e^{G_T-G_t}
  float* beta;       // [T]
  float* key_mix;    // [T][T]: -beta_t e^{G_t-G_j} k_t.k_j below the diagonal
  float* query_mix;  // [T][T]: e^{G_t-G_j} q_t.k_j up to the diagonal
};

GATEDELTA_INLINE float dot(const float* a, const float* b, int64_t n) {
  vf acc[row_group]{};
  for (int64_t i = 0; i < n; i += W) acc[0] = fma(load(a + i), load(b + i), acc[0]);
  return reduce(acc, acc).a[0];
}

GATEDELTA_INLINE float exponential_of(double x) { return exponential(set1((float)x))[0]; }

/// Fills `window` with tokens [first, first + window.tokens).
inline void load_window(const HeadWork& work, int64_t first, int64_t padded, Window& window) {
  const int64_t T = window.tokens;
  double total[max_step_tokens + 1];
  double sum_of_g = 0;
  for (int64_t t = 0; t < T; ++t) {
    load_vector(work.k, first + t, work.key_dim, padded, work.qk_l2norm, work.l2_eps, 1.0, window.keys + t * padded);
    load_vector(work.q, first + t, work.key_dim, padded, work.qk_l2norm, work.l2_eps, work.scale, window.queries + t * padded);
    sum_of_g += work.log_decay[first + t];
    total[t] = sum_of_g;
    window.beta[t] = (float)work.beta[first + t];
    window.decay[t] = exponential_of(sum_of_g);
  }
  for (int64_t t = 0; t < T; ++t) {
    const float* key = window.keys + t * padded;
    const float* query = window.queries + t * padded;
    window.rest[t] = exponential_of(sum_of_g - total[t]);
    for (int64_t j = 0; j <= t; ++j) {
      const float mix = j == t ? 1.0f : exponential_of(total[t] - total[j]);
      if (j < t) window.key_mix[t * T + j] = -window.beta[t] * (mix * dot(key, window.keys + j * padded, padded));
      window.query_mix[t * T + j] = mix * dot(query, window.keys + j * padded, padded);
    }
  }
}

/// Rows of a state, dense along the keys.
struct Rows {
  const char* source;
  int64_t source_stride;
  char* target;  // null: not stored
  int64_t target_stride;
};

/// The rows to prefetch while one group of rows is in work.
struct Ahead {
  const char* near;
  const char* far;
  int64_t stride;
};

/// Lines of rows [begin, end) of the group ahead that hold column `bytes`; call with each multiple of W elements.
template <int begin, int end>
GATEDELTA_INLINE void prefetch(const Ahead& ahead, int64_t bytes) {
  if (bytes % 64 != 0) return;
  GATEDELTA_UNROLL
  for (int g = begin; g < end; ++g) {
    __builtin_prefetch(ahead.near + g * ahead.stride + bytes, 0, 3);
    __builtin_prefetch(ahead.far + g * ahead.stride + bytes, 0, 2);
  }
}

/// row_group rows times the key and the query. K is a multiple of 2 W, or (floats only) of W. With `keep`, for
/// rows that are updated next: half of the rows ahead are asked for, and 16-bit rows times the decay go to `decayed`,
/// [row_group][K], so that they are widened once.
template <class S, bool keep = true>
GATEDELTA_INLINE Sums multiply_group(const S* const* row, const float* key, const float* query, float decay, int64_t K,
                                     float* decayed, const Ahead& ahead) {
  vf with_key[row_group], with_query[row_group];
  GATEDELTA_UNROLL
  for (int g = 0; g < row_group; ++g) with_key[g] = with_query[g] = vf{};
  const auto add = [&](int g, vf s, vf k, vf q) {
    with_key[g] = fma(s, k, with_key[g]);
    with_query[g] = fma(s, q, with_query[g]);
  };
  constexpr int64_t columns = sizeof(S) == 4 ? W : 2 * W;
  for (int64_t i = 0; i < K; i += columns) {
    if constexpr (keep) prefetch<0, row_group / 2>(ahead, i * (int64_t)sizeof(S));
    const vf k = load(key + i), q = load(query + i);
    if constexpr (columns == W) {
      GATEDELTA_UNROLL
      for (int g = 0; g < row_group; ++g) add(g, load(row[g] + i), k, q);
    } else {
      const vf next_k = load(key + i + W), next_q = load(query + i + W), d = set1(decay);
      GATEDELTA_UNROLL
      for (int g = 0; g < row_group; ++g) {
        vf first, second;
        load_pair(row[g] + i, first, second);
        add(g, first, k, q);
        add(g, second, next_k, next_q);
        if constexpr (keep) {
          store(decayed + g * K + i, d * first);
          store(decayed + g * K + i + W, d * second);
        }
      }
    }
  }
  return reduce(with_key, with_query);
}

/// out = decay * row + u key for row_group rows; of 16-bit rows what multiply_group left in `decayed` is read.
/// `numbers`: neither row nor key nor u has a NaN.
template <bool numbers, class S>
GATEDELTA_INLINE void update_group(const S* const* row, const float* decayed, const float* key, float decay, v4 u, int64_t K,
                                   char* target, int64_t stride, const Ahead& ahead) {
  vf weight[row_group];
  GATEDELTA_UNROLL
  for (int g = 0; g < row_group; ++g) weight[g] = set1(u[g]);
  constexpr int64_t columns = sizeof(S) == 4 ? W : 2 * W;
  for (int64_t i = 0; i < K; i += columns) {
    prefetch<row_group / 2, row_group>(ahead, i * (int64_t)sizeof(S));
    const vf k = load(key + i);
    GATEDELTA_UNROLL
    for (int g = 0; g < row_group; ++g) {
      S* to = (S*)(target + g * stride) + i;
      if constexpr (columns == W) {
        store(to, fma(weight[g], k, set1(decay) * load(row[g] + i)));
      } else {
        const vf first = fma(weight[g], k, load(decayed + g * K + i));
        const vf second = fma(weight[g], load(key + i + W), load(decayed + g * K + i + W));
        numbers ? store_pair_of_numbers(to, first, second) : store_pair(to, first, second);
      }
    }
  }
}

/// One token. `rows` is a multiple of row_group. With FixedK, rows follow each other without gaps, which leaves all addresses
/// but one to constants.
template <class S, int64_t FixedK>
GATEDELTA_KERNEL void step_one(const Window& window, const Rows& at, int64_t rows, int64_t padded_key, const float* v, float* o,
                               float* scratch) {
  const int64_t K = FixedK ? FixedK : padded_key, row_bytes = K * (int64_t)sizeof(S);
  const int64_t source_stride = FixedK ? row_bytes : at.source_stride, target_stride = FixedK ? row_bytes : at.target_stride;
  const float decay = window.decay[0], beta = window.beta[0], mix = window.query_mix[0];
  const float *key = window.keys, *query = window.queries;
  if constexpr (sizeof(S) != 4) {
    arrange((const S*)nullptr, key, K, scratch);
    arrange((const S*)nullptr, query, K, scratch + K);
    key = scratch;
    query = scratch + K;
  }
  const auto decayed = [&](int64_t r) { return scratch + (2 + r % (2 * row_group)) * K; };  // of two groups in turn
  const int64_t near = prefetch_near / row_bytes * source_stride, far = prefetch_far<S> / row_bytes * source_stride;
  const auto group_at = [&](int64_t r, const S** row) {
    const char* first = at.source + r * source_stride;
    GATEDELTA_UNROLL
    for (int g = 0; g < row_group; ++g) row[g] = (const S*)(first + g * source_stride);
    return first;
  };
  // The update of a group comes after the products of the next one, which hides the latency of the sums.
  v4 last_u{};
  const auto update = [&](int64_t r, v4 u) {
    const S* row[row_group];
    const char* next = group_at(r, row) + row_group * source_stride;
    char* to = at.target + r * target_stride;
    const Ahead ahead{next + near, next + far, source_stride};
    // A NaN or an infinity in a row, the key or the decay makes its u one, too.
    const v4 zero = u - u;
    if (__builtin_expect(zero[0] + zero[1] + zero[2] + zero[3] == 0, 1))
      update_group<true>(row, decayed(r), key, decay, u, K, to, target_stride, ahead);
    else
      update_group<false>(row, decayed(r), key, decay, u, K, to, target_stride, ahead);
  };
  for (int64_t r = 0; r < rows; r += row_group) {
    const S* row[row_group];
    const char* first = group_at(r, row);
    const Sums S_times = multiply_group(row, key, query, decay, K, decayed(r), {first + near, first + far, source_stride});
    const v4 u = beta * (load_as<v4>(v + r) - decay * S_times.a);
    store_as(o + r, decay * S_times.b + mix * u);
    if (at.target && r > 0) update(r - row_group, last_u);
    last_u = u;
  }
  if (at.target && rows > 0) update(rows - row_group, last_u);
}

#if defined(__AVX512F__)
constexpr int dots_at_once = 4, update_vectors = 4;
#else
constexpr int dots_at_once = 2, update_vectors = 2;
#endif

/// products[x][r] = rows r .. r+3 times vectors x .. x+X-1 of the window.
template <int X>
GATEDELTA_INLINE void multiply_rows(const float* const* row, const float* vectors, int64_t padded, float* products) {
  vf acc[X][row_group];
  GATEDELTA_UNROLL
  for (int x = 0; x < X; ++x) GATEDELTA_UNROLL
  for (int g = 0; g < row_group; ++g) acc[x][g] = vf{};
  for (int64_t i = 0; i < padded; i += W) {
    vf s[row_group];
    GATEDELTA_UNROLL
    for (int g = 0; g < row_group; ++g) s[g] = load(row[g] + i);
    GATEDELTA_UNROLL
    for (int x = 0; x < X; ++x) {
      const vf y = load(vectors + x * padded + i);
      GATEDELTA_UNROLL
      for (int g = 0; g < row_group; ++g) acc[x][g] = fma(s[g], y, acc[x][g]);
    }
  }
  GATEDELTA_UNROLL
  for (int x = 0; x < X; x += 2) {
    const Sums sums = reduce(acc[x], acc[x + 1]);
    store_as(products + x * row_block, sums.a);
    store_as(products + (x + 1) * row_block, sums.b);
  }
}

/// row_group rows, N vectors of keys from column i on: out = decay * row + sum_t weights[t][g] * keys[t].
template <int N, class S>
GATEDELTA_INLINE void update_rows(const Window& window, const float* const* row, S* const* out, const float* weights, int64_t i,
                                  int64_t padded) {
  const vf decay = set1(window.decay[window.tokens - 1]);
  vf acc[row_group][N];
  GATEDELTA_UNROLL
  for (int g = 0; g < row_group; ++g) GATEDELTA_UNROLL
  for (int n = 0; n < N; ++n) acc[g][n] = decay * load(row[g] + i + n * W);
  const float* key = window.keys + i;
  for (int64_t t = 0; t < window.tokens; ++t, key += padded, weights += row_block) {
    vf k[N];
    GATEDELTA_UNROLL
    for (int n = 0; n < N; ++n) k[n] = load(key + n * W);
    GATEDELTA_UNROLL
    for (int g = 0; g < row_group; ++g) {
      const vf w = set1(weights[g]);
      GATEDELTA_UNROLL
      for (int n = 0; n < N; ++n) acc[g][n] = fma(w, k[n], acc[g][n]);
    }
  }
  GATEDELTA_UNROLL
  for (int g = 0; g < row_group; ++g) GATEDELTA_UNROLL
  for (int n = 0; n < N; ++n) store(out[g] + i + n * W, acc[g][n]);
}

/// The triangular solve for row_block rows: `with_keys` [T][row_block] holds S0 k_t and becomes u_t,
/// `with_queries` holds S0 q_t and becomes o_t.
inline void solve_rows(const Window& window, const float* v, int64_t ld_v, float* with_keys, float* with_queries) {
  const int64_t T = window.tokens;
  for (int64_t t = 0; t < T; ++t)
    for (int64_t r = 0; r < row_block; r += W) {
      const float* mix = window.key_mix + t * T;
      const vf decay = set1(window.decay[t]);
      vf u = set1(window.beta[t]) * (load(v + t * ld_v + r) - decay * load(with_keys + t * row_block + r));
      for (int64_t j = 0; j < t; ++j) u = fma(set1(mix[j]), load(with_keys + j * row_block + r), u);
      store(with_keys + t * row_block + r, u);
      vf o = decay * load(with_queries + t * row_block + r);
      mix = window.query_mix + t * T;
      for (int64_t j = 0; j <= t; ++j) o = fma(set1(mix[j]), load(with_keys + j * row_block + r), o);
      store(with_queries + t * row_block + r, o);
    }
}

/// Floats of scratch of step_one and step_many.
constexpr int64_t step_many_floats(int64_t padded_key) { return 2 * max_step_tokens * row_block + row_block * padded_key; }

/// Two to max_step_tokens tokens. `rows` is a multiple of row_group; v and o are [T][ld] with ld >= rows rounded up to
/// row_block.
template <class S, int64_t FixedK>
GATEDELTA_KERNEL void step_many(const Window& window, const Rows& at, int64_t rows, int64_t padded_key, const float* v,
                                float* o, int64_t ld, float* scratch) {
  const int64_t K = FixedK ? FixedK : padded_key, T = window.tokens;
  float* with_keys = scratch;                                  // [T][row_block]
  float* with_queries = scratch + T * row_block;               // [T][row_block], right behind: one array of 2T rows
  float* widened = scratch + 2 * max_step_tokens * row_block;  // [row_block][K], 16-bit states only
  for (int64_t block = 0; block < rows; block += row_block) {
    const int64_t count = rows - block < row_block ? rows - block : row_block;
    const float* row[row_block];
    for (int64_t r = 0; r < count; ++r) {
      const S* from = (const S*)(at.source + (block + r) * at.source_stride);
      const char* far = (const char*)from + prefetch_far<S> / (K * (int64_t)sizeof(S)) * at.source_stride;
      for (int64_t i = 0; i < K * (int64_t)sizeof(S); i += 64) __builtin_prefetch(far + i, 0, 2);
      if constexpr (sizeof(S) == 4) {
        row[r] = from;
      } else {
        float* wide = widened + r * K;
        for (int64_t i = 0; i < K; i += W) store(wide + i, load(from + i));
        row[r] = wide;
      }
    }
    for (int64_t r = 0; r < count; r += row_group) {
      int64_t x = 0;
      for (; x + dots_at_once <= 2 * T; x += dots_at_once)
        multiply_rows<dots_at_once>(row + r, window.keys + x * K, K, with_keys + x * row_block + r);
      for (; x < 2 * T; x += 2) multiply_rows<2>(row + r, window.keys + x * K, K, with_keys + x * row_block + r);
    }
    solve_rows(window, v + block, ld, with_keys, with_queries);
    for (int64_t t = 0; t < T; ++t)
      for (int64_t r = 0; r < row_block; r += W) store(o + t * ld + block + r, load(with_queries + t * row_block + r));
    if (at.target == nullptr) continue;
    for (int64_t t = 0; t < T; ++t)
      for (int64_t r = 0; r < row_block; r += W)
        store(with_keys + t * row_block + r, load(with_keys + t * row_block + r) * set1(window.rest[t]));
    for (int64_t r = 0; r < count; r += row_group) {
      S* out[row_group];
      for (int64_t g = 0; g < row_group; ++g) out[g] = (S*)(at.target + (block + r + g) * at.target_stride);
      int64_t i = 0;
      for (; i + update_vectors * W <= K; i += update_vectors * W)
        update_rows<update_vectors>(window, row + r, out, with_keys + r, i, K);
      for (; i < K; i += W) update_rows<1>(window, row + r, out, with_keys + r, i, K);
    }
  }
}

/// All value rows of `at` through one window, whatever the storage type; `v` and `o` are [T][ld].
template <class S>
void step_window(const Window& window, const Rows& at, int64_t rows, int64_t padded_key, const float* v, float* o, int64_t ld,
                 float* scratch) {
  const bool one = window.tokens == 1;
  const auto packed = [&](int64_t stride) { return stride == 128 * (int64_t)sizeof(S); };
  if (padded_key == 128 && packed(at.source_stride) && (!at.target || packed(at.target_stride))) {
    return one ? step_one<S, 128>(window, at, rows, padded_key, v, o, scratch)
               : step_many<S, 128>(window, at, rows, padded_key, v, o, ld, scratch);
  }
  one ? step_one<S, 0>(window, at, rows, padded_key, v, o, scratch)
      : step_many<S, 0>(window, at, rows, padded_key, v, o, ld, scratch);
}

/// One buffer cut into pieces that start on cache lines.
struct Scratch {
  char* next;
  float* floats(int64_t n) {
    float* out = (float*)next;
    next += round_up(n * (int64_t)sizeof(float), 64);
    return out;
  }
};

constexpr int64_t step_scratch_bytes(int64_t key_dim, int64_t rows) {
  const int64_t padded = round_up(key_dim, W), ld = round_up(rows, row_block), T = max_step_tokens;
  return 4 * (2 * T * padded + 3 * T + 2 * T * T + 2 * T * ld + step_many_floats(padded) + ld * padded +
              stage_floats(padded > ld ? padded : ld)) +
         64 * 12;
}

/// Calls `store` with each place, [rows, K], that gets the state after this token.
template <class Store>
GATEDELTA_INLINE void for_token_stores(const HeadWork& work, int64_t token, Store store) {
  if (work.token_targets && work.token_targets[token]) {
    Matrix to = work.token_layout;
    to.data = work.token_targets[token];
    store(to);
  }
  if (work.snapshots.data) {
    Matrix to = work.snapshots;
    to.data += token * work.snapshot_stride;
    store(to);
  }
}

inline void step(const HeadWork& work) {
  const int64_t padded = round_up(work.key_dim, W), ld = round_up(work.rows, row_block);
  Scratch scratch{work.scratch};
  Window window{};
  window.keys = scratch.floats(2 * max_step_tokens * padded);
  window.decay = scratch.floats(max_step_tokens);
  window.rest = scratch.floats(max_step_tokens);
  window.beta = scratch.floats(max_step_tokens);
  window.key_mix = scratch.floats(max_step_tokens * max_step_tokens);
  window.query_mix = scratch.floats(max_step_tokens * max_step_tokens);
  float* v = scratch.floats(max_step_tokens * ld);
  float* o = scratch.floats(max_step_tokens * ld);
  float* temporary = scratch.floats(step_many_floats(padded));
  float* state = scratch.floats(ld * padded);
  float* stage = scratch.floats(stage_floats(padded > ld ? padded : ld));

  const bool token_stores = work.token_targets || work.snapshots.data;
  // Straight on the caller's memory where its rows are dense; through a copy in float otherwise.
  const bool direct = work.dense_rows && work.source.data && work.key_dim % (2 * W) == 0 && !token_stores && work.tokens >= 1 &&
                      work.tokens <= max_step_tokens;
  if (!direct) {
    for (int64_t i = 0; i < ld * padded; ++i) state[i] = 0;
    load_dense(work.source, work.rows, work.key_dim, state, padded, stage);
  }

  for (int64_t first = 0; first < work.tokens; first += window.tokens) {
    const int64_t left = work.tokens - first;
    window.tokens = token_stores ? 1 : (left < max_step_tokens ? left : max_step_tokens);
    window.queries = window.keys + window.tokens * padded;
    load_window(work, first, padded, window);
    for (int64_t t = 0; t < window.tokens; ++t) {
      load_run(work.v, first + t, work.rows, v + t * ld);
      for (int64_t r = work.rows; r < ld; ++r) v[t * ld + r] = 0;
    }
    if (direct) {
      const Rows at{work.source.data, work.source.row_stride, work.target.data, work.target.row_stride};
      with_element(work.source.type, [&]<class S>(S*) { step_window<S>(window, at, work.rows, padded, v, o, ld, temporary); });
    } else {
      const Rows at{(const char*)state, padded * 4, (char*)state, padded * 4};
      step_window<float>(window, at, round_up(work.rows, row_group), padded, v, o, ld, temporary);
    }
    for (int64_t t = 0; t < window.tokens; ++t) store_run(o + t * ld, work.o, first + t, work.rows);
    for_token_stores(work, first, [&](const Matrix& to) { store_dense(state, padded, work.rows, work.key_dim, to, stage); });
  }
  if (!direct && work.target.data) store_dense(state, padded, work.rows, work.key_dim, work.target, stage);
}

}  // namespace
}  // namespace gatedelta::cpu
