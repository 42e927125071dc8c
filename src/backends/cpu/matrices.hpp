// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "backends/cpu/kernels.hpp"
#include "backends/cpu/vectors.hpp"

// Moving strided matrices of any dtype to dense float scratch and back, and small matrix products on that scratch.
namespace gatedelta::cpu {
namespace {

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

GATEDELTA_INLINE int64_t size_of(Element type) { return type == Element::f32 ? 4 : 2; }

/// Calls `function` with a null pointer of the storage type.
template <class Function>
GATEDELTA_INLINE auto with_element(Element type, Function function) {
  switch (type) {
    case Element::f16:
      return function((f16_t*)nullptr);
    case Element::bf16:
      return function((bf16_t*)nullptr);
    default:
      return function((float*)nullptr);
  }
}

// Single elements take the vector conversions, so that a value never depends on where in a row it stands.
template <class S>
GATEDELTA_INLINE float load_one(const void* p) {
  if constexpr (sizeof(S) == 4) {
    return load_as<float>(p);
  } else {
    S lanes[W] = {load_as<S>(p)};
    return load(lanes)[0];
  }
}
template <class S>
GATEDELTA_INLINE void store_one(void* p, float x) {
  if constexpr (sizeof(S) == 4) {
    store_as(p, x);
  } else {
    S lanes[W];
    store(lanes, vf{x});
    store_as(p, lanes[0]);
  }
}

/// dst[0..n) = n elements `stride` bytes apart.
template <class S>
void load_run(const char* src, int64_t stride, int64_t n, float* dst) {
  int64_t i = 0;
  if (stride == (int64_t)sizeof(S))
    for (; i + W <= n; i += W) store(dst + i, load((const S*)src + i));
  for (; i < n; ++i) dst[i] = load_one<S>(src + i * stride);
}
template <class S>
void store_run(const float* src, char* dst, int64_t stride, int64_t n) {
  int64_t i = 0;
  if (stride == (int64_t)sizeof(S))
    for (; i + W <= n; i += W) store((S*)dst + i, load(src + i));
  for (; i < n; ++i) store_one<S>(dst + i * stride, src[i]);
}

inline void load_run(const Matrix& m, int64_t row, int64_t n, float* dst) {
  with_element(m.type, [&]<class S>(S*) { load_run<S>(m.data + row * m.row_stride, m.col_stride, n, dst); });
}
inline void store_run(const float* src, const Matrix& m, int64_t row, int64_t n) {
  with_element(m.type, [&]<class S>(S*) { store_run<S>(src, m.data + row * m.row_stride, m.col_stride, n); });
}

/// Brings a dense row towards the cache. Rows of one head lie a whole token apart, mostly on pages of their own, where the
/// hardware's prefetchers do not follow.
inline void prefetch_run(const Matrix& m, int64_t row, int64_t n) {
  if (m.col_stride != size_of(m.type)) return;
  const char* begin = m.data + row * m.row_stride;
  for (int64_t i = 0; i < n * m.col_stride; i += 64) __builtin_prefetch(begin + i, 0, 2);
}

inline void fill_zero(float* p, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = 0;
}

/// dst (cols x rows, leading dimension `ld_dst`) = src (rows x cols) transposed. Rows in fours; the rest one by one.
inline void transpose(const float* src, int64_t ld_src, int64_t rows, int64_t cols, float* dst, int64_t ld_dst) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    const float *a = src + r * ld_src, *b = a + ld_src, *c = b + ld_src, *d = c + ld_src;
    float* to = dst + r;
    int64_t j = 0;
    for (; j + 4 <= cols; j += 4) {
      const v4 w = load_as<v4>(a + j), x = load_as<v4>(b + j), y = load_as<v4>(c + j), z = load_as<v4>(d + j);
      const v4 wx_low = __builtin_shufflevector(w, x, 0, 4, 1, 5), wx_high = __builtin_shufflevector(w, x, 2, 6, 3, 7);
      const v4 yz_low = __builtin_shufflevector(y, z, 0, 4, 1, 5), yz_high = __builtin_shufflevector(y, z, 2, 6, 3, 7);
      store_as(to + (j + 0) * ld_dst, __builtin_shufflevector(wx_low, yz_low, 0, 1, 4, 5));
      store_as(to + (j + 1) * ld_dst, __builtin_shufflevector(wx_low, yz_low, 2, 3, 6, 7));
      store_as(to + (j + 2) * ld_dst, __builtin_shufflevector(wx_high, yz_high, 0, 1, 4, 5));
      store_as(to + (j + 3) * ld_dst, __builtin_shufflevector(wx_high, yz_high, 2, 3, 6, 7));
    }
    for (; j < cols; ++j) {
      to[j * ld_dst + 0] = a[j];
      to[j * ld_dst + 1] = b[j];
      to[j * ld_dst + 2] = c[j];
      to[j * ld_dst + 3] = d[j];
    }
  }
  for (; r < rows; ++r)
    for (int64_t j = 0; j < cols; ++j) dst[j * ld_dst + r] = src[r * ld_src + j];
}

