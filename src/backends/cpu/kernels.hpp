// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdint.h>

// What the instruction set variants share with the rest of the backend: plain data and one table of functions a variant.
// Nothing here may become a symbol, since the linker would merge the variants' copies of it.
namespace gatedelta::cpu {

/// The same values as the floating DTypes.
enum class Element : unsigned char { f32, f16, bf16 };

/// A strided matrix on host memory; strides are in bytes.
struct Matrix {
  char* data = nullptr;
  int64_t row_stride = 0;
  int64_t col_stride = 0;
  Element type = Element::f32;
};

/// One head of one sequence, or a block of its value rows.
struct HeadWork {
  int64_t tokens = 0;   ///< T
  int64_t key_dim = 0;  ///< K
  int64_t rows = 0;     ///< value rows of this block
  bool qk_l2norm = true;
  double l2_eps = 0;
  double scale = 1;
  Matrix q, k;                        ///< [T, K]
  Matrix v, o;                        ///< [T, rows]
  const double* log_decay = nullptr;  ///< [T], at least -1e5
  const double* beta = nullptr;       ///< [T]
  Matrix source;                      ///< [rows, K]; no data: the zero state
  Matrix target;                      ///< [rows, K], after the last token; no data: not stored
  /// The keys of source and target are contiguous, and the whole head has a multiple of 4 rows. A property of the call, not of
  /// this block: which path a row takes must not depend on how the head is split.
  bool dense_rows = false;
  /// After each token: where the state goes in the pool (one address a token, null to skip, laid out like token_layout) ...
  char* const* token_targets = nullptr;
  Matrix token_layout;
  /// ... and in the snapshots (token t at t * snapshot_stride bytes).
  Matrix snapshots;
  int64_t snapshot_stride = 0;
  char* scratch = nullptr;  ///< scratch_bytes(), 64-byte aligned
};

/// One head, or a block of its value rows, with a replay window: head.source is the checkpoint, head.target the same where it
/// is folded. At least one token.
struct ReplayWork {
  HeadWork head;
  int64_t length = 0;              ///< P
  const int32_t* order = nullptr;  ///< [P+T]: the places of the entries, then those of the tokens
  Matrix entry_keys;               ///< [places, K]
  Matrix entry_corrections;        ///< [places, rows]
  char* decays = nullptr;          ///< [places] floats
  const int32_t* parent = nullptr;
  int64_t parent_stride = 0;   ///< in elements
  bool stores_keys = false;    ///< several heads and blocks share the keys,
  bool stores_decays = false;  ///< and the blocks of a head its decays: one of them stores
};

struct Kernels {
  const char* name;
  /// Enough for both functions.
  int64_t (*scratch_bytes)(int64_t key_dim, int64_t rows);
  /// The recurrence by value rows: one pass over the state for up to max_step_tokens tokens. Best for few tokens and states
  /// whose keys are contiguous.
  void (*step)(const HeadWork& work);
  /// The chunkwise form (WY representation) on the transposed state: matrix products. Best for many tokens, and for states
  /// whose values are contiguous.
  void (*chunks)(const HeadWork& work);
  int64_t (*replay_scratch_bytes)(int64_t key_dim, int64_t rows);
  void (*replay)(const ReplayWork& work);
  /// Sequences of at least this many tokens are faster by chunks. Measured for each variant with K = V = 128.
  int64_t chunks_from;
  /// Multiply-add instructions on all lanes, as fast as they go; returns the flops done. For measuring the machine.
};

inline constexpr int64_t max_step_tokens = 16;
inline constexpr int64_t chunk_tokens = 64;
inline constexpr int64_t max_window_entries = 64, max_replay_tokens = 64;

/// Null where the variant was not compiled in.
extern const Kernels* const kernels_baseline;
extern const Kernels* const kernels_avx2;
extern const Kernels* const kernels_avx512;

}  // namespace gatedelta::cpu
