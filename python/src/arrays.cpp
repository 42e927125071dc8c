// SPDX-License-Identifier: Apache-2.0
#include "arrays.hpp"

#include <cstring>
#include <string>
#include <string_view>
#include <unordered_map>

#include "dlpack.hpp"
#include "jax.hpp"
#include "objects.hpp"

#ifdef GATEDELTA_CUDA
#include <cuda_runtime_api.h>
#endif

namespace gatedelta::python {
namespace {

[[noreturn]] void fail_read_only(const char* name, const char* why) { fail(name, std::string("is written, but ") + why); }

/// Attribute names, made once and never freed: looking up an interned name costs no string comparison.
struct Names {
#define GATEDELTA_NAME(x) PyObject* x = PyUnicode_InternFromString(#x)
  GATEDELTA_NAME(__array_struct__);
  GATEDELTA_NAME(__cuda_array_interface__);
  GATEDELTA_NAME(__dlpack__);
  GATEDELTA_NAME(__dlpack_device__);
  GATEDELTA_NAME(data);
  GATEDELTA_NAME(data_ptr);
  GATEDELTA_NAME(device_id);
  GATEDELTA_NAME(ptr);
  GATEDELTA_NAME(stride);
  GATEDELTA_NAME(strides);
  GATEDELTA_NAME(shape);
  GATEDELTA_NAME(dtype);
  GATEDELTA_NAME(device);
  GATEDELTA_NAME(is_cpu);
  GATEDELTA_NAME(is_cuda);
  GATEDELTA_NAME(get_device);
  GATEDELTA_NAME(new_empty);
  GATEDELTA_NAME(block_until_ready);
#undef GATEDELTA_NAME
};

const Names& names() {
  static const Names instance;
  return instance;
}

/// `bytes(i)` is the stride of dimension i in bytes.
template <class Bytes>
void set_byte_strides(const char* name, TensorView& view, Bytes bytes) {
  const auto size = static_cast<std::int64_t>(size_of(view.dtype));
  for (int i = 0; i < view.rank; ++i) {
    const std::int64_t stride = bytes(i);
    if (stride % size != 0 && view.shape[i] > 1)
      fail(name,
           "expected strides of whole elements, got " + std::to_string(stride) + " bytes in dimension " + std::to_string(i));
    view.strides[i] = stride / size;
  }
}

Framework classify(PyTypeObject* type) {
  const nb::object mro = nb::borrow(type->tp_mro);
  for (nb::handle base : mro) {
    const nb::object module = nb::getattr(base, "__module__", nb::none());
    if (!nb::isinstance<nb::str>(module)) continue;
    const std::string module_name = nb::cast<std::string>(module), name = nb::cast<std::string>(nb::getattr(base, "__name__"));
    const std::string root = module_name.substr(0, module_name.find('.'));
    if (root == "numpy" && name == "ndarray") return Framework::numpy;
    if (root == "torch" && name == "Tensor") return Framework::torch;
    if (root == "jax" || root == "jaxlib") return Framework::jax;
    if (root == "cupy" && name == "ndarray") return Framework::cupy;
  }
  if (nb::hasattr(reinterpret_cast<PyObject*>(type), "__cuda_array_interface__")) return Framework::cuda_interface;
  if (nb::hasattr(reinterpret_cast<PyObject*>(type), "__dlpack__")) return Framework::dlpack;
  return Framework::none;
}

/// torch's dtype objects, looked up once torch is there.
struct TorchTypes {
  PyObject *f32, *f16, *bf16, *i32, *i64, *raw_stream;
  int (*borrow)(void*, DLTensor*) = nullptr;  // null in releases that do not have it
  TorchTypes() {
    const nb::object torch = nb::module_::import_("torch");
    const auto get = [&](const char* name) { return nb::getattr(torch, name).release().ptr(); };
    f32 = get("float32"), f16 = get("float16"), bf16 = get("bfloat16"), i32 = get("int32"), i64 = get("int64");
    raw_stream = nb::getattr(torch.attr("_C"), "_cuda_getCurrentRawStream", nb::none()).release().ptr();
    const nb::object table = nb::getattr(torch.attr("Tensor"), "__dlpack_c_exchange_api__", nb::none());
    if (!PyCapsule_IsValid(table.ptr(), "dlpack_exchange_api")) return;
    const auto* api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(table.ptr(), "dlpack_exchange_api"));
    if (api->major == 1) borrow = api->borrow;
  }
};

const TorchTypes& torch_types() {
  static const TorchTypes* instance = new TorchTypes;
  return *instance;
}

/// A view's dtype from DLPack's or NumPy's kind and size.
std::optional<DType> number_type(char kind, int bytes) {
  if (kind == 'f' && bytes == 4) return DType::f32;
  if (kind == 'f' && bytes == 2) return DType::f16;
  if (kind == 'i' && bytes == 4) return DType::i32;
  if (kind == 'i' && bytes == 8) return DType::i64;
  return std::nullopt;
}

/// The dtype for one of NumPy's dtype objects. The scalar types that ml_dtypes adds are told apart by name alone, which takes
/// long.
std::optional<DType> numpy_type(nb::handle numpy_dtype) {
  static auto* known = new std::unordered_map<PyObject*, DType>;
  const auto it = known->find(numpy_dtype.ptr());
  if (it != known->end()) return it->second;
  const std::optional<DType> dtype = type_of_name(text(numpy_dtype));  // has the byte order where it is not the machine's
  if (!dtype) return std::nullopt;
  numpy_dtype.inc_ref();  // its address must stay its own
  return known->emplace(numpy_dtype.ptr(), *dtype).first->second;
}

bool on_cuda(std::int32_t dlpack_device) { return dlpack_device == dl_cuda || dlpack_device == dl_cuda_managed; }

nb::object dlpack_capsule(const char* name, nb::handle array) {
  std::int32_t device_type = dl_cpu;
  if (framework_of(array) == Framework::jax) {
    nb::object capsule = jax_export(name, array);
    if (capsule.is_valid()) return capsule;
    (void)call_method(array, names().block_until_ready);  // it may still be computed; then it does not matter where it is
  } else {
    const nb::tuple place = nb::cast<nb::tuple>(call_method(array, names().__dlpack_device__));
    device_type = static_cast<std::int32_t>(integer(place[0]));
  }
  const nb::object method = attribute(array, names().__dlpack__);
  // 1 is the legacy default stream, which forward() then runs on.
  const auto export_to = [&](bool versioned) {
    nb::dict options;
    if (on_cuda(device_type)) options["stream"] = 1;
    if (versioned) options["max_version"] = nb::make_tuple(1, 0);
    return method(**options);
  };
  try {
    return export_to(true);
  } catch (nb::python_error& error) {
    if (!error.matches(PyExc_TypeError)) throw;
    return export_to(false);  // a library from before DLPack 1
  }
}

}  // namespace

