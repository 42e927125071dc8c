// SPDX-License-Identifier: Apache-2.0
// The tests' own test: every question that checkkernel asks must be able to fail. Each backend here runs the reference and
// then does one thing wrong.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <string>
#include <utility>

#include "core/elements.hpp"
#include "faulty.hpp"
#include "verify/check.hpp"
#include "verify/errors.hpp"
#include "verify/generate.hpp"

using namespace gatedelta;
using namespace gatedelta::verify;

namespace {

/// The reference on a changed configuration or changed arguments.
void run_changed(Backend& reference, const Call& call, const std::function<void(Config&, Arguments&)>& change) {
  Config config = call.problem.config;
  Arguments arguments = *call.arguments;
  change(config, arguments);
  reference.forward(validate(config, arguments));
}

using Question = std::function<void(Checker&, const Case&)>;

void compare_with_golden(Checker& checker, const Case& c) { checker.against_golden(c, golden(c)); }

/// The first failure of the first case that exposes the fault, or nothing.
std::string exposed(Faulty::Forward forward, const Question& ask, const char* family = "any", int cases = 60) {
  Faulty backend(std::move(forward));
  for (int i = 0; i < cases; ++i) {
    const Case c = make_case(*find_family(family), 1, i);
    Checker checker(backend, *memory_for(backend));
    ask(checker, c);
    if (!checker.failures().empty()) return text(checker.failures()[0]);
  }
  return {};
}

}  // namespace

TEST_CASE("the reference itself passes") {
  CHECK(exposed([](Backend& reference, const Call& call) { reference.forward(call); }, compare_with_golden) == "");
}

TEST_CASE("wrong numbers are found") {
  const auto check = [](const char* what, Faulty::Forward forward) {
    CAPTURE(what);
    CHECK(exposed(std::move(forward), compare_with_golden) != "");
  };
  const auto changed = [&](const char* what, std::function<void(Config&, Arguments&)> change) {
    check(what, [change](Backend& reference, const Call& call) { run_changed(reference, call, change); });
  };
  changed("no epsilon", [](Config& config, Arguments&) { config.l2_eps = 0; });
  changed("another scale", [](Config& config, Arguments&) { config.scale = config.effective_scale() * 1.0001; });
  changed("no normalisation", [](Config& config, Arguments&) { config.qk_l2norm = false; });
  changed("the softplus threshold is ignored", [](Config& config, Arguments&) { config.softplus_threshold = 20; });
  changed("dt_bias is ignored", [](Config&, Arguments& in) { in.dt_bias = {}; });
  changed("beta is not doubled", [](Config& config, Arguments&) {
    if (config.beta == BetaForm::twice_logits) config.beta = BetaForm::logits;
  });
  changed("key heads are dealt round robin", [](Config& config, Arguments& in) {
    if (config.k_heads == 1 || config.k_heads == config.heads()) return;
    in.k.strides[2] = -in.k.strides[2];
    in.k.data = element_address(in.k, 0, 0, 1 - config.k_heads, 0);
  });
  changed("padding by the default null_slot",
          [](Config& config, Arguments&) { config.null_slot = std::min<std::int64_t>(config.null_slot, 0); });
  check("one element is off by 2^-16 of the largest", [](Backend& reference, const Call& call) {
    reference.forward(call);
    const TensorView& o = call.arguments->o;
    if (o.elements() == 0 || o.dtype != DType::f32) return;
    double largest = 0;
    for (std::int64_t v = 0; v < o.shape[3]; ++v) largest = std::max(largest, std::fabs(load(o, 0, 0, 0, v)));
    store(o, load(o, 0, 0, 0, 0) + 0x1p-16 * largest, 0, 0, 0, 0);
  });
  check("an output stays NaN", [](Backend& reference, const Call& call) {
    reference.forward(call);
    if (call.arguments->o.elements() > 0) store(call.arguments->o, std::nan(""), 0, 0, 0, 0);
  });
  check("the outputs are rounded to bf16 on the way", [](Backend& reference, const Call& call) {
    reference.forward(call);
    const TensorView& o = call.arguments->o;
    for_each_index({o.shape.begin(), o.shape.begin() + o.rank}, [&](std::int64_t, const std::vector<std::int64_t>& i) {
      store(o, rounded(DType::bf16, load(o, i[0], i[1], i[2], i[3])), i[0], i[1], i[2], i[3]);
    });
  });
  check("states are lost", [](Backend& reference, const Call& call) {
    run_changed(reference, call, [](Config&, Arguments& in) {
      in.update_state = false;
      in.state_out = {};
    });
  });
}

