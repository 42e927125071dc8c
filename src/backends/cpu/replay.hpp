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

// Bytes of a 16-bit state to ask for ahead, into L2: widening it takes so long that its loads alone are too few to keep memory
// busy.
constexpr int64_t read_ahead = 8192;

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
    const Sums sums = multiply_group<S, false>(rows.row + j, key, query, 1, K, nullptr, {first, first, 0});
    store_as(with_key + j, sums.a);
    store_as(with_query + j, sums.b);
  }
}

/// One pass over a state: S0 key and S0 query of `rows` rows (a multiple of row_group). Vectors in the order of load_pair.
/// The state is read in the order of its memory, which the hardware's prefetchers follow best.
template <class S, int64_t FixedK>
GATEDELTA_KERNEL void read_state(const Rows& at, int64_t rows, int64_t padded_key, const float* key, const float* query,
                                 float* with_key, float* with_query) {
  const int64_t K = FixedK ? FixedK : padded_key;
  const int64_t row_bytes = K * (int64_t)sizeof(S), stride = FixedK ? row_bytes : at.source_stride;
  const int64_t ahead = read_ahead / row_bytes * stride;
  for (int64_t r = 0; r < rows; r += row_group) {
    vf key_sums[row_group], query_sums[row_group];
    GATEDELTA_UNROLL
    for (int g = 0; g < row_group; ++g) {
      const S* row = (const S*)(at.source + (r + g) * stride);
      key_sums[g] = query_sums[g] = vf{};
      if constexpr (sizeof(S) == 4) {
        for (int64_t i = 0; i < K; i += W) {
          const vf s = load(row + i);
          key_sums[g] = fma(s, load(key + i), key_sums[g]);
          query_sums[g] = fma(s, load(query + i), query_sums[g]);
        }
      } else {
        for (int64_t i = 0; i < K; i += 2 * W) {
          if (i * (int64_t)sizeof(S) % 64 == 0) __builtin_prefetch((const char*)(row + i) + ahead, 0, 2);
          vf first, second;
          load_pair(row + i, first, second);
          key_sums[g] = fma(second, load(key + i + W), fma(first, load(key + i), key_sums[g]));
          query_sums[g] = fma(second, load(query + i + W), fma(first, load(query + i), query_sums[g]));
        }
      }
    }
    const Sums sums = reduce(key_sums, query_sums);
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
                P = max_window_entries, E = P + T;
  const int64_t floats = 3 * T * padded + 2 * T * ld + 2 * T + ld * padded + 2 * stage_floats(padded > ld ? padded : ld) +
                         2 * row_group * padded + 4 * padded + P * padded + E * ld + 3 * (E + W) + ld + 2 * P + 1 + W + P * ld;
  return 4 * floats + 8 * (P + 1 + T * T + 2 * T + E) + 64 * 24;
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

/// One new token of a head and its products with the entries before it.
struct Recall {
  float decay, beta, norm, own;        // e^G since the checkpoint; what the norm multiplied the key with; key . query
  const float *with_key, *with_query;  // products of the entries, times their decays
  int64_t length, entries;             // P; P and the tokens before this one, of which
  uint64_t above;                      // those with a bit count: others may be infinite
};

/// N vectors of rows of one token: `now` is S0 key and becomes the correction, `out` is S0 query and becomes the output.
template <int N, class E>
GATEDELTA_INLINE void correct(const Recall& token, const E* const* corrections, const float* v, int64_t r, float* now,
                              float* out) {
  vf recalled[N], o[N];
  GATEDELTA_UNROLL
  for (int n = 0; n < N; ++n) {
    recalled[n] = set1(token.decay) * load(now + r + n * W);
    o[n] = set1(token.decay) * load(out + r + n * W);
  }
  for (int64_t j = 0; j < token.entries; ++j) {
    if (j >= token.length && !(token.above >> (j - token.length) & 1)) continue;
    const vf k = set1(token.with_key[j]), q = set1(token.with_query[j]);
    GATEDELTA_UNROLL
    for (int n = 0; n < N; ++n) {
      const vf u = load(corrections[j] + r + n * W);
      recalled[n] = fma(k, u, recalled[n]);
      o[n] = fma(q, u, o[n]);
    }
  }
  GATEDELTA_UNROLL
  for (int n = 0; n < N; ++n) {
    const vf correction = set1(token.beta) * (load(v + r + n * W) - recalled[n]);
    store(now + r + n * W, set1(token.norm) * correction);
    store(out + r + n * W, fma(set1(token.own), correction, o[n]));
  }
}

/// A head's call, in the order of its functions. E is the type of the entries.
template <class E>
struct Replay {
  explicit Replay(const ReplayWork& work) : work(work) {
    keys = scratch.floats(2 * T * padded);
    queries = keys + T * padded;
    with_keys = scratch.floats(2 * T * ld);
    with_queries = with_keys + T * ld;
    own = scratch.floats(2 * T);
    norm = own + T;
    rest = (double*)scratch.floats(2 * (P + 1));
    paths = {(double*)scratch.floats(2 * T * T), (double*)scratch.floats(2 * T), (uint64_t*)scratch.floats(2 * T)};
  }

  void load_tokens();
  void read_checkpoint();
  void find_entries();
  void correct_tokens();
  void fold();

  char* key_at(int64_t j) const { return work.entry_keys.data + work.order[j] * work.entry_keys.row_stride; }
  char* correction_at(int64_t j) const {
    return work.entry_corrections.data + work.order[j] * work.entry_corrections.row_stride;
  }
  char* decay_at(int64_t j) const { return work.decays + work.order[j] * (int64_t)sizeof(float); }
  void find_correction(int64_t j);

  const ReplayWork& work;
  const HeadWork& head = work.head;
  const int64_t T = head.tokens, P = work.length, padded = round_up(head.key_dim, 2 * W), ld = round_up(head.rows, row_block);
  const int64_t covered = round_up(head.rows, W);       // rows that vectors reach
  const bool whole_keys = head.key_dim % (2 * W) == 0;  // vectors of keys
  const bool whole_rows = head.rows % W == 0;           // and of corrections end where their data does
  const bool direct = head.dense_rows && whole_keys;    // the caller's memory is the state that is worked on
  Scratch scratch{head.scratch};

  float *keys, *queries;            // [T][padded], normalised, one behind the other
  float* seen_keys = nullptr;       // [T][padded], as entries hold them
  float *with_keys, *with_queries;  // [T][ld]: S0 k_t and S0 q_t, then what entry t holds and o_t
  float *own, *norm;                // [T]: k_t.q_t, and what the norm multiplied k_t with
  double* rest;                     // [P+1]: sums of g: rest[0] that of all entries, rest[j+1] of those behind entry j
  Paths paths;
  float* state = nullptr;  // [ld][padded], unless direct
  Rows at{};
  Places<E> live;                // whole_keys
  float* padded_keys = nullptr;  // [P][padded]: not whole_keys, or a fold
  E* copies = nullptr;           // [P+T][ld]: not whole_rows
  const E* corrections[max_window_entries + max_replay_tokens];
};

template <class E>
void Replay<E>::load_tokens() {
  rest[P] = 0;
  for (int64_t j = P; j-- > 0;) rest[j] = rest[j + 1] + load_as<float>(decay_at(j));
  find_paths(work, paths);
  seen_keys = scratch.floats(T * padded);
  for (int64_t t = 0; t < T; ++t) {
    float *key = keys + t * padded, *query = queries + t * padded, *seen = seen_keys + t * padded;
    norm[t] = (float)load_vector(head.k, t, head.key_dim, padded, head.qk_l2norm, head.l2_eps, 1.0, key);
    load_vector(head.q, t, head.key_dim, padded, head.qk_l2norm, head.l2_eps, head.scale, query);
    own[t] = dot(key, query, padded);
    load_run(head.k, t, head.key_dim, seen);
    fill_zero(seen + head.key_dim, padded - head.key_dim);
    if (work.stores_keys) store_run<E>(seen, key_at(P + t), sizeof(E), head.key_dim);
    if (work.stores_decays) store_as(decay_at(P + t), (float)head.log_decay[t]);
    if (t + 1 == T) break;  // no token comes after it
    E entry[W];
    for (int64_t i = 0; i < padded; i += W) {
      store(entry, load(seen + i));
      store(seen + i, load(entry));
    }
  }
}

template <class E>
void Replay<E>::read_checkpoint() {
  Matrix source = head.source;
  at = {source.data, source.row_stride, head.target.data, head.target.row_stride};
  if (!direct) {
    state = scratch.floats(ld * padded);
    fill_zero(state, ld * padded);
    load_dense(source, head.rows, head.key_dim, state, padded, scratch.floats(stage_floats(padded > ld ? padded : ld)));
    source = {(char*)state, padded * 4, 4, Element::f32};
    at = {source.data, source.row_stride, head.target.data ? source.data : nullptr, source.row_stride};
  }
  const int64_t rows = round_up(head.rows, row_group);
  with_element(source.type, [&]<class S>(S* type) {
    if (T != 1) return read_state_many<S>(at, rows, padded, keys, T, with_keys, ld, scratch.floats(row_group * padded));
    const float *key = keys, *query = queries;
    if constexpr (sizeof(S) != 4) {
      float* arranged = scratch.floats(2 * padded);
      arrange(type, keys, 2 * padded, arranged);
      key = arranged;
      query = arranged + padded;
    }
    padded == 128 && at.source_stride == 128 * (int64_t)sizeof(S)
        ? read_state<S, 128>(at, rows, padded, key, query, with_keys, with_queries)
        : read_state<S, 0>(at, rows, padded, key, query, with_keys, with_queries);
  });
}

template <class E>
void Replay<E>::find_correction(int64_t j) {
  const auto* from = (const E*)correction_at(j);
  corrections[j] = from;
  if (whole_rows) return;
  E* to = copies + j * ld;
  for (int64_t i = 0; i < covered; ++i) store_as(to + i, i < head.rows ? load_as<E>(from + i) : E{});
  corrections[j] = to;
}

template <class E>
void Replay<E>::find_entries() {
  if (whole_keys && P > 0) live.fill(work.entry_keys.data, work.entry_keys.row_stride, work.order, P);
  if (!whole_keys || head.target.data) {
    padded_keys = scratch.floats(P * padded);
    for (int64_t j = 0; j < P; ++j) {
      load_run<E>(key_at(j), sizeof(E), head.key_dim, padded_keys + j * padded);
      fill_zero(padded_keys + j * padded + head.key_dim, padded - head.key_dim);
    }
  }
  if (!whole_rows) copies = (E*)scratch.floats((P + T) * ld);
  for (int64_t j = 0; j < P; ++j) find_correction(j);
}

template <class E>
void Replay<E>::correct_tokens() {
  float* arranged = scratch.floats(2 * padded);
  float* with_key = scratch.floats(P + T + W);  // products of the entries with one token's key, then times their decays
  float* with_query = scratch.floats(P + T + W);
  float* decays = scratch.floats(P + T + W);
  auto* exponents = (double*)scratch.floats(2 * (P + T));
  float* v = scratch.floats(ld);
  for (int64_t t = 0; t < T; ++t) {
    const float *key = keys + t * padded, *query = queries + t * padded;
    if (P > 0 && whole_keys) {
      arrange((const E*)nullptr, key, padded, arranged);
      arrange((const E*)nullptr, query, padded, arranged + padded);
      multiply_places(live, arranged, arranged + padded, padded, with_key, with_query);
    } else {
      for (int64_t j = 0; j < P; ++j) {
        with_key[j] = dot(key, padded_keys + j * padded, padded);
        with_query[j] = dot(query, padded_keys + j * padded, padded);
      }
    }
    for (int64_t j = 0; j < P; ++j) exponents[j] = rest[j + 1] + paths.total[t];
    exponents[P] = rest[0] + paths.total[t];
    exponentials(exponents, P + 1, decays);
    const float decay = decays[P];
    for (int64_t j = 0; j < P; ++j) {
      with_key[j] *= decays[j];
      with_query[j] *= decays[j];
    }
    if (t > 0) exponentials(paths.since + t * T, t, decays);
    for (int64_t j = 0; j < t; ++j) {
      const bool above = paths.above[t] >> j & 1;
      with_key[P + j] = above ? decays[j] * dot(key, seen_keys + j * padded, padded) : 0.0f;
      with_query[P + j] = above ? decays[j] * dot(query, seen_keys + j * padded, padded) : 0.0f;
    }

    load_run(head.v, t, head.rows, v);
    fill_zero(v + head.rows, ld - head.rows);
    float *now = with_keys + t * ld, *out = with_queries + t * ld;
    const Recall token{decay, (float)head.beta[t], norm[t], own[t], with_key, with_query, P, P + t, paths.above[t]};
    int64_t r = 0;
    for (; r + update_vectors * W <= covered; r += update_vectors * W)
      correct<update_vectors>(token, corrections, v, r, now, out);
    for (; r < covered; r += W) correct<1>(token, corrections, v, r, now, out);
    store_run(out, head.o, t, head.rows);
    store_run<E>(now, correction_at(P + t), sizeof(E), head.rows);
    find_correction(P + t);
  }
}

template <class E>
void Replay<E>::fold() {
  float* decays = scratch.floats(P + 1 + W);
  float* weights = scratch.floats(P * ld);
  Window window{};
  window.tokens = P;
  window.keys = padded_keys;
  window.decay = scratch.floats(P);
  exponentials(rest, P + 1, decays);
  for (int64_t j = 0; j < P; ++j) {
    window.decay[j] = decays[0];  // update_rows takes the last one as the decay of the state
    for (int64_t r = 0; r < covered; r += W) store(weights + j * ld + r, load(corrections[j] + r) * set1(decays[j + 1]));
  }
  float* widened = scratch.floats(row_group * padded);
  with_element(state ? Element::f32 : head.source.type,
               [&]<class S>(S*) { fold_rows<S>(window, at, round_up(head.rows, row_group), padded, weights, ld, widened); });
  if (state)
    store_dense(state, padded, head.rows, head.key_dim, head.target, scratch.floats(stage_floats(padded > ld ? padded : ld)));
}

template <class E>
void replay_head(const ReplayWork& work) {
  Replay<E> head(work);
  head.load_tokens();
  head.read_checkpoint();
  head.find_entries();
  head.correct_tokens();
  if (work.head.target.data) head.fold();
}

inline void replay(const ReplayWork& work) {
  work.entry_keys.type == Element::f32 ? replay_head<float>(work) : replay_head<bf16_t>(work);
}

}  // namespace
}  // namespace gatedelta::cpu
