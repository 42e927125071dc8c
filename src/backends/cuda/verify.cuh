// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "backends/cuda/rows.cuh"
#include "backends/cuda/state_tile.cuh"
#include "backends/cuda/tokens.cuh"

// Several tokens a row, in one pass over the state. S k and S q of all tokens are one product on the tensor cores, exact for a
// bfloat16 state and bfloat16 keys and queries; the corrections u follow from a triangular system in registers; the state takes
// a product of rank T. More tokens than a tile go in turns, with the state in registers between them.
//
// A block is one warp. It has a span of value rows of one head, which it goes through tile by tile with the next tile's loads
// under way; so the coefficients of the tokens are worked out once, and there is no barrier.
namespace gatedelta::cuda {

/// N/2 pairs of a key or query.
template <int N>
__device__ void load_pairs(const std::uint16_t* from, Pair (&out)[N / 2]) {
  if constexpr (N == 8) {
    const uint4 vector = *reinterpret_cast<const uint4*>(from);
    out[0] = vector.x, out[1] = vector.y, out[2] = vector.z, out[3] = vector.w;
  } else {
    const uint2 vector = *reinterpret_cast<const uint2*>(from);
    out[0] = vector.x, out[1] = vector.y;
  }
}

/// The corrections of a warp's rows with their decay up to the last token, as fragments: sums of bfloat16 numbers.
template <int halves, int groups, int parts>
struct Corrections {
  Pair pairs[groups][parts][2] = {};

  template <class Tokens>
  __device__ void set(const float (&u)[groups][4], const Tokens& tokens, int c) {
#pragma unroll
    for (int group = 0; group < groups; ++group) {
      const float first = tokens.scalars(8 * group + 2 * c).remaining, second = tokens.scalars(8 * group + 2 * c + 1).remaining;
#pragma unroll
      for (int half = 0; half < halves; ++half) {
        float x = first * u[group][2 * half], y = second * u[group][2 * half + 1];
#pragma unroll
        for (int part = 0; part < parts; ++part) {
          const Pair pair = narrow(x, y, __nv_bfloat16{});
          float upper_x, upper_y;
          widen(pair, upper_x, upper_y, __nv_bfloat16{});
          x -= upper_x, y -= upper_y;
          pairs[group][part][half] = pair;
        }
      }
    }
  }

