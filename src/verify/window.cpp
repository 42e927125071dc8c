// SPDX-License-Identifier: Apache-2.0
#include "verify/window.hpp"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>

#include "verify/random.hpp"

namespace gatedelta::verify {
namespace {

TensorSpec indices(DType dtype, const std::vector<std::int64_t>& values, std::vector<std::int64_t> shape) {
  TensorSpec out = dense(dtype, std::move(shape));
  out.values.assign(values.begin(), values.end());
  return out;
}

class ScenarioGenerator {
 public:
  ScenarioGenerator(std::uint64_t seed, std::int64_t index) : random_(seed, "window/" + std::to_string(index)) {
    s_.name = "window/" + std::to_string(index);
    seed_ = seed;
  }

  WindowScenario make() {
    serving_ = random_.chance(0.4);
    choose_config();
    s_.capacity = serving_ ? random_.pick<std::int64_t>({4, 8, 16, 16, 32, 32, 64})
                           : random_.pick<std::int64_t>({4, 4, 5, 8, 16, 16, 32, 64});
    s_.max_tokens = random_.chance(0.5) ? s_.capacity : random_.integer(1, s_.capacity);
    s_.entries = serving_ && random_.chance(0.4) ? DType::bf16 : random_.pick({DType::f32, DType::bf16});
    s_.slots = random_.integer(1, 6) + std::max<std::int64_t>(0, s_.config.null_slot + 1);
    const std::int64_t H = s_.config.heads(), K = s_.config.key_dim, V = s_.config.value_dim;
    s_.state = dense(s_.config.dtypes.state, {s_.slots, H, V, K});
    if (random_.chance(serving_ ? 0.4 : 0.25)) s_.state.strides[2] = 1, s_.state.strides[3] = V;  // [slots,H,K,V] in memory
    if (random_.chance(0.3)) s_.state.strides[0] += serving_ ? 8 * random_.integer(1, 5) : random_.integer(1, 40);
    strength_ = random_.pick({0.001, 0.1, 1.0, 30.0});
    for (std::int64_t i = 0; i < s_.state.elements(); ++i)
      s_.state.values.push_back(rounded(s_.state.dtype, 0.1 * random_.normal()));
    const bool long_rows = random_.chance(serving_ ? 0.5 : 0.3);
    const std::int64_t steps = random_.integer(2, 10);
    for (std::int64_t i = 0; i < steps; ++i) add_step(long_rows);
    return std::move(s_);
  }

 private:
  void choose_config() {
    Config& c = s_.config;
    const std::int64_t H = random_.pick<std::int64_t>({1, 2, 4, 6});
    const auto divisor = [&] { return H % 2 == 0 && random_.chance(0.5) ? H / 2 : random_.chance(0.3) ? 1 : H; };
    c.q_heads = divisor();
    c.k_heads = divisor();
    c.v_heads = H;
    if (random_.chance(0.2)) std::swap(c.q_heads, c.v_heads);
    const auto width = [&] { return random_.pick<std::int64_t>({1, 3, 8, 17, 32, 64, 64, 128, 256}); };
    c.key_dim = width();
    c.value_dim = width();
    c.gate = random_.pick({GateForm::raw, GateForm::log_decay, GateForm::log_decay, GateForm::none});
    c.beta = random_.pick({BetaForm::logits, BetaForm::value, BetaForm::one});
    c.qk_l2norm = c.beta == BetaForm::one || random_.chance(0.9);
    c.null_slot = random_.pick<std::int64_t>({-1, -1, 0});
    DTypes& d = c.dtypes;
    d.q = d.k = d.v = d.gate = d.beta = random_.pick({DType::f32, DType::f32, DType::bf16, DType::f16});
    d.o = random_.chance(0.7) ? DType::f32 : d.q;
    d.state = random_.pick({DType::f32, DType::f32, DType::bf16, DType::f16});
    if (!serving_) return;
    d.q = d.k = d.v = d.o = DType::bf16;
    d.gate = d.beta = random_.pick({DType::bf16, DType::bf16, DType::f32});
    c.key_dim = random_.pick<std::int64_t>({64, 64, 128, 128, 256});
    c.value_dim = random_.pick<std::int64_t>({32, 64, 96, 128});
    if (random_.chance(0.5)) return;
    c.gate = GateForm::raw, c.beta = BetaForm::logits, c.qk_l2norm = true;
    d.gate = d.beta = random_.pick({DType::bf16, DType::bf16, DType::bf16, DType::f32});
  }

