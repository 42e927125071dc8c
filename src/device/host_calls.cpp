// SPDX-License-Identifier: Apache-2.0
#include "device/host_calls.hpp"

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "device/fields.hpp"
#include "gatedelta/backend.hpp"

namespace gatedelta::device {
namespace {

/// The bytes from a tensor's first element in memory to its last; gaps between strided elements belong to them.
struct Block {
  std::byte* begin;
  std::byte* end;
  bool written;
  std::size_t offset = 0;  // of the copy
};

constexpr std::array written_tensors = {&Arguments::o, &Arguments::state, &Arguments::state_out, &Arguments::snapshots};

bool on_host(const TensorView& tensor) { return tensor.elements() > 0 && tensor.device == Device{}; }

Block block_of(const TensorView& tensor) {
  std::int64_t lowest = 0, highest = 1;
  for (int i = 0; i < tensor.rank; ++i) (tensor.strides[i] < 0 ? lowest : highest) += tensor.strides[i] * (tensor.shape[i] - 1);
  const auto element = static_cast<std::int64_t>(size_of(tensor.dtype));
  auto* data = static_cast<std::byte*>(tensor.data);
  return {data + lowest * element, data + highest * element, false};
}

/// A tensor of a call, to be moved.
struct Part {
  TensorView* view;
  bool written;
};

/// Every tensor of a call. `window` becomes a copy of its replay window, which the call then refers to.
std::vector<Part> parts_of(Arguments& call, ReplayWindow& window) {
  std::vector<Part> out;
  for (const Field& field : fields)
    out.push_back(
        {&(call.*field.view), std::find(written_tensors.begin(), written_tensors.end(), field.view) != written_tensors.end() &&
                                  (field.view != &Arguments::state || call.update_state)});
  out.push_back({&call.parent, false});
  if (call.window == nullptr) return out;
  window = *call.window;
  call.window = &window;
  for (TensorView* view : {&window.keys, &window.corrections, &window.decays}) out.push_back({view, true});
  for (TensorView* view : {&window.record.length, &window.record.order}) out.push_back({view, false});
  return out;
}

/// The memory of host tensors. Where tensors share some, as columns of one matrix do, it is one block.
std::vector<Block> blocks_of(const std::vector<Part>& parts) {
  std::vector<Block> all;
  for (const Part& part : parts) {
    if (!on_host(*part.view)) continue;
    all.push_back(block_of(*part.view));
    all.back().written = part.written;
  }
  std::sort(all.begin(), all.end(), [](const Block& a, const Block& b) { return a.begin < b.begin; });
  std::vector<Block> out;
  for (const Block& block : all) {
    if (out.empty() || out.back().end <= block.begin) {
      out.push_back(block);
    } else {
      out.back().end = std::max(out.back().end, block.end);
      out.back().written = out.back().written || block.written;
    }
  }
  return out;
}

constexpr std::size_t alignment = 256;

/// Places the copies one after the other, each aligned as its original. Returns the bytes of all, which depend on the tensors'
/// sizes, not on where they are: calls of one shape need the same memory.
std::size_t place(std::vector<Block>& blocks) {
  std::size_t bytes = 0;
  for (Block& block : blocks) {
    block.offset = bytes + reinterpret_cast<std::uintptr_t>(block.begin) % alignment;
    bytes += (static_cast<std::size_t>(block.end - block.begin) + 2 * alignment - 1) / alignment * alignment;
  }
  return bytes;
}

}  // namespace

std::byte* HostCalls::Buffer::at_least(std::size_t bytes) {
  if (bytes > size_) {
    reset();
    data_ = static_cast<std::byte*>(memory_.allocate(bytes));
    size_ = bytes;
  }
  return data_;
}

void HostCalls::Buffer::reset() {
  if (data_ != nullptr) memory_.release(data_);
  data_ = nullptr;
  size_ = 0;
}

Backend& HostCalls::forward(const GatedDeltaRule& rule, const Arguments& call) {
  if (memory_.device() == Device{}) {
    rule.forward(call);
    return rule.backend_for(call);
  }

  Arguments copied = call;
  ReplayWindow window;
  const std::vector<Part> parts = parts_of(copied, window);
  std::vector<Block> blocks = blocks_of(parts);
  std::byte* copies = copies_.at_least(place(blocks));
  for (const Block& block : blocks)
    memory_.copy_in(copies + block.offset, block.begin, static_cast<std::size_t>(block.end - block.begin));
  for (const Part& part : parts) {
    TensorView& tensor = *part.view;
    if (!tensor.defined() || tensor.device != Device{}) continue;
    tensor.device = memory_.device();
    if (tensor.elements() == 0) continue;
    auto* data = static_cast<std::byte*>(tensor.data);
    const auto block = std::upper_bound(blocks.begin(), blocks.end(), block_of(tensor).begin,
                                        [](const std::byte* at, const Block& b) { return at < b.begin; }) -
                       1;
    tensor.data = copies + block->offset + (data - block->begin);
  }
  copied.workspace_size = rule.workspace_size(copied);
  copied.workspace = workspace_.at_least(copied.workspace_size);
  rule.forward(copied);
  Backend& backend = rule.backend_for(copied);
  backend.synchronize(copied.stream);
  for (const Block& block : blocks)
    if (block.written) memory_.copy_out(block.begin, copies + block.offset, static_cast<std::size_t>(block.end - block.begin));
  return backend;
}

}  // namespace gatedelta::device
