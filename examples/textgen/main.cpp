// SPDX-License-Identifier: Apache-2.0
// Text from a trained model whose token mixer is the gated delta rule: prompts are run as a whole, then all sequences go on
// together, one byte a step.
#include <fmt/format.h>
#include <CLI/CLI.hpp>
#include <chrono>
#include <cstdio>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "check.hpp"
#include "model.hpp"
#include "progress.hpp"
#include "speculative.hpp"

namespace textgen {
namespace {

struct Options {
  std::string model = TEXTGEN_MODEL;
  std::string backend;
  std::vector<std::string> prompts = {"And it came to pass in those days, that "};
  std::int64_t tokens = 160;
  std::int64_t batch = 0;  // 0: one sequence for each prompt
  int threads = 0;
  std::string state = "f32";
  std::string speculative;  // "chain" or "tree"; empty: plain decoding
  bool check = false;
};

class Stopwatch {
 public:
  double seconds() const { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count(); }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

void write(std::string_view text) {
  if (std::fwrite(text.data(), 1, text.size(), stdout) != text.size() || std::fflush(stdout) != 0)
    throw std::runtime_error("cannot write to stdout");
}

void report_speed(const char* what, std::int64_t tokens, double seconds) {
  fmt::print(stderr, "{}: {} tokens in {:.3f} s, {:.0f} tokens/s\n", what, tokens, seconds,
             static_cast<double>(tokens) / seconds);
}

void generate(const Model& model, const Options& options) {
  const std::int64_t prompts = static_cast<std::int64_t>(options.prompts.size());
  const std::int64_t batch = options.batch == 0 ? prompts : options.batch;
  if (batch < prompts)
    throw std::invalid_argument(fmt::format("--batch: expected at least the {} prompts, got {}", prompts, batch));

  // The sequences one after the other, as they go into the first step.
  std::vector<std::string> texts;
  std::vector<std::uint8_t> bytes;
  std::vector<std::int32_t> cu_seqlens = {0}, slots;
  for (std::int64_t n = 0; n < batch; ++n) {
    texts.push_back(options.prompts[n % prompts]);
    if (texts.back().empty()) throw std::invalid_argument("--prompt: expected at least one byte, got none");
    bytes.insert(bytes.end(), texts.back().begin(), texts.back().end());
    cu_seqlens.push_back(static_cast<std::int32_t>(bytes.size()));
    slots.push_back(static_cast<std::int32_t>(n));
  }

  const gatedelta::DType state = *gatedelta::dtype_from_name(options.state);
  Runner runner(model, {.backend = options.backend, .state = state, .slots = batch, .threads = options.threads});
  const bool stream = batch == 1;
  if (stream) write(texts[0]);

  const Stopwatch prefill;
  const Matrix* logits = &runner.step({.bytes = bytes, .cu_seqlens = cu_seqlens, .slots = slots});
  const double prefill_seconds = prefill.seconds();
  const std::int64_t prompt_tokens = cu_seqlens.back();

  // From here on a step is one byte of each sequence.
  bytes.resize(static_cast<std::size_t>(batch));
  for (std::int64_t n = 0; n <= batch; ++n) cu_seqlens[n] = static_cast<std::int32_t>(n);
  double decode_seconds = 0;
  {
    Progress progress("token", stream ? 0 : options.tokens);
    const Stopwatch decode;
    for (std::int64_t i = 0; i < options.tokens; ++i) {
      if (i > 0) logits = &runner.step({.bytes = bytes, .cu_seqlens = cu_seqlens, .slots = slots});
      for (std::int64_t n = 0; n < batch; ++n) {
        bytes[n] = argmax(*logits, n);
        texts[n] += static_cast<char>(bytes[n]);
      }
      if (stream)
        write({texts[0].end() - 1, texts[0].end()});
      else
        progress.update(i + 1);
    }
    decode_seconds = decode.seconds();
  }

  if (stream)
    write("\n");
  else
    for (std::int64_t n = 0; n < batch; ++n) write(fmt::format("[{}] {}\n", n, texts[n]));
  fmt::print(stderr, "backend {}, {} state\n", runner.backend(), options.state);
  report_speed("prefill", prompt_tokens, prefill_seconds);
  // The first byte of each sequence came out of the prefill.
  if (options.tokens > 1) report_speed("decode", (options.tokens - 1) * batch, decode_seconds);
}

int run(int argc, char** argv) {
  Options options;
  CLI::App app("Greedy text from a byte-level language model that is built on the gated delta rule.", "textgen");
  app.add_option("--backend", options.backend,
                 "a backend's name or \"auto\" (default: GATEDELTA_BACKEND, or else auto); with --check also \"all\"");
  app.add_option("--prompt", options.prompts, "text to continue; may be given several times")
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  app.add_option("--tokens", options.tokens, "bytes to append")->check(CLI::Range(1, 1 << 24))->capture_default_str();
  app.add_option("--batch", options.batch, "sequences to run at once, cycling through the prompts (default: one for each)")
      ->check(CLI::Range(1, 4096));
  app.add_option("--threads", options.threads, "threads (default: OpenMP's own)")->check(CLI::Range(1, 4096));
  app.add_option("--state", options.state, "dtype of the recurrent state")
      ->check(CLI::IsMember({"f32", "bf16", "f16"}))
      ->capture_default_str();
  app.add_option("--speculative", options.speculative,
                 "decode each prompt plainly and speculatively, with guesses in a chain or in a tree, and compare")
      ->check(CLI::IsMember({"chain", "tree"}))
      ->excludes("--batch");
  app.add_option("--model", options.model, "the weights (safetensors)")->capture_default_str();
  app.add_flag("--check", options.check, "replay the text in greedy.safetensors, beside the model, and compare")
      ->excludes("--prompt", "--tokens", "--batch", "--state", "--speculative");
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& help) {
    return app.exit(help);
  } catch (const CLI::ParseError& error) {
    throw std::invalid_argument(error.what());
  }

#ifdef _OPENMP
  if (options.threads > 0) omp_set_num_threads(options.threads);  // of the dense layers
#endif
  const Model model = Model::load(options.model);
  if (!options.speculative.empty()) {
    const RunnerOptions runner{
        .backend = options.backend, .state = *gatedelta::dtype_from_name(options.state), .threads = options.threads};
    return generate_speculatively(model, runner, options.prompts, options.tokens, options.speculative == "tree") ? 0 : 1;
  }
  if (!options.check) {
    generate(model, options);
    return 0;
  }
  const std::filesystem::path known = std::filesystem::path(options.model).replace_filename("greedy.safetensors");
  return check_known_text(model, known, options.backend, options.threads) ? 0 : 1;
}

}  // namespace
}  // namespace textgen

int main(int argc, char** argv) {
  try {
    return textgen::run(argc, argv);
  } catch (const std::bad_alloc&) {
    fmt::print(stderr, "textgen: out of memory\n");
  } catch (const std::exception& error) {
    fmt::print(stderr, "textgen: {}\n", error.what());
  }
  return 2;
}