  void add_step(bool long_rows) {
    WindowStep step;
    const std::int64_t most = long_rows ? s_.max_tokens : std::min<std::int64_t>(s_.max_tokens, serving_ ? 8 : 4);
    std::vector<std::int64_t> pool(static_cast<std::size_t>(s_.slots));
    std::iota(pool.begin(), pool.end(), 0);
    random_.shuffle(pool);
    pool.resize(static_cast<std::size_t>(random_.integer(1, s_.slots)));
    for (const std::int64_t slot : pool) {
      if (random_.chance(0.15)) step.slots.push_back(s_.config.null_slot);
      if (slot > s_.config.null_slot) step.slots.push_back(slot);
    }
    if (step.slots.empty()) step.slots.push_back(s_.config.null_slot);
    const auto N = static_cast<std::int64_t>(step.slots.size());

    Case& c = step.c;
    c.config = s_.config;
    c.seed = seed_;
    c.aligned = serving_;
    std::int64_t B = N, T = random_.chance(0.4) ? 1 : random_.integer(0, most);
    std::vector<std::int64_t> tokens(static_cast<std::size_t>(N), T);
    if (random_.chance(0.3)) {
      std::vector<std::int64_t> cu = {0};
      for (std::int64_t& count : tokens) cu.push_back(cu.back() + (count = random_.integer(0, most)));
      B = 1;
      T = cu.back();
      c[Tensor::cu_seqlens] = indices(DType::i32, cu, {N + 1});
    }
    draw_inputs(c, B, T);
    c[Tensor::read_slots] = indices(random_.pick({DType::i32, DType::i64}), step.slots, {N});

    const bool tree = random_.chance(0.35);
    for (std::int64_t n = 0; n < N; ++n) {
      std::vector<std::int64_t> parent, path;
      for (std::int64_t t = 0; t < tokens[n]; ++t) parent.push_back(tree ? random_.integer(-1, t - 1) : t - 1);
      // A path from the root: back from any token, or none.
      if (!tree) {
        path.resize(static_cast<std::size_t>(random_.chance(0.3) ? tokens[n] : random_.integer(0, tokens[n])));
        std::iota(path.begin(), path.end(), 0);
      } else {
        for (std::int64_t t = random_.integer(-1, tokens[n] - 1); t >= 0; t = parent[t]) path.insert(path.begin(), t);
      }
      // What padding has in this place is nobody's business.
      if (step.slots[static_cast<std::size_t>(n)] <= s_.config.null_slot)
        for (std::int64_t& t : parent) t = random_.integer(-9, 99);
      if (tree) step.parents.insert(step.parents.end(), parent.begin(), parent.end());
      step.accepted.push_back(static_cast<std::int64_t>(path.size()));
      step.paths.push_back(std::move(path));
    }
    if (random_.chance(0.2) && s_.slots > s_.config.null_slot + 2) {
      step.event = random_.pick({WindowEvent::fold, WindowEvent::fork});
      step.event_slot = random_.integer(s_.config.null_slot + 1, s_.slots - 1);
      do step.fork_slot = random_.integer(s_.config.null_slot + 1, s_.slots - 1);
      while (step.fork_slot == step.event_slot);
    }
    s_.steps.push_back(std::move(step));
  }

