// SPDX-License-Identifier: Apache-2.0
#include "io/pending_file.hpp"

#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string>
#include <utility>

#include "gatedelta/error.hpp"

namespace gatedelta::io {
namespace {

namespace fs = std::filesystem;

[[noreturn]] void fail(const std::string& message) { throw Error(ErrorCode::invalid_argument, message); }

}  // namespace

PendingFile::PendingFile(const fs::path& target) : target_(target) {
  std::error_code ignored;
  if (fs::is_directory(target, ignored)) fail("is a directory");
  if (fs::exists(target, ignored)) {
    // Renaming would put a plain file in the place of a device or pipe.
    if (!fs::is_regular_file(target, ignored)) fail("is not a regular file");
    if (fs::is_symlink(target, ignored)) target_ = fs::canonical(target, ignored);
  }
  const fs::path folder = target_.parent_path();
  for (int attempt = 0; file_ == nullptr; ++attempt) {
    temporary_ = folder / (".gatedelta-" + std::to_string(getpid()) + "-" + std::to_string(attempt) + ".tmp");
    file_ = std::fopen(temporary_.c_str(), "wbx");
    if (file_ == nullptr && (errno != EEXIST || attempt == 100)) fail(std::strerror(errno));
  }
}

PendingFile::~PendingFile() {
  if (file_) std::fclose(file_);
  if (!committed_) std::remove(temporary_.c_str());
}

void PendingFile::write(const void* data, std::size_t size) {
  if (size > 0 && std::fwrite(data, 1, size, file_) != size) fail(std::strerror(errno));
}

void PendingFile::commit() {
  const bool closed = std::fclose(std::exchange(file_, nullptr)) == 0;
  if (!closed || std::rename(temporary_.c_str(), target_.c_str()) != 0) fail(std::strerror(errno));
  committed_ = true;
}

}  // namespace gatedelta::io
