// SPDX-License-Identifier: Apache-2.0
#include "io/safetensors.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <limits>
#include <new>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>

#include "gatedelta/error.hpp"
#include "io/pending_file.hpp"

static_assert(std::endian::native == std::endian::little, "safetensors files are little-endian");

namespace gatedelta::io {
namespace {

namespace fs = std::filesystem;

constexpr std::uint64_t max_header = 100'000'000;  // the limit that the format's own implementation sets
constexpr std::size_t alignment = 64;
constexpr const char* metadata_key = "__metadata__";

[[noreturn]] void fail(const std::string& message) { throw Error(ErrorCode::invalid_argument, message); }

struct FileDType {
  std::string_view name;
  std::size_t size;
  std::optional<DType> dtype;  // empty: tensors of this kind are checked, but not read
};

constexpr FileDType file_dtypes[] = {
    {"F32", 4, DType::f32}, {"F16", 2, DType::f16}, {"BF16", 2, DType::bf16}, {"I32", 4, DType::i32}, {"I64", 8, DType::i64},
    {"F64", 8, {}},         {"U64", 8, {}},         {"U32", 4, {}},           {"I16", 2, {}},         {"U16", 2, {}},
    {"I8", 1, {}},          {"U8", 1, {}},          {"BOOL", 1, {}},          {"F8_E4M3", 1, {}},     {"F8_E5M2", 1, {}},
};

const FileDType* find_file_dtype(std::string_view name) {
  const auto it = std::find_if(std::begin(file_dtypes), std::end(file_dtypes), [&](const auto& d) { return d.name == name; });
  return it == std::end(file_dtypes) ? nullptr : it;
}

std::string_view file_name_of(DType dtype) {
  return std::find_if(std::begin(file_dtypes), std::end(file_dtypes), [&](const auto& d) { return d.dtype == dtype; })->name;
}

/// The description of one tensor in the header.
struct Entry {
  std::string name, dtype;
  std::vector<std::int64_t> shape, offsets;
  std::set<std::string> keys;  // those that were given
};

/// Reads the header as the parser meets it. No document is built, so neither nesting nor long lists cost memory: what does not
/// have the form of a header ends the parse.
class HeaderReader final : public nlohmann::json_sax<nlohmann::json> {
 public:
  std::vector<Entry> entries;
  std::map<std::string, std::string> metadata;
  std::string error;  // empty: the header is sound

  bool null() override { return unexpected("null"); }
  bool boolean(bool) override { return unexpected("a boolean"); }
  bool number_float(double, const std::string& text) override { return unexpected(in_quotes(text)); }
  bool binary(binary_t&) override { return unexpected("binary data"); }

  bool number_integer(std::int64_t value) override {
    return place_ == Place::list && value == 0 ? number_unsigned(0) : unexpected(std::to_string(value));
  }

  bool number_unsigned(std::uint64_t value) override {
    if (place_ != Place::list || value > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max()))
      return unexpected(std::to_string(value));
    list_->push_back(static_cast<std::int64_t>(value));
    const std::size_t longest = key_ == "shape" ? max_rank : 2;
    return list_->size() <= longest || reject(where() + ": expected at most " + std::to_string(longest) + " numbers, got more");
  }

  bool string(std::string& value) override {
    if (place_ == Place::metadata) {
      metadata[key_] = value;
      return true;
    }
    if (place_ != Place::entry || key_ != "dtype") return unexpected("text " + in_quotes(value));
    entries.back().dtype = value;
    return true;
  }

  bool start_object(std::size_t) override {
    if (place_ == Place::outside)
      place_ = Place::top;
    else if (place_ != Place::top)
      return unexpected("an object");
    else if (key_ == metadata_key)
      place_ = Place::metadata;
    else {
      place_ = Place::entry;
      entries.push_back({key_, {}, {}, {}, {}});
    }
    return true;
  }

  bool key(std::string& name) override {
    key_ = name;
    if (place_ == Place::top) return names_.insert(name).second || reject("duplicate name " + in_quotes(name));
    if (place_ == Place::metadata)
      return !metadata.contains(name) || reject(std::string(metadata_key) + ": duplicate key " + in_quotes(name));
    if (name != "dtype" && name != "shape" && name != "data_offsets")
      return reject(tensor() + ": unexpected key " + in_quotes(name));
    return entries.back().keys.insert(name).second || reject(tensor() + ": duplicate key " + in_quotes(name));
  }

