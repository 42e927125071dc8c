// SPDX-License-Identifier: Apache-2.0
// gatedelta info: what this build can do on this machine.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <memory>
#include <nlohmann/json.hpp>

#include "device/memory.hpp"
#include "gatedelta/gatedelta.hpp"
#include "tool/commands.hpp"
#include "tool/machine.hpp"
#include "tool/support.hpp"

namespace gatedelta::tool {
namespace {

using Json = nlohmann::ordered_json;

#ifdef GATEDELTA_CUDA
/// What the library has for a device: machine code with the features of one architecture runs on that one alone, and the
/// driver compiles the PTX for later ones.
std::string code_for(const device::CudaDevice& gpu) {
  if (gpu.major == 9 && gpu.minor == 0) return "sm_90a machine code";
  if (gpu.major == 10 && gpu.minor == 0) return "sm_100a machine code";
  return gpu.major >= 9 ? "PTX of compute capability 9.0, compiled by the driver" : "none: too old";
}
#endif

Json collect() {
  Json backend_list = Json::array();
  for (const Backend* backend : backends()) {
    const Availability state = backend->availability();
    backend_list.push_back({{"name", backend->name()},
                            {"description", backend->description()},
                            {"available", state.available},
                            {"host_memory", backend->reaches(Device{})},
                            {"reason", state.reason}});
  }
  Json devices = Json::array();
  devices.push_back({{"device", "cpu"}, {"model", cpu_model()}, {"logical_cores", logical_cores()}});
  Json out = {{"version", version()}, {"backends", backend_list}, {"cpu_features", cpu_features()}};
#ifdef GATEDELTA_CUDA
  for (const device::CudaDevice& gpu : device::cuda_devices())
    devices.push_back({{"device", name_of(Device{DeviceType::cuda, static_cast<int>(devices.size()) - 1})},
                       {"model", gpu.name},
                       {"compute_capability", fmt::format("{}.{}", gpu.major, gpu.minor)},
                       {"multiprocessors", gpu.multiprocessors},
                       {"memory_gib", static_cast<double>(gpu.memory) / (1 << 30)},
                       {"code", code_for(gpu)}});
  const device::CudaVersions versions = device::cuda_versions();
  out["cuda"] = {{"runtime", versions.runtime}, {"driver_supports", versions.driver}, {"driver", nvidia_driver()}};
#endif
  out["devices"] = devices;
  return out;
}

void print_text(const Json& info) {
  const auto text = [](const Json& value) { return value.get<std::string>(); };
  fmt::print("gatedelta {}\n\nBackends, in the order in which auto tries them:\n", text(info["version"]));
  for (const Json& backend : info["backends"])
    fmt::print("  {:<12}{}{}\n", text(backend["name"]), text(backend["description"]),
               backend["available"].get<bool>() ? "" : fmt::format(" (unavailable: {})", text(backend["reason"])));
  fmt::print("\nCPU features:\n ");
  for (const Json& feature : info["cpu_features"]) fmt::print(" {}", text(feature));
  fmt::print("{}\n\nDevices:\n", info["cpu_features"].empty() ? " none that are known" : "");
  for (const Json& device : info["devices"]) {
    fmt::print("  {:<12}{}, ", text(device["device"]), text(device["model"]));
    if (device.contains("logical_cores"))
      fmt::print("{} logical cores\n", device["logical_cores"].get<unsigned>());
    else
      fmt::print("compute capability {}, {} multiprocessors, {:.0f} GiB, {}\n", text(device["compute_capability"]),
                 device["multiprocessors"].get<int>(), device["memory_gib"].get<double>(), text(device["code"]));
  }
  if (info.contains("cuda")) {
    const Json& cuda = info["cuda"];
    const std::string driver = text(cuda["driver"]), supports = text(cuda["driver_supports"]);
    fmt::print("\nCUDA:\n  runtime {}, driver {}{}\n", text(cuda["runtime"]),
               driver.empty() ? (supports.empty() ? "none found" : "of unknown release") : driver,
               supports.empty() ? "" : fmt::format(" (up to CUDA {})", supports));
  }
}

}  // namespace

void add_info_command(CLI::App& app) {
  CLI::App* command = app.add_subcommand("info", "Show the version, the backends, the CPU's features and the devices");
  const auto json = std::make_shared<bool>(false);
  CLI::Option* json_option = command->add_flag("--json", *json, "Print one JSON object");
  const auto support = std::make_shared<bool>(false);
  command->add_flag("--support", *support, "Print a table of what each backend of this build does")->excludes(json_option);
  command->callback([json, support] {
    if (*support) {
      fmt::print("{}", support_table());
      return;
    }
    const Json info = collect();
    if (*json)
      fmt::print("{}\n", info.dump(2, ' ', false, Json::error_handler_t::replace));
    else
      print_text(info);
  });
}

}  // namespace gatedelta::tool
