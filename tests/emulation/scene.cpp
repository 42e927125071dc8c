// SPDX-License-Identifier: Apache-2.0
#include "scene.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "core/elements.hpp"
#include "core/faults.hpp"
#include "gatedelta/backend.hpp"

namespace gatedelta::emulation {
namespace {

std::int64_t entries_of(const Form& form, std::int64_t n) {
  return n == 0 ? form.entries : std::max<std::int64_t>(form.entries - 3, 0);
}

/// To bfloat16.
double rounded(double x) {
  std::uint16_t stored = 0;
  store_element(&stored, DType::bf16, x);
  return load_element(&stored, DType::bf16);
}

/// Elements of the last dimensions that are not what they were.
template <class... Index>
std::int64_t changes(const TensorView& now, const TensorView& before, Index... index) {
  if constexpr (sizeof...(Index) < max_rank) {
    if (static_cast<int>(sizeof...(Index)) < now.rank) {
      std::int64_t count = 0;
      for (std::int64_t i = 0; i < now.shape[sizeof...(Index)]; ++i) count += changes(now, before, index..., i);
      return count;
    }
  }
  return std::memcmp(element_address(now, index...), element_address(before, index...), size_of(now.dtype)) != 0 ? 1 : 0;
}

}  // namespace

std::string Form::text() const {
  std::string out = std::string(name_of(state)) + " T " + std::to_string(tokens) + " K " + std::to_string(key_dim) + " V " +
                    std::to_string(value_dim) + " heads " + std::to_string(k_heads) + "/" + std::to_string(heads) + " shape " +
                    std::to_string(shape.heads) + ":" + std::to_string(shape.warps) + ":" + std::to_string(shape.span);
  if (capacity > 0) out += " W " + std::to_string(capacity) + " P " + std::to_string(entries);
  if (tree) out += " tree";
  if (dependent) out += " dependent";
  if (entry_dtype != DType::bf16) out += std::string(" entries ") + std::string(name_of(entry_dtype));
  if (inputs != DType::bf16) out += std::string(" inputs ") + std::string(name_of(inputs));
  return out + (usual ? "" : " unusual") + (value_last ? " V-last" : "") + (snapshots ? " snapshots" : "") +
         (other_snapshots ? " of another dtype" : "") + (token_slots ? " token slots" : "") + (update ? "" : " read-only");
}

double Deviation::relative() const { return std::sqrt(errors_ / sum_); }

TensorView Scene::make(DType dtype, const std::vector<std::int64_t>& shape) {
  TensorView out = make_view(nullptr, dtype, shape);
  // All NaN, for what should be written.
  out.data = memory_.emplace_back(static_cast<std::size_t>(out.elements()) * size_of(dtype), std::byte{0xff}).data();
  return out;
}
template <class Value>
TensorView Scene::make(DType dtype, const std::vector<std::int64_t>& shape, Value value) {
  TensorView out = make(dtype, shape);
  for (std::int64_t i = 0; i < out.elements(); ++i)
    store_element(static_cast<char*>(out.data) + i * static_cast<std::int64_t>(size_of(dtype)), dtype, value());
  return out;
}
TensorView Scene::copy(const TensorView& tensor) {
  TensorView out = tensor;
  const std::size_t bytes = static_cast<std::size_t>(tensor.elements()) * size_of(tensor.dtype);
  out.data = memory_.emplace_back(bytes).data();
  std::memcpy(out.data, tensor.data, bytes);
  return out;
}

Scene::Scene(const Form& form) : form_(form) {
  const std::int64_t T = form.tokens, HK = form.k_heads, H = form.heads, K = form.key_dim, V = form.value_dim;
  const auto normal = [&] { return std::normal_distribution<double>()(random_); };
  config_ = {.q_heads = HK, .k_heads = HK, .v_heads = H, .key_dim = K, .value_dim = V};
  DTypes& d = config_.dtypes;
  d.q = d.k = d.v = d.o = form.inputs;
  d.gate = d.beta = DType::bf16;
  d.state = form.state, d.snapshots = form.snapshot_dtype();

  const double key_size = form.usual ? 1 : 1 / std::sqrt(static_cast<double>(K));
  in_.q = make(d.q, {rows, T, HK, K}, normal);
  in_.k = make(d.k, {rows, T, HK, K}, [&] { return key_size * normal(); });
  in_.v = make(d.v, {rows, T, H, V}, normal);
  in_.o = make(d.o, {rows, T, H, V});
  if (form.usual) {
    in_.a = make(d.gate, {rows, T, H}, [&] { return normal() - 2; });
    in_.b = make(d.beta, {rows, T, H}, normal);
    in_.A_log = make(d.A_log, {H}, [&] { return 0.3 * normal(); });
    in_.dt_bias = make(d.dt_bias, {H}, [&] { return 0.1 * normal(); });
  } else {
    d.gate = d.beta = DType::f32;
    config_.gate = GateForm::log_decay, config_.beta = BetaForm::value, config_.qk_l2norm = false;
    in_.g = make(d.gate, {rows, T, H}, [&] { return -0.1 * std::fabs(normal()); });
    in_.beta = make(d.beta, {rows, T, H}, [&] { return 1 / (1 + std::exp(normal())); });
  }
  const auto in_place = [&](TensorView view) { return form.value_last ? view.transposed(view.rank - 2, view.rank - 1) : view; };
  const std::int64_t first = form.value_last ? K : V, second = form.value_last ? V : K;
  in_.state = in_place(make(d.state, {slots, H, first, second}, [&] { return 0.1 * normal(); }));
  state_before_ = copy(in_.state);
  if (form.snapshots) in_.snapshots = in_place(make(d.snapshots, {rows, T, H, first, second}));
  in_.update_state = form.update, in_.dependent_launch = form.dependent;
  in_.read_slots = view(read_slots, {rows});
  if (form.token_slots) {
    in_.token_slots = make(DType::i32, {rows, T});
    for (std::int64_t n = 0; n < rows; ++n)
      for (std::int64_t t = 0; t < T; ++t) store(in_.token_slots, token_slot(n, t), n, t);
  }
  if (form.capacity > 0) make_window();
}

void Scene::make_window() {
  const std::int64_t HK = form_.k_heads, H = form_.heads, K = form_.key_dim, V = form_.value_dim;
  const std::int64_t R = form_.capacity + form_.tokens + 1;  // not all of a ring need be in use
  const auto normal = [&] { return std::normal_distribution<double>()(random_); };
  window_.keys = make(form_.entry_dtype, {slots, HK, R, K});
  window_.corrections = make(form_.entry_dtype, {slots, H, R, V});
  window_.decays = make(DType::f32, {slots, H, R});
  window_.record = {form_.capacity, make(DType::i32, {slots}), make(DType::i32, {slots, R})};
  const double key_size = 1 / std::sqrt(static_cast<double>(K));
  for (std::int64_t n = 0; n < rows; ++n) {
    const std::int64_t slot = read_slots[n] < 0 ? 1 : read_slots[n];
    auto* const length = static_cast<std::int32_t*>(window_.record.length.data) + slot;
    auto* const order = static_cast<std::int32_t*>(window_.record.order.data) + slot * R;
    *length = static_cast<std::int32_t>(entries_of(form_, n));
    std::iota(order, order + R, 0);
    std::shuffle(order, order + R, random_);
    // Places of no entry have NaNs.
    for (const std::int32_t* place = order; place < order + *length; ++place) {
      for (std::int64_t h = 0; h < HK; ++h)
        for (std::int64_t k = 0; k < K; ++k) store(window_.keys, key_size * normal(), slot, h, *place, k);
      for (std::int64_t h = 0; h < H; ++h) {
        store(window_.decays, -0.1 * std::fabs(normal()), slot, h, *place);
        for (std::int64_t v = 0; v < V; ++v) store(window_.corrections, 0.3 * normal(), slot, h, *place, v);
      }
    }
  }
  window_before_ = window_;
  window_before_.keys = copy(window_.keys), window_before_.corrections = copy(window_.corrections);
  window_before_.decays = copy(window_.decays);
  window_before_.record.length = copy(window_.record.length), window_before_.record.order = copy(window_.record.order);
  in_.window = &window_;
  if (!form_.tree) return;
  in_.parent = make(DType::i32, {rows, form_.tokens});
  for (std::int64_t n = 0; n < rows; ++n)
    for (std::int64_t t = 0; t < form_.tokens; ++t)
      store(in_.parent, static_cast<double>(std::uniform_int_distribution<std::int64_t>(-1, t - 1)(random_)), n, t);
}

std::int32_t Scene::token_slot(std::int64_t n, std::int64_t t) {
  constexpr std::int32_t all[rows][6] = {{4, 2, 4, -1, 5, 5}, {3, 3, 3, 3, 3, 3}, {6, 0, 7, 7, 6, 0}};
  return all[n][t % 6];
}

bool Scene::stays(std::int64_t n, std::int64_t t) const {
  bool last = token_slot(n, t) >= 0;
  for (std::int64_t later = t + 1; later < form_.tokens; ++later) last = last && token_slot(n, later) != token_slot(n, t);
  return last;
}

bool Scene::is_for_tokens(std::int64_t slot) const {
  for (std::int64_t n = 0; n < rows; ++n)
    for (std::int64_t t = 0; t < form_.tokens; ++t)
      if (read_slots[n] >= 0 && token_slot(n, t) == slot) return true;
  return false;
}

std::int64_t Scene::before(std::int64_t n, std::int64_t t) const {
  return form_.tree ? static_cast<std::int64_t>(load(in_.parent, n, t)) : t - 1;
}

Result Scene::run(cuda::Kernel kernel, int token_tile) {
  Result result;
  const Call call = validate(config_, in_);
  Fault fault{};
  const auto launch_as = [&](auto params, auto make_plan, auto launch) {
    params.fault = &fault;
    cuda::Plan plan = make_plan(params);
    if (plan.kernel != kernel || plan.token_tile != token_tile) return std::string("the call is planned for another kernel");
    plan.shape = form_.shape;
    const cudaError_t status = launch(plan, params, nullptr);
    return status == cudaSuccess ? std::string() : cudaGetErrorString(status);
  };
  result.fault = form_.capacity > 0 ? launch_as(cuda::make_replay_params(call), cuda::make_replay_plan, cuda::launch_replay)
                                    : launch_as(cuda::make_params(call), cuda::make_plan, cuda::launch_forward);
  if (result.fault.empty() && fault.kind != 0) result.fault = text(fault);
  if (!result.fault.empty()) return result;
  for (std::int64_t n = 0; n < rows; ++n)
    for (std::int64_t h = 0; h < form_.heads; ++h) expect(result, n, h, kernel == cuda::Kernel::recurrent ? 1 : 8);
  count_untouched(result);
  return result;
}

std::string Scene::bits() const {
  std::string out;
  for (const TensorView& tensor : {in_.o, in_.state, in_.snapshots, window_.keys, window_.corrections, window_.decays})
    if (tensor.defined())
      out.append(static_cast<const char*>(tensor.data), static_cast<std::size_t>(tensor.elements()) * size_of(tensor.dtype));
  return out;
}

void Scene::expect(Result& result, std::int64_t n, std::int64_t h, std::int64_t pass) {
  const std::int64_t T = form_.tokens, K = form_.key_dim, V = form_.value_dim, slot = read_slots[n];
  const std::int64_t hk = h / (form_.heads / form_.k_heads), P = entries_of(form_, n);
  if (slot < 0) {
    for (std::int64_t t = 0; t < T; ++t)
      for (std::int64_t v = 0; v < V; ++v) result.outputs_of_padding += load(in_.o, n, t, h, v) != 0;
    return;
  }
  const auto place_of = [&](std::int64_t entry) { return static_cast<std::int64_t>(load(window_.record.order, slot, entry)); };
  const auto each = [&](auto function) {
    for (std::int64_t v = 0; v < V; ++v)
      for (std::int64_t k = 0; k < K; ++k) function(v, k);
  };
  std::vector<double> S(static_cast<std::size_t>(V * K));
  const auto at = [&](std::int64_t v, std::int64_t k) -> double& { return S[static_cast<std::size_t>(v * K + k)]; };
  each([&](std::int64_t v, std::int64_t k) { at(v, k) = load(state_before_, slot, h, v, k); });
  for (std::int64_t j = 0; j < P; ++j) {
    const std::int64_t place = place_of(j);
    const double decay = std::exp(load(window_before_.decays, slot, h, place));
    each([&](std::int64_t v, std::int64_t k) {
      at(v, k) = decay * at(v, k) +
                 load(window_before_.corrections, slot, h, place, v) * load(window_before_.keys, slot, hk, place, k);
    });
  }
  if (form_.capacity > 0) {
    const bool folds = P + T > form_.capacity;
    ++(folds ? result.folded : result.unfolded);
    each([&](std::int64_t v, std::int64_t k) {
      const double got = load(in_.state, slot, h, v, k);
      if (folds)
        result.state.add(got, at(v, k));
      else
        result.untouched += got != load(state_before_, slot, h, v, k);
    });
  }

  const auto norm_factor = [&](const TensorView& tensor, std::int64_t t) {
    if (!config_.qk_l2norm) return 1.0;
    double sum = config_.l2_eps;
    for (std::int64_t k = 0; k < K; ++k) sum += load(tensor, n, t, hk, k) * load(tensor, n, t, hk, k);
    return 1 / std::sqrt(sum);
  };
  std::vector<std::vector<double>> after(static_cast<std::size_t>(T)), stored(after);  // each token
  const std::vector<double> first = S;
  std::vector<double> checkpoint = S;
  if (pass > 1 && form_.capacity > 0 && P + T > form_.capacity)
    each([&](std::int64_t v, std::int64_t k) {
      checkpoint[static_cast<std::size_t>(v * K + k)] = load(in_.state, slot, h, v, k);
    });
  for (std::int64_t t = 0; t < T; ++t) {
    const std::int64_t last = before(n, t);
    std::vector<double>& kept = stored[static_cast<std::size_t>(t)];
    kept = last < 0 ? checkpoint : stored[static_cast<std::size_t>(last)];
    if (last >= 0 && last / pass == t / pass)
      S = after[static_cast<std::size_t>(last)];
    else
      S = t < pass ? first : kept;  // what earlier passes have stored
    double g, beta;
    if (form_.usual) {
      g = -std::exp(load(in_.A_log, h)) * std::log1p(std::exp(load(in_.a, n, t, h) + load(in_.dt_bias, h)));
      beta = 1 / (1 + std::exp(-load(in_.b, n, t, h)));
    } else {
      g = load(in_.g, n, t, h), beta = load(in_.beta, n, t, h);
    }
    const double key_factor = norm_factor(in_.k, t), query_factor = norm_factor(in_.q, t) * config_.effective_scale();
    std::vector<double> key(static_cast<std::size_t>(K)), query(key.size());
    for (std::size_t k = 0; k < key.size(); ++k)
      key[k] = key_factor * load(in_.k, n, t, hk, k), query[k] = query_factor * load(in_.q, n, t, hk, k);
    const std::int64_t place = form_.capacity > 0 ? place_of(P + t) : 0;
    for (std::int64_t v = 0; v < V; ++v) {
      double* const s = &at(v, 0);
      double recalled = 0, out = 0;
      for (std::size_t k = 0; k < key.size(); ++k) {
        s[k] *= std::exp(g), kept[v * K + k] *= std::exp(g);
        recalled += s[k] * key[k];
      }
      const double u = beta * (load(in_.v, n, t, h, v) - recalled);
      const bool rounds = form_.capacity > 0 && form_.entry_dtype == DType::bf16;
      const double entry = rounds ? rounded(key_factor * u) / key_factor : u;
      for (std::size_t k = 0; k < key.size(); ++k) {
        s[k] += u * key[k], kept[v * K + k] += entry * key[k];
        out += s[k] * query[k];
      }
      result.output.add(load(in_.o, n, t, h, v), out);
      if (form_.capacity > 0) result.corrections.add(load(window_.corrections, slot, h, place, v), key_factor * u);
    }
    after[static_cast<std::size_t>(t)] = S;
    if (form_.snapshots)
      each([&](std::int64_t v, std::int64_t k) { result.snapshots.add(load(in_.snapshots, n, t, h, v, k), at(v, k)); });
    if (form_.token_slots && stays(n, t))
      each([&](std::int64_t v, std::int64_t k) { result.state.add(load(in_.state, token_slot(n, t), h, v, k), at(v, k)); });
    if (form_.capacity == 0) continue;
    const double error = std::fabs(load(window_.decays, slot, h, place) - g) / (1 + std::fabs(g));
    result.decays = error <= result.decays ? result.decays : error;  // a NaN stays
    for (std::int64_t k = 0; k < K; ++k) result.keys += load(window_.keys, slot, hk, place, k) != load(in_.k, n, t, hk, k);
  }
  if (form_.capacity == 0 && form_.update && !form_.token_slots)
    each([&](std::int64_t v, std::int64_t k) { result.state.add(load(in_.state, slot, h, v, k), at(v, k)); });
}

/// Whatever the call is not to write.
void Scene::count_untouched(Result& result) const {
  for (std::int64_t slot = 0; slot < slots; ++slot) {
    const auto* const row = std::find(read_slots, read_slots + rows, slot);
    const bool is_read = row != read_slots + rows;
    const bool is_written = form_.token_slots ? is_for_tokens(slot) : is_read;
    if (!is_written || !form_.update) result.untouched += changes(in_.state, state_before_, slot);
    if (form_.capacity == 0) continue;
    const WindowRecord &record = window_.record, &record_before = window_before_.record;
    result.untouched += changes(record.length, record_before.length, slot) + changes(record.order, record_before.order, slot);
    const std::int64_t P = is_read ? entries_of(form_, row - read_slots) : 0, T = is_read ? form_.tokens : 0;
    for (std::int64_t i = 0; i < record.order.shape[1]; ++i) {
      if (i >= P && i < P + T) continue;
      // Slots from 3 on have no record at all.
      const auto place = slot >= 3 ? i : static_cast<std::int64_t>(load(record_before.order, slot, i));
      for (std::int64_t h = 0; h < form_.heads; ++h) {
        if (h < form_.k_heads) result.untouched += changes(window_.keys, window_before_.keys, slot, h, place);
        result.untouched += changes(window_.corrections, window_before_.corrections, slot, h, place) +
                            changes(window_.decays, window_before_.decays, slot, h, place);
      }
    }
  }
  if (!form_.snapshots) return;
  for (std::int64_t n = 0; n < rows; ++n)
    if (read_slots[n] < 0)
      for (std::int64_t t = 0; t < form_.tokens; ++t)
        for (std::int64_t h = 0; h < form_.heads; ++h) {
          const TensorView& to = in_.snapshots;
          for (std::int64_t v = 0; v < form_.value_dim; ++v)
            for (std::int64_t k = 0; k < form_.key_dim; ++k) result.untouched += !std::isnan(load(to, n, t, h, v, k));
        }
}

}  // namespace gatedelta::emulation
