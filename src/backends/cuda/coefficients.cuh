// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <type_traits>

#include "backends/cuda/gates.cuh"
#include "backends/cuda/vectors.cuh"

namespace gatedelta::cuda {

__device__ inline float shuffle(float x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }

template <bool common>
__device__ float normalisation(const FastParams& p, float square) {
  return common || p.l2norm ? rsqrtf(square + p.l2_eps) : 1.0f;
}

/// A lane's keys of a token's key or query, as vectors of `width` elements; zeros where there is no token.
template <int width, int runs>
__device__ __forceinline__ void fetch_column(Pair (&words)[runs][width / 2], const FastParams& p, bool query, bool is_token,
                                             unsigned n, unsigned token, unsigned h, int c) {
  const std::int64_t at =
      query ? offset_of(p.q, n, token, head_of(h, p.q_group)) : offset_of(p.k, n, token, head_of(h, p.k_group));
  const auto* const from = static_cast<const std::uint16_t*>(query ? p.q.data : p.k.data) + at + width * c;
#pragma unroll
  for (int i = 0; i < runs; ++i) {
    if constexpr (width == 8) {
      uint4 vector = {};
      if (is_token) vector = *reinterpret_cast<const uint4*>(from + 4 * width * i);
      words[i][0] = vector.x, words[i][1] = vector.y, words[i][2] = vector.z, words[i][3] = vector.w;
    } else {
      uint2 vector = {};
      if (is_token) vector = *reinterpret_cast<const uint2*>(from + 4 * width * i);
      words[i][0] = vector.x, words[i][1] = vector.y;
    }
  }
}

/// Products of all columns with each other, or with those of two blocks: of row g (of `rows`, and of `more_rows`) and the
/// lane's columns.
template <int runs, int pairs>
__device__ __forceinline__ void multiply_columns(const Pair (&rows)[runs][pairs],
                                                 std::type_identity_t<const Pair (*)[pairs]> more_rows,
                                                 const Pair (&columns)[runs][pairs], float (&out)[2], float* more_out) {
  float d[2][4] = {};
#pragma unroll
  for (int i = 0; i < runs; ++i)
#pragma unroll
    for (int j = 0; j < pairs; j += 2)
      multiply_add(d[(i * pairs / 2 + j / 2) % 2], rows[i][j], more_rows != nullptr ? more_rows[i][j] : 0, rows[i][j + 1],
                   more_rows != nullptr ? more_rows[i][j + 1] : 0, columns[i][j], columns[i][j + 1]);
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    out[e] = d[0][e] + d[1][e];
    if (more_out != nullptr) more_out[e] = d[0][2 + e] + d[1][2 + e];
  }
}

template <int runs, int pairs>
__device__ __forceinline__ void copy_pairs(Pair (&out)[4], const Pair (&words)[runs][pairs], int first) {
#pragma unroll
  for (int e = 0; e < 4; ++e) out[e] = words[(first + e) / pairs][(first + e) % pairs];
}

template <int blocks, int runs, int pairs>
__device__ void forget_all(Pair (&words)[blocks][runs][pairs]) {
#pragma unroll
  for (auto& block : words)
#pragma unroll
    for (auto& run : block)
#pragma unroll
      for (Pair& pair : run) forget(pair);
}

/// Numbers that one warp hands to the others of its block, lane by lane.
class SharedNumbers {
 public:
  __device__ SharedNumbers(void* memory, int lane, bool gives)
      : next_(static_cast<std::uint32_t*>(memory) + lane), vectors_(static_cast<uint4*>(memory) + lane), gives_(gives) {}
  __device__ void pass(std::uint32_t& x) {
    if (gives_)
      *next_ = x;
    else
      x = *next_;
    next_ += 32;
  }
  __device__ void pass(float& x) {
    auto bits = __float_as_uint(x);
    pass(bits);
    x = __uint_as_float(bits);
  }
  /// All there are, four at a time.
  template <int count>
  __device__ __forceinline__ void pass_all(Pair (&words)[count]) const {
    static_assert(count % 4 == 0);
#pragma unroll
    for (int i = 0; i < count; i += 4) {
      if (uint4& vector = vectors_[i / 4 * 32]; gives_) {
        vector = make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]);
      } else {
        const uint4 four = vector;
        words[i] = four.x, words[i + 1] = four.y, words[i + 2] = four.z, words[i + 3] = four.w;
      }
    }
  }

 private:
  std::uint32_t* next_;
  uint4* const vectors_;
  const bool gives_;
};

