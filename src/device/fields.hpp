// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>

#include "gatedelta/operator.hpp"

namespace gatedelta::device {

struct Field {
  const char* name;
  TensorView Arguments::*view;
};

/// Every tensor of a call.
inline constexpr std::array<Field, 19> fields{{
    {"q", &Arguments::q},
    {"k", &Arguments::k},
    {"v", &Arguments::v},
    {"o", &Arguments::o},
    {"a", &Arguments::a},
    {"g", &Arguments::g},
    {"A_log", &Arguments::A_log},
    {"dt_bias", &Arguments::dt_bias},
    {"b", &Arguments::b},
    {"beta", &Arguments::beta},
    {"state", &Arguments::state},
    {"read_slots", &Arguments::read_slots},
    {"write_slots", &Arguments::write_slots},
    {"token_slots", &Arguments::token_slots},
    {"accepted", &Arguments::accepted},
    {"state_in", &Arguments::state_in},
    {"state_out", &Arguments::state_out},
    {"snapshots", &Arguments::snapshots},
    {"cu_seqlens", &Arguments::cu_seqlens},
}};

}  // namespace gatedelta::device
