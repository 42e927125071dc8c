// SPDX-License-Identifier: Apache-2.0
#include "jax.hpp"

#include <algorithm>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "objects.hpp"

namespace gatedelta::python {
namespace {

struct Names {
#define GATEDELTA_NAME(x) PyObject* x = PyUnicode_InternFromString(#x)
  GATEDELTA_NAME(_sharding);
  GATEDELTA_NAME(num_devices);
  GATEDELTA_NAME(sharding);
  GATEDELTA_NAME(unsafe_buffer_pointer);
#undef GATEDELTA_NAME
};

const Names& names() {
  static const Names instance;
  return instance;
}

/// What is taken from the library that JAX is built on, null where it has none, and from JAX and the module _jax.
struct Functions {
  PyObject *export_buffer = nullptr, *single = nullptr;       ///< `single`: the type of shardings of one device
  PyObject *wait = nullptr, *stock, *call_untraced, *tracer;  ///< `wait` for a list of arrays
  PyObject *is_compiled, *program;

  Functions() {
    PyObject* const library = PyImport_ImportModule("jaxlib._jax");
    if (library != nullptr) {
      export_buffer = PyObject_GetAttrString(library, "buffer_to_dlpack_managed_tensor");
      single = PyObject_GetAttrString(library, "SingleDeviceSharding");
      wait = PyObject_GetAttrString(library, "batched_block_until_ready");
    }
    Py_XDECREF(library);
    PyErr_Clear();
    const auto get = [](const char* module, const char* name) {
      return nb::getattr(nb::module_::import_(module), name).release().ptr();
    };
    if (wait == nullptr) wait = get("jax", "block_until_ready");
    tracer = get("jax.core", "Tracer");
    stock = get("gatedelta._jax", "stock"), call_untraced = get("gatedelta._jax", "call_untraced");
    is_compiled = get("gatedelta._jax", "is_compiled"), program = get("gatedelta._jax", "program");
  }
};

const Functions& functions() {
  static const auto* instance = new Functions;
  return *instance;
}

/// Arrays for calls that make the same: `make` gives a list of those of some calls, `made` has those that no call has got yet.
struct Stock {
  nb::object sharding, make, made;
  std::vector<TensorView> views;

