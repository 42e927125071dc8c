// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "backends/cuda/gates.cuh"
#include "backends/cuda/vectors.cuh"

// What a warp knows of a few tokens of one row and head before it has seen the state: keys and queries, and the coefficients of
//
//     u_t = beta_t (v_t - exp(G_t) n_t S k_t) - sum_{j<t} A_tj u_j         A_tj = beta_t exp(G_t - G_j) k^_t k^_j
//     o_t = scale exp(G_t) m_t S q_t + sum_{j<=t} Q_tj u_j                 Q_tj = scale exp(G_t - G_j) q^_t k^_j
//     S <- exp(G_T) S + sum_j exp(G_T - G_j) n_j u_j k_j^T
//
// for raw keys k and queries q with normalisation factors n and m. Keys and queries are kept as sums of bfloat16 numbers: one
// for bfloat16, two for float16, three for float32, exactly.
namespace gatedelta::cuda {

/// A decay of exp(-1e4) is zero, in float64 as well; unlike that of minus infinity its logarithm can be subtracted.
constexpr float lowest_log_decay = -1e4f;

/// A pair of a key and the same of a query, twice: the fragment of a product of 8 keys and 8 queries.
struct KeyQuery {
  Pair key0, query0, key1, query1;
};

/// `width`: of a vector of the state, which decides what a warp reads at a time. `common` as for decode_kernel.
template <int key_dim, int token_tile, int width, bool common>
class TokenTile {
 public:
  static constexpr int groups = token_tile / 8;

  __host__ __device__ static constexpr std::size_t bytes(int parts) {
    return sizeof(Tables) + static_cast<std::size_t>(parts) * token_tile * pitch * sizeof(Pair);
  }

  /// In dynamic shared memory of bytes(parts).
  __device__ TokenTile(void* shared, const FastParams& p)
      : tables_(*static_cast<Tables*>(shared)), vectors_(reinterpret_cast<Pair*>(&tables_ + 1)), p_(p) {}

  __device__ int parts() const { return common ? 1 : p_.parts; }

