// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "device/memory.hpp"
#include "verify/case.hpp"
#include "verify/golden.hpp"

namespace gatedelta::verify {

using device::Memory;
using device::memory_for;

/// An allocation between red zones whose every byte is known.
class GuardedBytes {
 public:
  static constexpr std::size_t red_zone = 4096;

  /// `offset`: where in its 64-byte line the content starts.
  GuardedBytes(Memory& memory, std::size_t bytes, std::size_t offset = 0);
  GuardedBytes(GuardedBytes&& other) noexcept;
  GuardedBytes(const GuardedBytes&) = delete;
  GuardedBytes& operator=(const GuardedBytes&) = delete;
  ~GuardedBytes();

  std::byte* content() const { return memory_block_ + content_at_; }  ///< in `memory`
  std::byte* before() { return before_.data() + content_at_; }        ///< the host's image of it; call upload() after changes
  std::byte* after() { return after_.data() + content_at_; }          ///< what download() found
  void upload();
  void download();
  /// Any change within the content is in order.
  void accept_content();
  /// Compares all bytes of the last download() with before(); empty: equal. Otherwise says where the first difference is.
  std::string difference() const;

 private:
  Memory& memory_;
  std::size_t content_at_, bytes_;
  std::byte* memory_block_;
  std::vector<std::byte> before_, after_;
};

/// A tensor of a case in guarded memory. Gaps between strided elements and red zones are filled with 0xff: NaN in every
/// floating format and padding as a slot, so that a stray read shows as well.
class GuardedTensor {
 public:
  GuardedTensor(const TensorSpec& spec, Memory& memory, std::size_t offset);

  const TensorView& view() const { return view_; }
  void download() { bytes_.download(); }
  /// Every element in row-major order, as the download found it.
  std::vector<double> values();
  /// Stores to elements where `stored` is 1 are allowed; empty: none. Returns what else was changed; empty: nothing.
  std::string stray_stores(const std::vector<std::uint8_t>& stored);

 private:
  std::int64_t first_ = 0;  // element offset of index 0 within the content (negative strides)
  GuardedBytes bytes_;
  TensorView view_;
};

/// A case in memory, ready to call.
class Instance {
 public:
  Instance(const Case& c, Memory& memory);

  const Arguments& arguments() const { return arguments_; }
  /// For tests that break a call on purpose.
  Arguments& arguments() { return arguments_; }
  /// Provides `bytes` of guarded workspace.
  void add_workspace(std::size_t bytes);
  void download();
  std::vector<double> values(Tensor tensor);
  /// One text for each allocation in which a byte changed that `golden` (null: the call was to change nothing) has no store
  /// for.
  std::vector<std::string> stray_stores(const Golden* golden);

 private:
  GuardedTensor* find(Tensor tensor);

  Memory& memory_;
  std::vector<std::pair<Tensor, std::unique_ptr<GuardedTensor>>> tensors_;
  std::unique_ptr<GuardedBytes> workspace_;
  Arguments arguments_;
  bool in_place_;
};

}  // namespace gatedelta::verify