/// What a warp knows of the tokens of one row and head before it has seen the state, all of it in registers, as fragments of
/// matrix products: with g = lane / 4 and c = lane % 4 a lane has the columns 2c and 2c+1, and row g, of each matrix of tokens.
/// Columns are the keys of 8 tokens and, in a second block, their queries; or, for 4 tokens, 4 keys and 4 queries.
///
///     W = (I + A)^-1       A_tj = beta_t exp(G_t - G_j) k^_t k^_j  (j < t)
///     Q_tj = scale exp(G_t - G_j) q^_t k^_j  (j <= t)
///
/// W is made row by row, together with Q W. For normalised keys and beta <= 2 its elements are no larger than 2: they are the
/// answers of the recurrence to one value, and a step of that is a contraction.
///
/// `part_count`: as sums of how many bfloat16 numbers W, Q W and what they are multiplied with are kept. Three are all of a
/// float32; where corrections are rounded to bfloat16, two are enough.
template <int key_dim, int token_tile, int width, int part_count = 3>
class TokenColumns {
 public:
  static_assert(token_tile == 4 || token_tile == 8);
  using Element = __nv_bfloat16;       ///< of q, k, v and o
  static constexpr int key_parts = 1;  ///< of keys and queries
  static constexpr int groups = 1;     ///< of 8 columns, for the keys
  static constexpr int parts = part_count;
  static constexpr int blocks = token_tile / 4, runs = key_dim / (4 * width);
  static constexpr bool beside = token_tile == 4;  ///< keys and queries share a block

  // Factors of S k_t and v_t in R_t, and of S q_t in o_t, for the lane's columns.
  float key_factor[groups][2], value_factor[groups][2], query_factor[groups][2];
  float key_norm[2];  ///< what normalises the keys of the lane's columns; for windows

  /// `memory`: the block's; what there is has room in registers.
  __device__ explicit TokenColumns(void* /*memory*/) {}

  /// The token whose outputs are in column g of the last block; negative for none.
  __device__ static int query_of(int g) { return beside ? g - 4 : g; }
  /// Of column g of a block, the keys (or of a query) width (c + 4i) + 2j, + 1.
  __device__ Pair pair(int block, int i, int j) const { return words_[block][i][j]; }
  __device__ const Pair (&run(int block, int i) const)[width / 2] { return words_[block][i]; }
  /// Four of them, from the pair of this number in the order of i and j.
  __device__ void load_pairs(Pair (&out)[4], int block, int first, int /*part*/ = 0) const {
    copy_pairs(out, words_[block], first);
  }

  /// `first`: where the row's tokens begin.
  __device__ void fetch(const FastParams& p, unsigned n, unsigned h, int count, int g, int c, unsigned first = 0) {
    const auto token = first + static_cast<unsigned>(g % token_tile);
    const bool is_token = g % token_tile < count;
#pragma unroll
    for (int block = 0; block < blocks; ++block) {
      const bool query = beside ? g >= 4 : block == 1;
      fetch_column<width>(words_[block], p, query, is_token, n, token, h, c);
    }
  }
  template <bool common>
  __device__ void fetch_gates(const FastParams& p, unsigned n, unsigned h, int count, int g, unsigned first = 0) {
    if (const int token = g % token_tile; token < count) gates_.fetch<common>(p, n, first + static_cast<unsigned>(token), h);
  }

  /// Hands what was fetched to the other warps of the block, where they have no columns of their own.
  __device__ void share(int, int) {}

  /// `path`: bit i says whether row g's token sees token i, itself included, where they are not in a row.
  template <bool common, bool tree = false>
  __device__ void prepare(const FastParams& p, int count, int g, int c, unsigned path = 0) {
    prepare_with<common, tree>(p, count, g, c, path, [&](float(&products)[2], float(&read_outs)[2], float(&squares)[2]) {
      if constexpr (beside) {
        multiply_columns(words_[0], nullptr, words_[0], products, nullptr);
      } else {
        multiply_columns(words_[0], words_[blocks - 1], words_[0], products, read_outs);
        multiply_columns(words_[blocks - 1], nullptr, words_[blocks - 1], squares, nullptr);
      }
    });
  }

