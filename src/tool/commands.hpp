// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace CLI {
class App;
}

// Each subcommand lives in a file of its own and adds itself to the application. A command that fails throws; main()
// turns that into one line on stderr and exit code 2.
namespace gatedelta::tool {

void add_info_command(CLI::App& app);
void add_run_command(CLI::App& app);
void add_bench_command(CLI::App& app);
void add_check_command(CLI::App& app);

}  // namespace gatedelta::tool
