// SPDX-License-Identifier: Apache-2.0
#include "speculative.hpp"

#include <fmt/format.h>
#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <stdexcept>

namespace textgen {
namespace {

constexpr std::size_t longest_context = 8, shortest_context = 2, guesses = 7, tree_size = 15, places = 4;

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

/// The prompt run as a whole; what both ways of decoding start from.
std::uint8_t prefill(Runner& runner, const std::string& prompt) {
  const std::vector<std::uint8_t> bytes(prompt.begin(), prompt.end());
  const std::int32_t cu_seqlens[] = {0, static_cast<std::int32_t>(bytes.size())}, slots[] = {0};
  return argmax(runner.step({.bytes = bytes, .cu_seqlens = cu_seqlens, .slots = slots}), 0);
}

struct Outcome {
  std::string text;
  double seconds = 0;
  std::int64_t steps = 0;
};

Outcome decode_plainly(const Model& model, const RunnerOptions& options, const std::string& prompt, std::int64_t tokens) {
  Runner runner(model, options);
  Outcome out{prompt};
  std::uint8_t next = prefill(runner, prompt);
  const std::int32_t cu_seqlens[] = {0, 1}, slots[] = {0};
  const double begin = now();
  for (; out.steps < tokens; ++out.steps) {
    out.text += static_cast<char>(next);
    next = argmax(runner.step({.bytes = {&next, 1}, .cu_seqlens = cu_seqlens, .slots = slots}), 0);
  }
  out.seconds = now() - begin;
  return out;
}

Outcome decode_speculatively(const Model& model, const RunnerOptions& options, const std::string& prompt, std::int64_t tokens,
                             bool tree) {
  Runner runner(model, options);
  Drafts drafts(model, options);
  Outcome out{prompt};
  std::uint8_t next = prefill(runner, prompt);
  const std::size_t end = prompt.size() + static_cast<std::size_t>(tokens);
  const double begin = now();
  while (out.text.size() < end) {
    const Draft draft = look_up(out.text, next, tree);
    const std::int32_t cu_seqlens[] = {0, static_cast<std::int32_t>(draft.bytes.size())}, slots[] = {0};
    drafts.start(draft);
    const Matrix& logits =
        runner.step({.bytes = draft.bytes, .cu_seqlens = cu_seqlens, .slots = slots, .every_token = true, .drafts = &drafts});
    // Token 0 is the byte that is known; from it on, as long as one of the guesses is what the model says.
    std::vector<std::int32_t> path = {0};
    out.text += static_cast<char>(draft.bytes[0]);
    for (std::size_t t = 1; t < draft.bytes.size(); ++t)
      if (draft.parents[t] == path.back() && draft.bytes[t] == argmax(logits, path.back())) {
        path.push_back(static_cast<std::int32_t>(t));
        out.text += static_cast<char>(draft.bytes[t]);
      }
    next = argmax(logits, path.back());
    drafts.accept(path, runner.pool());
    ++out.steps;
  }
  out.seconds = now() - begin;
  out.text.resize(end);  // the last step may have gone further
  return out;
}

void report(const char* what, std::int64_t tokens, const Outcome& outcome) {
  fmt::print(stderr, "{}: {} tokens in {} steps ({:.2f} a step), {:.3f} s, {:.0f} tokens/s\n", what, tokens, outcome.steps,
             static_cast<double>(tokens) / static_cast<double>(outcome.steps), outcome.seconds,
             static_cast<double>(tokens) / outcome.seconds);
}

}  // namespace

Drafts::Drafts(const Model& model, const RunnerOptions& options)
    : rule_(model.config.mixer(options.state, options.threads), options.backend),
      memory_(gatedelta::device::memory_for_name(options.backend)),
      inputs_(static_cast<std::size_t>(model.config.layers)) {
  // f32 entries: the text is to be that of plain decoding.
  const gatedelta::WindowLayout layout = gatedelta::window_layout(rule_.config(), 1, window, gatedelta::DType::f32);
  const std::size_t windows_bytes = static_cast<std::size_t>(model.config.layers) * layout.layer_bytes + layout.record_bytes;
  allocated_ = {memory_.allocate(windows_bytes + (1 + window) * sizeof(std::int32_t)),
                [&memory = memory_](void* windows) { memory.release(windows); }};
  auto* const record = static_cast<std::byte*>(allocated_.get());
  std::byte* layer = record + layout.record_bytes;
  for (std::int64_t i = 0; i < model.config.layers; ++i, layer += layout.layer_bytes)
    windows_.push_back(gatedelta::window_at(layout, layer, record, memory_.device()));
  accepted_ = reinterpret_cast<std::int32_t*>(layer);
  gatedelta::ResetArguments reset;
  reset.record = windows_.front().record;
  rule_.reset(reset);
}

std::int64_t Drafts::ancestor(std::int64_t token, std::int64_t back) const {
  for (; back > 0 && token >= 0; --back) token = draft_->parents[static_cast<std::size_t>(token)];
  return token - back;
}

void Drafts::add_to(gatedelta::Arguments& arguments, std::int64_t layer) const {
  arguments.window = &windows_[static_cast<std::size_t>(layer)];
  arguments.parent = gatedelta::view(draft_->parents.data(), {1, static_cast<std::int64_t>(draft_->parents.size())});
}

void Drafts::accept(std::span<const std::int32_t> path, SequencePool& pool) {
  const auto accepted = static_cast<std::int32_t>(path.size());
  std::vector<std::int32_t> given = {accepted};
  given.insert(given.end(), path.begin(), path.end());
  memory_.copy_in(accepted_, given.data(), given.size() * sizeof given[0]);
  gatedelta::AcceptArguments arguments;
  arguments.record = windows_.front().record;
  const gatedelta::Device device = memory_.device();
  arguments.accepted = gatedelta::make_view(accepted_, gatedelta::DType::i32, std::array<std::int64_t, 1>{1}, {}, device);
  arguments.path =
      gatedelta::make_view(accepted_ + 1, gatedelta::DType::i32, std::array<std::int64_t, 2>{1, accepted}, {}, device);
  arguments.tokens = static_cast<std::int64_t>(draft_->bytes.size());
  rule_.accept(arguments);
  for (std::size_t layer = 0; layer < inputs_.size(); ++layer) {
    Eigen::Map<Matrix> history = pool.history(static_cast<std::int64_t>(layer), 0);
    const std::int64_t rows = history.rows();
    for (std::int64_t j = 0; j < rows; ++j) {
      const std::int64_t from = j + accepted - rows;  // of the path
      if (from < 0)
        history.row(j) = history.row(j + accepted).eval();
      else
        history.row(j) = inputs_[layer].row(path[static_cast<std::size_t>(from)]);
    }
  }
}

Draft look_up(std::string_view text, std::uint8_t next, bool tree) {
  Draft draft{{next}, {-1}};
  const std::string known = std::string(text) + static_cast<char>(next);
  const std::size_t size_limit = tree ? tree_size : 1 + guesses;
  std::size_t found = 0;
  for (std::size_t length = std::min(longest_context, known.size() - 1); length >= shortest_context && found == 0; --length) {
    const std::string_view context = std::string_view(known).substr(known.size() - length);
    std::size_t at = known.size() - length;
    while (found < (tree ? places : 1) && at > 0 && (at = known.rfind(context, at - 1)) != std::string::npos) {
      ++found;
      // Its continuation joins the tree: nodes that are there already are shared.
      std::int32_t parent = 0;
      const std::size_t first = at + length;
      for (std::size_t i = first; i < std::min(first + guesses, known.size()) && draft.bytes.size() < size_limit; ++i) {
        const auto byte = static_cast<std::uint8_t>(known[i]);
        std::int32_t child = parent + 1;
        const auto nodes = static_cast<std::int32_t>(draft.bytes.size());
        while (child < nodes && !(draft.parents[child] == parent && draft.bytes[child] == byte)) ++child;
        if (child == nodes) {
          draft.bytes.push_back(byte);
          draft.parents.push_back(parent);
        }
        parent = child;
      }
    }
  }
  return draft;
}

bool generate_speculatively(const Model& model, const RunnerOptions& options, std::span<const std::string> prompts,
                            std::int64_t tokens, bool tree) {
  bool equal = true;
  for (const std::string& prompt : prompts) {
    if (prompt.empty()) throw std::invalid_argument("--prompt: expected at least one byte, got none");
    const Outcome plain = decode_plainly(model, options, prompt, tokens);
    const Outcome speculative = decode_speculatively(model, options, prompt, tokens, tree);
    const std::string line = speculative.text + "\n";
    if (std::fwrite(line.data(), 1, line.size(), stdout) != line.size() || std::fflush(stdout) != 0)
      throw std::runtime_error("cannot write to stdout");
    report("plain", tokens, plain);
    report(tree ? "speculative, trees" : "speculative, chains", tokens, speculative);
    if (plain.text == speculative.text) continue;
    const auto differ = std::mismatch(plain.text.begin(), plain.text.end(), speculative.text.begin());
    fmt::print(stderr, "the texts differ from byte {} on\n", differ.first - plain.text.begin());
    equal = false;
  }
  return equal;
}

}  // namespace textgen
