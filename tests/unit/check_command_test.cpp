// SPDX-License-Identifier: Apache-2.0
// gatedelta check must find a backend that is wrong, and say so with exit code 1.
#include <doctest/doctest.h>

#include <CLI/CLI.hpp>
#include <memory>
#include <string>

#include "faulty.hpp"
#include "tool/commands.hpp"

using namespace gatedelta;

namespace {

/// The exit code, by the rules of the tool's main().
int check(const std::string& options) {
  CLI::App app;
  tool::add_check_command(app);
  try {
    app.parse("check " + options);
  } catch (const CLI::RuntimeError& result) {
    return result.get_exit_code();
  }
  return 0;
}

}  // namespace

TEST_CASE("a wrong backend fails the check") {
  bool wrong = false;
  register_backend(std::make_unique<Faulty>([&](Backend& reference, const Call& call) {
    Call changed = call;
    if (wrong) changed.problem.config.scale = 1.001 * call.problem.config.effective_scale();
    reference.forward(changed);
  }));
  CHECK(check("--backend faulty --cases 10") == 0);
  wrong = true;
  CHECK(check("--backend faulty --cases 10") == 1);
  CHECK(check("--backend reference --against faulty --cases 10") == 1);
  unregister_backend("faulty");
}
