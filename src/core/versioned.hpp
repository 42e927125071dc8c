// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

#include "gatedelta/error.hpp"

namespace gatedelta {

/// Reads a C struct whose first member is its size in the caller's version. What is missing at the end keeps the value in
/// `defaults`; bytes beyond what this library knows must be zero.
template <class Struct>
Struct read_versioned(const char* name, const Struct* given, const Struct& defaults) {
  static_assert(std::is_trivially_copyable_v<Struct> && std::is_same_v<decltype(Struct::size), std::uint64_t>);
  if (given == nullptr) throw Error(ErrorCode::invalid_argument, std::string(name) + ": expected a struct, got a null pointer");
  std::uint64_t size = 0;
  std::memcpy(&size, given, sizeof size);
  // A size that is none of a released struct is an uninitialised one; 64 KiB bounds what is then read.
  if (size < sizeof size || size % alignof(Struct) != 0 || size > 65536)
    throw Error(ErrorCode::invalid_argument, std::string(name) + ": expected in its first member the struct's size (" +
                                                 std::to_string(sizeof(Struct)) + " in this version), got " +
                                                 std::to_string(size));
  const std::size_t known = std::min<std::size_t>(size, sizeof(Struct));
  const auto* bytes = reinterpret_cast<const unsigned char*>(given);
  if (std::any_of(bytes + known, bytes + size, [](unsigned char byte) { return byte != 0; }))
    throw Error(ErrorCode::unsupported, std::string(name) + ": options beyond the " + std::to_string(known) +
                                            " bytes that this version of the library knows are set; it is older than the "
                                            "program that calls it");
  Struct out = defaults;
  std::memcpy(&out, given, known);
  out.size = sizeof(Struct);
  return out;
}

/// Fills the caller's version of a struct, `size` bytes, with defaults; zero beyond what this library knows.
template <class Struct>
void init_versioned(const char* name, Struct* out, std::size_t size, const Struct& defaults) {
  if (out == nullptr) throw Error(ErrorCode::invalid_argument, std::string(name) + ": expected a struct, got a null pointer");
  if (size < sizeof(std::uint64_t) || size % alignof(Struct) != 0 || size > 65536)
    throw Error(ErrorCode::invalid_argument, std::string(name) + ": expected the struct's size (" +
                                                 std::to_string(sizeof(Struct)) + " in this version), got " +
                                                 std::to_string(size));
  const std::uint64_t stored = size;
  std::memset(static_cast<void*>(out), 0, size);
  std::memcpy(static_cast<void*>(out), &defaults, std::min(size, sizeof(Struct)));
  std::memcpy(static_cast<void*>(out), &stored, sizeof stored);
}

}  // namespace gatedelta
