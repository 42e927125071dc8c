// SPDX-License-Identifier: Apache-2.0
// The one list of backends, and how a call finds its own.
#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>

#include "core/builtin_backends.hpp"
#include "gatedelta/backend.hpp"
#include "gatedelta/error.hpp"

namespace gatedelta {
namespace {

struct Registry {
  std::mutex mutex;
  std::vector<std::unique_ptr<Backend>> added;  // newest last
  std::vector<std::unique_ptr<Backend>> builtin;

  // The built-in backends in the order of preference; reference is the golden answer and comes last.
  Registry() {
#ifdef GATEDELTA_CUDA
    builtin.push_back(make_cuda_backend());
#endif
    builtin.push_back(make_cpu_backend());
#ifdef GATEDELTA_KOKKOS
    builtin.push_back(make_kokkos_backend());
#endif
    builtin.push_back(make_reference_backend());
  }
};

Registry& registry() {
  static Registry instance;
  return instance;
}

std::vector<Backend*> list(Registry& all) {
  std::vector<Backend*> out;
  for (auto it = all.added.rbegin(); it != all.added.rend(); ++it) out.push_back(it->get());
  for (const auto& backend : all.builtin) out.push_back(backend.get());
  return out;
}

std::string listing() {
  std::string text;
  for (const Backend* backend : backends()) {
    const Availability state = backend->availability();
    text += (text.empty() ? "" : ", ") + std::string(backend->name());
    if (!state.available) text += " (unavailable: " + state.reason + ")";
  }
  return text;
}

Backend& named_backend(std::string_view name, const char* origin) {
  Backend* backend = find_backend(name);
  if (backend == nullptr)
    throw Error(ErrorCode::invalid_argument,
                std::string(origin) + ": expected auto or one of " + listing() + "; got \"" + std::string(name) + "\"");
  const Availability state = backend->availability();
  if (!state.available)
    throw Error(ErrorCode::unsupported, std::string(origin) + ": " + std::string(name) + " is not available: " + state.reason +
                                            "; there is: " + listing());
  return *backend;
}

/// nullptr for auto.
Backend* choose(std::string_view name) {
  const char* origin = "backend";
  if (name.empty()) {
    const char* variable = std::getenv("GATEDELTA_BACKEND");
    if (variable == nullptr || *variable == '\0') return nullptr;
    name = variable;
    origin = "GATEDELTA_BACKEND";
  }
  return name == "auto" ? nullptr : &named_backend(name, origin);
}

/// Why this backend cannot run the problem; empty if it can.
std::string obstacle(const Backend& backend, const Problem& problem) {
  const Availability state = backend.availability();
  if (!state.available) return state.reason;
  if (!backend.reaches(problem.device)) return "cannot reach memory on " + name_of(problem.device);
  return backend.unsupported_reason(problem);
}

Backend& select(Backend* fixed, const Problem& problem) {
  if (fixed != nullptr) {
    if (std::string reason = obstacle(*fixed, problem); !reason.empty())
      throw Error(ErrorCode::unsupported, std::string(fixed->name()) + ": " + reason);
    return *fixed;
  }
  const std::vector<Backend*> all = backends();
  for (Backend* backend : all)
    // Host calls must not wake up a device driver, so memory is asked for first.
    if (backend->reaches(problem.device) && obstacle(*backend, problem).empty()) return *backend;
  std::string text;
  for (const Backend* backend : all)
    text += (text.empty() ? "" : "; ") + std::string(backend->name()) + ": " + obstacle(*backend, problem);
  throw Error(ErrorCode::unsupported, "no backend can run this call: " + text);
}

/// Host allocations of backends fail as the library's own error.
template <class Function>
auto translate_exhaustion(Function function) {
  try {
    return function();
  } catch (const std::bad_alloc&) {
    throw Error(ErrorCode::out_of_memory, "host memory is exhausted");
  }
}

Problem commit_problem(const Config& config, const CommitArguments& arguments) {
  Problem problem;
  problem.config = config;
  problem.device = arguments.snapshots.device;
  problem.rows = problem.batch = arguments.snapshots.shape[0];
  problem.slots = arguments.state.shape[0];
  problem.snapshots = true;
  return problem;
}

Error no_windows(const Backend& backend) {
  return {ErrorCode::unsupported, std::string(backend.name()) + ": replay windows are not implemented"};
}

}  // namespace

Backend::~Backend() = default;
std::size_t Backend::workspace_size(const Problem&) const { return 0; }
void Backend::accept(const Config&, const AcceptArguments&) { throw no_windows(*this); }
void Backend::reset(const Config&, const ResetArguments&) { throw no_windows(*this); }
void Backend::fold(const Config&, const FoldArguments&) { throw no_windows(*this); }
void Backend::copy(const Config&, const ForkArguments&) { throw no_windows(*this); }
void Backend::check(void*) {}
void Backend::synchronize(void* stream) { check(stream); }

std::vector<Backend*> backends() {
  Registry& all = registry();
  const std::lock_guard lock(all.mutex);
  return list(all);
}

Backend* find_backend(std::string_view name) {
  for (Backend* backend : backends())
    if (backend->name() == name) return backend;
  return nullptr;
}

Backend& register_backend(std::unique_ptr<Backend> backend) {
  if (backend == nullptr) throw Error(ErrorCode::invalid_argument, "register_backend: expected a backend, got a null pointer");
  Registry& all = registry();
  const std::lock_guard lock(all.mutex);
  const std::string_view name = backend->name();
  const std::vector<Backend*> present = list(all);
  if (name.empty() || name == "auto" ||
      std::any_of(present.begin(), present.end(), [&](Backend* b) { return b->name() == name; }))
    throw Error(ErrorCode::invalid_argument,
                "register_backend: expected a name that is free, got \"" + std::string(name) + "\"");
  all.added.push_back(std::move(backend));
  return *all.added.back();
}

std::unique_ptr<Backend> unregister_backend(std::string_view name) {
  Registry& all = registry();
  const std::lock_guard lock(all.mutex);
  const auto it = std::find_if(all.added.begin(), all.added.end(), [&](const auto& b) { return b->name() == name; });
  if (it == all.added.end())
    throw Error(ErrorCode::invalid_argument,
                "unregister_backend: expected a backend added at run time, got \"" + std::string(name) + "\"");
  std::unique_ptr<Backend> out = std::move(*it);
  all.added.erase(it);
  return out;
}

GatedDeltaRule::GatedDeltaRule(const Config& config, std::string_view backend) : config_(config), backend_(choose(backend)) {
  validate(config_);
}

GatedDeltaRule::GatedDeltaRule(const Config& config, Backend& backend) : config_(config), backend_(&backend) {
  validate(config_);
}

void GatedDeltaRule::forward(const Arguments& arguments) const {
  const Call call = validate(config_, arguments);
  Backend& backend = select(backend_, call.problem);
  translate_exhaustion([&] { backend.forward(call); });
}

void GatedDeltaRule::commit(const CommitArguments& arguments) const {
  validate(config_, arguments);
  Backend& backend = select(backend_, commit_problem(config_, arguments));
  translate_exhaustion([&] { backend.commit(config_, arguments); });
}

void GatedDeltaRule::accept(const AcceptArguments& arguments) const {
  Backend& backend = select(backend_, validate(config_, arguments));
  translate_exhaustion([&] { backend.accept(config_, arguments); });
}

void GatedDeltaRule::reset(const ResetArguments& arguments) const {
  Backend& backend = select(backend_, validate(config_, arguments));
  translate_exhaustion([&] { backend.reset(config_, arguments); });
}

void GatedDeltaRule::fold(const FoldArguments& arguments) const {
  if (arguments.out.defined()) throw Error(ErrorCode::invalid_argument, "out: given, but fold() writes to the checkpoints");
  Backend& backend = select(backend_, validate(config_, arguments));
  translate_exhaustion([&] { backend.fold(config_, arguments); });
}

void GatedDeltaRule::state_of(const FoldArguments& arguments) const {
  if (!arguments.out.defined()) throw Error(ErrorCode::invalid_argument, "out: required, but not given");
  Backend& backend = select(backend_, validate(config_, arguments));
  translate_exhaustion([&] { backend.fold(config_, arguments); });
}

void GatedDeltaRule::copy(const ForkArguments& arguments) const {
  Backend& backend = select(backend_, validate(config_, arguments));
  translate_exhaustion([&] { backend.copy(config_, arguments); });
}

std::size_t GatedDeltaRule::workspace_size(const Arguments& arguments) const {
  const Call call = validate(config_, arguments);
  return select(backend_, call.problem).workspace_size(call.problem);
}

Backend& GatedDeltaRule::backend_for(const Arguments& arguments) const {
  return select(backend_, validate(config_, arguments).problem);
}

}  // namespace gatedelta
