// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "verify/case.hpp"
#include "verify/random.hpp"

namespace gatedelta::verify {

/// How many tokens a sequence has.
enum class Tokens { few, draft, many, mixed };

/// What the cases of a family concentrate on: probabilities of the features of the contract.
struct Family {
  const char* name;
  Tokens tokens;
  std::int64_t work;  ///< elements of state times tokens that most cases stay below; one in five is up to 30 times larger
  double varlen;      ///< cu_seqlens
  double pool;        ///< a state pool instead of state_in and state_out
  double snapshots;
  double token_slots;  ///< with a pool
  double padding;      ///< some rows and stores are padding
  double split;        ///< write_slots other than read_slots
  double layout;       ///< arbitrary strides, of each tensor
  double dtypes;       ///< every tensor with a dtype of its own
  /// As models call the operator: bfloat16, vectors everywhere, sizes and gates that backends have kernels of their own for.
  bool serving = false;
};

/// The families of random cases; "any" covers the whole contract.
std::span<const Family> families();
/// nullptr if there is none of this name.
const Family* find_family(std::string_view name);

/// Case `index` of a family. Nothing but the arguments has an influence. `rows_apart`: no row stores to a slot that another row
/// reads, which only the host backends admit.
Case make_case(const Family& family, std::uint64_t seed, std::int64_t index, bool rows_apart = false);

/// Draws the values of all tensors that are read, once shapes, layouts and slots are fixed.
void draw_values(Case& c, Random& random);

}  // namespace gatedelta::verify
