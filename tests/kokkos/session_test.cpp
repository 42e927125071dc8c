// SPDX-License-Identifier: Apache-2.0
// Who initialises and finalises Kokkos. Each case has a process of its own: Kokkos lives once.
#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>
#include <unistd.h>

#include <Kokkos_Core.hpp>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include "gatedelta/gatedelta.hpp"

using namespace gatedelta;

namespace {

std::atomic<int> calls = 0;

/// One token of a scalar state: o becomes v.
float step(float value) {
  Config config{.q_heads = 1, .k_heads = 1, .v_heads = 1, .key_dim = 1, .value_dim = 1};
  config.gate = GateForm::none;
  config.beta = BetaForm::one;
  config.qk_l2norm = false;
  config.scale = 1;
  float one = 1, out = 0;
  Arguments call;
  call.q = call.k = view(&one, {1, 1, 1, 1});
  call.v = view(&value, {1, 1, 1, 1});
  call.o = view(&out, {1, 1, 1, 1});
  GatedDeltaRule(config, "kokkos").forward(call);
  ++calls;
  return out;
}

bool expect_finalised = false;

/// Registered before Kokkos is initialised, so it runs after what is registered then.
void at_end() {
  if (!expect_finalised || !Kokkos::is_initialized()) return;
  std::fputs("Kokkos was not finalised at exit\n", stderr);
  std::_Exit(1);
}

/// What is written to a stream of the process meanwhile.
class Captured {
 public:
  explicit Captured(std::FILE* stream) : stream_(stream), file_(std::tmpfile()), kept_(dup(fileno(stream))) {
    std::fflush(stream_);
    dup2(fileno(file_), fileno(stream_));
  }
  std::string text() {
    std::fflush(stream_);
    dup2(kept_, fileno(stream_));
    std::string out(1000, '\0');
    std::rewind(file_);
    out.resize(std::fread(out.data(), 1, out.size(), file_));
    return out;
  }

 private:
  std::FILE* stream_;
  std::FILE* file_;
  int kept_;
};

}  // namespace

TEST_CASE("initialised at the first call and finalised at exit") {
  CHECK(find_backend("kokkos")->availability().available);
  CHECK_FALSE(find_backend("kokkos")->description().empty());
  find_backend("kokkos")->synchronize(nullptr);
  CHECK_FALSE(Kokkos::is_initialized());  // questions do not initialise it
  Captured out(stdout), error(stderr);
  const float found = step(3);
  CHECK(out.text() == "");
  CHECK(error.text() == "");
  CHECK(found == 3);
  CHECK(Kokkos::is_initialized());
  expect_finalised = true;
}

TEST_CASE("initialised and finalised by the program") {
  {
    const Kokkos::ScopeGuard guard;
    CHECK(step(3) == 3);
    const Kokkos::View<float*> used("the program's own", 4);
    CHECK(Kokkos::is_initialized());
  }
  CHECK_FALSE(Kokkos::is_initialized());
#if KOKKOS_VERSION >= 30700
  CHECK(find_backend("kokkos")->availability().reason == "the program has finalised Kokkos");
  CHECK_THROWS_WITH_AS(step(3), doctest::Contains("the program has finalised Kokkos"), Error);
#endif
}

TEST_CASE("finalised by the program, initialised by the library") {
  CHECK(step(3) == 3);
  Kokkos::finalize();
  expect_finalised = true;
}

TEST_CASE("calls of several threads") {
  std::vector<std::thread> threads;
  std::vector<int> right(4, 0);
  for (int i = 0; i < 4; ++i)
    threads.emplace_back([&, i] {
      for (int n = 0; n < 200; ++n)
        right[static_cast<std::size_t>(i)] += step(static_cast<float>(100 * i + n)) == static_cast<float>(100 * i + n);
    });
  for (std::thread& thread : threads) thread.join();
  CHECK(right == std::vector<int>(4, 200));
}

int main(int argc, char** argv) {
  std::atexit(at_end);
  const int result = doctest::Context(argc, argv).run();
  return calls == 0 ? 1 : result;  // no case of that name
}
