// SPDX-License-Identifier: Apache-2.0
#include "model.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <stdexcept>

#include "io/safetensors.hpp"
#include "speculative.hpp"

namespace textgen {
namespace {

using gatedelta::DType;
using gatedelta::TensorView;

ModelConfig parse_config(const std::string& text) {
  const nlohmann::json json = nlohmann::json::parse(text);
  ModelConfig config;
  const auto read_size = [&](const char* key, std::int64_t& size) {
    size = json.at(key).get<std::int64_t>();
    // The bound keeps products of two sizes far from overflow; the tensors' shapes are compared with them below.
    if (size < 1 || size > 65536) throw std::runtime_error(fmt::format("config: {}: expected 1..65536, got {}", key, size));
  };
  if (json.at("vocab") != "bytes") throw std::runtime_error("config: vocab: expected \"bytes\"");
  read_size("hidden", config.hidden);
  read_size("layers", config.layers);
  read_size("q_heads", config.q_heads);
  read_size("k_heads", config.k_heads);
  read_size("v_heads", config.v_heads);
  read_size("key_dim", config.key_dim);
  read_size("value_dim", config.value_dim);
  read_size("conv", config.conv);
  read_size("ff", config.ff);
  config.rms_eps = json.at("rms_eps").get<float>();
  config.l2_eps = json.at("l2_eps").get<double>();
  config.scale = json.at("scale").get<double>();
  return config;
}

template <class Element>
void convert(const TensorView& from, float* to) {
  const Element* elements = static_cast<const Element*>(from.data);
  std::transform(elements, elements + from.elements(), to, [](Element x) { return gatedelta::to_float(x); });
}

/// The tensors of the file by name, as f32 and with their shape checked.
class Weights {
 public:
  explicit Weights(const gatedelta::io::SafetensorsFile& file) : file_(file) {}

  Matrix matrix(const std::string& name, std::int64_t rows, std::int64_t cols) const {
    Matrix out(rows, cols);
    read(name, {rows, cols}, out.data());
    return out;
  }
  RowVector vector(const std::string& name, std::int64_t size) const {
    RowVector out(size);
    read(name, {size}, out.data());
    return out;
  }

 private:
  void read(const std::string& name, const std::vector<std::int64_t>& shape, float* to) const {
    const TensorView& tensor = file_.tensor(name);
    const std::vector<std::int64_t> found(tensor.shape.begin(), tensor.shape.begin() + tensor.rank);
    if (found != shape)
      throw std::runtime_error(
          fmt::format("{}: expected [{}], got [{}]", name, fmt::join(shape, ", "), fmt::join(found, ", ")));
    if (tensor.dtype == DType::f32)
      std::copy_n(static_cast<const float*>(tensor.data), tensor.elements(), to);
    else if (tensor.dtype == DType::bf16)
      convert<gatedelta::bfloat16>(tensor, to);
    else if (tensor.dtype == DType::f16)
      convert<gatedelta::float16>(tensor, to);
    else
      throw std::runtime_error(fmt::format("{}: expected f32, f16 or bf16, got {}", name, gatedelta::name_of(tensor.dtype)));
  }

