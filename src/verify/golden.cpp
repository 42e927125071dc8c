// SPDX-License-Identifier: Apache-2.0
// Where the tolerance comes from. Nothing in it is tuned to an implementation or a test:
//
//   limit = 1.5 * rounding + f32 term
//
// - rounding: what storing the golden tensor in its dtype costs. In the relative L2 norm that is the measured
//   ||round(golden) - golden||, for one element half a unit in the last place.
// - f32 term: what an evaluation in float32 may cost on this very case. The condition of a case differs by orders of
//   magnitude (keys that are collinear, decays that cancel, large states), so it is measured: the recurrence is evaluated in
//   plain float32 several times, both token by token and in blocks of tokens (the WY form, which the contract admits; it cannot
//   correct at a later token what was rounded off at an earlier one of its block). Each time every scalar and vector that a
//   step derives from its inputs (normalised q and k, g, the decay, beta, u, o) is off by as many units in the last place as
//   there are roundings in computing it, with random signs; without this noise a small case may be exact by luck. Errors of
//   g have the same sign for all tokens in one of these evaluations: that of exp(A_log) is in each of them, and with two or
//   three tokens random signs may cancel every time. The largest error counts.
//   The term is 4 times that error, for other orders of summation and of operations, plus what the last operations on an
//   output cost even where the rest is exact: 2^-24 * (sqrt(K + V + T) + 8) of the norm, for sums of K, V and T terms whose
//   rounding errors add up like a random walk, and 8 roundings of the scalars on the way.
// - Float results below the smallest normal number may be flushed to zero.
//
// Norms and largest elements are those of a group (one row and head), so that a large state in one head does not hide an error
// in another.
#include "verify/golden.hpp"

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "verify/random.hpp"

namespace gatedelta::verify {
namespace {

/// Relative errors of a few units in the last place of float32, with random signs; none in the float64 evaluation.
class Noise {
 public:
  /// `one_way`: errors of what a head has for each token have the same sign.
  Noise(std::uint64_t seed, bool one_way) : random_(seed, "noise"), one_way_(one_way) {}
  float operator()(float value, double roundings) { return off(value, roundings, (random_.next() >> 63) != 0); }
  float of_head(float value, double roundings) { return one_way_ ? off(value, roundings, true) : (*this)(value, roundings); }
  double operator()(double value, double) { return value; }
  double of_head(double value, double) { return value; }

 private:
  static float off(float value, double roundings, bool up) {
    return value * (1.0f + (up ? 0x1p-24f : -0x1p-24f) * static_cast<float>(roundings));
  }

  Random random_;
  const bool one_way_;
};

/// Everything a call stores, in the arithmetic type T, row-major.
template <class T>
struct Result {
  std::vector<T> o, state, snapshots;
};

/// How the tokens of a sequence are worked off.
enum class Form { one_by_one, in_blocks };

template <class T>
class Recurrence {
 public:
  Recurrence(const Case& c, const std::vector<Row>& rows, Form form, std::uint64_t noise_seed, bool one_way = false)
      : c_(c), form_(form), noise_(noise_seed, one_way), H_(c.config.heads()), K_(c.config.key_dim), V_(c.config.value_dim) {
    result_.o.assign(static_cast<std::size_t>(c[Tensor::o].elements()), T(0));
    result_.state.assign(static_cast<std::size_t>(c[c.state_output()].elements()), T(0));
    result_.snapshots.assign(static_cast<std::size_t>(c[Tensor::snapshots].elements()), T(0));
    q_.resize(static_cast<std::size_t>(K_));
    k_.resize(static_cast<std::size_t>(K_));
    S_.resize(static_cast<std::size_t>(K_ * V_));
    for (std::size_t n = 0; n < rows.size(); ++n)
      if (!rows[n].padding)
        for (std::int64_t h = 0; h < H_; ++h) run(rows[n], static_cast<std::int64_t>(n), h);
  }
  Result<T>& result() { return result_; }

 private:
  T value(Tensor tensor, std::int64_t index) const {
    return static_cast<T>(c_[tensor].values[static_cast<std::size_t>(index)]);
  }

