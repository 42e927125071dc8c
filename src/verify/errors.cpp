// SPDX-License-Identifier: Apache-2.0
#include "verify/errors.hpp"

#include <algorithm>
#include <utility>

namespace gatedelta::verify {
namespace {

class Breaker {
 public:
  explicit Breaker(const Case& valid) : valid_(valid), rows_(plan(valid)) {}

  std::vector<BrokenCall> all() {
    missing();
    unwanted();
    shapes_and_dtypes();
    overlapping_outputs();
    slots();
    sequences();
    return std::move(out_);
  }

 private:
  bool has(Tensor tensor) const { return valid_[tensor].present(); }
  std::size_t flat(Tensor tensor, std::size_t row, std::int64_t i) const {
    return row * static_cast<std::size_t>(valid_[tensor].shape[1]) + static_cast<std::size_t>(i);
  }

  template <class Change>
  void add(Tensor named, std::string what, Change change, bool by_value = false) {
    BrokenCall broken{valid_, name_of(named), std::move(what), false, by_value};
    change(broken.c);
    broken.c.in_place = false;
    out_.push_back(std::move(broken));
  }

  void missing() {
    for (const Tensor tensor :
         {Tensor::q, Tensor::k, Tensor::v, Tensor::o, Tensor::a, Tensor::A_log, Tensor::g, Tensor::b, Tensor::beta})
      if (has(tensor)) add(tensor, "is missing", [&](Case& c) { c[tensor] = {}; });
  }

  void unwanted() {
    const std::int64_t B = valid_.batch(), T = valid_.tokens(), H = valid_.config.heads(), N = valid_.rows();
    const auto give = [&](Tensor tensor, const char* what, DType dtype, std::vector<std::int64_t> shape) {
      if (!has(tensor)) add(tensor, what, [&](Case& c) { c[tensor] = dense(dtype, shape); });
    };
    const DTypes& d = valid_.config.dtypes;
    if (valid_.config.gate != GateForm::raw) {
      give(Tensor::a, "is of another gate form", d.gate, {B, T, H});
      give(Tensor::A_log, "is of another gate form", d.A_log, {H});
      give(Tensor::dt_bias, "is of another gate form", d.dt_bias, {H});
    }
    if (valid_.config.gate != GateForm::log_decay) give(Tensor::g, "is of another gate form", d.gate, {B, T, H});
    if (valid_.config.beta != BetaForm::value) give(Tensor::beta, "is of another beta form", d.beta, {B, T, H});
    if (valid_.config.beta == BetaForm::value || valid_.config.beta == BetaForm::one)
      give(Tensor::b, "is of another beta form", d.beta, {B, T, H});
    const std::vector<std::int64_t> states = {N, H, valid_.config.value_dim, valid_.config.key_dim};
    if (has(Tensor::state)) {
      give(Tensor::state_in, "is beside a pool", d.state, states);
      give(Tensor::state_out, "is beside a pool", d.state, states);
      if (has(Tensor::accepted)) give(Tensor::read_slots, "is beside accepted", DType::i32, {N});
      if (!has(Tensor::token_slots) && !has(Tensor::read_slots))
        give(Tensor::accepted, "is without token_slots", DType::i32, {N});
    } else {
      for (const Tensor tensor : {Tensor::read_slots, Tensor::write_slots, Tensor::accepted})
        give(tensor, "is without a pool", DType::i32, {N});
      give(Tensor::token_slots, "is without a pool", DType::i32, {N, T});
      if (!valid_.update_state) give(Tensor::state_out, "is given though update_state is off", d.state, states);
    }
  }