  const gatedelta::io::SafetensorsFile& file_;
};

Block read_block(const Weights& weights, const ModelConfig& c, std::int64_t layer) {
  const std::string prefix = fmt::format("blocks.{}.", layer);
  Block block;
  block.mixer_norm = weights.vector(prefix + "n1.weight", c.hidden);
  block.qkv = weights.matrix(prefix + "gdn.qkv.weight", c.qkv_width(), c.hidden);
  block.conv = weights.matrix(prefix + "gdn.conv", c.qkv_width(), c.conv).transpose();
  block.ba = weights.matrix(prefix + "gdn.ba.weight", 2 * c.heads(), c.hidden);
  block.z = weights.matrix(prefix + "gdn.z.weight", c.o_width(), c.hidden);
  block.A_log = weights.vector(prefix + "gdn.A_log", c.heads());
  block.dt_bias = weights.vector(prefix + "gdn.dt_bias", c.heads());
  block.head_norm = weights.vector(prefix + "gdn.norm.weight", c.value_dim);
  block.out = weights.matrix(prefix + "gdn.out.weight", c.hidden, c.o_width());
  block.ff_norm = weights.vector(prefix + "n2.weight", c.hidden);
  block.gate = weights.matrix(prefix + "gate.weight", c.ff, c.hidden);
  block.up = weights.matrix(prefix + "up.weight", c.ff, c.hidden);
  block.down = weights.matrix(prefix + "down.weight", c.hidden, c.ff);
  return block;
}

/// out = in * weight^T. Threads share the columns of `out` where the product takes about a millisecond or more: on a machine
/// that is busy with other work, waiting for a thread that is not scheduled costs as much.
void linear(const Matrix& in, const Matrix& weight, Matrix& out) {
  constexpr std::int64_t block = 64;
  [[maybe_unused]] const bool worth_threads = in.rows() * weight.size() >= 1 << 22;
  out.resize(in.rows(), weight.rows());
#pragma omp parallel for schedule(static) if (worth_threads)
  for (std::int64_t first = 0; first < weight.rows(); first += block) {
    const std::int64_t count = std::min(block, weight.rows() - first);
    out.middleCols(first, count).noalias() = in * weight.middleRows(first, count).transpose();
  }
}

/// x / sqrt(mean(x^2) + eps) * weight for each row.
void rms_norm(const Matrix& x, const RowVector& weight, float eps, Matrix& out) {
  out.resize(x.rows(), x.cols());
  for (std::int64_t t = 0; t < x.rows(); ++t) {
    const float mean_square = x.row(t).squaredNorm() / static_cast<float>(x.cols());
    out.row(t).array() = x.row(t).array() * weight.array() / std::sqrt(mean_square + eps);
  }
}

/// x * sigmoid(x), element by element.
template <class Array>
auto silu(const Array& x) {
  return x / (1.0f + (-x).exp());
}

}  // namespace

gatedelta::Config ModelConfig::mixer(DType state, int threads) const {
  gatedelta::Config mixer;
  mixer.q_heads = q_heads;
  mixer.k_heads = k_heads;
  mixer.v_heads = v_heads;
  mixer.key_dim = key_dim;
  mixer.value_dim = value_dim;
  mixer.dtypes.state = state;
  mixer.l2_eps = l2_eps;
  mixer.scale = scale;
  mixer.num_threads = threads;
  return mixer;
}

Model Model::load(const std::filesystem::path& path) try {
  const gatedelta::io::SafetensorsFile file = gatedelta::io::SafetensorsFile::read(path);
  const auto config = file.metadata().find("config");
  if (config == file.metadata().end()) throw std::runtime_error("expected the metadata \"config\"");
  Model model;
  model.config = parse_config(config->second);
  const Weights weights(file);
  model.embedding = weights.matrix("emb.weight", vocabulary, model.config.hidden);
  for (std::int64_t i = 0; i < model.config.layers; ++i) model.blocks.push_back(read_block(weights, model.config, i));
  model.norm = weights.vector("norm.weight", model.config.hidden);
  model.head = weights.matrix("head.weight", vocabulary, model.config.hidden);
  return model;
} catch (const gatedelta::Error&) {
  throw;  // of the file: names it
} catch (const std::runtime_error& error) {
  throw std::runtime_error(fmt::format("{}: {}", path.string(), error.what()));
} catch (const nlohmann::json::exception& error) {
  throw std::runtime_error(fmt::format("{}: config: {}", path.string(), error.what()));
}

SequencePool::SequencePool(const ModelConfig& config, std::int64_t slots, DType dtype, gatedelta::device::Memory& memory)
    : memory_(memory),
      layers_(config.layers),
      slots_(slots),
      mixer_(config.mixer(dtype, 0)),
      history_rows_(config.conv - 1),
      history_width_(config.qkv_width()) {
  state_bytes_ = static_cast<std::size_t>(mixer_.heads() * mixer_.value_dim * mixer_.key_dim) * gatedelta::size_of(dtype);
  const std::size_t entries = static_cast<std::size_t>(layers_ * slots);
  states_ = {memory_.allocate(entries * state_bytes_), [&memory](void* states) { memory.release(states); }};
  history_.resize(entries * static_cast<std::size_t>(history_rows_ * history_width_));
  for (std::int64_t slot = 0; slot < slots; ++slot) clear(slot);
}

void SequencePool::clear(std::int64_t slot) {
  const std::vector<std::byte> zero(state_bytes_);  // a sequence of no tokens
  for (std::int64_t layer = 0; layer < layers_; ++layer) {
    const std::size_t entry = static_cast<std::size_t>(layer * slots_ + slot);
    memory_.copy_in(static_cast<std::byte*>(states_.get()) + entry * state_bytes_, zero.data(), state_bytes_);
    history(layer, slot).setZero();
  }
}

TensorView SequencePool::states(std::int64_t layer) {
  std::byte* first = static_cast<std::byte*>(states_.get()) + static_cast<std::size_t>(layer * slots_) * state_bytes_;
  const std::int64_t shape[] = {slots_, mixer_.heads(), mixer_.value_dim, mixer_.key_dim};
  return gatedelta::make_view(first, mixer_.dtypes.state, shape, {}, memory_.device());
}

Eigen::Map<Matrix> SequencePool::history(std::int64_t layer, std::int64_t slot) {
  return {history_.data() + (layer * slots_ + slot) * history_rows_ * history_width_, history_rows_, history_width_};
}

Runner::Runner(const Model& model, const RunnerOptions& options)
    : model_(model),
      rule_(model.config.mixer(options.state, options.threads), options.backend),
      memory_(gatedelta::device::memory_for_name(options.backend)),
      calls_(memory_),
      pool_(model.config, options.slots, options.state, memory_) {}

const Matrix& Runner::step(const Step& step) {
  check(step);
  x_.resize(static_cast<Eigen::Index>(step.bytes.size()), model_.config.hidden);
  for (std::int64_t t = 0; t < x_.rows(); ++t) x_.row(t) = model_.embedding.row(step.bytes[t]);
  for (std::int64_t layer = 0; layer < model_.config.layers; ++layer) {
    mix_tokens(layer, step);
    feed_forward(model_.blocks[layer]);
  }
  predict(step);
  return logits_;
}

void Runner::check(const Step& step) const {
  if (step.slots.empty() || step.cu_seqlens.size() != step.slots.size() + 1)
    throw std::invalid_argument("step: expected at least one sequence, and cu_seqlens with one entry more than slots");
  if (step.cu_seqlens.front() != 0 || step.cu_seqlens.back() != static_cast<std::int64_t>(step.bytes.size()))
    throw std::invalid_argument("step: expected cu_seqlens from 0 to the number of bytes");
  if (step.drafts && step.slots.size() != 1) throw std::invalid_argument("step: expected one sequence with drafts");
  for (std::size_t n = 0; n < step.slots.size(); ++n) {
    if (step.cu_seqlens[n] >= step.cu_seqlens[n + 1])
      throw std::invalid_argument(fmt::format("step: sequence {} has no tokens", n));
    if (step.slots[n] < 0 || step.slots[n] >= pool_.slots())
      throw std::invalid_argument(
          fmt::format("step: sequence {} has slot {}, expected 0..{}", n, step.slots[n], pool_.slots() - 1));
  }
}

void Runner::mix_tokens(std::int64_t layer, const Step& step) {
  const Block& block = model_.blocks[layer];
  rms_norm(x_, block.mixer_norm, model_.config.rms_eps, normed_);
  linear(normed_, block.qkv, qkv_);
  linear(normed_, block.ba, ba_);
  linear(normed_, block.z, z_);
  convolve(layer, step);
  run_operator(layer, step);
  gate_heads(block);
  linear(o_, block.out, delta_);
  x_ += delta_;
}

/// A causal convolution over the tokens of each sequence, channel by channel, that continues from the sequence's history.
void Runner::convolve(std::int64_t layer, const Step& step) {
  const Matrix& taps = model_.blocks[layer].conv;
  const std::int64_t before = taps.rows() - 1;  // inputs older than the current token
  mixed_.resize(qkv_.rows(), qkv_.cols());
  for (std::size_t n = 0; n < step.slots.size(); ++n) {
    const std::int64_t first = step.cu_seqlens[n], tokens = step.cu_seqlens[n + 1] - first;
    Eigen::Map<Matrix> history = pool_.history(layer, step.slots[n]);
    // The input at token t of this step; negative t are the tokens before it.
    const auto input = [&](std::int64_t t) {
      const float* row = t < 0 ? history.row(before + t).data() : qkv_.row(first + t).data();
      return Eigen::Map<const Eigen::Array<float, 1, Eigen::Dynamic>>(row, qkv_.cols());
    };
    for (std::int64_t t = 0; t < tokens; ++t) {
      auto out = mixed_.row(first + t).array();
      out = taps.row(before).array() * input(t);
      for (std::int64_t j = 0; j < before; ++j)
        out += taps.row(j).array() * input(step.drafts ? step.drafts->ancestor(t, before - j) : t - before + j);
      out = silu(out);
    }
    if (step.drafts) {
      step.drafts->keep_inputs(layer, qkv_);
      continue;
    }
    // Ascending, so that rows which only move up are read before they are overwritten.
    for (std::int64_t j = 0; j < before; ++j) history.row(j) = input(tokens - before + j).matrix();
  }
}

void Runner::run_operator(std::int64_t layer, const Step& step) {
  const ModelConfig& c = model_.config;
  const Block& block = model_.blocks[layer];
  const std::int64_t sequences = static_cast<std::int64_t>(step.slots.size()), tokens = mixed_.rows(), heads = c.heads();
  o_.resize(tokens, c.o_width());

  // Sequences of one length are a batch [N,T,...], others one batch row [1,tokens,...] with cu_seqlens.
  bool same_length = true;
  for (std::int64_t n = 0; n < sequences; ++n)
    same_length = same_length && (step.cu_seqlens[n + 1] - step.cu_seqlens[n]) * sequences == tokens;
  const std::int64_t batch = same_length ? sequences : 1, length = tokens / batch;

  // Columns of an activation as [batch, length, heads, width], where they are.
  const auto columns = [&](Matrix& from, std::int64_t first, std::int64_t count, std::int64_t width) {
    const std::int64_t row = from.cols();
    return gatedelta::view(from.data() + first, {batch, length, count, width}, {length * row, row, width, 1});
  };
  const auto gates = [&](std::int64_t first) {
    const std::int64_t row = ba_.cols();
    return gatedelta::view(ba_.data() + first, {batch, length, heads}, {length * row, row, 1});
  };

  gatedelta::Arguments arguments;
  arguments.q = columns(mixed_, 0, c.q_heads, c.key_dim);
  arguments.k = columns(mixed_, c.q_width(), c.k_heads, c.key_dim);
  arguments.v = columns(mixed_, c.q_width() + c.k_width(), c.v_heads, c.value_dim);
  arguments.o = columns(o_, 0, heads, c.value_dim);
  arguments.b = gates(0);
  arguments.a = gates(heads);
  arguments.A_log = gatedelta::view(block.A_log.data(), {heads});
  arguments.dt_bias = gatedelta::view(block.dt_bias.data(), {heads});
  arguments.state = pool_.states(layer);
  arguments.read_slots = gatedelta::view(step.slots.data(), {sequences});
  if (!same_length) arguments.cu_seqlens = gatedelta::view(step.cu_seqlens.data(), {sequences + 1});
  if (step.drafts) step.drafts->add_to(arguments, layer);
  backend_ = calls_.forward(rule_, arguments).name();
}

/// o = rms(o) * weight * silu(z), where the norm is over each head.
void Runner::gate_heads(const Block& block) {
  const std::int64_t width = model_.config.value_dim;
  for (std::int64_t t = 0; t < o_.rows(); ++t)
    for (std::int64_t first = 0; first < o_.cols(); first += width) {
      auto o = o_.row(t).segment(first, width);
      const float scale = 1.0f / std::sqrt(o.squaredNorm() / static_cast<float>(width) + model_.config.rms_eps);
      o.array() *= scale * block.head_norm.array() * silu(z_.row(t).segment(first, width).array());
    }
}

void Runner::feed_forward(const Block& block) {
  rms_norm(x_, block.ff_norm, model_.config.rms_eps, normed_);
  linear(normed_, block.gate, gate_);
  linear(normed_, block.up, up_);
  up_.array() *= silu(gate_.array());
  linear(up_, block.down, delta_);
  x_ += delta_;
}

void Runner::predict(const Step& step) {
  if (!step.every_token) {
    // Row n is never beyond the last token of sequence n, so rows can move up in place.
    const std::int64_t sequences = static_cast<std::int64_t>(step.slots.size());
    for (std::int64_t n = 0; n < sequences; ++n) x_.row(n) = x_.row(step.cu_seqlens[n + 1] - 1);
    x_.conservativeResize(sequences, Eigen::NoChange);
  }
  rms_norm(x_, model_.norm, model_.config.rms_eps, normed_);
  linear(normed_, model_.head, logits_);
}

std::uint8_t argmax(const Matrix& logits, std::int64_t row) {
  const float* first = logits.row(row).data();
  return static_cast<std::uint8_t>(std::max_element(first, first + logits.cols()) - first);
}

}  // namespace textgen
