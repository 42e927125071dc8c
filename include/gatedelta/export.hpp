// SPDX-License-Identifier: Apache-2.0
#pragma once

/// GATEDELTA_API marks what the library exports; everything else is hidden.
#include "gatedelta/macros.h"