Framework framework_of(nb::handle array) {
  static auto* known = new std::unordered_map<PyTypeObject*, Framework>;
  PyTypeObject* type = Py_TYPE(array.ptr());
  const auto it = known->find(type);
  if (it != known->end()) return it->second;
  const Framework framework = classify(type);
  Py_INCREF(type);  // its address must stay its own
  known->emplace(type, framework);
  return framework;
}

Arrays::~Arrays() {
  for (PyObject* object : kept_) Py_DECREF(object);
}

TensorView Arrays::view(const char* name, nb::handle array, bool written) {
  switch (framework_of(array)) {
    case Framework::numpy:
      return view_numpy(name, array, written);
    case Framework::torch:
      return view_torch(name, array);
    case Framework::jax:
      if (written) fail_read_only(name, "jax arrays cannot be changed (leave outputs out, pass state_in for state)");
      return view_dlpack(name, array, written);
    case Framework::cupy:
      return view_cupy(name, array);
    case Framework::cuda_interface:
      return view_cuda_interface(name, array, written);
    case Framework::dlpack:
      return view_dlpack(name, array, written);
    case Framework::none:
      break;
  }
  fail(name,
       "expected an array with __dlpack__ or __cuda_array_interface__, got " + std::string(Py_TYPE(array.ptr())->tp_name));
}

TensorView Arrays::view_numpy(const char* name, nb::handle array, bool written) {
  const nb::object capsule = attribute(array, names().__array_struct__);
  const auto* source = static_cast<const NumpyArray*>(PyCapsule_GetPointer(capsule.ptr(), nullptr));
  if (source == nullptr) nb::raise_python_error();
  TensorView view;
  std::optional<DType> dtype = number_type(source->kind, source->item_size);
  if (source->kind != 'i' && source->item_size == 2) dtype = numpy_type(attribute(array, names().dtype));
  if (!dtype || !(source->flags & numpy_native_order)) fail_dtype(name, text(attribute(array, names().dtype)));
  if (!(source->flags & numpy_aligned)) fail(name, "expected elements aligned to their size");
  if (written && !(source->flags & numpy_writeable)) fail_read_only(name, "the array is read-only");
  view.dtype = *dtype;
  view.data = source->data;
  set_rank(name, view, source->rank);
  for (int i = 0; i < view.rank; ++i) view.shape[i] = source->shape[i];
  set_byte_strides(name, view, [&](int i) { return static_cast<std::int64_t>(source->strides[i]); });
  return view;
}

