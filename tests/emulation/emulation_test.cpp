// SPDX-License-Identifier: Apache-2.0
// The fast kernels of the cuda backend, run on the host (see machine.hpp for what that shows), against a plain recurrence.
#include <doctest/doctest.h>

#include <string>
#include <vector>

#include "scene.hpp"

using namespace gatedelta;
using namespace gatedelta::emulation;
using cuda::Kernel;

namespace {

constexpr DType states[] = {DType::bf16, DType::f16, DType::f32};

// In the mean over many numbers (relative L2) rounding to bfloat16 is about 1.65e-3 and to float16 an eighth of that, below
// 2^-9 and 2^-12; all else is in float32.
constexpr double f32_limit = 5e-7, f16_limit = 0x1p-12 + f32_limit, bf16_limit = 0x1p-9 + f32_limit;
double limit_of(DType dtype) { return dtype == DType::bf16 ? bf16_limit : dtype == DType::f16 ? f16_limit : f32_limit; }

Result check(const Form& form, Kernel kernel, int token_tile) {
  const std::string text = form.text();
  INFO(text);
  Result result = Scene(form).run(kernel, token_tile);
  CHECK(result.fault == "");
  if (!result.fault.empty()) return result;
  CHECK(result.output.relative() <= limit_of(form.inputs));
  CHECK(result.outputs_of_padding == 0);
  CHECK(result.untouched == 0);
  if (form.update && (form.capacity == 0 || result.folded > 0)) CHECK(result.state.relative() <= limit_of(form.state));
  if (form.snapshots) CHECK(result.snapshots.relative() <= limit_of(form.snapshot_dtype()));
  if (form.capacity > 0) {
    CHECK(result.corrections.relative() <= limit_of(form.entry_dtype));
    CHECK(result.decays <= 1e-5);
    CHECK(result.keys == 0);
  }
  return result;
}

/// The smallest number of tokens that a kernel is compiled for which holds T.
int tile_of(std::int64_t T) { return T == 1 ? 1 : T <= 4 ? 4 : T <= 8 ? 8 : 16; }

/// heads of a block (or rows of a lane), warps of a block, value rows of a warp
cuda::Shape shape(int heads, int warps, int span) { return {.heads = heads, .warps = warps, .span = span}; }

}  // namespace

TEST_CASE("replay") {
  int folded = 0, unfolded = 0;
  const auto check_replay = [&](Form form) {
    for (const bool value_last : {false, true}) {
      if (value_last) {  // then all warps of a block have values
        form.value_last = true;
        while (form.value_dim % (16 * form.shape.warps) != 0) --form.shape.warps;
        form.shape.heads = std::min(form.shape.heads, form.shape.warps);
      }
      for (const DType entries : {DType::bf16, DType::f32}) {
        if (entries == DType::f32 && form.state == DType::f16) continue;  // as bfloat16
        form.entry_dtype = entries;
        const Result result = check(form, Kernel::replay, tile_of(form.tokens));
        folded += result.folded, unfolded += result.unfolded;
      }
    }
  };
  for (const DType state : states) {
    // One product takes 16 entries: around that, and with none.
    for (const std::int64_t P : {0, 1, 9, 15, 16}) {
      check_replay({state, 1, 128, 128, shape(2, 4, 32), 2, 4, true, false, false, true, 16, P});
      check_replay({state, 1, 128, 64, shape(1, 4, 16), 1, 2, false, false, false, true, 16, P});
      check_replay({state, 1, 64, 64, shape(1, 1, 64), 2, 2, true, false, false, true, 16, P});
      check_replay({state, 2, 64, 32, shape(4, 4, 16), 2, 4, true, false, false, true, 16, P});
      check_replay({state, 4, 128, 64, shape(3, 4, 16), 2, 4, true, false, false, true, 16, P});
      check_replay({state, 7, 128, 96, shape(2, 2, 48), 1, 3, true, false, false, true, 16, P});
      check_replay({state, 8, 64, 64, shape(2, 4, 16), 1, 2, false, false, false, true, 16, P});
      // Blocks with a part of the heads of a key, and one that is half empty.
      for (const std::int64_t T : {1, 2}) {
        check_replay({state, T, 64, 64, shape(2, 2, 16), 1, 4, true, false, false, true, 16, P});
        check_replay({state, T, 64, 32, shape(4, 4, 16), 3, 6, true, false, false, true, 16, P});
      }
    }
    // Drafts in trees.
    for (const std::int64_t T : {2, 3, 4, 5, 8})
      for (const std::int64_t P : {5, 16}) {
        Form form{state, T, 64, 64, shape(2, 4, 16), 2, 4, T % 2 == 0, false, false, true, 16, P};
        form.tree = true;
        check_replay(form);
      }
    // More than there is shared memory for, with float32 entries: blocks then have fewer heads than the shape says.
    for (const std::int64_t P : {37, 60})
      check_replay({state, 8, 128, 64, shape(4, 4, 16), 4, 4, true, false, false, true, 64, P});
    for (const std::int64_t P : {17, 33, 60, 64}) {
      const bool usual = P % 2 == 0;
      check_replay({state, 1, 128, 64, shape(2, 4, 32), 1, 2, usual, false, false, true, 64, P});
      check_replay({state, 3, 128, 64, shape(1, 2, 32), 2, 2, !usual, false, false, true, 64, P});
      check_replay({state, 8, 64, 32, shape(2, 2, 32), 1, 2, usual, false, false, true, 64, P});
    }
  }
  CHECK(folded > 0);
  CHECK(unfolded > 0);
}