  void draw_inputs(Case& c, std::int64_t B, std::int64_t T) {
    const Config& config = c.config;
    const DTypes& d = config.dtypes;
    const std::int64_t H = config.heads();
    const auto draw = [&](Tensor tensor, DType dtype, std::vector<std::int64_t> shape, auto value) {
      c[tensor] = dense(dtype, std::move(shape));
      for (std::int64_t i = 0; i < c[tensor].elements(); ++i) c[tensor].values.push_back(rounded(dtype, value()));
    };
    // Without the norm, keys longer than 1 would make the recurrence grow without bound.
    const double size = config.qk_l2norm ? 1 : 1 / std::sqrt(static_cast<double>(config.key_dim) * 2);
    const auto normal = [&] { return random_.normal(); };
    const auto key = [&] { return size * random_.normal(); };
    draw(Tensor::q, d.q, {B, T, config.q_heads, config.key_dim}, key);
    draw(Tensor::k, d.k, {B, T, config.k_heads, config.key_dim}, key);
    draw(Tensor::v, d.v, {B, T, config.v_heads, config.value_dim}, normal);
    c[Tensor::o] = dense(d.o, {B, T, H, config.value_dim});
    if (config.gate == GateForm::log_decay)
      draw(Tensor::g, d.gate, {B, T, H}, [&] {
        // Decays of 1e-30 and of zero now and then: differences of their logarithms would be NaN.
        const double special = random_.uniform();
        return special < 0.03 ? -std::numeric_limits<double>::infinity()
                              : -(special < 0.08 ? 69.0 : strength_) * random_.uniform();
      });
    if (config.gate == GateForm::raw) {
      draw(Tensor::a, d.gate, {B, T, H}, normal);
      draw(Tensor::A_log, d.A_log, {H}, [&] { return std::log(strength_) + 0.5 * random_.normal(); });
      draw(Tensor::dt_bias, d.dt_bias, {H}, normal);
    }
    if (config.beta == BetaForm::logits) draw(Tensor::b, d.beta, {B, T, H}, normal);
    if (config.beta == BetaForm::value) draw(Tensor::beta, d.beta, {B, T, H}, [&] { return random_.uniform(); });
  }

  Random random_;
  WindowScenario s_;
  std::uint64_t seed_ = 0;
  bool serving_ = false;  // as models call the operator: bfloat16, and sizes that backends have kernels of their own for
  double strength_ = 1;
};

/// What the sequences of a scenario are, in the arithmetic type T: of each slot the state of its accepted tokens.
template <class T>
class Model {
 public:
  Model(const WindowScenario& s, std::uint64_t noise_seed)
      : s_(s),
        H_(s.config.heads()),
        K_(s.config.key_dim),
        V_(s.config.value_dim),
        reads_folded_(noise_seed % 2 == 1),
        random_(noise_seed, "window noise") {
    for (const double x : s.state.values) states_.push_back(static_cast<T>(x));
    lengths_.assign(static_cast<std::size_t>(s.slots), 0);
  }

  const std::vector<T>& states() const { return states_; }
  const std::vector<std::int64_t>& lengths() const { return lengths_; }
  bool folds(std::int64_t slot, std::int64_t tokens) const { return lengths_[slot] + tokens > s_.capacity; }

  /// The outputs of a step; the accepted tokens stay.
  std::vector<T> run(const WindowStep& step) {
    std::vector<T> o(static_cast<std::size_t>(step.c[Tensor::o].elements()), T(0));
    const std::vector<Row> rows = sequences(step);
    for (std::size_t n = 0; n < rows.size(); ++n) {
      if (rows[n].padding) continue;
      const std::int64_t slot = step.slots[n];
      const bool fold = folds(slot, rows[n].tokens);
      for (std::int64_t h = 0; h < H_; ++h) run_head(step, rows[n], n, h, fold, o);
      lengths_[slot] = (fold ? 0 : lengths_[slot]) + step.accepted[n];
    }
    if (step.event == WindowEvent::fork) {
      const std::int64_t size = H_ * V_ * K_;
      std::copy_n(states_.begin() + step.event_slot * size, size, states_.begin() + step.fork_slot * size);
      lengths_[step.fork_slot] = lengths_[step.event_slot];
    }
    if (step.event == WindowEvent::fold) {
      for (std::int64_t h = 0; h < H_; ++h) round_state(&states_[(step.event_slot * H_ + h) * V_ * K_]);
      lengths_[step.event_slot] = 0;
    }
    return o;
  }

  static std::vector<Row> sequences(const WindowStep& step) {
    Case c = step.c;
    c[Tensor::state] = {DType::f32, {1, 1, 1, 1}, {1, 1, 1, 1}, {}};  // plan() asks only whether there is a pool
    return plan(c);
  }

 private:
  T noise(T value, double roundings, double unit = 0x1p-24) {
    if constexpr (sizeof(T) == 8) return value;
    return value * static_cast<T>(1 + ((random_.next() >> 63) ? unit : -unit) * roundings);
  }
  /// About the root mean square of what rounding to this dtype does to numbers of all mantissas.
  static double unit(DType dtype) { return dtype == DType::bf16 ? 0x1p-9 : dtype == DType::f16 ? 0x1p-12 : 0x1p-24; }
  T input(const Case& c, Tensor tensor, std::int64_t at) {
    return static_cast<T>(c[tensor].values[static_cast<std::size_t>(at)]);
  }

