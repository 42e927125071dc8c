// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

#include "gatedelta/backend.hpp"
#include "gatedelta/tensor.hpp"

namespace gatedelta::device {

/// Where tensors of tools and tests live. They know nothing else of a device, so that it needs only this class.
class Memory {
 public:
  virtual ~Memory() = default;
  virtual Device device() const = 0;
  /// At least 256-byte aligned. Throws if there is not enough.
  virtual void* allocate(std::size_t bytes) = 0;
  virtual void release(void* memory) = 0;
  virtual void copy_in(void* to, const void* from, std::size_t bytes) = 0;
  virtual void copy_out(void* to, const void* from, std::size_t bytes) = 0;
};

Memory& host_memory();
/// The memory that `backend` can work on, or nullptr if this build has none.
Memory* memory_for(const Backend& backend);
/// For tools with tensors on the host: the memory for the backend that a user names with an option, or, where that is empty,
/// with GATEDELTA_BACKEND. Host memory for auto, since the place of the tensors decides then. Throws Error as the operator does
/// for a backend that is unknown or not available.
Memory& memory_for_name(std::string_view backend);

#ifdef GATEDELTA_CUDA
Memory& cuda_memory();

struct CudaDevice {
  std::string name;
  int major = 0, minor = 0;  ///< compute capability
  int multiprocessors = 0;
  std::size_t memory = 0;  ///< bytes
};
/// Empty where there is no driver.
std::vector<CudaDevice> cuda_devices();

struct CudaVersions {
  std::string driver;   ///< the newest that the driver supports, "13.0"; empty: no driver
  std::string runtime;  ///< the one that this build has
};
CudaVersions cuda_versions();
#endif

}  // namespace gatedelta::device
