// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nanobind/nanobind.h>

namespace gatedelta::python {

/// Adds xla_handler_cpu and, with CUDA, xla_handler_cuda to the module: what gatedelta.jax registers with XLA.
void define_xla(nanobind::module_& module);

}  // namespace gatedelta::python
