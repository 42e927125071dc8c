// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <span>

#include "arrays.hpp"

// What is particular to JAX: its arrays in less time than their methods take.
namespace gatedelta::python {

/// A DLPack capsule of an array, whose values are waited for, from the function that its __dlpack__ comes to after most of the
/// time. Nothing where it does not take the array, or a release of JAX does not have it: __dlpack__ then says why, or does it.
nb::object jax_export(const char* name, nb::handle array);
/// Makes arrays with the sharding of `like`, which is on `device`.
void jax_make(nb::handle like, Device device, std::span<NewArray> arrays);

}  // namespace gatedelta::python
