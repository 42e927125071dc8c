// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "backends/cuda/rows.cuh"
#include "gatedelta/window.hpp"

namespace gatedelta::cuda {

constexpr int window_words = 2 * max_window / 32;

/// What a warp knows of the record of a slot: a lane has the places of the entries lane, lane + 32, ..., of a ring that has
/// room in so many of these.
template <int words = window_words>
struct RecordRow {
  std::int32_t length = 0, places[words] = {};

  /// The loads alone, which the following may overtake.
  template <class P>
  __device__ void load(const P& p, std::int64_t slot, int lane) {
    const auto* const order = static_cast<const std::int32_t*>(p.window.order.data) + offset_of(p.window.order, slot);
    length = static_cast<const std::int32_t*>(p.window.length.data)[offset_of(p.window.length, slot)];
#pragma unroll
    for (int i = 0; i < words; ++i) {
      if (32 * i >= p.window.ring) break;
      if (32 * i + lane < p.window.ring) places[i] = order[product(32 * i + lane, p.window.order.strides[1])];
    }
  }
  /// False if the length is none, or a place is outside the ring; recorded where `records`. For a whole warp, like the rest.
  template <class P>
  __device__ bool is_in_range(const P& p, unsigned row, int lane, bool records) const {
    const int ring = p.window.ring;
    const bool has_length = length >= 0 && length <= p.window.capacity;
    bool good = has_length;
    std::int32_t bad = 0;
#pragma unroll
    for (int i = 0; i < words; ++i) {
      if (32 * i >= ring) break;
      if (32 * i + lane < ring && (places[i] < 0 || places[i] >= ring)) good = false, bad = places[i];
    }
    if (records && !good)
      has_length ? cuda::record(p.fault, FaultKind::order, row, bad, ring - 1)
                 : cuda::record(p.fault, FaultKind::length, row, length, p.window.capacity);
    return __all_sync(0xffffffffu, good);
  }
  /// Of a record that is in range: adds the entries of `tokens`, those of this call that have come before `left` others. If
  /// there was no room for all of these, the window has been folded.
  template <class Window>
  __device__ void append(int tokens, int left, const Window& window) {
    const int first = length + tokens + left > window.capacity ? length : 0;  // entry of the record, here the first one
    length += tokens - first;
    std::int32_t behind[words] = {};
#pragma unroll
    for (int i = 0; i < words; ++i) {
      const int entry = first + 32 * i + static_cast<int>(threadIdx.x % 32);
      behind[i] = place_of(entry < window.ring ? entry : entry - window.ring, window.ring);
    }
#pragma unroll
    for (int i = 0; i < words; ++i) places[i] = behind[i];
  }
  /// Where an entry lies.
  __device__ int place_of(int entry, int ring) const {
    int place = __shfl_sync(0xffffffffu, places[0], entry % 32);
#pragma unroll
    for (int i = 1; i < words; ++i) {
      if (32 * i >= ring) break;
      if (const int found = __shfl_sync(0xffffffffu, places[i], entry % 32); entry / 32 == i) place = found;
    }
    return place;
  }
  /// Whether each place of a record that is in range is there once.
  template <class P>
  __device__ bool is_permutation(const P& p, unsigned row, int lane, bool records) const {
    const int ring = p.window.ring;
    // As many bits as there are places.
    int count = 0;
#pragma unroll
    for (int word = 0; word < words; ++word) {
      if (32 * word >= ring) break;
      unsigned bits = 0;
#pragma unroll
      for (int i = 0; i < words; ++i) {
        if (32 * i >= ring) break;
        if (32 * i + lane < ring && places[i] / 32 == word) bits |= 1u << places[i] % 32;
      }
      count += __popc(__reduce_or_sync(0xffffffffu, bits));
    }
    if (count != ring && records) cuda::record(p.fault, FaultKind::order, row, count, ring - 1);
    return count == ring;
  }

  /// All of this. False after a fault, which is recorded where `records`.
  template <class P>
  __device__ bool fetch(const P& p, std::int64_t slot, unsigned row, int lane, bool records) {
    load(p, slot, lane);
    return is_in_range(p, row, lane, records) && is_permutation(p, row, lane, records);
  }
};

/// Whether the window takes as many tokens as a row has; recorded where `records` if not.
template <class P>
__device__ bool has_room(const P& p, unsigned row, std::int64_t tokens, bool records) {
  const int room = p.window.room();
  if (records && tokens > room) record(p.fault, FaultKind::window_room, row, tokens, room);
  return tokens <= room;
}

/// The parent of a draft, or the nearest int.
template <class P>
__device__ int parent_at(const P& p, std::int64_t batch, std::int64_t token) {
  constexpr std::int64_t most = INT32_MAX;
  const std::int64_t parent = index_at(p.parent, batch, token);
  return static_cast<int>(parent < -most ? -most : parent > most ? most : parent);
}

/// Whether draft `token` of row n may have this parent; recorded where `records` if not.
template <class P>
__device__ __forceinline__ bool is_parent(const P& p, unsigned n, int parent, int token, bool records) {
  const bool good = parent >= -1 && parent < token;
  if (records && !good) record(p.fault, FaultKind::parent, n, parent, token - 1);
  return good;
}

/// Of drafts in a tree, at most max_tokens of them, bit i says whether token `lane`, whose parent is given, sees token i: its
/// ancestors and itself. Lanes without a token have a negative one.
template <int max_tokens>
__device__ __forceinline__ unsigned path_in_tree(int parent, int lane) {
  unsigned path = 1u << lane;
#pragma unroll 1
  for (int i = 1; i < max_tokens; ++i) {
    const int from = __shfl_sync(0xffffffffu, parent, i);
    const unsigned before = __shfl_sync(0xffffffffu, path, from & 31);
    if (lane == i && from >= 0) path |= before;
  }
  return path;
}

}  // namespace gatedelta::cuda