  /// sum_j u_j k_j^T for run i of a lane's keys, pair by pair. `third`: whether the third part counts.
  template <int width, class Tokens>
  __device__ void multiply(float (&d)[width / 2][4], const Tokens& tokens, int i, bool third, int lane) const {
#pragma unroll
    for (int group = 0; group < groups; ++group)
#pragma unroll 1
      for (int b = 0; b < tokens.parts(); ++b) {
        Pair keys[width / 2];
        load_pairs<width>(tokens.vector(0, b, 8 * group + lane / 4, width * (lane % 4 + 4 * i)), keys);
        const auto& a = pairs[group];
#pragma unroll
        for (int j = 0; j < width / 2; ++j) {
          const Pair column = transposed(keys[j]);
          multiply_add(d[j], a[0][0], a[0][1], a[1][0], a[1][1], column, column);
          if constexpr (parts == 3)
            if (third && b == 0) multiply_add(d[j], a[2][0], a[2][1], 0, 0, column, 0);
        }
      }
  }
};

/// `keeps_float`: the state stays in registers as float32 after its product with the keys, which several turns, and stores
/// after each token, need. `common` as for decode_kernel.
template <class State, int key_dim, bool value_last, int token_tile, bool keeps_float, bool common>
__global__ void __launch_bounds__(32) verify_kernel(const __grid_constant__ FastParams p) {
  using Tile = StateTile<State, key_dim, value_last, keeps_float>;
  using Tokens = TokenTile<key_dim, token_tile, Tile::width, common>;
  static_assert(keeps_float || (Tile::parts == 1 && !value_last));
  constexpr int width = Tile::width, halves = Tile::halves, runs = Tile::runs, groups = Tokens::groups;
  extern __shared__ uint4 shared[];
  const int lane = static_cast<int>(threadIdx.x), g = lane / 4, c = lane % 4;
  const unsigned n = p.first_row + blockIdx.z, h = blockIdx.y;
  const int span_begin = static_cast<int>(blockIdx.x * p.span),
            span_end = min(span_begin + static_cast<int>(p.span), p.value_dim);
  cudaTriggerProgrammaticLaunchCompletion();
  if (p.dependent) cudaGridDependencySynchronize();
  if (!has_row(p, n, h, span_begin, span_end - span_begin)) return;

  const std::int64_t source = source_slot(p, n);
  // Of a state in which the last two dimensions have these strides, from a head to this lane's first vector of a tile.
  const auto v_stride = [](const std::int64_t* strides) { return common ? std::int64_t{key_dim} : strides[0]; };
  const auto lane_offset = [&](const std::int64_t* strides, int first_value) {
    return first_value * (value_last ? 1 : v_stride(strides)) + Tile::lane_offset(lane, v_stride(strides), strides[1]);
  };
  const bool reads = source >= 0 && p.initial_state;
  using Window = Ring<Tile::vectors, Tile::words, verify_stages>;
  Window ring(shared, lane);
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

  Tokens tokens(reinterpret_cast<char*>(shared) + Window::bytes, p);
  const auto batch = static_cast<unsigned>(row.batch);
  const bool single_turn = row.tokens <= token_tile;
  // Calls function(group, element, offset) for the tokens and rows that this lane has in fragments, with the offset in a tensor
  // [B,T,heads,V] of which `at` is the lane's first element for first_value = 0 and the row's first token.
  const int v_along = common ? 1 : p.v.strides[3], o_along = common ? 1 : p.o.strides[3];
  const auto first_token_of_lane = static_cast<unsigned>(row.first_token + 2 * c);
  const std::int64_t v_at =
      offset_of(p.v, batch, first_token_of_lane, head_of(h, p.v_group)) + product(Tile::row_of(0, g), v_along);
  const std::int64_t o_at = offset_of(p.o, batch, first_token_of_lane, h) + product(Tile::row_of(0, g), o_along);
  const auto for_each_value = [&](const Tensor<std::int32_t, 4>& tensor, int along, std::int64_t at, int done, int count,
                                  int first_value, auto function) {
    const std::int64_t base = at + product(done, tensor.strides[1]) + product(first_value, along);
#pragma unroll
    for (int group = 0; group < groups; ++group)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (8 * group + 2 * c + e < count)
#pragma unroll
          for (int half = 0; half < halves; ++half)
            function(group, 2 * half + e, base + product(8 * group + e, tensor.strides[1]) + half * Tile::half_step * along);
  };
  const DType v_dtype = common ? DType::bf16 : p.v.dtype, o_dtype = common ? DType::bf16 : p.o.dtype;
  RawElement v[groups][4];
  const auto fetch_values = [&](int done, int count, int first_value) {
    for_each_value(p.v, v_along, v_at, done, count, first_value,
                   [&](int group, int e, std::int64_t at) { v[group][e].fetch(p.v, v_dtype, at); });
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
    float s[keeps_float ? halves : 1][keeps_float ? runs : 1][width];
    Tile tile;
    tile.clear();
    ring.wait();
    if (reads) ring.read(stage, tile.raw);
    if constexpr (keeps_float) tile.widen_to(s);
    int done = 0;
    do {
      const int count = min(tokens_count - done, token_tile);
      if (!single_turn) {
        fetch_values(done, count, first_value);
        tokens.load(batch, static_cast<unsigned>(row.first_token + done), count, h, lane);
      }
      const int state_parts = done == 0 ? Tile::parts : 3;

      // S k and S q, two sums each, since a product waits for the one before it in its sum.
      float recalled[2][groups][4] = {}, read_out[2][groups][4] = {};
#pragma unroll
      for (int i = 0; i < runs; ++i) {
        Pair a[keeps_float ? 3 : 1][2][width / 2] = {};
#pragma unroll
        for (int half = 0; half < halves; ++half) {
          if constexpr (keeps_float) {
            float rest[width];
#pragma unroll
            for (int e = 0; e < width; ++e) rest[e] = s[half][i][e];
#pragma unroll
            for (int part = 0; part < 3; ++part)
#pragma unroll
              for (int j = 0; j < width / 2; ++j) a[part][half][j] = take_upper(rest[2 * j], rest[2 * j + 1]);
          } else {
#pragma unroll
            for (int j = 0; j < 4; ++j) a[0][half][j] = tile.raw[half * runs + i][j];
          }
        }
#pragma unroll 1
        for (int b = 0; b < tokens.parts(); ++b)
#pragma unroll
          for (int group = 0; group < groups; ++group) {
            Pair keys[width / 2], queries[width / 2];
            load_pairs<width>(tokens.vector(0, b, 8 * group + g, width * (c + 4 * i)), keys);
            load_pairs<width>(tokens.vector(1, b, 8 * group + g, width * (c + 4 * i)), queries);
#pragma unroll
            for (int part = 0; part < (keeps_float ? 3 : 1); ++part) {
              if (part >= state_parts || part + b >= 3) continue;
#pragma unroll
              for (int j = 0; j < width / 2; j += 2) {
                const Pair(&upper)[width / 2] = a[part][0], (&lower)[width / 2] = a[part][1];
                multiply_add(recalled[i % 2][group], upper[j], lower[j], upper[j + 1], lower[j + 1], keys[j], keys[j + 1]);
                multiply_add(read_out[i % 2][group], upper[j], lower[j], upper[j + 1], lower[j + 1], queries[j],
                             queries[j + 1]);
              }
            }
          }
      }

      if (done == 0) {
        fetch_state(stage, first_value + verify_stages * Tile::warp_rows);
        stage = stage + 1 == verify_stages ? 0 : stage + 1;
      }
      const bool last = done + count == tokens_count;
      float u[groups][4], o[groups][4];
#pragma unroll
      for (int group = 0; group < groups; ++group)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const auto& factors = tokens.scalars(8 * group + 2 * c + e % 2);
          u[group][e] = factors.key * (recalled[0][group][e] + recalled[1][group][e]) + factors.v * v[group][e].value(v_dtype);
          o[group][e] = factors.query * (read_out[0][group][e] + read_out[1][group][e]);
        }
      if (single_turn && first_value + Tile::warp_rows < span_end) fetch_values(0, count, first_value + Tile::warp_rows);
        // The triangular system: each correction goes to the four lanes of its row, which have two tokens of a group each.
#pragma unroll
      for (int j = 0; j < token_tile; ++j) {
        float known[halves];
#pragma unroll
        for (int half = 0; half < halves; ++half)
          known[half] = __shfl_sync(0xffffffffu, u[j / 8][2 * half + j % 2], (lane & ~3) + j % 8 / 2);
#pragma unroll
        for (int group = j / 8; group < groups; ++group) {
          const float4 factors = tokens.coefficients(j, group, c);
#pragma unroll
          for (int half = 0; half < halves; ++half) {
            float(&x)[4] = u[group], (&y)[4] = o[group];
            const int t = 8 * group + 2 * c;
            if (t > j) x[2 * half] -= factors.x * known[half];
            if (t + 1 > j) x[2 * half + 1] -= factors.y * known[half];
            if (t >= j) y[2 * half] += factors.z * known[half];
            if (t + 1 >= j) y[2 * half + 1] += factors.w * known[half];
          }
        }
      }
      for_each_value(p.o, o_along, o_at, done, count, first_value,
                     [&](int group, int e, std::int64_t at) { store_at(p.o, o_dtype, at, o[group][e]); });

      const float total_decay = tokens.total_decay();
      if constexpr (keeps_float) {
        if (p.store_tokens || p.snapshots.data != nullptr) {
          // Token by token: each state is stored. The corrections go through shared memory, since t is no constant.
          float* const rows =
              reinterpret_cast<float*>(reinterpret_cast<char*>(shared) + Window::bytes + Tokens::bytes(tokens.parts()));
          __syncwarp();
#pragma unroll
          for (int group = 0; group < groups; ++group)
#pragma unroll
            for (int half = 0; half < halves; ++half)
#pragma unroll
              for (int e = 0; e < 2; ++e)
                rows[(8 * group + 2 * c + e) * Tile::warp_rows + 8 * half + g] = u[group][2 * half + e];
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
                Pair pairs[width / 2];
                load_pairs<width>(tokens.vector(0, b, t, width * (c + 4 * i)), pairs);
#pragma unroll
                for (int j = 0; j < width / 2; ++j) {
                  float low, high;
                  widen(pairs[j], low, high, __nv_bfloat16{});
                  key[2 * j] += low, key[2 * j + 1] += high;
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
          Corrections<halves, groups, 3> corrections;
          corrections.set(u, tokens, c);
          const bool third = Tile::parts == 3 || row.tokens > token_tile;
#pragma unroll
          for (int i = 0; i < runs; ++i) {
            float d[width / 2][4] = {};
            corrections.template multiply<width>(d, tokens, i, third, lane);
#pragma unroll
            for (int half = 0; half < halves; ++half)
#pragma unroll
              for (int e = 0; e < width; ++e) s[half][i][e] = total_decay * s[half][i][e] + d[e / 2][2 * half + e % 2];
          }
        }
        if (last && row.final_slot >= 0)
          store_state([&](std::int64_t at, const auto& x) { store_as<State>(p.state_write.data, at, x); },
                      offset_of(p.state_write, row.final_slot, h), &p.state_write.strides[2], s);
      } else if (row.final_slot >= 0) {
        Corrections<halves, groups, 2> corrections;
        corrections.set(u, tokens, c);
        const std::int64_t* const strides = &p.state_write.strides[2];
        const std::int64_t base = offset_of(p.state_write, row.final_slot, h) + lane_offset(strides, first_value);
#pragma unroll
        for (int i = 0; i < runs; ++i) {
          float d[width / 2][4] = {};
          corrections.template multiply<width>(d, tokens, i, false, lane);
#pragma unroll
          for (int half = 0; half < halves; ++half) {
            float x[width];
            tile.widen_to(x, half, i);
#pragma unroll
            for (int e = 0; e < width; ++e) x[e] = total_decay * x[e] + d[e / 2][2 * half + e % 2];
            store_as<State>(p.state_write.data, base + Tile::step(half * runs + i, v_stride(strides), strides[1]), x);
          }
        }
      }
      done += count;
    } while (done < tokens_count);
  }
}

}  // namespace gatedelta::cuda
