// SPDX-License-Identifier: Apache-2.0
#pragma once

/// Marks what the library exports; everything else is hidden.
#if defined(GATEDELTA_STATIC) || !(defined(__GNUC__) || defined(__clang__))
#define GATEDELTA_API
#else
#define GATEDELTA_API __attribute__((visibility("default")))
#endif
