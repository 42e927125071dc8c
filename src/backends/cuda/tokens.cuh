// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "backends/cuda/arch.cuh"
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

/// The bfloat16 that x starts with, leaving the rest in x: three times for all of a float32.
__device__ inline std::uint32_t take_upper(float& x) {
  const std::uint32_t upper = __float_as_uint(x) & 0xffff0000u;
  x -= __uint_as_float(upper);
  return upper;
}
/// Of two numbers at once.
__device__ inline Pair take_upper(float& low, float& high) {
  const std::uint32_t first = take_upper(low);
  return __byte_perm(first, take_upper(high), 0x7632);
}

/// `common`: q, k, the gate and beta are bfloat16, and q and k come in vectors.
template <int key_dim, int token_tile, int width, bool common>
class TokenTile {
 public:
  static constexpr int groups = token_tile / 8;
  /// Rows of keys 16 bytes * 4 apart in the banks, so that the 8 rows that a warp reads at a time do not collide.
  static constexpr int pitch = key_dim + 4 * width;

  __host__ __device__ static constexpr std::size_t bytes(int parts) {
    return sizeof(Tables) + static_cast<std::size_t>(parts) * 2 * token_tile * pitch * sizeof(std::uint16_t);
  }

  /// In dynamic shared memory of bytes(parts).
  __device__ TokenTile(void* shared, const FastParams& p)
      : tables_(*static_cast<Tables*>(shared)), vectors_(reinterpret_cast<std::uint16_t*>(&tables_ + 1)), p_(p) {}

  __device__ int parts() const { return common ? 1 : p_.parts; }

