// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "model.hpp"

// Speculative decoding of one sequence: a step runs the next byte and guesses of what follows it, a chain or a tree. The
// operator appends all of them to replay windows, and those that turn out right are kept by changing the windows' record.
namespace textgen {

/// Tokens whose place in the sequence is not settled: each continues its parent, an earlier one of them or (-1) the sequence.
struct Draft {
  std::vector<std::uint8_t> bytes;
  std::vector<std::int32_t> parents;
};

/// What a runner needs beside its pool for steps whose tokens may be taken back. The sequence is that of slot 0.
class Drafts {
 public:
  static constexpr std::int64_t window = 16;

  Drafts(const Model& model, const RunnerOptions& options);

  void start(const Draft& draft) { draft_ = &draft; }
  /// The token `back` places before token `token` on its path; below 0 it is in the history of the convolution.
  std::int64_t ancestor(std::int64_t token, std::int64_t back) const;
  /// The inputs of a layer's convolution, from which accept() makes the history.
  void keep_inputs(std::int64_t layer, const Matrix& inputs) { inputs_[static_cast<std::size_t>(layer)] = inputs; }
  void add_to(gatedelta::Arguments& arguments, std::int64_t layer) const;
  /// Keeps the tokens of a path from the sequence on.
  void accept(std::span<const std::int32_t> path, SequencePool& pool);

 private:
  gatedelta::GatedDeltaRule rule_;
  const Draft* draft_ = nullptr;
  gatedelta::device::Memory& memory_;             // of the operator's backend
  std::shared_ptr<void> allocated_;               // the windows, and what accept() is given
  std::int32_t* accepted_ = nullptr;              // [1 + window]: how many tokens, and their path
  std::vector<gatedelta::ReplayWindow> windows_;  // of each layer
  std::vector<Matrix> inputs_;
};

/// Guesses by looking up what followed the last bytes of the text before. `tree`: after several earlier places, as a tree.
Draft look_up(std::string_view text, std::uint8_t next, bool tree);

/// Writes the continuation of each prompt, decoded plainly and speculatively, and what both took. False if the texts differ.
bool generate_speculatively(const Model& model, const RunnerOptions& options, std::span<const std::string> prompts,
                            std::int64_t tokens, bool tree);

}  // namespace textgen