  void shapes_and_dtypes() {
    for (int i = 0; i < tensor_count; ++i) {
      const auto tensor = static_cast<Tensor>(i);
      if (!has(tensor)) continue;
      const TensorSpec& spec = valid_[tensor];
      for (std::size_t dim = 0; dim < spec.shape.size(); ++dim) {
        // These are free: the number of slots, of tokens with room to spare, and q's own batch and tokens.
        const bool free = (tensor == Tensor::state && dim == 0) || (tensor == Tensor::cu_seqlens) ||
                          (tensor == Tensor::q && dim < 2) ||
                          ((tensor == Tensor::token_slots || tensor == Tensor::snapshots) && dim == 1);
        if (free) continue;
        add(tensor, "has a wrong dimension " + std::to_string(dim), [&](Case& c) {
          std::vector<std::int64_t> shape = spec.shape;
          ++shape[dim];
          c[tensor] = dense(spec.dtype, shape);
        });
      }
      add(tensor, "has one dimension too many", [&](Case& c) {
        std::vector<std::int64_t> shape = spec.shape;
        if (shape.size() < static_cast<std::size_t>(max_rank))
          shape.push_back(1);
        else
          shape.pop_back();
        c[tensor] = dense(spec.dtype, shape);
        // A fourth dimension of g is a decay per key channel, which is not refused as an invalid argument.
        if (tensor == Tensor::g) c[tensor] = dense(spec.dtype, {shape[0], shape[1]});
      });
      add(tensor, "has a wrong dtype", [&](Case& c) {
        const bool index = !is_floating(spec.dtype);
        c[tensor] = dense(index ? DType::f32 : spec.dtype == DType::f16 ? DType::bf16 : DType::f16, spec.shape);
      });
    }
    if (has(Tensor::accepted))
      add(Tensor::accepted, "has a wrong dtype", [](Case& c) { c[Tensor::accepted].dtype = DType::i64; });
    if (!has(Tensor::cu_seqlens))
      for (const Tensor tensor : {Tensor::token_slots, Tensor::snapshots})
        if (has(tensor) && valid_.tokens() > 0)
          add(tensor, "has no room for all tokens", [&](Case& c) {
            std::vector<std::int64_t> shape = c[tensor].shape;
            shape[1] = c.tokens() - 1;
            c[tensor] = dense(c[tensor].dtype, shape);
          });
    if (reads_by_row_number(valid_) && valid_.rows() > 0)
      add(Tensor::state, "has fewer slots than rows", [](Case& c) {
        std::vector<std::int64_t> shape = c[Tensor::state].shape;
        shape[0] = c.rows() - 1;
        c[Tensor::state] = dense(c[Tensor::state].dtype, shape);
      });
  }

  void overlapping_outputs() {
    for (const Tensor tensor : {Tensor::o, Tensor::state, Tensor::state_out, Tensor::snapshots}) {
      if (valid_[tensor].elements() == 0 || (tensor == Tensor::state && !valid_.update_state)) continue;
      for (std::size_t dim = 0; dim < valid_[tensor].shape.size(); ++dim)
        if (valid_[tensor].shape[dim] > 1) {
          add(tensor, "has stride 0 in dimension " + std::to_string(dim), [&](Case& c) { c[tensor].strides[dim] = 0; });
          break;
        }
    }
  }

  void slots() {
    if (!has(Tensor::state)) return;
    const auto beyond = static_cast<double>(valid_[Tensor::state].shape[0]);
    for (std::size_t n = 0; n < rows_.size(); ++n) {
      if (has(Tensor::accepted)) {
        const std::int64_t room = valid_[Tensor::token_slots].shape[1];
        for (const std::int64_t count : {std::int64_t{0}, std::int64_t{-1}, room + 1})
          add(
              Tensor::accepted, "is " + std::to_string(count) + " of " + std::to_string(room),
              [&](Case& c) { c[Tensor::accepted].values[n] = static_cast<double>(count); }, true);
        const auto last = static_cast<std::int64_t>(valid_[Tensor::accepted].values[n]) - 1;
        add(
            Tensor::token_slots, "reads beyond the pool",
            [&](Case& c) { c[Tensor::token_slots].values[flat(Tensor::token_slots, n, last)] = beyond; }, true);
      }
      if (has(Tensor::read_slots))
        add(
            Tensor::read_slots, "is beyond the pool", [&](Case& c) { c[Tensor::read_slots].values[n] = beyond; }, true);
      if (rows_[n].padding || !valid_.update_state) continue;
      if (has(Tensor::write_slots))
        add(
            Tensor::write_slots, "is beyond the pool", [&](Case& c) { c[Tensor::write_slots].values[n] = beyond + 1e6; }, true);
      if (has(Tensor::token_slots) && rows_[n].tokens > 0)
        add(
            Tensor::token_slots, "stores beyond the pool",
            [&](Case& c) { c[Tensor::token_slots].values[flat(Tensor::token_slots, n, rows_[n].tokens - 1)] = beyond; }, true);
    }
    second_writer();
  }

