// SPDX-License-Identifier: Apache-2.0
// Compiled once for each instruction set: GATEDELTA_VARIANT is its name, GATEDELTA_TABLE the table it defines.
#include "backends/cpu/chunks.hpp"
#include "backends/cpu/replay.hpp"

namespace gatedelta::cpu {
namespace {

#define GATEDELTA_TEXT(x) #x
#define GATEDELTA_STRING(x) GATEDELTA_TEXT(x)

int64_t scratch_bytes(int64_t key_dim, int64_t rows) {
  const int64_t a = step_scratch_bytes(key_dim, rows), b = chunk_scratch_bytes(key_dim, rows);
  return round_up(a > b ? a : b, 64);
}

int64_t replay_bytes(int64_t key_dim, int64_t rows) { return round_up(replay_scratch_bytes(key_dim, rows), 64); }

#if defined(__AVX512F__)
constexpr int64_t chunks_from = 128;
#elif defined(__AVX2__)
constexpr int64_t chunks_from = 48;
#else
constexpr int64_t chunks_from = INT64_MAX;  // without fused multiply-adds the recurrence always has fewer instructions
#endif

constexpr Kernels table{GATEDELTA_STRING(GATEDELTA_VARIANT), scratch_bytes, step, chunks, replay_bytes, replay, chunks_from};

}  // namespace

extern const Kernels* const GATEDELTA_TABLE = &table;

}  // namespace gatedelta::cpu
