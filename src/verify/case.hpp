// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "device/fields.hpp"
#include "gatedelta/gatedelta.hpp"

// A test case: one call of the operator as plain data on the host, before it is placed in anybody's memory.
namespace gatedelta::verify {

/// The tensors of Arguments, in the order of `fields`.
enum class Tensor : int {
  q,
  k,
  v,
  o,
  a,
  g,
  A_log,
  dt_bias,
  b,
  beta,
  state,
  read_slots,
  write_slots,
  token_slots,
  accepted,
  state_in,
  state_out,
  snapshots,
  cu_seqlens,
};
inline constexpr int tensor_count = 19;

using device::fields;
static_assert(fields.size() == tensor_count);
inline const char* name_of(Tensor tensor) { return fields[static_cast<std::size_t>(tensor)].name; }

/// Layout and content of one tensor.
struct TensorSpec {
  DType dtype = DType::f32;
  std::vector<std::int64_t> shape;    ///< empty: the call is made without this tensor
  std::vector<std::int64_t> strides;  ///< in elements
  std::vector<double> values;         ///< row-major by index, exact in dtype; empty for outputs: these start as NaN

  bool present() const { return !shape.empty(); }
  std::int64_t elements() const;
};

/// Row-major strides of a tensor without gaps.
std::vector<std::int64_t> dense_strides(const std::vector<std::int64_t>& shape);
/// A dense tensor without values.
TensorSpec dense(DType dtype, std::vector<std::int64_t> shape);

struct Case {
  std::string name;  ///< with the seed it determines everything below
  std::uint64_t seed = 0;
  Config config;
  std::array<TensorSpec, tensor_count> tensors;
  bool update_state = true;
  bool in_place = false;  ///< state_out is the memory of state_in
  bool aligned = false;   ///< every tensor begins at a multiple of 64 bytes
  std::string values;     ///< the patterns the values were drawn from, for the description

  TensorSpec& operator[](Tensor tensor) { return tensors[static_cast<std::size_t>(tensor)]; }
  const TensorSpec& operator[](Tensor tensor) const { return tensors[static_cast<std::size_t>(tensor)]; }
  std::int64_t batch() const { return (*this)[Tensor::q].shape[0]; }
  std::int64_t tokens() const { return (*this)[Tensor::q].shape[1]; }
  /// N: sequences.
  std::int64_t rows() const;
  /// Where the states of a call end: the pool or state_out (which may be absent).
  Tensor state_output() const { return (*this)[Tensor::state].present() ? Tensor::state : Tensor::state_out; }
  /// The tensor that states are read from: the pool or state_in (which may be absent).
  Tensor state_input() const { return (*this)[Tensor::state].present() ? Tensor::state : Tensor::state_in; }
};

/// Several lines of text: configuration, then every tensor with dtype, shape and strides, and the index tensors' values.
std::string describe(const Case& c);

/// What a call means for one sequence, worked out from the contract alone (the library has its own code for it).
struct Row {
  std::int64_t batch = 0;
  std::int64_t first_token = 0;
  std::int64_t tokens = 0;
  bool padding = false;
  std::int64_t source = -1;               ///< slot of state_input(); -1: the zero state
  std::int64_t final_slot = -1;           ///< slot of state_output() that gets the last state; -1: none
  std::vector<std::int64_t> token_slots;  ///< the slot that gets the state after each token; -1: none
};
std::vector<Row> plan(const Case& c);

/// A pool without slots to read: row n has slot n, whatever null_slot is.
bool reads_by_row_number(const Case& c);
/// The case that has only row `n` of `c`, with the same strides. A row read by its number gets a read slot and so must be
/// above null_slot.
Case single_row(const Case& c, std::int64_t n);
/// Tokens begin..end-1 of a case without cu_seqlens, as a call from `states` (one a row, row-major; empty: zero) to state_out.
/// Padding rows are not kept apart: the case must have none.
Case token_range(const Case& c, std::int64_t begin, std::int64_t end, const std::vector<double>& states);

/// `value` rounded once to `dtype`.
double rounded(DType dtype, double value);
/// Calls function(flat row-major index, index of each dimension) for every element.
template <class Function>
void for_each_index(const std::vector<std::int64_t>& shape, Function function) {
  std::vector<std::int64_t> index(shape.size(), 0);
  std::int64_t count = 1;
  for (const std::int64_t size : shape) count *= size;
  for (std::int64_t flat = 0; flat < count; ++flat) {
    function(flat, index);
    for (std::size_t dim = shape.size(); dim-- > 0;) {
      if (++index[dim] < shape[dim]) break;
      index[dim] = 0;
    }
  }
}

}  // namespace gatedelta::verify
