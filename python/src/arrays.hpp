// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <span>
#include <vector>

#include "gatedelta/tensor.hpp"

// Arrays of Python's libraries as views of their memory: no copies, and nothing but the standard protocols where those are
// fast.
namespace gatedelta::python {

namespace nb = nanobind;

struct DLTensor;

enum class Framework : std::uint8_t { none, numpy, torch, jax, cupy, cuda_interface, dlpack };

/// An array that a call is to make; `view` becomes its view.
struct NewArray {
  const char* name;
  TensorView* view;
  nb::handle dtype_of;  ///< an array with the dtype that it gets; none: float32
  nb::object made;

  /// `dtype` is that of `dtype_of`.
  NewArray(const char* name, TensorView& view, std::initializer_list<std::int64_t> shape, nb::handle dtype_of = {},
           DType dtype = DType::f32)
      : name(name), view(&view), dtype_of(dtype_of) {
    view.dtype = dtype, view.rank = static_cast<int>(shape.size());
    std::copy(shape.begin(), shape.end(), view.shape.begin());
  }
};

/// The arrays of one call. It keeps what they are exported through until the call has been made.
class Arrays {
 public:
  Arrays() { kept_.reserve(16); }
  Arrays(const Arrays&) = delete;
  Arrays& operator=(const Arrays&) = delete;
  ~Arrays();

  /// The view of an array that is only read; of None: no tensor.
  TensorView read(const char* name, nb::handle array) { return array.is_none() ? TensorView{} : view(name, array, false); }
  /// The view of an array that is written: throws for read-only memory.
  TensorView write(const char* name, nb::handle array) { return array.is_none() ? TensorView{} : view(name, array, true); }
  /// Makes new dense arrays in the library of `like`, an array of this call, and on its device, which is `device`.
  void allocate(nb::handle like, Device device, std::span<NewArray> arrays);
  nb::object allocate(nb::handle like, Device device, NewArray array) {
    allocate(like, device, {&array, 1});
    return array.made;
  }
  /// `bytes` of memory on the device of `like`, which must be an array of this call; kept as long as this object.
  void* scratch(nb::handle like, Device device, std::size_t bytes);

  /// The stream that the arrays' library works on now (0 for host memory). `like` is an array of this call.
  void* stream(nb::handle like, Device device);
  /// True where the library of an array does not order its own work after a stream of ours: the caller waits.
  bool must_wait() const { return must_wait_; }

 private:
  TensorView view(const char* name, nb::handle array, bool written);
  TensorView view_numpy(const char* name, nb::handle array, bool written);
  TensorView view_torch(const char* name, nb::handle array);
  TensorView view_cupy(const char* name, nb::handle array);
  TensorView view_cuda_interface(const char* name, nb::handle array, bool written);
  TensorView view_dlpack(const char* name, nb::handle array, bool written);
  static nb::object make(nb::handle like, const NewArray& array);
  static TensorView view_dltensor(const char* name, nb::handle array, const DLTensor& source);

  std::vector<PyObject*> kept_;
  std::optional<std::uintptr_t> interface_stream_;
  bool must_wait_ = false;
};

Framework framework_of(nb::handle array);

}  // namespace gatedelta::python