TEST_CASE("recurrent") {
  for (const DType state : states)
    for (const std::int64_t K : {64, 128, 256})
      for (const bool usual : {true, false}) {
        // Inputs that are not bfloat16, and V-last states after each token.
        Form form{state, usual ? 2 : 4, K, usual ? 160 : 96, {}, 2, 4, usual, false, usual, K != 64};
        form.inputs = usual ? DType::f32 : DType::f16;
        if (K == 256) check(form, Kernel::recurrent, 0);
        form.value_last = true;
        check(form, Kernel::recurrent, 0);
        if (usual && state != DType::f32 && K != 256) continue;
        check({state, usual ? 3 : 21, K, usual ? 96 : 64, {}, 1, 2, usual, true, true, K != 64}, Kernel::recurrent, 0);
      }
}

TEST_CASE("recurrent, what is for no other kernel") {
  for (const DType state : states)
    for (const bool value_last : {false, true}) {
      // States after each of many tokens, also in a dtype of their own.
      for (const bool other : {false, true}) {
        Form form{state, 17, 128, 64, {}, 1, 2, other, value_last, true, other};
        form.other_snapshots = other;
        check(form, Kernel::recurrent, 0);
      }
      // Keys of 256 elements and many tokens, inputs that are not bfloat16, of tokens that are prepared in one turn and in
      // several.
      check({state, 9, 256, 96, {}, 1, 2, true, value_last}, Kernel::recurrent, 0);
      for (const std::int64_t T : {5, 11, 17})
        for (const DType inputs : {DType::f16, DType::f32})
          for (const std::int64_t K : {128, 256})
            for (const bool usual : {true, false}) {
              if (K == 128 && !value_last && (T <= 8 || inputs == DType::f16)) continue;  // for serving, or chunks
              if (K == 128 && T > 16 && inputs == DType::f16) continue;                   // for chunks
              Form form{state, T, K, 64, {}, 1, 2, usual, value_last};
              form.inputs = inputs;
              check(form, Kernel::recurrent, 0);
            }
    }
}

TEST_CASE("recurrent, with a window") {
  for (const DType state : states)
    for (const DType entries : {DType::bf16, DType::f32})
      for (const std::int64_t K : {64, 128, 256})
        for (const bool value_last : {false, true})
          for (const std::int64_t P : {0, 7, 16, 37}) {
            if (state == DType::f16 && P != 7) continue;  // as bfloat16
            const std::int64_t T = P == 7 ? 11 : P == 37 ? 20 : 1;
            if (K < 256 && T <= 8) continue;  // the fast form
            Form form{
                state, T, K, P == 16 ? 160 : 96, shape(2, 2, 16), 2, 4, P == 7, value_last, false, true, P == 37 ? 48 : 16, P};
            form.entry_dtype = entries;
            for (const bool tree : {false, true}) {
              form.tree = tree;
              if (K < 256)
                check(form, Kernel::replay, 8);  // in passes
              else if (T > 1 || !tree)
                check(form, Kernel::recurrent, 0);
            }
          }
}

