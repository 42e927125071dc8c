// SPDX-License-Identifier: Apache-2.0
// The command-line tool. Every failure is one line on stderr and exit code 2.
#include <CLI/CLI.hpp>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <exception>
#include <new>
#include <string>

#include "gatedelta/version.hpp"
#include "tool/commands.hpp"

namespace {

constexpr int failure = 2;

int fail(std::string message) {
  for (char& c : message)
    if (static_cast<unsigned char>(c) < 0x20) c = ' ';
  message.erase(message.find_last_not_of(' ') + 1);
  std::fprintf(stderr, "gatedelta: %s\n", message.c_str());
  return failure;
}

int run(int argc, char** argv) {
  CLI::App app("The gated delta rule on every backend", "gatedelta");
  app.require_subcommand(0, 1);  // checked below: CLI11 would ask for a subcommand before it names an unknown word
  app.set_version_flag("--version", gatedelta::version());
  gatedelta::tool::add_info_command(app);
  gatedelta::tool::add_run_command(app);
  gatedelta::tool::add_bench_command(app);
  gatedelta::tool::add_check_command(app);
  try {
    app.parse(argc, argv);  // runs the command
    if (app.get_subcommands().empty()) throw CLI::RequiredError("A subcommand");
  } catch (const CLI::Success& request) {
    app.exit(request);  // --help, --version
  } catch (const CLI::RuntimeError& result) {
    return result.get_exit_code();  // of a command that ran, and has said what it found
  } catch (const CLI::ParseError& error) {
    return fail(std::string(error.what()) + " (--help lists what there is)");
  }
  if (std::fflush(stdout) != 0) return fail(std::string("standard output: ") + std::strerror(errno));
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const std::bad_alloc&) {
    return fail("memory is exhausted");
  } catch (const std::exception& error) {
    return fail(error.what());
  }
}
