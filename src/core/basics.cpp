// SPDX-License-Identifier: Apache-2.0
// Names, views and the error type.
#include <algorithm>
#include <cmath>
#include <utility>

#include "gatedelta/gatedelta.hpp"

namespace gatedelta {

const char* name_of(ErrorCode code) noexcept {
  switch (code) {
    case ErrorCode::invalid_argument:
      return "invalid argument";
    case ErrorCode::unsupported:
      return "unsupported";
    case ErrorCode::out_of_memory:
      return "out of memory";
    case ErrorCode::device:
      return "device error";
  }
  return "unknown error";
}

Error::Error(ErrorCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
Error::~Error() = default;

std::string_view name_of(DType dtype) noexcept {
  switch (dtype) {
    case DType::f32:
      return "f32";
    case DType::f16:
      return "f16";
    case DType::bf16:
      return "bf16";
    case DType::i32:
      return "i32";
    case DType::i64:
      return "i64";
  }
  return "unknown";
}

std::optional<DType> dtype_from_name(std::string_view name) noexcept {
  for (DType dtype : {DType::f32, DType::f16, DType::bf16, DType::i32, DType::i64})
    if (name == name_of(dtype)) return dtype;
  return std::nullopt;
}

std::string name_of(Device device) { return device.type == DeviceType::cpu ? "cpu" : "cuda:" + std::to_string(device.index); }

TensorView TensorView::transposed(int first, int second) const noexcept {
  TensorView out = *this;
  std::swap(out.shape[first], out.shape[second]);
  std::swap(out.strides[first], out.strides[second]);
  return out;
}

TensorView TensorView::slice(int dim, std::int64_t begin, std::int64_t length) const noexcept {
  TensorView out = *this;
  out.shape[dim] = length;
  if (data) out.data = static_cast<char*>(data) + begin * strides[dim] * static_cast<std::int64_t>(size_of(dtype));
  return out;
}

TensorView make_view(void* data, DType dtype, std::span<const std::int64_t> shape, std::span<const std::int64_t> strides,
                     Device device) {
  if (shape.empty() || shape.size() > max_rank)
    throw Error(ErrorCode::invalid_argument, "view: expected 1 to 5 dimensions, got " + std::to_string(shape.size()));
  if (!strides.empty() && strides.size() != shape.size())
    throw Error(ErrorCode::invalid_argument,
                "view: expected " + std::to_string(shape.size()) + " strides, got " + std::to_string(strides.size()));
  TensorView view;
  view.data = data;
  view.dtype = dtype;
  view.device = device;
  view.rank = static_cast<int>(shape.size());
  std::int64_t dense = 1;
  for (int i = view.rank - 1; i >= 0; --i) {
    if (shape[i] < 0)
      throw Error(ErrorCode::invalid_argument,
                  "view: dimension " + std::to_string(i) + " has the negative size " + std::to_string(shape[i]));
    view.shape[i] = shape[i];
    view.strides[i] = strides.empty() ? dense : strides[i];
    dense *= shape[i];
  }
  return view;
}

std::int64_t Config::heads() const noexcept { return std::max({q_heads, k_heads, v_heads}); }

double Config::effective_scale() const noexcept { return scale ? *scale : 1.0 / std::sqrt(static_cast<double>(key_dim)); }

const char* version() noexcept {
#define GATEDELTA_TEXT(x) #x
#define GATEDELTA_VERSION_TEXT(a, b, c) GATEDELTA_TEXT(a) "." GATEDELTA_TEXT(b) "." GATEDELTA_TEXT(c)
  return GATEDELTA_VERSION_TEXT(GATEDELTA_VERSION_MAJOR, GATEDELTA_VERSION_MINOR, GATEDELTA_VERSION_PATCH);
}

}  // namespace gatedelta
