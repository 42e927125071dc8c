/* SPDX-License-Identifier: Apache-2.0 */
#ifndef GATEDELTA_MACROS_H
#define GATEDELTA_MACROS_H

/** @file
 * What the C and the C++ interface share: the version of the headers, and the mark of what the library exports. */

#define GATEDELTA_VERSION_MAJOR 0 /**< of the headers; the library's own is gatedelta_version() */
#define GATEDELTA_VERSION_MINOR 1 /**< see GATEDELTA_VERSION_MAJOR */
#define GATEDELTA_VERSION_PATCH 0 /**< see GATEDELTA_VERSION_MAJOR */

/** Marks what the library exports; everything else is hidden. */
#if defined(GATEDELTA_STATIC) || !(defined(__GNUC__) || defined(__clang__))
#define GATEDELTA_API
#else
#define GATEDELTA_API __attribute__((visibility("default")))
#endif

#endif