  bool end_object() override {
    if (place_ == Place::entry) {
      const Entry& entry = entries.back();
      for (const char* key : {"dtype", "shape", "data_offsets"})
        if (!entry.keys.contains(key)) return reject(tensor() + ": " + key + " is missing");
      if (entry.offsets.size() != 2)
        return reject(tensor() + ": data_offsets: expected 2 numbers, got " + std::to_string(entry.offsets.size()));
    }
    place_ = place_ == Place::top ? Place::outside : Place::top;
    return true;
  }

  bool start_array(std::size_t) override {
    if (place_ != Place::entry || key_ == "dtype") return unexpected("a list");
    list_ = key_ == "shape" ? &entries.back().shape : &entries.back().offsets;
    place_ = Place::list;
    return true;
  }

  bool end_array() override {
    place_ = Place::entry;
    return true;
  }

  bool parse_error(std::size_t position, const std::string&, const nlohmann::json::exception&) override {
    return reject("the header is not valid JSON (at its byte " + std::to_string(position) + ")");
  }

 private:
  enum class Place { outside, top, entry, list, metadata };

  bool reject(const std::string& cause) {
    error = cause;
    return false;
  }

  std::string tensor() const { return "tensor " + in_quotes(entries.back().name); }

  std::string where() const {
    if (place_ == Place::outside) return "header";
    if (place_ == Place::top) return key_ == metadata_key ? key_ : "tensor " + in_quotes(key_);
    if (place_ == Place::metadata) return std::string(metadata_key) + ": " + in_quotes(key_);
    return tensor() + ": " + key_;
  }

  bool unexpected(const std::string& got) {
    const char* expected = "an object";
    if (place_ == Place::metadata || (place_ == Place::entry && key_ == "dtype")) expected = "text";
    if (place_ == Place::entry && key_ != "dtype") expected = "a list of numbers";
    if (place_ == Place::list) expected = "whole numbers from 0 to 2^63-1";
    return reject(where() + ": expected " + expected + ", got " + got);
  }

  Place place_ = Place::outside;
  std::string key_;
  std::set<std::string> names_;
  std::vector<std::int64_t>* list_ = nullptr;
};

/// The bytes of a dense tensor, or nothing if that does not fit in 63 bits. Zeros count as ones first, so that the strides fit
/// as well.
std::optional<std::int64_t> byte_count(const std::vector<std::int64_t>& shape, std::size_t element) {
  std::int64_t bytes = static_cast<std::int64_t>(element);
  bool empty = false;
  for (const std::int64_t size : shape) {
    empty = empty || size == 0;
    if (__builtin_mul_overflow(bytes, std::max<std::int64_t>(size, 1), &bytes)) return std::nullopt;
  }
  return empty ? 0 : bytes;
}

std::string shape_text(const std::vector<std::int64_t>& shape) {
  std::string text;
  for (const std::int64_t size : shape) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "[" + text + "]";
}

/// Checks that the tensors lie in the data one after the other with nothing between, as the format demands, and sorts them so.
void check_layout(std::vector<Entry>& entries, std::int64_t data_size) {
  for (const Entry& entry : entries) {
    const std::int64_t begin = entry.offsets[0], end = entry.offsets[1];
    const std::string name = "tensor " + in_quotes(entry.name);
    if (begin > end || end > data_size)
      fail(name + ": data_offsets: expected a range within 0.." + std::to_string(data_size) + ", the size of the data, got " +
           shape_text(entry.offsets));
    const FileDType* dtype = find_file_dtype(entry.dtype);
    const std::optional<std::int64_t> bytes = byte_count(entry.shape, dtype ? dtype->size : 1);
    if (!bytes) fail(name + ": the product of the sizes " + shape_text(entry.shape) + " is too large");
    if (dtype && *bytes != end - begin)
      fail(name + ": data_offsets: expected " + std::to_string(*bytes) + " bytes for " + std::string(dtype->name) + " " +
           shape_text(entry.shape) + ", got " + std::to_string(end - begin));
  }
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) { return a.offsets < b.offsets; });
  std::int64_t covered = 0;
  for (const Entry& entry : entries) {
    const std::int64_t begin = entry.offsets[0];
    if (begin < covered) fail("tensor " + in_quotes(entry.name) + ": overlaps another tensor");
    if (begin > covered)
      fail("tensor " + in_quotes(entry.name) + ": bytes " + std::to_string(covered) + ".." + std::to_string(begin) +
           " of the data before it belong to no tensor");
    covered = entry.offsets[1];
  }
  if (covered != data_size) fail("expected " + std::to_string(covered) + " bytes of data, got " + std::to_string(data_size));
}

