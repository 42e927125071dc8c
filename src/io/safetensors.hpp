// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "gatedelta/tensor.hpp"

// The safetensors format: 8 bytes with the length of the header, the header in JSON, then the tensors' bytes, dense, row-major
// and little-endian. Files are not trusted: each fault is an Error(invalid_argument) of one line that names file and cause.
namespace gatedelta::io {

/// A file's tensors, in memory that the object owns: the views live as long as it does, and moving it leaves them valid.
class SafetensorsFile {
 public:
  static SafetensorsFile read(const std::filesystem::path& path);

  /// True for every tensor of the file, also one of a dtype that cannot be read.
  bool contains(std::string_view name) const;
  /// Throws Error(invalid_argument) if there is no such tensor, or if its dtype is none of F32, F16, BF16, I32, I64.
  const TensorView& tensor(std::string_view name) const;
  /// The tensors that can be read. Their data is 64-byte aligned; one of no dimensions has the shape [1].
  const std::map<std::string, TensorView>& tensors() const { return tensors_; }
  const std::map<std::string, std::string>& metadata() const { return metadata_; }

 private:
  struct AlignedDelete {
    void operator()(std::byte* memory) const noexcept;
  };

  std::string path_;  // as text for messages
  std::unique_ptr<std::byte, AlignedDelete> memory_;
  std::map<std::string, TensorView> tensors_;
  std::map<std::string, std::string> other_;  // tensors of other dtypes: name and the file's dtype
  std::map<std::string, std::string> metadata_;
};

/// Writes host tensors of any strides. The file appears under its name only when it is complete: a failure, which is an
/// Error(invalid_argument), leaves what was there before.
void write_safetensors(const std::filesystem::path& path, const std::vector<std::pair<std::string, TensorView>>& tensors,
                       const std::map<std::string, std::string>& metadata = {});

/// Text of a file or of the user in quotes for a message: control characters escaped, and cut if long, so that it stays on one
/// line.
std::string in_quotes(std::string_view text);

}  // namespace gatedelta::io