TEST_CASE("stray stores are found") {
  const auto check = [](const char* what, Faulty::Forward forward, const char* family = "any") {
    CAPTURE(what);
    CHECK(exposed(std::move(forward), compare_with_golden, family) != "");
  };
  const auto bump = [](std::byte* byte) { *byte ^= std::byte{1}; };
  check("an input is changed", [&](Backend& reference, const Call& call) {
    reference.forward(call);
    const TensorView& k = call.arguments->k;
    if (k.elements() > 0) bump(static_cast<std::byte*>(element_address(k, 0, 0, 0, 0)));
  });
  check("one element before q", [&](Backend& reference, const Call& call) {
    reference.forward(call);
    const TensorView& q = call.arguments->q;
    if (q.elements() > 0 && q.strides[3] > 0) bump(static_cast<std::byte*>(q.data) - 1);
  });
  check("one element behind o", [&](Backend& reference, const Call& call) {
    reference.forward(call);
    const TensorView& o = call.arguments->o;
    if (o.elements() == 0) return;
    bump(static_cast<std::byte*>(element_address(o, o.shape[0] - 1, o.shape[1] - 1, o.shape[2] - 1, o.shape[3] - 1)) +
         size_of(o.dtype));
  });
  check(
      "the gap between strided outputs",
      [&](Backend& reference, const Call& call) {
        reference.forward(call);
        const TensorView& o = call.arguments->o;
        if (o.elements() > 1 && o.strides[3] > 1) bump(static_cast<std::byte*>(o.data) + size_of(o.dtype));
      },
      "layouts");
  check("a slot that no row stores to", [&](Backend& reference, const Call& call) {
    reference.forward(call);
    const TensorView& pool = call.arguments->state;
    if (pool.defined() && pool.elements() > 0) bump(static_cast<std::byte*>(element_address(pool, pool.shape[0] - 1, 0, 0, 0)));
  });
  check("the pool although update_state is off", [](Backend& reference, const Call& call) {
    run_changed(reference, call, [](Config&, Arguments& in) { in.update_state = true; });
  });
}

TEST_CASE("invariants can fail") {
  const auto is_found = [](Question ask, Faulty::Forward forward) {
    return exposed(std::move(forward), ask, "invariants", 20) != "";
  };
  const auto disturb = [](Backend& reference, const Call& call, bool now) {
    reference.forward(call);
    const TensorView& o = call.arguments->o;
    if (!now || o.elements() == 0) return;
    // The least change there is.
    auto* byte = static_cast<std::byte*>(element_address(o, 0, 0, 0, 0));
    *byte ^= std::byte{1};
  };
  int calls = 0;
  CHECK(is_found([](Checker& x, const Case& c) { x.repeats(c); },
                 [&](Backend& reference, const Call& call) { disturb(reference, call, ++calls % 2 == 0); }));
  CHECK(
      is_found([](Checker& x, const Case& c) { x.thread_invariant(c); },
               [&](Backend& reference, const Call& call) { disturb(reference, call, call.problem.config.num_threads == 3); }));
  CHECK(is_found([](Checker& x, const Case& c) { x.batch_invariant(c); },
                 [&](Backend& reference, const Call& call) { disturb(reference, call, call.problem.rows > 1); }));
  CHECK(is_found(
      [](Checker& x, const Case& c) {
        if (Checker::splittable(c)) x.split(c, golden(c), {1});
      },
      [](Backend& reference, const Call& call) {
        run_changed(reference, call, [](Config&, Arguments& in) { in.state_in = {}; });
      }));
  CHECK(is_found([](Checker& x, const Case& c) { x.state_layouts(c, golden(c)); },
                 [](Backend& reference, const Call& call) {
                   run_changed(reference, call, [](Config& config, Arguments& in) {
                     if (in.state_in.defined() && config.key_dim == config.value_dim && in.state_in.strides[2] == 1)
                       in.state_in = in.state_in.transposed(2, 3);
                   });
                 }));
}

TEST_CASE("calls that are not refused, or refused too late, are found") {
  const auto ask = [](Checker& x, const Case& c) {
    for (const BrokenCall& broken : broken_calls(c)) x.rejects(broken.c, broken.tensor, broken.what);
  };
  CHECK(exposed([](Backend& reference, const Call& call) { reference.forward(call); }, ask, "errors", 20) == "");
  CHECK(exposed([](Backend&, const Call&) {}, ask, "errors", 20) != "");  // checks no values
  CHECK(exposed(
            [](Backend& reference, const Call& call) {
              if (call.arguments->o.elements() > 0) store(call.arguments->o, 0, 0, 0, 0, 0);
              reference.forward(call);
            },
            ask, "errors", 20) != "");
  CHECK(exposed(
            [](Backend& reference, const Call& call) {
              try {
                reference.forward(call);
              } catch (const Error&) {
                throw Error(ErrorCode::device, "something is wrong");
              }
            },
            ask, "errors", 20) != "");
}

TEST_CASE("a case depends on nothing but family, seed and number") {
  const Family& family = *find_family("any");
  const Case one = make_case(family, 5, 17), again = make_case(family, 5, 17);
  CHECK(describe(one) == describe(again));
  CHECK(one[Tensor::v].values.size() == again[Tensor::v].values.size());
  CHECK(describe(one) != describe(make_case(family, 5, 18)));
  CHECK(describe(one) != describe(make_case(family, 6, 17)));
}
