// SPDX-License-Identifier: Apache-2.0
// checkkernel: every available backend against the float64 recurrence, on generated cases. Each case is drawn anew from
// (seed, its name), so that a failure replays alone.
#include <fnmatch.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "verify/check.hpp"
#include "verify/errors.hpp"
#include "verify/generate.hpp"
#include "verify/window.hpp"

using namespace gatedelta;
using namespace gatedelta::verify;

namespace {

struct Options {
  std::string backend, test = "*", json;
  std::uint64_t seed = 1;
  std::int64_t repeat = 1, cases = 100;
  bool bench = false, list = false, skip_unavailable = false;
};

constexpr int exit_skipped = 77;

struct Counts {
  std::int64_t passed = 0, failed = 0, skipped = 0, calls = 0;
};

/// Golden answers as families ask for them.
void check(const Family& family, const Case& c, Memory& memory, Checker& checker) {
  if (std::string_view(family.name) == "errors") {
    for (const BrokenCall& broken : broken_calls(c)) {
      if (!broken.by_value || memory.device().type == DeviceType::cpu)
        checker.rejects(broken.c, broken.tensor, broken.what);
      else if (!broken.two_writers)
        checker.faults(broken.c, c, broken.tensor, broken.what);
    }
    return;
  }
  const Golden expected = golden(c);
  checker.against_golden(c, expected);
  if (std::string_view(family.name) == "layouts") checker.state_layouts(c, expected);
  if (std::string_view(family.name) != "invariants") return;
  checker.repeats(c);
  checker.thread_invariant(c);
  checker.batch_invariant(c);
  if (!Checker::splittable(c)) return;
  checker.split(c, expected, {1});
  if (c.tokens() > 1) checker.split(c, expected, {c.tokens() / 3 + 1});
}

/// Median time of a call in microseconds.
double time_case(const Case& c, Backend& backend, Memory& memory) {
  Instance instance(c, memory);
  const GatedDeltaRule op(c.config, backend);
  instance.add_workspace(op.workspace_size(instance.arguments()));
  std::vector<double> samples(31);
  for (double& sample : samples) {
    const auto begin = std::chrono::steady_clock::now();
    op.forward(instance.arguments());
    backend.synchronize(nullptr);
    sample = std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - begin).count();
  }
  std::nth_element(samples.begin(), samples.begin() + 15, samples.end());
  return samples[15];
}

class Run {
 public:
  explicit Run(const Options& options) : options_(options), progress_(isatty(STDERR_FILENO) != 0) {}

  int all() {
    std::vector<Backend*> chosen;
    for (Backend* backend : backends()) {
      if (!options_.backend.empty() && backend->name() != options_.backend) continue;
      const Availability state = backend->availability();
      Memory* memory = memory_for(*backend);
      const std::string reason = !state.available    ? state.reason
                                 : memory == nullptr ? "no test memory for its device in this build"
                                                     : "";
      if (reason.empty()) {
        chosen.push_back(backend);
        continue;
      }
      std::printf("skipped backend %s: %s\n", std::string(backend->name()).c_str(), reason.c_str());
    }
    if (chosen.empty() && options_.skip_unavailable && find_backend(options_.backend) != nullptr) return exit_skipped;
    if (chosen.empty()) {
      std::printf("checkkernel: no backend to test%s%s\n", options_.backend.empty() ? "" : " of the name ",
                  options_.backend.c_str());
      return 1;
    }
    for (std::int64_t i = 0; i < options_.repeat; ++i)
      for (const Family& family : families())
        for (const std::int64_t index : indices(family.name))
          one(family, options_.seed + static_cast<std::uint64_t>(i), index, chosen);
    for (std::int64_t i = 0; i < options_.repeat; ++i)
      for (const std::int64_t index : indices("window"))
        one_window(options_.seed + static_cast<std::uint64_t>(i), index, chosen);
    if (progress_) std::fprintf(stderr, "\r\033[K");
    if (!options_.json.empty()) {
      std::ofstream file(options_.json);
      file << results_.dump(1) << "\n";
      if (!file.flush()) {
        std::printf("checkkernel: cannot write %s\n", options_.json.c_str());
        return 2;
      }
    }
    if (options_.list) return 0;
    std::string names;
    for (Backend* backend : chosen) names += " " + std::string(backend->name());
    if (counts_.calls == 0) std::printf("checkkernel: nothing was dispatched\n");
    std::printf("checkkernel:%s: %lld passed, %lld failed, %lld skipped, %lld calls\n", names.c_str(),
                static_cast<long long>(counts_.passed), static_cast<long long>(counts_.failed),
                static_cast<long long>(counts_.skipped), static_cast<long long>(counts_.calls));
    return counts_.failed > 0 || counts_.calls == 0 ? 1 : 0;
  }

 private:
  /// "family/number" names a case of its own, also one beyond --cases; "family" all of one; anything else is a glob.
  std::vector<std::int64_t> indices(const std::string& name) const {
    const std::string prefix = name + "/";
    std::vector<std::int64_t> out;
    if (options_.test.rfind(prefix, 0) == 0 && options_.test.size() > prefix.size() &&
        options_.test.find_first_not_of("0123456789", prefix.size()) == std::string::npos) {
      out.push_back(std::stoll(options_.test.substr(prefix.size())));
      return out;
    }
    for (std::int64_t i = 0; i < options_.cases; ++i)
      if (options_.test == name || fnmatch(options_.test.c_str(), (prefix + std::to_string(i)).c_str(), 0) == 0)
        out.push_back(i);
    return out;
  }