  /// What prepare() has found out.
  static constexpr std::size_t shared_bytes = 128 * (9 + parts * blocks);
  __device__ void pass(SharedNumbers numbers) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      numbers.pass(key_factor[0][e]), numbers.pass(value_factor[0][e]), numbers.pass(query_factor[0][e]);
      numbers.pass(decays_[e]);
    }
    numbers.pass(prefix_);
#pragma unroll
    for (auto& solution : solutions_)
#pragma unroll
      for (Pair& part : solution) numbers.pass(part);
  }

  static constexpr std::size_t norms_bytes = 128 * 2;
  __device__ void pass_norms(SharedNumbers numbers) { numbers.pass(key_norm[0]), numbers.pass(key_norm[1]); }
  /// Of token g, or g % 4; for the warp that has prepared the tokens.
  __device__ float log_decay() const { return log_decay_; }

  /// From R (rows g and g + 8 of 16) to the corrections U; adds to the outputs, which are in the columns of queries.
  __device__ void solve(const float (&in)[1][2][2], float (&corrections)[1][4], float (&out)[1][4]) const {
    Pair a[parts][2];
#pragma unroll
    for (int half = 0; half < 2; ++half)
      split_in<parts>(in[0][half][0], in[0][half][1], [&](int part) -> Pair& { return a[part][half]; });
    const auto multiply = [&](float(&d)[4], const Pair(&b)[parts]) {
      if constexpr (parts == 3) {
        multiply_add(d, a[2][0], a[2][1], a[1][0], a[1][1], b[0], b[1]);
        multiply_add(d, a[0][0], a[0][1], a[1][0], a[1][1], b[2], b[0]);
      } else {
        multiply_add(d, a[1][0], a[1][1], b[0]);
      }
      multiply_add(d, a[0][0], a[0][1], a[0][0], a[0][1], b[1], b[0]);
    };
    if constexpr (beside) {
      // One product gives both: corrections in the first four columns, where `out` is zero, outputs in the others.
      multiply(out[0], solutions_[0]);
      const bool key_columns = threadIdx.x % 4 < 2;
#pragma unroll
      for (int e = 0; e < 4; ++e) corrections[0][e] = key_columns ? out[0][e] : 0.0f;
    } else {
      multiply(corrections[0], solutions_[0]);
      multiply(out[0], solutions_[blocks - 1]);
    }
  }

  __device__ void forget() { forget_all(words_); }

  /// The decay of the state up to token t, and the factors of u_j k_j^T in the state after it.
  __device__ float decay_to(int t) const { return shuffle(prefix_, 4 * t); }
  __device__ void factors_to(int t, int c, float (&out)[1][2]) const {
    out[0][0] = shuffle(decays_[0], 4 * t + c), out[0][1] = shuffle(decays_[1], 4 * t + c);
  }

  /// Corrections of the lane's columns, with their factors, as a fragment.
  __device__ static void split(float x, float y, Pair (&out)[parts]) {
    split_in<parts>(x, y, [&](int part) -> Pair& { return out[part]; });
  }
  /// d += U k^T for rows g and g + 8 and the keys of pair(0, i, j) and pair(0, i, j + 1).
  __device__ void multiply_keys(float (&d)[2][4], const Pair (&u)[1][2][parts], int i, int j) const {
    const auto& [low, high] = u[0];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const Pair column = transposed(words_[0][i][j + e]);
      if constexpr (parts == 3) multiply_add(d[e], low[2], high[2], column);
      multiply_add(d[e], low[0], high[0], low[1], high[1], column, column);
    }
  }

 protected:
  /// multiply(products, read_outs, squares) gives the products of row g with the lane's columns: of keys, of queries with keys
  /// and of queries; where they share a block, the first are all.
  template <bool common, bool tree, class Multiply>
  __device__ __forceinline__ void prepare_with(const FastParams& p, int count, int g, int c, unsigned path, Multiply multiply) {
    const int t = g % token_tile;
    const auto sees = [&](int token) { return tree ? (path >> token & 1) != 0 : token <= t; };
    int column[2];  // token
    // Row g with the columns of the keys: of the key of row g, and of its query. Squares are on the diagonal.
    float products[2], read_outs[2], squares[2];
    multiply(products, read_outs, squares);
    float decay = 1, beta = 0;
    if (t < count) {
      log_decay_ = gates_.log_decay<float, common>(p);
      decay = expf(log_decay_);
      beta = gates_.beta<float, common>(p);
    }
    const auto factor_of = [&](const float(&x)[2]) {
      return normalisation<common>(p, shuffle(g % 2 == 0 ? x[0] : x[1], 4 * g + g / 2));
    };
    const float row_factor = factor_of(products);
    float row_query_factor = row_factor;
    if constexpr (beside)
      read_outs[0] = products[0], read_outs[1] = products[1];
    else
      row_query_factor = factor_of(squares);
    // exp(G_t - G_j) as a product: what underflows here does so in the recurrence.
    decays_[0] = decays_[1] = 1;
    prefix_ = shuffle(decay, 0);
    if (!sees(0)) prefix_ = 1;
#pragma unroll
    for (int e = 0; e < 2; ++e) column[e] = (2 * c + e) % token_tile;
#pragma unroll
    for (int i = 1; i < token_tile; ++i) {
      const float next = shuffle(decay, 4 * i), factor = sees(i) ? next : 1.0f;
      prefix_ *= factor;
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (i > column[e]) decays_[e] *= factor;
    }
    const bool key_columns = !beside || c < 2, key_row = !beside || g < 4;
    float left[2], right[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int from = 4 * (2 * c + e);
      const float norm = shuffle(row_factor, from), query_norm = shuffle(row_query_factor, from);
      key_norm[e] = key_columns ? norm : 0.0f;
      const float column_decay = shuffle(prefix_, from), column_beta = shuffle(beta, from);
      key_factor[0][e] = key_columns ? -column_beta * (column_decay * norm) : 0.0f;
      value_factor[0][e] = key_columns ? column_beta : 0.0f;
      query_factor[0][e] = !beside || c >= 2 ? p.scale * (column_decay * query_norm) : 0.0f;
      decays_[e] = key_columns && sees(column[e]) ? decays_[e] * norm : 0.0f;
      left[e] = key_row && column[e] < t ? -beta * (row_factor * products[e] * decays_[e]) : 0.0f;
      right[e] = p.scale * (row_query_factor * read_outs[e] * decays_[e]);
      if constexpr (beside) left[e] = key_row ? left[e] : right[e];
    }
    float w[2], qw[2] = {};
#pragma unroll
    for (int e = 0; e < 2; ++e) w[e] = key_columns && key_row && column[e] == t ? 1.0f : 0.0f;
#pragma unroll
    for (int i = 0; i < token_tile; ++i) {
      const float a = shuffle(i % 2 == 0 ? left[0] : left[1], 4 * g + i / 2);
      const float b = beside ? 0.0f : shuffle(i % 2 == 0 ? right[0] : right[1], 4 * g + i / 2);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float known = shuffle(w[e], 4 * i + c);  // row i is complete
        w[e] += a * known;
        if constexpr (!beside) qw[e] += b * known;
      }
    }
    split_in<parts>(w[0], w[1], [&](int part) -> Pair& { return solutions_[0][part]; });
    if constexpr (!beside) split_in<parts>(qw[0], qw[1], [&](int part) -> Pair& { return solutions_[blocks - 1][part]; });
  }

 private:
  Pair words_[blocks][runs][width / 2];
  GateInputs gates_;
  float log_decay_ = 0;
  Pair solutions_[blocks][parts];  ///< W, and Q W
  float decays_[2];                ///< exp(G_t - G_j) n_j for row t and the lane's columns j <= t
  float prefix_;                   ///< exp(G_t) for row t
};