  bool is_for(nb::handle wanted, std::span<const NewArray> arrays) const {
    const auto same = [](const TensorView& view, const NewArray& array) {
      return view.rank == array.view->rank && view.dtype == array.view->dtype && view.shape == array.view->shape;
    };
    return sharding.is(wanted) && std::equal(views.begin(), views.end(), arrays.begin(), arrays.end(), same);
  }
};

Stock find_stock(nb::object sharding, std::span<const NewArray> arrays) {
  Stock stock;
  nb::list key;
  key.append(sharding);
  for (const NewArray& array : arrays) {
    key.append(tuple_of_sizes(*array.view));
    key.append(name_of(array.view->dtype).data());
    stock.views.push_back(*array.view);
  }
  const nb::object found = nb::handle(functions().stock)(*key);
  stock.sharding = std::move(sharding), stock.make = found[0], stock.made = found[1];
  return stock;
}

/// The stock for a call, not empty. One call of JAX makes all results, and where they are small those of later calls as well:
/// it takes longer than all else here.
nb::object filled_stock(nb::handle like, std::span<const NewArray> arrays) {
  static auto* last = new Stock;  // most calls are as the one before
  nb::object sharding = attribute(like, names().sharding);
  if (!last->is_for(sharding, arrays)) *last = find_stock(std::move(sharding), arrays);
  const nb::object make = last->make, made = last->made;  // other threads may run in a call
  if (PyList_GET_SIZE(made.ptr()) == 0) {
    nb::object more = make();
    if (Py_TYPE(nb::object(more[0]).ptr()) != Py_TYPE(like.ptr())) more = nb::handle(functions().call_untraced)(make);
    (void)result(PyObject_CallOneArg(functions().wait, more.ptr()));
    PyList_SetSlice(made.ptr(), 0, 0, more.ptr());
  }
  return made;
}

/// The programs for arrays with one sharding.
struct Place {
  nb::object sharding;
  bool compiled = false;
  std::unordered_map<std::string, nb::object> programs;  ///< by the bytes of what they are made from
};

constexpr std::size_t most_kept = 256;

struct Places {
  nb::dict all;  ///< capsules with pointers to places, by their shardings, of which equal ones are often different objects
  nb::object last_sharding;
  std::shared_ptr<Place> last;
};

Places& places() {
  static auto* instance = new Places;
  return *instance;
}

std::shared_ptr<Place> find_place(const nb::object& sharding) {
  nb::dict all = places().all;  // other threads may forget it
  PyObject* const known = PyDict_GetItemWithError(all.ptr(), sharding.ptr());
  if (known != nullptr) return *static_cast<std::shared_ptr<Place>*>(PyCapsule_GetPointer(known, nullptr));
  if (PyErr_Occurred()) nb::raise_python_error();
  const bool compiled = nb::cast<bool>(nb::handle(functions().is_compiled)(sharding));
  auto place = std::make_shared<Place>(Place{sharding, compiled, {}});
  if (all.size() >= most_kept) all.clear();
  all[sharding] = nb::capsule(new std::shared_ptr<Place>(place),
                              [](void* kept) noexcept { delete static_cast<std::shared_ptr<Place>*>(kept); });
  return place;
}

/// Null for what has no sharding: traced arrays.
std::shared_ptr<Place> place_of(nb::handle array) {
  nb::object sharding = nb::steal(PyObject_GetAttr(array.ptr(), names()._sharding));
  if (!sharding.is_valid()) {
    PyErr_Clear();
    return nullptr;
  }
  if (sharding.is(places().last_sharding)) return places().last;
  const std::shared_ptr<Place> place = find_place(sharding);
  std::shared_ptr<Place> kept = place;
  kept.swap(places().last), std::swap(sharding, places().last_sharding);  // both before Python code runs where the old ones end
  return place;
}

nb::object program_of(Place& place, std::uint32_t given, const JaxCall& call) {
  const Options& options = call.options;
  // All eight bytes wide, so that nothing lies between them.
  const struct {
    std::uint64_t given, flags;
    std::int64_t null_slot, num_threads;
    double scale, l2_eps, softplus_beta, softplus_threshold;
  } numbers{given,
            std::uint64_t{call.state_out} | std::uint64_t{call.snapshots} << 1 | std::uint64_t{call.update_state} << 2 |
                std::uint64_t{options.qk_l2norm} << 3 | std::uint64_t{options.negative_eigenvalues} << 4 |
                std::uint64_t{options.scale.has_value()} << 5,
            options.null_slot,
            options.num_threads,
            options.scale.value_or(0),
            options.l2_eps,
            options.softplus_beta,
            options.softplus_threshold};
  std::string key(reinterpret_cast<const char*>(&numbers), sizeof(numbers));
  key += call.backend;
  if (const auto it = place.programs.find(key); it != place.programs.end()) return it->second;
  nb::object made = nb::handle(functions().program)(place.sharding, given, call.state_out, call.snapshots, call.update_state,
                                                    call.backend, options.scale, options.qk_l2norm, options.l2_eps,
                                                    options.softplus_beta, options.softplus_threshold,
                                                    options.negative_eigenvalues, options.null_slot, options.num_threads);
  if (place.programs.size() >= most_kept) place.programs.clear();
  return place.programs[std::move(key)] = std::move(made);
}

}  // namespace

nb::object jax_forward(const JaxCall& call) {
  PyTypeObject* const type = Py_TYPE(call.tensors[0].ptr());
  std::array<PyObject*, 1 + std::tuple_size_v<decltype(call.tensors)>> arguments{};  // the first is for Python's use
  std::size_t count = 0;
  std::uint32_t given = 0;
  for (std::size_t i = 0; i < call.tensors.size(); ++i) {
    if (call.tensors[i].is_none()) continue;
    if (Py_TYPE(call.tensors[i].ptr()) != type) return {};
    given |= std::uint32_t{1} << i;
    arguments[++count] = call.tensors[i].ptr();
  }
  const std::shared_ptr<Place> place = place_of(call.tensors[0]);
  if (place == nullptr || !place->compiled) return {};
  const nb::object program = program_of(*place, given, call);
  nb::object made =
      nb::steal(PyObject_Vectorcall(program.ptr(), &arguments[1], count | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr));
  if (!made.is_valid()) {
    // Arrays that JAX cannot bring together: reading them one by one says which. All other errors are the call's own.
    const bool others = PyErr_ExceptionMatches(PyExc_ValueError) || PyErr_ExceptionMatches(PyExc_TypeError);
    if (!others || PyErr_ExceptionMatches(PyExc_RuntimeError)) nb::raise_python_error();
    PyErr_Clear();
    return {};
  }
  const nb::handle first = PyTuple_Check(made.ptr()) ? PyTuple_GET_ITEM(made.ptr(), 0) : made.ptr();
  if (Py_TYPE(first.ptr()) == type) return made;
  nb::list untraced;
  untraced.append(program);
  for (std::size_t i = 1; i <= count; ++i) untraced.append(nb::handle(arguments[i]));
  return nb::handle(functions().call_untraced)(*untraced);
}

void jax_forget() {
  const Places old = std::exchange(places(), Places{});  // Python code may run where they end
}

nb::object jax_export(const char* name, nb::handle array) {
  // The function takes arrays on several devices, too, and gives the part on the first one.
  PyObject* const sharding = PyObject_GetAttr(array.ptr(), names()._sharding);
  const bool one = sharding != nullptr && reinterpret_cast<PyObject*>(Py_TYPE(sharding)) == functions().single;
  PyObject* const count = one || sharding == nullptr ? nullptr : PyObject_GetAttr(sharding, names().num_devices);
  const bool taken = functions().export_buffer != nullptr && (one || (count != nullptr && PyLong_AsLong(count) == 1));
  PyObject* const capsule = taken ? PyObject_CallOneArg(functions().export_buffer, array.ptr()) : nullptr;
  Py_XDECREF(count);
  Py_XDECREF(sharding);
  if (capsule != nullptr) return nb::steal(capsule);
  PyErr_Clear();
  if (PyObject_IsInstance(array.ptr(), functions().tracer) == 1)
    fail(name, "expected an array, got a traced one: gatedelta.jax.forward goes into functions that JAX compiles");
  return {};
}

void jax_make(nb::handle like, Device device, std::span<NewArray> arrays) {
  const nb::object stock = filled_stock(like, arrays);
  const Py_ssize_t end = PyList_GET_SIZE(stock.ptr()), begin = end - static_cast<Py_ssize_t>(arrays.size());
  for (Py_ssize_t i = begin; NewArray & array : arrays) array.made = nb::borrow(PyList_GET_ITEM(stock.ptr(), i++));
  PyList_SetSlice(stock.ptr(), begin, end, nullptr);
  for (NewArray& array : arrays) {
    array.view->device = device;
    array.view->data = PyLong_AsVoidPtr(call_method(array.made, names().unsafe_buffer_pointer).ptr());
    set_dense_strides(*array.view);
  }
}

}  // namespace gatedelta::python
