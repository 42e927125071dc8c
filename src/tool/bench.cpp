// SPDX-License-Identifier: Apache-2.0
#include <fmt/chrono.h>
#include <fmt/format.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstdio>
#include <ctime>
#include <fstream>
#include <iterator>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>

#include "bench/harness.hpp"
#include "bench/platform.hpp"
#include "bench/workload.hpp"
#include "commit.hpp"
#include "device/memory.hpp"
#include "gatedelta/gatedelta.hpp"
#include "io/pending_file.hpp"
#include "tool/commands.hpp"

namespace gatedelta::tool {
namespace {

using bench::Case;
using bench::Mode;
using bench::Op;
using bench::Timing;
using nlohmann::ordered_json;

[[noreturn]] void fail(const std::string& message) { throw Error(ErrorCode::invalid_argument, message); }

struct Options {
  std::string op, device, mode = "update";
  std::vector<std::string> backends{""};
  std::vector<std::int64_t> batches, tokens;
  std::string heads = "16/32";
  std::int64_t key_dim = 128, value_dim = 0;
  std::vector<std::string> dtypes{"bf16"}, states{"f32"};
  std::string layout = "vk";
  std::vector<int> threads;
  bool warm = false, dependent = false, traffic = false;
  std::string slots = "shuffled";
  std::int64_t window = 0, accepted = 0, layers = 36;
  bool tree = false;
  std::string entries = "bf16";
  bench::Effort effort;
  double max_memory_mib = 3072;
  int host_calls = 1000;
  std::string json;
};

DType dtype_of(const std::string& option, const std::string& name) {
  const std::optional<DType> dtype = dtype_from_name(name);
  if (!dtype || !is_floating(*dtype)) fail(option + ": expected f32, f16 or bf16, got \"" + name + "\"");
  return *dtype;
}

/// "16/32" or "16": query (and key) heads, value heads.
void parse_heads(const std::string& text, Case& item) {
  const auto count = [&](std::string_view digits) {
    std::int64_t value = 0;
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
    if (error != std::errc{} || end != digits.data() + digits.size() || value < 1 || value > 512)
      fail("--heads: expected query/value heads of 1 to 512 each, like 16/32, got \"" + text + "\"");
    return value;
  };
  const std::string_view all = text;
  const std::size_t slash = all.find('/');
  item.q_heads = count(all.substr(0, slash));
  item.v_heads = slash == std::string_view::npos ? item.q_heads : count(all.substr(slash + 1));
}

Mode mode_of(const std::string& name) {
  for (const Mode mode : {Mode::update, Mode::snapshots, Mode::read_only})
    if (name == name_of(mode)) return mode;
  return Mode::token_slots;
}

/// What to run when no operation is named: the rows by which the backends of a device are judged.
std::vector<Case> default_cases(const Case& base, DeviceType device) {
  std::vector<Case> out;
  const auto add = [&](Op op, std::int64_t batch, std::int64_t tokens, DType dtype, DType state, bool warm,
                       Mode mode = Mode::update) {
    Case item = base;
    item.op = op;
    item.mode = mode;
    item.batch = batch;
    item.tokens = tokens;
    item.dtype = dtype;
    item.state_dtype = state;
    item.warm = warm;
    out.push_back(item);
  };
  if (device == DeviceType::cuda) {
    for (const DType state : {DType::bf16, DType::f32})
      for (const std::int64_t batch : {1, 4, 16, 64, 256}) add(Op::decode, batch, 1, DType::bf16, state, false);
    for (const Mode mode : {Mode::update, Mode::snapshots, Mode::read_only, Mode::token_slots})
      for (const std::int64_t tokens : {4, 8}) add(Op::verify, 64, tokens, DType::bf16, DType::bf16, false, mode);
    add(Op::prefill, 1, 2048, DType::bf16, DType::f32, false);
    return out;
  }
  for (const DType state : {DType::f32, DType::bf16, DType::f16}) add(Op::decode, 16, 1, DType::bf16, state, false);
  add(Op::decode, 1, 1, DType::bf16, DType::f32, true);
  for (const std::int64_t tokens : {4, 8}) add(Op::verify, 16, tokens, DType::bf16, DType::f32, false);
  for (const DType dtype : {DType::f32, DType::bf16}) add(Op::prefill, 1, 2048, dtype, DType::f32, false);
  return out;
}

std::vector<Case> named_cases(const Options& options, const Case& base) {
  const Op op = options.op == "decode" ? Op::decode : options.op == "verify" ? Op::verify : Op::prefill;
  std::vector<std::int64_t> batches = options.batches, tokens = options.tokens;
  if (batches.empty()) batches = {op == Op::prefill ? 1 : 16};
  if (tokens.empty() && op == Op::decode) tokens = {1};
  if (tokens.empty() && op == Op::verify) tokens = {4, 8};
  if (tokens.empty() && op == Op::prefill) tokens = {2048};
  if (op == Op::decode && tokens != std::vector<std::int64_t>{1})
    fail("--tokens: decode has 1 token a call, use --op verify or prefill for more");
  std::vector<Case> out;
  for (const std::string& state : options.states)
    for (const std::string& dtype : options.dtypes)
      for (const std::int64_t batch : batches)
        for (const std::int64_t count : tokens) {
          Case item = base;
          item.op = op;
          item.mode = mode_of(options.mode);
          item.batch = batch;
          item.tokens = count;
          item.dtype = dtype_of("--dtype", dtype);
          item.state_dtype = dtype_of("--state", state);
          item.warm = options.warm;
          item.dependent = options.dependent;
          item.ordered = options.slots == "ordered";
          item.window = options.window;
          item.entries = dtype_of("--entries", options.entries);
          item.tree = options.tree;
          const std::int64_t longest = item.tree ? static_cast<std::int64_t>(item.longest_path().size()) : count;
          item.accepted = options.accepted > 0 ? options.accepted : longest;
          item.layers = options.layers;
          if (item.window > 0 && (count > item.window || item.accepted > longest))
            fail("--accepted: expected at most the tokens of a call or of its tree's paths, and a call's at most the window");
          out.push_back(item);
        }
  return out;
}

std::vector<Case> cases_of(const Options& options, const bench::Platform& platform) {
  Case base;
  parse_heads(options.heads, base);
  base.key_dim = options.key_dim;
  base.value_dim = options.value_dim > 0 ? options.value_dim : options.key_dim;
  base.value_last = options.layout == "kv";
  std::vector<int> threads = options.threads;
  if (threads.empty()) threads = {platform.default_threads()};
  std::vector<Case> out;
  for (Case& item : options.op.empty() ? default_cases(base, platform.device().type) : named_cases(options, base))
    for (const int count : threads) {
      item.threads = count;
      out.push_back(item);
    }
  return out;
}

/// Written at once and completely, or not at all. Without text: finds out whether that is possible.
void save(const std::string& path, const std::string& text) {
  if (path.empty()) return;
  try {
    io::PendingFile file(path);
    file.write(text.data(), text.size());
    if (!text.empty()) file.commit();
  } catch (const Error& error) {
    fail("--json: " + path + " cannot be written: " + error.what());
  }
}

/// A line on a terminal that the next one overwrites; silent in a pipe.
class Progress {
 public:
  void show(const std::string& text) const {
    if (terminal_) fmt::print(stderr, "\r{}\x1b[K", text);
  }
  void clear() const { show(""); }

