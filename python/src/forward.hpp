// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string_view.h>

#include <cstdint>
#include <optional>
#include <string_view>

#include "arrays.hpp"

namespace gatedelta::python {

using Name = std::optional<std::string_view>;
using Stream = std::optional<std::uintptr_t>;

/// Configurations are read off shapes, so these must have their dimensions.
void require_rank(const char* name, const TensorView& view, int rank, const char* expected);
/// The stream that is given, or else the current one of the library of `like`, an array of the call.
void* stream_for(Arrays& arrays, nb::handle like, Device device, const Stream& given);
/// Waits for the stream and raises what the device's backends met on it.
void check_all(Device device, void* stream);

/// Adds forward, commit and check to the module.
void define_operator(nb::module_& module);

}  // namespace gatedelta::python
