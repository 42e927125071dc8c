// SPDX-License-Identifier: Apache-2.0
#include <benchmark/benchmark.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <fstream>
#include <new>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "gatedelta/error.hpp"
#include "limit_kernels.hpp"
#include "platform.hpp"
#include "tool/machine.hpp"

namespace gatedelta::bench {
namespace {

constexpr std::size_t alignment = 64;

const LimitKernels& best_limit_kernels() {
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx512f")) return limit_kernels_avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return limit_kernels_avx2;
#endif
  return limit_kernels_baseline;
}

/// Runs part(begin, end) on each of `threads` threads with a contiguous part of `count`, cut at multiples of `grain`.
template <class Part>
void for_parts(std::size_t count, std::size_t grain, int threads, const Part& part) {
  if (threads == 1) return part(std::size_t{0}, count);
#ifdef _OPENMP
  const std::size_t grains = (count + grain - 1) / grain;
#pragma omp parallel num_threads(threads)
  {
    const auto rank = static_cast<std::size_t>(omp_get_thread_num()), size = static_cast<std::size_t>(omp_get_num_threads());
    part(std::min(count, grains * rank / size * grain), std::min(count, grains * (rank + 1) / size * grain));
  }
#else
  static_cast<void>(grain);
  part(std::size_t{0}, count);
#endif
}

/// A few pages are not worth waking a thread.
int threads_for(std::size_t bytes, int threads) {
  return static_cast<int>(std::clamp<std::size_t>(bytes / 65536, 1, static_cast<std::size_t>(threads)));
}

template <class T, class Convert>
void fill_as(const TensorView& dense, const Normal& numbers, int threads, Convert convert) {
  T* data = static_cast<T*>(dense.data);
  const auto count = static_cast<std::size_t>(dense.elements());
  for_parts(count, alignment / sizeof(T), threads_for(count * sizeof(T), threads), [&](std::size_t begin, std::size_t end) {
    for (std::size_t i = begin; i < end; ++i) data[i] = convert(numbers(i));
  });
}

double seconds(int calls, const std::function<void()>& call) {
  const auto begin = std::chrono::steady_clock::now();
  for (int i = 0; i < calls; ++i) call();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

/// The number after `key` in a file of "key: value" lines, or -1.
double number_in(const char* path, const std::string& key) {
  std::ifstream file(path);
  for (std::string word; file >> word;)
    if (double value = 0; word == key && file >> value) return value;
  return -1;
}

class HostPlatform final : public Platform {
 public:
  Device device() const override { return {}; }

  std::string description() const override { return tool::cpu_model(); }

  double cache_bytes() const override {
    const benchmark::CPUInfo& cpu = benchmark::CPUInfo::Get();
    int level = 0;
    double bytes = 0;
    for (const auto& cache : cpu.caches) {
      if (cache.level < level || cache.type == "Instruction") continue;
      level = cache.level;
      const int copies = cache.num_sharing > 0 ? std::max(1, cpu.num_cpus / cache.num_sharing) : 1;
      bytes = static_cast<double>(cache.size) * copies;
    }
    return bytes > 0 ? bytes : 64e6;  // some virtual machines report none
  }

  double free_bytes() const override {
    const double available = number_in("/proc/meminfo", "MemAvailable:");
    if (available >= 0) return available * 1024;
    return static_cast<double>(sysconf(_SC_PHYS_PAGES)) * static_cast<double>(sysconf(_SC_PAGESIZE));
  }

  int default_threads() const override {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
  }

  std::shared_ptr<void> allocate(std::size_t bytes) override {
    constexpr std::align_val_t aligned{alignment};
    void* memory = ::operator new(bytes, aligned, std::nothrow);
    if (memory == nullptr) throw Error(ErrorCode::out_of_memory, "bench: cannot allocate " + std::to_string(bytes) + " bytes");
    return {memory, [](void* data) { ::operator delete(data, aligned); }};
  }

  void fill(const TensorView& dense, const Normal& numbers, int threads) override {
    if (dense.dtype == DType::f32) fill_as<float>(dense, numbers, threads, [](float x) { return x; });
    if (dense.dtype == DType::f16) fill_as<float16>(dense, numbers, threads, [](float x) { return to_float16(x); });
    if (dense.dtype == DType::bf16) fill_as<bfloat16>(dense, numbers, threads, [](float x) { return to_bfloat16(x); });
  }

  void copy_from_host(void* to, const void* from, std::size_t bytes) override { std::memcpy(to, from, bytes); }

  void copy(void* to, const void* from, std::size_t bytes, int threads) override {
    for_parts(bytes, alignment, threads_for(bytes, threads), [&](std::size_t begin, std::size_t end) {
      std::memcpy(static_cast<char*>(to) + begin, static_cast<const char*>(from) + begin, end - begin);
    });
  }

  std::function<double()> prepare(int calls, const std::function<void()>& call) override {
    return [calls, call] { return seconds(calls, call); };
  }

  double repetition_seconds() const override { return 1e-3; }

  std::int64_t interruptions() const override {
    rusage usage{};
    getrusage(RUSAGE_SELF, &usage);
    return usage.ru_nivcsw;
  }

  void move(const Traffic& traffic, int /*shape*/, int threads) override {
    // Any dtype's bytes are taken as float lanes. A lane is NaN or subnormal only where a state is or is exactly zero, so
    // 1*x + 0 runs at full speed and keeps every bit. The compiler must not know that it is 1 and 0.
    const float a = one_, b = zero_;
    for_parts(traffic.bytes / sizeof(float), alignment / sizeof(float), threads, [&](std::size_t begin, std::size_t end) {
      kernels_.scale_add(static_cast<float*>(traffic.write) + begin, end - begin, a, b);
    });
  }

  double measure_peak_flops(int threads) override {
    constexpr std::int64_t rounds = 200'000;  // 1 to 5 ms
    const float a = 1.0f - 0x1p-20f * one_, b = 0x1p-20f * one_;
    double best = 0;  // a peak: no moment in which something else ran counts
    for (int sample = 0; sample < 20; ++sample) {
      const double time = seconds(1, [&] {
        for_parts(static_cast<std::size_t>(threads), 1, threads, [&](std::size_t begin, std::size_t end) {
          for (std::size_t i = begin; i < end; ++i) {
            volatile float keep = kernels_.multiply_add(rounds, a, b);
            static_cast<void>(keep);
          }
        });
      });
      best = std::max(best, static_cast<double>(kernels_.flops_per_round * rounds * threads) / time);
    }
    return best;
  }

  std::string limit_description() const override { return kernels_.name; }

 private:
  const LimitKernels& kernels_ = best_limit_kernels();
  volatile float one_ = 1, zero_ = 0;
};

}  // namespace

std::unique_ptr<Platform> make_host_platform() { return std::make_unique<HostPlatform>(); }

}  // namespace gatedelta::bench
