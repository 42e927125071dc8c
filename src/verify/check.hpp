// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <vector>

#include "verify/case.hpp"
#include "verify/golden.hpp"
#include "verify/memory.hpp"

// What may be asked of a backend about one case. Every function calls the backend through GatedDeltaRule, as users do.
namespace gatedelta::verify {

struct Failure {
  std::string check;   ///< which question it was
  std::string tensor;  ///< empty where it is none of a tensor
  std::string detail;  ///< one line
  double error = 0, limit = 0;
};

/// What a call left behind.
struct Observed {
  std::vector<double> o, state, snapshots;
  const std::vector<double>& find(Tensor tensor) const;
  std::vector<double>& find(Tensor tensor);
};

class Checker {
 public:
  Checker(Backend& backend, Memory& memory) : backend_(backend), memory_(memory) {}

  /// Why the backend does not do this case; empty: it does.
  std::string unsupported_reason(const Case& c) const;
  /// Outputs within the limits of the golden answer, all other bytes as they were.
  void against_golden(const Case& c, const Golden& expected);
  /// Twice the same call: the same bits.
  void repeats(const Case& c);
  /// Any number of threads: the same bits.
  void thread_invariant(const Case& c);
  /// Each row in a call of its own: the same bits.
  void batch_invariant(const Case& c);
  /// The tokens in several calls, from state to state: within the limits of one call's golden answer. `steps` are the numbers
  /// of tokens, the last one repeated as needed. For f32 states (others are rounded between the calls), no cu_seqlens, no
  /// padding: see splittable().
  void split(const Case& c, const Golden& expected, const std::vector<std::int64_t>& steps);
  static bool splittable(const Case& c);
  /// The state as [..,V,K] and as [..,K,V] in memory: both within the limits.
  void state_layouts(const Case& c, const Golden& expected);
  /// The call must throw invalid_argument that names `tensor`, and change no byte.
  void rejects(const Case& c, const std::string& tensor, const std::string& what);

  /// The same for what only the device can see: synchronize() must throw Error(device) that names `tensor`, and nothing but
  /// what `valid`, the call before it was broken, stores may be changed.
  void faults(const Case& c, const Case& valid, const std::string& tensor, const std::string& what);

  const std::vector<Failure>& failures() const { return failures_; }
  /// Calls of the backend so far.
  int calls() const { return calls_; }

 private:
  Observed run(const Case& c, const Golden& expected, const char* check);
  void compare(const Case& c, const Output& expected, const std::vector<double>& found, const char* check);
  void same_bits(const Case& c, const Golden& expected, const Observed& one, const Observed& other, const char* check);
  void fail(std::string check, std::string tensor, std::string detail, double error = 0, double limit = 0) {
    failures_.push_back({std::move(check), std::move(tensor), std::move(detail), error, limit});
  }

  Backend& backend_;
  Memory& memory_;
  std::vector<Failure> failures_;
  int calls_ = 0;
};

/// All of a failure in one line.
std::string text(const Failure& failure);

}  // namespace gatedelta::verify