  void run(const Row& row, std::int64_t n, std::int64_t h) {
    const std::int64_t size = V_ * K_;
    std::fill(S_.begin(), S_.end(), T(0));
    if (row.source >= 0) {
      const double* from = &c_[c_.state_input()].values[static_cast<std::size_t>((row.source * H_ + h) * size)];
      for (std::int64_t i = 0; i < size; ++i) S_[i] = static_cast<T>(from[i]);
    }
    const auto keep = [&](std::vector<T>& to, std::int64_t block) {
      std::copy(S_.begin(), S_.end(), to.begin() + (block * H_ + h) * size);
    };
    const std::int64_t room = c_[Tensor::snapshots].present() ? c_[Tensor::snapshots].shape[1] : 0;
    Block block;
    for (std::int64_t t = 0; t < row.tokens; ++t) {
      const std::int64_t token = row.batch * c_.tokens() + row.first_token + t;
      const std::int64_t slot = row.token_slots[static_cast<std::size_t>(t)];
      if (form_ == Form::one_by_one) {
        step(token, h);
      } else {
        extend(block, token, h);
        const bool full = block.G.size() == 64 || t + 1 == row.tokens;
        if (!full && room == 0 && slot < 0) continue;
        finish(block);
        if (full) block = {};
      }
      if (room > 0) keep(result_.snapshots, n * room + t);
      if (slot >= 0) keep(result_.state, slot);
    }
    if (row.final_slot >= 0) keep(result_.state, row.final_slot);
  }

  /// Tokens of one head since the state S0, with the correction u of each.
  struct Block {
    std::vector<T> S0, k, u, G;
  };

  /// One more token in the WY form: u_t = beta_t (v_t - exp(G_t) S0 k_t - sum_j<t exp(G_t - G_j) (k_j k_t) u_j).
  void extend(Block& block, std::int64_t token, std::int64_t h) {
    if (block.G.empty()) block.S0 = S_;
    load(token, h);
    const T b = beta(token, h), scale = static_cast<T>(c_.config.effective_scale());
    const std::int64_t v_vector = token * c_.config.v_heads + h * c_.config.v_heads / H_;
    block.G.push_back(log_decay(token, h) + (block.G.empty() ? T(0) : block.G.back()));
    block.k.insert(block.k.end(), k_.begin(), k_.end());
    block.u.resize(block.u.size() + static_cast<std::size_t>(V_));
    const std::size_t last = block.G.size() - 1;
    const T total = noise_(std::exp(block.G[last]), 2);
    std::vector<T> kk(last + 1), qk(last + 1);  // exp(G_t - G_j) times the products of k_j with k_t and q_t
    for (std::size_t j = 0; j <= last; ++j) {
      const T decay = noise_(std::exp(block.G[last] - block.G[j]), 2);
      kk[j] = decay * dot(&block.k[j * static_cast<std::size_t>(K_)], k_.data());
      qk[j] = decay * dot(&block.k[j * static_cast<std::size_t>(K_)], q_.data());
    }
    for (std::int64_t v = 0; v < V_; ++v) {
      T recalled = total * dot(&block.S0[v * K_], k_.data()), out = total * dot(&block.S0[v * K_], q_.data());
      for (std::size_t j = 0; j < last; ++j) recalled += kk[j] * block.u[j * static_cast<std::size_t>(V_) + v];
      block.u[last * static_cast<std::size_t>(V_) + v] = noise_(b * (value(Tensor::v, v_vector * V_ + v) - recalled), 2);
      for (std::size_t j = 0; j <= last; ++j) out += qk[j] * block.u[j * static_cast<std::size_t>(V_) + v];
      result_.o[(token * H_ + h) * V_ + v] = noise_(scale * out, 2);
    }
  }

  /// The state after the last token: exp(G) S0 + sum_j exp(G - G_j) u_j k_j^T.
  void finish(const Block& block) {
    const T total = noise_(std::exp(block.G.back()), 2);
    for (std::size_t i = 0; i < S_.size(); ++i) S_[i] = total * block.S0[i];
    for (std::size_t j = 0; j < block.G.size(); ++j) {
      const T decay = noise_(std::exp(block.G.back() - block.G[j]), 2);
      for (std::int64_t v = 0; v < V_; ++v) {
        const T u = decay * block.u[j * static_cast<std::size_t>(V_) + v];
        for (std::int64_t i = 0; i < K_; ++i) S_[v * K_ + i] += u * block.k[j * static_cast<std::size_t>(K_) + i];
      }
    }
  }

  T dot(const T* x, const T* y) const {
    T sum = 0;
    for (std::int64_t i = 0; i < K_; ++i) sum += x[i] * y[i];
    return sum;
  }

  /// q^ or k^ of one token.
  void normalise(Tensor tensor, std::int64_t vector, std::vector<T>& out) {
    T squares = 0;
    for (std::int64_t i = 0; i < K_; ++i) {
      out[i] = value(tensor, vector * K_ + i);
      squares += out[i] * out[i];
    }
    if (!c_.config.qk_l2norm) return;
    const T root = std::sqrt(squares + static_cast<T>(c_.config.l2_eps));
    for (std::int64_t i = 0; i < K_; ++i) out[i] = noise_(out[i] / root, 2);
  }