/// Whether reading along the rows touches memory in order (the columns are the closer ones).
GATEDELTA_INLINE bool columns_are_close(const Matrix& m) {
  const int64_t row = m.row_stride < 0 ? -m.row_stride : m.row_stride;
  const int64_t col = m.col_stride < 0 ? -m.col_stride : m.col_stride;
  return col <= row;
}

GATEDELTA_INLINE Matrix transposed(Matrix m) {
  const int64_t row = m.row_stride;
  m.row_stride = m.col_stride;
  m.col_stride = row;
  return m;
}

// Rows that are transposed on the way are staged in groups of this many.
constexpr int64_t stage_rows = 16;

/// Floats of scratch that load_dense and store_dense need for a matrix with this longer side.
constexpr int64_t stage_floats(int64_t longer) { return stage_rows * round_up(longer, W); }

/// dst (rows x cols, leading dimension ld) = m, read in the order of its memory. No data: zeros.
inline void load_dense(const Matrix& m, int64_t rows, int64_t cols, float* dst, int64_t ld, float* stage) {
  if (m.data == nullptr) {
    for (int64_t r = 0; r < rows; ++r) fill_zero(dst + r * ld, cols);
  } else if (columns_are_close(m)) {
    for (int64_t r = 0; r < rows; ++r) load_run(m, r, cols, dst + r * ld);
  } else {
    const Matrix t = transposed(m);
    const int64_t ld_stage = round_up(rows, W);
    for (int64_t c = 0; c < cols; c += stage_rows) {
      const int64_t group = cols - c < stage_rows ? cols - c : stage_rows;
      for (int64_t i = 0; i < group; ++i) load_run(t, c + i, rows, stage + i * ld_stage);
      transpose(stage, ld_stage, group, rows, dst + c, ld);
    }
  }
}

/// The reverse: m = src.
inline void store_dense(const float* src, int64_t ld, int64_t rows, int64_t cols, const Matrix& m, float* stage) {
  if (columns_are_close(m)) {
    for (int64_t r = 0; r < rows; ++r) store_run(src + r * ld, m, r, cols);
  } else {
    const Matrix t = transposed(m);
    const int64_t ld_stage = round_up(rows, W);
    for (int64_t c = 0; c < cols; c += stage_rows) {
      const int64_t group = cols - c < stage_rows ? cols - c : stage_rows;
      transpose(src + c, ld, rows, group, stage, ld_stage);
      for (int64_t i = 0; i < group; ++i) store_run(stage + i * ld_stage, t, c + i, rows);
    }
  }
}

/// One query or key in float, padded with zeros to `padded`, times `factor` and, if asked, over its L2 norm. Returns what it
/// was multiplied with.
inline double load_vector(const Matrix& m, int64_t token, int64_t n, int64_t padded, bool l2norm, double eps, double factor,
                          float* dst) {
  load_run(m, token, n, dst);
  for (int64_t i = n; i < padded; ++i) dst[i] = 0;
  if (l2norm) {
    // In double: squares of large or tiny floats leave the range of float.
    vd low{}, high{};
    for (int64_t i = 0; i < padded; i += W) {
      const vf x = load(dst + i);
      const vd a = widen_low(x), b = widen_high(x);
      low += a * a;
      high += b * b;
    }
    factor /= __builtin_sqrt(sum(low + high) + eps);
    // A factor beyond the range of float (a tiny vector with eps 0) is applied in double.
    const double magnitude = __builtin_fabs(factor);
    if (!(magnitude < 0x1p126 && magnitude > 0x1p-126)) {
      for (int64_t i = 0; i < n; ++i) dst[i] = (float)(dst[i] * factor);
      return factor;
    }
  }
  const vf scale = set1((float)factor);
  for (int64_t i = 0; i < padded; i += W) store(dst + i, load(dst + i) * scale);
  return factor;
}