  void one(const Family& family, std::uint64_t seed, std::int64_t index, const std::vector<Backend*>& chosen) {
    if (options_.list) {
      const Case c = make_case(family, seed, index);
      std::printf("%s\n%s", c.name.c_str(), describe(c).c_str());
      return;
    }
    for (Backend* backend : chosen) {
      Memory& memory = *memory_for(*backend);
      const Case c = make_case(family, seed, index, memory.device().type != DeviceType::cpu);
      if (progress_) std::fprintf(stderr, "\r\033[K%s", c.name.c_str());
      Checker checker(*backend, memory);
      const bool passed = on_backend(c, seed, *backend, checker, [&] { check(family, c, memory, checker); });
      if (options_.bench && passed && checker.calls() > 0) {
        const double median = time_case(c, *backend, memory);
        results_.back()["median_us"] = median;
        std::printf("%-16s %-10s %12.2f us\n", c.name.c_str(), std::string(backend->name()).c_str(), median);
      }
    }
  }

  void one_window(std::uint64_t seed, std::int64_t index, const std::vector<Backend*>& chosen) {
    const WindowScenario scenario = make_window_scenario(seed, index);
    if (options_.list) {
      std::printf("%s\n%s", scenario.name.c_str(), describe(scenario).c_str());
      return;
    }
    if (progress_) std::fprintf(stderr, "\r\033[K%s", scenario.name.c_str());
    for (Backend* backend : chosen) {
      WindowChecker checker(*backend, *memory_for(*backend));
      on_backend(scenario, seed, *backend, checker, [&] { checker.run(scenario); });
    }
  }

  /// `run` makes the checker's calls; its failures are counted and reported. True if there is none.
  template <class Subject, class Judge, class Function>
  bool on_backend(const Subject& c, std::uint64_t seed, const Backend& backend, const Judge& checker, Function run) {
    const std::string name(backend.name());
    nlohmann::json result = {{"backend", name}, {"case", c.name}, {"seed", seed}};
    if (const std::string reason = checker.unsupported_reason(c); !reason.empty()) {
      std::printf("skipped %s on %s: %s\n", c.name.c_str(), name.c_str(), reason.c_str());
      ++counts_.skipped;
      result["skipped"] = reason;
      results_.push_back(result);
      return false;
    }
    std::string thrown;
    try {
      run();
    } catch (const std::exception& error) {
      thrown = error.what();
    }
    std::vector<Failure> failures = checker.failures();
    if (!thrown.empty()) failures.push_back({"throws", "", thrown, 0, 0});
    counts_.calls += checker.calls();
    ++(failures.empty() ? counts_.passed : counts_.failed);
    if (!failures.empty()) report(c, seed, name, failures);
    for (const Failure& failure : failures)
      result["failures"].push_back({{"check", failure.check},
                                    {"tensor", failure.tensor},
                                    {"detail", failure.detail},
                                    {"error", failure.error},
                                    {"limit", failure.limit}});
    results_.push_back(result);
    return failures.empty();
  }

  template <class Subject>
  void report(const Subject& c, std::uint64_t seed, const std::string& backend, const std::vector<Failure>& failures) const {
    if (progress_) std::fprintf(stderr, "\r\033[K");
    std::printf("FAILED %s on %s\n%s", c.name.c_str(), backend.c_str(), describe(c).c_str());
    const std::size_t shown = std::min<std::size_t>(failures.size(), 8);
    for (std::size_t i = 0; i < shown; ++i) std::printf("  * %s\n", text(failures[i]).c_str());
    if (failures.size() > shown) std::printf("  * and %zu more\n", failures.size() - shown);
    std::printf("  replay: checkkernel --backend %s --test %s --seed %llu\n", backend.c_str(), c.name.c_str(),
                static_cast<unsigned long long>(seed));
  }

  const Options& options_;
  const bool progress_;
  Counts counts_;
  nlohmann::json results_ = nlohmann::json::array();
};

}  // namespace

int main(int argc, char** argv) {
  Options options;
  CLI::App app{"Differential test of the backends of gatedelta"};
  app.add_option("--backend", options.backend, "test only this backend");
  app.add_flag("--skip-unavailable", options.skip_unavailable,
               "exit with 77 if the backend of --backend is not available, for test runners");
  app.add_option("--test", options.test, "a family, a case (family/number) or a glob of cases");
  app.add_option("--seed", options.seed, "the seed of the first round");
  app.add_option("--repeat", options.repeat, "rounds, each with the next seed")->check(CLI::PositiveNumber);
  app.add_option("--cases", options.cases, "cases of each family")->check(CLI::PositiveNumber);
  app.add_option("--json", options.json, "write the results to this file");
  app.add_flag("--bench", options.bench, "time the cases that pass");
  app.add_flag("--list", options.list, "describe the cases and run none");
  CLI11_PARSE(app, argc, argv);
  try {
    return Run(options).all();
  } catch (const std::exception& error) {
    std::printf("checkkernel: %s\n", error.what());
    return 1;
  }
}
