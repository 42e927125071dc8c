// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

// The parts of XLA's binary interface for functions in compiled programs (FFI, version 0) that are used here. Every struct
// begins with its size and a list of extensions, and grows at its end alone.
namespace gatedelta::python::xla {

struct Extension {
  std::size_t size;
  int type;  ///< 1: Metadata
  Extension* next;
};

struct Header {
  std::size_t size;
  Extension* extensions;
};

struct Version : Header {
  int major, minor;
};

/// The runtime asks for it in a call that has nothing else.
struct Metadata {
  std::size_t size;
  Version version;  ///< out: of the interface that the function was written for
  std::uint32_t traits;
};

struct MetadataExtension : Extension {
  Metadata* metadata;
};
enum { metadata_extension = 1 };

enum DataType : int { s32 = 4, s64 = 5, f16 = 10, f32 = 11, f64 = 12, bf16 = 16 };

/// Row-major and dense.
struct Buffer : Header {
  DataType dtype;
  void* data;
  std::int64_t rank;
  std::int64_t* dims;
};

struct Text {
  const char* data;
  std::size_t size;
};

struct Array {
  DataType dtype;
  std::size_t count;
  void* data;
};

enum AttributeType : int { attribute_array = 1, attribute_text = 4 };

/// Arguments, or results. All are buffers.
struct Buffers : Header {
  std::int64_t count;
  int* types;
  void** values;
};

struct Attributes : Header {
  std::int64_t count;
  AttributeType* types;
  Text** names;
  void** values;
};

struct Error;
struct Context;

struct ErrorArguments : Header {
  const char* message;
  int code;
};
enum { invalid_argument = 3, resource_exhausted = 8, unimplemented = 12, internal = 13 };

struct StreamArguments : Header {
  Context* context;
  void* stream;  ///< out
};

struct AllocateArguments : Header {
  Context* context;
  std::size_t bytes, alignment;
  void* data;  ///< out
};

struct FreeArguments : Header {
  Context* context;
  std::size_t bytes;
  void* data;
};

/// The runtime's functions. Errors that they return are handed on.
struct Api : Header {
  Version version;
  const void* internals;
  Error* (*make_error)(ErrorArguments*);
  void (*error_details)();  // those without arguments are not called here
  void (*destroy_error)();
  void (*register_handler)();
  Error* (*stream)(StreamArguments*);
  void (*register_type)();
  void (*get_context)();
  void (*set_state)();
  void (*get_state)();
  Error* (*allocate)(AllocateArguments*);
  Error* (*free)(FreeArguments*);
};

struct Frame : Header {
  const Api* api;
  Context* context;
  int stage;
  Buffers arguments, results;
  Attributes attributes;
};

}  // namespace gatedelta::python::xla
