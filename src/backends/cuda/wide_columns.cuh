// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "backends/cuda/coefficients.cuh"

namespace gatedelta::cuda {

/// TokenColumns of 16 tokens: two groups of 8 columns for keys, and two for queries. Keys and queries are in the block's shared
/// memory, each warp fetches some of them for all. Those in float16 are there as sums of two bfloat16 numbers. Where the memory
/// is that of several `members`, the tokens of one follow those of the one before.
template <class Input, int key_dim, int width, int members = 1>
class WideColumns {
  static_assert(sizeof(Input) == 2);

 public:
  using Element = Input;
  static constexpr int key_parts = bfloat_parts_of<Input>;
  static constexpr int groups = 2, blocks = 2 * groups, runs = key_dim / (4 * width), pairs = width / 2;
  static constexpr int parts = 3;

  float key_factor[groups][2], value_factor[groups][2], query_factor[groups][2];

  __device__ explicit WideColumns(void* memory, int member = 0)
      : memory_(shared_address(memory, numbers_bytes + static_cast<std::uint32_t>(at(0, 0, 8 * blocks * member)))) {}

  __device__ void fetch(const FastParams& p, unsigned n, unsigned h, int count, int g, int c) {
#pragma unroll
    for (int turn = 0; turn < blocks; ++turn)
      if (const int block = block_of(turn), token = 8 * (block % groups) + g; block < blocks)
        fetch_column<width>(words_[turn], p, block >= groups, token < count, n, static_cast<unsigned>(token), h, c);
  }
  /// `first`: where the tokens begin.
  template <bool common>
  __device__ void fetch_gates(const FastParams& p, unsigned n, unsigned h, int count, int, unsigned first = 0) {
    if (const int token = own_token(); token < count) gates_.fetch<common>(p, n, first + static_cast<unsigned>(token), h);
  }

  __device__ void share(int g, int c) {
#pragma unroll
    for (int turn = 0; turn < blocks; ++turn)
      if (const int block = block_of(turn); block < blocks) put(words_[turn], block, g, c);
    __syncthreads();
  }

  /// All columns by one warp: put_all() comes after.
  __device__ void fetch_all(const FastParams& p, unsigned n, unsigned h, unsigned first, int count, int g, int c) {
#pragma unroll
    for (int block = 0; block < blocks; ++block) {
      const int token = 8 * (block % groups) + g;
      fetch_column<width>(words_[block], p, block >= groups, token < count, n, first + static_cast<unsigned>(token), h, c);
    }
  }
  __device__ void put_all(int g, int c) {
#pragma unroll
    for (int block = 0; block < blocks; ++block) put(words_[block], block, g, c);
    __syncwarp();
  }

  /// As fragments of a matrix product: of column g of a block, four of its pairs from this one.
  __device__ void load_pairs(Pair (&out)[4], int block, int first, int part = 0) const {
    const int lane = own_lane(), row = lane % 8;
    load_matrices(out, memory_ + at(part, first / 8, 8 * block) + row * row_pitch + (((lane / 8) ^ row) ^ first % 8) * 16);
  }
  /// Of all blocks.
  __device__ __forceinline__ void load_pairs(Pair (&out)[key_parts][blocks][4], int first) const {
#pragma unroll
    for (int part = 0; part < key_parts; ++part)
#pragma unroll
      for (int block = 0; block < blocks; ++block) load_pairs(out[part][block], block, first, part);
  }

