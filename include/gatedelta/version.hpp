// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "gatedelta/export.hpp"

#define GATEDELTA_VERSION_MAJOR 0
#define GATEDELTA_VERSION_MINOR 1
#define GATEDELTA_VERSION_PATCH 0

namespace gatedelta {

/// The version of the library that is linked, e.g. "0.1.0".
GATEDELTA_API const char* version() noexcept;

}  // namespace gatedelta
