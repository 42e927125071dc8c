// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <vector>

// What the tool says about the machine it runs on.
namespace gatedelta::tool {

std::string cpu_model();
unsigned logical_cores();
/// The instruction sets that matter here and that processor and operating system both support.
std::vector<std::string> cpu_features();
/// The release of the NVIDIA driver, "580.95.05"; empty where there is none.
std::string nvidia_driver();

}  // namespace gatedelta::tool