  void round_state(T* S) {
    if constexpr (sizeof(T) == 8) return;
    for (std::int64_t i = 0; i < V_ * K_; ++i) S[i] = noise(S[i], 1, unit(s_.config.dtypes.state));
  }

  std::vector<T> vector(const Case& c, Tensor tensor, std::int64_t at) {
    std::vector<T> out;
    T squares = 0;
    for (std::int64_t i = 0; i < K_; ++i) {
      out.push_back(input(c, tensor, at * K_ + i));
      squares += out.back() * out.back();
    }
    if (s_.config.qk_l2norm)
      for (T& x : out) x = noise(x / std::sqrt(squares + static_cast<T>(s_.config.l2_eps)), 2);
    return out;
  }

  T log_decay(const Case& c, std::int64_t at, std::int64_t h) {
    if (s_.config.gate == GateForm::none) return 0;
    if (s_.config.gate == GateForm::log_decay) return input(c, Tensor::g, at);
    const T x = input(c, Tensor::a, at) + input(c, Tensor::dt_bias, h);
    return -noise(std::exp(input(c, Tensor::A_log, h)) * std::log1p(std::exp(x)), 4 + std::fabs(static_cast<double>(x)));
  }

  void run_head(const WindowStep& step, const Row& row, std::size_t n, std::int64_t h, bool fold, std::vector<T>& o) {
    const Config& config = s_.config;
    const Case& c = step.c;
    T* S = &states_[(step.slots[n] * H_ + h) * V_ * K_];
    // A row of many tokens may come in parts, and all but the first one then read the checkpoint as that has rounded it.
    const bool rounded_first = fold && reads_folded_ && row.tokens > 8;
    if (rounded_first) round_state(S);
    std::vector<std::vector<T>> after;
    std::vector<T> total;  // decay since before the step
    for (std::int64_t t = 0; t < row.tokens; ++t) {
      const std::int64_t token = row.batch * c.tokens() + row.first_token + t;
      const std::int64_t parent = step.parents.empty() ? t - 1 : step.parents[static_cast<std::size_t>(token)];
      std::vector<T> now = parent < 0 ? std::vector<T>(S, S + V_ * K_) : after[parent];
      const std::vector<T> q = vector(c, Tensor::q, token * config.q_heads + h * config.q_heads / H_);
      const std::vector<T> k = vector(c, Tensor::k, token * config.k_heads + h * config.k_heads / H_);
      const T g = log_decay(c, token * H_ + h, h),
              decay = noise(std::exp(g), 4 + std::min(100.0, std::fabs(static_cast<double>(g))));
      const T b = config.beta == BetaForm::one     ? T(1)
                  : config.beta == BetaForm::value ? input(c, Tensor::beta, token * H_ + h)
                                                   : noise(1 / (1 + std::exp(-input(c, Tensor::b, token * H_ + h))), 2);
      // An entry has the key as given, which may be rounded, and the correction times its norm factor.
      std::vector<T> stored = k;
      if (unit(s_.entries) > unit(config.dtypes.k))
        for (T& x : stored) x = noise(x, 1, unit(s_.entries));
      for (std::int64_t v = 0; v < V_; ++v) {
        T recalled = 0, out = 0;
        T* s = &now[v * K_];
        for (std::int64_t i = 0; i < K_; ++i) recalled += (s[i] *= decay) * k[i];
        const std::int64_t v_at = (token * config.v_heads + h * config.v_heads / H_) * V_ + v;
        const T u = noise(noise(b * (input(c, Tensor::v, v_at) - recalled), 4), 1, unit(s_.entries));
        for (std::int64_t i = 0; i < K_; ++i) out += (s[i] += u * stored[i]) * q[i];
        o[(token * H_ + h) * V_ + v] = noise(static_cast<T>(config.effective_scale()) * out, 2);
      }
      after.push_back(std::move(now));
      total.push_back(parent < 0 ? decay : decay * total[parent]);
    }
    // The checkpoint is rounded when it is folded; what comes on top of it may be computed from the unrounded one.
    std::vector<T> lost(S, S + V_ * K_);
    if (fold && !rounded_first) round_state(S);
    if (step.paths[n].empty()) return;
    const auto last = static_cast<std::size_t>(step.paths[n].back());
    for (std::size_t i = 0; i < lost.size(); ++i) S[i] = after[last][i] + (fold ? total[last] * (S[i] - lost[i]) : T(0));
  }

