// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "gatedelta/operator.hpp"
#include "platform.hpp"

namespace gatedelta::bench {

enum class Op : std::uint8_t { decode, verify, prefill };
std::string_view name_of(Op op) noexcept;

/// What becomes of the states: `update` stores the last one where it came from, `snapshots` stores those after each token in a
/// tensor of their own and leaves the pool alone, `read_only` stores none, `token_slots` stores those after each token in slots
/// of the pool and starts from the one that `accepted` picks.
enum class Mode : std::uint8_t { update, snapshots, read_only, token_slots };
/// As on the command line: "read-only".
std::string_view name_of(Mode mode) noexcept;

/// One call to be timed. The three operations are the same call of the operator; they differ in the limit that counts.
struct Case {
  Op op = Op::decode;
  Mode mode = Mode::update;
  std::int64_t batch = 1;
  std::int64_t tokens = 1;
  std::int64_t q_heads = 16;  ///< also the key heads
  std::int64_t v_heads = 32;
  std::int64_t key_dim = 128;
  std::int64_t value_dim = 128;
  DType dtype = DType::bf16;  ///< of q, k, v, o, a and b; A_log and dt_bias are f32
  DType state_dtype = DType::f32;
  bool value_last = false;  ///< state storage [slots,H,K,V] instead of [slots,H,V,K]
  bool warm = false;        ///< always the same state, so that it may stay in cache
  bool dependent = false;   ///< calls with dependent_launch; without a window
  bool ordered = false;     ///< the slots of a batch follow each other, instead of lying in no order
  std::int64_t window = 0;  ///< W of a replay window, with Mode::update; 0: none
  DType entries = DType::bf16;
  std::int64_t accepted = 0;  ///< tokens of each step that stay, with a window
  bool tree = false;          ///< with a window: the tokens are drafts, token t after token (t - 1) / 2
  std::int64_t layers = 1;    ///< of a model, with windows that share a record: calls to each accept
  int threads = 1;

  Config config() const;
  /// Calls after which a window has been folded about as often as it is in the long run.
  std::int64_t cycle() const { return window > 0 ? window * layers : 1; }
  std::size_t state_bytes() const;  ///< of one state for each sequence
  /// The longest path of a tree, its leftmost.
  std::vector<std::int32_t> longest_path() const;
  /// How many states of a sequence are written.
  std::int64_t stores() const;
  /// The usual count: 7 operations for each token and each element of a head's state.
  double flops() const;
};

/// How many copies of a case's memory the calls rotate through.
struct Rotation {
  std::size_t instance_bytes = 0;
  int instances = 1;
  bool cold = false;  ///< all copies together are more than 4 times the last-level cache
};

/// Throws Error(out_of_memory) if not even one copy fits.
Rotation plan_rotation(const Case& item, const Platform& platform, double max_bytes);

/// The arguments of a case without memory behind them: for the questions that shapes and dtypes answer. `window` is what they
/// refer to if the case has one.
Arguments shapes_of(const Case& item, Device device, ReplayWindow& window);

/// The memory of a case and a workspace of `workspace_size` bytes that all calls share, filled with random numbers of realistic
/// size: decays mostly in 0.9 to 1, states that stay bounded.
class Workload {
 public:
  Workload(const Case& item, Platform& platform, const Rotation& rotation, std::size_t workspace_size);

  /// What has to be moved for a call.
  Traffic traffic(const Arguments& arguments) const;
  /// What a call moves, and where.
  CallTraffic call_traffic(const Arguments& arguments) const;
  /// The arguments of the next instance. Whoever calls, kernel or limit, takes the one that was left alone the longest.
  const Arguments& next();
  /// The accept that follows a call with a window.
  AcceptArguments accept(const Arguments& arguments) const;

 private:
  void start_windows(Platform& platform);

  Case item_;
  std::shared_ptr<void> workspace_, accepted_memory_, path_memory_;
  TensorView accepted_, path_;
  std::vector<std::unique_ptr<ReplayWindow>> windows_;
  std::vector<std::shared_ptr<void>> memory_;
  std::vector<Arguments> instances_;
  std::size_t position_ = 0;
};

}  // namespace gatedelta::bench
