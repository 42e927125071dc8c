// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "backends/cuda/rows.cuh"
#include "gatedelta/window.hpp"

namespace gatedelta::cuda {

constexpr int window_words = 2 * max_window / 32;

/// What a warp knows of the record of a slot: a lane has the places of the entries lane, lane + 32, ...
struct RecordRow {
  std::int32_t length = 0, places[window_words] = {};

  /// False after a fault, which is recorded.
  template <class P>
  __device__ bool fetch(const P& p, std::int64_t slot, unsigned row, int lane) {
    const int ring = p.window.ring;
    length = static_cast<std::int32_t>(index_at(p.window.length, slot));
    if (length < 0 || length > p.window.capacity) {
      record(p.fault, FaultKind::length, row, length, p.window.capacity);
      return false;
    }
    bool good = true;
#pragma unroll
    for (int i = 0; i < window_words; ++i) {
      const int entry = 32 * i + lane;
      if (32 * i >= ring) continue;
      if (entry < ring) places[i] = static_cast<std::int32_t>(index_at(p.window.order, slot, entry));
      const bool bad = entry < ring && (places[i] < 0 || places[i] >= ring);
      if (bad) record(p.fault, FaultKind::order, row, places[i], ring - 1);
      good = good && !bad;
    }
    // Each place once: as many bits as there are places.
    __syncwarp();
    int count = 0;
#pragma unroll
    for (int word = 0; word < window_words; ++word) {
      if (32 * word >= ring) continue;
      unsigned bits = 0;
#pragma unroll
      for (int i = 0; i < window_words; ++i)
        if (32 * i + lane < ring && places[i] / 32 == word) bits |= 1u << places[i] % 32;
      count += __popc(__reduce_or_sync(0xffffffffu, bits));
    }
    good = __all_sync(0xffffffffu, good);
    if (good && count != ring) record(p.fault, FaultKind::order, row, count, ring - 1);
    return good && count == ring;
  }
};

}  // namespace gatedelta::cuda
