// SPDX-License-Identifier: Apache-2.0
// The table of what backends do: it has what they say, whatever that is.
#include "tool/support.hpp"

#include <doctest/doctest.h>

#include <string>

#include "gatedelta/gatedelta.hpp"

using namespace gatedelta;

namespace {

class Choosy final : public Backend {
 public:
  std::string_view name() const noexcept override { return "choosy"; }
  std::string description() const override { return "does little"; }
  Availability availability() const override { return {false, "is not here"}; }
  bool reaches(Device device) const noexcept override { return device == Device{}; }
  std::string unsupported_reason(const Problem& problem) const override {
    if (problem.snapshots) return "no snapshots";
    return problem.config.dtypes.q == DType::f16 || problem.config.dtypes.state == DType::bf16 ? "only f32 states" : "";
  }
  void forward(const Call&) override {}
  void commit(const Config&, const CommitArguments&) override {}
};

}  // namespace

TEST_CASE("the table of supported features has what the backends say") {
  register_backend(std::make_unique<Choosy>());
  const std::string table = tool::support_table();
  unregister_backend("choosy");
  CHECK(table.find("| | `choosy` | ") == 0);
  CHECK(table.find("\n| one token | f32, bf16 with f32 states; else no: only f32 states | ") != std::string::npos);
  CHECK(table.find("\n| `snapshots`, 4 tokens | no: no snapshots | ") != std::string::npos);
  const std::string rest = tool::support_table();
  CHECK(rest.find("choosy") == std::string::npos);
  CHECK(rest.find("| `reference` |\n") != std::string::npos);
}
