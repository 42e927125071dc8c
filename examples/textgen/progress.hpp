// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>
#include <unistd.h>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <string>
#include <utility>

namespace textgen {

/// A line on stderr that follows long work and is erased at its end; nothing at all unless stderr is a terminal.
class Progress {
 public:
  Progress(std::string what, std::int64_t total) : what_(std::move(what)), total_(total), shown_(isatty(STDERR_FILENO) != 0) {}
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;
  ~Progress() {
    if (shown_) fmt::print(stderr, "\r\033[K");
  }

  void update(std::int64_t done) {
    const auto now = std::chrono::steady_clock::now();
    if (!shown_ || now - last_ < std::chrono::milliseconds(100)) return;
    last_ = now;
    fmt::print(stderr, "\r\033[K{}: {}/{}", what_, done, total_);
    std::fflush(stderr);
  }

 private:
  std::string what_;
  std::int64_t total_;
  bool shown_;
  std::chrono::steady_clock::time_point last_{};
};

}  // namespace textgen
