// SPDX-License-Identifier: Apache-2.0
#include "forward.hpp"

#include <algorithm>
#include <string>

#include "docs.hpp"
#include "gatedelta/gatedelta.hpp"
#include "jax.hpp"
#include "objects.hpp"
#include "window.hpp"

#ifdef GATEDELTA_CUDA
#include <cuda_runtime_api.h>
#endif

namespace gatedelta::python {
namespace {

std::string shape_text(const TensorView& view) {
  std::string out = "[";
  for (int i = 0; i < view.rank; ++i) out += (i ? ", " : "") + std::to_string(view.shape[i]);
  return out + "]";
}

using Sizes = std::initializer_list<std::int64_t>;

/// Makes a CUDA device current for a scope, as Backend::check expects.
class CurrentDevice {
 public:
#ifdef GATEDELTA_CUDA
  explicit CurrentDevice(Device device) {
    changed_ = device.type == DeviceType::cuda && cudaGetDevice(&before_) == cudaSuccess && before_ != device.index &&
               cudaSetDevice(device.index) == cudaSuccess;
  }
  ~CurrentDevice() {
    if (changed_) (void)cudaSetDevice(before_);
  }
#else
  explicit CurrentDevice(Device) {}
#endif
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  [[maybe_unused]] int before_ = 0;
  [[maybe_unused]] bool changed_ = false;
};

/// state_out and snapshots: None, an array, or True for a new one, which is then a result.
struct Output {
  nb::object array;
  bool asked = false;
  Output(nb::object given) : array(std::move(given)), asked(array.is(Py_True)) {
    if (array.is(Py_False)) array = nb::none();
  }
  bool is_new_or_none() const { return asked || array.is_none(); }
};

nb::object forward(nb::handle q, nb::handle k, nb::handle v, nb::object o, nb::handle a, nb::handle A_log, nb::handle dt_bias,
                   nb::handle g, nb::handle b, nb::handle beta, nb::handle state, nb::handle read_slots, nb::handle write_slots,
                   nb::handle token_slots, nb::handle accepted, nb::handle state_in, nb::object state_out_given,
                   nb::object snapshots_given, nb::handle cu_seqlens, const Windows* window, std::int64_t layer,
                   nb::handle parent, bool update_state, std::optional<double> scale, bool qk_l2norm, double l2_eps,
                   double softplus_beta, double softplus_threshold, bool negative_eigenvalues, std::int64_t null_slot,
                   int num_threads, Name backend, Stream stream) {
  Output state_out(std::move(state_out_given)), snapshots(std::move(snapshots_given));
  const Options options{scale,     qk_l2norm,  l2_eps, softplus_beta, softplus_threshold, negative_eigenvalues,
                        null_slot, num_threads};
  if (framework_of(q) == Framework::jax && o.is_none() && state_out.is_new_or_none() && snapshots.is_new_or_none() &&
      window == nullptr && layer == 0 && parent.is_none() && (state.is_none() || !update_state) && !stream) {
    nb::object results = jax_forward(
        {{q, k, v, a, A_log, dt_bias, g, b, beta, state, read_slots, write_slots, token_slots, accepted, state_in, cu_seqlens},
         state_out.asked,
         snapshots.asked,
         update_state,
         options,
         backend.value_or("")});
    if (results.is_valid()) return results;
  }
  Arrays arrays;
  Arguments in;
  in.q = arrays.read("q", q), in.k = arrays.read("k", k), in.v = arrays.read("v", v);
  in.a = arrays.read("a", a), in.A_log = arrays.read("A_log", A_log), in.dt_bias = arrays.read("dt_bias", dt_bias);
  in.g = arrays.read("g", g), in.b = arrays.read("b", b), in.beta = arrays.read("beta", beta);
  if (window != nullptr) {
    in.window = &window->layer(layer);
    if (!state.is_none()) throw Error(ErrorCode::invalid_argument, "state: given, but the window has the states of its own");
    state = window->state(layer);
  } else if (layer != 0) {
    throw Error(ErrorCode::invalid_argument, "layer: given, but there is no window");
  }
  in.parent = arrays.read("parent", parent);
  in.state = update_state ? arrays.write("state", state) : arrays.read("state", state);
  in.read_slots = arrays.read("read_slots", read_slots), in.write_slots = arrays.read("write_slots", write_slots);
  in.token_slots = arrays.read("token_slots", token_slots), in.accepted = arrays.read("accepted", accepted);
  in.state_in = arrays.read("state_in", state_in);
  in.cu_seqlens = arrays.read("cu_seqlens", cu_seqlens);
  in.update_state = update_state;

  Config config = configuration(in, options);
  const std::int64_t rows = in.cu_seqlens.defined() ? std::max<std::int64_t>(in.cu_seqlens.shape[0] - 1, 0) : in.q.shape[0];
  const std::int64_t heads = config.heads(), tokens = in.q.shape[1];
  // A new state or snapshot has the dtype of the state that is given.
  const bool state_in_given = in.state_in.defined();
  const nb::handle like = state_in_given ? state_in : in.state.defined() ? state : nb::handle();
  const DType state_dtype = state_in_given ? in.state_in.dtype : in.state.dtype;
  std::vector<NewArray> results;
  if (o.is_none())
    results.emplace_back("o", in.o, Sizes{in.q.shape[0], tokens, heads, config.value_dim}, v, in.v.dtype);
  else
    in.o = arrays.write("o", o);
  if (state_out.asked)
    results.emplace_back("state_out", in.state_out, Sizes{rows, heads, config.value_dim, config.key_dim}, like, state_dtype);
  else
    in.state_out = arrays.write("state_out", state_out.array);
  if (snapshots.asked)
    results.emplace_back("snapshots", in.snapshots, Sizes{rows, tokens, heads, config.value_dim, config.key_dim}, like,
                         state_dtype);
  else
    in.snapshots = arrays.write("snapshots", snapshots.array);
  set_dtypes(config, in);
  const GatedDeltaRule rule(config, backend.value_or(""));  // first, as libraries have no arrays of every size and dtype
  arrays.allocate(q, in.q.device, results);
  in.stream = stream_for(arrays, q, in.q.device, stream);
  bool wait = false;
  if (in.q.device.type == DeviceType::cuda) {
    in.workspace_size = rule.workspace_size(in);
    if (in.workspace_size > 0) {
      in.workspace = arrays.scratch(q, in.q.device, in.workspace_size);
      // Its library hands it out again in the order of its current stream, which says nothing of another one.
      wait = in.stream != arrays.stream(q, in.q.device);
    }
  }
  {
    const nb::gil_scoped_release others_run;
    rule.forward(in);
    if (wait || arrays.must_wait()) check_all(in.q.device, in.stream);
  }
  for (NewArray& result : results)
    (result.view == &in.o ? o : result.view == &in.state_out ? state_out.array : snapshots.array) = std::move(result.made);
  if (state_out.asked && snapshots.asked) return nb::make_tuple(o, state_out.array, snapshots.array);
  if (state_out.asked) return nb::make_tuple(o, state_out.array);
  if (snapshots.asked) return nb::make_tuple(o, snapshots.array);
  return o;
}

void commit(nb::handle snapshots, nb::handle accepted, nb::handle state, nb::handle write_slots, std::int64_t null_slot,
            Name backend, Stream stream) {
  Arrays arrays;
  CommitArguments in;
  in.snapshots = arrays.read("snapshots", snapshots), in.accepted = arrays.read("accepted", accepted);
  in.state = arrays.write("state", state), in.write_slots = arrays.read("write_slots", write_slots);
  require_rank("snapshots", in.snapshots, 5, "[N, S, H, V, K]");
  Config config;
  config.q_heads = config.k_heads = config.v_heads = in.snapshots.shape[2];
  config.value_dim = in.snapshots.shape[3], config.key_dim = in.snapshots.shape[4];
  config.dtypes.snapshots = in.snapshots.dtype;
  if (in.state.defined()) config.dtypes.state = in.state.dtype;
  config.null_slot = null_slot;
  const GatedDeltaRule rule(config, backend.value_or(""));
  in.stream = stream_for(arrays, snapshots, in.snapshots.device, stream);
  const nb::gil_scoped_release others_run;
  rule.commit(in);
  if (arrays.must_wait()) check_all(in.snapshots.device, in.stream);
}

void check(nb::handle array, Stream stream) {
  Arrays arrays;
  const Device device = arrays.read("array", array).device;
  void* const queue = stream_for(arrays, array, device, stream);
  const nb::gil_scoped_release others_run;
  check_all(device, queue);
}

/// Whether one of `tensors` is of another type than `plain`, or needs a gradient where these are recorded.
bool any_special(const nb::tuple& tensors, const nb::tuple& plain, bool gradients) {
  static PyObject* const requires_grad = PyUnicode_InternFromString("requires_grad");
  for (nb::handle tensor : tensors) {
    if (tensor.is_none() || PyBool_Check(tensor.ptr())) continue;
    if (!PySequence_Contains(plain.ptr(), reinterpret_cast<PyObject*>(Py_TYPE(tensor.ptr())))) return true;
    if (gradients && attribute(tensor, requires_grad).is(Py_True)) return true;
  }
  return false;
}

}  // namespace

Config configuration(const Arguments& in, const Options& options) {
  require_rank("q", in.q, 4, "[B, T, HQ, K]");
  require_rank("k", in.k, 4, "[B, T, HK, K]");
  require_rank("v", in.v, 4, "[B, T, HV, V]");
  Config config;
  config.q_heads = in.q.shape[2], config.k_heads = in.k.shape[2], config.v_heads = in.v.shape[2];
  config.key_dim = in.q.shape[3], config.value_dim = in.v.shape[3];
  config.gate = in.a.defined() ? GateForm::raw : in.g.defined() ? GateForm::log_decay : GateForm::none;
  config.beta = in.b.defined() ? (options.negative_eigenvalues ? BetaForm::twice_logits : BetaForm::logits)
                               : (in.beta.defined() ? BetaForm::value : BetaForm::one);
  config.qk_l2norm = options.qk_l2norm, config.l2_eps = options.l2_eps, config.scale = options.scale;
  config.softplus_beta = options.softplus_beta, config.softplus_threshold = options.softplus_threshold;
  config.null_slot = options.null_slot, config.num_threads = options.num_threads;
  return config;
}

void set_dtypes(Config& config, const Arguments& in) {
  DTypes& dtypes = config.dtypes;
  const auto dtype = [](DType& out, const TensorView& first, const TensorView& second = {}) {
    if (first.defined() || second.defined()) out = first.defined() ? first.dtype : second.dtype;
  };
  dtype(dtypes.q, in.q), dtype(dtypes.k, in.k), dtype(dtypes.v, in.v), dtype(dtypes.o, in.o);
  dtype(dtypes.gate, in.a, in.g), dtype(dtypes.beta, in.b, in.beta);
  dtype(dtypes.A_log, in.A_log), dtype(dtypes.dt_bias, in.dt_bias), dtype(dtypes.snapshots, in.snapshots);
  dtype(dtypes.state, in.state, in.state_in.defined() ? in.state_in : in.state_out);
}

void require_rank(const char* name, const TensorView& view, int rank, const char* expected) {
  if (view.rank != rank)
    throw Error(ErrorCode::invalid_argument,
                std::string(name) + ": expected " + expected + ", got " + (view.defined() ? shape_text(view) : "nothing"));
}

void* stream_for(Arrays& arrays, nb::handle like, Device device, const Stream& given) {
  return given ? reinterpret_cast<void*>(*given) : arrays.stream(like, device);
}

void check_all(Device device, void* stream) {
  const CurrentDevice current(device);
  for (Backend* backend : backends())
    if (backend->reaches(device) && backend->availability().available) backend->synchronize(stream);
}

void define_operator(nb::module_& module) {
  using nb::arg;
  const auto optional = [](const char* name) { return arg(name).none() = nb::none(); };
  const auto add_forward = [&](const char* name, const char* signature, const char* doc, auto... after_o) {
    module.def(name, &forward, arg("q"), arg("k"), arg("v"), optional("o"), after_o..., optional("a"), optional("A_log"),
               optional("dt_bias"), optional("g"), optional("b"), optional("beta"), optional("state"), optional("read_slots"),
               optional("write_slots"), optional("token_slots"), optional("accepted"), optional("state_in"),
               optional("state_out"), optional("snapshots"), optional("cu_seqlens"), arg("window").none() = nb::none(),
               arg("layer") = 0, optional("parent"), arg("update_state") = true, arg("scale") = nb::none(),
               arg("qk_l2norm") = true, arg("l2_eps") = 1e-6, arg("softplus_beta") = 1.0, arg("softplus_threshold") = 20.0,
               arg("negative_eigenvalues") = false, arg("null_slot") = -1, arg("num_threads") = 0, arg("backend") = nb::none(),
               arg("stream") = nb::none(), nb::sig(signature), doc);
  };
  add_forward("forward", forward_signature, forward_doc, nb::kw_only());
  // For callers that have all arguments: looking up 30 of them by name takes as long as half of the rest.
  add_forward("_forward", "def _forward(*arguments: Any) -> Any", "forward() of its arguments by position.");
  module.def("commit", &commit, arg("snapshots"), arg("accepted"), arg("state"), arg("write_slots"), nb::kw_only(),
             arg("null_slot") = -1, arg("backend") = nb::none(), arg("stream") = nb::none(), nb::sig(commit_signature),
             commit_doc);
  module.def("_any_special", &any_special, arg("tensors"), arg("plain"), arg("gradients"),
             "Whether a tensor is of no plain type, or needs a gradient where these are recorded.");
  module.def("check", &check, arg("array"), nb::kw_only(), arg("stream") = nb::none(), nb::sig(check_signature), check_doc);
}

}  // namespace gatedelta::python
