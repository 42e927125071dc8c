// SPDX-License-Identifier: Apache-2.0
#include "tool/machine.hpp"

#include <dlfcn.h>

#include <fstream>
#include <thread>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace gatedelta::tool {

std::string cpu_model() {
  std::ifstream in("/proc/cpuinfo");
  for (std::string line; std::getline(in, line);)
    if (line.starts_with("model name"))
      if (const std::size_t colon = line.find(": "); colon != std::string::npos) return line.substr(colon + 2);
  return "unknown";
}

std::string nvidia_driver() {
  // NVML comes with the driver, its interface is a stable C one; CUDA itself only knows which CUDA version the driver supports.
  void* library = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return {};
  const auto start = reinterpret_cast<int (*)()>(dlsym(library, "nvmlInit_v2"));
  const auto stop = reinterpret_cast<int (*)()>(dlsym(library, "nvmlShutdown"));
  const auto version = reinterpret_cast<int (*)(char*, unsigned)>(dlsym(library, "nvmlSystemGetDriverVersion"));
  char text[96] = {};
  if (start != nullptr && stop != nullptr && version != nullptr && start() == 0) {
    if (version(text, sizeof text - 1) != 0) text[0] = 0;
    stop();
  }
  dlclose(library);
  return text;
}

unsigned logical_cores() { return std::thread::hardware_concurrency(); }

#if defined(__x86_64__)

namespace {

enum Register { eax, ebx, ecx, edx };

// Register state that the operating system must save for the instructions to work: bits of XCR0.
constexpr unsigned long long no_state = 0, ymm = 0x6, zmm = 0xe6, tiles = 0x60000;

struct Feature {
  const char* name;
  unsigned leaf, subleaf;
  Register reg;
  int bit;
  unsigned long long state;
};

constexpr Feature features[] = {
    {"sse4.2", 1, 0, ecx, 20, no_state}, {"popcnt", 1, 0, ecx, 23, no_state}, {"avx", 1, 0, ecx, 28, ymm},
    {"f16c", 1, 0, ecx, 29, ymm},        {"fma", 1, 0, ecx, 12, ymm},         {"avx2", 7, 0, ebx, 5, ymm},
    {"avx_vnni", 7, 1, eax, 4, ymm},     {"avx512f", 7, 0, ebx, 16, zmm},     {"avx512dq", 7, 0, ebx, 17, zmm},
    {"avx512bw", 7, 0, ebx, 30, zmm},    {"avx512vl", 7, 0, ebx, 31, zmm},    {"avx512_vnni", 7, 0, ecx, 11, zmm},
    {"avx512_bf16", 7, 1, eax, 5, zmm},  {"avx512_fp16", 7, 0, edx, 23, zmm}, {"amx_tile", 7, 0, edx, 24, tiles},
    {"amx_bf16", 7, 0, edx, 22, tiles},  {"amx_int8", 7, 0, edx, 25, tiles},
};

__attribute__((target("xsave"))) unsigned long long saved_state() { return _xgetbv(0); }

}  // namespace

std::vector<std::string> cpu_features() {
  unsigned regs[4] = {};
  constexpr int osxsave = 27;
  const bool has_state = __get_cpuid(1, &regs[eax], &regs[ebx], &regs[ecx], &regs[edx]) && (regs[ecx] >> osxsave & 1u);
  const unsigned long long state = has_state ? saved_state() : 0;
  std::vector<std::string> out;
  for (const Feature& f : features)
    if (__get_cpuid_count(f.leaf, f.subleaf, &regs[eax], &regs[ebx], &regs[ecx], &regs[edx]) && (regs[f.reg] >> f.bit & 1u) &&
        (state & f.state) == f.state)
      out.push_back(f.name);
  return out;
}

#else

std::vector<std::string> cpu_features() { return {}; }

#endif

}  // namespace gatedelta::tool
