// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <Eigen/Core>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "device/host_calls.hpp"
#include "gatedelta/gatedelta.hpp"

// A byte-level language model whose token mixer is the gated delta rule. `Model` holds the weights, `SequencePool` the memory
// of the sequences, and `Runner` runs some new tokens of some sequences: a prompt, one token of each, or anything between.
namespace textgen {

/// Activations, one token a row, and weights as [out, in].
using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using RowVector = Eigen::RowVectorXf;

inline constexpr std::int64_t vocabulary = 256;  // a token is a byte

struct ModelConfig {
  std::int64_t hidden = 0, layers = 0;
  std::int64_t q_heads = 0, k_heads = 0, v_heads = 0, key_dim = 0, value_dim = 0;
  std::int64_t conv = 0;  ///< taps of the short convolution
  std::int64_t ff = 0;
  float rms_eps = 0;
  double l2_eps = 0, scale = 0;

  /// What the operator is configured with.
  gatedelta::Config mixer(gatedelta::DType state, int threads) const;
  std::int64_t heads() const { return mixer(gatedelta::DType::f32, 0).heads(); }
  std::int64_t q_width() const { return q_heads * key_dim; }
  std::int64_t k_width() const { return k_heads * key_dim; }
  std::int64_t v_width() const { return v_heads * value_dim; }
  std::int64_t qkv_width() const { return q_width() + k_width() + v_width(); }
  std::int64_t o_width() const { return heads() * value_dim; }
};

/// One layer: the gated delta rule with its projections, then a gated feed-forward network.
struct Block {
  RowVector mixer_norm;  // [hidden]
  Matrix qkv;            // [q, k and v widths, hidden]
  Matrix conv;           // [taps, q, k and v widths], the last tap is the current token
  Matrix ba;             // [2H, hidden]: the beta logits b, then a
  Matrix z;              // [H*V, hidden]
  RowVector A_log;       // [H]
  RowVector dt_bias;     // [H]
  RowVector head_norm;   // [V]
  Matrix out;            // [hidden, H*V]
  RowVector ff_norm;     // [hidden]
  Matrix gate, up;       // [ff, hidden]
  Matrix down;           // [hidden, ff]
};

/// The weights, in f32 whatever the file has.
struct Model {
  /// Throws an exception that names the file and the tensor that is missing or has another shape.
  static Model load(const std::filesystem::path& path);

  ModelConfig config;
  Matrix embedding;  // [256, hidden]
  std::vector<Block> blocks;
  RowVector norm;  // [hidden]
  Matrix head;     // [256, hidden]
};

/// What the model remembers of each sequence: a slot of the operator's state and of the last inputs of the convolution, for
/// every layer. Its size does not depend on how long a sequence is. The states are in the memory of the operator's backend and
/// stay there, the convolution's inputs on the host.
class SequencePool {
 public:
  SequencePool(const ModelConfig& config, std::int64_t slots, gatedelta::DType dtype, gatedelta::device::Memory& memory);

  std::int64_t slots() const { return slots_; }
  /// Makes the slot that of a sequence of no tokens.
  void clear(std::int64_t slot);
  /// [slots,H,V,K], for the operator.
  gatedelta::TensorView states(std::int64_t layer);
  /// [taps-1, q, k and v widths]: the inputs of the convolution at the last tokens, the latest one last.
  Eigen::Map<Matrix> history(std::int64_t layer, std::int64_t slot);

 private:
  gatedelta::device::Memory& memory_;
  std::int64_t layers_, slots_;
  gatedelta::Config mixer_;
  std::int64_t history_rows_, history_width_;
  std::size_t state_bytes_;       // of one slot of one layer
  std::shared_ptr<void> states_;  // [layers,slots,H,V,K]
  std::vector<float> history_;    // [layers,slots,taps-1,widths]
};

class Drafts;  // see speculative.hpp

/// New tokens of N sequences; each has at least one, and they need not have the same number.
struct Step {
  std::span<const std::uint8_t> bytes;       ///< the tokens, one sequence after the other
  std::span<const std::int32_t> cu_seqlens;  ///< [N+1]: sequence n is bytes cu_seqlens[n] to cu_seqlens[n+1]-1
  std::span<const std::int32_t> slots;       ///< [N]: where the memory of each sequence is; all different
  bool every_token = false;                  ///< logits after every token, not only after the last one of each sequence
  Drafts* drafts = nullptr;                  ///< the tokens, of one sequence, may be taken back
};

struct RunnerOptions {
  std::string_view backend;  ///< as for gatedelta::GatedDeltaRule
  gatedelta::DType state = gatedelta::DType::f32;
  std::int64_t slots = 1;
  int threads = 0;  ///< of the operator; 0 takes its default
};

class Runner {
 public:
  /// The model must outlive the runner.
  Runner(const Model& model, const RunnerOptions& options);

  SequencePool& pool() { return pool_; }
  /// Runs the tokens and moves the memory of their sequences on. Returns the logits of the next byte, one row of 256 for each
  /// sequence (or token); they stay until the next step.
  const Matrix& step(const Step& step);
  /// The backend that ran the last step.
  std::string_view backend() const { return backend_; }

 private:
  void check(const Step& step) const;
  void mix_tokens(std::int64_t layer, const Step& step);
  void convolve(std::int64_t layer, const Step& step);
  void run_operator(std::int64_t layer, const Step& step);
  void gate_heads(const Block& block);
  void feed_forward(const Block& block);
  void predict(const Step& step);

  const Model& model_;
  gatedelta::GatedDeltaRule rule_;
  gatedelta::device::Memory& memory_;  // of the operator's backend
  gatedelta::device::HostCalls calls_;
  SequencePool pool_;
  std::string_view backend_;

  // Activations. They are members so that steps of one size allocate them once.
  Matrix x_;       // [tokens, hidden], the residual stream
  Matrix normed_;  // [tokens, hidden], what a layer's projections read
  Matrix delta_;   // [tokens, hidden], what a layer adds to the stream
  Matrix qkv_;     // [tokens, widths], before the convolution
  Matrix mixed_;   // [tokens, widths], after it: q, k and v of the operator
  Matrix ba_;      // [tokens, 2H]
  Matrix z_, o_;   // [tokens, H*V]
  Matrix gate_, up_;
  Matrix logits_;
};

/// The most likely byte.
std::uint8_t argmax(const Matrix& logits, std::int64_t row);

}  // namespace textgen
