// SPDX-License-Identifier: Apache-2.0
#include "verify/case.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "core/elements.hpp"

namespace gatedelta::verify {

namespace {

constexpr std::array per_token = {Tensor::q, Tensor::k, Tensor::v, Tensor::o, Tensor::a, Tensor::g, Tensor::b, Tensor::beta};
constexpr std::array per_row = {Tensor::read_slots, Tensor::write_slots, Tensor::token_slots, Tensor::accepted,
                                Tensor::state_in,   Tensor::state_out,   Tensor::snapshots};

std::int64_t index_of(const Case& c, Tensor tensor, std::int64_t i) {
  return static_cast<std::int64_t>(c[tensor].values[static_cast<std::size_t>(i)]);
}

/// Keeps entries begin..begin+length-1 of a dimension.
void cut(TensorSpec& spec, std::size_t dim, std::int64_t begin, std::int64_t length) {
  if (!spec.present()) return;
  std::vector<double> kept;
  if (!spec.values.empty())
    for_each_index(spec.shape, [&](std::int64_t flat, const std::vector<std::int64_t>& index) {
      if (index[dim] >= begin && index[dim] < begin + length) kept.push_back(spec.values[static_cast<std::size_t>(flat)]);
    });
  spec.values = std::move(kept);
  spec.shape[dim] = length;
}

const char* text(GateForm form) { return form == GateForm::raw ? "raw" : form == GateForm::log_decay ? "log_decay" : "none"; }
const char* text(BetaForm form) {
  return form == BetaForm::logits         ? "logits"
         : form == BetaForm::twice_logits ? "twice_logits"
         : form == BetaForm::value        ? "value"
                                          : "one";
}

std::string number(double value) {
  char buffer[32];
  std::snprintf(buffer, sizeof buffer, "%g", value);
  return buffer;
}

template <class T>
std::string list(const std::vector<T>& items) {
  std::string out = "[";
  for (const T& item : items) {
    if (out.size() > 1) out += ',';
    out += number(static_cast<double>(item));
  }
  out += ']';
  return out;
}

}  // namespace

std::int64_t TensorSpec::elements() const {
  std::int64_t count = present() ? 1 : 0;
  for (const std::int64_t size : shape) count *= size;
  return count;
}

std::vector<std::int64_t> dense_strides(const std::vector<std::int64_t>& shape) {
  std::vector<std::int64_t> strides(shape.size());
  std::int64_t step = 1;
  for (std::size_t i = shape.size(); i-- > 0; step *= shape[i]) strides[i] = step;
  return strides;
}

TensorSpec dense(DType dtype, std::vector<std::int64_t> shape) {
  std::vector<std::int64_t> strides = dense_strides(shape);
  return {dtype, std::move(shape), std::move(strides), {}};
}

std::int64_t Case::rows() const {
  const TensorSpec& cu = (*this)[Tensor::cu_seqlens];
  return cu.present() ? cu.shape[0] - 1 : batch();
}

double rounded(DType dtype, double value) {
  std::int64_t storage = 0;
  store_element(&storage, dtype, value);
  return load_element(&storage, dtype);
}

std::string describe(const Case& c) {
  const Config& config = c.config;
  std::string out = "  heads q/k/v " + std::to_string(config.q_heads) + "/" + std::to_string(config.k_heads) + "/" +
                    std::to_string(config.v_heads) + ", K " + std::to_string(config.key_dim) + ", V " +
                    std::to_string(config.value_dim) + ", B " + std::to_string(c.batch()) + ", T " +
                    std::to_string(c.tokens()) + ", rows " + std::to_string(c.rows()) + "\n  gate " + text(config.gate) +
                    ", beta " + text(config.beta) +
                    (config.qk_l2norm ? ", l2norm eps " + number(config.l2_eps) : std::string(", no l2norm")) + ", scale " +
                    (config.scale ? number(*config.scale) : "default") + ", softplus " + number(config.softplus_beta) + "/" +
                    number(config.softplus_threshold) + ", null_slot " + std::to_string(config.null_slot) +
                    (c.update_state ? "" : ", update_state off") + (c.in_place ? ", state_out in place of state_in" : "") +
                    (c.aligned ? ", aligned" : "") + "\n  values: " + c.values + "\n";
  for (int i = 0; i < tensor_count; ++i) {
    const TensorSpec& spec = c.tensors[static_cast<std::size_t>(i)];
    if (!spec.present()) continue;
    out += std::string("  ") + fields[static_cast<std::size_t>(i)].name + " " + std::string(name_of(spec.dtype)) + " " +
           list(spec.shape) + " strides " + list(spec.strides);
    if (!is_floating(spec.dtype) && spec.elements() <= 64) out += " = " + list(spec.values);
    out += "\n";
  }
  return out;
}

std::vector<Row> plan(const Case& c) {
  std::vector<Row> rows(static_cast<std::size_t>(c.rows()));
  const bool pool = c[Tensor::state].present(), by_token = c[Tensor::token_slots].present();
  const std::int64_t room = by_token ? c[Tensor::token_slots].shape[1] : 0;
  const auto slot_or_padding = [&](std::int64_t slot) { return slot <= c.config.null_slot ? -1 : slot; };
  for (std::int64_t n = 0; n < c.rows(); ++n) {
    Row& row = rows[static_cast<std::size_t>(n)];
    row.batch = n;
    row.tokens = c.tokens();
    if (c[Tensor::cu_seqlens].present()) {
      row.batch = 0;
      row.first_token = index_of(c, Tensor::cu_seqlens, n);
      row.tokens = index_of(c, Tensor::cu_seqlens, n + 1) - row.first_token;
    }
    if (pool) {
      row.source = n;
      if (c[Tensor::accepted].present())
        row.source = slot_or_padding(index_of(c, Tensor::token_slots, n * room + index_of(c, Tensor::accepted, n) - 1));
      else if (c[Tensor::read_slots].present())
        row.source = slot_or_padding(index_of(c, Tensor::read_slots, n));
      row.padding = row.source < 0;
    } else {
      row.source = c[Tensor::state_in].present() ? n : -1;
    }
    row.token_slots.assign(static_cast<std::size_t>(row.tokens), -1);
    if (row.padding || !c.update_state) continue;
    if (!pool) {
      row.final_slot = c[Tensor::state_out].present() ? n : -1;
      continue;
    }
    if (c[Tensor::write_slots].present())
      row.final_slot = slot_or_padding(index_of(c, Tensor::write_slots, n));
    else if (!by_token)
      row.final_slot = row.source;
    if (by_token)
      for (std::int64_t t = 0; t < row.tokens; ++t)
        row.token_slots[static_cast<std::size_t>(t)] = slot_or_padding(index_of(c, Tensor::token_slots, n * room + t));
  }
  return rows;
}

bool reads_by_row_number(const Case& c) {
  return c[Tensor::state].present() && !c[Tensor::read_slots].present() && !c[Tensor::accepted].present();
}

Case single_row(const Case& c, std::int64_t n) {
  Case out = c;
  out.name += ", row " + std::to_string(n) + " alone";
  if (c[Tensor::cu_seqlens].present()) {
    const std::int64_t begin = index_of(c, Tensor::cu_seqlens, n), end = index_of(c, Tensor::cu_seqlens, n + 1);
    for (const Tensor tensor : per_token) cut(out[tensor], 1, begin, end - begin);
    cut(out[Tensor::cu_seqlens], 0, 0, 2);
    out[Tensor::cu_seqlens].values = {0, static_cast<double>(end - begin)};
  } else {
    for (const Tensor tensor : per_token) cut(out[tensor], 0, n, 1);
  }
  for (const Tensor tensor : per_row) cut(out[tensor], 0, n, 1);
  if (reads_by_row_number(c)) out[Tensor::read_slots] = {DType::i64, {1}, {1}, {static_cast<double>(n)}};
  return out;
}

Case token_range(const Case& c, std::int64_t begin, std::int64_t end, const std::vector<double>& states) {
  Case out = c;
  out.name += ", tokens " + std::to_string(begin) + ".." + std::to_string(end - 1);
  for (const Tensor tensor : per_token) cut(out[tensor], 1, begin, end - begin);
  for (const Tensor tensor : per_row) out[tensor] = {};
  out[Tensor::state] = {};
  const std::int64_t H = c.config.heads(), V = c.config.value_dim, K = c.config.key_dim;
  TensorSpec dense{c.config.dtypes.state, {c.batch(), H, V, K}, {H * V * K, V * K, K, 1}, {}};
  out[Tensor::state_out] = dense;
  if (!states.empty()) {
    dense.values = states;
    out[Tensor::state_in] = dense;
  }
  out.update_state = true;
  out.in_place = false;
  return out;
}

}  // namespace gatedelta::verify
