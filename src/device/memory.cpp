// SPDX-License-Identifier: Apache-2.0
#include "device/memory.hpp"

#include <cstdlib>
#include <cstring>
#include <new>

#include "gatedelta/error.hpp"
#include "gatedelta/operator.hpp"

namespace gatedelta::device {
namespace {

class HostMemory final : public Memory {
 public:
  Device device() const override { return {}; }
  void* allocate(std::size_t bytes) override { return ::operator new(bytes, std::align_val_t(alignment)); }
  void release(void* memory) override { ::operator delete(memory, std::align_val_t(alignment)); }
  void copy_in(void* to, const void* from, std::size_t bytes) override { std::memcpy(to, from, bytes); }
  void copy_out(void* to, const void* from, std::size_t bytes) override { std::memcpy(to, from, bytes); }

 private:
  static constexpr std::size_t alignment = 4096;
};

}  // namespace

Memory& host_memory() {
  static HostMemory memory;
  return memory;
}

Memory* memory_for(const Backend& backend) {
  if (backend.reaches(host_memory().device())) return &host_memory();
#ifdef GATEDELTA_CUDA
  if (backend.reaches(cuda_memory().device())) return &cuda_memory();
#endif
  return nullptr;
}

Memory& memory_for_name(std::string_view backend) {
  constexpr Config smallest{.q_heads = 1, .k_heads = 1, .v_heads = 1, .key_dim = 1, .value_dim = 1};
  const GatedDeltaRule usable(smallest, backend);  // throws for a name that is unknown or not available
  std::string name(backend);
  if (const char* variable = std::getenv("GATEDELTA_BACKEND"); name.empty() && variable != nullptr) name = variable;
  if (name.empty() || name == "auto") return host_memory();
  Memory* memory = memory_for(*find_backend(name));
  if (memory == nullptr) throw Error(ErrorCode::unsupported, name + ": this build cannot copy tensors to its memory");
  return *memory;
}

}  // namespace gatedelta::device