/// C (m x n) = diag(alpha) C + A B on dense float scratch; element (i, d) of A is a[i*row_a + d*col_a]. n is a multiple of W.
/// The sum over d runs in order for each element of C, so no result depends on the blocking.
struct Product {
  int64_t m, n, depth;
  const float* a;
  int64_t row_a, col_a;
  const float* b;
  int64_t ld_b;
  float* c;
  int64_t ld_c;
  const float* alpha;    ///< null: C is overwritten
  int64_t alpha_stride;  ///< 0: one factor for all rows
};

#if defined(__AVX512F__)
constexpr int tile_rows = 6, tile_vectors = 4;
#elif defined(__AVX2__)
constexpr int tile_rows = 6, tile_vectors = 2;
#else
constexpr int tile_rows = 3, tile_vectors = 4;
#endif

template <int M, int N>
GATEDELTA_INLINE void product_tile(const Product& p, int64_t i, int64_t j, int64_t depth) {
  vf acc[M][N];
  float* c = p.c + i * p.ld_c + j;
  GATEDELTA_UNROLL
  for (int r = 0; r < M; ++r) GATEDELTA_UNROLL
  for (int s = 0; s < N; ++s)
    acc[r][s] = p.alpha ? load(c + r * p.ld_c + s * W) * set1(p.alpha[(i + r) * p.alpha_stride]) : vf{};
  const float* a = p.a + i * p.row_a;
  const float* b = p.b + j;
  for (int64_t d = 0; d < depth; ++d, a += p.col_a, b += p.ld_b) {
    vf row[N];
    GATEDELTA_UNROLL
    for (int s = 0; s < N; ++s) row[s] = load(b + s * W);
    GATEDELTA_UNROLL
    for (int r = 0; r < M; ++r) {
      const vf x = set1(a[r * p.row_a]);
      GATEDELTA_UNROLL
      for (int s = 0; s < N; ++s) acc[r][s] = fma(x, row[s], acc[r][s]);
    }
  }
  GATEDELTA_UNROLL
  for (int r = 0; r < M; ++r) GATEDELTA_UNROLL
  for (int s = 0; s < N; ++s) store(c + r * p.ld_c + s * W, acc[r][s]);
}

/// A panel of N vectors of columns: it stays in L1 while all rows of A pass by.
template <int N>
GATEDELTA_KERNEL void product_panel(const Product& p, int64_t j, bool lower) {
  const auto depth = [&](int64_t last) { return lower && last < p.depth ? last : p.depth; };
  int64_t i = 0;
  for (; i + tile_rows <= p.m; i += tile_rows) product_tile<tile_rows, N>(p, i, j, depth(i + tile_rows));
  if constexpr (tile_rows > 4)
    for (; i + 4 <= p.m; i += 4) product_tile<4, N>(p, i, j, depth(i + 4));
  for (; i + 2 <= p.m; i += 2) product_tile<2, N>(p, i, j, depth(i + 2));
  for (; i < p.m; ++i) product_tile<1, N>(p, i, j, depth(i + 1));
}

/// `lower`: A is lower triangular (zeros above the diagonal are stored), so the tile of rows i.. needs no depth past its last
/// row.
inline void multiply(const Product& p, bool lower = false) {
  int64_t j = 0;
  for (; j + tile_vectors * W <= p.n; j += tile_vectors * W) product_panel<tile_vectors>(p, j, lower);
  if constexpr (tile_vectors == 4)
    for (; j + 2 * W <= p.n; j += 2 * W) product_panel<2>(p, j, lower);
  for (; j < p.n; j += W) product_panel<1>(p, j, lower);
}

}  // namespace
}  // namespace gatedelta::cpu
