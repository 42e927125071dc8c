// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "gatedelta/tensor.hpp"

namespace gatedelta::bench {

/// Nearly normal random numbers (the sum of four uniform ones) that depend on the seed and the index alone.
struct Normal {
  std::uint64_t seed = 0;
  float mean = 0;
  float deviation = 1;

  constexpr float operator()(std::uint64_t index) const noexcept {
    std::uint64_t z = seed * 0xd1342543de82ef95u + (index + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    z ^= z >> 31;
    const std::uint64_t sum = (z & 0xffff) + ((z >> 16) & 0xffff) + ((z >> 32) & 0xffff) + (z >> 48);
    // The sum has mean 2 * 65535 and a variance of 4/12 * 65536^2.
    return mean + deviation * (static_cast<float>(sum) - 131070.0f) * (1.7320508f / 65536.0f);
  }
};

/// What a call has to move at least: `bytes` read once and written to `copies` places, the first of which is `write`, one after
/// the other. `write` may be `read` itself; no copies: only read.
struct Traffic {
  const void* read = nullptr;
  void* write = nullptr;
  std::size_t bytes = 0;
  std::int64_t copies = 1;
};

/// The same where a call has it, and all else that a call reads and writes, but for the gates' parameters. Dense tensors; sizes
/// in vectors of 16 bytes of one head.
struct CallTraffic {
  std::int64_t rows = 0, heads = 0, key_heads = 0, head_vectors = 0;
  int tokens = 0, stores = 0, key_group = 1;  ///< `stores`: as Traffic::copies
  void* state = nullptr;
  void* snapshots = nullptr;            ///< given: the stores
  const std::int32_t* slots = nullptr;  ///< [rows]; with `accepted` [rows,tokens], where the stores go
  const std::int32_t* accepted = nullptr;
  const void *q = nullptr, *k = nullptr, *v = nullptr, *a = nullptr, *b = nullptr;
  void* o = nullptr;
  int key_vectors = 0, value_vectors = 0, gate_bytes = 0;
  /// With a window the state is stored where that is full.
  const std::int32_t* length = nullptr;
  void *keys = nullptr, *corrections = nullptr, *decays = nullptr;
  int capacity = 0, ring = 0, entry_key_vectors = 0, entry_value_vectors = 0;
};

/// The machine side of a benchmark: memory, clock and limits of one kind of device. A backend for another device brings its
/// own; the workloads, the harness and the tool do not know the difference.
class Platform {
 public:
  Platform() = default;
  Platform(const Platform&) = delete;
  Platform& operator=(const Platform&) = delete;
  virtual ~Platform() = default;

  virtual Device device() const = 0;
  /// The name of the hardware.
  virtual std::string description() const = 0;
  /// All last-level caches together; what is not rotated through more than this may still be in cache.
  virtual double cache_bytes() const = 0;
  /// Memory that can still be allocated.
  virtual double free_bytes() const = 0;
  /// Threads that a call uses if it is not told.
  virtual int default_threads() const = 0;

  /// Aligned to 64 bytes at least. The allocation of an ordinary program: no huge pages, no pinning.
  virtual std::shared_ptr<void> allocate(std::size_t bytes) = 0;
  /// Fills a dense floating-point tensor.
  virtual void fill(const TensorView& dense, const Normal& numbers, int threads) = 0;
  virtual void copy_from_host(void* to, const void* from, std::size_t bytes) = 0;
  /// Within the device. Like fill(), on the host it shares the work such that each thread first touches its part.
  virtual void copy(void* to, const void* from, std::size_t bytes, int threads) = 0;

  /// Where calls are to enqueue their work: Arguments::stream.
  virtual void* stream() const { return nullptr; }
  /// Makes `calls` calls ready to be timed, again and again: the result runs them one after the other until all of their work
  /// is done and gives the time of that. Device platforms may record what the calls enqueue, here, and replay that.
  virtual std::function<double()> prepare(int calls, const std::function<void()>& call) = 0;
  /// How long a repetition should take at least, for the clock and for whatever surrounds the calls.
  virtual double repetition_seconds() const = 0;
  /// Waits until all that was enqueued is done.
  virtual void wait() {}
  /// The times of up to `calls` calls until they have returned, with the device idle now and then; none where calls do not
  /// return before their work is done.
  virtual std::vector<double> enqueue_seconds(int /*calls*/, const std::function<void()>& /*call*/) { return {}; }

  /// How often, so far, this process lost a processor to another one.
  virtual std::int64_t interruptions() const = 0;

  /// In how many shapes move() comes; the fastest one is the limit.
  virtual int move_shapes() const { return 1; }
  /// The traffic alone, as fast as the device can. Values moved in place stay as they are. The host's platform does only one
  /// copy in place.
  virtual void move(const Traffic& traffic, int shape, int threads) = 0;
  /// The same for all traffic of a call, on platforms that have it.
  virtual int call_shapes() const { return 0; }
  /// That traffic alone; false if there is none, or a shape does not fit it. The values of states stay as they are.
  virtual bool move_call(const CallTraffic& /*traffic*/, int /*shape*/) { return false; }
  /// The best float32 multiply-add rate out of registers that a few short loops reach, in FLOP/s.
  virtual double measure_peak_flops(int threads) = 0;
  /// The instruction set of the limits.
  virtual std::string limit_description() const = 0;
  /// What else a result should say of the device: its driver, for instance.
  virtual std::vector<std::pair<std::string, std::string>> facts() const { return {}; }
};

std::unique_ptr<Platform> make_host_platform();
/// The first CUDA device. Throws Error(unsupported) where there is none or this build has no CUDA.
std::unique_ptr<Platform> make_cuda_platform();

}  // namespace gatedelta::bench
