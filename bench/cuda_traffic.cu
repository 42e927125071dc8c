// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "backends/cuda/arch.cuh"
#include "cuda_kernels.hpp"

// The traffic of a call where the call has it, and nothing else: a row's slot is looked up, what its tokens bring is read, its
// state is moved and its outputs are written; with a replay window, its length is looked up, too, the entries that there are
// are read, new ones are written, and the state only where the window is full. Each byte once: a block has a part of a head's
// state, and the same part of what else belongs to the head.
namespace gatedelta::bench {
namespace {

using cuda::Eviction, cuda::load_vector, cuda::store_vector;

struct Move {
  CallTraffic call;
  unsigned flip;  // 0, and `never` a sum that does not occur, as in the limit
  unsigned never;
  unsigned* unused;
};

__device__ const uint4* vectors(const void* data) { return static_cast<const uint4*>(data); }
__device__ uint4* vectors(void* data) { return static_cast<uint4*>(data); }
__device__ const unsigned short* at_bytes(const void* data, std::int64_t bytes) {
  return reinterpret_cast<const unsigned short*>(static_cast<const char*>(data) + bytes);
}

/// This thread's vectors of the block's part of `vectors` vectors; at most two of them.
struct Part {
  int first, end;

  __device__ Part(int vectors, int part, int parts)
      : first(vectors * part / parts + static_cast<int>(threadIdx.x)), end(vectors * (part + 1) / parts) {}
  /// function(0, first one), function(1, second one).
  template <class Function>
  __device__ __forceinline__ void for_each(const Function& function) const {
    if (first < end) function(0, first);
    if (const int second = first + static_cast<int>(blockDim.x); second < end) function(1, second);
  }
};

/// `Keeps`: states stay in the L2 cache until they are stored, and then leave it like anything else, as the library has them;
/// if not, with the hint that nothing is used again.
template <int Threads, int Vectors, bool Keeps>
__global__ void __launch_bounds__(Threads) move(const __grid_constant__ Move p) {
  const CallTraffic& call = p.call;
  const int n = static_cast<int>(blockIdx.z), h = static_cast<int>(blockIdx.y);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int part = static_cast<int>(blockIdx.x), parts = static_cast<int>(gridDim.x), tokens = call.tokens;
  // Of each token one lane knows the slot.
  int slot, token_slot = 0;
  if (call.accepted != nullptr) {
    if (lane < tokens) token_slot = call.slots[n * tokens + lane];
    const int start = call.accepted[n] - 1;
    slot = call.slots[n * tokens + start];
  } else {
    slot = call.slots[n];
  }
  unsigned sum = 0;
  const auto add = [&](const uint4& x) { sum += (x.x + x.y) + (x.z + x.w); };
  // Heads with the same key share its vectors.
  const int shared = h % call.key_group * parts + part, sharing = call.key_group * parts, key_head = h / call.key_group;
  const Part of_keys(tokens * call.key_vectors, shared, sharing), of_values(tokens * call.value_vectors, part, parts);
  const auto at = [&](int i, int vectors, int head, int heads) {
    return (static_cast<std::int64_t>(n * tokens + i / vectors) * heads + head) * vectors + i % vectors;
  };
  uint4 q[2] = {}, k[2] = {}, v[2] = {};
  of_keys.for_each([&](int which, int i) {
    const std::int64_t place = at(i, call.key_vectors, key_head, call.key_heads);
    q[which] = vectors(call.q)[place], k[which] = vectors(call.k)[place];
  });
  of_values.for_each([&](int which, int i) { v[which] = vectors(call.v)[at(i, call.value_vectors, h, call.heads)]; });
  unsigned gates = 0;
  if (part == 0 && thread < tokens) {
    const std::int64_t place = (static_cast<std::int64_t>(n) * tokens + thread) * call.heads + h;
    gates = *at_bytes(call.a, place * call.gate_bytes) + *at_bytes(call.b, place * call.gate_bytes);
  }

  const std::int64_t head = static_cast<std::int64_t>(h) * call.head_vectors, row = call.heads * call.head_vectors;
  const int first = part * Threads * Vectors + static_cast<int>(threadIdx.x);
  uint4* const states = vectors(call.state);
  uint4* const state = states + slot * row + head + first;
  uint4 held[Vectors];
  const bool in_place = call.stores > 0 && call.accepted == nullptr && call.snapshots == nullptr && call.length == nullptr;
  const Eviction loads = !Keeps ? Eviction::first : in_place ? Eviction::last : Eviction::normal;
#pragma unroll
  for (int i = 0; i < Vectors; ++i) held[i] = load_vector(state + i * Threads, loads);

  bool stores = true;
  uint4 entries[4] = {};
  if (call.length != nullptr) {
    const int length = call.length[slot];
    stores = length + tokens > call.capacity;
    const std::int64_t key_ring = (static_cast<std::int64_t>(slot) * call.key_heads + key_head) * call.ring;
    const std::int64_t ring = (static_cast<std::int64_t>(slot) * call.heads + h) * call.ring;
    uint4* const keys = vectors(call.keys) + key_ring * call.entry_key_vectors;
    uint4* const corrections = vectors(call.corrections) + ring * call.entry_value_vectors;
    float* const decays = static_cast<float*>(call.decays) + ring;
    Part(length * call.entry_key_vectors, shared, sharing).for_each([&](int which, int i) { entries[which] = keys[i]; });
    Part(length * call.entry_value_vectors, part, parts).for_each([&](int which, int i) {
      entries[2 + which] = corrections[i];
    });
    if (part == 0 && thread < length) gates += __float_as_uint(decays[thread]);
    // Some number, behind the entries.
    constexpr uint4 number{0x3c003c00u, 0x3c003c00u, 0x3c003c00u, 0x3c003c00u};
    Part(tokens * call.entry_key_vectors, shared, sharing).for_each([&](int, int i) {
      keys[length * call.entry_key_vectors + i] = number;
    });
    Part(tokens * call.entry_value_vectors, part, parts).for_each([&](int, int i) {
      corrections[length * call.entry_value_vectors + i] = number;
    });
    if (part == 0 && thread < tokens) decays[length + thread] = -0.01f;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) add(q[i]), add(k[i]), add(v[i]), add(entries[i]), add(entries[2 + i]);
  sum += gates;
  of_values.for_each([&](int which, int i) { vectors(call.o)[at(i, call.value_vectors, h, call.heads)] = v[which]; });

  if (call.stores == 0 || !stores) {
#pragma unroll
    for (int i = 0; i < Vectors; ++i) add(held[i]);
    if (sum == p.never) *p.unused = sum;
    return;
  }
  if (sum == p.never) *p.unused = sum;
#pragma unroll
  for (int i = 0; i < Vectors; ++i) held[i].x ^= p.flip;
  for (int t = 0; t < call.stores; ++t) {
    uint4* to = state;
    if (call.accepted != nullptr)
      to = states + __shfl_sync(0xffffffffu, token_slot, t) * row + head + first;
    else if (call.snapshots != nullptr)
      to = vectors(call.snapshots) + (static_cast<std::int64_t>(n) * tokens + t) * row + head + first;
#pragma unroll
    for (int i = 0; i < Vectors; ++i) store_vector(to + i * Threads, held[i], Keeps ? Eviction::normal : Eviction::first);
  }
}

template <int Threads, int Vectors, bool Keeps>
bool launch_move_of(const CallTraffic& call, void* unused, cudaStream_t stream) {
  const std::int64_t parts = call.head_vectors / (Threads * Vectors);
  // Whole parts of heads, of which a thread has at most two vectors of anything else.
  const std::int64_t entries = call.length != nullptr ? call.capacity : 0;
  const std::int64_t most =
      std::max({call.tokens * call.key_vectors, call.tokens * call.value_vectors,
                static_cast<int>(entries * call.entry_key_vectors), static_cast<int>(entries * call.entry_value_vectors)});
  if (parts == 0 || parts * Threads * Vectors != call.head_vectors || (most + parts - 1) / parts > 2 * Threads ||
      call.tokens > 32)
    return false;
  const Move params{call, 0, 0x9e3779b9u, static_cast<unsigned*>(unused)};
  move<Threads, Vectors, Keeps>
      <<<dim3(static_cast<unsigned>(parts), static_cast<unsigned>(call.heads), static_cast<unsigned>(call.rows)), Threads, 0,
         stream>>>(params);
  return true;
}

}  // namespace

cudaError_t launch_call_traffic(const CallTraffic& call, int shape, void* unused, cudaStream_t stream, bool& fits) {
  constexpr bool (*launches[])(const CallTraffic&, void*, cudaStream_t) = {
      launch_move_of<128, 2, false>, launch_move_of<128, 4, false>, launch_move_of<128, 8, false>,
      launch_move_of<256, 2, false>, launch_move_of<256, 4, false>, launch_move_of<256, 8, false>,
      launch_move_of<512, 2, false>, launch_move_of<512, 4, false>, launch_move_of<512, 8, false>,
      launch_move_of<128, 2, true>,  launch_move_of<128, 4, true>,  launch_move_of<128, 8, true>,
      launch_move_of<256, 2, true>,  launch_move_of<256, 4, true>,  launch_move_of<256, 8, true>,
      launch_move_of<512, 2, true>,  launch_move_of<512, 4, true>,  launch_move_of<512, 8, true>,
  };
  static_assert(sizeof launches / sizeof launches[0] == call_shapes);
  fits = launches[shape](call, unused, stream);
  return cudaGetLastError();
}

}  // namespace gatedelta::bench
