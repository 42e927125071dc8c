// SPDX-License-Identifier: Apache-2.0
#include "check.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <algorithm>
#include <charconv>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "io/safetensors.hpp"
#include "progress.hpp"

namespace textgen {
namespace {

using gatedelta::DType;
using gatedelta::TensorView;

constexpr double limit = 1e-4;

/// A prompt and what greedy decoding appends to it, computed with a float64 operator.
struct KnownText {
  std::vector<std::uint8_t> bytes;  // prompt and continuation
  std::int64_t prompt = 0;          // bytes of the prompt
  Matrix logits;                    // row i: the logits of bytes[prompt + i]; not for all of them

  std::int64_t size() const { return static_cast<std::int64_t>(bytes.size()); }
};

KnownText read_known_text(const std::filesystem::path& path) try {
  const gatedelta::io::SafetensorsFile file = gatedelta::io::SafetensorsFile::read(path);
  KnownText known;
  const TensorView &ids = file.tensor("ids"), &logits = file.tensor("logits");
  if (ids.rank != 2 || ids.shape[0] != 1 || ids.dtype != DType::i32) throw std::runtime_error("ids: expected i32 [1, bytes]");
  if (logits.rank != 2 || logits.shape[1] != vocabulary || logits.dtype != DType::f32)
    throw std::runtime_error("logits: expected f32 [steps, 256]");
  for (std::int64_t i = 0; i < ids.shape[1]; ++i) {
    const std::int32_t id = static_cast<const std::int32_t*>(ids.data)[i];
    if (id < 0 || id >= vocabulary) throw std::runtime_error(fmt::format("ids: expected bytes, got {}", id));
    known.bytes.push_back(static_cast<std::uint8_t>(id));
  }
  const auto prompt = file.metadata().find("prompt_bytes");
  if (prompt == file.metadata().end()) throw std::runtime_error("expected the metadata \"prompt_bytes\"");
  std::from_chars(prompt->second.data(), prompt->second.data() + prompt->second.size(), known.prompt);
  if (known.prompt < 1 || known.prompt >= known.size())
    throw std::runtime_error(fmt::format("prompt_bytes: expected a number in 1..{}", known.size() - 1));
  if (logits.shape[0] < 1 || logits.shape[0] > known.size() - known.prompt)
    throw std::runtime_error(fmt::format("logits: expected 1..{} rows, got {}", known.size() - known.prompt, logits.shape[0]));
  known.logits.resize(logits.shape[0], vocabulary);
  std::copy_n(static_cast<const float*>(logits.data), logits.elements(), known.logits.data());
  return known;
} catch (const gatedelta::Error&) {
  throw;  // of the file: names it
} catch (const std::runtime_error& error) {
  throw std::runtime_error(fmt::format("{}: {}", path.string(), error.what()));
}

/// How well predictions agree with the known text.
class Score {
 public:
  explicit Score(const KnownText& known) : known_(known) {}

  /// Row `row` of `logits` predicts the byte at `position`.
  void add(const Matrix& logits, std::int64_t row, std::int64_t position) {
    ++bytes_;
    matching_ += argmax(logits, row) == known_.bytes[position];
    const std::int64_t step = position - known_.prompt;
    if (step >= known_.logits.rows()) return;
    const auto expected = known_.logits.row(step).cast<double>();
    const double error = (logits.row(row).cast<double>() - expected).squaredNorm(), norm = expected.squaredNorm();
    ++rows_;
    error_ += error;
    norm_ += norm;
    const double row_error = std::sqrt(error / norm);
    if (!(row_error <= worst_row_)) worst_row_ = row_error;  // a NaN is the worst
  }

  bool exact() const {
    return bytes_ > 0 && rows_ > 0 && matching_ == bytes_ && relative_error() < limit && worst_row_ < limit;
  }
  std::string text() const {
    return fmt::format("{}/{} greedy bytes match, relative error of {} rows of logits {:.1e}, of the worst row {:.1e}",
                       matching_, bytes_, rows_, relative_error(), worst_row_);
  }

 private:
  double relative_error() const { return std::sqrt(error_ / norm_); }

