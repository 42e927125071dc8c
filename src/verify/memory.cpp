// SPDX-License-Identifier: Apache-2.0
#include "verify/memory.hpp"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#include "core/elements.hpp"

namespace gatedelta::verify {
namespace {

struct Extent {
  std::int64_t lowest = 0, highest = -1;  // element offsets from index 0; highest < lowest: no elements
};

Extent extent_of(const TensorSpec& spec) {
  if (spec.elements() == 0) return {};
  Extent out{0, 0};
  for (std::size_t i = 0; i < spec.shape.size(); ++i)
    (spec.strides[i] < 0 ? out.lowest : out.highest) += spec.strides[i] * (spec.shape[i] - 1);
  return out;
}

void store_value(std::byte* address, DType dtype, double value) {
  if (dtype == DType::i32) {
    const auto x = static_cast<std::int32_t>(value);
    std::memcpy(address, &x, sizeof x);
  } else if (dtype == DType::i64) {
    const auto x = static_cast<std::int64_t>(value);
    std::memcpy(address, &x, sizeof x);
  } else {
    store_element(address, dtype, value);
  }
}

}  // namespace

GuardedBytes::GuardedBytes(Memory& memory, std::size_t bytes, std::size_t offset)
    : memory_(memory),
      content_at_(red_zone + offset % 64),
      bytes_(bytes),
      memory_block_(static_cast<std::byte*>(memory.allocate(content_at_ + bytes + red_zone))),
      before_(content_at_ + bytes + red_zone, std::byte{0xff}) {}

GuardedBytes::GuardedBytes(GuardedBytes&& other) noexcept
    : memory_(other.memory_),
      content_at_(other.content_at_),
      bytes_(other.bytes_),
      memory_block_(std::exchange(other.memory_block_, nullptr)),
      before_(std::move(other.before_)),
      after_(std::move(other.after_)) {}

GuardedBytes::~GuardedBytes() {
  if (memory_block_ != nullptr) memory_.release(memory_block_);
}

void GuardedBytes::upload() { memory_.copy_in(memory_block_, before_.data(), before_.size()); }

void GuardedBytes::download() {
  after_.resize(before_.size());
  memory_.copy_out(after_.data(), memory_block_, after_.size());
}

void GuardedBytes::accept_content() { std::copy_n(after(), bytes_, before()); }

std::string GuardedBytes::difference() const {
  const auto [found, expected] = std::mismatch(after_.begin(), after_.end(), before_.begin());
  if (found == after_.end()) return {};
  const auto at = static_cast<std::size_t>(found - after_.begin());
  if (at < content_at_) return "stored " + std::to_string(content_at_ - at) + " bytes before its memory";
  if (at >= content_at_ + bytes_) return "stored " + std::to_string(at - content_at_ - bytes_) + " bytes after its memory";
  return "changed at byte " + std::to_string(at - content_at_) + " of " + std::to_string(bytes_) +
         ", in a gap or an element that no store is due to";
}

GuardedTensor::GuardedTensor(const TensorSpec& spec, Memory& memory, std::size_t offset)
    : first_(-extent_of(spec).lowest),
      bytes_(memory, static_cast<std::size_t>(extent_of(spec).highest - extent_of(spec).lowest + 1) * size_of(spec.dtype),
             offset) {
  const std::size_t element = size_of(spec.dtype);
  for_each_index(spec.shape, [&](std::int64_t flat, const std::vector<std::int64_t>& index) {
    std::int64_t at = first_;
    for (std::size_t i = 0; i < index.size(); ++i) at += index[i] * spec.strides[i];
    const double value =
        spec.values.empty() ? std::numeric_limits<double>::quiet_NaN() : spec.values[static_cast<std::size_t>(flat)];
    store_value(bytes_.before() + static_cast<std::size_t>(at) * element, spec.dtype, value);
  });
  bytes_.upload();
  view_ = make_view(bytes_.content() + static_cast<std::size_t>(first_) * element, spec.dtype, spec.shape, spec.strides,
                    memory.device());
}

std::vector<double> GuardedTensor::values() {
  TensorView host = view_;
  host.data = bytes_.after() + static_cast<std::size_t>(first_) * size_of(view_.dtype);
  std::vector<double> out;
  out.reserve(static_cast<std::size_t>(view_.elements()));
  for_each_index({view_.shape.begin(), view_.shape.begin() + view_.rank},
                 [&](std::int64_t, const std::vector<std::int64_t>& index) {
                   std::int64_t at = 0;
                   for (int i = 0; i < view_.rank; ++i) at += index[static_cast<std::size_t>(i)] * view_.strides[i];
                   out.push_back(load_element(
                       static_cast<std::byte*>(host.data) + at * static_cast<std::int64_t>(size_of(view_.dtype)), view_.dtype));
                 });
  return out;
}

std::string GuardedTensor::stray_stores(const std::vector<std::uint8_t>& stored) {
  // Take over what was due, then nothing may differ.
  const std::size_t element = size_of(view_.dtype);
  if (!stored.empty())
    for_each_index({view_.shape.begin(), view_.shape.begin() + view_.rank},
                   [&](std::int64_t flat, const std::vector<std::int64_t>& index) {
                     if (!stored[static_cast<std::size_t>(flat)]) return;
                     std::int64_t at = first_;
                     for (int i = 0; i < view_.rank; ++i) at += index[static_cast<std::size_t>(i)] * view_.strides[i];
                     const std::size_t byte = static_cast<std::size_t>(at) * element;
                     std::memcpy(bytes_.before() + byte, bytes_.after() + byte, element);
                   });
  return bytes_.difference();
}

Instance::Instance(const Case& c, Memory& memory) : memory_(memory), in_place_(c.in_place) {
  for (int i = 0; i < tensor_count; ++i) {
    const auto tensor = static_cast<Tensor>(i);
    if (!c[tensor].present() || (c.in_place && tensor == Tensor::state_out)) continue;
    // Otherwise the alignment varies over the tensors, always a multiple of the element.
    const std::size_t offset = c.aligned ? 0 : size_of(c[tensor].dtype) * ((c.seed + static_cast<std::size_t>(i) * 7) % 16);
    tensors_.emplace_back(tensor, std::make_unique<GuardedTensor>(c[tensor], memory, offset));
    arguments_.*fields[static_cast<std::size_t>(i)].view = tensors_.back().second->view();
  }
  if (c.in_place) arguments_.state_out = arguments_.state_in;
  arguments_.update_state = c.update_state;
}

void Instance::add_workspace(std::size_t bytes) {
  if (bytes == 0) return;
  workspace_ = std::make_unique<GuardedBytes>(memory_, bytes);
  workspace_->upload();
  arguments_.workspace = workspace_->content();
  arguments_.workspace_size = bytes;
}

void Instance::download() {
  for (auto& [tensor, guarded] : tensors_) guarded->download();
  if (workspace_) workspace_->download();
}

GuardedTensor* Instance::find(Tensor tensor) {
  if (in_place_ && tensor == Tensor::state_out) tensor = Tensor::state_in;
  for (auto& [name, guarded] : tensors_)
    if (name == tensor) return guarded.get();
  return nullptr;
}

std::vector<std::string> Instance::stray_stores(const Golden* golden) {
  static const std::vector<std::uint8_t> none;
  std::vector<std::string> out;
  const auto report = [&](const char* name, const std::string& text) {
    if (!text.empty()) out.push_back(std::string(name) + ": " + text);
  };
  for (auto& [tensor, guarded] : tensors_) {
    const Output* output =
        golden == nullptr ? nullptr : golden->find(in_place_ && tensor == Tensor::state_in ? Tensor::state_out : tensor);
    report(name_of(tensor), guarded->stray_stores(output == nullptr ? none : output->stored));
  }
  if (workspace_) {
    if (golden != nullptr) workspace_->accept_content();
    report("workspace", workspace_->difference());
  }
  return out;
}

std::vector<double> Instance::values(Tensor tensor) { return find(tensor)->values(); }

}  // namespace gatedelta::verify