std::int64_t round_up(std::int64_t bytes) {
  constexpr auto step = static_cast<std::int64_t>(alignment);
  return (bytes + step - 1) / step * step;
}

std::string error_text(int number) { return std::strerror(number); }

std::string read_header(std::ifstream& in, std::uint64_t file_size) {
  std::array<unsigned char, 8> prefix{};
  if (file_size < prefix.size()) fail("expected at least 8 bytes, got " + std::to_string(file_size));
  if (!in.read(reinterpret_cast<char*>(prefix.data()), prefix.size())) fail("cannot be read");
  const auto length = std::bit_cast<std::uint64_t>(prefix);
  const std::uint64_t limit = std::min<std::uint64_t>(file_size - prefix.size(), max_header);
  if (length > limit)
    fail("the header's length is given as " + std::to_string(length) + " bytes, expected at most " + std::to_string(limit) +
         " (the file has " + std::to_string(file_size) + " bytes)");
  std::string header(length, '\0');
  if (!in.read(header.data(), static_cast<std::streamsize>(length))) fail("cannot be read");
  // The JSON parser would take a zero byte for the end.
  if (const std::size_t zero = header.find('\0'); zero != std::string::npos)
    fail("the header is not valid JSON (at its byte " + std::to_string(zero + 1) + ")");
  return header;
}

/// Writes dimensions `dim` and up, row-major.
void write_elements(PendingFile& file, const TensorView& tensor, int dim, const char* data, std::vector<char>& line) {
  const std::size_t element = size_of(tensor.dtype);
  std::int64_t dense = 1;
  bool is_dense = true;
  for (int i = tensor.rank - 1; i >= dim; --i) {
    is_dense = is_dense && (tensor.shape[i] == 1 || tensor.strides[i] == dense);
    dense *= tensor.shape[i];
  }
  if (is_dense) {
    file.write(data, static_cast<std::size_t>(dense) * element);
    return;
  }
  const std::int64_t size = tensor.shape[dim], stride = tensor.strides[dim] * static_cast<std::int64_t>(element);
  if (dim < tensor.rank - 1) {
    for (std::int64_t i = 0; i < size; ++i) write_elements(file, tensor, dim + 1, data + i * stride, line);
    return;
  }
  line.resize(static_cast<std::size_t>(size) * element);
  for (std::int64_t i = 0; i < size; ++i) std::memcpy(&line[static_cast<std::size_t>(i) * element], data + i * stride, element);
  file.write(line.data(), line.size());
}

/// The header for tensors that follow in this order, padded so that the data starts at a multiple of 8 bytes.
std::string make_header(const std::vector<const std::pair<std::string, TensorView>*>& order,
                        const std::map<std::string, std::string>& metadata) {
  nlohmann::json header = nlohmann::json::object();
  if (!metadata.empty()) header[metadata_key] = metadata;
  std::int64_t offset = 0;
  for (const auto* item : order) {
    const auto& [name, tensor] = *item;
    const std::string who = "tensor " + in_quotes(name);
    if (name == metadata_key || header.contains(name)) fail(who + ": the name is taken");
    if (!tensor.defined()) fail(who + ": expected a tensor, got none");
    if (tensor.device.type != DeviceType::cpu) fail(who + ": expected host memory, got " + name_of(tensor.device));
    const std::vector<std::int64_t> shape(tensor.shape.begin(), tensor.shape.begin() + tensor.rank);
    const std::optional<std::int64_t> bytes = byte_count(shape, size_of(tensor.dtype));
    std::int64_t end = 0;
    if (!bytes || __builtin_add_overflow(offset, *bytes, &end)) fail(who + ": " + shape_text(shape) + " is too large");
    header[name] = {{"dtype", file_name_of(tensor.dtype)}, {"shape", shape}, {"data_offsets", {offset, end}}};
    offset = end;
  }
  std::string text;
  try {
    text = header.dump();
  } catch (const nlohmann::json::exception&) {
    fail("names and metadata: expected UTF-8");
  }
  text.resize((text.size() + 7) / 8 * 8, ' ');
  return text;
}

/// Puts the file's name before the messages of what `function` throws.
template <class Function>
auto naming(const std::string& what, Function function) {
  try {
    return function();
  } catch (const Error& error) {
    throw Error(error.code(), what + ": " + error.what());
  } catch (const std::bad_alloc&) {
    throw Error(ErrorCode::out_of_memory, what + ": does not fit in memory");
  }
}

}  // namespace

