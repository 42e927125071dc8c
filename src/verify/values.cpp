// SPDX-License-Identifier: Apache-2.0
// The values of random cases: besides the ordinary ones those that hide or provoke errors.
#include <algorithm>
#include <cmath>
#include <limits>

#include "verify/generate.hpp"

namespace gatedelta::verify {
namespace {

enum class Decay { usual, slow, fast, mixed };
enum class Strength { usual, extreme, uniform };
enum class Vectors { usual, collinear, zeros };

const char* text(Decay x) {
  return x == Decay::usual ? "usual" : x == Decay::slow ? "near 1" : x == Decay::fast ? "near 0" : "mixed";
}
const char* text(Strength x) { return x == Strength::usual ? "usual" : x == Strength::extreme ? "0 and 1" : "uniform"; }
const char* text(Vectors x) {
  return x == Vectors::usual ? "usual" : x == Vectors::collinear ? "collinear keys" : "some are zero";
}

class Values {
 public:
  Values(Case& c, Random& random)
      : c_(c),
        random_(random),
        decay_(random.pick({Decay::usual, Decay::usual, Decay::slow, Decay::fast, Decay::mixed})),
        strength_(random.pick({Strength::usual, Strength::usual, Strength::extreme, Strength::uniform})),
        vectors_(random.pick({Vectors::usual, Vectors::usual, Vectors::collinear, Vectors::zeros})),
        large_state_(random.chance(0.15)) {
    c.values = std::string("decay ") + text(decay_) + ", beta " + text(strength_) + ", vectors " + text(vectors_) +
               (large_state_ ? ", large states" : "");
  }

  void draw() {
    const Config& config = c_.config;
    // Without normalisation the step is stable only as long as beta * |k|^2 stays below 2.
    vectors(Tensor::q, config.qk_l2norm ? 0 : 1.5);
    vectors(Tensor::k, config.qk_l2norm ? 0 : 0.95);
    vectors(Tensor::v, 0);
    each(Tensor::A_log, [&] { return decay_ == Decay::slow ? random_.uniform(-6, -2) : random_.uniform(-2, 2.8); });
    each(Tensor::dt_bias, [&] { return random_.normal(); });
    each(Tensor::a, [&] {
      switch (decay_ == Decay::mixed ? random_.pick({Decay::slow, Decay::usual, Decay::fast}) : decay_) {
        case Decay::slow:
          return random_.uniform(-12, -4);
        case Decay::fast:
          return random_.uniform(2, 24);
        default:
          return random_.normal();
      }
    });
    each(Tensor::g, [&] {
      switch (decay_ == Decay::mixed ? random_.pick({Decay::slow, Decay::usual, Decay::fast}) : decay_) {
        case Decay::slow:
          return -random_.uniform(0, 1e-3);
        case Decay::fast:
          return -random_.uniform(5, 69);
        default:
          return -std::exp(random_.normal() - 1);
      }
    });
    each(Tensor::b, [&] {
      if (strength_ == Strength::extreme) return random_.pick({-100.0, -30.0, 30.0, 100.0});
      return strength_ == Strength::uniform ? random_.uniform(-4, 4) : random_.normal();
    });
    each(Tensor::beta, [&] { return strength_ == Strength::extreme ? random_.pick({0.0, 1.0}) : random_.uniform(); });
    const Tensor states = c_.state_input();
    const double size = (large_state_ ? c_[states].dtype == DType::f16 ? 100.0 : 1000.0 : 1.0) /
                        std::sqrt(static_cast<double>(c_.config.key_dim));
    each(states, [&] { return size * random_.normal(); });
    hide_unused();
    for (const Tensor tensor : {Tensor::q, Tensor::k, Tensor::v, Tensor::a, Tensor::g, Tensor::A_log, Tensor::dt_bias,
                                Tensor::b, Tensor::beta, Tensor::state_in})
      repeat_broadcast(c_[tensor]);
    if (c_.in_place) c_[Tensor::state_out] = c_[Tensor::state_in];
  }

 private:
  template <class Draw>
  void each(Tensor tensor, Draw draw) {
    TensorSpec& spec = c_[tensor];
    if (!spec.present()) return;
    spec.values.resize(static_cast<std::size_t>(spec.elements()));
    for (double& value : spec.values) value = rounded(spec.dtype, draw());
  }

