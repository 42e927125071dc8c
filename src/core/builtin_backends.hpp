// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>

#include "gatedelta/backend.hpp"

// One function for each built-in backend; registry.cpp calls them in order of preference.
namespace gatedelta {

#ifdef GATEDELTA_CUDA
std::unique_ptr<Backend> make_cuda_backend();
#endif
std::unique_ptr<Backend> make_cpu_backend();
#ifdef GATEDELTA_KOKKOS
std::unique_ptr<Backend> make_kokkos_backend();
#endif
std::unique_ptr<Backend> make_reference_backend();

}  // namespace gatedelta
