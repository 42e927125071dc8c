// SPDX-License-Identifier: Apache-2.0
#pragma once

/// Everything of the C++ interface.
#include "gatedelta/backend.hpp"
#include "gatedelta/dtype.hpp"
#include "gatedelta/error.hpp"
#include "gatedelta/operator.hpp"
#include "gatedelta/tensor.hpp"
#include "gatedelta/version.hpp"
#include "gatedelta/window.hpp"