  /// Fetches `count` tokens from `first` of a row and works out their coefficients. One warp; the memory is its own.
  __device__ void load(unsigned batch, unsigned first, int count, unsigned h, int lane) {
    constexpr int pieces = key_dim / 8, turns = 2 * token_tile * pieces / 32, batch_turns = 4;
    __syncwarp();
    load_gates(batch, first, count, h, lane);
#pragma unroll 1
    for (int turn = 0; turn < turns; turn += batch_turns) {
      if (Piece(turn, 0).t >= count) {  // all that follows is zero
        for (int i = turn; i < turns; ++i) {
          const Piece piece(i, lane);
          for (int part = 0; part < parts(); ++part) *place(piece, part) = {0, 0, 0, 0};
        }
        break;
      }
      // All loads of a few turns are under way at once.
      RawRun<8> raw[batch_turns];
#pragma unroll
      for (int i = 0; i < batch_turns; ++i) {
        const Piece piece(turn + i, lane);
        const auto& from = piece.of_query ? p_.q : p_.k;
        const int along = vector_keys() ? 1 : from.strides[3];
        if (piece.t < count)
          raw[i].fetch(from, common ? DType::bf16 : from.dtype,
                       offset_of(from, batch, first + piece.t, head_of(h, piece.of_query ? p_.q_group : p_.k_group)) +
                           product(piece.key, along),
                       along, vector_keys());
      }
#pragma unroll
      for (int i = 0; i < batch_turns; ++i) {
        const Piece piece(turn + i, lane);
        const auto& from = piece.of_query ? p_.q : p_.k;
        float x[8] = {};
        if (piece.t < count) raw[i].widen_to(x, common ? DType::bf16 : from.dtype, vector_keys());
        float squares = 0;
#pragma unroll
        for (const float e : x) squares += e * e;
#pragma unroll
        for (int distance = pieces / 2; distance > 0; distance /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, distance);
        if (piece.key == 0) tables_.factor[piece.of_query][piece.t] = p_.l2norm ? 1.0f / sqrtf(squares + p_.l2_eps) : 1.0f;
        for (int part = 0; part < parts(); ++part) {
          uint4 words;
          words.x = take_upper(x[0], x[1]);
          words.y = take_upper(x[2], x[3]);
          words.z = take_upper(x[4], x[5]);
          words.w = take_upper(x[6], x[7]);
          *reinterpret_cast<uint4*>(vectors_ + ((part * 2 + piece.of_query) * token_tile + piece.t) * pitch + piece.key) =
              words;
        }
      }
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
  /// A and then Q of the tokens 8 group + 2c and + 2c + 1, and of j.
  __device__ const float4& coefficients(int j, int group, int c) const {
    return reinterpret_cast<const float4&>(tables_.coefficients[j][group][c][0]);
  }
  /// The decay of all tokens together, of one token, and the factor that normalises its key.
  __device__ float total_decay() const { return tables_.total_decay; }
  __device__ float decay(int t) const { return tables_.decay[t]; }
  __device__ float key_factor(int t) const { return tables_.factor[0][t]; }
  /// Part of a key or query, from element k.
  __device__ const std::uint16_t* vector(int of_query, int part, int t, int k) const {
    return vectors_ + ((part * 2 + of_query) * token_tile + t) * pitch + k;
  }

 private:
  struct alignas(16) Tables {
    float coefficients[token_tile][groups][4][4];
    Scalars scalars[token_tile];
    double G[token_tile];  ///< sums of logarithms: small differences of large ones matter
    float beta[token_tile], decay[token_tile], factor[2][token_tile], total_decay;
  };

  /// Eight elements of a key or query.
  struct Piece {
    __device__ Piece(int turn, int lane) {
      constexpr int pieces = key_dim / 8;
      const int unit = 32 * turn + lane;
      key = 8 * (unit % pieces), t = unit / pieces / 2, of_query = unit / pieces % 2;
    }
    int key, t, of_query;
  };
  __device__ uint4* place(const Piece& piece, int part) {
    return reinterpret_cast<uint4*>(vectors_ + ((part * 2 + piece.of_query) * token_tile + piece.t) * pitch + piece.key);
  }
  __device__ bool vector_keys() const { return common || p_.vector_keys; }

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

  __device__ void load_gates(unsigned batch, unsigned first, int count, unsigned h, int lane) {
    float g = 0, beta = 0;
    if (lane < count) {
      GateInputs inputs;
      inputs.fetch(p_, batch, first + static_cast<unsigned>(lane), h);
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
    if (lane == token_tile - 1) tables_.total_decay = expf(static_cast<float>(sum));
    if (lane >= token_tile) return;
    tables_.G[lane] = sum;
    tables_.beta[lane] = beta;
    tables_.decay[lane] = expf(g);
  }

  __device__ void make_products(int row_group, int column_group, int count, int lane) {
    const int g = lane / 4, c = lane % 4;
    // Several sums, since each product waits for the one before it in its sum.
    float sums[4][4] = {};
    for (int a = 0; a < parts(); ++a)
      for (int b = 0; b < parts() && a + b < 3; ++b)
#pragma unroll
        for (int i = 0; i < key_dim / 32; ++i) {
          const int k = 8 * c + 32 * i;
          const uint4 key = *reinterpret_cast<const uint4*>(vector(0, a, 8 * row_group + g, k));
          const uint4 query = *reinterpret_cast<const uint4*>(vector(1, a, 8 * row_group + g, k));
          const uint4 column = *reinterpret_cast<const uint4*>(vector(0, b, 8 * column_group + g, k));
          multiply_add(sums[2 * i % 4], key.x, query.x, key.y, query.y, column.x, column.y);
          multiply_add(sums[(2 * i + 1) % 4], key.z, query.z, key.w, query.w, column.z, column.w);
        }
    float d[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) d[e] = (sums[0][e] + sums[1][e]) + (sums[2][e] + sums[3][e]);
    const int t = 8 * row_group + g;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int j = 8 * column_group + 2 * c + e;
      float A = 0, Q = 0;
      if (j <= t && t < count) {
        const float decay = expf(static_cast<float>(tables_.G[t] - tables_.G[j])) * tables_.factor[0][j];
        A = tables_.beta[t] * (decay * tables_.factor[0][t] * d[e]);
        Q = p_.scale * (decay * tables_.factor[1][t] * d[2 + e]);
      }
      float* const to = tables_.coefficients[j][row_group][g / 2];
      to[g % 2] = A;
      to[2 + g % 2] = Q;
    }
  }

  Tables& tables_;
  std::uint16_t* const vectors_;
  const FastParams& p_;
};

}  // namespace gatedelta::cuda
