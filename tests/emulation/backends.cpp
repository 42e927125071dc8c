// SPDX-License-Identifier: Apache-2.0
// Of the built-in backends, a program with the emulated device has cuda alone.
#include "core/builtin_backends.hpp"

namespace gatedelta {
namespace {

class Absent final : public Backend {
 public:
  explicit Absent(std::string_view name) : name_(name) {}
  std::string_view name() const noexcept override { return name_; }
  std::string description() const override { return "left out"; }
  Availability availability() const override { return {false, "not in a program with the emulated device"}; }
  bool reaches(Device) const noexcept override { return false; }
  std::string unsupported_reason(const Problem&) const override { return availability().reason; }
  void forward(const Call&) override {}
  void commit(const Config&, const CommitArguments&) override {}

 private:
  std::string_view name_;
};

}  // namespace

std::unique_ptr<Backend> make_cpu_backend() { return std::make_unique<Absent>("cpu"); }
std::unique_ptr<Backend> make_reference_backend() { return std::make_unique<Absent>("reference"); }

}  // namespace gatedelta
