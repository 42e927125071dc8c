// SPDX-License-Identifier: Apache-2.0
#include "verify/check.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <utility>

namespace gatedelta::verify {
namespace {

std::string number(double value) {
  char buffer[32];
  std::snprintf(buffer, sizeof buffer, "%.6g", value);
  return buffer;
}

std::string index_text(const std::vector<std::int64_t>& shape, std::size_t flat) {
  std::string out;
  for (std::size_t dim = shape.size(); dim-- > 0;) {
    const auto size = static_cast<std::size_t>(shape[dim]);
    out = std::to_string(flat % size) + (out.empty() ? "" : ",") + out;
    flat /= size;
  }
  return "[" + out + "]";
}

/// Any two NaN are the same here, other values by their bits.
bool identical(double one, double other) {
  return (std::isnan(one) && std::isnan(other)) || std::bit_cast<std::uint64_t>(one) == std::bit_cast<std::uint64_t>(other);
}

}  // namespace

std::string text(const Failure& failure) {
  std::string out = failure.check + ": " + (failure.tensor.empty() ? "" : failure.tensor + ": ") + failure.detail;
  if (failure.limit > 0 || failure.error > 0)
    out += " (error " + number(failure.error) + ", limit " + number(failure.limit) + ")";
  return out;
}

const std::vector<double>& Observed::find(Tensor tensor) const {
  return tensor == Tensor::o ? o : tensor == Tensor::snapshots ? snapshots : state;
}
std::vector<double>& Observed::find(Tensor tensor) {
  return const_cast<std::vector<double>&>(std::as_const(*this).find(tensor));
}

std::string Checker::unsupported_reason(const Case& c) const {
  const Instance instance(c, memory_);
  return backend_.unsupported_reason(validate(c.config, instance.arguments()).problem);
}

Observed Checker::run(const Case& c, const Golden& expected, const char* check) {
  Instance instance(c, memory_);
  const GatedDeltaRule op(c.config, backend_);
  if (&op.backend_for(instance.arguments()) != &backend_) fail(check, "", "another backend was selected");
  instance.add_workspace(op.workspace_size(instance.arguments()));
  try {
    ++calls_;
    op.forward(instance.arguments());
    backend_.synchronize(nullptr);
  } catch (const Error& error) {
    fail(check, "", std::string("threw ") + name_of(error.code()) + ": " + error.what());
    return {};
  }
  instance.download();
  Observed out;
  for (const Output& output : expected.outputs) out.find(output.tensor) = instance.values(output.tensor);
  for (const std::string& stray : instance.stray_stores(&expected)) fail(check, "", stray);
  return out;
}

void Checker::compare(const Case& c, const Output& expected, const std::vector<double>& found, const char* check) {
  if (found.size() != expected.values.size()) return;  // the call threw, which is reported
  const TensorSpec& spec = c[expected.tensor];
  const char* name = name_of(expected.tensor);
  // Positions of what is not finite come first: no norm means anything with them.
  std::size_t differing = 0, first = 0;
  for (std::size_t i = found.size(); i-- > 0;)
    if (expected.stored[i] && std::isfinite(found[i]) != std::isfinite(rounded(spec.dtype, expected.values[i]))) {
      ++differing;
      first = i;
    }
  if (differing > 0) {
    fail(check, name,
         std::to_string(differing) + " elements differ in being finite, the first at " + index_text(spec.shape, first) + ": " +
             number(found[first]) + " instead of " + number(expected.values[first]));
    return;
  }

  std::vector<double> squares(expected.groups.size(), 0.0);
  double worst_ratio = 1, worst_error = 0, worst_limit = 0;
  std::size_t worst = 0, wrong = 0;
  for (std::size_t i = 0; i < found.size(); ++i) {
    if (!expected.stored[i] || !std::isfinite(found[i])) continue;
    const double error = std::fabs(found[i] - expected.values[i]);
    double limit = 0;  // tokens of padding rows and of no sequence are exactly zero
    if (expected.group[i] >= 0) {
      const auto g = static_cast<std::size_t>(expected.group[i]);
      squares[g] += error * error;
      limit = 1.5 * half_ulp(spec.dtype, expected.values[i]) + expected.groups[g].element_float;
    }
    if (error <= limit) continue;
    ++wrong;
    const double ratio = error / limit;
    if (wrong == 1 || ratio > worst_ratio) {
      worst_ratio = ratio;
      worst = i;
      worst_error = error;
      worst_limit = limit;
    }
  }
  if (wrong > 0)
    fail(check, name,
         std::to_string(wrong) + " of " + std::to_string(found.size()) + " elements are off, the worst at " +
             index_text(spec.shape, worst) + ": " + number(found[worst]) + " instead of " + number(expected.values[worst]),
         worst_error, worst_limit);

  std::size_t groups_wrong = 0;
  Failure worst_group;
  worst_ratio = 0;
  for (std::size_t g = 0; g < squares.size(); ++g) {
    const Group& group = expected.groups[g];
    const double error = std::sqrt(squares[g]);
    if (error <= group.l2_limit() || !std::isfinite(group.l2_limit())) continue;
    ++groups_wrong;
    if (const double ratio = error / group.l2_limit(); ratio > worst_ratio) {
      worst_ratio = ratio;
      worst_group.error = error / group.l2_norm;
      worst_group.limit = group.l2_limit() / group.l2_norm;
      const auto member = std::find(expected.group.begin(), expected.group.end(), static_cast<std::int32_t>(g));
      worst_group.detail = index_text(spec.shape, static_cast<std::size_t>(member - expected.group.begin()));
    }
  }
  if (groups_wrong > 0)
    fail(check, name,
         "the relative L2 error of " + std::to_string(groups_wrong) + " of " + std::to_string(squares.size()) +
             " parts is too large, the worst begins at " + worst_group.detail,
         worst_group.error, worst_group.limit);
}

void Checker::against_golden(const Case& c, const Golden& expected) {
  const Observed found = run(c, expected, "golden");
  for (const Output& output : expected.outputs) compare(c, output, found.find(output.tensor), "golden");
}

void Checker::same_bits(const Case& c, const Golden& expected, const Observed& one, const Observed& other, const char* check) {
  for (const Output& output : expected.outputs) {
    const std::vector<double>&x = one.find(output.tensor), &y = other.find(output.tensor);
    if (x.size() != y.size()) continue;  // a call threw, which is reported
    std::size_t differing = 0, first = 0;
    for (std::size_t i = x.size(); i-- > 0;)
      if (!identical(x[i], y[i])) {
        ++differing;
        first = i;
      }
    if (differing > 0)
      fail(check, name_of(output.tensor),
           std::to_string(differing) + " elements differ, the first at " + index_text(c[output.tensor].shape, first),
           std::fabs(x[first] - y[first]), 0);
  }
}

void Checker::repeats(const Case& c) {
  const Golden expected = stores_of(c);
  const Observed once = run(c, expected, "repeat");
  same_bits(c, expected, once, run(c, expected, "repeat"), "repeat");
}

void Checker::thread_invariant(const Case& c) {
  const Golden expected = stores_of(c);
  Case with = c;
  with.config.num_threads = 1;
  const Observed once = run(with, expected, "threads");
  for (const int threads : {2, 3, 5}) {
    with.config.num_threads = threads;
    same_bits(c, expected, once, run(with, expected, "threads"), "threads");
  }
}

void Checker::batch_invariant(const Case& c) {
  // A device's kernels may depend on how vectors are aligned, and rows that are not alike in that differ from a row alone.
  if (memory_.device().type != DeviceType::cpu)
    for (const TensorSpec& spec : c.tensors)
      if (spec.present() && spec.shape.size() >= 4 && spec.strides[0] % 8 != 0) return;
  const Golden expected = stores_of(c);
  const Observed together = run(c, expected, "batch");
  const std::vector<Row> rows = plan(c);
  for (std::size_t n = 0; n < rows.size(); ++n) {
    if (reads_by_row_number(c) && static_cast<std::int64_t>(n) <= c.config.null_slot) continue;
    const Case single = single_row(c, static_cast<std::int64_t>(n));
    const Golden alone_expected = stores_of(single);
    const Observed alone = run(single, alone_expected, "batch");
    // Pick out of the whole what this row stores.
    Observed part = alone;
    for (const Output& output : alone_expected.outputs) {
      const std::vector<double>& whole = together.find(output.tensor);
      std::vector<double>& picked = part.find(output.tensor);
      if (whole.empty() || picked.empty()) continue;
      const std::vector<std::int64_t>&shape = c[output.tensor].shape, &small = single[output.tensor].shape;
      for_each_index(small, [&](std::int64_t flat, std::vector<std::int64_t> index) {
        if (!output.stored[static_cast<std::size_t>(flat)]) return;
        if (output.tensor == Tensor::o) {
          index[0] = rows[n].batch;
          index[1] += rows[n].first_token;
        } else if (output.tensor != Tensor::state) {
          index[0] = static_cast<std::int64_t>(n);
        }
        std::int64_t from = 0;
        for (std::size_t i = 0; i < index.size(); ++i) from = from * shape[i] + index[i];
        picked[static_cast<std::size_t>(flat)] = whole[static_cast<std::size_t>(from)];
      });
    }
    same_bits(single, alone_expected, part, alone, "batch");
  }
}

bool Checker::splittable(const Case& c) {
  if (c[Tensor::cu_seqlens].present() || c.config.dtypes.state != DType::f32 || c.tokens() == 0 || c.batch() == 0) return false;
  const std::vector<Row> rows = plan(c);
  return std::none_of(rows.begin(), rows.end(), [](const Row& row) { return row.padding; });
}

void Checker::split(const Case& c, const Golden& expected, const std::vector<std::int64_t>& steps) {
  const std::int64_t size = c.config.heads() * c.config.value_dim * c.config.key_dim;
  std::vector<double> states;
  if (c[c.state_input()].present())
    for (const Row& row : plan(c)) {
      const auto from = c[c.state_input()].values.begin() + row.source * size;
      states.insert(states.end(), from, from + size);
    }
  Observed whole;
  whole.o.resize(expected.outputs[0].values.size());
  const std::vector<std::int64_t>& shape = c[Tensor::o].shape;
  std::size_t next = 0;
  for (std::int64_t begin = 0; begin < c.tokens();) {
    const std::int64_t end = std::min(c.tokens(), begin + steps[std::min(next++, steps.size() - 1)]);
    const Case part = token_range(c, begin, end, states);
    const Observed found = run(part, stores_of(part), "split");
    if (found.state.empty()) return;
    for_each_index(part[Tensor::o].shape, [&](std::int64_t flat, const std::vector<std::int64_t>& i) {
      whole.o[static_cast<std::size_t>(((i[0] * shape[1] + begin + i[1]) * shape[2] + i[2]) * shape[3] + i[3])] =
          found.o[static_cast<std::size_t>(flat)];
    });
    states = found.state;
    begin = end;
  }
  compare(c, expected.outputs[0], whole.o, "split");
  // Of the states, those that the one call stores at its end.
  const Output* output = expected.find(c.state_output());
  if (output == nullptr) return;
  Output ends = *output;
  std::fill(ends.stored.begin(), ends.stored.end(), std::uint8_t{0});
  std::vector<double> found(ends.values.size(), 0.0);
  const std::vector<Row> rows = plan(c);
  for (std::size_t n = 0; n < rows.size(); ++n) {
    if (rows[n].final_slot < 0) continue;
    const std::int64_t to = rows[n].final_slot * size;
    std::fill_n(ends.stored.begin() + to, size, std::uint8_t{1});
    std::copy_n(states.begin() + static_cast<std::int64_t>(n) * size, size, found.begin() + to);
  }
  compare(c, ends, found, "split");
}

void Checker::state_layouts(const Case& c, const Golden& expected) {
  for (const bool v_last : {false, true}) {
    Case laid = c;
    for (const Tensor tensor : {Tensor::state, Tensor::state_in, Tensor::state_out, Tensor::snapshots}) {
      TensorSpec& spec = laid[tensor];
      if (!spec.present()) continue;
      const std::size_t rank = spec.shape.size();
      spec.strides = dense_strides(spec.shape);
      if (v_last) spec.strides[rank - 1] = spec.shape[rank - 2], spec.strides[rank - 2] = 1;
    }
    const char* check = v_last ? "V-last" : "K-last";
    const Observed found = run(laid, expected, check);
    for (const Output& output : expected.outputs) compare(laid, output, found.find(output.tensor), check);
  }
}

void Checker::rejects(const Case& c, const std::string& tensor, const std::string& what) {
  const std::string check = "rejects " + what;
  Instance instance(c, memory_);
  ++calls_;
  try {
    GatedDeltaRule(c.config, backend_).forward(instance.arguments());
    fail(check, tensor, "was accepted");
  } catch (const Error& error) {
    const std::string message = error.what();
    if (error.code() != ErrorCode::invalid_argument || message.rfind(tensor + ":", 0) != 0)
      fail(check, tensor, std::string("threw ") + name_of(error.code()) + ": " + message);
  }
  instance.download();
  for (const std::string& stray : instance.stray_stores(nullptr)) fail(check, "", stray);
}

void Checker::faults(const Case& c, const Case& valid, const std::string& tensor, const std::string& what) {
  const std::string check = "fault " + what;
  Instance instance(c, memory_);
  const GatedDeltaRule op(c.config, backend_);
  instance.add_workspace(op.workspace_size(instance.arguments()));
  ++calls_;
  try {
    op.forward(instance.arguments());
  } catch (const Error& error) {
    fail(check, tensor, std::string("the call itself threw ") + name_of(error.code()) + ": " + error.what());
  }
  try {
    backend_.synchronize(nullptr);
    fail(check, tensor, "was not reported");
  } catch (const Error& error) {
    const std::string message = error.what();
    if (error.code() != ErrorCode::device || message.rfind(tensor + ":", 0) != 0)
      fail(check, tensor, std::string("threw ") + name_of(error.code()) + ": " + message);
  }
  try {
    backend_.synchronize(nullptr);
  } catch (const Error& error) {
    fail(check, tensor, std::string("was reported twice: ") + error.what());
  }
  if (c[Tensor::snapshots].shape != valid[Tensor::snapshots].shape) return;
  instance.download();
  const Golden due = stores_of(valid);
  for (const std::string& stray : instance.stray_stores(&due)) fail(check, "", stray);
}

}  // namespace gatedelta::verify
