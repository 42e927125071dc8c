// SPDX-License-Identifier: Apache-2.0
// gatedelta info: what this build can do on this machine.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <memory>
#include <nlohmann/json.hpp>

#include "gatedelta/gatedelta.hpp"
#include "tool/commands.hpp"
#include "tool/machine.hpp"

namespace gatedelta::tool {
namespace {

using Json = nlohmann::ordered_json;

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
  return {{"version", version()}, {"backends", backend_list}, {"cpu_features", cpu_features()}, {"devices", devices}};
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
  for (const Json& device : info["devices"])
    fmt::print("  {:<12}{}, {} logical cores\n", text(device["device"]), text(device["model"]),
               device["logical_cores"].get<unsigned>());
}

}  // namespace

void add_info_command(CLI::App& app) {
  CLI::App* command = app.add_subcommand("info", "Show the version, the backends, the CPU's features and the devices");
  const auto json = std::make_shared<bool>(false);
  command->add_flag("--json", *json, "Print one JSON object");
  command->callback([json] {
    const Json info = collect();
    if (*json)
      fmt::print("{}\n", info.dump(2, ' ', false, Json::error_handler_t::replace));
    else
      print_text(info);
  });
}

}  // namespace gatedelta::tool
