// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <span>
#include <string_view>

#include "arrays.hpp"
#include "forward.hpp"

// What is particular to JAX: its arrays in less time than their methods take.
namespace gatedelta::python {

/// A call of gatedelta.forward whose results are all JAX's to make.
struct JaxCall {
  std::array<nb::handle, 16> tensors;  ///< in the order of TENSORS in the module _jax; None: not given
  bool state_out, snapshots, update_state;
  const Options& options;
  std::string_view backend;
};

/// Runs a call on CUDA arrays as a compiled program, in which XLA orders the work: nothing waits. Nothing where that does not
/// take the arrays: they are on the host or several devices, traced, or not all JAX's.
nb::object jax_forward(const JaxCall& call);
/// Forgets the programs, and where there are any.
void jax_forget();

/// A DLPack capsule of an array, whose values are waited for, from the function that its __dlpack__ comes to after most of the
/// time. Nothing where it does not take the array, or a release of JAX does not have it: __dlpack__ then says why, or does it.
nb::object jax_export(const char* name, nb::handle array);
/// Makes arrays with the sharding of `like`, which is on `device`.
void jax_make(nb::handle like, Device device, std::span<NewArray> arrays);

}  // namespace gatedelta::python