  /// Vectors along the last dimension; `longest` > 0 bounds their length.
  void vectors(Tensor tensor, double longest) {
    TensorSpec& spec = c_[tensor];
    const auto width = static_cast<std::size_t>(spec.shape[3]), heads = static_cast<std::size_t>(spec.shape[2]);
    const auto count = static_cast<std::size_t>(spec.elements()) / width;
    spec.values.resize(count * width);
    std::vector<double> directions(heads * width);
    for (double& x : directions) x = random_.normal();
    for (std::size_t i = 0; i < count; ++i) {
      double* vector = &spec.values[i * width];
      if (vectors_ == Vectors::collinear && tensor != Tensor::v) {
        const double factor = random_.pick({1.0, -1.0, 0.25, 3.0});
        for (std::size_t j = 0; j < width; ++j) vector[j] = factor * directions[i % heads * width + j];
      } else {
        const double factor = vectors_ == Vectors::zeros && random_.chance(0.3) ? 0 : 1;
        for (std::size_t j = 0; j < width; ++j) vector[j] = factor * random_.normal();
      }
      double norm = 0;
      for (std::size_t j = 0; j < width; ++j) norm += vector[j] * vector[j];
      const double scale = longest > 0 && norm > 0 ? longest * random_.uniform(0.7, 1) / std::sqrt(norm) : 1;
      for (std::size_t j = 0; j < width; ++j) vector[j] = rounded(spec.dtype, vector[j] * scale);
    }
  }

  /// NaN wherever the call must not look: tokens of padding rows and of no sequence, slots that no row reads. Then a look
  /// shows.
  void hide_unused() {
    const std::vector<Row> rows = plan(c_);
    std::vector<bool> live(static_cast<std::size_t>(c_.batch() * c_.tokens()), false);
    std::vector<bool> read(static_cast<std::size_t>(c_[Tensor::state].present() ? c_[Tensor::state].shape[0] : 0), false);
    for (const Row& row : rows) {
      if (row.padding) continue;
      for (std::int64_t t = row.first_token; t < row.first_token + row.tokens; ++t)
        live[static_cast<std::size_t>(row.batch * c_.tokens() + t)] = true;
      if (!read.empty() && row.source >= 0) read[static_cast<std::size_t>(row.source)] = true;
    }
    for (const Tensor tensor : {Tensor::q, Tensor::k, Tensor::v, Tensor::a, Tensor::g, Tensor::b, Tensor::beta}) {
      TensorSpec& spec = c_[tensor];
      // One value that stands for several tokens may not be hidden with one of them.
      if (spec.present() && spec.strides[0] != 0 && spec.strides[1] != 0) hide(spec, live);
    }
    if (c_[Tensor::state].present()) hide(c_[Tensor::state], read);
  }

  static void hide(TensorSpec& spec, const std::vector<bool>& used) {
    if (spec.values.empty()) return;
    const std::size_t width = spec.values.size() / used.size();
    for (std::size_t i = 0; i < used.size(); ++i)
      if (!used[i]) std::fill_n(spec.values.begin() + static_cast<std::ptrdiff_t>(i * width), width, nan);
  }

  /// Elements along dimensions of stride 0 are one element.
  static void repeat_broadcast(TensorSpec& spec) {
    if (!spec.present()) return;
    const std::vector<double> drawn = spec.values;
    for_each_index(spec.shape, [&](std::int64_t flat, const std::vector<std::int64_t>& index) {
      std::int64_t from = 0;
      for (std::size_t i = 0; i < index.size(); ++i)
        from = from * spec.shape[i] + (spec.strides[i] == 0 && spec.shape[i] > 1 ? 0 : index[i]);
      spec.values[static_cast<std::size_t>(flat)] = drawn[static_cast<std::size_t>(from)];
    });
  }

  static constexpr double nan = std::numeric_limits<double>::quiet_NaN();
  Case& c_;
  Random& random_;
  Decay decay_;
  Strength strength_;
  Vectors vectors_;
  bool large_state_;
};

}  // namespace

void draw_values(Case& c, Random& random) { Values(c, random).draw(); }

}  // namespace gatedelta::verify