void SafetensorsFile::AlignedDelete::operator()(std::byte* memory) const noexcept {
  ::operator delete (memory, std::align_val_t{alignment});
}

SafetensorsFile SafetensorsFile::read(const fs::path& path) {
  const std::string shown = in_quotes(path.string());
  return naming(shown, [&] {
    std::error_code error;
    const fs::file_status status = fs::status(path, error);
    if (!fs::exists(status)) fail(error ? error.message() : error_text(ENOENT));
    if (fs::is_directory(status)) fail("is a directory");
    if (!fs::is_regular_file(status)) fail("is not a regular file");
    std::ifstream in(path, std::ios::binary);
    if (!in) fail("cannot be opened: " + error_text(errno));
    const std::uint64_t file_size = fs::file_size(path, error);
    if (error) fail(error.message());

    const std::string header = read_header(in, file_size);
    HeaderReader reader;
    nlohmann::json::sax_parse(header, &reader);
    if (!reader.error.empty()) fail(reader.error);
    check_layout(reader.entries, static_cast<std::int64_t>(file_size - 8 - header.size()));

    SafetensorsFile file;
    file.path_ = shown;
    file.metadata_ = std::move(reader.metadata);
    std::int64_t memory_size = alignment;  // never null, so that empty tensors have an address as well
    for (const Entry& entry : reader.entries) {
      const FileDType* dtype = find_file_dtype(entry.dtype);
      if (dtype && dtype->dtype)
        memory_size += round_up(entry.offsets[1] - entry.offsets[0]);
      else
        file.other_[entry.name] = entry.dtype;
    }
    file.memory_.reset(
        static_cast<std::byte*>(::operator new (static_cast<std::size_t>(memory_size), std::align_val_t{alignment})));
    std::byte* next = file.memory_.get();
    for (Entry& entry : reader.entries) {
      if (file.other_.contains(entry.name)) continue;
      const std::int64_t begin = entry.offsets[0], bytes = entry.offsets[1] - begin;
      in.seekg(static_cast<std::streamoff>(8 + header.size()) + begin);
      if (!in.read(reinterpret_cast<char*>(next), bytes)) fail("cannot be read to its end");
      if (entry.shape.empty()) entry.shape.push_back(1);
      file.tensors_[entry.name] = make_view(next, *find_file_dtype(entry.dtype)->dtype, entry.shape);
      next += round_up(bytes);
    }
    return file;
  });
}

bool SafetensorsFile::contains(std::string_view name) const {
  const std::string key(name);
  return tensors_.contains(key) || other_.contains(key);
}

const TensorView& SafetensorsFile::tensor(std::string_view name) const {
  const std::string key(name);
  if (const auto it = tensors_.find(key); it != tensors_.end()) return it->second;
  if (const auto it = other_.find(key); it != other_.end())
    fail(path_ + ": tensor " + in_quotes(key) + ": expected dtype F32, F16, BF16, I32 or I64, got " + in_quotes(it->second));
  fail(path_ + ": tensor " + in_quotes(key) + " is missing");
}

void write_safetensors(const fs::path& path, const std::vector<std::pair<std::string, TensorView>>& tensors,
                       const std::map<std::string, std::string>& metadata) {
  naming(in_quotes(path.string()) + ": cannot be written", [&] {
    // Larger elements first keep every tensor aligned within the file.
    std::vector<const std::pair<std::string, TensorView>*> order;
    for (const auto& item : tensors) order.push_back(&item);
    std::stable_sort(order.begin(), order.end(),
                     [](const auto* a, const auto* b) { return size_of(a->second.dtype) > size_of(b->second.dtype); });
    const std::string header = make_header(order, metadata);
    if (header.size() > max_header) fail("the header is too large");
    PendingFile file(path);
    const std::uint64_t length = header.size();
    file.write(&length, sizeof length);
    file.write(header.data(), header.size());
    std::vector<char> line;
    for (const auto* item : order)
      if (item->second.elements() > 0) write_elements(file, item->second, 0, static_cast<const char*>(item->second.data), line);
    file.commit();
  });
}

std::string in_quotes(std::string_view text) {
  constexpr std::size_t longest = 200;
  std::string out = "\"";
  for (const char c : text.substr(0, longest)) {
    if (static_cast<unsigned char>(c) >= 0x20 && c != 0x7f)
      out += c;
    else {
      constexpr char digits[] = "0123456789abcdef";
      out += std::string("\\x") + digits[(c >> 4) & 15] + digits[c & 15];
    }
  }
  return out + (text.size() > longest ? "...\"" : "\"");
}

}  // namespace gatedelta::io