  const WindowScenario& s_;
  std::int64_t H_, K_, V_;
  bool reads_folded_;
  Random random_;
  std::vector<T> states_;
  std::vector<std::int64_t> lengths_;
};

/// The exact answer and what float32 evaluations make of it, step by step.
class Expected {
 public:
  explicit Expected(const WindowScenario& s) : exact_(s, 0), terms_(s.config.key_dim + s.config.value_dim + s.capacity) {
    // Errors of opposite sign may cancel by luck: in an output of few values, and the rounding of one key in all of them.
    const bool few = s.config.value_dim < 8 || s.config.key_dim * s.config.value_dim < 256;
    const int evaluations = few ? 24 : s.entries == DType::bf16 ? 12 : 4;
    for (int i = 0; i < evaluations; ++i) noisy_.emplace_back(s, static_cast<std::uint64_t>(i) + 1);
  }
  void run(const WindowStep& step) {
    o_ = exact_.run(step);
    noisy_o_.clear();
    for (Model<float>& model : noisy_) noisy_o_.push_back(model.run(step));
  }
  const Model<double>& exact() const { return exact_; }
  const std::vector<double>& o() const { return o_; }

  /// Compares `found` with part `begin`..`begin`+`size`-1 of the outputs or states; the text says what is wrong.
  std::string compare(bool outputs, const std::vector<double>& found, std::size_t begin, std::size_t size, DType dtype) const {
    const std::vector<double>& right = outputs ? o_ : exact_.states();
    double error = 0, rounding = 0, norm = 0, noise = 0;
    for (std::size_t i = begin; i < begin + size; ++i) {
      if (!std::isfinite(found[i])) return "is not finite at " + std::to_string(i);
      error += std::pow(found[i] - right[i], 2);
      rounding += std::pow(half_ulp(dtype, right[i]), 2);
      norm += right[i] * right[i];
    }
    for (std::size_t m = 0; m < noisy_.size(); ++m) {
      const std::vector<float>& values = outputs ? noisy_o_[m] : noisy_[m].states();
      double squares = 0;
      for (std::size_t i = begin; i < begin + size; ++i) squares += std::pow(values[i] - right[i], 2);
      noise = std::max(noise, std::sqrt(squares));
    }
    const double limit = 1.5 * std::sqrt(rounding) + 4 * noise +
                         0x1p-24 * (std::sqrt(static_cast<double>(terms_)) + 8) * std::sqrt(norm) +
                         FLT_MIN * std::sqrt(static_cast<double>(size));
    if (std::sqrt(error) <= limit) return {};
    return "error " + std::to_string(std::sqrt(error)) + " of norm " + std::to_string(std::sqrt(norm)) + ", limit " +
           std::to_string(limit) + ", at " + std::to_string(begin);
  }

 private:
  Model<double> exact_;
  std::int64_t terms_;
  std::vector<Model<float>> noisy_;
  std::vector<double> o_;
  std::vector<std::vector<float>> noisy_o_;
};

/// The tensors of a scenario that live through its steps.
class Windows {
 public:
  Windows(const WindowScenario& s, Memory& memory) : memory_(memory) {
    const WindowLayout layout = window_layout(s.config, s.slots, s.capacity, s.entries, s.max_tokens);
    const auto place = [&](const char* name, DType dtype, const auto& shape) {
      const TensorSpec spec = dense(dtype, {shape.begin(), shape.end()});
      tensors.push_back({name, std::make_unique<GuardedTensor>(spec, memory, 0)});
      return tensors.back().second->view();
    };
    tensors.push_back({"state", std::make_unique<GuardedTensor>(s.state, memory, 0)});
    state = tensors.back().second->view();
    window.keys = place("keys", s.entries, layout.keys);
    window.corrections = place("corrections", s.entries, layout.corrections);
    window.decays = place("decays", DType::f32, layout.decays);
    window.record.capacity = s.capacity;
    window.record.length = place("length", DType::i32, std::vector<std::int64_t>{s.slots});
    window.record.order = place("order", DType::i32, layout.order);
  }

