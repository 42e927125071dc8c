// SPDX-License-Identifier: Apache-2.0
// The checked form of longjmp takes a jump to another stack for a mistake.
#undef _FORTIFY_SOURCE
#include "machine.hpp"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <deque>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "device.hpp"

namespace gatedelta::cuda {

constexpr std::size_t guard_bytes = 4096;
/// The dynamic shared memory of the fast kernels, and that of those for every case.
alignas(1024) thread_local uint4 shared[(emulation::most_shared_bytes + guard_bytes) / sizeof(uint4)];
alignas(1024) thread_local float4 dynamic[(emulation::most_shared_bytes + guard_bytes) / sizeof(float4)];

}  // namespace gatedelta::cuda

namespace gatedelta::emulation {

uint3 threadIdx, blockIdx;
dim3 blockDim;

namespace {

constexpr std::size_t stack_bytes = 128 * 1024, exchanged_bytes = 64;
constexpr unsigned char untouched = 0xff;  // a NaN in every format

struct Copy {
  void* to;
  const void* from;
  std::size_t bytes;
};

struct Thread {
  ucontext_t start{};
  jmp_buf resumption;
  bool started = false;
  std::unique_ptr<char[]> stack = std::make_unique<char[]>(stack_bytes);
  unsigned index = 0;
  bool done = false;
  // It waits until *counter is at least `target`.
  const long* counter = nullptr;
  long target = 0;
  long exchanges = 0, barriers = 0;
  std::vector<Copy> open_copies;
  std::deque<std::vector<Copy>> copy_groups;
};

/// Two exchanges of a warp can be in use: lanes read the last one while others have gone on to the next.
struct Warp {
  long arrivals = 0;
  const char* instruction[2] = {};
  std::byte values[2][warp_lanes * exchanged_bytes];
};

struct Block {
  std::vector<std::unique_ptr<Thread>> threads;  // of the largest block so far
  std::vector<Warp> warps;
  const std::function<void()>* kernel = nullptr;
  Thread* running = nullptr;
  jmp_buf scheduler;
  long count = 0, arrivals = 0, blocks = 0;
  std::string fault;
};

Block block;

// Contexts only begin a thread: to swap them takes a system call each time.
void pause() {
  if (_setjmp(block.running->resumption) == 0) _longjmp(block.scheduler, 1);
}
void go_on(Thread& thread) {
  if (_setjmp(block.scheduler) != 0) return;
  if (thread.started) _longjmp(thread.resumption, 1);
  thread.started = true;
  setcontext(&thread.start);
}

void wait_until(const long& counter, long target) {
  block.running->counter = &counter;
  block.running->target = target;
  if (counter < target) pause();
}

void run_thread() {
  (*block.kernel)();
  block.running->done = true;
  pause();
}

void prepare(Thread& thread, unsigned index) {
  thread.index = index;
  thread.done = false;
  thread.counter = nullptr;
  thread.exchanges = thread.barriers = 0;
  thread.open_copies.clear();
  thread.copy_groups.clear();
  thread.started = false;
  getcontext(&thread.start);
  thread.start.uc_stack.ss_sp = thread.stack.get();
  thread.start.uc_stack.ss_size = stack_bytes;
  makecontext(&thread.start, run_thread, 0);
}

/// Whether it got any further.
bool resume(Thread& thread) {
  if (thread.done || (thread.counter != nullptr && *thread.counter < thread.target)) return false;
  block.running = &thread;
  threadIdx = {thread.index, 0, 0};
  go_on(thread);
  if (!block.fault.empty()) throw std::runtime_error(block.fault);
  return true;
}

/// One turn for each lane.
template <class ThreadAt>
bool resume_warp(ThreadAt thread_at) {
  bool any = false;
  for (unsigned turn = 0; turn < warp_lanes; ++turn) any |= resume(thread_at(turn));
  return any;
}

}  // namespace

void run_block(unsigned threads, std::size_t shared_bytes, const std::function<void()>& kernel) {
  if (threads % warp_lanes != 0 || shared_bytes > most_shared_bytes) throw std::runtime_error("no such block");
  const auto bytes_of = [](auto* memory) { return reinterpret_cast<unsigned char*>(memory); };
  for (auto* const memory : {bytes_of(cuda::shared), bytes_of(cuda::dynamic)})
    std::memset(memory, untouched, shared_bytes + cuda::guard_bytes);
  block.kernel = &kernel;
  block.count = threads, block.arrivals = 0;
  block.fault.clear();
  block.warps.assign(threads / warp_lanes, {});
  while (block.threads.size() < threads) block.threads.push_back(std::make_unique<Thread>());
  for (unsigned i = 0; i < threads; ++i) prepare(*block.threads[i], i);

  const bool descending = block.blocks++ % 2 != 0;
  const auto thread_at = [&](unsigned turn) -> Thread& { return *block.threads[descending ? threads - 1 - turn : turn]; };
  bool any = true;
  while (any) {
    any = false;
    for (unsigned first = 0; first < threads; first += warp_lanes)
      while (resume_warp([&](unsigned turn) -> Thread& { return thread_at(first + turn); })) any = true;
  }
  for (unsigned i = 0; i < threads; ++i)
    if (!block.threads[i]->done) throw std::runtime_error("thread " + std::to_string(i) + " waits for one that does not come");
  for (const auto* const memory : {bytes_of(cuda::shared), bytes_of(cuda::dynamic)})
    if (std::any_of(memory + shared_bytes, memory + shared_bytes + cuda::guard_bytes,
                    [](unsigned char byte) { return byte != untouched; }))
      throw std::runtime_error("a block wrote behind its shared memory");
}

int own_lane() { return static_cast<int>(block.running->index % warp_lanes); }
void* shared_memory() { return cuda::shared; }

void block_barrier() {
  const long target = block.count * ++block.running->barriers;
  ++block.arrivals;
  wait_until(block.arrivals, target);
}

const std::byte* exchange_bytes(const char* instruction, const void* mine, std::size_t bytes) {
  Thread& thread = *block.running;
  Warp& warp = block.warps[thread.index / warp_lanes];
  const long turn = thread.exchanges++;
  const char*& agreed = warp.instruction[turn % 2];
  if (warp.arrivals == warp_lanes * turn) agreed = instruction;
  if ((agreed != instruction && std::strcmp(agreed, instruction) != 0) || bytes > exchanged_bytes) {
    block.fault = "lanes of a warp meet in " + std::string(agreed) + " and " + instruction;
    pause();
  }
  std::byte* const values = warp.values[turn % 2];
  std::memcpy(values + (thread.index % warp_lanes) * bytes, mine, bytes);
  ++warp.arrivals;
  wait_until(warp.arrivals, warp_lanes * (turn + 1));
  return values;
}

void copy_later(void* to, const void* from, std::size_t bytes) { block.running->open_copies.push_back({to, from, bytes}); }

void end_copy_group() {
  Thread& thread = *block.running;
  thread.copy_groups.push_back(std::move(thread.open_copies));
  thread.open_copies.clear();
}

void wait_for_copies(std::size_t pending) {
  auto& groups = block.running->copy_groups;
  for (; groups.size() > pending; groups.pop_front())
    for (const Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, copy.bytes);
}

}  // namespace gatedelta::emulation
