// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <random>
#include <string>
#include <vector>

#include "backends/cuda/plan.hpp"
#include "gatedelta/operator.hpp"

// Calls with random inputs, and what a plain recurrence in float64 makes of them.
namespace gatedelta::emulation {

struct Form {
  DType state = DType::f32;
  std::int64_t tokens = 1, key_dim = 128, value_dim = 64;
  cuda::Shape shape{};
  std::int64_t k_heads = 1, heads = 2;
  /// The usual gate, beta and normalisation, which the kernels have variants for, or others.
  bool usual = true;
  bool value_last = false, snapshots = false, update = true;
  /// With a window: W, and the entries of the first row; the second one has 3 less, but at least none.
  std::int64_t capacity = 0, entries = 0;
  DType inputs = DType::bf16;  ///< of q, k, v and o
  bool tree = false;           ///< with a window: the tokens are drafts with parents
  bool dependent = false;      ///< the launch
  DType entry_dtype = DType::bf16;
  bool other_snapshots = false;  ///< not in the dtype of the state
  bool token_slots = false;      ///< states after each token go to the pool, several to the same slot and some nowhere

  DType snapshot_dtype() const { return !other_snapshots ? state : state == DType::f32 ? DType::bf16 : DType::f32; }
  std::string text() const;
};

/// Root of the sum of squares, of errors and of what is wanted.
class Deviation {
 public:
  void add(double got, double want) {
    errors_ += (got - want) * (got - want);
    sum_ += want * want;
  }
  double relative() const;

 private:
  double errors_ = 0, sum_ = 0;
};

/// What a call has got wrong.
struct Result {
  std::string fault;  ///< of the launch or the kernel
  Deviation output, state, snapshots, corrections;
  double decays = 0;                                             ///< the largest error, relative to 1 + |g|
  std::int64_t outputs_of_padding = 0, keys = 0, untouched = 0;  ///< elements that are not what they should be
  int folded = 0, unfolded = 0;                                  ///< rows
};

/// Two rows and one of padding; the pool has more slots than that, of which the last four are for states after tokens.
class Scene {
 public:
  explicit Scene(const Form& form);
  /// Runs the kernel that the backend takes for such a call, in this form's shape. `kernel` says which one it must be.
  Result run(cuda::Kernel kernel, int token_tile);
  /// The bits that the run has left behind in outputs, states, snapshots and windows.
  std::string bits() const;

 private:
  static constexpr std::int64_t rows = 3, slots = 8;
  static constexpr std::int32_t read_slots[rows] = {2, -1, 0};
  /// Where the state after token t of row n goes, with slots for that.
  static std::int32_t token_slot(std::int64_t n, std::int64_t t);
  /// Whether that is where it stays.
  bool stays(std::int64_t n, std::int64_t t) const;
  /// Whether any state after a token goes to this slot.
  bool is_for_tokens(std::int64_t slot) const;

  TensorView make(DType dtype, const std::vector<std::int64_t>& shape);
  template <class Value>
  TensorView make(DType dtype, const std::vector<std::int64_t>& shape, Value value);
  TensorView copy(const TensorView& tensor);
  void make_window();
  /// The token before t, or -1.
  std::int64_t before(std::int64_t n, std::int64_t t) const;

  /// `pass`: so many tokens see what those before them have left behind as it is stored, and each other's as it is.
  void expect(Result& result, std::int64_t n, std::int64_t h, std::int64_t pass);
  void count_untouched(Result& result) const;

  Form form_;
  std::mt19937_64 random_{1};
  std::deque<std::vector<std::byte>> memory_;
  Config config_;
  Arguments in_;
  ReplayWindow window_, window_before_;
  TensorView state_before_;
};

}  // namespace gatedelta::emulation