  /// The index tensor, for as long as the scenario runs.
  TensorView index(const std::vector<std::int64_t>& values, std::vector<std::int64_t> shape, DType dtype = DType::i32) {
    inputs_.push_back(std::make_unique<GuardedTensor>(indices(dtype, values, std::move(shape)), memory_, 0));
    return inputs_.back()->view();
  }

  void download() {
    for (auto& [name, tensor] : tensors) tensor->download();
  }
  /// The order of each slot as the last download has it.
  std::vector<double> order() { return tensors[5].second->values(); }

  std::vector<std::pair<const char*, std::unique_ptr<GuardedTensor>>> tensors;  // state first, then as in ReplayWindow
  TensorView state;
  ReplayWindow window;

 private:
  Memory& memory_;
  std::vector<std::unique_ptr<GuardedTensor>> inputs_;
};

}  // namespace

WindowScenario make_window_scenario(std::uint64_t seed, std::int64_t index) { return ScenarioGenerator(seed, index).make(); }

std::string describe(const WindowScenario& s) {
  std::string out = "  capacity " + std::to_string(s.capacity) + ", max_tokens " + std::to_string(s.max_tokens) + ", slots " +
                    std::to_string(s.slots) + ", entries " + std::string(name_of(s.entries)) + ", state " +
                    std::string(name_of(s.state.dtype)) + ", steps " + std::to_string(s.steps.size()) + "\n";
  return out + "  first step:\n" + describe(s.steps.front().c);
}

std::string WindowChecker::unsupported_reason(const WindowScenario& s) const {
  const Windows windows(s, memory_);
  const WindowStep& step = s.steps.front();
  const Instance instance(step.c, memory_);
  Arguments arguments = instance.arguments();
  arguments.state = windows.state;
  arguments.window = &windows.window;
  return backend_.unsupported_reason(validate(s.config, arguments).problem);
}

void WindowChecker::run(const WindowScenario& s) {
  Windows windows(s, memory_);
  Expected expected(s);
  const GatedDeltaRule op(s.config, backend_);
  const std::int64_t H = s.config.heads(), V = s.config.value_dim, K = s.config.key_dim;
  const auto fail = [&](std::size_t step, const std::string& tensor, const std::string& detail) {
    failures_.push_back({"step " + std::to_string(step), tensor, detail, 0, 0});
  };
  std::vector<std::int64_t> all(static_cast<std::size_t>(s.slots));
  std::iota(all.begin(), all.end(), 0);
  op.reset({.record = windows.window.record});
  backend_.synchronize(nullptr);
  windows.download();
  for (auto& [name, tensor] : windows.tensors)
    if (std::string(name) == "length" || std::string(name) == "order")
      tensor->stray_stores(std::vector<std::uint8_t>(static_cast<std::size_t>(tensor->view().elements()), 1));
  std::vector<double> order = windows.order();

  for (std::size_t i = 0; i < s.steps.size() && failures_.empty(); ++i) {
    const WindowStep& step = s.steps[i];
    const std::vector<Row> rows = Model<double>::sequences(step);
    const std::int64_t N = static_cast<std::int64_t>(rows.size());
    const std::vector<std::int64_t> lengths = expected.exact().lengths();
    Instance instance(step.c, memory_);
    Arguments& arguments = instance.arguments();
    arguments.state = windows.state;
    arguments.window = &windows.window;
    if (!step.parents.empty()) arguments.parent = windows.index(step.parents, {step.c.batch(), step.c.tokens()});
    instance.add_workspace(op.workspace_size(arguments));
    ++calls_;
    op.forward(arguments);
    backend_.synchronize(nullptr);
    instance.download();
    windows.download();

    // What may have been stored: checkpoints of folded rows, the places of new entries.
    const std::int64_t R = windows.window.record.order.shape[1];
    std::vector<std::vector<std::uint8_t>> stored;
    for (auto& [name, tensor] : windows.tensors) stored.emplace_back(static_cast<std::size_t>(tensor->view().elements()), 0);
    const auto mark = [&](std::size_t tensor, std::int64_t slot, std::int64_t heads, std::int64_t place, std::int64_t width) {
      for (std::int64_t h = 0; h < heads; ++h)
        std::fill_n(stored[tensor].begin() + ((slot * heads + h) * R + place) * width, width, std::uint8_t{1});
    };
    for (std::int64_t n = 0; n < N; ++n) {
      if (rows[n].padding) continue;
      const std::int64_t slot = step.slots[n];
      if (lengths[slot] + rows[n].tokens > s.capacity)
        std::fill_n(stored[0].begin() + slot * H * V * K, H * V * K, std::uint8_t{1});
      for (std::int64_t t = 0; t < rows[n].tokens; ++t) {
        const auto place = static_cast<std::int64_t>(order[static_cast<std::size_t>(slot * R + lengths[slot] + t)]);
        mark(1, slot, s.config.k_heads, place, K);
        mark(2, slot, H, place, V);
        mark(3, slot, H, place, 1);
      }
    }
    for (std::size_t t = 0; t < windows.tensors.size(); ++t)
      if (const std::string stray = windows.tensors[t].second->stray_stores(stored[t]); !stray.empty())
        fail(i, windows.tensors[t].first, stray);

    expected.run(step);
    const std::vector<double> o = instance.values(Tensor::o);
    for (const Row& row : rows)
      for (std::int64_t t = 0; t < row.tokens; ++t)
        for (std::int64_t h = 0; h < H; ++h) {
          const auto begin = static_cast<std::size_t>(((row.batch * step.c.tokens() + row.first_token + t) * H + h) * V);
          if (row.padding) {
            if (std::any_of(&o[begin], &o[begin] + V, [](double x) { return x != 0; })) fail(i, "o", "padding is not zero");
          } else if (const std::string wrong =
                         expected.compare(true, o, begin, static_cast<std::size_t>(V), step.c[Tensor::o].dtype);
                     !wrong.empty()) {
            fail(i, "o", "row of slot token " + std::to_string(t) + " head " + std::to_string(h) + ": " + wrong);
          }
        }

    AcceptArguments accept{.record = windows.window.record,
                           .slots = windows.index(step.slots, {N}),
                           .accepted = windows.index(step.accepted, {N}),
                           .tokens = rows.front().tokens};
    if (step.c[Tensor::cu_seqlens].present()) accept.cu_seqlens = arguments.cu_seqlens;
    if (!step.parents.empty()) {
      std::vector<std::int64_t> path(static_cast<std::size_t>(N * s.capacity), -1);
      for (std::int64_t n = 0; n < N; ++n) std::copy(step.paths[n].begin(), step.paths[n].end(), path.begin() + n * s.capacity);
      accept.path = windows.index(path, {N, s.capacity});
    }
    op.accept(accept);
    if (step.event != WindowEvent::none) {
      const TensorView slot = windows.index({step.event_slot}, {1}), to = windows.index({step.fork_slot}, {1});
      if (step.event == WindowEvent::fork) {
        op.copy({.window = windows.window, .state = windows.state, .from = slot, .to = to});
        op.copy({.window = {.record = windows.window.record}, .from = slot, .to = to});
      }
      if (step.event == WindowEvent::fold) {
        op.fold({.window = windows.window, .state = windows.state, .slots = slot});
        op.reset({.record = windows.window.record, .slots = slot});
      }
    }
    // The states that checkpoints and entries stand for now, and nothing changed by looking.
    GuardedTensor states(dense(DType::f32, {s.slots, H, V, K}), memory_, 0);
    op.state_of(
        {.window = windows.window, .state = windows.state, .slots = windows.index(all, {s.slots}), .out = states.view()});
    backend_.synchronize(nullptr);
    states.download();
    windows.download();
    order = windows.order();
    std::vector<std::uint8_t> everything;
    for (auto& [name, tensor] : windows.tensors) {
      everything.assign(static_cast<std::size_t>(tensor->view().elements()), 1);
      if (const std::string stray = tensor->stray_stores(everything); !stray.empty()) fail(i, name, stray);
    }
    const std::vector<double> found = states.values();
    for (std::int64_t slot = s.config.null_slot + 1; slot < s.slots; ++slot)
      for (std::int64_t h = 0; h < H; ++h)
        if (const std::string wrong = expected.compare(false, found, static_cast<std::size_t>((slot * H + h) * V * K),
                                                       static_cast<std::size_t>(V * K), s.config.dtypes.state);
            !wrong.empty())
          fail(i, "state", "slot " + std::to_string(slot) + " head " + std::to_string(h) + ": " + wrong);
  }
}

}  // namespace gatedelta::verify
