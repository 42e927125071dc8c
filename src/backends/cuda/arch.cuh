// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

// The instructions that CUDA C++ has no function for (PTX ISA: mma.sync.m16n8k16 and m16n8k8, movmatrix, ldmatrix, stmatrix,
// mul.wide, wgmma, fence.proxy).
namespace gatedelta::cuda {

/// Two bfloat16 values, the first in the lower half.
using Pair = std::uint32_t;

/// d += a b for a 16 x 16 matrix a and a 16 x 8 matrix b of bfloat16. With g = lane / 4 and c = lane % 4 a lane has of
///   a: (g; 2c, 2c+1), (g+8; 2c, 2c+1), (g; 2c+8, 2c+9), (g+8; 2c+8, 2c+9)     b: (2c, 2c+1; g), (2c+8, 2c+9; g)
///   d: (g; 2c), (g; 2c+1), (g+8; 2c), (g+8; 2c+1)
__device__ inline void multiply_add(float (&d)[4], Pair a0, Pair a1, Pair a2, Pair a3, Pair b0, Pair b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/// The same for a 16 x 8 matrix a and an 8 x 8 matrix b: a: (g; 2c, 2c+1), (g+8; 2c, 2c+1)     b: (2c, 2c+1; g)
__device__ inline void multiply_add(float (&d)[4], Pair a0, Pair a1, Pair b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(b));
}

/// Transposes an 8 x 8 matrix of 16-bit elements, of which a lane has (g; 2c, 2c+1).
__device__ inline std::uint32_t transposed(std::uint32_t x) {
  std::uint32_t out;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(x));
  return out;
}

/// x is what is there, if it is `wanted`. Without a branch: where paths meet, what is on its way from memory may have to be
/// moved, and then is waited for.
__device__ inline void load_if(bool wanted, std::uint32_t& x, const std::uint16_t* from) {
  asm volatile("{.reg .pred p; setp.ne.u32 p, %1, 0; @p ld.global.u16 %0, [%2];}"
               : "+r"(x)
               : "r"(static_cast<unsigned>(wanted)), "l"(from));
}
__device__ inline void load_if(bool wanted, std::int32_t& x, const std::int32_t* from) {
  asm volatile("{.reg .pred p; setp.ne.u32 p, %1, 0; @p ld.global.s32 %0, [%2];}"
               : "+r"(x)
               : "r"(static_cast<unsigned>(wanted)), "l"(from));
}

/// Where a generic address of shared memory is.
__device__ inline std::uint32_t shared_offset(const void* shared) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
}
__device__ inline char* at_shared(std::uint32_t offset) { return static_cast<char*>(__cvta_shared_to_generic(offset)); }

/// Four 8 x 8 matrices of 16-bit elements in shared memory, transposed: lane 8 i + r has the address of row r of matrix i, 16
/// bytes, and column g of matrix i is the lane's (2c, 2c+1; g) in word i.
__device__ inline void load_transposed(std::uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_offset(row))
               : "memory");
}
/// The same without transposing: of row g of matrix i the lane's (2c, 2c+1) in word i.
__device__ inline void load_matrices(std::uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_offset(row))
               : "memory");
}
/// Transposed, and back.
__device__ inline void store_transposed(void* row, const std::uint32_t (&in)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};"
               :
               : "r"(shared_offset(row)), "r"(in[0]), "r"(in[1]), "r"(in[2]), "r"(in[3])
               : "memory");
}

