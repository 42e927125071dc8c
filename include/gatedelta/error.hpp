// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdexcept>
#include <string>

#include "gatedelta/export.hpp"

namespace gatedelta {

/// What went wrong. The values are stable: the C interface returns the same numbers.
enum class ErrorCode : int {
  invalid_argument = 1,  ///< a tensor, slot, size or option is wrong; nothing was changed
  unsupported = 2,       ///< well formed, but no selected backend does it; the message has the reason
  out_of_memory = 3,     ///< a host or device allocation failed
  device = 4,            ///< the device reported an error, or a kernel met a bad slot
};

/// "invalid argument", "unsupported", "out of memory" or "device error".
GATEDELTA_API const char* name_of(ErrorCode code) noexcept;

/// The one exception type of the library. The message names the tensor or option, what was expected and what was found.
/// A call that throws it has changed nothing, except for `ErrorCode::device`, after which outputs are unspecified.
class GATEDELTA_API Error : public std::runtime_error {
 public:
  /// An error with a message for what().
  Error(ErrorCode code, const std::string& message);
  ~Error() override;
  /// What kind of error it is.
  ErrorCode code() const noexcept { return code_; }

 private:
  ErrorCode code_;
};

}  // namespace gatedelta
