// SPDX-License-Identifier: Apache-2.0
#include "gatedelta/error.hpp"
#include "platform.hpp"

namespace gatedelta::bench {

std::unique_ptr<Platform> make_cuda_platform() {
  throw Error(ErrorCode::unsupported, "bench: this program was built without CUDA");
}

}  // namespace gatedelta::bench
