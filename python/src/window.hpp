// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <string>
#include <vector>

#include "forward.hpp"
#include "gatedelta/gatedelta.hpp"

namespace gatedelta::python {

/// The replay windows of all layers of a model, in memory of the library that the states are of, and the states themselves.
class Windows {
 public:
  Windows(nb::handle states, std::int64_t k_heads, std::int64_t capacity, const std::string& entries, std::int64_t max_tokens,
          std::int64_t null_slot, Name backend, Stream stream);
  /// Windows in arrays of the caller's: `record` is (length, order), `layers` has (keys, corrections, decays) of each layer.
  /// Nothing is written. `capacity` is W.
  Windows(nb::handle states, nb::tuple record, nb::list layers, std::int64_t capacity, std::int64_t null_slot, Name backend);

  /// Throws unless there is such a layer.
  const ReplayWindow& layer(std::int64_t layer) const;
  nb::handle state(std::int64_t layer) const { return states_[static_cast<std::size_t>(layer)]; }

  void accept(nb::handle accepted, nb::handle slots, std::optional<std::int64_t> tokens, nb::handle cu_seqlens, nb::handle path,
              Stream stream) const;
  void reset(nb::handle slots, Stream stream) const;
  void fold(nb::handle slots, Stream stream) const;
  nb::object state_of(nb::handle slots, nb::object out, std::int64_t layer, Stream stream) const;
  void copy(nb::handle from, nb::handle to, Stream stream) const;

  std::int64_t layers() const { return static_cast<std::int64_t>(layers_.size()); }
  const WindowLayout& layout() const { return layout_; }

 private:
  /// Takes the states and makes the rule. Returns its configuration, and the first layer's state in `first`.
  Config configure(Arrays& arrays, nb::handle states, std::int64_t k_heads, std::int64_t null_slot, const Name& backend,
                   TensorView& first);
  /// Throws unless the state of a layer is like the first one.
  void require_like(Arrays& arrays, const TensorView& first, std::size_t layer) const;
  WindowRecord record() const { return layers_.front().record; }
  TensorView state_view(Arrays& arrays, std::size_t layer) const;

  std::vector<nb::object> states_, memory_;
  WindowLayout layout_;
  std::vector<ReplayWindow> layers_;
  std::optional<GatedDeltaRule> rule_;  // made once the states are known
};

/// Adds ReplayWindow to the module.
void define_windows(nb::module_& module);

}  // namespace gatedelta::python
