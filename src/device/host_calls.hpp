// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>

#include "device/memory.hpp"
#include "gatedelta/operator.hpp"

namespace gatedelta::device {

/// Runs calls whose tensors are on the host in another memory: copies them there, runs the call, waits for it, and copies back
/// what it wrote. The copies' memory is kept for the next call and only grows. For host memory there are no copies.
class HostCalls {
 public:
  /// `memory`: that of the operator's backend.
  explicit HostCalls(Memory& memory) : memory_(memory) {}

  /// Tensors that are in `memory` already are taken as they are. Throws what forward() throws, faults on the device included;
  /// host tensors are then as before. Returns the backend that ran the call.
  Backend& forward(const GatedDeltaRule& rule, const Arguments& call);

 private:
  class Buffer {
   public:
    explicit Buffer(Memory& memory) : memory_(memory) {}
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { reset(); }
    std::byte* at_least(std::size_t bytes);

   private:
    void reset();

    Memory& memory_;
    std::byte* data_ = nullptr;
    std::size_t size_ = 0;
  };

  Memory& memory_;
  Buffer copies_{memory_}, workspace_{memory_};
};

}  // namespace gatedelta::device
