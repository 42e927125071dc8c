// SPDX-License-Identifier: Apache-2.0
// First what an old dlpack.h lacks, then the adapter that looks for it.
#include "dlpack_1.hpp"

#include "gatedelta/interop/dlpack.hpp"

#include <memory>
#include <string>
#include <vector>

#include "same.hpp"

using namespace gatedelta;
using interop::Access;
using interop::from_dlpack;

namespace {

struct Source {
  float memory[24] = {};
  std::int64_t shape[6] = {2, 3, 4, 1, 1, 1}, strides[6] = {12, 4, 1, 1, 1, 1};
  DLTensor tensor{};
  Source() {
    tensor.data = memory;
    tensor.device = {kDLCPU, 0};
    tensor.ndim = 3;
    tensor.dtype = {kDLFloat, 32, 1};
    tensor.shape = shape;
    tensor.strides = strides;
  }
};

/// The message with which a tensor is refused.
std::string refusal(const DLTensor& tensor) {
  try {
    from_dlpack(tensor);
  } catch (const Error& error) {
    CHECK(error.code() == ErrorCode::invalid_argument);
    return error.what();
  }
  return "accepted";
}

}  // namespace

TEST_CASE("views of DLPack tensors") {
  Source source;
  check_view(from_dlpack(source.tensor), source.memory, DType::f32, {2, 3, 4}, {12, 4, 1});

  SUBCASE("strides and offset") {
    source.strides[0] = 1, source.strides[2] = -6;
    source.tensor.byte_offset = 8;
    check_view(from_dlpack(source.tensor), source.memory + 2, DType::f32, {2, 3, 4}, {1, 4, -6});
    source.tensor.strides = nullptr;
    check_view(from_dlpack(source.tensor), source.memory + 2, DType::f32, {2, 3, 4}, {12, 4, 1});
  }
  SUBCASE("element types") {
    const auto dtype = [&](DLDataTypeCode code, int bits) {
      source.tensor.dtype = {static_cast<std::uint8_t>(code), static_cast<std::uint8_t>(bits), 1};
      return from_dlpack(source.tensor).dtype;
    };
    CHECK(dtype(kDLFloat, 16) == DType::f16);
    CHECK(dtype(kDLBfloat, 16) == DType::bf16);
    CHECK(dtype(kDLInt, 32) == DType::i32);
    CHECK(dtype(kDLInt, 64) == DType::i64);
  }
  SUBCASE("devices") {
    const auto device = [&](DLDeviceType type, int index) {
      source.tensor.device = {type, index};
      return from_dlpack(source.tensor).device;
    };
    CHECK(device(kDLCPU, 0) == Device{});
    CHECK(device(kDLCUDAHost, 1) == Device{});
    CHECK(device(kDLCUDA, 3) == Device{DeviceType::cuda, 3});
    CHECK(device(kDLCUDAManaged, 0) == Device{DeviceType::cuda, 0});
  }
  SUBCASE("no elements") {
    source.shape[1] = 0;
    source.tensor.data = nullptr;
    source.tensor.byte_offset = 64;
    CHECK(from_dlpack(source.tensor).data == nullptr);
    CHECK(from_dlpack(source.tensor).elements() == 0);
  }
}

TEST_CASE("what is no tensor of the library is refused") {
  Source source;
  SUBCASE("rank") {
    source.tensor.ndim = 6;
    CHECK(refusal(source.tensor) == "dlpack: expected 1 to 5 dimensions, got 6");
    source.tensor.ndim = 0;
    CHECK(refusal(source.tensor) == "dlpack: expected 1 to 5 dimensions, got 0");
  }
  SUBCASE("element type") {
    source.tensor.dtype = {kDLFloat, 64, 1};
    CHECK(refusal(source.tensor) ==
          "dlpack: expected elements of f32, f16, bf16, i32 or i64, got type code 2 with 64 bits and 1 lanes");
    source.tensor.dtype = {kDLFloat, 32, 4};
    CHECK(refusal(source.tensor).find("4 lanes") != std::string::npos);
    source.tensor.dtype = {kDLUInt, 32, 1};
    CHECK(refusal(source.tensor).find("type code 1") != std::string::npos);
  }
  SUBCASE("device") {
    source.tensor.device.device_type = kDLROCM;
    CHECK(refusal(source.tensor) == "dlpack: expected memory of the host or of CUDA, got device type 10");
  }
  SUBCASE("shape") {
    source.shape[1] = -1;
    CHECK(refusal(source.tensor) == "view: dimension 1 has the negative size -1");
    source.tensor.shape = nullptr;
    CHECK(refusal(source.tensor) == "dlpack: expected a shape, got a null pointer");
  }
}

TEST_CASE("DLPack tensors of views") {
  std::vector<bfloat16> memory(24);
  const TensorView dense = view(memory.data(), {2, 3, 4}, {}, {DeviceType::cuda, 2});
  TensorView turned = dense.transposed(0, 2);
  const DLTensor tensor = interop::to_dltensor(turned);
  CHECK(tensor.device.device_type == kDLCUDA);
  CHECK(tensor.byte_offset == 0);
  check_view(from_dlpack(tensor), memory.data(), DType::bf16, {4, 3, 2}, {1, 4, 12}, {DeviceType::cuda, 2});
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16, DType::i32, DType::i64}) {
    turned.dtype = dtype;
    CHECK(from_dlpack(interop::to_dltensor(turned)).dtype == dtype);
  }
  TensorView none;
  CHECK_THROWS_WITH_AS(interop::to_dltensor(none), "dlpack: expected a view, got none", Error);
  CHECK_THROWS_AS(interop::to_dlpack(none), Error);

  SUBCASE("a managed tensor keeps its owner until the deleter is called") {
    auto owner = std::make_shared<int>(1);
    DLManagedTensor* managed = interop::to_dlpack(dense, owner);
    CHECK(owner.use_count() == 2);
    check_view(from_dlpack(*managed), memory.data(), DType::bf16, {2, 3, 4}, {12, 4, 1}, {DeviceType::cuda, 2});
    managed->deleter(managed);
    CHECK(owner.use_count() == 1);
  }
  SUBCASE("versioned, read-only or not") {
    auto owner = std::make_shared<int>(1);
    for (const Access access : {Access::read, Access::write}) {
      DLManagedTensorVersioned* managed = interop::to_dlpack_versioned(dense, access, owner);
      CHECK(managed->version.major == DLPACK_MAJOR_VERSION);
      CHECK((managed->flags & DLPACK_FLAG_BITMASK_READ_ONLY) == (access == Access::read ? 1 : 0));
      check_view(from_dlpack(*managed, Access::read), memory.data(), DType::bf16, {2, 3, 4}, {12, 4, 1}, {DeviceType::cuda, 2});
      if (access == Access::read)
        CHECK_THROWS_WITH_AS(from_dlpack(*managed, Access::write),
                             "dlpack: expected a tensor that may be written, got a read-only one", Error);
      else
        CHECK(from_dlpack(*managed, Access::write).data == memory.data());
      managed->version.major = 2;
      CHECK_THROWS_WITH_AS(from_dlpack(*managed, Access::read), doctest::Contains("dlpack: expected version 1, got 2."), Error);
      managed->deleter(managed);
      CHECK(owner.use_count() == 1);
    }
  }
}