TEST_CASE("serving") {
  for (const DType state : states)
    for (const std::int64_t T : {2, 3, 4, 7, 8, 11, 16}) {
      const int tile = tile_of(T);
      for (const bool value_last : {false, true}) {
        const bool usual = T % 3 != 0;
        // The final state, snapshots as well, snapshots alone, outputs alone.
        check({state, T, 128, 64, shape(0, 4, 16), 1, 2, usual, value_last}, Kernel::serving, tile);
        const int tiles = state == DType::f32 ? 2 : 4, shares = T == 4 ? 0 : T % 2 == 1 ? 4 : 2;
        const cuda::Shape each = shape(tiles, tiles, 1);
        const bool recurrent = value_last && state == DType::f32 && T > 2;
        const Kernel kernel = recurrent ? Kernel::recurrent : Kernel::serving;
        const int each_tile = recurrent ? 0 : tile;
        check({state, T, 128, 96, value_last ? each : shape(0, 2, 32), 1, 1, !usual, value_last, true}, kernel, each_tile);
        check({state, T, 64, 96, value_last ? each : shape(shares, 4, 16), 1, 2, usual, value_last, true, false}, kernel,
              each_tile);
        Form slots{state, T, 128, 96, value_last ? each : shape(shares, 4, 16), 1, 2, usual, value_last};
        slots.token_slots = true;
        check(slots, kernel, each_tile);
        check({state, T, 64, 64, shape(0, 2, 16), 2, 2, true, value_last, false, false}, Kernel::serving, tile);
        if (value_last) {
          const bool wide = T % 2 == 0;
          check({state, T, wide ? 64 : 128, wide ? 192 : 96, shape(4, 4, wide ? 128 : 16), 2, 2, usual, true}, Kernel::serving,
                tile);
          check({state, T, 128, 64, shape(2, 2, 16), 1, 2, !usual, true, false, wide}, Kernel::serving, tile);
        }
        Form dependent{state, T, 128, 64, shape(0, 2, 16), 2, 4, usual, value_last};
        dependent.dependent = true;
        check(dependent, Kernel::serving, tile);
      }
    }
}

TEST_CASE("serving, keys of 256 elements") {
  for (const DType state : states)
    for (const std::int64_t T : {2, 3, 4, 5, 8})
      for (const bool usual : {true, false}) {
        const int tile = tile_of(T);
        check({state, T, 256, 64, shape(0, 2, 32), 1, 2, usual}, Kernel::serving, tile);
        check({state, T, 256, 96, shape(0, 4, 16), 1, 2, usual}, Kernel::serving, tile);
        check({state, T, 256, 64, shape(0, 1, 64), 2, 4, usual, false, false, false}, Kernel::serving, tile);
      }
}

TEST_CASE("serving, inputs that are not bfloat16") {
  for (const DType inputs : {DType::f16, DType::f32})
    for (const DType state : states)
      for (const std::int64_t T : {2, 3, 4, 5, 7, 8, 11, 16}) {
        if (T > 8 && inputs == DType::f32) continue;
        const bool usual = T % 2 == 0;
        const auto check_inputs = [&](Form form) {
          form.inputs = inputs;
          const bool recurrent = inputs == DType::f32 && T <= 4 && (form.snapshots || form.token_slots);
          check(form, recurrent ? Kernel::recurrent : Kernel::serving, recurrent ? 0 : tile_of(T));
        };
        // The final state, snapshots as well, snapshots alone, outputs alone, states in slots.
        check_inputs({state, T, 128, 64, shape(0, 4, 16), 1, 2, usual});
        check_inputs({state, T, 128, 96, shape(0, 2, 32), 1, 1, !usual, false, true});
        check_inputs({state, T, 64, 96, shape(T % 3 == 0 ? 0 : 2, 4, 16), 1, 2, usual, false, true, false});
        check_inputs({state, T, 64, 64, shape(0, 1, 32), 2, 2, !usual, false, false, false});
        Form slots{state, T, 128, 32, shape(2, 2, 16), 1, 2, usual};
        slots.token_slots = true;
        check_inputs(slots);
        Form dependent{state, T, 128, 64, shape(0, 3, 16), 2, 4, usual};
        dependent.dependent = true;
        check_inputs(dependent);
      }
}

