// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <vector>

#include "verify/case.hpp"

// The right answer of a case in float64 and how far from it an implementation may be. The recurrence here shares no code
// with the library's own reference backend, which is tested against it like every other backend.
namespace gatedelta::verify {

/// A part of an output that is judged by its own norm: all tokens of a row and head in o, one head of one slot in the state,
/// one head of one token in the snapshots.
struct Group {
  double l2_norm = 0;
  double l2_rounding = 0;    ///< ||round(golden) - golden||: what storing in the output's dtype costs at least
  double l2_float = 0;       ///< f32 term, see golden.cpp
  double largest = 0;        ///< max |golden|
  double element_float = 0;  ///< f32 term of one element

  double l2_limit() const { return 1.5 * l2_rounding + l2_float; }
};

struct Output {
  Tensor tensor = Tensor::o;
  std::vector<double> values;        ///< golden, row-major by index
  std::vector<std::uint8_t> stored;  ///< 1 where the call has to store, 0 where memory must stay as it is
  std::vector<std::int32_t> group;   ///< of each stored element; -1: exactly zero is expected (padding)
  std::vector<Group> groups;
};

struct Golden {
  std::vector<Output> outputs;  ///< o, then the state and snapshots where the call has them

  const Output* find(Tensor tensor) const;
};

Golden golden(const Case& c);
/// The same with all limits zero, for those who have their own.
Golden exact_answer(const Case& c);
/// Only what is stored, for questions that need no values.
Golden stores_of(const Case& c);
/// Half the distance of the numbers of `dtype` at `value`.
double half_ulp(DType dtype, double value);

}  // namespace gatedelta::verify