  const KnownText& known_;
  std::int64_t bytes_ = 0, matching_ = 0, rows_ = 0;
  double error_ = 0, norm_ = 0, worst_row_ = 0;
};

/// Sequences that start with `prompts[n]` bytes of the known text, all run at once and then token by token to its end. They are
/// fed the known bytes, not those predicted: as long as all match this is the same, and after one that does not
/// (narrow states) the later predictions still mean something.
Score replay(Runner& runner, const KnownText& known, const std::vector<std::int64_t>& prompts) {
  Score score(known);
  std::vector<std::int64_t> position(prompts.size(), 0);  // bytes that sequence n was fed
  std::vector<std::size_t> active(prompts.size());
  std::iota(active.begin(), active.end(), std::size_t{0});
  std::vector<std::uint8_t> bytes;
  std::vector<std::int32_t> cu_seqlens, slots;
  for (std::int64_t slot = 0; slot < runner.pool().slots(); ++slot) runner.pool().clear(slot);
  const std::int64_t steps = known.size() - *std::min_element(prompts.begin(), prompts.end());
  Progress progress("step", steps);
  for (std::int64_t step = 0; !active.empty(); ++step) {
    bytes.clear();
    cu_seqlens.assign(1, 0);
    slots.clear();
    for (const std::size_t n : active) {
      const std::int64_t next = position[n] == 0 ? prompts[n] : position[n] + 1;
      bytes.insert(bytes.end(), known.bytes.begin() + position[n], known.bytes.begin() + next);
      cu_seqlens.push_back(static_cast<std::int32_t>(bytes.size()));
      slots.push_back(static_cast<std::int32_t>(runner.pool().slots() - 1) - static_cast<std::int32_t>(n));
      position[n] = next;
    }
    const Matrix& logits = runner.step({.bytes = bytes, .cu_seqlens = cu_seqlens, .slots = slots});
    for (std::size_t i = 0; i < active.size(); ++i) score.add(logits, static_cast<std::int64_t>(i), position[active[i]]);
    std::erase_if(active, [&](std::size_t n) { return position[n] + 1 == known.size(); });
    progress.update(step);
  }
  return score;
}

/// The known text in steps of up to `stride` tokens, with logits after every token.
Score replay_in_pieces(Runner& runner, const KnownText& known, std::int64_t stride) {
  Score score(known);
  runner.pool().clear(0);
  const std::int32_t slot = 0;
  Progress progress("byte", known.size());
  for (std::int64_t begin = 0; begin + 1 < known.size(); begin += stride) {
    const std::int64_t length = std::min(stride, known.size() - 1 - begin);
    const std::int32_t cu_seqlens[] = {0, static_cast<std::int32_t>(length)};
    const std::span<const std::uint8_t> bytes(known.bytes.data() + begin, static_cast<std::size_t>(length));
    const Matrix& logits = runner.step({.bytes = bytes, .cu_seqlens = cu_seqlens, .slots = {&slot, 1}, .every_token = true});
    for (std::int64_t t = 0; t < length; ++t)
      if (begin + t + 1 >= known.prompt) score.add(logits, t, begin + t + 1);
    progress.update(begin);
  }
  return score;
}

/// All comparisons for one backend. Throws gatedelta::Error where the backend cannot run the model.
bool check_backend(const Model& model, const KnownText& known, const std::string& backend, int threads) {
  bool passed = true;
  const auto require = [&](const std::string& what, const Score& score) {
    fmt::print("  {}: {} (limit {:.0e}): {}\n", what, score.text(), limit, score.exact() ? "passed" : "FAILED");
    std::fflush(stdout);
    passed = passed && score.exact();
  };
  const std::int64_t later = known.prompt + known.logits.rows() / 4, latest = known.prompt + known.logits.rows() / 2;

  Runner runner(model, {.backend = backend, .state = DType::f32, .slots = 4, .threads = threads});
  const Score first = replay(runner, known, {known.prompt});
  fmt::print("backend {}\n", runner.backend());
  require(fmt::format("f32 state, a prompt of {} bytes", known.prompt), first);
  require(fmt::format("f32 state, prompts of {}, {} and {} bytes at once", later, known.prompt, latest),
          replay(runner, known, {later, known.prompt, latest}));
  require("f32 state, 4 tokens a step", replay_in_pieces(runner, known, 4));
  require("f32 state, all tokens in one step", replay_in_pieces(runner, known, known.size()));
  for (const DType state : {DType::bf16, DType::f16}) {
    Runner narrow(model, {.backend = backend, .state = state, .slots = 1, .threads = threads});
    const Score score = replay(narrow, known, {known.prompt});
    fmt::print("  {} state, a prompt of {} bytes: {} (for information)\n", gatedelta::name_of(state), known.prompt,
               score.text());
    std::fflush(stdout);
  }
  return passed;
}

}  // namespace

bool check_known_text(const Model& model, const std::filesystem::path& known_path, const std::string& backend, int threads) {
  const KnownText known = read_known_text(known_path);
  if (backend != "all") return check_backend(model, known, backend, threads);
  bool passed = true;
  int checked = 0;
  for (const gatedelta::Backend* each : gatedelta::backends()) {
    const gatedelta::Availability state = each->availability();
    if (!state.available || gatedelta::device::memory_for(*each) == nullptr) {
      fmt::print("backend {}\n  skipped: {}\n", each->name(),
                 state.available ? "no copies to its memory in this build" : state.reason);
      continue;
    }
    passed = check_backend(model, known, std::string(each->name()), threads) && passed;
    ++checked;
  }
  if (checked == 0) throw std::runtime_error("no backend can run the check");
  return passed;
}

}  // namespace textgen