  // Of matrices whose rows are tokens, a lane has rows g and g + 8 ("halves"), and of each group of columns 2c and 2c + 1.
  template <bool common>
  __device__ void prepare(const FastParams& p, int count, int g, int c) {
    float decay = 1, own_beta = 0;
    if (own_token() < count) {
      decay = expf(gates_.log_decay<float, common>(p));
      own_beta = gates_.beta<float, common>(p);
    }
    float products[groups][4] = {}, read_outs[groups][4] = {}, squares[groups][4] = {};
#pragma unroll
    for (int first = 0; first < runs * pairs; first += 4) {
      Pair words[key_parts][blocks][4];
      load_pairs(words, first);
      const auto multiply = [&](float(&d)[4], int block, int column_block) {
#pragma unroll
        for (int part = 0; part < key_parts; ++part)
#pragma unroll
          for (int other = 0; other < key_parts; ++other) {
            const auto &low = words[part][block], &high = words[part][block + 1], &columns = words[other][column_block];
#pragma unroll
            for (int j = 0; j < 4; j += 2)
              multiply_add(d, low[j], high[j], low[j + 1], high[j + 1], columns[j], columns[j + 1]);
          }
      };
#pragma unroll
      for (int group = 0; group < groups; ++group) {
        multiply(products[group], 0, group);
        multiply(read_outs[group], 2, group);
        multiply(squares[group], 2, groups + group);
      }
    }
    float row_factor[2], row_query_factor[2];
    const auto square_of = [&](const float(&x)[4], int half) {
      return shuffle(g % 2 == 0 ? x[2 * half] : x[2 * half + 1], 4 * g + g / 2);
    };
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      row_factor[half] = normalisation<common>(p, square_of(products[half], half));
      row_query_factor[half] = normalisation<common>(p, square_of(squares[half], half));
    }
    // What is above the diagonal of a matrix of groups is zero.
    float decays[2][groups][2];
    prefix_[0] = prefix_[1] = shuffle(decay, 0);
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int group = 0; group < groups; ++group) decays[half][group][0] = decays[half][group][1] = 1;
#pragma unroll
    for (int i = 1; i < 16; ++i) {
      const float next = shuffle(decay, i);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (half == 0 && i >= 8) continue;
        const float factor = i <= 8 * half + g ? next : 1.0f;
        prefix_[half] *= factor;
#pragma unroll
        for (int group = 0; group <= half; ++group)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            if (i > 8 * group + 2 * c + e) decays[half][group][e] *= factor;
      }
    }
    float column_norm[groups][2];
#pragma unroll
    for (int group = 0; group < groups; ++group)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int from = 4 * (2 * c + e);
        const float norm = shuffle(row_factor[group], from), query_norm = shuffle(row_query_factor[group], from);
        const float column_decay = shuffle(prefix_[group], from), column_beta = shuffle(own_beta, 8 * group + 2 * c + e);
        column_norm[group][e] = norm;
        key_factor[group][e] = -column_beta * (column_decay * norm);
        value_factor[group][e] = column_beta;
        query_factor[group][e] = p.scale * (column_decay * query_norm);
      }
    float left[2][groups][2] = {}, right[2][groups][2] = {};
    float w[2][groups][2] = {}, qw[2][groups][2] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int t = 8 * half + g;
      const float beta = shuffle(own_beta, t);
#pragma unroll
      for (int group = 0; group <= half; ++group)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int column = 8 * group + 2 * c + e;
          float& x = decays[half][group][e];
          x = column <= t ? x * column_norm[group][e] : 0.0f;
          left[half][group][e] = column < t ? -beta * (row_factor[half] * products[group][2 * half + e] * x) : 0.0f;
          right[half][group][e] = p.scale * (row_query_factor[half] * read_outs[group][2 * half + e] * x);
          w[half][group][e] = column == t ? 1.0f : 0.0f;
        }
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int half_of_row = i / 8, from = 4 * g + i % 8 / 2;
      float known[groups][2];
#pragma unroll
      for (int group = 0; group <= half_of_row; ++group)
#pragma unroll
        for (int e = 0; e < 2; ++e) known[group][e] = shuffle(w[half_of_row][group][e], 4 * (i % 8) + c);  // row i is complete
#pragma unroll
      for (int half = half_of_row; half < 2; ++half) {
        const float a = shuffle(left[half][half_of_row][i % 2], from), b = shuffle(right[half][half_of_row][i % 2], from);
#pragma unroll
        for (int group = 0; group <= half_of_row; ++group)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            w[half][group][e] += a * known[group][e];
            qw[half][group][e] += b * known[group][e];
          }
      }
    }