 private:
  bool terminal_ = isatty(STDERR_FILENO) != 0;
};

struct Job {
  Case item;
  std::vector<Backend*> backends;
  bench::Rotation rotation;
  std::size_t workspace_size = 0;  // of the backend that needs most
};

/// The named device, or else that of the first backend that is named.
std::unique_ptr<bench::Platform> make_platform(const Options& options) {
  std::string device = options.device;
  if (device.empty()) device = device::memory_for_name(options.backends.front()).device() == Device{} ? "cpu" : "cuda";
  return device == "cuda" ? bench::make_cuda_platform() : bench::make_host_platform();
}

/// Everything that can be wrong is found here, before the first measurement.
std::vector<Job> plan(const Options& options, const bench::Platform& platform) {
  std::vector<Job> jobs;
  for (const Case& item : cases_of(options, platform)) {
    if (item.mode != Mode::update && platform.device().type == DeviceType::cpu)
      fail(fmt::format("--mode: on the host there is a limit for update only, got {}", name_of(item.mode)));
    if (item.mode != Mode::update && item.window > 0)
      fail(fmt::format("--window: expected mode update, got {}", name_of(item.mode)));
    Job job{item, {}, {}, 0};
    ReplayWindow window;
    const Arguments shapes = bench::shapes_of(item, platform.device(), window);
    for (const std::string& name : options.backends) {
      const GatedDeltaRule rule(item.config(), name);
      job.backends.push_back(&rule.backend_for(shapes));
      job.workspace_size = std::max(job.workspace_size, rule.workspace_size(shapes));
    }
    job.rotation = bench::plan_rotation(item, platform, options.max_memory_mib * 1048576);
    jobs.push_back(std::move(job));
  }
  return jobs;
}

/// What the machine could do a case in, in seconds.
struct Limit {
  const Timing& memory;  ///< to read and write the states, and nothing else
  double interruptions_per_second = 0;
  double peak_flops = 0;  ///< 0: not a matter of arithmetic
  double arithmetic = 0;

