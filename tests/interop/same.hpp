// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <doctest/doctest.h>

#include <cstdint>
#include <vector>

#include "gatedelta/gatedelta.hpp"

namespace gatedelta {

/// Checks every part of a view.
inline void check_view(const TensorView& view, const void* data, DType dtype, const std::vector<std::int64_t>& shape,
                       const std::vector<std::int64_t>& strides, Device device = {}) {
  CHECK(view.data == data);
  CHECK(view.dtype == dtype);
  CHECK(view.device == device);
  REQUIRE(view.rank == static_cast<int>(shape.size()));
  for (int i = 0; i < view.rank; ++i) {
    CAPTURE(i);
    CHECK(view.shape[i] == shape[i]);
    CHECK(view.strides[i] == strides[i]);
  }
}

/// One token with unit vectors for key and query: o = sigmoid(b) v = v / 2, by tensors of any array library.
inline void check_step(const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& o,
                       const TensorView& b) {
  Config config{.q_heads = q.shape[2], .k_heads = k.shape[2], .v_heads = v.shape[2]};
  config.key_dim = q.shape[3], config.value_dim = v.shape[3];
  config.dtypes.q = q.dtype, config.dtypes.k = k.dtype, config.dtypes.v = v.dtype, config.dtypes.o = o.dtype;
  config.dtypes.beta = b.dtype;
  config.gate = GateForm::none;
  config.scale = 1.0;
  Arguments call;
  call.q = q, call.k = k, call.v = v, call.o = o, call.b = b;
  GatedDeltaRule(config, "reference").forward(call);
}

}  // namespace gatedelta