#pragma unroll
    for (int place = 0; place < 3; ++place) {
      const int half = place == 0 ? 0 : 1, group = place == 2 ? 1 : 0;
      split_in<parts>(w[half][group][0], w[half][group][1], [&](int part) -> Pair& { return solutions_[0][place][part]; });
      split_in<parts>(qw[half][group][0], qw[half][group][1], [&](int part) -> Pair& { return solutions_[1][place][part]; });
#pragma unroll
      for (int e = 0; e < 2; ++e) decays_[place][e] = decays[half][group][e];
    }
  }

  __device__ void pass(SharedNumbers numbers) {
    if constexpr (members == 1) {
      for_each_number([&](auto& x) { numbers.pass(x); });
    } else {
      // Where there are registers for it, four at a time.
      Pair words[number_bytes / 128] = {};
      int next = 0;
      for_each_number([&](auto& x) { memcpy(&words[next++], &x, sizeof x); });
      numbers.pass_all(words);
      next = 0;
      for_each_number([&](auto& x) { memcpy(&x, &words[next++], sizeof x); });
    }
  }

  /// From R (rows g and g + 8 of 16) to the corrections U; adds to the outputs.
  __device__ void solve(const float (&in)[groups][2][2], float (&corrections)[groups][4], float (&out)[groups][4]) const {
    Pair a[parts][4];
#pragma unroll
    for (int group = 0; group < groups; ++group)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        split_in<parts>(in[group][half][0], in[group][half][1], [&](int part) -> Pair& { return a[part][2 * group + half]; });
#pragma unroll
    for (int part = parts - 1; part >= 0; --part)
#pragma unroll
      for (int other = parts - 1 - part; other >= 0; --other)
#pragma unroll
        for (int matrix = 0; matrix < 2; ++matrix) {
          auto& d = matrix == 0 ? corrections : out;
          const auto& b = solutions_[matrix];
          multiply_add(d[0], a[part][0], a[part][1], b[0][other]);
          multiply_add(d[1], a[part][0], a[part][1], a[part][2], a[part][3], b[1][other], b[2][other]);
        }
  }

  __device__ void forget() {}

  /// As operands of products of a group of warps, of memory at this offset: all columns' pairs of a step, which is two of them
  /// in the order of i and j; and the keys of a member's tokens, transposed, of a line.
  __device__ static SharedMatrix matrices(std::uint32_t offset) { return shared_matrix(offset + numbers_bytes); }
  __device__ static SharedMatrix columns(SharedMatrix matrices, int step, int part) {
    return matrices + (at(part, step / 4, 0) + step % 4 * 32) / 16;
  }
  __device__ static SharedMatrix keys(SharedMatrix matrices, int member, int line, int part) {
    return matrices + at(part, line, 8 * blocks * member) / 16;
  }

  /// The products of all columns with the keys of the 16 tokens before (from token `first` on), in parts: into shared memory,
  /// for add_before(). By the warp that has the columns.
  __device__ void prepare_before(const FastParams& p, unsigned n, unsigned h, unsigned first, int g, int c, void* to) const {
    Pair keys[groups][runs][pairs];
#pragma unroll
    for (int group = 0; group < groups; ++group)
      fetch_column<width>(keys[group], p, false, true, n, first + static_cast<unsigned>(8 * group + g), h, c);
    float products[2][groups][4] = {};
#pragma unroll
    for (int pair = 0; pair < runs * pairs; pair += 4) {
      Pair rows[key_parts][blocks][4];
      load_pairs(rows, pair);
#pragma unroll
      for (int group = 0; group < groups; ++group) {
        Pair columns[key_parts][4];
        copy_pairs(columns[0], keys[group], pair);
#pragma unroll
        for (int j = 0; j < 4; ++j) split_pair<Input>(columns[0][j], [&](int part) -> Pair& { return columns[part][j]; });
#pragma unroll
        for (int part = 0; part < key_parts; ++part)
#pragma unroll
          for (int other = 0; other < key_parts; ++other)
#pragma unroll
            for (int which = 0; which < 2; ++which)
#pragma unroll
              for (int j = 0; j < 4; j += 2)
                multiply_add(products[which][group], rows[part][2 * which][j], rows[part][2 * which + 1][j],
                             rows[part][2 * which][j + 1], rows[part][2 * which + 1][j + 1], columns[other][j],
                             columns[other][j + 1]);
      }
    }
#pragma unroll
    for (int block = 0; block < blocks; ++block) {
      Pair words[2 * parts];
#pragma unroll
      for (int group = 0; group < groups; ++group)
        split_in<parts>(products[block / 2][group][block % 2 * 2], products[block / 2][group][block % 2 * 2 + 1],
                        [&](int part) -> Pair& { return words[2 * part + group]; });
      four_before(to, block) = make_uint4(words[0], words[1], words[2], words[3]);
      two_before(to, block) = make_uint2(words[4], words[5]);
    }
  }
  /// products = decay products + U k^T [k q], where U k^T is what the 16 tokens before have added to the state, U as fragments.
  __device__ __forceinline__ static void add_before(void* from, const Pair (&u)[parts][4], float decay,
                                                    float (&products)[blocks][4]) {
#pragma unroll
    for (int block = 0; block < blocks; ++block) {
      const uint4 first = four_before(from, block);
      const uint2 last = two_before(from, block);
      const Pair columns[parts][2] = {{first.x, first.y}, {first.z, first.w}, {last.x, last.y}};
      float d[4] = {};
#pragma unroll
      for (int part = parts - 1; part >= 0; --part)
#pragma unroll
        for (int other = parts - 1 - part; other >= 0; --other)
          multiply_add(d, u[part][0], u[part][1], u[part][2], u[part][3], columns[other][0], columns[other][1]);
#pragma unroll
      for (int e = 0; e < 4; ++e) products[block][e] = decay * products[block][e] + d[e];
    }
  }

  __device__ float decay_to(int t) const { return shuffle(t < 8 ? prefix_[0] : prefix_[1], 4 * (t % 8)); }
  __device__ void factors_to(int t, int c, float (&out)[groups][2]) const {
    const int from = 4 * (t % 8) + c;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      out[0][e] = shuffle(t < 8 ? decays_[0][e] : decays_[1][e], from);
      out[1][e] = shuffle(t < 8 ? 0.0f : decays_[2][e], from);
    }
  }

  __device__ static void split(float x, float y, Pair (&out)[parts]) {
    split_in<parts>(x, y, [&](int part) -> Pair& { return out[part]; });
  }
  /// d += U k^T for rows g and g + 8 and the keys of pairs j and j + 1 of run i.
  __device__ void multiply_keys(float (&d)[2][4], const Pair (&u)[groups][2][parts], int i, int j) const {
    const int lane = own_lane(), row = lane % 8, first = i * pairs + j;
    Pair columns[key_parts][4];
#pragma unroll
    for (int part = 0; part < key_parts; ++part)
      load_transposed(columns[part], memory_ + at(part, first / 8, 0) + (lane / 8 % 2 * 8 + row) * row_pitch +
                                         ((lane / 16 ^ row) ^ first % 8) * 16);
#pragma unroll
    for (int part = parts - 1; part >= 0; --part)
#pragma unroll
      for (int other = key_parts - 1; other >= 0; --other)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (part + other < 3)
            multiply_add(d[e], u[0][0][part], u[0][1][part], u[1][0][part], u[1][1][part], columns[other][2 * e],
                         columns[other][2 * e + 1]);
  }

 private:
  // Rows of shared memory have the pairs of a token in the order of i, j and c, in vectors of four, of which eight are a line.
  // Those of one i and j of 8 tokens are a matrix; so that they are in different banks, vector v of a line of token r is at
  // v ^ (r % 8). That is what wgmma knows as a swizzle of 128 bytes, which counts from multiples of 1,024, if lines of
  // different tokens follow each other: as they do where there are several members.
  static constexpr int line_bytes = 128, lines = key_dim / 64, rows = 8 * blocks * members;
  static constexpr int row_pitch = members == 1 ? line_bytes * lines : line_bytes;
  static constexpr int line_pitch = members == 1 ? line_bytes : line_bytes * rows;
  static constexpr int numbers = 12 + 2 + 6 + 6 * parts;
  static constexpr int number_bytes = 128 * (members == 1 ? numbers : (numbers + 3) / 4 * 4);
  static constexpr int before_bytes = members == 1 ? 0 : 128 * 2 * blocks * parts;
  static constexpr int numbers_bytes =
      members == 1 ? number_bytes : (members * (number_bytes + before_bytes) + 1023) / 1024 * 1024;
  __device__ static constexpr int at(int part, int line, int row) {
    return part * (line_bytes * lines * rows) + line * line_pitch + row * row_pitch;
  }

  __device__ void put(const Pair (&words)[runs][pairs], int block, int g, int c) const {
    char* const row = memory_ + at(0, 0, 8 * block + g) + 4 * c;
#pragma unroll
    for (int i = 0; i < runs; ++i)
#pragma unroll
      for (int j = 0; j < pairs; ++j) {
        Pair split[key_parts] = {words[i][j]};
        if constexpr (key_parts > 1) {
          float low, high;
          widen(words[i][j], low, high, Input{});
          split_in<key_parts>(low, high, [&](int part) -> Pair& { return split[part]; });
        }
#pragma unroll
        for (int part = 0; part < key_parts; ++part)
          *reinterpret_cast<Pair*>(row + at(part, (i * pairs + j) / 8, 0) + ((i * pairs + j) % 8 ^ g) * 16) = split[part];
      }
  }

  /// Of what prepare() has found out.
  template <class Function>
  __device__ __forceinline__ void for_each_number(const Function& function) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
