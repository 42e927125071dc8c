// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdio>
#include <filesystem>

namespace gatedelta::io {

/// A file that is there under a name of its own until it is complete: it then takes the place of `target`, or is gone if it
/// was not committed. Failures are an Error(invalid_argument) that says why, without the file's name.
class PendingFile {
 public:
  explicit PendingFile(const std::filesystem::path& target);
  PendingFile(const PendingFile&) = delete;
  PendingFile& operator=(const PendingFile&) = delete;
  ~PendingFile();

  void write(const void* data, std::size_t size);
  void commit();

 private:
  std::filesystem::path target_, temporary_;
  std::FILE* file_ = nullptr;
  bool committed_ = false;
};

}  // namespace gatedelta::io
