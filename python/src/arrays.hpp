// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "gatedelta/tensor.hpp"

// Arrays of Python's libraries as views of their memory: no copies, and nothing but the standard protocols where those are
// fast.
namespace gatedelta::python {

namespace nb = nanobind;

struct DLTensor;

enum class Framework : std::uint8_t { none, numpy, torch, jax, cuda_interface, dlpack };

/// The arrays of one call. It keeps what they are exported through until the call has been made.
class Arrays {
 public:
  Arrays() = default;
  Arrays(const Arrays&) = delete;
  Arrays& operator=(const Arrays&) = delete;
  ~Arrays();

  /// The view of an array that is only read; of None: no tensor.
  TensorView read(const char* name, nb::handle array) { return array.is_none() ? TensorView{} : view(name, array, false); }
  /// The view of an array that is written: throws for read-only memory.
  TensorView write(const char* name, nb::handle array) { return array.is_none() ? TensorView{} : view(name, array, true); }
  /// A new dense array in the library of `like`, on its device, with the dtype of `dtype_of` (none: float32); its view is
  /// in `out`.
  nb::object allocate(const char* name, nb::handle like, nb::handle dtype_of, std::initializer_list<std::int64_t> shape,
                      TensorView& out);
  /// `bytes` of memory on the device of `like`, which must be an array of this call; kept as long as this object.
  void* scratch(nb::handle like, std::size_t bytes);

  /// The stream that the arrays' library works on now (0 for host memory). `like` is an array of this call.
  void* stream(nb::handle like, Device device);
  /// True where the library of an array does not order its own work after a stream of ours: the caller waits.
  bool must_wait() const { return must_wait_; }

 private:
  TensorView view(const char* name, nb::handle array, bool written);
  TensorView view_numpy(const char* name, nb::handle array, bool written);
  TensorView view_torch(const char* name, nb::handle array);
  TensorView view_jax(const char* name, nb::handle array, bool written);
  TensorView view_cuda_interface(const char* name, nb::handle array, bool written);
  TensorView view_dlpack(const char* name, nb::handle array, bool written);
  static TensorView view_dltensor(const char* name, nb::handle array, const DLTensor& source);

  std::vector<PyObject*> kept_;
  std::optional<std::uintptr_t> interface_stream_;
  bool must_wait_ = false;
  bool fresh_ = false;       // the array in view() was made by allocate()
  bool jax_buffers_ = true;  // JAX's arrays may have buffers that Python can look at
};

Framework framework_of(nb::handle array);

}  // namespace gatedelta::python
