// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "verify/check.hpp"

// Random uses of replay windows: steps of several sequences, chains and trees, accepted in part, with folds and forks
// between them. The answer is the plain recurrence over the accepted tokens; how far a backend may be from it is measured as in
// golden.cpp, by float32 evaluations in which every entry is off by the rounding of its dtype, and checkpoints by that of
// theirs.
namespace gatedelta::verify {

/// Between two steps.
enum class WindowEvent : std::uint8_t { none, fold, fork };

struct WindowStep {
  Case c;                             ///< q to beta, o, read_slots, cu_seqlens; without the pool
  std::vector<std::int64_t> slots;    ///< of each row; padding as given
  std::vector<std::int64_t> parents;  ///< of each token [B,T]; empty: chains
  std::vector<std::int64_t> accepted;
  std::vector<std::vector<std::int64_t>> paths;  ///< the tokens of each row that stay
  WindowEvent event = WindowEvent::none;         ///< after the step, to `event_slot`
  std::int64_t event_slot = 0, fork_slot = 0;
};

struct WindowScenario {
  std::string name;
  Config config;
  std::int64_t slots = 0, capacity = 0, max_tokens = 0;
  DType entries = DType::f32;
  TensorSpec state;
  std::vector<WindowStep> steps;
};

WindowScenario make_window_scenario(std::uint64_t seed, std::int64_t index);
std::string describe(const WindowScenario& scenario);

class WindowChecker {
 public:
  WindowChecker(Backend& backend, Memory& memory) : backend_(backend), memory_(memory) {}
  std::string unsupported_reason(const WindowScenario& scenario) const;
  void run(const WindowScenario& scenario);
  const std::vector<Failure>& failures() const { return failures_; }
  int calls() const { return calls_; }

 private:
  Backend& backend_;
  Memory& memory_;
  std::vector<Failure> failures_;
  int calls_ = 0;
};

}  // namespace gatedelta::verify
