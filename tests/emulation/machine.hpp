// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstring>
#include <functional>
#include <type_traits>

// A thread block on the host: each of its threads is a fiber, and goes on until it has to wait for others.
//
// Beside wrong results this shows:
//   - Shared memory is full of NaNs when a block begins, and one that writes behind its own fails.
//   - An asynchronous copy happens no sooner than the wait for it: who reads without waiting reads NaNs, or what was there.
//   - Warps, and lanes of a warp, take turns in ascending order in one block and in descending order in the next, each as far
//     as it gets: of two that exchange something through shared memory without a barrier, one comes too early in one of these.
//   - Lanes that meet in different instructions, or wait for one that does not come, fail.
//
// It cannot show what depends on the time that anything takes. All instructions in which lanes meet order their accesses to
// memory as a barrier does, which on a device only barriers do: where there is such an instruction between two accesses, a
// missing barrier is not seen, nor one between blocks. Alignment, bank conflicts, registers, and how sums are rounded inside of
// a matrix product are not emulated either; nor is what nvcc and the device make of the code: math functions are the host's.
namespace gatedelta::emulation {

constexpr std::size_t most_shared_bytes = 227 * 1024;
constexpr int warp_lanes = 32;

/// Runs a block's threads to their end. Throws std::runtime_error for what makes no sense on a device.
void run_block(unsigned threads, std::size_t shared_bytes, const std::function<void()>& kernel);

/// The lane of the thread that is running.
int own_lane();
void* shared_memory();

/// Until all threads of the block are there.
void block_barrier();

/// Until all lanes of the warp are there: gives the values that they brought, valid until the lane's next call but one.
const std::byte* exchange_bytes(const char* instruction, const void* mine, std::size_t bytes);

template <class T>
class Lanes {
 public:
  explicit Lanes(const std::byte* memory) : memory_(memory) {}
  T operator[](int lane) const {
    T value;
    std::memcpy(static_cast<void*>(&value), memory_ + static_cast<std::size_t>(lane) * sizeof(T), sizeof(T));
    return value;
  }

 private:
  const std::byte* memory_;
};

template <class T>
Lanes<T> exchange(const char* instruction, const T& mine) {
  static_assert(std::is_trivially_copyable_v<T>);
  return Lanes<T>(exchange_bytes(instruction, &mine, sizeof(T)));
}
inline void warp_barrier() { (void)exchange("a barrier", 0); }

/// Copies of a thread, in groups, of which all but the last `pending` happen at the wait.
void copy_later(void* to, const void* from, std::size_t bytes);
void end_copy_group();
void wait_for_copies(std::size_t pending);

}  // namespace gatedelta::emulation