  /// A second row that stores to a slot which another row stores to.
  void second_writer() {
    for (std::size_t n = 1; n < rows_.size(); ++n) {
      const Row &one = rows_[n - 1], &other = rows_[n];
      if (one.padding || other.padding || !valid_.update_state) continue;
      const auto shared = [&]() -> std::int64_t {
        for (const std::int64_t slot : one.token_slots)
          if (slot >= 0) return slot;
        return one.final_slot;
      }();
      if (shared < 0) continue;
      const auto slot = static_cast<double>(shared);
      const Tensor named = has(Tensor::token_slots)   ? Tensor::token_slots
                           : has(Tensor::write_slots) ? Tensor::write_slots
                                                      : Tensor::read_slots;
      const char* what = "has two rows that store to one slot";
      const std::size_t before = out_.size();
      if (has(Tensor::write_slots))
        add(
            named, what, [&](Case& c) { c[Tensor::write_slots].values[n] = slot; }, true);
      else if (named == Tensor::read_slots && has(Tensor::read_slots))
        add(
            named, what, [&](Case& c) { c[Tensor::read_slots].values[n] = slot; }, true);
      else if (named == Tensor::token_slots && other.tokens > 0)
        add(
            named, what, [&](Case& c) { c[Tensor::token_slots].values[flat(Tensor::token_slots, n, other.tokens - 1)] = slot; },
            true);
      if (out_.size() > before) out_.back().two_writers = true;
      return;
    }
  }

  void sequences() {
    if (!has(Tensor::cu_seqlens)) return;
    const std::size_t last = rows_.size();
    const auto entry = [&](const char* what, std::size_t at, std::int64_t value) {
      add(
          Tensor::cu_seqlens, what, [&](Case& c) { c[Tensor::cu_seqlens].values[at] = static_cast<double>(value); }, true);
    };
    entry("begins before the first token", 0, -1);
    entry("ends beyond the tokens", last, valid_.tokens() + 1);
    if (last > 0 && valid_[Tensor::cu_seqlens].values[last - 1] > 0)
      entry("decreases", last, static_cast<std::int64_t>(valid_[Tensor::cu_seqlens].values[last - 1]) - 1);
    add(Tensor::q, "has two batch rows with cu_seqlens", [](Case& c) {
      for (const Tensor tensor : {Tensor::q, Tensor::k, Tensor::v, Tensor::o, Tensor::a, Tensor::g, Tensor::b, Tensor::beta}) {
        if (!c[tensor].present()) continue;
        std::vector<std::int64_t> shape = c[tensor].shape;
        shape[0] = 2;
        c[tensor] = dense(c[tensor].dtype, shape);
      }
    });
    for (const Tensor tensor : {Tensor::token_slots, Tensor::snapshots}) {
      if (!has(tensor)) continue;
      std::int64_t longest = 0;
      for (const Row& row : rows_) longest = std::max(longest, row.tokens);
      if (longest == 0 || (tensor == Tensor::token_slots && has(Tensor::accepted))) continue;
      add(
          tensor, "has no room for the longest sequence",
          [&](Case& c) {
            std::vector<std::int64_t> shape = c[tensor].shape;
            shape[1] = longest - 1;
            c[tensor] = dense(c[tensor].dtype, shape);
          },
          true);
    }
  }

  const Case& valid_;
  std::vector<Row> rows_;
  std::vector<BrokenCall> out_;
};

}  // namespace

std::vector<BrokenCall> broken_calls(const Case& valid) { return Breaker(valid).all(); }

}  // namespace gatedelta::verify
