// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nanobind/nanobind.h>

namespace gatedelta::python {

/// Adds forward, commit and check to the module.
void define_operator(nanobind::module_& module);

}  // namespace gatedelta::python
