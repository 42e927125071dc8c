// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "backends/cuda/rows.cuh"
#include "backends/cuda/state_tile.cuh"
#include "backends/cuda/tokens.cuh"

// Several tokens a row, in one pass over the state. S k and S q of all tokens are one product on the tensor cores, exact for a
// bfloat16 state and bfloat16 keys and queries; the corrections u follow from a triangular system in registers; the state takes
// a product of rank T. More tokens than a tile go in turns, with the state in registers between them.
//
// A block is one warp. It has a span of value rows of one head, which it goes through tile by tile with the next tiles' loads
// under way; so the coefficients of the tokens are worked out once, and there is no barrier. The products with the state have
// tokens as their rows and value rows as their columns: with g = lane / 4 and c = lane % 4 a lane has token g (of each group of
// 8) and two neighbouring value rows, and the state's vectors are fragments as they come from memory.
namespace gatedelta::cuda {

constexpr int verify_stages = 2;  ///< tiles that are under way ahead of their use
template <class Tile>
using VerifyRing = Ring<Tile::vectors, Tile::words, verify_stages>;

/// Two neighbouring values of v. `common`: bfloat16 and together in memory.
template <bool common>
struct ValuePair {
  RawElement raw[common ? 1 : 2];

  template <class Any>
  __device__ void fetch(const Any& tensor, DType dtype, std::int64_t offset, int along) {
    if constexpr (common) {
      raw[0].low = *reinterpret_cast<const std::uint32_t*>(static_cast<const std::uint16_t*>(tensor.data) + offset);
    } else {
      raw[0].fetch(tensor, dtype, offset);
      raw[1].fetch(tensor, dtype, offset + along);
    }
  }
  __device__ float value(DType dtype, int e) const {
    if constexpr (common)
      return widen_one(raw[0].low, e);
    else
      return raw[e].value(dtype);
  }
};
template <bool common, class Any>
__device__ void store_pair(const Any& tensor, DType dtype, std::int64_t offset, int along, const float (&x)[2]) {
  if constexpr (common) {
    *reinterpret_cast<std::uint32_t*>(static_cast<std::uint16_t*>(tensor.data) + offset) = narrow(x[0], x[1], __nv_bfloat16{});
  } else {
    store_at(tensor, dtype, offset, x[0]);
    store_at(tensor, dtype, offset + along, x[1]);
  }
}

/// The corrections of a tile with their decay up to the last token, as fragments with value rows as their rows: sums of three
/// bfloat16 numbers, which is all of a float32.
template <int halves, int groups>
struct Corrections {
  static constexpr int parts = 3;
  Pair pairs[groups][parts][2] = {};

  template <class Tokens>
  __device__ void set(const float (&u)[groups][halves][2], const Tokens& tokens, int g) {
#pragma unroll
    for (int group = 0; group < groups; ++group) {
      const float factor = tokens.scalars(8 * group + g).remaining;
#pragma unroll
      for (int half = 0; half < halves; ++half) {
        float x = factor * u[group][half][0], y = factor * u[group][half][1];
#pragma unroll
        for (int part = 0; part < parts; ++part) {
          const Pair pair = narrow(x, y, __nv_bfloat16{});
          float upper_x, upper_y;
          widen(pair, upper_x, upper_y, __nv_bfloat16{});
          x -= upper_x, y -= upper_y;
          pairs[group][part][half] = transposed(pair);
        }
      }
    }
  }

