// SPDX-License-Identifier: Apache-2.0
// The module gatedelta._core.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <exception>
#include <string>
#include <vector>

#include "forward.hpp"
#include "gatedelta/gatedelta.hpp"
#include "jax.hpp"
#include "window.hpp"
#include "xla.hpp"

namespace nb = nanobind;

namespace {

struct BackendInfo {
  std::string name;
  bool available;
  std::string reason;
  std::string description;
};

std::vector<BackendInfo> backends() {
  std::vector<BackendInfo> out;
  for (gatedelta::Backend* backend : gatedelta::backends()) {
    const gatedelta::Availability state = backend->availability();
    out.push_back({std::string(backend->name()), state.available, state.reason, backend->description()});
  }
  return out;
}

std::string represent(const BackendInfo& info) {
  return "Backend(" + info.name + (info.available ? "" : ", unavailable: " + info.reason) + "; " + info.description + ")";
}

/// The library's errors become the classes of gatedelta._errors.
void translate(const std::exception_ptr& pointer, void*) {
  try {
    std::rethrow_exception(pointer);
  } catch (const gatedelta::Error& error) {
    const char* name = "Error";
    switch (error.code()) {
      case gatedelta::ErrorCode::invalid_argument:
        name = "InvalidArgument";
        break;
      case gatedelta::ErrorCode::unsupported:
        name = "Unsupported";
        break;
      case gatedelta::ErrorCode::out_of_memory:
        name = "OutOfMemory";
        break;
      case gatedelta::ErrorCode::device:
        name = "DeviceError";
        break;
    }
    const nb::object type = nb::module_::import_("gatedelta._errors").attr(name);
    PyErr_SetString(type.ptr(), error.what());
  }
}

}  // namespace

NB_MODULE(_core, module) {
  module.doc() = "The compiled part of gatedelta.";
  module.attr("__version__") = gatedelta::version();
  nb::register_exception_translator(translate);
  nb::class_<BackendInfo>(module, "Backend", "An implementation of the operator.")
      .def_ro("name", &BackendInfo::name, "what forward(backend=...) takes")
      .def_ro("available", &BackendInfo::available, "whether it can run on this machine")
      .def_ro("reason", &BackendInfo::reason, "why not; empty if it can")
      .def_ro("description", &BackendInfo::description, "the instruction set or devices in use")
      .def("__repr__", &represent);
  module.def("backends", &backends, "All backends, in the order in which auto tries them.");
  gatedelta::python::define_windows(module);
  gatedelta::python::define_operator(module);
  gatedelta::python::define_xla(module);
  module.def("_forget_jax", &gatedelta::python::jax_forget, "Forgets the programs of calls on JAX arrays.");
}