  /// Fetches `count` tokens from `first` of a row and works out their coefficients. One warp; the memory is its own.
  __device__ void load(unsigned batch, unsigned first, int count, unsigned h, int lane) {
    constexpr int pieces = key_dim / 8, turns = token_tile * pieces / 32;
    constexpr int batch_turns = key_dim == 128 && token_tile == 8 ? 2 : 1;
    const DType k_dtype = common ? DType::bf16 : p_.k.dtype, q_dtype = common ? DType::bf16 : p_.q.dtype;
    const bool vector_keys = common || p_.vector_keys;
    const int k_along = vector_keys ? 1 : p_.k.strides[3], q_along = vector_keys ? 1 : p_.q.strides[3];
    __syncwarp();
    GateInputs gates;
    if (lane < count) gates.fetch(p_, batch, first + static_cast<unsigned>(lane), h);
    const std::int64_t k_at = offset_of(p_.k, batch, first, head_of(h, p_.k_group));
    const std::int64_t q_at = offset_of(p_.q, batch, first, head_of(h, p_.q_group));
#pragma unroll 1
    for (int turn = 0; turn < turns; turn += batch_turns) {
      // All loads of a few turns are under way at once.
      RawRun<8> keys[batch_turns], queries[batch_turns];
#pragma unroll
      for (int i = 0; i < batch_turns; ++i) {
        const int unit = 32 * (turn + i) + lane, t = unit / pieces, piece = 8 * (unit % pieces);
        if (t >= count) continue;
        keys[i].fetch(p_.k, k_dtype, k_at + product(t, p_.k.strides[1]) + product(piece, k_along), k_along, vector_keys);
        queries[i].fetch(p_.q, q_dtype, q_at + product(t, p_.q.strides[1]) + product(piece, q_along), q_along, vector_keys);
      }
#pragma unroll
      for (int i = 0; i < batch_turns; ++i) {
        const int unit = 32 * (turn + i) + lane, t = unit / pieces, piece = 8 * (unit % pieces);
        float k[8] = {}, q[8] = {};
        if (t < count) {
          keys[i].widen_to(k, k_dtype, vector_keys);
          queries[i].widen_to(q, q_dtype, vector_keys);
        }
        float squares[2] = {};
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          squares[0] += k[e] * k[e];
          squares[1] += q[e] * q[e];
        }
#pragma unroll
        for (int distance = pieces / 2; distance > 0; distance /= 2)
#pragma unroll
          for (float& sum : squares) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
        if (piece == 0) tables_.factor[0][t] = squares[0], tables_.factor[1][t] = squares[1];
        for (int part = 0; part < parts(); ++part) {
          auto* const to = reinterpret_cast<KeyQuery*>(vectors_ + (part * token_tile + t) * pitch + piece);
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            KeyQuery words;
            words.key0 = take_upper(k[4 * j], k[4 * j + 1]);
            words.query0 = take_upper(q[4 * j], q[4 * j + 1]);
            words.key1 = take_upper(k[4 * j + 2], k[4 * j + 3]);
            words.query1 = take_upper(q[4 * j + 2], q[4 * j + 3]);
            store(to + j, words);
          }
        }
      }
    }
    set_gates(gates, count, lane);
    __syncwarp();
    static_assert(2 * token_tile <= 32);
    if (lane < 2 * token_tile) {
      float& factor = tables_.factor[lane / token_tile][lane % token_tile];
      factor = p_.l2norm ? 1.0f / sqrtf(factor + p_.l2_eps) : 1.0f;
    }
    __syncwarp();
    make_coefficients(count, lane);
    __syncwarp();
  }

  struct Scalars {
    float v, key, query, remaining;
  };
  /// Of token t: factors of v_t and S k_t in u_t, of S q_t in o_t, of u_t k_t^T in the state after the last token.
  __device__ const Scalars& scalars(int t) const { return tables_.scalars[t]; }
  /// A_tj and Q_tj.
  __device__ float2 coefficients(int t, int j) const { return tables_.coefficients[j][t]; }
  /// The decay of all tokens together, of one token, and the factor that normalises its key.
  __device__ float total_decay() const { return tables_.total_decay; }
  __device__ float decay(int t) const { return tables_.decay[t]; }
  __device__ float key_factor(int t) const { return tables_.factor[0][t]; }
  /// Part of token t: elements k ... k+3 of key and query.
  __device__ KeyQuery vector(int part, int t, int k) const {
    const uint4 words = *reinterpret_cast<const uint4*>(vectors_ + (part * token_tile + t) * pitch + k);
    return {words.x, words.y, words.z, words.w};
  }

 private:
  /// Of a token's pairs, so that the 8 tokens that a warp reads at a time do not collide in the banks of shared memory.
  static constexpr int pitch = key_dim + (width == 8 ? 4 : 16);

  struct alignas(16) Tables {
    float2 coefficients[token_tile][token_tile];  ///< [j][t]
    Scalars scalars[token_tile];
    double G[token_tile];  ///< sums of logarithms: small differences of large ones matter
    float beta[token_tile], decay[token_tile], factor[2][token_tile], total_decay;
  };

  __device__ static void store(KeyQuery* to, const KeyQuery& words) {
    *reinterpret_cast<uint4*>(to) = make_uint4(words.key0, words.query0, words.key1, words.query1);
  }

  __device__ void set_gates(const GateInputs& inputs, int count, int lane) {
    float g = 0, beta = 0;
    if (lane < count) {
      g = inputs.log_decay<float>(p_);
      if (g < lowest_log_decay) g = lowest_log_decay;
      beta = inputs.beta<float>(p_);
    }
    double sum = g;
#pragma unroll
    for (int distance = 1; distance < token_tile; distance *= 2) {
      const double before = __shfl_up_sync(0xffffffffu, sum, distance);
      if (lane >= distance) sum += before;
    }
    if (lane >= token_tile) return;
    if (lane == token_tile - 1) tables_.total_decay = expf(static_cast<float>(sum));
    tables_.G[lane] = sum;
    tables_.beta[lane] = beta;
    tables_.decay[lane] = expf(g);
  }

  __device__ void make_coefficients(int count, int lane) {
    // Products of the tokens of one group with the keys of this or an earlier group.
#pragma unroll 1
    for (int product = 0; product < groups * (groups + 1) / 2; ++product)
      make_products(product == 0 ? 0 : 1, product == 2 ? 1 : 0, count, lane);
    if (lane >= token_tile) return;
    Scalars s{};
    if (lane < count) {
      const float decay = expf(static_cast<float>(tables_.G[lane])), n = tables_.factor[0][lane];
      s.v = tables_.beta[lane];
      s.key = -tables_.beta[lane] * decay * n;
      s.query = p_.scale * decay * tables_.factor[1][lane];
      s.remaining = n * expf(static_cast<float>(tables_.G[count - 1] - tables_.G[lane]));
    }
    tables_.scalars[lane] = s;
  }

  __device__ void make_products(int row_group, int column_group, int count, int lane) {
    const int g = lane / 4, c = lane % 4;
    // Several sums, since each product waits for the one before it in its sum; and one for the products of lower parts (see
    // verify_kernel).
    float sums[4][4] = {}, lower[1][4] = {};
    const auto add_products = [&]<int count>(int a, int b, float(&to)[count][4]) {
#pragma unroll
      for (int i = 0; i < key_dim / 16; ++i) {
        const KeyQuery row = vector(a, 8 * row_group + g, 4 * c + 16 * i);
        const KeyQuery column = vector(b, 8 * column_group + g, 4 * c + 16 * i);
        multiply_add(to[i % count], row.key0, row.query0, row.key1, row.query1, column.key0, column.key1);
      }
    };
    add_products(0, 0, sums);
    for (int a = 0; a < parts(); ++a)
      for (int b = a == 0 ? 1 : 0; b < parts() && a + b < 3; ++b) add_products(a, b, lower);
    float d[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) d[e] = (sums[0][e] + sums[1][e]) + (sums[2][e] + sums[3][e]) + lower[0][e];
    const int t = 8 * row_group + g;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int j = 8 * column_group + 2 * c + e;
      float2 AQ = {0, 0};
      if (j <= t && t < count) {
        const float decay = expf(static_cast<float>(tables_.G[t] - tables_.G[j])) * tables_.factor[0][j];
        AQ.x = tables_.beta[t] * (decay * tables_.factor[0][t] * d[e]);
        AQ.y = p_.scale * (decay * tables_.factor[1][t] * d[2 + e]);
      }
      tables_.coefficients[j][t] = AQ;
    }
  }

  Tables& tables_;
  Pair* const vectors_;
  const FastParams& p_;
};

}  // namespace gatedelta::cuda
