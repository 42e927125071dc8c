// SPDX-License-Identifier: Apache-2.0
#include "window.hpp"

#include <nanobind/stl/string.h>

#include <utility>

#include "docs.hpp"

namespace gatedelta::python {
namespace {

[[noreturn]] void fail(const std::string& message) { throw Error(ErrorCode::invalid_argument, message); }

DType entry_type(const std::string& name) {
  if (name == "bfloat16") return DType::bf16;
  if (name == "float32") return DType::f32;
  fail("entries: expected bfloat16 or float32, got " + name);
}

/// `bytes` at a multiple of 256, in an array that goes to `kept`.
void* aligned_memory(Arrays& arrays, nb::handle like, Device device, std::size_t bytes, std::vector<nb::object>& kept) {
  constexpr std::size_t alignment = 256;
  TensorView view;
  const auto elements = static_cast<std::int64_t>((bytes + alignment) / sizeof(float));
  kept.push_back(arrays.allocate(like, device, {"window", view, {elements}}));
  const auto address = reinterpret_cast<std::uintptr_t>(view.data);
  return reinterpret_cast<void*>((address + alignment - 1) / alignment * alignment);
}

/// A call on the arrays' stream without the interpreter's lock.
template <class Arguments, class Call>
void run(Arrays& arrays, nb::handle like, Device device, const Stream& stream, Arguments& in, Call call) {
  in.stream = stream_for(arrays, like, device, stream);
  const nb::gil_scoped_release others_run;
  call(in);
  if (arrays.must_wait()) check_all(device, in.stream);
}

}  // namespace

Config Windows::configure(Arrays& arrays, nb::handle states, std::int64_t k_heads, std::int64_t null_slot, const Name& backend,
                          TensorView& first) {
  if (nb::isinstance<nb::list>(states) || nb::isinstance<nb::tuple>(states))
    for (nb::handle state : states) states_.push_back(nb::borrow(state));
  else
    states_.push_back(nb::borrow(states));
  if (states_.empty()) fail("states: expected an array for each layer, got none");
  first = state_view(arrays, 0);
  require_rank("state", first, 4, "[slots, H, V, K]");
  Config config;
  config.k_heads = k_heads;
  config.q_heads = config.v_heads = first.shape[1];  // H; which of them has that many makes no difference to windows
  config.value_dim = first.shape[2];
  config.key_dim = first.shape[3];
  config.dtypes.state = first.dtype;
  config.null_slot = null_slot;
  rule_.emplace(config, backend.value_or(""));
  if (config.heads() != first.shape[1])
    fail("k_heads: expected a divisor of " + std::to_string(first.shape[1]) + ", got " + std::to_string(k_heads));
  return config;
}

void Windows::require_like(Arrays& arrays, const TensorView& first, std::size_t layer) const {
  const TensorView state = state_view(arrays, layer);
  if (state.rank != first.rank || state.shape != first.shape || state.dtype != first.dtype || !(state.device == first.device))
    fail("state: expected the shape, dtype and device of the first layer's in layer " + std::to_string(layer));
}

Windows::Windows(nb::handle states, std::int64_t k_heads, std::int64_t capacity, const std::string& entries,
                 std::int64_t max_tokens, std::int64_t null_slot, Name backend, Stream stream) {
  Arrays arrays;
  TensorView first;
  const Config config = configure(arrays, states, k_heads, null_slot, backend, first);
  layout_ = window_layout(config, first.shape[0], capacity, entry_type(entries), max_tokens);
  void* const record = aligned_memory(arrays, states_[0], first.device, layout_.record_bytes, memory_);
  for (std::size_t i = 0; i < states_.size(); ++i) {
    require_like(arrays, first, i);
    layers_.push_back(window_at(layout_, aligned_memory(arrays, states_[0], first.device, layout_.layer_bytes, memory_), record,
                                first.device));
  }
  reset(nb::none(), stream);
}

Windows::Windows(nb::handle states, nb::tuple record, nb::list layers, std::int64_t capacity, std::int64_t null_slot,
                 Name backend) {
  Arrays arrays;
  const auto take = [&](const char* name, nb::handle array, int rank, const char* shape) {
    const TensorView view = arrays.write(name, array);
    require_rank(name, view, rank, shape);
    memory_.push_back(nb::borrow(array));
    return view;
  };
  ReplayWindow window;
  window.record.capacity = capacity;
  window.record.length = take("length", record[0], 1, "[slots]");
  window.record.order = take("order", record[1], 2, "[slots, R]");
  for (nb::handle layer : layers) {
    const auto tensors = nb::cast<nb::tuple>(layer);
    window.keys = take("keys", tensors[0], 4, "[slots, HK, R, K]");
    window.corrections = take("corrections", tensors[1], 4, "[slots, H, R, V]");
    window.decays = take("decays", tensors[2], 3, "[slots, H, R]");
    layers_.push_back(window);
  }
  if (layers_.empty()) fail("layers: expected the tensors of each layer, got none");
  TensorView first;
  const Config config = configure(arrays, states, layers_[0].keys.shape[1], null_slot, backend, first);
  if (states_.size() != layers_.size()) fail("layers: expected one for each state");
  for (std::size_t i = 0; i < states_.size(); ++i) require_like(arrays, first, i);
  layout_ = window_layout(config, first.shape[0], capacity, layers_[0].keys.dtype, window.record.order.shape[1] - capacity);
}

TensorView Windows::state_view(Arrays& arrays, std::size_t layer) const { return arrays.write("state", states_[layer]); }

const ReplayWindow& Windows::layer(std::int64_t layer) const {
  if (layer < 0 || layer >= layers())
    fail("layer: expected 0.." + std::to_string(layers() - 1) + ", got " + std::to_string(layer));
  return layers_[static_cast<std::size_t>(layer)];
}

void Windows::accept(nb::handle accepted, nb::handle slots, std::optional<std::int64_t> tokens, nb::handle cu_seqlens,
                     nb::handle path, Stream stream) const {
  Arrays arrays;
  AcceptArguments in;
  in.record = record();
  in.accepted = arrays.read("accepted", accepted), in.slots = arrays.read("slots", slots);
  in.cu_seqlens = arrays.read("cu_seqlens", cu_seqlens), in.path = arrays.read("path", path);
  if (!tokens && !in.cu_seqlens.defined()) fail("tokens: required where there are no cu_seqlens");
  in.tokens = tokens.value_or(0);
  run(arrays, accepted, in.accepted.device, stream, in, [&](const auto& given) { rule_->accept(given); });
}

void Windows::reset(nb::handle slots, Stream stream) const {
  Arrays arrays;
  ResetArguments in;
  in.record = record();
  in.slots = arrays.read("slots", slots);
  const Device device = state_view(arrays, 0).device;
  run(arrays, states_[0], device, stream, in, [&](const auto& given) { rule_->reset(given); });
}

void Windows::fold(nb::handle slots, Stream stream) const {
  Arrays arrays;
  FoldArguments in;
  in.slots = arrays.read("slots", slots);
  for (std::size_t i = 0; i < layers_.size(); ++i) {
    in.window = layers_[i];
    in.state = state_view(arrays, i);
    run(arrays, states_[0], in.state.device, stream, in, [&](const auto& given) { rule_->fold(given); });
  }
  reset(slots, stream);
}

nb::object Windows::state_of(nb::handle slots, nb::object out, std::int64_t layer, Stream stream) const {
  Arrays arrays;
  FoldArguments in;
  in.window = this->layer(layer);
  in.slots = arrays.read("slots", slots);
  in.state = state_view(arrays, static_cast<std::size_t>(layer));
  require_rank("slots", in.slots, 1, "[N]");
  if (!out.is_none())
    in.out = arrays.write("out", out);
  else
    out = arrays.allocate(state(layer), in.state.device,
                          {"out",
                           in.out,
                           {in.slots.shape[0], in.state.shape[1], in.state.shape[2], in.state.shape[3]},
                           state(layer),
                           in.state.dtype});
  run(arrays, state(layer), in.state.device, stream, in, [&](const auto& given) { rule_->state_of(given); });
  return out;
}

void Windows::copy(nb::handle from, nb::handle to, Stream stream) const {
  Arrays arrays;
  ForkArguments in;
  in.from = arrays.read("from_slots", from), in.to = arrays.read("to_slots", to);
  Device device;
  const auto call = [&](const auto& given) { rule_->copy(given); };
  for (std::size_t i = 0; i < layers_.size(); ++i) {
    in.window = layers_[i];
    in.state = state_view(arrays, i);
    device = in.state.device;
    run(arrays, states_[0], device, stream, in, call);
  }
  in.state = {};
  in.window = {};
  in.window.record = record();
  run(arrays, states_[0], device, stream, in, call);
}

void define_windows(nb::module_& module) {
  using nb::arg;
  const auto optional = [](const char* name) { return arg(name).none() = nb::none(); };
  const auto stream = arg("stream") = nb::none();
  nb::class_<Windows>(module, "ReplayWindow", window_doc)
      .def(nb::init<nb::handle, std::int64_t, std::int64_t, const std::string&, std::int64_t, std::int64_t, Name, Stream>(),
           arg("states"), nb::kw_only(), arg("k_heads"), arg("capacity") = 16, arg("entries") = "bfloat16",
           arg("max_tokens") = 0, arg("null_slot") = -1, arg("backend") = nb::none(), stream, nb::sig(window_signature))
      .def_static(
          "over",
          [](nb::handle states, nb::tuple record, nb::list layers, std::int64_t capacity, std::int64_t null_slot,
             Name backend) { return new Windows(states, record, layers, capacity, null_slot, std::move(backend)); },
          arg("states"), arg("record"), arg("layers"), nb::kw_only(), arg("capacity"), arg("null_slot") = -1,
          arg("backend") = nb::none(), nb::sig(over_signature), over_doc, nb::rv_policy::take_ownership)
      .def("accept", &Windows::accept, arg("accepted"), optional("slots"), nb::kw_only(), arg("tokens") = nb::none(),
           optional("cu_seqlens"), optional("path"), stream, nb::sig(accept_signature), accept_doc)
      .def("reset", &Windows::reset, optional("slots"), nb::kw_only(), stream, nb::sig(reset_signature), reset_doc)
      .def("fold", &Windows::fold, arg("slots"), nb::kw_only(), stream, nb::sig(fold_signature), fold_doc)
      .def("state_of", &Windows::state_of, arg("slots"), optional("out"), nb::kw_only(), arg("layer") = 0, stream,
           nb::sig(state_of_signature), state_of_doc)
      .def("copy", &Windows::copy, arg("from_slots"), arg("to_slots"), nb::kw_only(), stream, nb::sig(copy_signature), copy_doc)
      .def_prop_ro("layers", &Windows::layers, "the number of layers")
      .def_prop_ro(
          "capacity", [](const Windows& self) { return self.layout().capacity; }, "W: the entries of a slot")
      .def_prop_ro(
          "max_tokens", [](const Windows& self) { return self.layout().ring - self.layout().capacity; },
          "the most tokens of a row in one call")
      .def_prop_ro(
          "nbytes",
          [](const Windows& self) {
            return self.layout().record_bytes + static_cast<std::size_t>(self.layers()) * self.layout().layer_bytes;
          },
          "bytes of memory, beside the states");
}

}  // namespace gatedelta::python