  /// sum_j u_j k_j^T for run i of a lane's keys, pair by pair.
  template <int width, class Tokens>
  __device__ void multiply(float (&d)[width / 2][4], const Tokens& tokens, int i, int lane) const {
#pragma unroll
    for (int group = 0; group < groups; ++group)
#pragma unroll 1
      for (int b = 0; b < tokens.parts(); ++b) {
        const auto& a = pairs[group];
        const auto add = [&](float(&sum)[4], Pair key) {
          const Pair column = transposed(key);
          multiply_add(sum, a[0][0], a[0][1], a[1][0], a[1][1], column, column);
          if (b == 0) multiply_add(sum, a[2][0], a[2][1], 0, 0, column, 0);
        };
#pragma unroll
        for (int j = 0; j < width / 2; j += 2) {
          const KeyQuery words = tokens.vector(b, 8 * group + lane / 4, width * (lane % 4 + 4 * i) + 2 * j);
          add(d[j], words.key0);
          add(d[j + 1], words.key1);
        }
      }
  }
};

/// The state stays in registers as float32 after its product with the keys, which several turns, and stores after each token,
/// need. `common` as for decode_kernel.
template <class State, int key_dim, bool value_last, int token_tile, bool common>
__global__ void __launch_bounds__(32, 1) verify_kernel(const __grid_constant__ FastParams p) {
  using Tile = StateTile<State, key_dim, value_last>;
  using Tokens = TokenTile<key_dim, token_tile, Tile::width, common>;
  constexpr int width = Tile::width, halves = Tile::halves, runs = Tile::runs, groups = Tokens::groups;
  extern __shared__ uint4 shared[];
  const int lane = static_cast<int>(threadIdx.x), g = lane / 4, c = lane % 4;
  const unsigned n = p.first_row + blockIdx.z, h = blockIdx.y;
  const int span_begin = static_cast<int>(blockIdx.x * p.span),
            span_end = min(span_begin + static_cast<int>(p.span), p.value_dim);
  wait_for_inputs(p);
  if (!has_row(p, n, h, span_begin, span_end - span_begin)) return;

  const std::int64_t source = source_slot(p, n);
  // Of a state in which the last two dimensions have these strides, from a head to this lane's first vector of a tile.
  const auto v_stride = [](const std::int64_t* strides) { return common ? std::int64_t{key_dim} : strides[0]; };
  const auto lane_offset = [&](const std::int64_t* strides, int first_value) {
    return first_value * (value_last ? 1 : v_stride(strides)) + Tile::lane_offset(lane, v_stride(strides), strides[1]);
  };
  const bool reads = source >= 0 && p.initial_state;
  VerifyRing<Tile> ring(shared, lane);
  const std::int64_t* const read_strides = &p.state_read.strides[2];
  const State* const from = static_cast<const State*>(p.state_read.data) + (reads ? offset_of(p.state_read, source, h) : 0) +
                            lane_offset(read_strides, 0);
  const auto fetch_state = [&](unsigned stage, int first_value) {
    const State* const first_vector = from + first_value * (value_last ? 1 : v_stride(read_strides));
    ring.fetch(stage, reads && first_value < span_end,
               [&](int i) { return first_vector + Tile::step(i, v_stride(read_strides), read_strides[1]); });
  };
#pragma unroll
  for (unsigned stage = 0; stage < verify_stages; ++stage)
    fetch_state(stage, span_begin + static_cast<int>(stage) * Tile::warp_rows);
  const Row row = resolve(p, n, source);
  if (row.source < 0) {
    __pipeline_wait_prior(0);
    zero_outputs(p, row.batch, row.first_token, row.first_token + row.tokens, h, span_begin, span_end - span_begin);
    return;
  }

  Tokens tokens(reinterpret_cast<char*>(shared) + VerifyRing<Tile>::bytes, p);
  const auto batch = static_cast<unsigned>(row.batch);
  const bool single_turn = row.tokens <= token_tile;
  // Where this lane's token g and value rows 2c, 2c+1 of a tile are in v and o.
  const int v_along = common ? 1 : p.v.strides[3], o_along = common ? 1 : p.o.strides[3];
  const auto lane_token = static_cast<unsigned>(row.first_token + g);
  const std::int64_t v_at = offset_of(p.v, batch, lane_token, head_of(h, p.v_group)) + product(Tile::value_of(0, c), v_along);
  const std::int64_t o_at = offset_of(p.o, batch, lane_token, h) + product(Tile::value_of(0, c), o_along);
  const DType v_dtype = common ? DType::bf16 : p.v.dtype, o_dtype = common ? DType::bf16 : p.o.dtype;
  // Calls function(group, half, offset) for the lane's pairs of a tile that begins `done` tokens after the row's first and at
  // first_value, with the offset in a tensor in which `at` is the lane's first pair.
  const auto for_each_pair = [&](const Tensor<std::int32_t, 4>& tensor, int along, std::int64_t at, int done, int count,
                                 int first_value, auto function) {
    const std::int64_t base = at + product(done, tensor.strides[1]) + product(first_value, along);
#pragma unroll
    for (int group = 0; group < groups; ++group)
      if (8 * group + g < count)
#pragma unroll
        for (int half = 0; half < halves; ++half)
          function(group, half, base + product(8 * group, tensor.strides[1]) + half * Tile::half_step * along);
  };
  ValuePair<common> v[groups][halves];
  const auto fetch_values = [&](int done, int count, int first_value) {
    for_each_pair(p.v, v_along, v_at, done, count, first_value,
                  [&](int group, int half, std::int64_t at) { v[group][half].fetch(p.v, v_dtype, at, v_along); });
  };
  const int tokens_count = static_cast<int>(row.tokens);
  if (single_turn) {
    fetch_values(0, tokens_count, span_begin);
    tokens.load(batch, static_cast<unsigned>(row.first_token), tokens_count, h, lane);
  }
  unsigned stage = 0;
#pragma unroll 1
  for (int first_value = span_begin; first_value < span_end; first_value += Tile::warp_rows) {
    const auto store_state = [&](const auto& store_vector, std::int64_t base, const std::int64_t* strides, const auto& s) {
      base += lane_offset(strides, first_value);
      Tile::store([&](std::int64_t step, const auto& x) { store_vector(base + step, x); }, v_stride(strides), strides[1], s);
    };
    float s[halves][runs][width];
    Tile tile;
    tile.clear();
    ring.wait();
    if (reads) ring.read(stage, tile.raw);
    tile.widen_to(s);
    int done = 0;
    do {
      const int count = min(tokens_count - done, token_tile);
      if (!single_turn) {
        fetch_values(done, count, first_value);
        tokens.load(batch, static_cast<unsigned>(row.first_token + done), count, h, lane);
      }
      const int state_parts = done == 0 ? bfloat_parts_of<State> : 3;

      // S k and S q, each in two sums, since a product waits for the one before it in its sum. Tensor cores round sums toward
      // zero: the products of lower parts, of which there are more, have a sum of their own, where that is nothing.
      float products[3][groups][halves][4] = {};
#pragma unroll
      for (int i = 0; i < runs; ++i) {
        Pair state[3][halves][width / 2];
#pragma unroll
        for (int half = 0; half < halves; ++half)
#pragma unroll
          for (int j = 0; j < width / 2; ++j)
            split_in<3>(s[half][i][2 * j], s[half][i][2 * j + 1], [&](int part) -> Pair& { return state[part][half][j]; });
        const auto add_products = [&](int b, bool upper) {
#pragma unroll
          for (int group = 0; group < groups; ++group)
#pragma unroll
            for (int j = 0; j < width / 2; j += 2) {
              const KeyQuery a = tokens.vector(b, 8 * group + g, width * (c + 4 * i) + 2 * j);
#pragma unroll
              for (int part = 0; part < 3; ++part) {
                if (part >= state_parts || part + b >= 3) continue;
#pragma unroll
                for (int half = 0; half < halves; ++half)
                  multiply_add(products[upper && part == 0 ? (i * width / 4 + j / 2) % 2 : 2][group][half], a.key0, a.query0,
                               a.key1, a.query1, state[part][half][j], state[part][half][j + 1]);
              }
            }
        };
        add_products(0, true);
#pragma unroll 1
        for (int b = 1; b < tokens.parts(); ++b) add_products(b, false);
      }
      if (done == 0) {
        fetch_state(stage, first_value + verify_stages * Tile::warp_rows);
        stage = stage + 1 == verify_stages ? 0 : stage + 1;
      }

      const bool last = done + count == tokens_count;
      float u[groups][halves][2], o[groups][halves][2];
#pragma unroll
      for (int group = 0; group < groups; ++group) {
        const auto factors = tokens.scalars(8 * group + g);
#pragma unroll
        for (int half = 0; half < halves; ++half)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const auto sum_of = [&](int column) {
              return products[0][group][half][column] + products[1][group][half][column] + products[2][group][half][column];
            };
            u[group][half][e] = factors.key * sum_of(e) + factors.v * v[group][half].value(v_dtype, e);
            o[group][half][e] = factors.query * sum_of(2 + e);
          }
      }
      if (single_turn && first_value + Tile::warp_rows < span_end) {
        fetch_values(0, count, first_value + Tile::warp_rows);
      }

      // The triangular system: the lanes of a token hand their corrections to those of the later tokens.
#pragma unroll
      for (int j = 0; j < token_tile; ++j) {
        float known[halves][2];
#pragma unroll
        for (int half = 0; half < halves; ++half)
#pragma unroll
          for (int e = 0; e < 2; ++e) known[half][e] = __shfl_sync(0xffffffffu, u[j / 8][half][e], 4 * (j % 8) + c);
#pragma unroll
        for (int group = j / 8; group < groups; ++group) {
          const float2 AQ = tokens.coefficients(8 * group + g, j);
#pragma unroll
          for (int half = 0; half < halves; ++half)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              if (8 * group + g > j) u[group][half][e] -= AQ.x * known[half][e];
              if (8 * group + g >= j) o[group][half][e] += AQ.y * known[half][e];
            }
        }
      }
      for_each_pair(p.o, o_along, o_at, done, count, first_value, [&](int group, int half, std::int64_t at) {
        store_pair<common>(p.o, o_dtype, at, o_along, o[group][half]);
      });

      const float total_decay = tokens.total_decay();
      if (p.store_tokens || p.snapshots.data != nullptr) {
        // Token by token: each state is stored. The corrections go through shared memory, since t is no constant.
        float* const rows =
            reinterpret_cast<float*>(reinterpret_cast<char*>(shared) + VerifyRing<Tile>::bytes + Tokens::bytes(tokens.parts()));
        __syncwarp();
#pragma unroll
        for (int group = 0; group < groups; ++group)
#pragma unroll
          for (int half = 0; half < halves; ++half)
#pragma unroll
            for (int e = 0; e < 2; ++e) rows[(8 * group + g) * Tile::warp_rows + 8 * half + 2 * c + e] = u[group][half][e];
        __syncwarp();
#pragma unroll 1
        for (int t = 0; t < count; ++t) {
          const float decay = tokens.decay(t), factor = tokens.key_factor(t);
          float correction[halves];
#pragma unroll
          for (int half = 0; half < halves; ++half) correction[half] = factor * rows[t * Tile::warp_rows + 8 * half + g];
#pragma unroll
          for (int i = 0; i < runs; ++i) {
            float key[width] = {};
#pragma unroll 1
            for (int b = tokens.parts(); b-- > 0;) {
#pragma unroll
              for (int j = 0; j < width; j += 4) {
                const KeyQuery words = tokens.vector(b, t, width * (c + 4 * i) + j);
                float low, high;
                widen(words.key0, low, high, __nv_bfloat16{});
                key[j] += low, key[j + 1] += high;
                widen(words.key1, low, high, __nv_bfloat16{});
                key[j + 2] += low, key[j + 3] += high;
              }
            }
#pragma unroll
            for (int half = 0; half < halves; ++half)
#pragma unroll
              for (int e = 0; e < width; ++e) s[half][i][e] = decay * s[half][i][e] + correction[half] * key[e];
          }
          const auto token = static_cast<unsigned>(done + t);
          if (p.store_tokens)
            if (const std::int64_t slot = index_at(p.token_slots, n, token); slot > p.null_slot)
              store_state([&](std::int64_t at, const auto& x) { store_as<State>(p.state_write.data, at, x); },
                          offset_of(p.state_write, slot, h), &p.state_write.strides[2], s);
          if (p.snapshots.data != nullptr)
            store_state([&](std::int64_t at, const auto& x) { store_run(p.snapshots, at, x); },
                        offset_of(p.snapshots, n, token, h), &p.snapshots.strides[3], s);
        }
      } else if (!last || row.final_slot >= 0) {
        Corrections<halves, groups> corrections;
        corrections.set(u, tokens, g);
#pragma unroll
        for (int i = 0; i < runs; ++i) {
          float d[width / 2][4] = {};
          corrections.template multiply<width>(d, tokens, i, lane);
#pragma unroll
          for (int half = 0; half < halves; ++half)
#pragma unroll
            for (int e = 0; e < width; ++e) s[half][i][e] = total_decay * s[half][i][e] + d[e / 2][2 * half + e % 2];
        }
      }
      if (last && row.final_slot >= 0)
        store_state([&](std::int64_t at, const auto& x) { store_as<State>(p.state_write.data, at, x); },
                    offset_of(p.state_write, row.final_slot, h), &p.state_write.strides[2], s);
      done += count;
    } while (done < tokens_count);
  }
}

}  // namespace gatedelta::cuda
