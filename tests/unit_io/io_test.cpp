// SPDX-License-Identifier: Apache-2.0
// Safetensors: what is written can be read, and no file whatsoever does harm.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include "io/safetensors.hpp"

#include <doctest/doctest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "gatedelta/error.hpp"

namespace fs = std::filesystem;
using gatedelta::DType;
using gatedelta::Error;
using gatedelta::ErrorCode;
using gatedelta::TensorView;
using gatedelta::view;
using gatedelta::io::SafetensorsFile;
using gatedelta::io::write_safetensors;

namespace {

/// A folder that goes with the test.
class Folder {
 public:
  Folder() {
    std::string name = (fs::temp_directory_path() / "gatedelta-io-XXXXXX").string();
    REQUIRE(mkdtemp(name.data()) != nullptr);
    path_ = name;
  }
  ~Folder() { fs::remove_all(path_); }
  fs::path operator/(const std::string& name) const { return path_ / name; }
  std::ptrdiff_t count() const { return std::distance(fs::directory_iterator(path_), fs::directory_iterator()); }

 private:
  fs::path path_;
};

std::string with_length(std::uint64_t length, const std::string& rest) {
  std::string bytes(sizeof length, '\0');
  std::memcpy(bytes.data(), &length, sizeof length);
  return bytes + rest;
}

std::string safetensors(const std::string& header, std::size_t data_size) {
  return with_length(header.size(), header + std::string(data_size, '\1'));
}

void write_bytes(const fs::path& path, const std::string& bytes) {
  fs::remove(path);  // some file systems wait for the disk where a file is overwritten
  std::ofstream(path, std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

std::string read_bytes(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

/// The message of the Error that the call throws; empty if it throws none.
template <class Function>
std::string error_of(Function function) {
  try {
    function();
  } catch (const Error& error) {
    CHECK(error.code() == ErrorCode::invalid_argument);
    return error.what();
  }
  return {};
}

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

template <class T>
std::vector<T> values(const TensorView& tensor) {
  std::vector<T> out(static_cast<std::size_t>(tensor.elements()));
  if (!out.empty()) std::memcpy(out.data(), tensor.data, out.size() * sizeof(T));
  return out;
}

template <class T>
std::vector<T> counting(std::size_t size) {
  std::vector<T> out(size);
  for (std::size_t i = 0; i < size; ++i) {
    const auto bits = static_cast<std::uint16_t>(i + 1);
    std::memcpy(static_cast<void*>(&out[i]), &bits, sizeof bits);
  }
  return out;
}

template <class T>
void check_round_trip(DType dtype) {
  const Folder folder;
  std::vector<T> data = counting<T>(24);
  write_safetensors(folder / "x.safetensors", {{"x", view(data.data(), {2, 3, 4})}});
  const SafetensorsFile file = SafetensorsFile::read(folder / "x.safetensors");
  const TensorView& x = file.tensor("x");
  CHECK(x.dtype == dtype);
  CHECK(x.rank == 3);
  CHECK(std::vector<std::int64_t>(x.shape.begin(), x.shape.begin() + 3) == std::vector<std::int64_t>{2, 3, 4});
  CHECK(reinterpret_cast<std::uintptr_t>(x.data) % 64 == 0);
  CHECK(std::memcmp(x.data, data.data(), data.size() * sizeof(T)) == 0);
}

}  // namespace

TEST_CASE("every dtype comes back as it was written") {
  check_round_trip<float>(DType::f32);
  check_round_trip<gatedelta::float16>(DType::f16);
  check_round_trip<gatedelta::bfloat16>(DType::bf16);
  check_round_trip<std::int32_t>(DType::i32);
  check_round_trip<std::int64_t>(DType::i64);
}

TEST_CASE("several tensors, metadata, odd names and empty tensors") {
  const Folder folder;
  std::vector<float> f{1, 2, 3};
  std::vector<gatedelta::bfloat16> h = counting<gatedelta::bfloat16>(5);
  std::vector<std::int64_t> i{-1, INT64_MAX};
  const std::map<std::string, std::string> metadata{{"format", "pt"}, {"quote \"", "line\nbreak \xc3\xa9"}};
  write_safetensors(folder / "x",
                    {{"h", view(h.data(), {5})},
                     {"f \"\n", view(f.data(), {1, 1, 3, 1, 1})},
                     {"none", view(f.data(), {4, 0, 2})},
                     {"", view(i.data(), {2})}},
                    metadata);
  SafetensorsFile first = SafetensorsFile::read(folder / "x");
  const SafetensorsFile file = std::move(first);  // the views stay valid
  CHECK(file.metadata() == metadata);
  CHECK(file.tensors().size() == 4);
  CHECK(values<float>(file.tensor("f \"\n")) == f);
  CHECK(values<std::int64_t>(file.tensor("")) == i);
  CHECK(std::memcmp(file.tensor("h").data, h.data(), 10) == 0);
  CHECK(file.tensor("none").elements() == 0);
  CHECK(file.tensor("none").data != nullptr);
  for (const auto& [name, tensor] : file.tensors()) CHECK(reinterpret_cast<std::uintptr_t>(tensor.data) % 64 == 0);

  write_safetensors(folder / "empty", {});
  CHECK(SafetensorsFile::read(folder / "empty").tensors().empty());
  CHECK(folder.count() == 2);
}

TEST_CASE("strided views are written dense and row-major") {
  const Folder folder;
  std::vector<float> data(2 * 3 * 4);
  std::iota(data.begin(), data.end(), 0.0f);
  const TensorView dense = view(data.data(), {2, 3, 4});
  const float one = 7;
  TensorView reversed = view(data.data() + 23, {24}, {-1});
  write_safetensors(folder / "x", {{"transposed", dense.transposed(1, 2)},
                                   {"outer", dense.transposed(0, 1)},
                                   {"slice", dense.slice(1, 1, 2)},
                                   {"column", dense.slice(2, 3, 1)},
                                   {"reversed", reversed},
                                   {"repeated", view(&one, {2, 2}, {0, 0})}});
  const SafetensorsFile file = SafetensorsFile::read(folder / "x");
  std::vector<float> transposed, outer, slice, column;
  for (int i = 0; i < 2; ++i)
    for (int k = 0; k < 4; ++k)
      for (int j = 0; j < 3; ++j) transposed.push_back(data[i * 12 + j * 4 + k]);
  for (int j = 0; j < 3; ++j)
    for (int i = 0; i < 2; ++i)
      for (int k = 0; k < 4; ++k) outer.push_back(data[i * 12 + j * 4 + k]);
  for (int i = 0; i < 2; ++i)
    for (int j = 1; j < 3; ++j)
      for (int k = 0; k < 4; ++k) slice.push_back(data[i * 12 + j * 4 + k]);
  for (int i = 0; i < 6; ++i) column.push_back(data[i * 4 + 3]);
  CHECK(file.tensor("transposed").shape[1] == 4);
  CHECK(values<float>(file.tensor("transposed")) == transposed);
  CHECK(values<float>(file.tensor("outer")) == outer);
  CHECK(values<float>(file.tensor("slice")) == slice);
  CHECK(values<float>(file.tensor("column")) == column);
  CHECK(values<float>(file.tensor("reversed")) == std::vector<float>(data.rbegin(), data.rend()));
  CHECK(values<float>(file.tensor("repeated")) == std::vector<float>(4, 7));
}

TEST_CASE("forms of a sound file that this writer does not produce") {
  const Folder folder;
  SUBCASE("no dimensions, odd offsets, spaces after the header") {
    write_bytes(folder / "x", safetensors(R"({"i":{"dtype":"I64","shape":[],"data_offsets":[4,12]},)"
                                          R"("h":{"shape":[2],"data_offsets":[0,4],"dtype":"F16"}}   )",
                                          12));
    const SafetensorsFile file = SafetensorsFile::read(folder / "x");
    CHECK(file.tensor("i").rank == 1);
    CHECK(file.tensor("i").shape[0] == 1);
    CHECK(values<std::int64_t>(file.tensor("i")) == std::vector<std::int64_t>{0x0101010101010101});
    CHECK(reinterpret_cast<std::uintptr_t>(file.tensor("i").data) % 64 == 0);
  }
  SUBCASE("a dtype that the library does not know is an error only where it is asked for") {
    write_bytes(folder / "x", safetensors(R"({"u":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},)"
                                          R"("n":{"dtype":"NEW4","shape":[9],"data_offsets":[3,8]},)"
                                          R"("i":{"dtype":"I32","shape":[1],"data_offsets":[8,12]}})",
                                          12));
    const SafetensorsFile file = SafetensorsFile::read(folder / "x");
    CHECK(file.tensors().size() == 1);
    CHECK(values<std::int32_t>(file.tensor("i")) == std::vector<std::int32_t>{0x01010101});
    CHECK(file.contains("u"));
    CHECK(contains(error_of([&] { file.tensor("u"); }), "\"u\": expected dtype F32, F16, BF16, I32 or I64, got \"U8\""));
    CHECK(contains(error_of([&] { file.tensor("n"); }), "got \"NEW4\""));
    CHECK_FALSE(file.contains("x"));
    CHECK(contains(error_of([&] { file.tensor("x"); }), "\"x\" is missing"));
  }
}

TEST_CASE("hostile files: one line that names the file and the cause") {
  const auto entry = [](const std::string& fields, std::size_t data = 8) {
    return safetensors("{\"x\":{" + fields + "}}", data);
  };
  const auto one = [&](const std::string& dtype, const std::string& shape, const std::string& offsets, std::size_t data = 8) {
    return entry("\"dtype\":" + dtype + ",\"shape\":" + shape + ",\"data_offsets\":" + offsets, data);
  };
  const std::string sound = R"("dtype":"F32","shape":[2],"data_offsets":[0,8])";
  const std::string deep(1 << 20, '[');
  std::string nested;
  for (int i = 0; i < 100000; ++i) nested += "{\"a\":";
  const std::pair<std::string, std::string> table[] = {
      {"", "at least 8 bytes"},
      {"1234567", "at least 8 bytes"},
      {with_length(2, "{"), "header's length"},
      {with_length(UINT64_MAX, "{}"), "header's length"},
      {with_length(std::uint64_t{1} << 63, "{}"), "header's length"},
      {with_length(0, "{}"), "not valid JSON"},
      {safetensors("   ", 0), "not valid JSON"},
      {safetensors("{", 0), "not valid JSON"},
      {safetensors("{}{}", 0), "not valid JSON"},
      {safetensors(std::string("{}\0{", 4), 0), "not valid JSON"},
      {safetensors("{\"x\xff\":1}", 0), "not valid JSON"},
      {safetensors("{'x':1}", 0), "not valid JSON"},
      {safetensors("[]", 0), "header: expected an object, got a list"},
      {safetensors("7", 0), "header: expected an object, got 7"},
      {safetensors(deep, 0), "header: expected an object"},
      {safetensors(nested, 0), "\"a\": "},
      {safetensors("{\"x\":" + deep, 0), "\"x\": expected an object, got a list"},
      {entry("\"dtype\":\"F32\",\"shape\":" + deep), "shape: expected whole numbers from 0 to 2^63-1, got a list"},
      {entry("\"shape\":{}"), "shape: expected a list of numbers, got an object"},
      {safetensors("{\"x\":null}", 0), "expected an object, got null"},
      {safetensors("{\"x\":\"" + std::string(5000, 'y') + "\"}", 0), "expected an object, got text"},
      {safetensors("{\"x\\n\\u0007\":1}", 0), "\"x\\x0a\\x07\": expected an object"},
      {safetensors("{\"__metadata__\":{\"a\":1}}", 0), "__metadata__: \"a\": expected text, got 1"},
      {safetensors("{\"__metadata__\":[]}", 0), "__metadata__: expected an object"},
      {safetensors("{\"__metadata__\":{\"a\":\"\",\"a\":\"\"}}", 0), "__metadata__: duplicate key \"a\""},
      {safetensors("{\"x\":{" + sound + "},\"x\":{" + sound + "}}", 8), "duplicate name \"x\""},
      {entry(sound + ",\"dtype\":\"F32\""), "duplicate key \"dtype\""},
      {entry(sound + ",\"shape\":[2]"), "duplicate key \"shape\""},
      {entry(sound + ",\"more\":1"), "unexpected key \"more\""},
      {entry(""), "dtype is missing"},
      {entry(R"("shape":[2],"data_offsets":[0,8])"), "dtype is missing"},
      {entry(R"("dtype":"F32","data_offsets":[0,8])"), "shape is missing"},
      {entry(R"("dtype":"F32","shape":[2])"), "data_offsets is missing"},
      {one("7", "[2]", "[0,8]"), "dtype: expected text, got 7"},
      {one("[]", "[2]", "[0,8]"), "dtype: expected text, got a list"},
      {one("\"F32\"", "2", "[0,8]"), "shape: expected a list of numbers, got 2"},
      {one("\"F32\"", "\"2\"", "[0,8]"), "shape: expected a list of numbers, got text"},
      {one("\"F32\"", "[\"2\"]", "[0,8]"), "shape: expected whole numbers"},
      {one("\"F32\"", "[2.0]", "[0,8]"), "shape: expected whole numbers"},
      {one("\"F32\"", "[true]", "[0,8]"), "got a boolean"},
      {one("\"F32\"", "[-2]", "[0,8]"), "shape: expected whole numbers from 0 to 2^63-1, got -2"},
      {one("\"F32\"", "[9223372036854775808]", "[0,8]"), "got 9223372036854775808"},
      {one("\"F32\"", "[99999999999999999999]", "[0,8]"), "got \"99999999999999999999\""},
      {one("\"F32\"", "[1e999]", "[0,8]"), "not valid JSON"},
      {one("\"F32\"", "[1,1,1,1,1,2]", "[0,8]"), "shape: expected at most 5 numbers"},
      {one("\"F32\"", "[2]", "[0]"), "data_offsets: expected 2 numbers, got 1"},
      {one("\"F32\"", "[2]", "[0,8,8]"), "data_offsets: expected at most 2 numbers"},
      {one("\"F32\"", "[2]", "[-8,0]"), "data_offsets: expected whole numbers"},
      {one("\"F32\"", "[2]", "[8,0]"), "expected a range within 0..8"},
      {one("\"F32\"", "[2]", "[0,8]", 7), "expected a range within 0..7"},
      {one("\"F32\"", "[2]", "[9223372036854775799,9223372036854775807]"), "expected a range within 0..8"},
      {one("\"F32\"", "[3]", "[0,8]"), "expected 12 bytes for F32 [3], got 8"},
      {one("\"F64\"", "[2]", "[0,8]"), "expected 16 bytes for F64 [2], got 8"},
      {one("\"F32\"", "[]", "[0,8]"), "expected 4 bytes for F32 [], got 8"},
      {one("\"F32\"", "[4294967296,4294967296]", "[0,0]", 0), "the product of the sizes"},
      {one("\"F32\"", "[4611686018427387905,4]", "[0,8]"), "the product of the sizes"},
      {one("\"F32\"", "[0,4294967296,4294967296]", "[0,0]", 0), "the product of the sizes"},
      {one("\"F32\"", "[2]", "[0,8]", 9), "expected 8 bytes of data, got 9"},
      {one("\"F32\"", "[2]", "[1,9]", 9), "belong to no tensor"},
      {safetensors("{}", 1), "expected 0 bytes of data, got 1"},
      {safetensors("{\"x\":{" + sound + R"(},"y":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}})", 12),
       "\"y\": overlaps another tensor"},
      {safetensors("{\"x\":{" + sound + R"(},"y":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})", 8),
       "overlaps another tensor"},
  };
  const Folder folder;
  for (const auto& row : table) {
    const std::string& cause = row.second;
    CAPTURE(cause);
    write_bytes(folder / "hostile.safetensors", row.first);
    const std::string message = error_of([&] { SafetensorsFile::read(folder / "hostile.safetensors"); });
    CAPTURE(message);
    CHECK(contains(message, "hostile.safetensors\": "));
    CHECK(contains(message, cause));
    CHECK_FALSE(contains(message, "\n"));
    CHECK(message.size() < 1000);
  }
}

TEST_CASE("a file cut anywhere is refused") {
  const Folder folder;
  std::vector<float> f{1, 2, 3};
  write_safetensors(folder / "x", {{"x", view(f.data(), {3})}, {"y", view(f.data(), {1, 2})}}, {{"a", "b"}});
  const std::string whole = read_bytes(folder / "x");
  for (std::size_t size = 0; size < whole.size(); ++size) {
    CAPTURE(size);
    write_bytes(folder / "cut", whole.substr(0, size));
    CHECK(error_of([&] { SafetensorsFile::read(folder / "cut"); }) != "");
  }
}

TEST_CASE("changed bytes give a file or an error, never anything else") {
  const Folder folder;
  std::vector<float> f{1, 2, 3};
  std::vector<std::int64_t> i{4, 5};
  write_safetensors(folder / "x", {{"x", view(f.data(), {3})}, {"y", view(i.data(), {1, 2})}}, {{"a", "b"}});
  const std::string whole = read_bytes(folder / "x");
  std::mt19937 random(1);
  const std::string alphabet = "{}[]\",:-.0123456789eE\\untrfals\x80\xff ";
  int refused = 0;
  for (int round = 0; round < 1000; ++round) {
    std::string bytes = whole;
    for (int changes = 1 + static_cast<int>(random() % 3); changes > 0; --changes)
      bytes[random() % bytes.size()] = random() % 4 ? alphabet[random() % alphabet.size()] : static_cast<char>(random());
    write_bytes(folder / "changed", bytes);
    refused += !error_of([&] {
                  const SafetensorsFile file = SafetensorsFile::read(folder / "changed");
                  for (const auto& [name, tensor] : file.tensors()) {
                    const std::size_t bytes = static_cast<std::size_t>(tensor.elements()) * gatedelta::size_of(tensor.dtype);
                    std::vector<char> copy(bytes);  // all of it can be read
                    if (bytes > 0) std::memcpy(copy.data(), tensor.data, bytes);
                  }
                }).empty();
  }
  CHECK(refused > 300);
}

TEST_CASE("what is no file") {
  const Folder folder;
  CHECK(contains(error_of([&] { SafetensorsFile::read(folder / "absent"); }), "absent\": No such file"));
  CHECK(contains(error_of([&] { SafetensorsFile::read(folder / ""); }), "is a directory"));
  CHECK(contains(error_of([&] { SafetensorsFile::read("/dev/zero"); }), "is not a regular file"));
  CHECK(contains(error_of([&] { SafetensorsFile::read(""); }), "No such file"));
  REQUIRE(mkfifo((folder / "pipe").c_str(), 0600) == 0);
  CHECK(contains(error_of([&] { SafetensorsFile::read(folder / "pipe"); }), "is not a regular file"));
}

TEST_CASE("a write that fails leaves what was there before") {
  const Folder folder;
  float x = 1;
  const TensorView one = view(&x, {1});
  write_bytes(folder / "kept", "before");
  fs::create_directory(folder / "folder");
  REQUIRE(mkfifo((folder / "pipe").c_str(), 0600) == 0);
  CHECK(contains(error_of([&] { write_safetensors(folder / "absent/x", {{"x", one}}); }), "cannot be written: No such file"));
  CHECK(contains(error_of([&] { write_safetensors(folder / "folder", {{"x", one}}); }), "is a directory"));
  CHECK(contains(error_of([&] { write_safetensors(folder / "pipe", {{"x", one}}); }), "is not a regular file"));
  CHECK(contains(error_of([&] { write_safetensors(folder / std::string(300, 'x'), {{"x", one}}); }), "cannot be written"));
  CHECK(contains(error_of([&] { write_safetensors(folder / "kept", {{"x", one}, {"x", one}}); }), "the name is taken"));
  CHECK(contains(error_of([&] { write_safetensors(folder / "kept", {{"__metadata__", one}}); }), "the name is taken"));
  CHECK(contains(error_of([&] { write_safetensors(folder / "kept", {{"\xff", one}}); }), "expected UTF-8"));
  CHECK(contains(error_of([&] { write_safetensors(folder / "kept", {{"x", TensorView{}}}); }), "expected a tensor"));
  TensorView device = one;
  device.device.type = gatedelta::DeviceType::cuda;
  CHECK(contains(error_of([&] { write_safetensors(folder / "kept", {{"x", device}}); }), "expected host memory, got cuda:0"));
  CHECK(read_bytes(folder / "kept") == "before");
  CHECK(folder.count() == 3);

  write_safetensors(folder / "kept", {{"x", one}});
  CHECK(values<float>(SafetensorsFile::read(folder / "kept").tensor("x")) == std::vector<float>{1});
  fs::create_symlink("kept", folder / "link");
  x = 2;
  write_safetensors(folder / "link", {{"x", one}});
  CHECK(fs::is_symlink(folder / "link"));
  CHECK(values<float>(SafetensorsFile::read(folder / "kept").tensor("x")) == std::vector<float>{2});
  CHECK(folder.count() == 4);
}