TEST_CASE("chunks") {
  for (const DType state : states)
    for (const std::int64_t T : {17, 37, 64, 133})
      for (const bool value_last : {false, true}) {
        const bool usual = T % 2 == 0;
        // Blocks that are half empty, in which all warps prepare chunks, and in which some do nothing else.
        check({state, T, T == 64 ? 64 : 128, T == 37 ? 96 : 32, shape(0, 4, 16), 1, 2, usual, value_last}, Kernel::chunks, 0);
        check({state, T, 64, 64, T == 37 ? shape(2, 6, 16) : shape(4, 8, 16), 2, 2, !usual, value_last, false, T == 133},
              Kernel::chunks, 0);
        Form half{state, T, T == 64 ? 128 : 64, 64, T == 37 ? shape(2, 6, 16) : shape(0, 4, 16), 1, 2, !usual, value_last};
        half.inputs = DType::f16;
        check(half, Kernel::chunks, 0);
        half.shape = T == 64 ? shape(4, 8, 16) : shape(0, 8, 16);
        check(half, Kernel::chunks, 0);
      }
}

TEST_CASE("decode") {
  for (const DType state : states) {
    for (const int rows_a_lane : {2, 4, 8})
      for (const std::int64_t K : {64, 128, 256})
        for (const bool usual : {true, false}) {
          Form form{state, 1, K, 96, shape(rows_a_lane, 2, 16), 1, 2, usual};
          check(form, Kernel::decode, 0);
          form.dependent = true;
          check(form, Kernel::decode, 0);
          check({state, 1, K, 64, shape(rows_a_lane, 1, 64), 1, 1, usual, false, true, rows_a_lane == 4}, Kernel::decode, 0);
        }
    // V-last: up to 8 lanes along V for what is not usual.
    for (const std::int64_t K : {64, 128, 256}) {
      for (const int value_lanes : {4, 8, 16}) {
        check({state, 1, K, 128, shape(value_lanes, 4, 1), 1, 2, true, true}, Kernel::decode, 0);
        Form form{state, 1, K, 384, shape(value_lanes, 4, 1), 1, 1, true, true};
        form.dependent = value_lanes == 8;
        check(form, Kernel::decode, 0);
        if (value_lanes > 8) continue;
        check({state, 1, K, 64, shape(value_lanes, 4, 1), 1, 3, false, true, true}, Kernel::decode, 0);
        check({state, 1, K, 192, shape(value_lanes, 4, 1), 2, 2, false, true, true, false}, Kernel::decode, 0);
      }
    }
  }
}

TEST_CASE("how a call is cut into blocks does not change a bit") {
  const auto agree = [](Form form, Kernel kernel, int token_tile, const std::vector<cuda::Shape>& shapes) {
    std::string first;
    for (const cuda::Shape& each : shapes) {
      form.shape = each;
      const std::string text = form.text();
      INFO(text);
      Scene scene(form);
      REQUIRE(scene.run(kernel, token_tile).fault == "");
      const std::string bits = scene.bits();
      CHECK_FALSE(bits.empty());
      CHECK((first.empty() || bits == first));
      first = bits;
    }
  };
  for (const DType state : states) {
    agree({state, 1, 128, 128, {}, 1, 2, true, false}, Kernel::decode, 0,
          {shape(2, 1, 16), shape(4, 2, 32), shape(8, 1, 64), shape(8, 2, 64), shape(4, 4, 32)});
    for (const std::int64_t K : {64, 128})
      agree({state, 1, K, 128, {}, 1, 2, true, true}, Kernel::decode, 0, {shape(4, 2, 1), shape(8, 4, 1), shape(16, 4, 1)});
    for (const std::int64_t T : {2, 7, 12}) {
      agree({state, T, 128, 64, {}, 1, 2, true, false, true}, Kernel::serving, tile_of(T),
            {shape(0, 1, 16), shape(0, 4, 16), shape(2, 4, 16), shape(4, 4, 16), shape(0, 2, 32), shape(0, 1, 64)});
      agree({state, T, 128, 128, {}, 1, 2, true, true}, Kernel::serving, tile_of(T),
            {shape(0, 1, 1), shape(0, 4, 1), shape(2, 2, 1), shape(4, 4, 1), shape(2, 2, 128), shape(0, 1, 128)});
    }
    agree({state, 70, 64, 128, {}, 1, 2, true, false}, Kernel::chunks, 0,
          {shape(0, 4, 16), shape(0, 8, 16), shape(2, 6, 16), shape(4, 12, 16)});
    for (const std::int64_t T : {1, 3, 8})
      for (const std::int64_t P : {5, 16})
        agree({state, T, 128, 64, {}, 2, 4, true, false, false, true, 16, P}, Kernel::replay, tile_of(T),
              {shape(1, 4, 16), shape(2, 4, 32), shape(1, 1, 64), shape(4, 4, 16), shape(3, 4, 32)});
  }
}
