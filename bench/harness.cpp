// SPDX-License-Identifier: Apache-2.0
#include "harness.hpp"

#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <exception>

namespace gatedelta::bench {
namespace {

/// Keeps the time of every repetition and prints nothing.
class Collector final : public benchmark::BenchmarkReporter {
 public:
  explicit Collector(std::size_t subjects) : seconds(subjects) {}

  bool ReportContext(const Context&) override { return true; }
  void ReportRuns(const std::vector<Run>& runs) override {
    for (const Run& run : runs)
      if (run.run_type == Run::RT_Iteration && run.real_accumulated_time > 0)  // no time: it was skipped
        seconds[std::stoul(run.run_name.function_name)].push_back(run.real_accumulated_time /
                                                                  static_cast<double>(run.iterations));
  }

  std::vector<std::vector<double>> seconds;
};

/// Google Benchmark takes its settings from a command line and from the environment; the former wins.
void initialize_once() {
  static const bool done = [] {
    std::string words[] = {"bench",
                           "--benchmark_enable_random_interleaving=true",
                           "--benchmark_filter=all",
                           "--benchmark_out=",
                           "--benchmark_list_tests=false",
                           "--benchmark_perf_counters="};
    std::vector<char*> argv;
    for (std::string& word : words) argv.push_back(word.data());
    int argc = static_cast<int>(argv.size());
    benchmark::Initialize(&argc, argv.data());
    return true;
  }();
  static_cast<void>(done);
}

double seconds_of(const std::function<void()>& work) {
  const auto begin = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

/// What is timed as one.
struct Repetition {
  std::function<double()> run;
  int calls = 1;
  double seconds = 0;
};

Repetition plan(Platform& platform, const std::function<void()>& call, const Effort& effort) {
  double estimate = platform.prepare(1, call)();
  if (estimate < 1) estimate = platform.prepare(1, call)();  // the first call also starts threads and faults in memory
  const double target = platform.repetition_seconds();
  const auto calls_for = [&](double seconds) {
    return std::max(effort.least_calls, static_cast<int>(std::clamp(std::ceil(target / seconds), 1.0, 4000.0)));
  };
  Repetition out;
  out.calls = calls_for(estimate);
  out.run = platform.prepare(out.calls, call);
  out.seconds = estimate * out.calls;
  if (out.calls == 1) return out;
  // One call alone may have taken much longer than one of many.
  out.seconds = out.run();
  if (const int more = calls_for(out.seconds / out.calls); more > out.calls + out.calls / 4) {
    out.calls = more;
    out.run = platform.prepare(out.calls, call);
    out.seconds = out.run();
  }
  return out;
}

}  // namespace

Timing::Timing(std::vector<double> seconds, int calls) : sorted_(std::move(seconds)), calls_(calls) {
  std::sort(sorted_.begin(), sorted_.end());
}

Timing Timing::of_each(std::int64_t calls) const {
  Timing out = *this;
  for (double& seconds : out.sorted_) seconds /= static_cast<double>(calls);
  out.calls_ *= static_cast<int>(calls);
  return out;
}

double Timing::quantile(double share) const {
  const double position = share * static_cast<double>(sorted_.size() - 1);
  const auto below = static_cast<std::size_t>(position);
  const std::size_t above = std::min(below + 1, sorted_.size() - 1);
  return std::lerp(sorted_[below], sorted_[above], position - static_cast<double>(below));
}

Measurement measure(Platform& platform, const std::vector<std::function<void()>>& subjects, const Effort& effort) {
  initialize_once();
  benchmark::ClearRegisteredBenchmarks();
  std::exception_ptr failure;
  std::vector<int> calls;  // of each subject's repetitions
  for (std::size_t i = 0; i < subjects.size(); ++i) {
    const std::function<void()>& call = subjects[i];
    const Repetition repetition = plan(platform, call, effort);
    calls.push_back(repetition.calls);
    const std::function<double()> before = effort.warm ? platform.prepare(1, call) : [] { return 0.0; };
    const bool fixed = effort.repetitions > 0;
    const int repetitions =
        fixed ? effort.repetitions : static_cast<int>(std::clamp(effort.min_seconds / repetition.seconds, 15.0, 500.0));

    const auto repeat = [&, repetition, before, fixed, done = 0, spent = 0.0](benchmark::State& state) mutable {
      for (auto _ : state) {
        if (!fixed && done >= 3 && spent > 10 * effort.min_seconds) {
          state.SkipWithError("slower than expected");
          break;
        }
        try {
          spent += before();
          const double time = repetition.run();
          spent += time;
          ++done;
          state.SetIterationTime(time / repetition.calls);
        } catch (...) {
          failure = std::current_exception();
          state.SkipWithError("failed");
          break;
        }
      }
    };
    benchmark::RegisterBenchmark(std::to_string(i).c_str(), repeat)->UseManualTime()->Iterations(1)->Repetitions(repetitions);
  }
  Collector collector(subjects.size());
  double interruptions = 0;
  const double elapsed = seconds_of([&] {
    const std::int64_t before = platform.interruptions();
    benchmark::RunSpecifiedBenchmarks(&collector);
    interruptions = static_cast<double>(platform.interruptions() - before);
  });
  benchmark::ClearRegisteredBenchmarks();
  if (failure) std::rethrow_exception(failure);
  Measurement out;
  for (std::size_t i = 0; i < subjects.size(); ++i) out.timings.emplace_back(collector.seconds[i], calls[i]);
  out.interruptions_per_second = interruptions / elapsed;
  return out;
}

}  // namespace gatedelta::bench
