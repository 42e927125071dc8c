// SPDX-License-Identifier: Apache-2.0
#include "xla.hpp"

#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <new>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "forward.hpp"
#include "gatedelta/gatedelta.hpp"
#include "objects.hpp"
#include "xla_ffi.hpp"

#ifdef GATEDELTA_CUDA
#include <cuda_runtime_api.h>
#endif

// The operator as a function of XLA's compiled programs: it knows nothing of Python, whose lock is not held there. And what is
// checked while such a program is traced.
namespace gatedelta::python {
namespace {

/// An error that XLA's own functions have made.
struct XlaError {
  xla::Error* error;
};

void require(xla::Error* error) {
  if (error != nullptr) throw XlaError{error};
}

std::optional<DType> dtype_of(xla::DataType type) {
  switch (type) {
    case xla::f32:
      return DType::f32;
    case xla::f16:
      return DType::f16;
    case xla::bf16:
      return DType::bf16;
    case xla::s32:
      return DType::i32;
    case xla::s64:
      return DType::i64;
    default:
      return std::nullopt;
  }
}

/// The tensors of a call by their names in gatedelta.jax.
TensorView* tensor(Arguments& in, std::string_view name) {
  using Call = Arguments;
  static constexpr std::pair<std::string_view, TensorView Call::*> tensors[] = {{"q", &Call::q},
                                                                                {"k", &Call::k},
                                                                                {"v", &Call::v},
                                                                                {"o", &Call::o},
                                                                                {"a", &Call::a},
                                                                                {"g", &Call::g},
                                                                                {"A_log", &Call::A_log},
                                                                                {"dt_bias", &Call::dt_bias},
                                                                                {"b", &Call::b},
                                                                                {"beta", &Call::beta},
                                                                                {"state", &Call::state},
                                                                                {"read_slots", &Call::read_slots},
                                                                                {"write_slots", &Call::write_slots},
                                                                                {"token_slots", &Call::token_slots},
                                                                                {"accepted", &Call::accepted},
                                                                                {"state_in", &Call::state_in},
                                                                                {"state_out", &Call::state_out},
                                                                                {"snapshots", &Call::snapshots},
                                                                                {"cu_seqlens", &Call::cu_seqlens}};
  for (const auto& [known, view] : tensors)
    if (known == name) return &(in.*view);
  throw Error(ErrorCode::invalid_argument, std::string(name) + ": not a tensor of a call");
}

/// An attribute's value of a given kind; throws where there is none.
const void* attribute(const xla::Attributes& attributes, std::string_view name, xla::AttributeType type) {
  for (std::int64_t i = 0; i < attributes.count; ++i)
    if (std::string_view(attributes.names[i]->data, attributes.names[i]->size) == name && attributes.types[i] == type)
      return attributes.values[i];
  throw Error(ErrorCode::invalid_argument, std::string(name) + ": missing");
}

std::string_view text(const xla::Attributes& attributes, std::string_view name) {
  const auto* value = static_cast<const xla::Text*>(attribute(attributes, name, xla::attribute_text));
  return {value->data, value->size};
}

/// Views of buffers, whose names are separated by spaces.
void set_tensors(Arguments& in, const xla::Buffers& buffers, std::string_view names, Device device) {
  for (std::int64_t i = 0; i < buffers.count; ++i) {
    const auto& buffer = *static_cast<const xla::Buffer*>(buffers.values[i]);
    const std::string_view name = names.substr(0, names.find(' '));
    names.remove_prefix(std::min(name.size() + 1, names.size()));
    const std::optional<DType> dtype = dtype_of(buffer.dtype);
    if (!dtype) fail_dtype(std::string(name).c_str(), "XLA's type " + std::to_string(buffer.dtype));
    *tensor(in, name) = make_view(buffer.data, *dtype, {buffer.dims, static_cast<std::size_t>(buffer.rank)}, {}, device);
  }
}

/// The order is that of gatedelta.jax.
Options take_options(std::span<const double> number, Arguments& in) {
  if (number.size() != 10) throw Error(ErrorCode::invalid_argument, "options: expected 10 numbers");
  Options options;
  in.update_state = number[0] != 0;
  if (number[1] != 0) options.scale = number[2];
  options.qk_l2norm = number[3] != 0;
  options.l2_eps = number[4], options.softplus_beta = number[5], options.softplus_threshold = number[6];
  options.negative_eigenvalues = number[7] != 0;
  options.null_slot = static_cast<std::int64_t>(number[8]);
  options.num_threads = static_cast<int>(number[9]);
  return options;
}

void run(const xla::Frame& frame, Device device, void* stream) {
  Arguments in;
  // A pool that is changed is an argument and a result, of one memory.
  set_tensors(in, frame.arguments, text(frame.attributes, "arguments"), device);
  set_tensors(in, frame.results, text(frame.attributes, "results"), device);
  const auto& numbers = *static_cast<const xla::Array*>(attribute(frame.attributes, "options", xla::attribute_array));
  if (numbers.dtype != xla::f64) throw Error(ErrorCode::invalid_argument, "options: expected numbers of 64 bits");
  const Options options = take_options({static_cast<const double*>(numbers.data), static_cast<std::size_t>(numbers.count)}, in);
  Config config = configuration(in, options);
  set_dtypes(config, in);
  const GatedDeltaRule rule(config, text(frame.attributes, "backend"));
  in.stream = stream;
  in.workspace_size = device.type == DeviceType::cpu ? 0 : rule.workspace_size(in);
  if (in.workspace_size == 0) return rule.forward(in);
  xla::AllocateArguments memory{{sizeof(xla::AllocateArguments), nullptr}, frame.context, in.workspace_size, 256, nullptr};
  require(frame.api->allocate(&memory));
  in.workspace = memory.data;
  // XLA uses the memory again in the order of this stream.
  const auto release = [&] {
    xla::FreeArguments freed{{sizeof(xla::FreeArguments), nullptr}, frame.context, memory.bytes, memory.data};
    return frame.api->free(&freed);
  };
  try {
    rule.forward(in);
  } catch (...) {
    (void)release();
    throw;
  }
  require(release());
}

int xla_code(ErrorCode code) {
  switch (code) {
    case ErrorCode::invalid_argument:
      return xla::invalid_argument;
    case ErrorCode::unsupported:
      return xla::unimplemented;
    case ErrorCode::out_of_memory:
      return xla::resource_exhausted;
    default:
      return xla::internal;
  }
}

template <DeviceType type>
xla::Error* handle(xla::Frame* frame) {
  if (frame->extensions != nullptr && frame->extensions->type == xla::metadata_extension) {
    auto& version = static_cast<xla::MetadataExtension*>(frame->extensions)->metadata->version;
    // What is used here has been there since version 0.1.
    version = {{sizeof(xla::Version), nullptr}, 0, frame->api == nullptr ? 1 : frame->api->version.minor};
    return nullptr;
  }
  const auto failed = [&](const char* message, int code) {
    xla::ErrorArguments error{{sizeof(xla::ErrorArguments), nullptr}, message, code};
    return frame->api->make_error(&error);
  };
  try {
    Device device{type, 0};
    void* stream = nullptr;
#ifdef GATEDELTA_CUDA
    if (type == DeviceType::cuda) {
      if (cudaGetDevice(&device.index) != cudaSuccess) return failed("CUDA has no current device", xla::internal);
      xla::StreamArguments given{{sizeof(xla::StreamArguments), nullptr}, frame->context, nullptr};
      require(frame->api->stream(&given));
      stream = given.stream;
    }
#endif
    run(*frame, device, stream);
    return nullptr;
  } catch (const XlaError& error) {
    return error.error;
  } catch (const Error& error) {
    return failed(error.what(), xla_code(error.code()));
  } catch (const std::bad_alloc&) {
    return failed("out of memory", xla::resource_exhausted);
  } catch (const std::exception& error) {
    return failed(error.what(), xla::internal);
  }
}

using Description = std::tuple<std::string, std::string, nb::tuple>;  // name, dtype and shape of a tensor
using Place = std::tuple<bool, int>;                                  // whether it is a CUDA device, and its number

/// Throws what the call would, as far as that does not depend on what is in the tensors. Without a place: nor on the backend.
void check_call(const std::vector<Description>& tensors, const std::vector<double>& numbers, std::string_view backend,
                const std::optional<Place>& place) {
  Arguments in;
  for (const auto& [name, dtype_name, shape] : tensors) {
    TensorView& view = *tensor(in, name);
    view = {};
    const std::optional<DType> dtype = type_of_name(dtype_name);
    if (!dtype) fail_dtype(name.c_str(), dtype_name);
    view.dtype = *dtype;
    set_shape(name.c_str(), view, shape);
    set_dense_strides(view);
    view.data = &in;  // there is some; it is not looked at
    if (place) view.device = {std::get<0>(*place) ? DeviceType::cuda : DeviceType::cpu, std::get<1>(*place)};
  }
  const Options options = take_options(numbers, in);
  Config config = configuration(in, options);
  set_dtypes(config, in);
  if (place) return (void)GatedDeltaRule(config, backend).backend_for(in);
  validate(config);
  (void)validate(config, in);
}

}  // namespace

void define_xla(nb::module_& module) {
  const auto add = [&](const char* name, xla::Error* (*function)(xla::Frame*)) {
    module.attr(name) = nb::capsule(reinterpret_cast<void*>(function));
  };
  module.def("_check_call", &check_call, nb::arg("tensors"), nb::arg("options"), nb::arg("backend"),
             nb::arg("place").none() = nb::none(), "Raises what a call would of the shapes, dtypes and options.");
  add("xla_handler_cpu", &handle<DeviceType::cpu>);
#ifdef GATEDELTA_CUDA
  add("xla_handler_cuda", &handle<DeviceType::cuda>);
#endif
}

}  // namespace gatedelta::python