  double seconds() const { return std::max(memory.median(), arithmetic); }
  const char* bound() const { return memory.median() >= arithmetic ? "memory" : "arithmetic"; }
};

struct Result {
  const Case& item;
  const Backend& backend;
  const bench::Rotation& rotation;
  const Timing& timing;
  const Limit& limit;
  const std::optional<Timing>& traffic;  ///< of all traffic of the call, and nothing else
  const std::optional<Timing>& host;     ///< of the call alone, where its work goes on after it
  bool window = false;                   ///< the calls of this row have the case's window

  std::string_view mode() const { return window ? item.tree ? "replay-tree" : "replay" : name_of(item.mode); }

  double gigabytes() const {
    return 1e-9 * static_cast<double>((1 + item.stores())) * static_cast<double>(item.state_bytes()) / timing.median();
  }
  double gigaflops() const { return 1e-9 * item.flops() / timing.median(); }
  /// Something else was running: the calls were interrupted often, or the times of the limit itself lie far apart.
  bool noisy() const {
    return limit.interruptions_per_second > 20 || limit.memory.quantile(0.9) > 2 * limit.memory.quantile(0.1);
  }
  double ratio() const { return limit.seconds() / timing.median(); }
  const char* cache() const { return item.warm ? "warm" : rotation.cold ? "cold" : "mixed"; }
};

void print_head() {
  fmt::print(
      "{:<10} {:<18} {:>5} {:>6} {:>7} {:>9} {:>5} {:>8} {:>6} {:>4} {:>11} {:>8} {:>8} {:>11} {:>6}  {:>10} {:>7}  {}\n",
      "backend", "op", "B", "T", "heads", "KxV", "io", "state", "cache", "thr", "median us", "GB/s", "GFLOP/s", "limit us",
      "ratio", "traffic us", "host us", "p10..p90 us");
}

void print_row(const Result& row) {
  const Case& item = row.item;
  // Times on a device go down to microseconds.
  const int digits = row.host ? 2 : 1;
  fmt::print(
      "{:<10} {:<18} {:>5} {:>6} {:>7} {:>9} {:>5} {:>8} {:>6} {:>4} {:>11.{}f} {:>8.2f} {:>8.2f} {:>11.{}f} {:>6.3f}{} {:>8} "
      "{:>7}  "
      "{:.{}f}..{:.{}f}\n",
      row.backend.name(),
      row.mode() == "update" ? std::string(name_of(item.op)) : fmt::format("{} {}", name_of(item.op), row.mode()), item.batch,
      item.tokens, fmt::format("{}/{}", item.q_heads, item.v_heads), fmt::format("{}x{}", item.key_dim, item.value_dim),
      name_of(item.dtype), fmt::format("{}{}", name_of(item.state_dtype), item.value_last ? " kv" : ""), row.cache(),
      item.threads, row.timing.median() * 1e6, digits, row.gigabytes(), row.gigaflops(), row.limit.seconds() * 1e6, digits,
      row.ratio(), row.noisy() ? '!' : ' ', row.traffic ? fmt::format("{:.2f}", row.traffic->median() * 1e6) : "-",
      row.host ? fmt::format("{:.2f}", row.host->median() * 1e6) : "-", row.timing.quantile(0.1) * 1e6, digits,
      row.timing.quantile(0.9) * 1e6, digits);
  std::fflush(stdout);
}

/// The command as it was typed, without the path of the program; empty where the system does not tell.
std::string command_line() {
  std::ifstream file("/proc/self/cmdline", std::ios::binary);
  std::string text((std::istreambuf_iterator<char>(file)), {});
  while (!text.empty() && text.back() == '\0') text.pop_back();
  std::replace(text.begin(), text.end(), '\0', ' ');
  return text.substr(text.rfind('/', text.find(' ')) + 1);
}

ordered_json json_of(const Result& row, const bench::Platform& platform, const std::string& date, double first_call) {
  const Case& item = row.item;
  ordered_json out = {{"backend", row.backend.name()},
                      {"device", name_of(platform.device())},
                      {"op", name_of(item.op)},
                      {"mode", row.mode()},
                      {"batch", item.batch},
                      {"tokens", item.tokens},
                      {"q_heads", item.q_heads},
                      {"v_heads", item.v_heads},
                      {"key_dim", item.key_dim},
                      {"value_dim", item.value_dim},
                      {"dtype", name_of(item.dtype)},
                      {"state_dtype", name_of(item.state_dtype)},
                      {"median_us", row.timing.median() * 1e6},
                      {"limit_us", row.limit.seconds() * 1e6},
                      {"ratio", row.ratio()},
                      {"threads", item.threads},
                      {"layout", item.value_last ? "kv" : "vk"},
                      {"cache", row.cache()},
                      {"instances", row.rotation.instances},
                      {"instance_bytes", row.rotation.instance_bytes},
                      {"noisy", row.noisy()},
                      {"interruptions_per_second", row.limit.interruptions_per_second},
                      {"bound", row.limit.bound()},
                      {"memory_limit_us", row.limit.memory.median() * 1e6},
                      {"memory_limit_p10_us", row.limit.memory.quantile(0.1) * 1e6},
                      {"memory_limit_p90_us", row.limit.memory.quantile(0.9) * 1e6},
                      {"peak_gflops", row.limit.peak_flops * 1e-9},
                      {"gbps", row.gigabytes()},
                      {"gflops", row.gigaflops()},
                      {"min_us", row.timing.quantile(0) * 1e6},
                      {"p10_us", row.timing.quantile(0.1) * 1e6},
                      {"p90_us", row.timing.quantile(0.9) * 1e6},
                      {"max_us", row.timing.quantile(1) * 1e6},
                      {"repetitions", row.timing.repetitions()},
                      {"description", row.backend.description()},
                      {"hardware", platform.description()},
                      {"limit_variant", platform.limit_description()},
                      {"version", version()},
                      {"commit", GATEDELTA_COMMIT},
                      {"command", command_line()},
                      {"date", date}};
  if (row.traffic) out["traffic_us"] = row.traffic->median() * 1e6;
  if (item.dependent) out["dependent"] = true;
  if (item.ordered) out["slots"] = "ordered";
  if (row.window) {
    out["window"] = item.window;
    out["entries"] = name_of(item.entries);
    out["accepted"] = item.accepted;
    out["layers"] = item.layers;
  }
  out["calls_per_repetition"] = row.timing.calls();
  out["memory_limit_calls_per_repetition"] = row.limit.memory.calls();
  out["first_call_ms"] = first_call * 1e3;
  if (row.host) {
    out["host_us"] = row.host->median() * 1e6;
    out["host_p10_us"] = row.host->quantile(0.1) * 1e6;
    out["host_p90_us"] = row.host->quantile(0.9) * 1e6;
  }
  for (const auto& [name, value] : platform.facts()) out[name] = value;
  return out;
}

double seconds_of(const std::function<void()>& work) {
  const auto begin = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

/// Which of these is the fastest.
std::size_t fastest(bench::Platform& platform, const std::vector<std::function<void()>>& moves, const bench::Effort& effort) {
  if (moves.size() == 1) return 0;
  bench::Effort short_effort = effort;
  short_effort.repetitions = 7;
  const bench::Measurement measured = bench::measure(platform, moves, short_effort);
  const auto best = std::min_element(measured.timings.begin(), measured.timings.end(),
                                     [](const Timing& a, const Timing& b) { return a.median() < b.median(); });
  return static_cast<std::size_t>(best - measured.timings.begin());
}

/// The fastest way to do a case's traffic alone.
std::function<void()> best_move(bench::Platform& platform, bench::Workload& workload, const Case& item,
                                const bench::Effort& effort) {
  std::vector<std::function<void()>> moves;
  for (int shape = 0; shape < platform.move_shapes(); ++shape)
    moves.emplace_back([&, shape] { platform.move(workload.traffic(workload.next()), shape, item.threads); });
  return moves[fastest(platform, moves, effort)];
}

/// A cycle of calls with a window, each on the next arguments, with the accepts that follow them.
template <class Call>
std::function<void()> cycle_of(bench::Workload& workload, const Case& item, const GatedDeltaRule& rule, Call call) {
  return [&workload, rule, call, layers = item.layers, cycle = item.cycle()] {
    for (std::int64_t i = 1; i <= cycle; ++i) {
      Arguments arguments = workload.next();
      // Behind an accept the record would be read too early.
      arguments.dependent_launch = arguments.dependent_launch && (i - 1) % layers != 0;
      call(arguments);
      if (i % layers == 0) rule.accept(workload.accept(arguments));
    }
  };
}

/// The arguments of a call that has no window.
Arguments without_window(Arguments arguments) {
  arguments.window = nullptr, arguments.parent = {};
  return arguments;
}

/// The fastest ways to do all traffic of a case's calls, of those with its window first, if it has one. None on platforms that
/// do not know any.
std::vector<std::function<void()>> best_call_moves(bench::Platform& platform, bench::Workload& workload, const Case& item,
                                                   const GatedDeltaRule& rule, const bench::Effort& effort) {
  std::vector<std::function<void()>> out;
  for (int form = item.window > 0 ? 0 : 1; form < 2; ++form) {
    const auto traffic = [&workload, form] {
      const Arguments& arguments = workload.next();
      return workload.call_traffic(form == 0 ? arguments : without_window(arguments));
    };
    std::vector<int> shapes;
    std::vector<std::function<void()>> moves;
    for (int shape = 0; shape < platform.call_shapes(); ++shape) {
      if (!platform.move_call(traffic(), shape)) continue;
      shapes.push_back(shape);
      moves.emplace_back([&platform, traffic, shape] { platform.move_call(traffic(), shape); });
    }
    if (moves.empty()) return {};
    const std::size_t best = fastest(platform, moves, effort);
    if (form == 1)
      out.push_back(moves[best]);
    else
      out.push_back(cycle_of(workload, item, rule, [&platform, &workload, shape = shapes[best]](const Arguments& arguments) {
        platform.move_call(workload.call_traffic(arguments), shape);
      }));
  }
  return out;
}

void run(const Options& options) {
  const std::unique_ptr<bench::Platform> platform = make_platform(options);
  const std::vector<Job> jobs = plan(options, *platform);
  save(options.json, {});  // before the run, not after minutes
  const std::string date = fmt::format("{:%Y-%m-%dT%H:%M:%SZ}", fmt::gmtime(std::time(nullptr)));
  const Progress progress;

  fmt::print("{}; last-level cache {:.0f} MiB; limits use {}\n", platform->description(), platform->cache_bytes() / 1048576,
             platform->limit_description());
  print_head();
  ordered_json results = ordered_json::array();
  std::map<int, double> peak_flops;  // by threads
  double first_call = 0;
  for (std::size_t i = 0; i < jobs.size(); ++i) {
    const Job& job = jobs[i];
    const Case& item = job.item;
    progress.show(fmt::format("[{}/{}] {} B={} T={} {} state, {} threads, {} x {:.0f} MiB", i + 1, jobs.size(),
                              name_of(item.op), item.batch, item.tokens, name_of(item.state_dtype), item.threads,
                              job.rotation.instances, static_cast<double>(job.rotation.instance_bytes) / 1048576));
    bench::Workload workload(item, *platform, job.rotation, job.workspace_size);
    platform->wait();
    std::vector<std::function<void()>> subjects;
    // With a window each backend is timed without it as well. A cycle of calls with it is one subject: its folds belong to all.
    for (Backend* backend : job.backends) {
      const GatedDeltaRule rule(item.config(), *backend);
      if (item.window > 0)
        subjects.push_back(cycle_of(workload, item, rule, [rule](const Arguments& arguments) { rule.forward(arguments); }));
      subjects.emplace_back([&workload, rule] { rule.forward(without_window(workload.next())); });
    }
    const std::size_t forms = item.window > 0 ? 2 : 1;
    const auto calls_of = [&](std::size_t subject) { return forms == 2 && subject % 2 == 0 ? item.cycle() : 1; };
    if (i == 0)
      first_call = seconds_of([&] {
        subjects[0]();
        platform->wait();
      });
    bench::Effort effort = options.effort;
    effort.warm = item.warm;
    effort.least_calls = platform->move_shapes() > 1 ? job.rotation.instances : 1;
    const std::size_t first_traffic = subjects.size();
    if (options.traffic)
      for (auto& move :
           best_call_moves(*platform, workload, item, GatedDeltaRule(item.config(), *job.backends.front()), effort))
        subjects.push_back(std::move(move));
    const bool has_traffic = subjects.size() > first_traffic;
    subjects.push_back(best_move(*platform, workload, item, effort));
    const bench::Measurement measured = bench::measure(*platform, subjects, effort);
    std::vector<std::optional<Timing>> host;
    for (std::size_t s = 0; s < forms * job.backends.size(); ++s) {
      std::vector<double> times = platform->enqueue_seconds(options.host_calls, subjects[s]);
      host.push_back(times.empty() ? std::nullopt : std::optional(Timing(std::move(times)).of_each(calls_of(s))));
      job.backends[s / forms]->synchronize(platform->stream());  // a call that met a fault has not done its work
    }

    Limit limit{measured.timings.back(), measured.interruptions_per_second};
    // Matrix units of a GPU do a few tokens' arithmetic much faster than the rate that is measured.
    if (item.op == Op::prefill || (item.op == Op::verify && platform->device().type == DeviceType::cpu)) {
      const auto [peak, missing] = peak_flops.try_emplace(item.threads);
      if (missing) peak->second = platform->measure_peak_flops(item.threads);
      limit.peak_flops = peak->second;
      limit.arithmetic = item.flops() / limit.peak_flops;
    }
    progress.clear();
    for (std::size_t s = 0; s < forms * job.backends.size(); ++s) {
      const Timing timing = measured.timings[s].of_each(calls_of(s));
      const std::optional<Timing> traffic =
          has_traffic ? std::optional(measured.timings[first_traffic + s % forms].of_each(calls_of(s))) : std::nullopt;
      const Result row{item, *job.backends[s / forms], job.rotation, timing, limit, traffic, host[s], forms == 2 && s % 2 == 0};
      print_row(row);
      results.push_back(json_of(row, *platform, date, first_call));
    }
  }
  fmt::print("the first call of the process took {:.2f} ms\n", first_call * 1e3);
  save(options.json, results.dump(1) + "\n");
}

}  // namespace

void add_bench_command(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand("bench", "Time backends against the limits of the machine");
  CLI::Option* op = command->add_option("--op", options->op, "decode, verify or prefill; without it a default set of rows")
                        ->check(CLI::IsMember({"decode", "verify", "prefill"}));
  command->add_option("--backend", options->backends, "backends, or auto")->delimiter(',');
  command->add_option("--device", options->device, "cpu or cuda; that of the first backend if not given")
      ->check(CLI::IsMember({"cpu", "cuda"}));
  command->add_option("--mode", options->mode, "what is stored: update, snapshots, read-only or token-slots")
      ->capture_default_str()
      ->check(CLI::IsMember({"update", "snapshots", "read-only", "token-slots"}))
      ->needs(op);
  // The bounds keep every product of sizes within 64 bits.
  command->add_option("--batch", options->batches, "sequences: 1,8,64")
      ->delimiter(',')
      ->check(CLI::Range(1, 1 << 17))
      ->needs(op);
  command->add_option("--tokens", options->tokens, "tokens of each sequence")
      ->delimiter(',')
      ->check(CLI::Range(1, 1 << 20))
      ->needs(op);
  command->add_option("--heads", options->heads, "query/value heads; there are as many key as query heads")
      ->capture_default_str();
  command->add_option("--dim", options->key_dim, "key width K")->capture_default_str()->check(CLI::Range(1, 4096));
  command->add_option("--value-dim", options->value_dim, "value width V; K if not given")->check(CLI::Range(1, 4096));
  command->add_option("--dtype", options->dtypes, "of q, k, v, o and the gates: f32, f16, bf16")
      ->capture_default_str()
      ->delimiter(',')
      ->needs(op);
  command->add_option("--state", options->states, "dtype of the state: f32, f16, bf16")
      ->capture_default_str()
      ->delimiter(',')
      ->needs(op);
  command->add_option("--layout", options->layout, "of the state: vk (K last) or kv (V last)")
      ->capture_default_str()
      ->check(CLI::IsMember({"vk", "kv"}));
  command->add_option("--threads", options->threads, "threads: 1,2; all if not given")
      ->delimiter(',')
      ->check(CLI::Range(1, 1024));
  command->add_option("--window", options->window, "capacity of a replay window: rows with and without it")
      ->check(CLI::Range(min_window, max_window))
      ->needs(op);
  command->add_flag("--traffic", options->traffic,
                    "on GPUs: time all that a call reads and writes, too, without its arithmetic");
  command->add_flag("--tree", options->tree, "with a window: the tokens are drafts in a binary tree")->needs("--window");
  command->add_option("--entries", options->entries, "dtype of the window's entries")
      ->capture_default_str()
      ->check(CLI::IsMember({"f32", "bf16"}));
  command->add_option("--accepted", options->accepted, "tokens of each call that stay in the window; all if not given")
      ->check(CLI::Range(1, 64));
  command
      ->add_option("--layers", options->layers, "calls with windows that share a record, to one accept: the layers of a model")
      ->capture_default_str()
      ->check(CLI::Range(1, 1024));
  command->add_flag("--warm", options->warm, "use one state only, so that it stays in cache")->needs(op);
  command->add_flag("--dependent", options->dependent, "let a device begin a call before the one before it has ended")
      ->needs(op)
      ->excludes("--warm");
  command->add_option("--slots", options->slots, "of a batch in the pool: shuffled or ordered")
      ->capture_default_str()
      ->check(CLI::IsMember({"shuffled", "ordered"}))
      ->needs(op);
  command->add_option("--min-time", options->effort.min_seconds, "seconds of measurement for each row")
      ->capture_default_str()
      ->check(CLI::Range(0.001, 600.0));
  command->add_option("--repetitions,--repeats", options->effort.repetitions, "fixed number of repetitions instead")
      ->check(CLI::Range(1, 100000));
  command->add_option("--max-memory", options->max_memory_mib, "MiB that the rotated states may take")
      ->capture_default_str()
      ->check(CLI::Range(1.0, 1048576.0));
  command->add_option("--host-calls", options->host_calls, "calls whose time on the host is taken, for devices")
      ->capture_default_str()
      ->check(CLI::Range(1, 1000000));
  command->add_option("--json", options->json, "write the results to this file");
  command->callback([options] { run(*options); });
}

}  // namespace gatedelta::tool