  T log_decay(std::int64_t token, std::int64_t h) {
    const std::int64_t at = token * H_ + h;
    if (c_.config.gate == GateForm::log_decay) return value(Tensor::g, at);
    if (c_.config.gate == GateForm::none) return 0;
    T x = value(Tensor::a, at);
    if (c_[Tensor::dt_bias].present()) x += value(Tensor::dt_bias, h);
    const T steep = static_cast<T>(c_.config.softplus_beta) * x;
    const T softplus = steep > static_cast<T>(c_.config.softplus_threshold)
                           ? x
                           : std::log1p(std::exp(steep)) / static_cast<T>(c_.config.softplus_beta);
    // An error of the sum x is one of |x| ulps in exp(x).
    return -noise_.of_head(std::exp(value(Tensor::A_log, h)) * softplus, 4 + std::fabs(static_cast<double>(steep)));
  }

  T beta(std::int64_t token, std::int64_t h) {
    const std::int64_t at = token * H_ + h;
    if (c_.config.beta == BetaForm::one) return 1;
    if (c_.config.beta == BetaForm::value) return value(Tensor::beta, at);
    const T sigmoid = noise_(1 / (1 + std::exp(-value(Tensor::b, at))), 2);
    return c_.config.beta == BetaForm::logits ? sigmoid : 2 * sigmoid;
  }

  void load(std::int64_t token, std::int64_t h) {
    normalise(Tensor::q, token * c_.config.q_heads + h * c_.config.q_heads / H_, q_);
    normalise(Tensor::k, token * c_.config.k_heads + h * c_.config.k_heads / H_, k_);
  }

  void step(std::int64_t token, std::int64_t h) {
    const Config& config = c_.config;
    load(token, h);
    const std::int64_t v_vector = token * config.v_heads + h * config.v_heads / H_;
    const T decay = config.gate == GateForm::none ? T(1) : noise_(std::exp(log_decay(token, h)), 2);
    const T b = beta(token, h), scale = static_cast<T>(config.effective_scale());
    for (std::int64_t v = 0; v < V_; ++v) {
      T* s = &S_[v * K_];
      T recalled = 0, out = 0;
      for (std::int64_t i = 0; i < K_; ++i) {
        s[i] *= decay;
        recalled += s[i] * k_[i];
      }
      const T u = noise_(b * (value(Tensor::v, v_vector * V_ + v) - recalled), 2);
      for (std::int64_t i = 0; i < K_; ++i) {
        s[i] += u * k_[i];
        out += s[i] * q_[i];
      }
      result_.o[(token * H_ + h) * V_ + v] = noise_(scale * out, 2);
    }
  }

  const Case& c_;
  Form form_;
  Noise noise_;
  std::int64_t H_, K_, V_;
  std::vector<T> q_, k_, S_;
  Result<T> result_;
};

/// Which elements are stored, and the groups they belong to.
class Outputs {
 public:
  Outputs(const Case& c, const std::vector<Row>& rows) : c_(c), H_(c.config.heads()) {
    const std::int64_t V = c.config.value_dim, size = V * c.config.key_dim;
    Output& o = start(Tensor::o);
    std::fill(o.stored.begin(), o.stored.end(), std::uint8_t{1});
    for (const Row& row : rows)
      if (!row.padding)
        for (std::int64_t h = 0; h < H_; ++h) {
          for (std::int64_t t = row.first_token; t < row.first_token + row.tokens; ++t)
            mark(o, ((row.batch * c.tokens() + t) * H_ + h) * V, V);
          o.groups.emplace_back();
        }
    const auto mark_state = [&](Output& out, std::int64_t block) {
      for (std::int64_t h = 0; h < H_; ++h) {
        if (out.stored[static_cast<std::size_t>((block * H_ + h) * size)]) continue;
        mark(out, (block * H_ + h) * size, size);
        out.groups.emplace_back();
      }
    };
    if (c[c.state_output()].present()) {
      Output& state = start(c.state_output());
      for (const Row& row : rows) {
        for (const std::int64_t slot : row.token_slots)
          if (slot >= 0) mark_state(state, slot);
        if (row.final_slot >= 0) mark_state(state, row.final_slot);
      }
    }
    if (c[Tensor::snapshots].present()) {
      Output& snapshots = start(Tensor::snapshots);
      const std::int64_t room = c[Tensor::snapshots].shape[1];
      for (std::size_t n = 0; n < rows.size(); ++n)
        for (std::int64_t t = 0; t < rows[n].tokens; ++t)
          if (!rows[n].padding) mark_state(snapshots, static_cast<std::int64_t>(n) * room + t);
    }
  }
  std::vector<Output> take() { return std::move(outputs_); }

