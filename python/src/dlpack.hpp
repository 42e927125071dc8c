// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

// The parts of binary interfaces between array libraries that are used here: DLPack 1 with its table of functions, and NumPy's
// __array_struct__.
namespace gatedelta::python {

struct DLDevice {
  std::int32_t type;
  std::int32_t id;
};
enum : std::int32_t { dl_cpu = 1, dl_cuda = 2, dl_cuda_host = 3, dl_cuda_managed = 13 };

struct DLDataType {
  std::uint8_t code, bits;
  std::uint16_t lanes;
};
enum : std::uint8_t { dl_int = 0, dl_float = 2, dl_bfloat = 4 };

struct DLTensor {
  void* data;
  DLDevice device;
  std::int32_t ndim;
  DLDataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;  ///< in elements; null: row-major and dense
  std::uint64_t byte_offset;
};

/// In capsules named "dltensor".
struct DLManagedTensor {
  DLTensor tensor;
  void* context;
  void (*deleter)(DLManagedTensor*);
};

/// In capsules named "dltensor_versioned".
struct DLManagedTensorVersioned {
  std::uint32_t major, minor;
  void* context;
  void (*deleter)(DLManagedTensorVersioned*);
  std::uint64_t flags;
  DLTensor tensor;
};
inline constexpr std::uint64_t dl_read_only = 1;

/// In capsules named "dlpack_exchange_api", the attribute __dlpack_c_exchange_api__ of a type: from DLPack 1.2 on.
struct DLPackExchangeAPI {
  std::uint32_t major, minor;
  DLPackExchangeAPI* previous;
  void (*allocate)();  // these three are not called here
  void (*to_managed)();
  void (*from_managed)();
  int (*borrow)(void* object, DLTensor* out);  ///< 0, or -1 with a Python exception; `out` is the object's
};

struct NumpyArray {
  int two;  ///< always 2
  int rank;
  char kind;  ///< 'f', 'i', or 'V' for types that NumPy does not know
  int item_size;
  int flags;
  std::intptr_t* shape;
  std::intptr_t* strides;  ///< in bytes
  void* data;
};
inline constexpr int numpy_aligned = 0x100, numpy_native_order = 0x200, numpy_writeable = 0x400;

}  // namespace gatedelta::python
