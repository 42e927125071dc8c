// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>
#include <type_traits>

#include "gatedelta/dtype.hpp"
#include "gatedelta/export.hpp"

namespace gatedelta {

/// Kinds of memory: the host's, or an NVIDIA GPU's.
enum class DeviceType : std::uint8_t {
  cpu,   ///< host memory
  cuda,  ///< memory of an NVIDIA GPU
};

/// Where a tensor's memory lives. `index` is the device ordinal and is 0 for host memory.
struct Device {
  DeviceType type = DeviceType::cpu;  ///< kind of memory
  int index = 0;                      ///< ordinal of the device
  /// Equal kind and ordinal.
  friend bool operator==(const Device&, const Device&) = default;
};

/// "cpu" or "cuda:0".
GATEDELTA_API std::string name_of(Device device);

/// The largest number of dimensions of a view.
inline constexpr int max_rank = 5;

/// A non-owning strided view: the memory is the caller's and must outlive the call (for asynchronous backends, its
/// completion on the stream). Strides are in elements and may be anything, zero and negative ones too where a tensor is only
/// read. One type serves inputs and outputs; `Arguments` says which tensors a call writes, all others are only read.
struct GATEDELTA_API TensorView {
  void* data = nullptr;                          ///< the element at index 0 of every dimension
  DType dtype = DType::f32;                      ///< of the elements
  Device device{};                               ///< where the memory is
  int rank = 0;                                  ///< 0: no tensor
  std::array<std::int64_t, max_rank> shape{};    ///< sizes; the first `rank` count
  std::array<std::int64_t, max_rank> strides{};  ///< in elements; the first `rank` count

  /// True where the caller gave a tensor (an empty one counts).
  constexpr bool defined() const noexcept { return rank > 0; }
  /// The product of the sizes; 0 where there is no tensor.
  std::int64_t elements() const noexcept {
    if (rank == 0) return 0;
    std::int64_t count = 1;
    for (int i = 0; i < rank; ++i) count *= shape[i];
    return count;
  }

  /// The same memory with dimensions `first` and `second` exchanged, e.g. K-major state storage
  /// [slots,H,K,V] seen as the state [slots,H,V,K].
  TensorView transposed(int first, int second) const noexcept;
  /// `length` entries of dimension `dim` from `begin` on. The caller keeps within the shape.
  TensorView slice(int dim, std::int64_t begin, std::int64_t length) const noexcept;
};

/// A view of `data`; empty `strides` mean row-major and dense. Throws Error(invalid_argument) if the rank is not 1..max_rank,
/// a size is negative, or strides are given in another number than sizes.
GATEDELTA_API TensorView make_view(void* data, DType dtype, std::span<const std::int64_t> shape,
                                   std::span<const std::int64_t> strides = {}, Device device = {});

/// The same with the dtype taken from the pointer: float, float16, bfloat16, int32_t or int64_t, const or not.
template <class T>
TensorView view(T* data, std::initializer_list<std::int64_t> shape, std::initializer_list<std::int64_t> strides = {},
                Device device = {}) {
  using Element = std::remove_const_t<T>;
  return make_view(const_cast<Element*>(data), detail::dtype_of<Element>::value, {shape.begin(), shape.size()},
                   {strides.begin(), strides.size()}, device);
}

}  // namespace gatedelta
