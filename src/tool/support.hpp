// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

namespace gatedelta::tool {

/// What the backends of this build say of calls with each feature, as a Markdown table: a line for each feature, a column for
/// each backend. They are asked whether they do a call, not whether they can run on this machine.
std::string support_table();

}  // namespace gatedelta::tool
