// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <filesystem>
#include <string>

#include "model.hpp"

namespace textgen {

/// Replays a text whose bytes and logits are known ("greedy.safetensors" beside the model) and prints what was compared.
/// `backend` may be "all": every registered backend that is available. Returns whether all that is
/// required came true; throws for bad input, and if there was nothing to run.
bool check_known_text(const Model& model, const std::filesystem::path& known_path, const std::string& backend, int threads);

}  // namespace textgen
