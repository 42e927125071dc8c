// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string_view.h>

#include <cstdint>
#include <optional>
#include <string_view>

#include "arrays.hpp"
#include "gatedelta/operator.hpp"

namespace gatedelta::python {

using Name = std::optional<std::string_view>;
using Stream = std::optional<std::uintptr_t>;

/// What tensors do not say.
struct Options {
  std::optional<double> scale;
  bool qk_l2norm = true;
  double l2_eps = 1e-6, softplus_beta = 1, softplus_threshold = 20;
  bool negative_eigenvalues = false;
  std::int64_t null_slot = -1;
  int num_threads = 0;
};

/// The configuration that the tensors of a call and options make, without dtypes, and these, once the results are there as
/// well.
Config configuration(const Arguments& in, const Options& options);
void set_dtypes(Config& config, const Arguments& in);

/// Configurations are read off shapes, so these must have their dimensions.
void require_rank(const char* name, const TensorView& view, int rank, const char* expected);
/// The stream that is given, or else the current one of the library of `like`, an array of the call.
void* stream_for(Arrays& arrays, nb::handle like, Device device, const Stream& given);
/// Waits for the stream and raises what the device's backends met on it.
void check_all(Device device, void* stream);

/// Adds forward, commit and check to the module.
void define_operator(nb::module_& module);

}  // namespace gatedelta::python
