// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "gatedelta/error.hpp"
#include "gatedelta/tensor.hpp"

// What the readers of arrays share: attributes and calls of Python objects with its exceptions as C++ ones, shapes and strides.
namespace gatedelta::python {

namespace nb = nanobind;

[[noreturn]] inline void fail(const char* name, const std::string& message) {
  throw Error(ErrorCode::invalid_argument, std::string(name) + ": " + message);
}

[[noreturn]] inline void fail_dtype(const char* name, const std::string& found) {
  fail(name, "expected dtype float32, float16 or bfloat16, or int32 or int64 for indices, got " + found);
}

/// The dtype of NumPy's and JAX's name.
inline std::optional<DType> type_of_name(std::string_view name) {
  if (name == "float32") return DType::f32;
  if (name == "float16") return DType::f16;
  if (name == "bfloat16") return DType::bf16;
  if (name == "int32") return DType::i32;
  if (name == "int64") return DType::i64;
  return std::nullopt;
}

inline std::string text(nb::handle object) { return nb::cast<std::string>(nb::str(object)); }

/// What a function of Python's has returned: throws the exception that it has set.
inline nb::object result(PyObject* value) {
  if (value == nullptr) nb::raise_python_error();
  return nb::steal(value);
}

inline nb::object attribute(nb::handle object, PyObject* name) { return result(PyObject_GetAttr(object.ptr(), name)); }

inline nb::object call_method(nb::handle object, PyObject* name) {
  return result(PyObject_CallMethodNoArgs(object.ptr(), name));
}

inline std::int64_t integer(nb::handle object) {
  const std::int64_t value = PyLong_AsLongLong(object.ptr());
  if (value == -1 && PyErr_Occurred()) nb::raise_python_error();
  return value;
}

inline void set_rank(const char* name, TensorView& view, std::int64_t rank) {
  if (rank < 1 || rank > max_rank)
    fail(name, "expected 1 to " + std::to_string(max_rank) + " dimensions, got " + std::to_string(rank));
  view.rank = static_cast<int>(rank);
}

inline void set_shape(const char* name, TensorView& view, nb::handle shape) {
  if (!PyTuple_Check(shape.ptr())) fail(name, "expected a shape that is a tuple, got " + text(shape));
  set_rank(name, view, PyTuple_GET_SIZE(shape.ptr()));
  for (int i = 0; i < view.rank; ++i) view.shape[i] = integer(PyTuple_GET_ITEM(shape.ptr(), i));
}

inline nb::object tuple_of_sizes(const TensorView& view) {
  nb::object sizes = nb::steal(PyTuple_New(view.rank));
  for (int i = 0; i < view.rank; ++i) PyTuple_SET_ITEM(sizes.ptr(), i, PyLong_FromLongLong(view.shape[i]));
  return sizes;
}

inline void set_dense_strides(TensorView& view) {
  std::int64_t dense = 1;
  for (int i = view.rank - 1; i >= 0; --i) {
    view.strides[i] = dense;
    dense *= view.shape[i];
  }
}

}  // namespace gatedelta::python
