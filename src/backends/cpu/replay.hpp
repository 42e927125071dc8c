// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "backends/cpu/step.hpp"

// Replay windows. With the P entries (k_j, u_j, g_j) of the window - the keys as given, and the
// corrections times what the norm multiplies them with -, the checkpoint S0 and new tokens t,
//
//     S q = e^{G_t} S0 q + sum_j e^{G_t-G_j} (k_j.q) u_j        G: sums of the g of all entries up to one
//
// where j runs over the P entries and those of t's ancestors among the new tokens. So what step.hpp does with the tokens of one
// step holds here with P tokens more, whose u is known. The state is read once; it is written only where it is folded. The
// exponents are sums of the g in between, never differences.
namespace gatedelta::cpu {
namespace {

/// A matrix whose rows may lie anywhere, for multiply_group: the last row is repeated up to a full group.
template <class S>
struct Places {
  const S* row[2 * max_replay_tokens + row_group];
  int64_t count;

  void fill(const char* data, int64_t stride, const int32_t* order, int64_t n) {
    count = n;
    for (int64_t j = 0; j < round_up(n, row_group); ++j) row[j] = (const S*)(data + order[j < n ? j : n - 1] * stride);
  }
};

/// with_key[j] = row_j key, with_query[j] = row_j query, of all rows rounded up to row_group. K as in multiply_group.
template <class S>
GATEDELTA_INLINE void multiply_places(const Places<S>& rows, const float* key, const float* query, int64_t K, float* with_key,
                                      float* with_query) {
  for (int64_t j = 0; j < rows.count; j += row_group) {
    const char* first = (const char*)rows.row[j];
    const Sums sums = multiply_group<S, 0, false>(rows.row + j, key, query, 1, K, nullptr, {first, first, 0});
    store_as(with_key + j, sums.a);
    store_as(with_query + j, sums.b);
  }
}

/// One pass over a state: S0 key and S0 query of `rows` rows (a multiple of row_group). Vectors in the order of load_pair.
template <class S, int64_t FixedK>
GATEDELTA_KERNEL void read_state(const Rows& at, int64_t rows, int64_t padded_key, const float* key, const float* query,
                                 float* with_key, float* with_query) {
  const int64_t K = FixedK ? FixedK : padded_key, row_bytes = K * (int64_t)sizeof(S);
  const int64_t stride = FixedK ? row_bytes : at.source_stride;
  const int64_t near = prefetch_near / row_bytes * stride, far = prefetch_far<S> / row_bytes * stride;
  for (int64_t r = 0; r < rows; r += row_group) {
    const char* first = at.source + r * stride;
    const S* row[row_group];
    GATEDELTA_UNROLL
    for (int g = 0; g < row_group; ++g) row[g] = (const S*)(first + g * stride);
    const Sums sums = multiply_group<S, row_group, false>(row, key, query, 1, K, nullptr, {first + near, first + far, stride});
    store_as(with_key + r, sums.a);
    store_as(with_query + r, sums.b);
  }
}

/// The same for several tokens: vectors [2T][K], products [2T][ld].
template <class S>
GATEDELTA_KERNEL void read_state_many(const Rows& at, int64_t rows, int64_t K, const float* vectors, int64_t T, float* products,
                                      int64_t ld, float* widened) {
  for (int64_t r = 0; r < rows; r += row_group) {
    const float* row[row_group];
    float sums[dots_at_once * row_block];
    for (int64_t g = 0; g < row_group; ++g) {
      const S* from = (const S*)(at.source + (r + g) * at.source_stride);
      const char* far = (const char*)from + prefetch_far<S> / (K * (int64_t)sizeof(S)) * at.source_stride;
      for (int64_t i = 0; i < K * (int64_t)sizeof(S); i += 64) __builtin_prefetch(far + i, 0, 2);
      row[g] = widened + g * K;
      for (int64_t i = 0; i < K; i += W) store(widened + g * K + i, load(from + i));
    }
    const auto keep = [&](int64_t x, int64_t n) {
      for (int64_t i = 0; i < n; ++i) store_as(products + (x + i) * ld + r, load_as<v4>(sums + i * row_block));
    };
    int64_t x = 0;
    for (; x + dots_at_once <= 2 * T; x += dots_at_once) {
      multiply_rows<dots_at_once>(row, vectors + x * K, K, sums);
      keep(x, dots_at_once);
    }
    for (; x < 2 * T; x += 2) {
      multiply_rows<2>(row, vectors + x * K, K, sums);
      keep(x, 2);
    }
  }
}

/// target = decay * source + sum_j weights[j] keys[j], `rows` rows; weights are [count][ld], scaled already.
template <class S>
GATEDELTA_KERNEL void fold_rows(const Window& window, const Rows& at, int64_t rows, int64_t K, const float* weights, int64_t ld,
                                float* widened) {
  float group[max_window_entries * row_block];
  for (int64_t r = 0; r < rows; r += row_group) {
    const float* row[row_group];
    S* out[row_group];
    for (int64_t g = 0; g < row_group; ++g) {
      const S* from = (const S*)(at.source + (r + g) * at.source_stride);
      row[g] = widened + g * K;
      for (int64_t i = 0; i < K; i += W) store(widened + g * K + i, load(from + i));
      out[g] = (S*)(at.target + (r + g) * at.target_stride);
    }
    for (int64_t j = 0; j < window.tokens; ++j) store_as(group + j * row_block, load_as<v4>(weights + j * ld + r));
    int64_t i = 0;
    for (; i + update_vectors * W <= K; i += update_vectors * W) update_rows<update_vectors>(window, row, out, group, i, K);
    for (; i < K; i += W) update_rows<1>(window, row, out, group, i, K);
  }
}

constexpr int64_t replay_scratch_bytes(int64_t key_dim, int64_t rows) {
  const int64_t padded = round_up(key_dim, 2 * W), ld = round_up(rows, row_block), T = max_replay_tokens,
                E = max_window_entries + T;
  return 4 * (2 * T * padded + T * padded + max_window_entries * padded + 2 * padded + 2 * (E + W) + 2 * T * T + 2 * T * ld +
              E * ld + row_group * padded + ld * padded + 2 * T + ld + stage_floats(padded > ld ? padded : ld)) +
         8 * (max_window_entries + 1 + T * T + T) + 64 * 20;
}

/// e^x for n doubles into floats; both have room up to a multiple of W.
inline void exponentials(const double* x, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += W) {
    for (int64_t j = i; j < i + W; ++j) out[j] = j < n ? (float)x[j] : 0.0f;
    store(out + i, exponential(load(out + i)));
  }
}

/// What the new tokens of a head have to do with each other: the sums of g from behind token j up to token t, on t's path.
struct Paths {
  double* since;    // [T][T]: since[t*T+j] for ancestors j of t, and 0 for t itself
  double* total;    // [T]: since the window's last entry
  uint64_t* above;  // [T]: bit j: j is an ancestor of t
};

inline void find_paths(const ReplayWork& work, const Paths& paths) {
  const int64_t T = work.head.tokens;
  for (int64_t t = 0; t < T; ++t) {
    const int64_t parent = work.parent ? work.parent[t * work.parent_stride] : t - 1;
    const double g = (float)work.head.log_decay[t];
    paths.total[t] = g + (parent < 0 ? 0 : paths.total[parent]);
    paths.above[t] = parent < 0 ? 0 : paths.above[parent] | (uint64_t)1 << parent;
    for (int64_t j = 0; j < t; ++j) paths.since[t * T + j] = paths.above[t] >> j & 1 ? g + paths.since[parent * T + j] : 0;
    paths.since[t * T + t] = 0;
  }
}

template <class E>
GATEDELTA_INLINE void store_entry(const float* from, const Matrix& to, int64_t place, int64_t n, float* seen) {
  char* at = to.data + place * to.row_stride;
  store_run<E>(from, at, to.col_stride, n);
  load_run<E>(at, to.col_stride, n, seen);  // as others see it
}

/// E is the type of the entries.
template <class E>
void replay_head(const ReplayWork& work) {
  const HeadWork& head = work.head;
  const int64_t T = head.tokens, P = work.length, padded = round_up(head.key_dim, 2 * W), ld = round_up(head.rows, row_block);
  Scratch scratch{head.scratch};
  float* keys = scratch.floats(2 * T * padded);  // normalised, followed by the queries
  float* queries = keys + T * padded;
  float* seen_keys = scratch.floats(T * padded);  // as stored
  float* arranged = scratch.floats(2 * padded);
  float* key_mix = scratch.floats(P + T + W);  // products of the entries with one token's key, then times their decays
  float* query_mix = scratch.floats(P + T + W);
  float* recent = scratch.floats(max_window_entries + W);  // e^x of the sums of one token
  float* with_keys = scratch.floats(T * ld * 2);           // S0 k_t, then u_t
  float* with_queries = with_keys + T * ld;
  float* u = scratch.floats((P + T) * ld);  // of the entries, as stored
  float* v = scratch.floats(ld);
  float* widened = scratch.floats(row_group * padded);
  float* own = scratch.floats(2 * T);  // k_t.q_t
  float* norm = own + T;               // what the norm multiplied k_t with
  auto* rest = (double*)scratch.floats(2 * (P + 1));
  auto* exponents = (double*)scratch.floats(2 * (max_window_entries + max_replay_tokens));
  const Paths paths{(double*)scratch.floats(2 * T * T), (double*)scratch.floats(2 * T), (uint64_t*)scratch.floats(2 * T)};

  // Sums of g behind each entry; rest[0] - with all entries - belongs to the checkpoint, rest[j+1] to entry j.
  rest[P] = 0;
  for (int64_t j = P; j-- > 0;)
    rest[j] = rest[j + 1] + load_as<float>(work.decays + (int64_t)work.order[j] * (int64_t)sizeof(float));
  find_paths(work, paths);
  for (int64_t j = 0; j < P; ++j) load_run(work.entry_corrections, work.order[j], head.rows, u + j * ld);
  for (int64_t j = 0; j < P; ++j)
    for (int64_t r = head.rows; r < ld; ++r) u[j * ld + r] = 0;
  for (int64_t t = 0; t < T; ++t) {
    norm[t] = (float)load_vector(head.k, t, head.key_dim, padded, head.qk_l2norm, head.l2_eps, 1.0, keys + t * padded);
    load_vector(head.q, t, head.key_dim, padded, head.qk_l2norm, head.l2_eps, head.scale, queries + t * padded);
    own[t] = dot(keys + t * padded, queries + t * padded, padded);
    float* seen = seen_keys + t * padded;
    load_run(head.k, t, head.key_dim, seen);
    for (int64_t i = head.key_dim; i < padded; ++i) seen[i] = 0;
    if (work.stores_keys) {
      store_entry<E>(seen, work.entry_keys, work.order[P + t], head.key_dim, seen);
    } else {
      E entry[W];
      for (int64_t i = 0; i < padded; i += W) {
        store(entry, load(seen + i));
        store(seen + i, load(entry));
      }
    }
    if (work.stores_decays)
      store_as(work.decays + (int64_t)work.order[P + t] * (int64_t)sizeof(float), (float)head.log_decay[t]);
  }

  // The state: straight from the caller's memory where its rows are dense, through a copy in float otherwise.
  Matrix source = head.source, target = head.target;
  float* state = nullptr;
  float* stage = nullptr;
  if (!head.dense_rows || head.key_dim % (2 * W) != 0) {
    state = scratch.floats(ld * padded);
    stage = scratch.floats(stage_floats(padded > ld ? padded : ld));
    for (int64_t i = 0; i < ld * padded; ++i) state[i] = 0;
    load_dense(source, head.rows, head.key_dim, state, padded, stage);
    source = {(char*)state, padded * 4, 4, Element::f32};
    if (target.data) target = source;
  }
  const Rows at{source.data, source.row_stride, target.data, target.row_stride};
  const int64_t rows = state ? round_up(head.rows, row_group) : head.rows;
  with_element(source.type, [&]<class S>(S* type) {
    if (T != 1) return read_state_many<S>(at, rows, padded, keys, T, with_keys, ld, widened);
    const float *key = keys, *query = queries;
    if constexpr (sizeof(S) != 4) {
      arrange(type, keys, padded, arranged);
      arrange(type, queries, padded, arranged + padded);
      key = arranged;
      query = arranged + padded;
    }
    padded == 128 && at.source_stride == 128 * (int64_t)sizeof(S)
        ? read_state<S, 128>(at, rows, padded, key, query, with_keys, with_queries)
        : read_state<S, 0>(at, rows, padded, key, query, with_keys, with_queries);
  });

  Places<E> live;
  const bool in_place = head.key_dim % (2 * W) == 0;  // otherwise the entries of the window are padded first
  float* padded_keys = scratch.floats(P * padded);
  if (!in_place || target.data)
    for (int64_t j = 0; j < P; ++j) {
      load_run(work.entry_keys, work.order[j], head.key_dim, padded_keys + j * padded);
      for (int64_t i = head.key_dim; i < padded; ++i) padded_keys[j * padded + i] = 0;
    }
  if (in_place && P > 0) live.fill(work.entry_keys.data, work.entry_keys.row_stride, work.order, P);

  for (int64_t t = 0; t < T; ++t) {
    const float *key = keys + t * padded, *query = queries + t * padded;
    if (P > 0 && in_place) {
      if constexpr (sizeof(E) != 4) {
        arrange((const E*)nullptr, key, padded, arranged);
        arrange((const E*)nullptr, query, padded, arranged + padded);
        key = arranged, query = arranged + padded;
      }
      multiply_places(live, key, query, padded, key_mix, query_mix);
      key = keys + t * padded, query = queries + t * padded;
    } else {
      for (int64_t j = 0; j < P; ++j) {
        key_mix[j] = dot(key, padded_keys + j * padded, padded);
        query_mix[j] = dot(query, padded_keys + j * padded, padded);
      }
    }
    for (int64_t j = 0; j < P; ++j) exponents[j] = rest[j + 1] + paths.total[t];
    exponents[P] = rest[0] + paths.total[t];
    exponentials(exponents, P + 1, recent);
    const float decay = recent[P];
    for (int64_t j = 0; j < P; ++j) {
      key_mix[j] *= recent[j];
      query_mix[j] *= recent[j];
    }
    if (t > 0) exponentials(paths.since + t * T, t, recent);
    for (int64_t j = 0; j < t; ++j) {
      const bool above = paths.above[t] >> j & 1;
      key_mix[P + j] = above ? recent[j] * dot(key, seen_keys + j * padded, padded) : 0.0f;
      query_mix[P + j] = above ? recent[j] * dot(query, seen_keys + j * padded, padded) : 0.0f;
    }
    const auto counts = [&](int64_t j) { return j < P || (paths.above[t] >> (j - P) & 1); };

    load_run(head.v, t, head.rows, v);
    for (int64_t r = head.rows; r < ld; ++r) v[r] = 0;
    float *now = with_keys + t * ld, *out = with_queries + t * ld;
    const vf d = set1(decay), b = set1((float)head.beta[t]), self = set1(own[t]), factor = set1(norm[t]);
    for (int64_t r = 0; r < ld; r += W) {
      vf recalled = d * load(now + r), o = d * load(out + r);
      for (int64_t j = 0; j < P + t; ++j) {
        if (!counts(j)) continue;  // 0 * infinity
        const vf entry = load(u + j * ld + r);
        recalled = fma(set1(key_mix[j]), entry, recalled);
        o = fma(set1(query_mix[j]), entry, o);
      }
      const vf correction = b * (load(v + r) - recalled);
      store(now + r, factor * correction);
      store(out + r, fma(self, correction, o));
    }
    store_run(out, head.o, t, head.rows);
    store_entry<E>(now, work.entry_corrections, work.order[P + t], head.rows, u + (P + t) * ld);
    for (int64_t r = head.rows; r < ld; ++r) u[(P + t) * ld + r] = 0;
  }

  if (!target.data) return;
  Window window{};
  window.tokens = P;
  window.keys = padded_keys;
  window.decay = recent;
  exponentials(rest, P + 1, key_mix);
  for (int64_t j = 0; j < P; ++j) {
    recent[j] = key_mix[0];  // update_rows takes the last one as the decay of the state
    for (int64_t r = 0; r < ld; r += W) store(u + j * ld + r, load(u + j * ld + r) * set1(key_mix[j + 1]));
  }
  with_element(source.type, [&]<class S>(S*) { fold_rows<S>(window, at, rows, padded, u, ld, widened); });
  if (state) store_dense(state, padded, head.rows, head.key_dim, head.target, stage);
}

inline void replay(const ReplayWork& work) {
  work.entry_keys.type == Element::f32 ? replay_head<float>(work) : replay_head<bf16_t>(work);
}

}  // namespace
}  // namespace gatedelta::cpu