TensorView Arrays::view_torch(const char* name, nb::handle array) {
  const Names& n = names();
  const TorchTypes& types = torch_types();
  if (types.borrow != nullptr) {
    DLTensor source;
    if (types.borrow(array.ptr(), &source) == 0) return view_dltensor(name, array, source);
    PyErr_Clear();  // it is none of ours; what follows says why
  }
  TensorView view;
  const nb::object dtype = attribute(array, n.dtype);
  if (dtype.ptr() == types.bf16)
    view.dtype = DType::bf16;
  else if (dtype.ptr() == types.f32)
    view.dtype = DType::f32;
  else if (dtype.ptr() == types.f16)
    view.dtype = DType::f16;
  else if (dtype.ptr() == types.i32)
    view.dtype = DType::i32;
  else if (dtype.ptr() == types.i64)
    view.dtype = DType::i64;
  else
    fail_dtype(name, text(dtype));
  if (attribute(array, n.is_cuda).is(Py_True))
    view.device = {DeviceType::cuda, static_cast<int>(integer(call_method(array, n.get_device)))};
  else if (!attribute(array, n.is_cpu).is(Py_True))
    fail(name, "expected memory of the host or a CUDA device, got a tensor on " + text(attribute(array, n.device)));
  set_shape(name, view, attribute(array, n.shape));
  const nb::object strides = call_method(array, n.stride);
  for (int i = 0; i < view.rank; ++i) view.strides[i] = integer(PyTuple_GET_ITEM(strides.ptr(), i));
  const nb::object data = call_method(array, n.data_ptr);
  view.data = PyLong_AsVoidPtr(data.ptr());
  return view;
}

TensorView Arrays::view_cupy(const char* name, nb::handle array) {
  // Its attributes take a third of the time of the dictionary of __cuda_array_interface__, which has no bfloat16 either.
  const Names& n = names();
  const nb::object dtype = attribute(array, n.dtype), memory = attribute(array, n.data);
  const std::optional<DType> known = numpy_type(dtype);
  if (!known) fail_dtype(name, text(dtype));
  TensorView view;
  view.dtype = *known;
  view.device = {DeviceType::cuda, static_cast<int>(integer(attribute(memory, n.device_id)))};
  view.data = PyLong_AsVoidPtr(attribute(memory, n.ptr).ptr());
  set_shape(name, view, attribute(array, n.shape));
  const nb::object strides = attribute(array, n.strides);
  set_byte_strides(name, view, [&](int i) { return integer(PyTuple_GetItem(strides.ptr(), i)); });
  return view;
}

TensorView Arrays::view_cuda_interface(const char* name, nb::handle array, bool written) {
  const nb::dict interface = nb::cast<nb::dict>(attribute(array, names().__cuda_array_interface__));
  const std::string type = nb::cast<std::string>(interface["typestr"]);
  const bool native = type.size() == 3 && (type[0] == '<' || type[0] == '|');
  const std::optional<DType> dtype = native ? number_type(type[1], type[2] - '0') : std::nullopt;
  if (!dtype) {
    if (nb::hasattr(array, "__dlpack__")) return view_dlpack(name, array, written);  // bfloat16 has no name in this interface
    fail_dtype(name, type);
  }
  TensorView view;
  view.dtype = *dtype;
  set_shape(name, view, interface["shape"]);
  const nb::tuple data = nb::cast<nb::tuple>(interface["data"]);
  view.data = PyLong_AsVoidPtr(nb::handle(data[0]).ptr());
  if (written && nb::cast<bool>(data[1])) fail_read_only(name, "the array is read-only");
  const nb::object strides = interface.contains("strides") ? nb::object(interface["strides"]) : nb::none();
  if (strides.is_none())
    set_dense_strides(view);
  else
    set_byte_strides(name, view, [&](int i) { return integer(PyTuple_GetItem(strides.ptr(), i)); });
  if (interface.contains("stream") && !nb::handle(interface["stream"]).is_none())
    interface_stream_ = static_cast<std::uintptr_t>(nb::cast<std::uint64_t>(interface["stream"]));
  view.device = {DeviceType::cuda, 0};
#ifdef GATEDELTA_CUDA
  cudaPointerAttributes attributes{};
  if (view.data != nullptr && cudaPointerGetAttributes(&attributes, view.data) == cudaSuccess && attributes.device >= 0)
    view.device.index = attributes.device;
  else
    (void)cudaGetLastError();
#endif
  return view;
}