#pragma unroll
      for (int group = 0; group < groups; ++group)
        function(key_factor[group][e]), function(value_factor[group][e]), function(query_factor[group][e]);
      function(prefix_[e]);
#pragma unroll
      for (auto& decays : decays_) function(decays[e]);
    }
#pragma unroll
    for (auto& solution : solutions_)
#pragma unroll
      for (auto& place : solution)
#pragma unroll
        for (Pair& part : place) function(part);
  }

  /// A lane's six words of what prepare_before() finds out of a block: the first two parts, and the third.
  __device__ static uint4& four_before(void* memory, int block) { return static_cast<uint4*>(memory)[block * 48 + own_lane()]; }
  __device__ static uint2& two_before(void* memory, int block) {
    return static_cast<uint2*>(memory)[block * 96 + 64 + own_lane()];
  }

  __device__ static int own_lane() { return static_cast<int>(threadIdx.x % 32); }
  /// Whose gates a lane fetches.
  __device__ static int own_token() { return static_cast<int>(threadIdx.x % 16); }
  __device__ static int block_of(int turn) { return static_cast<int>(threadIdx.x / 32 + turn * (blockDim.x / 32)); }

  char* const memory_;
  Pair words_[blocks][runs][width / 2];
  GateInputs gates_;
  Pair solutions_[2][3][parts];  ///< W, and Q W: rows g with columns of the first group, and rows g + 8 with those of both
  float decays_[3][2];           ///< exp(G_t - G_j) n_j in the same three places
  float prefix_[2];              ///< exp(G_t)

 public:
  static constexpr std::size_t shared_bytes = numbers_bytes + at(key_parts, 0, 0);
  /// In the memory of all members: a member's numbers, and what prepare_before() has found out.
  __device__ static char* numbers_at(char* memory, int member) { return memory + member * (number_bytes + before_bytes); }
  __device__ static char* before_at(char* memory, int member) { return numbers_at(memory, member) + number_bytes; }
};

}  // namespace gatedelta::cuda
