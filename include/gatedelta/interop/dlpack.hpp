// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <dlpack/dlpack.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>

#include "gatedelta/error.hpp"
#include "gatedelta/tensor.hpp"

/// Views of DLPack tensors and DLPack tensors of views. dlpack.h is the caller's (DLPack 0.6 or newer); what came with DLPack
/// 1.0, DLManagedTensorVersioned, is there if the header has it. Nothing is copied.
namespace gatedelta::interop {

/// What a tensor may be used for.
enum class Access {
  read,   ///< only for tensors that a call reads
  write,  ///< for any tensor
};

namespace detail {

[[noreturn]] inline void fail_dlpack(const std::string& text) { throw Error(ErrorCode::invalid_argument, "dlpack: " + text); }

inline DType dlpack_dtype(DLDataType type) {
  if (type.lanes == 1) {
    if (type.code == kDLFloat && type.bits == 32) return DType::f32;
    if (type.code == kDLFloat && type.bits == 16) return DType::f16;
    if (type.code == kDLBfloat && type.bits == 16) return DType::bf16;
    if (type.code == kDLInt && type.bits == 32) return DType::i32;
    if (type.code == kDLInt && type.bits == 64) return DType::i64;
  }
  fail_dlpack("expected elements of f32, f16, bf16, i32 or i64, got type code " + std::to_string(type.code) + " with " +
              std::to_string(type.bits) + " bits and " + std::to_string(type.lanes) + " lanes");
}

inline DLDataType dlpack_type(DType dtype) {
  const auto bits = static_cast<std::uint8_t>(8 * size_of(dtype));
  const auto code = dtype == DType::bf16 ? kDLBfloat : is_floating(dtype) ? kDLFloat : kDLInt;
  return {static_cast<std::uint8_t>(code), bits, 1};
}

/// Pinned memory is the host's; managed memory counts as its GPU's.
inline Device dlpack_device(DLDevice device) {
  switch (static_cast<int>(device.device_type)) {
    case kDLCPU:
    case kDLCUDAHost:
      return {};
    case kDLCUDA:
    case kDLCUDAManaged:
      return {DeviceType::cuda, device.device_id};
    default:
      fail_dlpack("expected memory of the host or of CUDA, got device type " +
                  std::to_string(static_cast<int>(device.device_type)));
  }
}

inline DLDevice dlpack_device(Device device) { return {device.type == DeviceType::cuda ? kDLCUDA : kDLCPU, device.index}; }

}  // namespace detail

/// A view of a DLTensor's memory, byte_offset included; no strides mean dense and row-major. Pinned memory is the host's;
/// managed memory counts as its GPU's (to use it on the host, set the view's device). Throws Error(invalid_argument) for a rank
/// other than 1 to 5, another element type and other devices.
inline TensorView from_dlpack(const DLTensor& tensor) {
  if (tensor.ndim < 1 || tensor.ndim > max_rank)
    detail::fail_dlpack("expected 1 to 5 dimensions, got " + std::to_string(tensor.ndim));
  if (tensor.shape == nullptr) detail::fail_dlpack("expected a shape, got a null pointer");
  const DType dtype = detail::dlpack_dtype(tensor.dtype);
  const Device device = detail::dlpack_device(tensor.device);
  const auto rank = static_cast<std::size_t>(tensor.ndim);
  const std::span<const std::int64_t> strides(tensor.strides, tensor.strides == nullptr ? 0 : rank);
  void* data = tensor.data == nullptr ? nullptr : static_cast<char*>(tensor.data) + tensor.byte_offset;
  return make_view(data, dtype, {tensor.shape, rank}, strides, device);
}

/// The same for a managed tensor, which stays the caller's and must outlive the view's use.
inline TensorView from_dlpack(const DLManagedTensor& managed) { return from_dlpack(managed.dl_tensor); }

/// A DLTensor of a view, in whose shape and strides it points: valid as long as the view stays where it is.
inline DLTensor to_dltensor(TensorView& view) {
  if (!view.defined()) detail::fail_dlpack("expected a view, got none");
  DLTensor out{};
  out.data = view.elements() == 0 ? nullptr : view.data;  // as DLPack has it
  out.device = detail::dlpack_device(view.device);
  out.ndim = view.rank;
  out.dtype = detail::dlpack_type(view.dtype);
  out.shape = view.shape.data();
  out.strides = view.strides.data();
  return out;
}

namespace detail {

/// What a managed tensor's manager_ctx is: the view it points into, and whatever keeps the memory alive.
template <class Managed>
struct Exported {
  Managed managed{};
  TensorView view;
  std::shared_ptr<void> owner;
};

template <class Managed>
Managed* export_dlpack(const TensorView& view, std::shared_ptr<void> owner) {
  auto out = std::make_unique<Exported<Managed>>();
  out->view = view;
  out->owner = std::move(owner);
  out->managed.dl_tensor = to_dltensor(out->view);
  out->managed.manager_ctx = out.get();
  out->managed.deleter = [](Managed* self) {
    if (self != nullptr) delete static_cast<Exported<Managed>*>(self->manager_ctx);
  };
  return &out.release()->managed;
}

}  // namespace detail

/// A managed tensor for a library that takes DLPack; whoever gets it calls its deleter, which lets go of `owner`. The memory
/// must live until then: by `owner`, or by the caller's care.
inline DLManagedTensor* to_dlpack(const TensorView& view, std::shared_ptr<void> owner = {}) {
  return detail::export_dlpack<DLManagedTensor>(view, std::move(owner));
}

#ifdef DLPACK_MAJOR_VERSION

/// A view of a versioned managed tensor, which stays the caller's. Throws Error(invalid_argument) for a newer major version,
/// and for a read-only tensor if `access` is write.
inline TensorView from_dlpack(const DLManagedTensorVersioned& managed, Access access) {
  if (managed.version.major != DLPACK_MAJOR_VERSION)
    detail::fail_dlpack("expected version " + std::to_string(DLPACK_MAJOR_VERSION) + ", got " +
                        std::to_string(managed.version.major) + "." + std::to_string(managed.version.minor));
  if (access == Access::write && (managed.flags & DLPACK_FLAG_BITMASK_READ_ONLY) != 0)
    detail::fail_dlpack("expected a tensor that may be written, got a read-only one");
  return from_dlpack(managed.dl_tensor);
}

/// As to_dlpack, in the form that DLPack 1.0 introduced; Access::read marks the tensor read-only.
inline DLManagedTensorVersioned* to_dlpack_versioned(const TensorView& view, Access access, std::shared_ptr<void> owner = {}) {
  auto* out = detail::export_dlpack<DLManagedTensorVersioned>(view, std::move(owner));
  out->version = {DLPACK_MAJOR_VERSION, DLPACK_MINOR_VERSION};
  out->flags = access == Access::read ? DLPACK_FLAG_BITMASK_READ_ONLY : 0;
  return out;
}

#endif

}  // namespace gatedelta::interop