/// R, and the outputs that there were without corrections, of 16 value rows: from the products of the state with all columns,
/// and from v.
template <class Tokens, class Raw, int groups>
__device__ __forceinline__ void apply_factors(const Tokens& tokens, const float (&products)[Tokens::blocks][4],
                                              const Raw (&v)[groups][2], float (&in)[groups][2][2], float (&out)[groups][4]) {
#pragma unroll
  for (int group = 0; group < groups; ++group)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float v_values[2];
      widen(v[group][half], v_values[0], v_values[1], typename Tokens::Element{});
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        constexpr int queries = Tokens::blocks - groups;
        in[group][half][e] =
            tokens.key_factor[group][e] * products[group][2 * half + e] + tokens.value_factor[group][e] * v_values[e];
        out[group][2 * half + e] = tokens.query_factor[group][e] * products[queries + group][2 * half + e];
      }
    }
}
/// The same with the products as the sum of `chains`.
template <class Tokens, class Raw, int chains, int groups>
__device__ __forceinline__ void apply_factors(const Tokens& tokens, const float (&products)[chains][Tokens::blocks][4],
                                              const Raw (&v)[groups][2], float (&in)[groups][2][2], float (&out)[groups][4]) {
  float sums[Tokens::blocks][4];
#pragma unroll
  for (int block = 0; block < Tokens::blocks; ++block)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      sums[block][e] = products[0][block][e];
#pragma unroll
      for (int chain = 1; chain < chains; ++chain) sums[block][e] += products[chain][block][e];
    }
  apply_factors(tokens, sums, v, in, out);
}

