// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mutex>
#include <string>

#include "backends/kokkos/elements.hpp"
#include "core/faults.hpp"
#include "gatedelta/tensor.hpp"

// Kokkos as this process has it: initialised by the program or, at the first call, here.
namespace gatedelta::kokkos {

/// Why there can be no session; empty: there can be one. Does not initialise Kokkos.
std::string obstacle();

/// Whose memory the kernels reach. Does not initialise Kokkos, which will then have the first GPU.
Device device();

/// Access to Kokkos for one thread at a time: an instance of an execution space takes kernels from one at a time. The first
/// one initialises Kokkos if the program has not; it is finalised at exit then, unless the program has done that.
class Session {
 public:
  Session();

  /// The space on a stream; on the host, with so many threads (0: as many as there are) if Kokkos can be told.
  const Space& space(void* stream, int threads);
  /// On a device: the record of faults in its memory.
  Fault* fault_record();
  /// On a device: waits for the stream, returns the first fault and clears it.
  Fault take_fault(void* stream);

 private:
  std::unique_lock<std::mutex> lock_;
};

}  // namespace gatedelta::kokkos
