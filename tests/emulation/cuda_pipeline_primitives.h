// SPDX-License-Identifier: Apache-2.0
#pragma once

// In place of the header of CUDA.
#include "machine.hpp"

inline void __pipeline_memcpy_async(void* to, const void* from, std::size_t bytes) {
  gatedelta::emulation::copy_later(to, from, bytes);
}
inline void __pipeline_commit() { gatedelta::emulation::end_copy_group(); }
inline void __pipeline_wait_prior(std::size_t pending) { gatedelta::emulation::wait_for_copies(pending); }
