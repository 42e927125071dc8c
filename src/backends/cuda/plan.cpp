// SPDX-License-Identifier: Apache-2.0
#include "backends/cuda/plan.hpp"

#include <algorithm>
#include <iterator>

namespace gatedelta::cuda {
namespace {

constexpr std::int64_t no_bound = INT64_MAX;

// Measured on an H200 with 16 query and 32 value heads and K = V = 128, by trying all of them.
constexpr Choice decode_16_bit[] = {
    {32, {2, 1, 4}}, {128, {4, 2, 8}}, {256, {8, 4, 16}}, {512, {8, 4, 32}}, {no_bound, {8, 1, 16}},
};
constexpr Choice decode_32_bit[] = {
    {32, {4, 2, 4}}, {256, {8, 2, 8}}, {512, {8, 1, 32}}, {2048, {4, 2, 4}}, {4096, {8, 1, 8}}, {no_bound, {8, 1, 32}},
};
constexpr Choice decode_value_last[] = {{64, {1, 1, 16}}, {no_bound, {1, 4, 16}}};
constexpr Choice verify_float[] = {{256, {0, 1, 16}}, {no_bound, {0, 1, 64}}};
constexpr Choice verify_packed[] = {{256, {0, 1, 16}}, {1024, {0, 1, 64}}, {no_bound, {0, 1, 128}}};

template <std::size_t N>
constexpr Choices all(const Choice (&rows)[N]) {
  return {std::begin(rows), std::end(rows)};
}

/// Whether every vector of 16 bytes (or of `width` elements, if that is less) along the dimension `along` is aligned.
template <int rank>
bool has_vectors(const Tensor<std::int64_t, rank>& tensor, int along, std::int64_t width) {
  const auto size = static_cast<std::int64_t>(size_of(tensor.dtype));
  const std::int64_t bytes = std::min<std::int64_t>(16, width * size);
  if (tensor.strides[along] != 1 || reinterpret_cast<std::uintptr_t>(tensor.data) % static_cast<std::uintptr_t>(bytes) != 0)
    return false;
  for (int dim = 0; dim < rank; ++dim)
    if (dim != along && tensor.strides[dim] * size % bytes != 0) return false;
  return true;
}

/// Whether all states of the call have vectors along this one of their last two dimensions (0: V, 1: K).
bool states_have_vectors(const ForwardParams& p, int dimension) {
  const auto width = static_cast<std::int64_t>(16 / size_of(p.state_dtype));
  const auto good = [&]<int rank>(const Tensor<std::int64_t, rank>& tensor) {
    return tensor.data == nullptr || has_vectors(tensor, rank - 2 + dimension, width);
  };
  return good(p.state_read) && good(p.state_write) && good(p.snapshots);
}

/// Whether two neighbouring values can be loaded or stored at once.
bool pairs(const Tensor<std::int64_t, 4>& tensor) {
  return tensor.strides[3] == 1 && reinterpret_cast<std::uintptr_t>(tensor.data) % (2 * size_of(tensor.dtype)) == 0 &&
         std::all_of(tensor.strides, tensor.strides + 3, [](std::int64_t stride) { return stride % 2 == 0; });
}

}  // namespace

Choices choices(Kernel kernel, DType state, bool value_last, bool keeps_float) {
  if (kernel == Kernel::verify) return keeps_float ? all(verify_float) : all(verify_packed);
  if (value_last) return all(decode_value_last);
  return state == DType::f32 ? all(decode_32_bit) : all(decode_16_bit);
}

Plan make_plan(const ForwardParams& p) {
  Plan plan;
  const bool key_dim = p.key_dim == 64 || p.key_dim == 128 || p.key_dim == 256;
  if (!key_dim || p.value_dim % 32 != 0 || p.heads > max_grid_yz || p.tokens > INT32_MAX) return plan;
  if (states_have_vectors(p, 1))
    plan.value_last = false;
  else if (states_have_vectors(p, 0))
    plan.value_last = true;
  else
    return plan;

  const auto bfloat = [](const auto& tensor) { return tensor.data == nullptr || tensor.dtype == DType::bf16; };
  plan.common = p.vector_keys && pairs(p.v) && pairs(p.o) && bfloat(p.q) && bfloat(p.k) && bfloat(p.v) && bfloat(p.o) &&
                bfloat(p.gate) && bfloat(p.beta);
  const auto gapless = [&](const auto& tensor, int row) { return tensor.data == nullptr || tensor.strides[row] == p.key_dim; };
  if (!plan.value_last)
    plan.common = plan.common && gapless(p.state_read, 2) && gapless(p.state_write, 2) && gapless(p.snapshots, 3);
  const bool stores_each = p.store_tokens || p.snapshots.data != nullptr;
  const bool variable = p.cu_seqlens.data != nullptr;
  plan.kernel = !variable && p.tokens == 1 ? Kernel::decode : Kernel::verify;
  if (plan.kernel == Kernel::decode)
    plan.common = plan.common && !stores_each && p.accepted.data == nullptr && p.l2norm && p.gate_form == GateForm::raw &&
                  p.beta_form == BetaForm::logits;
  if (plan.kernel == Kernel::verify) {
    // As registers allow. A row's tokens are cut into the same turns whatever else the call has.
    const int widest = p.key_dim == 256 ? 8 : 16;
    plan.token_tile = p.tokens <= 8 ? 8 : widest;
    plan.keeps_float = stores_each || !plan.common || p.tokens > widest || p.state_dtype != DType::bf16 || plan.value_last;
  }
  const Choices rows = choices(plan.kernel, p.state_dtype, plan.value_last, plan.keeps_float);
  plan.shape = std::find_if(rows.begin, rows.end, [&](const Choice& row) { return p.rows * p.heads <= row.states; })->shape;
  return plan;
}

}  // namespace gatedelta::cuda