TensorView Arrays::view_dlpack(const char* name, nb::handle array, bool written) {
  nb::object capsule = dlpack_capsule(name, array);
  const DLTensor* source = nullptr;
  bool read_only = false;
  if (PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned")) {
    const auto* managed = static_cast<DLManagedTensorVersioned*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor_versioned"));
    if (managed->major != 1) fail(name, "expected version 1 of DLPack, got " + std::to_string(managed->major));
    source = &managed->tensor;
    read_only = (managed->flags & dl_read_only) != 0;
  } else {
    auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
    if (managed == nullptr) nb::raise_python_error();
    source = &managed->tensor;
  }
  if (written && read_only) fail_read_only(name, "the array is read-only");
  const TensorView view = view_dltensor(name, array, *source);
  // The capsule is not renamed: dropping it hands the memory back. A JAX array is the memory's only owner and cannot be
  // changed, so the caller's reference is enough.
  if (framework_of(array) != Framework::jax) kept_.push_back(capsule.release().ptr());
  must_wait_ = must_wait_ || view.device.type == DeviceType::cuda;
  return view;
}

TensorView Arrays::view_dltensor(const char* name, nb::handle array, const DLTensor& source) {
  TensorView view;
  std::optional<DType> dtype;
  if (source.dtype.lanes == 1) {
    const char kind = source.dtype.code == dl_float ? 'f' : source.dtype.code == dl_int ? 'i' : 'V';
    dtype = number_type(kind, source.dtype.bits / 8);
    if (source.dtype.code == dl_bfloat && source.dtype.bits == 16) dtype = DType::bf16;
  }
  if (!dtype) fail_dtype(name, text(nb::getattr(array, "dtype", nb::str("another one"))));
  view.dtype = *dtype;
  const std::int32_t found_type = source.device.type;
  if (on_cuda(found_type))
    view.device = {DeviceType::cuda, source.device.id};
  else if (found_type != dl_cpu && found_type != dl_cuda_host)
    fail(name, "expected memory of the host or a CUDA device, got DLPack device " + std::to_string(found_type));
  set_rank(name, view, source.ndim);
  for (int i = 0; i < view.rank; ++i) view.shape[i] = source.shape[i];
  if (source.strides != nullptr)
    for (int i = 0; i < view.rank; ++i) view.strides[i] = source.strides[i];
  else
    set_dense_strides(view);
  view.data = static_cast<char*>(source.data) + source.byte_offset;
  return view;
}

void Arrays::allocate(nb::handle like, Device device, std::span<NewArray> arrays) {
  if (arrays.empty()) return;
  if (framework_of(like) == Framework::jax) return jax_make(like, device, arrays);
  for (NewArray& array : arrays) {
    array.made = make(like, array);
    *array.view = view(array.name, array.made, true);
  }
}

nb::object Arrays::make(nb::handle like, const NewArray& array) {
  const nb::object sizes = tuple_of_sizes(*array.view);
  const Framework framework = framework_of(like);
  if (framework == Framework::torch) {
    const nb::object dtype =
        array.dtype_of.is_valid() ? attribute(array.dtype_of, names().dtype) : nb::borrow(torch_types().f32);
    return attribute(like, names().new_empty)(sizes, nb::arg("dtype") = dtype);
  }
  const std::string module =
      framework == Framework::numpy ? "numpy" : nb::cast<std::string>(nb::handle(Py_TYPE(like.ptr())).attr("__module__"));
  const std::string root = module.substr(0, module.find('.'));
  if (root != "numpy" && root != "cupy")
    fail(array.name, "required: there is no way to allocate arrays of type " + std::string(Py_TYPE(like.ptr())->tp_name));
  const nb::object library = nb::module_::import_(root.c_str());
  const nb::object dtype =
      array.dtype_of.is_valid() ? attribute(array.dtype_of, names().dtype) : nb::object(library.attr("float32"));
  return library.attr("empty")(sizes, dtype);
}

void* Arrays::scratch(nb::handle like, Device device, std::size_t bytes) {
  TensorView view;
  // Of float32, as not every library knows bytes.
  kept_.push_back(allocate(like, device, {"workspace", view, {static_cast<std::int64_t>((bytes + 3) / 4)}}).release().ptr());
  return view.data;
}

void* Arrays::stream(nb::handle like, Device device) {
  if (device.type != DeviceType::cuda) return nullptr;
  if (framework_of(like) == Framework::torch) {
    const nb::object raw = nb::borrow(torch_types().raw_stream)(device.index);
    return PyLong_AsVoidPtr(raw.ptr());
  }
  if (framework_of(like) == Framework::cupy) {
    static PyObject* const current = nb::getattr(nb::module_::import_("cupy.cuda"), "get_current_stream").release().ptr();
    const std::int64_t stream = integer(attribute(result(PyObject_CallNoArgs(current)), names().ptr));
    return reinterpret_cast<void*>(stream == 0 ? 1 : stream);  // both are the default stream
  }
  return reinterpret_cast<void*>(interface_stream_.value_or(1));
}

}  // namespace gatedelta::python
