// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "gatedelta/macros.h"

namespace gatedelta {

/// The version of the library that is linked, e.g. "0.1.0".
GATEDELTA_API const char* version() noexcept;

}  // namespace gatedelta
