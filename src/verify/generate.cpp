// SPDX-License-Identifier: Apache-2.0
// Random cases: shapes, dtypes, layouts and slots. The values are drawn in values.cpp.
#include "verify/generate.hpp"

#include <algorithm>
#include <map>
#include <numeric>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace gatedelta::verify {
namespace {

//   name         tokens         work     varlen pool snapshots token_slots padding split layout dtypes
// clang-format off
constexpr Family all_families[] = {
    {"step",       Tokens::few,    100'000,  0.0, 0.7, 0.1, 0.1, 0.1, 0.2, 0.1, 0.2},
    {"verify",     Tokens::draft,  100'000,  0.1, 0.9, 0.5, 0.6, 0.1, 0.3, 0.1, 0.2},
    {"prefill",    Tokens::many,   100'000,  0.1, 0.5, 0.1, 0.1, 0.1, 0.2, 0.1, 0.2},
    {"varlen",     Tokens::mixed,  100'000,  1.0, 0.6, 0.2, 0.2, 0.2, 0.2, 0.1, 0.2},
    {"slots",      Tokens::few,    100'000,  0.3, 1.0, 0.2, 0.4, 0.8, 0.6, 0.1, 0.1},
    {"layouts",    Tokens::mixed,  100'000,  0.2, 0.6, 0.3, 0.2, 0.1, 0.2, 0.9, 0.2},
    {"dtypes",     Tokens::mixed,  100'000,  0.2, 0.6, 0.3, 0.2, 0.1, 0.2, 0.1, 1.0},
    {"invariants", Tokens::mixed,  100'000,  0.2, 0.5, 0.2, 0.2, 0.2, 0.3, 0.2, 0.2},
    {"errors",     Tokens::few,    2'000,    0.3, 0.8, 0.5, 0.5, 0.2, 0.5, 0.1, 0.2},
    {"any",        Tokens::mixed,  100'000,  0.3, 0.6, 0.3, 0.3, 0.3, 0.4, 0.3, 0.4},
    {"serving",    Tokens::draft,  500'000,  0.0, 0.8, 0.3, 0.3, 0.2, 0.3, 0.0, 0.0, true},
    {"chunks",     Tokens::many,   500'000,  0.4, 0.8, 0.1, 0.1, 0.2, 0.3, 0.0, 0.0, true},
};
// clang-format on

/// Slots handed out so that no two rows store to one.
class SlotOwners {
 public:
  bool take(std::int64_t slot, std::int64_t row) { return owners_.emplace(slot, row).first->second == row; }

 private:
  std::map<std::int64_t, std::int64_t> owners_;
};

class Generator {
 public:
  Generator(const Family& family, std::uint64_t seed, std::int64_t index, bool rows_apart)
      : family_(family), rows_apart_(rows_apart), random_(seed, std::string(family.name) + "/" + std::to_string(index)) {
    c_.name = std::string(family.name) + "/" + std::to_string(index);
    c_.seed = seed;
  }

  Case make() {
    choose_sizes();
    choose_forms();
    choose_dtypes();
    make_sequences();
    make_inputs();
    make_states();
    draw_values(c_, random_);
    return std::move(c_);
  }

 private:
  void choose_sizes() {
    switch (family_.tokens) {
      case Tokens::few:
        tokens_ = random_.chance(0.6) ? 1 : random_.integer(0, 9);
        break;
      case Tokens::draft:
        tokens_ = family_.serving && random_.chance(0.2) ? 1 : random_.integer(2, 16);
        break;
      case Tokens::many:
        tokens_ = random_.pick<std::int64_t>({15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 130, 200});
        break;
      case Tokens::mixed:
        tokens_ = random_.pick<std::int64_t>({0, 1, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 100, 130, 200});
        break;
    }
    varlen_ = random_.chance(family_.varlen);
    // Mostly small: the float64 evaluations are sequential.
    const double size = random_.uniform();
    const std::int64_t budget = family_.work * (size < 0.8 ? 1 : size < 0.97 ? 6 : 30);
    Config& config = c_.config;
    do {
      const std::int64_t H = random_.pick<std::int64_t>({1, 2, 3, 4, 6, 8, 12, 16});
      std::int64_t* const heads[] = {&config.q_heads, &config.k_heads, &config.v_heads};
      for (std::int64_t* count : heads) do
          *count = H / random_.integer(1, 4);
        while (*count == 0 || H % *count != 0);
      *heads[random_.integer(0, 2)] = H;
      if (random_.chance(0.5)) {  // as models have it
        config.k_heads = config.q_heads;
        config.v_heads = H;
      }
      const auto width = [&] {
        return random_.chance(0.4) ? random_.pick<std::int64_t>({1, 2, 3, 5, 7, 8, 16, 17, 31, 32, 33, 48})
                                   : random_.pick<std::int64_t>({64, 64, 100, 128, 128, 128, 192, 256});
      };
      config.key_dim = family_.serving ? random_.pick<std::int64_t>({64, 128, 256}) : width();
      if (random_.chance(0.4))
        config.value_dim = config.key_dim;
      else
        config.value_dim = family_.serving ? 32 * random_.integer(1, 6) : width();
      rows_ = random_.chance(0.02) ? 0 : random_.pick<std::int64_t>({1, 1, 1, 2, 2, 3, 4, 5, 8, 17});
    } while (std::max<std::int64_t>(tokens_, 1) * (varlen_ ? 1 : rows_) * config.heads() * config.key_dim * config.value_dim >
             budget);
  }

  void choose_forms() {
    Config& config = c_.config;
    config.gate = random_.pick({GateForm::raw, GateForm::raw, GateForm::log_decay, GateForm::none});
    config.beta = random_.pick({BetaForm::logits, BetaForm::logits, BetaForm::twice_logits, BetaForm::value, BetaForm::one});
    config.qk_l2norm = random_.chance(0.75);
    config.l2_eps = random_.pick({1e-6, 1e-6, 1e-5, 1e-3});
    if (random_.chance(0.4)) config.scale = random_.pick({1.0, 0.125, -0.7});
    config.softplus_beta = random_.pick({1.0, 1.0, 0.5, 2.0});
    config.softplus_threshold = random_.pick({20.0, 20.0, 5.0, 0.5});
    config.null_slot = random_.pick<std::int64_t>({-1, -1, 0, 2});
    c_.update_state = random_.chance(0.85);
    c_.aligned = family_.serving || random_.chance(0.6);
    if (!family_.serving) return;
    value_last_ = random_.chance(0.25);
    if (random_.chance(0.5)) config.gate = GateForm::raw, config.beta = BetaForm::logits, config.qk_l2norm = true;
  }

  void choose_dtypes() {
    DTypes& d = c_.config.dtypes;
    const auto any = [&] { return random_.pick({DType::f32, DType::f16, DType::bf16}); };
    if (random_.chance(family_.dtypes)) {
      for (DType* dtype : {&d.q, &d.k, &d.v, &d.o, &d.gate, &d.beta, &d.A_log, &d.dt_bias, &d.state, &d.snapshots})
        *dtype = any();
      return;
    }
    // As models have them: activations of one kind, parameters and states often wider.
    const bool bfloat = family_.serving && random_.chance(0.5);
    d.q = d.k = d.v = d.o = d.gate = d.beta = bfloat ? DType::bf16 : any();
    d.A_log = d.dt_bias = random_.chance(0.5) ? DType::f32 : d.q;
    d.state = !family_.serving && random_.chance(0.6) ? DType::f32 : any();
    d.snapshots = random_.chance(0.7) ? d.state : any();
  }

  void make_sequences() {
    longest_ = tokens_;
    if (!varlen_) return;
    rows_ = random_.integer(random_.chance(0.1) ? 0 : 1, 6);
    std::vector<double> cuts(static_cast<std::size_t>(rows_) + 1);
    for (double& cut : cuts) cut = static_cast<double>(random_.integer(0, tokens_));
    std::sort(cuts.begin(), cuts.end());
    if (random_.chance(0.6)) {  // no tokens outside of all sequences
      cuts.front() = 0;
      if (rows_ > 0) cuts.back() = static_cast<double>(tokens_);
    }
    longest_ = 0;
    for (std::size_t i = 1; i < cuts.size(); ++i)
      longest_ = std::max(longest_, static_cast<std::int64_t>(cuts[i] - cuts[i - 1]));
    indices(Tensor::cu_seqlens, {rows_ + 1}, std::move(cuts));
  }

  void make_inputs() {
    const Config& config = c_.config;
    const DTypes& d = config.dtypes;
    const std::int64_t B = varlen_ ? 1 : rows_, T = tokens_, H = config.heads();
    input(Tensor::q, d.q, {B, T, config.q_heads, config.key_dim});
    input(Tensor::k, d.k, {B, T, config.k_heads, config.key_dim});
    input(Tensor::v, d.v, {B, T, config.v_heads, config.value_dim});
    output(Tensor::o, d.o, {B, T, H, config.value_dim});
    if (config.gate == GateForm::raw) {
      input(Tensor::a, d.gate, {B, T, H});
      input(Tensor::A_log, d.A_log, {H});
      if (random_.chance(0.7)) input(Tensor::dt_bias, d.dt_bias, {H});
    } else if (config.gate == GateForm::log_decay) {
      input(Tensor::g, d.gate, {B, T, H});
    }
    if (config.beta == BetaForm::value)
      input(Tensor::beta, d.beta, {B, T, H});
    else if (config.beta != BetaForm::one)
      input(Tensor::b, d.beta, {B, T, H});
  }

  void make_states() {
    const Config& config = c_.config;
    const std::int64_t H = config.heads(), V = config.value_dim, K = config.key_dim;
    if (random_.chance(family_.snapshots))
      output(Tensor::snapshots, config.dtypes.snapshots, {rows_, longest_ + random_.integer(0, 2), H, V, K});
    if (random_.chance(family_.pool)) {
      make_pool();
      output(Tensor::state, config.dtypes.state, {slots_, H, V, K});
      return;
    }
    const std::vector<std::int64_t> shape = {rows_, H, V, K};
    if (random_.chance(0.6)) input(Tensor::state_in, config.dtypes.state, shape);
    if (!c_.update_state || random_.chance(0.2)) return;
    output(Tensor::state_out, config.dtypes.state, shape);
    if (c_[Tensor::state_in].present() && random_.chance(0.3)) {
      c_[Tensor::state_in] = c_[Tensor::state_out];
      c_.in_place = true;
    }
  }

  void make_pool() {
    const bool by_token = random_.chance(family_.token_slots);
    const bool accepted = by_token && random_.chance(0.6);
    const bool by_number = !accepted && random_.chance(0.2);
    const bool write = random_.chance(family_.split);
    const bool padding = random_.chance(family_.padding);
    const double row_padding = !padding ? 0 : random_.chance(0.1) ? 1 : 0.3, store_padding = padding ? 0.2 : 0;
    const std::int64_t first = c_.config.null_slot + 1;
    const std::int64_t room = by_token ? longest_ + random_.integer(accepted && longest_ == 0 ? 1 : 0, 2) : 0;
    slots_ = (by_number ? std::max(first, rows_) : first) + rows_ * (2 + room) + random_.integer(0, 3);
    std::vector<std::int64_t> free;
    for (std::int64_t slot = by_number ? std::max(first, rows_) : first; slot < slots_; ++slot) free.push_back(slot);
    random_.shuffle(free);
    const auto fresh = [&] {
      const std::int64_t slot = free.back();
      free.pop_back();
      return slot;
    };
    const auto null = [&] { return c_.config.null_slot - random_.pick<std::int64_t>({0, 0, 1, 5}); };
    const std::size_t N = static_cast<std::size_t>(rows_), S = static_cast<std::size_t>(room);
    std::vector<std::int64_t> source(N), lengths(N, longest_);
    if (varlen_) {
      const std::vector<double>& cu = c_[Tensor::cu_seqlens].values;
      for (std::size_t n = 0; n < N; ++n) lengths[n] = static_cast<std::int64_t>(cu[n + 1] - cu[n]);
    }
    // Without split writes and token stores every row stores where it read, so no two may read one slot.
    const bool may_share = write || by_token || !c_.update_state;
    for (std::size_t n = 0; n < N; ++n) {
      if (accepted) continue;  // comes out of token_slots below
      source[n] = by_number ? static_cast<std::int64_t>(n) : random_.chance(row_padding) ? null() : fresh();
      if (may_share && !by_number && n > 0 && random_.chance(0.15))
        source[n] = source[static_cast<std::size_t>(random_.integer(0, static_cast<std::int64_t>(n) - 1))];
    }

    SlotOwners owners;
    // A slot that row n may store to: its own source, one that another row reads, or one nobody has used.
    const auto target = [&](std::size_t n) {
      if (random_.chance(store_padding)) return null();
      if (!accepted && random_.chance(0.6)) {
        const std::size_t other = random_.chance(0.5) ? n : static_cast<std::size_t>(random_.integer(0, rows_ - 1));
        const bool apart = other == n && std::count(source.begin(), source.end(), source[n]) == 1;
        if (source[other] > c_.config.null_slot && (apart || !rows_apart_) &&
            owners.take(source[other], static_cast<std::int64_t>(n)))
          return source[other];
      }
      const std::int64_t slot = fresh();
      owners.take(slot, static_cast<std::int64_t>(n));
      return slot;
    };
    // Slots of a padding row are not looked at, whatever they are.
    const auto is_padding = [&](std::size_t n) { return !by_number && !accepted && source[n] < first; };
    const auto garbage = [&] { return random_.pick<std::int64_t>({-1, 0, 1'000'000}); };

    std::vector<double> token_slots(N * S), accepted_counts(N);
    for (std::size_t n = 0; n < N; ++n)
      for (std::size_t s = 0; s < S; ++s) token_slots[n * S + s] = static_cast<double>(is_padding(n) ? garbage() : target(n));
    for (std::size_t n = 0; n < N && accepted; ++n) {
      const auto last = static_cast<std::size_t>(random_.integer(1, room));
      accepted_counts[n] = static_cast<double>(last);
      double& slot = token_slots[n * S + last - 1];
      if (random_.chance(row_padding)) slot = static_cast<double>(null());
      source[n] = static_cast<std::int64_t>(slot);
      // An entry beyond the tokens of this call is only read, so it may be another row's.
      if (n > 0 && static_cast<std::int64_t>(last) > lengths[n] && random_.chance(0.5) && !rows_apart_)
        slot = static_cast<double>(source[n] = source[n - 1]);
    }
    if (by_token) indices(Tensor::token_slots, {rows_, room}, std::move(token_slots));
    if (accepted)
      indices(Tensor::accepted, {rows_}, std::move(accepted_counts), DType::i32);
    else if (!by_number)
      indices(Tensor::read_slots, {rows_}, {source.begin(), source.end()});
    if (!write) return;
    std::vector<double> writes(N);
    for (std::size_t n = 0; n < N; ++n) writes[n] = static_cast<double>(is_padding(n) ? garbage() : target(n));
    indices(Tensor::write_slots, {rows_}, std::move(writes));
  }

  void indices(Tensor tensor, std::vector<std::int64_t> shape, std::vector<double> values, std::optional<DType> dtype = {}) {
    TensorSpec& spec = c_[tensor];
    spec = {dtype ? *dtype : random_.pick({DType::i32, DType::i64}), std::move(shape), {}, std::move(values)};
    spec.strides = random_.chance(family_.layout) ? arbitrary_strides(spec.shape, true, false) : dense_strides(spec.shape);
  }

  void input(Tensor tensor, DType dtype, std::vector<std::int64_t> shape) {
    TensorSpec& spec = c_[tensor];
    spec = {dtype, std::move(shape), {}, {}};
    spec.strides = random_.chance(family_.layout) ? arbitrary_strides(spec.shape, true, true) : usual_strides(spec.shape);
  }

  void output(Tensor tensor, DType dtype, std::vector<std::int64_t> shape) {
    TensorSpec& spec = c_[tensor];
    spec = {dtype, std::move(shape), {}, {}};
    spec.strides = random_.chance(family_.layout) ? arbitrary_strides(spec.shape, false, false) : usual_strides(spec.shape);
  }

  /// Dense; where the last two dimensions are those of a state, either may be the contiguous one. At times the first
  /// dimension has padding behind it, as slots of a pool or tokens cut out of a wider tensor have.
  std::vector<std::int64_t> usual_strides(const std::vector<std::int64_t>& shape) {
    std::vector<std::int64_t> strides = dense_strides(shape);
    const std::size_t rank = shape.size();
    const bool state = rank == 5 || (rank == 4 && shape[1] == c_.config.heads() && shape[3] == c_.config.key_dim &&
                                     shape[2] == c_.config.value_dim);
    if (state && (family_.serving ? value_last_ : random_.chance(0.4))) {
      strides[rank - 1] = shape[rank - 2];
      strides[rank - 2] = 1;
    }
    if (random_.chance(0.3)) strides[0] += family_.serving ? 16 : random_.pick<std::int64_t>({1, 3, 16, 64});
    return strides;
  }

  std::vector<std::int64_t> arbitrary_strides(const std::vector<std::int64_t>& shape, bool read_only, bool broadcast) {
    std::vector<std::size_t> order(shape.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    if (random_.chance(0.6)) random_.shuffle(order);
    std::vector<std::int64_t> strides(shape.size());
    std::int64_t step = random_.pick<std::int64_t>({1, 1, 2, 3});
    for (std::size_t i = order.size(); i-- > 0;) {
      const std::size_t dim = order[i];
      if (shape[dim] == 1) {
        strides[dim] = random_.pick<std::int64_t>({0, 1, -3, 1'000'000'007});  // is never multiplied by anything but 0
        continue;
      }
      if (broadcast && random_.chance(0.12)) continue;
      strides[dim] = read_only && random_.chance(0.25) ? -step : step;
      step = step * std::max<std::int64_t>(shape[dim], 1) + random_.pick<std::int64_t>({0, 0, 1, 5});
    }
    return strides;
  }

  const Family& family_;
  const bool rows_apart_;
  Random random_;
  Case c_;
  std::int64_t tokens_ = 0, rows_ = 0, longest_ = 0, slots_ = 0;
  bool varlen_ = false;
  bool value_last_ = false;  ///< serving: of all states
};

}  // namespace

std::span<const Family> families() { return all_families; }

const Family* find_family(std::string_view name) {
  for (const Family& family : all_families)
    if (name == family.name) return &family;
  return nullptr;
}

Case make_case(const Family& family, std::uint64_t seed, std::int64_t index, bool rows_apart) {
  return Generator(family, seed, index, rows_apart).make();
}

}  // namespace gatedelta::verify
