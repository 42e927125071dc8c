// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <vector>

#include "verify/case.hpp"

namespace gatedelta::verify {

/// A call that must be refused.
struct BrokenCall {
  Case c;
  std::string tensor;  ///< the one that the message names
  std::string what;
  bool two_writers = false;  ///< two rows store to one slot: undefined, but no error, on a device
  bool by_value = false;     ///< only the values in device memory are wrong: a device backend cannot tell at the call
};

/// Every way in which `valid` can be broken by one change.
std::vector<BrokenCall> broken_calls(const Case& valid);

}  // namespace gatedelta::verify
