// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "platform.hpp"

namespace gatedelta::bench {

/// Times of one call, in seconds.
class Timing {
 public:
  Timing() = default;
  explicit Timing(std::vector<double> seconds, int calls = 1);  ///< at least one

  /// The same times of calls that were `calls` in one.
  Timing of_each(std::int64_t calls) const;
  int repetitions() const { return static_cast<int>(sorted_.size()); }
  int calls() const { return calls_; }  ///< of each repetition
  double median() const { return quantile(0.5); }
  double quantile(double share) const;

 private:
  std::vector<double> sorted_;
  int calls_ = 1;
};

struct Effort {
  double min_seconds = 0.5;  ///< for each subject; 15 repetitions at least, unless these take more than ten times as long
  int repetitions = 0;       ///< a fixed number instead
  int least_calls = 1;       ///< of a repetition
  bool warm = false;         ///< before each repetition a call that does not count
};

struct Measurement {
  std::vector<Timing> timings;          ///< of each subject
  double interruptions_per_second = 0;  ///< see Platform::interruptions()
};

/// Measures the subjects in one run of Google Benchmark with their repetitions in random order, so that a slow moment of the
/// machine falls on all of them alike. A repetition of a short call is the mean over so many calls that they take
/// Platform::repetition_seconds().
Measurement measure(Platform& platform, const std::vector<std::function<void()>>& subjects, const Effort& effort);

}  // namespace gatedelta::bench
