// SPDX-License-Identifier: Apache-2.0
// gatedelta check: random calls over the whole contract, two backends.
#include <fmt/format.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "tool/commands.hpp"
#include "verify/check.hpp"
#include "verify/generate.hpp"
#include "verify/window.hpp"

namespace gatedelta::tool {
namespace {

struct CheckOptions {
  std::string backend = "auto", against = "reference";
  std::int64_t cases = 200;
  std::uint64_t seed = 1;
  std::optional<std::int64_t> only;
  int threads = 0;
};

/// The backend that `name` selects for the case, and the memory to call it with.
struct Selected {
  Backend* backend;
  verify::Memory* memory;
};

Selected select(const std::string& name, const verify::Case& c) {
  if (name == "auto") {
    verify::Memory* host = verify::memory_for(*find_backend("reference"));
    const verify::Instance instance(c, *host);
    return {&GatedDeltaRule(c.config, name).backend_for(instance.arguments()), host};
  }
  const GatedDeltaRule usable(c.config, name);  // throws for a name that is unknown or not available
  Backend* backend = find_backend(name);
  verify::Memory* memory = verify::memory_for(*backend);
  if (memory == nullptr) throw Error(ErrorCode::unsupported, name + ": this build cannot make test tensors in its memory");
  return {backend, memory};
}

class Check {
 public:
  explicit Check(const CheckOptions& options) : options_(options), progress_(isatty(STDERR_FILENO) != 0) {}

  bool run() {
    const std::int64_t first = options_.only.value_or(0), count = options_.only ? 1 : options_.cases;
    for (std::int64_t i = 0; i < count; ++i) {
      if (progress_) fmt::print(stderr, "\r\033[Kcase {} of {}", i + 1, count);
      // Every eighth case is a use of replay windows.
      (first + i) % 8 == 7 ? one_window(first + i) : one(first + i);
    }
    clear_progress();
    if (passed_ + failed_ == 0) fmt::print("nothing was compared\n");
    fmt::print("check: {} against {}: {} passed, {} failed, {} skipped\n", options_.backend, options_.against, passed_, failed_,
               skipped_);
    return failed_ == 0 && passed_ > 0;
  }

 private:
  void clear_progress() const {
    if (progress_) fmt::print(stderr, "\r\033[K");
  }

  /// Both backends have to agree with the float64 recurrence of the same case. That bounds their distance from each other by
  /// the sum of the limits and tells which of the two is off.
  void one(std::int64_t index) {
    const auto on_device = [](const std::string& name) {
      const Backend* backend = find_backend(name);
      const verify::Memory* memory = backend != nullptr ? verify::memory_for(*backend) : nullptr;
      return memory != nullptr && memory->device().type != DeviceType::cpu;
    };
    verify::Case c = verify::make_case(*verify::find_family("any"), options_.seed, index,
                                       on_device(options_.backend) || on_device(options_.against));
    c.config.num_threads = options_.threads;
    std::vector<Selected> pair;
    for (const std::string& name : {options_.backend, options_.against}) {
      pair.push_back(select(name, c));
      const verify::Checker checker(*pair.back().backend, *pair.back().memory);
      if (const std::string reason = checker.unsupported_reason(c); !reason.empty()) {
        clear_progress();
        fmt::print("skipped case {}: {}: {}\n", index, pair.back().backend->name(), reason);
        ++skipped_;
        return;
      }
    }
    const verify::Golden expected = verify::golden(c);
    bool passed = true;
    for (const Selected& selected : pair) {
      verify::Checker checker(*selected.backend, *selected.memory);
      checker.against_golden(c, expected);
      if (checker.failures().empty()) continue;
      if (passed) {
        clear_progress();
        fmt::print("FAILED case {}\n{}", index, verify::describe(c));
      }
      passed = false;
      for (const verify::Failure& failure : checker.failures())
        fmt::print("  * {}: {}\n", selected.backend->name(), verify::text(failure));
    }
    count(passed, index);
  }

  void count(bool passed, std::int64_t index) {
    ++(passed ? passed_ : failed_);
    if (!passed)
      fmt::print("  replay: gatedelta check --backend {} --against {} --seed {} --case {}{}\n", options_.backend,
                 options_.against, options_.seed, index,
                 options_.threads > 0 ? fmt::format(" --threads {}", options_.threads) : "");
  }

  void one_window(std::int64_t index) {
    verify::WindowScenario scenario = verify::make_window_scenario(options_.seed, index);
    scenario.config.num_threads = options_.threads;
    verify::Case choice = scenario.steps.front().c;  // a call without pool and window, to choose the backend by
    choice[verify::Tensor::read_slots] = {};
    bool passed = true;
    for (const std::string& name : {options_.backend, options_.against}) {
      const Selected selected = select(name, choice);
      verify::WindowChecker checker(*selected.backend, *selected.memory);
      if (const std::string reason = checker.unsupported_reason(scenario); !reason.empty()) {
        clear_progress();
        fmt::print("skipped case {}: {}: {}\n", index, selected.backend->name(), reason);
        ++skipped_;
        return;
      }
      checker.run(scenario);
      if (checker.failures().empty()) continue;
      clear_progress();
      if (passed) fmt::print("FAILED case {}\n{}", index, verify::describe(scenario));
      passed = false;
      for (const verify::Failure& failure : checker.failures())
        fmt::print("  * {}: {}\n", selected.backend->name(), verify::text(failure));
    }
    count(passed, index);
  }

  const CheckOptions& options_;
  const bool progress_;
  std::int64_t passed_ = 0, failed_ = 0, skipped_ = 0;
};

}  // namespace

void add_check_command(CLI::App& app) {
  CLI::App* command = app.add_subcommand("check", "Compare two backends on random calls over the whole contract");
  const auto options = std::make_shared<CheckOptions>();
  command->add_option("--backend", options->backend, "The backend to check")->capture_default_str();
  command->add_option("--against", options->against, "The backend to compare it with")->capture_default_str();
  command->add_option("--cases", options->cases, "Number of calls")->capture_default_str();
  command->add_option("--seed", options->seed, "Seed of the calls")->capture_default_str();
  command->add_option("--case", options->only, "Only the call of this number");
  command
      ->add_option("--threads", options->threads, "Threads of the host backends, 0 for their own default")

      ->capture_default_str();
  command->callback([options] {
    const auto at_least = [](const char* name, std::int64_t value, std::int64_t lowest) {
      if (value < lowest)
        throw Error(ErrorCode::invalid_argument, fmt::format("{}: expected at least {}, got {}", name, lowest, value));
    };
    at_least("--cases", options->cases, 1);
    at_least("--case", options->only.value_or(0), 0);
    at_least("--threads", options->threads, 0);
    if (!Check(*options).run()) throw CLI::RuntimeError(1);
  });
}

}  // namespace gatedelta::tool