 private:
  Output& start(Tensor tensor) {
    Output out;
    out.tensor = tensor;
    out.stored.assign(static_cast<std::size_t>(c_[tensor].elements()), 0);
    out.group.assign(out.stored.size(), -1);
    outputs_.reserve(3);
    return outputs_.emplace_back(std::move(out));
  }
  static void mark(Output& out, std::int64_t begin, std::int64_t length) {
    for (std::int64_t i = begin; i < begin + length; ++i) {
      out.stored[static_cast<std::size_t>(i)] = 1;
      out.group[static_cast<std::size_t>(i)] = static_cast<std::int32_t>(out.groups.size());
    }
  }

  const Case& c_;
  std::int64_t H_;
  std::vector<Output> outputs_;
};

template <class T>
std::vector<T>& part(Result<T>& result, Tensor tensor) {
  return tensor == Tensor::o ? result.o : tensor == Tensor::snapshots ? result.snapshots : result.state;
}

}  // namespace

const Output* Golden::find(Tensor tensor) const {
  for (const Output& output : outputs)
    if (output.tensor == tensor) return &output;
  return nullptr;
}

double half_ulp(DType dtype, double value) {
  const int digits = dtype == DType::f32 ? 24 : dtype == DType::f16 ? 11 : 8;
  const int lowest = dtype == DType::f16 ? -14 : -126;
  const int exponent = value == 0 || !std::isfinite(value) ? lowest : std::max(std::ilogb(value), lowest);
  return std::ldexp(1.0, exponent - digits);
}

Golden stores_of(const Case& c) { return {Outputs(c, plan(c)).take()}; }

Golden exact_answer(const Case& c) {
  Golden out = stores_of(c);
  Recurrence<double> exact(c, plan(c), Form::one_by_one, 0);
  for (Output& output : out.outputs) output.values = std::move(part(exact.result(), output.tensor));
  return out;
}

Golden golden(const Case& c) {
  const std::vector<Row> rows = plan(c);
  Golden out = exact_answer(c);

  // Small cases need more evaluations to find their condition, and can afford them.
  const std::int64_t work = c.batch() * c.tokens() * c.config.heads() * c.config.key_dim * c.config.value_dim;
  const int evaluations = work < 20'000 ? 8 : work < 200'000 ? 4 : 2;
  for (int i = 0; i < evaluations; ++i) {
    Recurrence<float> noisy(c, rows, i % 2 == 0 || c.tokens() < 2 ? Form::one_by_one : Form::in_blocks,
                            c.seed + static_cast<std::uint64_t>(i), i == 0);
    for (Output& output : out.outputs) {
      const std::vector<float>& values = part(noisy.result(), output.tensor);
      std::vector<double> squares(output.groups.size(), 0.0);
      for (std::size_t e = 0; e < values.size(); ++e) {
        if (output.group[e] < 0) continue;
        const auto g = static_cast<std::size_t>(output.group[e]);
        const double error = std::fabs(static_cast<double>(values[e]) - output.values[e]);
        squares[g] += error * error;
        output.groups[g].element_float = std::max(output.groups[g].element_float, error);
      }
      for (std::size_t g = 0; g < squares.size(); ++g)
        output.groups[g].l2_float = std::max(output.groups[g].l2_float, std::sqrt(squares[g]));
    }
  }

  const double roundings = std::sqrt(static_cast<double>(c.config.key_dim + c.config.value_dim + c.tokens())) + 8;
  for (Output& output : out.outputs) {
    const DType dtype = c[output.tensor].dtype;
    std::vector<double> count(output.groups.size(), 0.0);
    for (std::size_t e = 0; e < output.values.size(); ++e) {
      if (output.group[e] < 0) continue;
      const auto g = static_cast<std::size_t>(output.group[e]);
      Group& group = output.groups[g];
      const double value = output.values[e];
      count[g] += 1;
      group.l2_norm += value * value;
      group.l2_rounding += std::pow(rounded(dtype, value) - value, 2);
      group.largest = std::max(group.largest, std::fabs(value));
    }
    for (std::size_t g = 0; g < output.groups.size(); ++g) {
      Group& group = output.groups[g];
      group.l2_norm = std::sqrt(group.l2_norm);
      group.l2_rounding = std::sqrt(group.l2_rounding);
      group.l2_float = 4 * group.l2_float + 0x1p-24 * roundings * group.l2_norm + FLT_MIN * std::sqrt(count[g]);
      group.element_float = 4 * group.element_float + 0x1p-24 * roundings * group.largest + FLT_MIN;
    }
  }
  return out;
}

}  // namespace gatedelta::verify