// Products by four warps together (wgmma), which only SM90 has: of 64 rows, 16 a warp, with a matrix in shared memory. They are
// asynchronous: what goes in and comes out is not to be touched between begin_products() and the wait for them.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool has_group_products = true;
#else
constexpr bool has_group_products = false;
#endif
using SharedMatrix = std::uint64_t;
/// Lines of 128 bytes one after the other, swizzled, in eights from multiples of 1,024 bytes.
__device__ inline SharedMatrix shared_matrix(std::uint32_t address) {
  return (address & 0x3ffffu) >> 4 | 1ull << 16 | 64ull << 32 | 1ull << 62;
}
/// What was written to shared memory is there for products.
__device__ inline void show_to_products() {
  if constexpr (has_group_products) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
/// What is in registers is there for products, which may have been using them.
__device__ inline void begin_products() {
  if constexpr (has_group_products) asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ inline void end_products() {
  if constexpr (has_group_products) asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
/// Until all but the last so many groups of them are done.
template <int pending>
__device__ void wait_for_products() {
  if constexpr (has_group_products) asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
/// d += a b for 64 columns b of 16 elements: lines that begin with these, or, `transposed`, elements of 16 lines.
template <bool transposed>
__device__ void multiply_in_group(float (&d)[2][4][4], const Pair (&a)[4], SharedMatrix b) {
  if constexpr (has_group_products)
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,"
        "%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, {%32,%33,%34,%35}, %36, 1, 1, 1, %37;"
        : "+f"(d[0][0][0]), "+f"(d[0][0][1]), "+f"(d[0][0][2]), "+f"(d[0][0][3]), "+f"(d[0][1][0]), "+f"(d[0][1][1]),
          "+f"(d[0][1][2]), "+f"(d[0][1][3]), "+f"(d[0][2][0]), "+f"(d[0][2][1]), "+f"(d[0][2][2]), "+f"(d[0][2][3]),
          "+f"(d[0][3][0]), "+f"(d[0][3][1]), "+f"(d[0][3][2]), "+f"(d[0][3][3]), "+f"(d[1][0][0]), "+f"(d[1][0][1]),
          "+f"(d[1][0][2]), "+f"(d[1][0][3]), "+f"(d[1][1][0]), "+f"(d[1][1][1]), "+f"(d[1][1][2]), "+f"(d[1][1][3]),
          "+f"(d[1][2][0]), "+f"(d[1][2][1]), "+f"(d[1][2][2]), "+f"(d[1][2][3]), "+f"(d[1][3][0]), "+f"(d[1][3][1]),
          "+f"(d[1][3][2]), "+f"(d[1][3][3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(transposed ? 1 : 0));
}

/// 16 bytes of shared memory, also where the compiler knows that it has them in registers already.
__device__ inline void load_again(std::uint32_t (&out)[4], const void* from) {
  asm volatile("ld.volatile.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_offset(from))
               : "memory");
}

/// When a line leaves the L2 cache: before others, as any other, or after all that are not `last`. The numbers are the upper
/// words of what createpolicy.fractional.L2 gives for all lines; the lower ones are zero.
enum class Eviction : std::uint32_t { first = 0x12f00000, normal = 0x16f00000, last = 0x14f00000 };
__device__ inline std::uint64_t policy_of(Eviction eviction) {
  return static_cast<std::uint64_t>(static_cast<std::uint32_t>(eviction)) << 32;
}
/// An asynchronous copy of 16 bytes into shared memory. For a warp, there is one `eviction`, as for store_vector().
__device__ inline void copy_vector(void* to, const void* from, Eviction eviction) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(shared_offset(to)), "l"(from),
               "l"(policy_of(eviction))
               : "memory");
}
__device__ inline uint4 load_vector(const void* from, Eviction eviction) {
  uint4 out;
  asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v4.u32 {%0,%1,%2,%3}, [%4], %5;"
               : "=r"(out.x), "=r"(out.y), "=r"(out.z), "=r"(out.w)
               : "l"(from), "l"(policy_of(eviction)));
  return out;
}
__device__ inline void store_vector(void* to, uint4 vector, Eviction eviction) {
  asm volatile("st.global.L2::cache_hint.v4.u32 [%0], {%1,%2,%3,%4}, %5;" ::"l"(to), "r"(vector.x), "r"(vector.y),
               "r"(vector.z), "r"(vector.w), "l"(policy_of(eviction))
               : "memory");
}

/// Makes x unknown to the compiler, which then cannot work out ahead of a loop what follows from it and keep that in registers.
__device__ inline void forget(std::uint32_t& x) { asm volatile("" : "+r"(x)); }
template <class T>
__device__ void forget(T*& x) {
  asm volatile("" : "+l"(x));
}

/// Where the block's dynamic shared memory is, plus `offset`: found out once, not before each use.
__device__ inline char* shared_address(void* shared, std::uint32_t offset) {
  auto address = shared_offset(shared) + offset;
  forget(address);
  return at_shared(address);
}

/// One instruction, which a product of converted integers often is not.
__device__ inline std::int64_t multiply_wide(std::int32_t a, std::int32_t b) {
  std::int64_t out;
  asm("mul.wide.s32 %0, %1, %2;" : "=l"(out) : "r"(a), "r"(b));
  return out;
}

}  // namespace gatedelta::cuda