/// The corrections as fragments, with what has become of each in the state after token t.
template <class Tokens, int groups>
__device__ __forceinline__ void corrections_after(const Tokens& tokens, int t, int c, const float (&u)[groups][4],
                                                  Pair (&fragments)[groups][2][Tokens::parts]) {
  float factor[groups][2];
  tokens.factors_to(t, c, factor);
#pragma unroll
  for (int group = 0; group < groups; ++group)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      Tokens::split(factor[group][0] * u[group][2 * half], factor[group][1] * u[group][2 * half + 1], fragments[group][half]);
}

/// For one token of a replay window: its key in column 0, its query in column 1.
template <int key_dim, int width, int part_count>
class TokenColumns<key_dim, 1, width, part_count> {
 public:
  static constexpr int blocks = 1, runs = key_dim / (4 * width);

  __device__ explicit TokenColumns(void* /*memory*/) {}

  __device__ static int query_of(int) { return 0; }
  __device__ Pair pair(int block, int i, int j) const { return words_[block][i][j]; }
  __device__ const Pair (&run(int block, int i) const)[width / 2] { return words_[block][i]; }

  __device__ void fetch(const FastParams& p, unsigned n, unsigned h, int, int g, int c, unsigned = 0) {
    fetch_column<width>(words_[0], p, g == 1, g < 2, n, 0u, h, c);
  }
  template <bool common>
  __device__ void fetch_gates(const FastParams& p, unsigned n, unsigned h, int, int, unsigned = 0) {
    gates_.fetch<common>(p, n, 0u, h);
  }

  template <bool common>
  __device__ void prepare(const FastParams& p) {
    float products[2];
    multiply_columns(words_[0], nullptr, words_[0], products, nullptr);
    log_decay_ = gates_.log_decay<float, common>(p);
    const float decay = expf(log_decay_);
    beta_ = gates_.beta<float, common>(p);
    key_norm_ = normalisation<common>(p, shuffle(products[0], 0));
    const float query_scale = p.scale * normalisation<common>(p, shuffle(products[1], 4));
    read_out_ = query_scale * (key_norm_ * shuffle(products[1], 0));
    key_factor_ = -beta_ * (decay * key_norm_), query_factor_ = query_scale * decay;
  }

  /// The factors of a value and of S k in the correction, of S q and the correction in the output, and of the correction in an
  /// entry, with the lane's gates.
  __device__ void store_factors(float* to) const {
    to[0] = beta_, to[1] = key_factor_, to[2] = query_factor_, to[3] = read_out_, to[4] = key_norm_;
  }
  __device__ float log_decay() const { return log_decay_; }

 private:
  Pair words_[blocks][runs][width / 2];
  GateInputs gates_;
  float log_decay_ = 0;
  float beta_, key_factor_, query_factor_, read_out_, key_norm_;
};

}  // namespace gatedelta::cuda
