// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>
#include <utility>

#include "gatedelta/gatedelta.hpp"

/// A backend for tests of the tests: it gets the reference and does something wrong with it.
class Faulty final : public gatedelta::Backend {
 public:
  using Forward = std::function<void(gatedelta::Backend& reference, const gatedelta::Call& call)>;
  explicit Faulty(Forward forward) : forward_(std::move(forward)) {}

  std::string_view name() const noexcept override { return "faulty"; }
  std::string description() const override { return "for tests"; }
  gatedelta::Availability availability() const override { return {true, {}}; }
  bool reaches(gatedelta::Device device) const noexcept override { return device == gatedelta::Device{}; }
  std::string unsupported_reason(const gatedelta::Problem& problem) const override {
    return problem.window ? "replay windows are left out" : "";
  }
  void forward(const gatedelta::Call& call) override { forward_(*gatedelta::find_backend("reference"), call); }
  void commit(const gatedelta::Config&, const gatedelta::CommitArguments&) override {}

 private:
  Forward forward_;
};
