// SPDX-License-Identifier: Apache-2.0
#include "backends/kokkos/session.hpp"

#include <cstdint>
#include <map>
#include <memory>

namespace gatedelta::kokkos {
namespace {

using Record = Kokkos::View<Fault, Space::memory_space>;

/// What lives no longer than Kokkos does.
struct State {
  std::mutex mutex;
  bool released_with_kokkos = false;
  std::map<std::uintptr_t, Space> spaces;  ///< by stream, on the host by threads
  std::unique_ptr<Record> fault;
};

/// Never destroyed: a program may finalise Kokkos as late as it likes.
State& state() {
  static State& instance = *new State;
  return instance;
}

void release() {
  state().spaces.clear();
  state().fault.reset();
  state().released_with_kokkos = false;
}

bool is_finalized() {
#if KOKKOS_VERSION >= 30700
  return Kokkos::is_finalized();
#else
  return false;
#endif
}

struct Finaliser {
  ~Finaliser() {
    if (Kokkos::is_initialized() && !is_finalized()) Kokkos::finalize();
  }
};

void initialise() {
  // Warnings would be printed.
#if KOKKOS_VERSION >= 30700
  Kokkos::InitializationSettings settings;
  settings.set_disable_warnings(true);
  if (!on_host) settings.set_device_id(0);
#else
  Kokkos::InitArguments settings;
  settings.disable_warnings = true;
  if (!on_host) settings.device_id = 0;
#endif
  Kokkos::initialize(settings);
  // Destroyed before what Kokkos itself destroys at exit, since that is there by now.
  static const Finaliser at_exit;
}

#if defined(KOKKOS_ENABLE_CUDA)
Space space_on(void* stream, int) {
  (void)cudaSetDevice(device().index);  // Kokkos asks the driver of the stream, which needs a context in this thread
  return Space(static_cast<cudaStream_t>(stream));
}
#elif defined(KOKKOS_ENABLE_HIP)
Space space_on(void* stream, int) { return Space(static_cast<hipStream_t>(stream)); }
#elif defined(KOKKOS_ENABLE_SYCL)
Space space_on(void* stream, int) { return stream == nullptr ? Space() : Space(*static_cast<sycl::queue*>(stream)); }
#elif defined(KOKKOS_ENABLE_OPENMP) && KOKKOS_VERSION >= 40000
Space space_on(void*, int threads) {
  if constexpr (std::is_same_v<Space, Kokkos::OpenMP>)
    if (threads > 0) return Space(threads);
  return Space();
}
#else
Space space_on(void*, int) { return Space(); }
#endif

/// Kokkos ends the program where there is no GPU.
int devices() {
  int count = 0;
#if defined(KOKKOS_ENABLE_CUDA)
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    (void)cudaGetLastError();
    return 0;
  }
#elif defined(KOKKOS_ENABLE_HIP)
  if (hipGetDeviceCount(&count) != hipSuccess) return 0;
#elif defined(KOKKOS_ENABLE_SYCL)
  count = static_cast<int>(sycl::device::get_devices(sycl::info::device_type::gpu).size());
#endif
  return count;
}

}  // namespace

std::string obstacle() {
  if (is_finalized()) return "the program has finalised Kokkos";
  static const int count = on_host ? 1 : devices();
  return count > 0 ? "" : std::string("no device for Kokkos::") + Space::name();
}

Device device() {
  if (on_host) return {};
  int index = 0;
#if KOKKOS_VERSION >= 30700
  if (Kokkos::is_initialized()) index = Kokkos::device_id();
#endif
  return {DeviceType::cuda, index};
}

Session::Session() : lock_(state().mutex) {
  if (!Kokkos::is_initialized()) initialise();
  if (state().released_with_kokkos) return;
  Kokkos::push_finalize_hook(release);
  state().released_with_kokkos = true;
}

const Space& Session::space(void* stream, int threads) {
  const std::uintptr_t key = on_host ? static_cast<std::uintptr_t>(threads) : reinterpret_cast<std::uintptr_t>(stream);
  auto& spaces = state().spaces;
  auto it = spaces.find(key);
  if (it == spaces.end()) it = spaces.emplace(key, space_on(stream, threads)).first;
  return it->second;
}

Fault* Session::fault_record() {
  if (state().fault == nullptr) state().fault = std::make_unique<Record>("gatedelta fault record");  // zeroed
  return state().fault->data();
}

Fault Session::take_fault(void* stream) {
  Fault found;
  const Space& on = space(stream, 0);
  const Kokkos::View<Fault, Kokkos::HostSpace, Kokkos::MemoryUnmanaged> host(&found);
  (void)fault_record();
  Kokkos::deep_copy(on, host, *state().fault);
  on.fence();
  if (found.kind == 0) return found;
  const Fault first = found;
  found = {};
  Kokkos::deep_copy(on, *state().fault, host);
  on.fence();
  return first;
}

}  // namespace gatedelta::kokkos
