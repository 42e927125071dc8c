// SPDX-License-Identifier: Apache-2.0
// One source for all execution spaces of Kokkos: on the host the rows of a call are resolved before anything is touched, on a
// device by the kernels.
#include <exception>
#include <limits>
#include <string>

#include "backends/kokkos/kernels.hpp"
#include "backends/kokkos/session.hpp"
#include "core/builtin_backends.hpp"
#include "gatedelta/error.hpp"

namespace gatedelta {
namespace {

using namespace kokkos;

/// Kokkos's own exceptions become the library's.
template <class Function>
auto translate(Function function) {
  try {
    return function();
  } catch (const Error&) {
    throw;
  } catch (const std::bad_alloc&) {
    throw Error(ErrorCode::out_of_memory, "kokkos: memory is exhausted");
  } catch (const std::exception& error) {
    throw Error(ErrorCode::device, std::string("kokkos: ") + error.what());
  }
}

std::string version_of_kokkos() {
  return std::to_string(KOKKOS_VERSION / 10000) + "." + std::to_string(KOKKOS_VERSION / 100 % 100) + "." +
         std::to_string(KOKKOS_VERSION % 100);
}

class KokkosBackend final : public Backend {
 public:
  std::string_view name() const noexcept override { return "kokkos"; }
  std::string description() const override {
    return std::string("float32, teams of Kokkos::") + Space::name() + " (Kokkos " + version_of_kokkos() + ")";
  }
  Availability availability() const override {
    const std::string reason = obstacle();
    return {reason.empty(), reason};
  }
  bool reaches(Device memory) const noexcept override { return memory == device(); }

  std::string unsupported_reason(const Problem& problem) const override {
    const Config& config = problem.config;
    if (problem.window) return "replay windows are not implemented";
    if (config.key_dim > max_key_dim)
      return "K = " + std::to_string(config.key_dim) + " is larger than " + std::to_string(max_key_dim);
    constexpr std::int64_t max_teams = std::numeric_limits<int>::max();
    const std::int64_t slices = slices_of(config.key_dim, config.value_dim), heads = config.heads();
    if (heads > max_teams / slices || problem.rows + 1 > max_teams / (heads * slices))
      return "more than 2^31 teams of rows, heads and value rows";
    return {};
  }

  void forward(const Call& call) override {
    ForwardParams params = make_params(call);
    if constexpr (on_host) {
      const HostRows rows(call);
      params.resolved = rows.rows().data();
      translate([&] {
        Session session;
        const Space& space = session.space(nullptr, call.problem.config.num_threads);
        rows.zero_padding();
        launch(space, "gatedelta forward", Forward(params));
        space.fence();
      });
    } else {
      translate([&] {
        Session session;
        params.fault = session.fault_record();
        launch(session.space(call.arguments->stream, 0), "gatedelta forward", Forward(params));
      });
    }
  }

  void commit(const Config& config, const CommitArguments& in) override {
    if constexpr (on_host) {
      commit_on_host(config, in);
    } else {
      CommitParams params = make_params(config, in);
      translate([&] {
        Session session;
        params.fault = session.fault_record();
        launch(session.space(in.stream, 0), "gatedelta commit", Commit(params));
      });
    }
  }

  void check(void* stream) override {
    if constexpr (!on_host) {
      if (!Kokkos::is_initialized()) return;  // there has been no call
      const Fault fault = translate([&] { return Session().take_fault(stream); });
      if (fault.kind != 0) throw Error(ErrorCode::device, text(fault));
    }
  }
};

}  // namespace

std::unique_ptr<Backend> make_kokkos_backend() { return std::make_unique<KokkosBackend>(); }

}  // namespace gatedelta
