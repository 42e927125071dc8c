// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_pipeline_primitives.h>

#include <type_traits>

#include "backends/cuda/elements.cuh"

// Several elements of a tensor at a time, and copies of states ahead of their use.
namespace gatedelta::cuda {

/// As the sum of how many bfloat16 numbers an element of a state, a key or a query is kept.
template <class Element>
constexpr int bfloat_parts_of = sizeof(Element) == 4                     ? 3
                                : std::is_same_v<Element, __nv_bfloat16> ? 1
                                                                         : 2;

/// Elements of a 16-byte vector.
template <class Element>
constexpr int lanes_of = 16 / static_cast<int>(sizeof(Element));

/// The lower (0) or the upper (1) of two bfloat16 numbers.
__device__ inline float widen_one(std::uint32_t two, int e) { return __uint_as_float(e == 0 ? two << 16 : two & 0xffff0000u); }
__device__ inline void widen(std::uint32_t two, float& low, float& high, __nv_bfloat16) {
  low = widen_one(two, 0);
  high = widen_one(two, 1);
}
__device__ inline void widen(std::uint32_t two, float& low, float& high, __half) {
  const float2 values = __half22float2(*reinterpret_cast<const __half2*>(&two));
  low = values.x;
  high = values.y;
}
__device__ inline void widen(float2 two, float& low, float& high, float) { low = two.x, high = two.y; }
__device__ inline std::uint32_t narrow(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const std::uint32_t*>(&two);
}
__device__ inline std::uint32_t narrow(float low, float high, __half) {
  const __half2 two = __floats2half2_rn(low, high);
  return *reinterpret_cast<const std::uint32_t*>(&two);
}

/// The bfloat16 that x starts with, leaving the rest in x: three times for all of a float32.
__device__ inline std::uint32_t take_upper(float& x) {
  const std::uint32_t upper = __float_as_uint(x) & 0xffff0000u;
  x -= __uint_as_float(upper);
  return upper;
}
/// Of two numbers at once.
__device__ inline Pair take_upper(float& low, float& high) {
  const std::uint32_t first = take_upper(low);
  return __byte_perm(first, take_upper(high), 0x7632);
}

/// x and y as sums of bfloat16 numbers, part(i) is where pair i goes: three are all of a float32.
template <int parts, class Part>
__device__ __forceinline__ void split_in(float x, float y, Part part) {
#pragma unroll
  for (int i = 0; i < parts - 1; ++i) part(i) = take_upper(x, y);
  part(parts - 1) = narrow(x, y, __nv_bfloat16{});
}

/// Two neighbours of 16 bits as sums of bfloat16 numbers, out(part) is where a part goes.
template <class Element, class Out>
__device__ __forceinline__ void split_pair(std::uint32_t word, Out out) {
  if constexpr (bfloat_parts_of<Element> == 1) {
    out(0) = word;
  } else {
    float low, high;
    widen(word, low, high, Element{});
#pragma unroll
    for (int part = 0; part < bfloat_parts_of<Element>; ++part) out(part) = take_upper(low, high);
  }
}

/// Of a state, when it is loaded and when it is stored. See FastParams::keeps_states.
struct Evictions {
  Eviction load, store;

  template <class P>
  __device__ explicit Evictions(const P& p)
      : load(p.keeps_states ? Eviction::last : Eviction::normal), store(p.keeps_states ? Eviction::normal : Eviction::first) {}
};

template <class Element>
__device__ void unpack(const std::uint32_t (&words)[4], float (&out)[lanes_of<Element>]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(Element) == 4)
      out[i] = __uint_as_float(words[i]);
    else
      widen(words[i], out[2 * i], out[2 * i + 1], Element{});
  }
}

/// From shared memory, 16 bytes at a time.
template <int count>
__device__ __forceinline__ void load_vectors(float (&out)[count], const float* from) {
  if constexpr (count % 4 == 0) {
#pragma unroll
    for (int i = 0; i < count; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(from + i);
      out[i] = four.x, out[i + 1] = four.y, out[i + 2] = four.z, out[i + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < count; ++i) out[i] = from[i];
  }
}

/// N neighbouring elements (4 or a multiple of 8) of a tensor as they lie in memory. With `vector` they are contiguous, and
/// aligned for vectors of 4 elements, or 8 where N is more.
template <int N>
struct RawRun {
  std::uint32_t words[N];

  template <class Any>
  __device__ void fetch(const Any& tensor, DType dtype, std::int64_t offset, std::int64_t stride, bool vector) {
    if (!vector) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        RawElement element;
        element.fetch(tensor, dtype, offset + i * stride);
        words[i] = element.bits();
      }
    } else if (dtype == DType::f32) {
      fetch_words<N>(static_cast<const float*>(tensor.data) + offset);
    } else {
      fetch_words<N / 2>(static_cast<const std::uint16_t*>(tensor.data) + offset);
    }
  }

  __device__ void widen_to(float (&out)[N], DType dtype, bool vector) const {
    if (!vector || dtype == DType::f32) {
#pragma unroll
      for (int i = 0; i < N; ++i) out[i] = RawElement::value_of(words[i], dtype);
    } else if (dtype == DType::f16) {
#pragma unroll
      for (int i = 0; i < N / 2; ++i) widen(words[i], out[2 * i], out[2 * i + 1], __half{});
    } else {
#pragma unroll
      for (int i = 0; i < N / 2; ++i) widen(words[i], out[2 * i], out[2 * i + 1], __nv_bfloat16{});
    }
  }

 private:
  template <int count>
  __device__ void fetch_words(const void* from) {
    if constexpr (count == 2) {
      const uint2 vector = *static_cast<const uint2*>(from);
      words[0] = vector.x, words[1] = vector.y;
    } else {
#pragma unroll
      for (int i = 0; i < count / 4; ++i) {
        const uint4 vector = static_cast<const uint4*>(from)[i];
        words[4 * i] = vector.x, words[4 * i + 1] = vector.y, words[4 * i + 2] = vector.z, words[4 * i + 3] = vector.w;
      }
    }
  }
};

/// Stages of a ring in shared memory that vectors of global memory are copied into ahead of their use, without registers that
/// wait for them. Each lane has its own vectors and reads back what it copied itself, so no barrier is needed.
template <int vectors, int stages>
class Ring {
 public:
  static constexpr std::size_t bytes = std::size_t{16} * stages * vectors * 32;

  /// In the shared memory of a warp.
  __device__ Ring(void* shared, unsigned lane) : memory_(static_cast<uint4*>(shared) + lane) {}

  /// Starts the copy of one stage: from(i) is where vector i is. Every call counts for wait(), also one without vectors.
  template <class From>
  __device__ void fetch(unsigned stage, bool any, Eviction eviction, From from) {
    if (any)
#pragma unroll
      for (int i = 0; i < vectors; ++i) copy_vector(at(stage, i), from(i), eviction);
    __pipeline_commit();
  }
  /// Until the oldest of the last `stages` copies is there.
  __device__ static void wait() { __pipeline_wait_prior(stages - 1); }
  __device__ void read(unsigned stage, std::uint32_t (&out)[vectors][4]) const {
#pragma unroll
    for (int i = 0; i < vectors; ++i) {
      const uint4 vector = *at(stage, i);
      out[i][0] = vector.x, out[i][1] = vector.y, out[i][2] = vector.z, out[i][3] = vector.w;
    }
  }
  /// Of vector i alone, each time from memory: a slice may be larger than the registers.
  __device__ void read_again(unsigned stage, int i, std::uint32_t (&out)[4]) const { load_again(out, at(stage, i)); }
  /// What is read where nothing was copied.
  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < static_cast<int>(stages) * vectors; ++i) memory_[32 * i] = uint4{};
  }

 private:
  __device__ uint4* at(unsigned stage, int i) const { return memory_ + (stage * vectors + i) * 32; }

  uint4* const memory_;
};

/// N (2, 4 or 8) elements of a state as they lie in memory.
template <class Element, int N>
struct Packed {
  static constexpr int count = N * static_cast<int>(sizeof(Element)) / 4;
  std::uint32_t words[count];

  __device__ explicit Packed(const float (&in)[N]) {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      if constexpr (sizeof(Element) == 4)
        words[i] = __float_as_uint(in[i]);
      else
        words[i] = narrow(in[2 * i], in[2 * i + 1], Element{});
    }
  }
  /// To memory that is not read again soon.
  __device__ void store(void* to) const {
    if constexpr (count == 1) {
      __stcs(static_cast<std::uint32_t*>(to), words[0]);
    } else if constexpr (count == 2) {
      __stcs(static_cast<uint2*>(to), make_uint2(words[0], words[1]));
    } else {
      static_assert(count % 4 == 0);
#pragma unroll
      for (int i = 0; i < count / 4; ++i) __stcs(static_cast<uint4*>(to) + i, vector(i));
    }
  }
  __device__ uint4 vector(int i = 0) const {
    return make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
  }
};

template <class Element, int N>
__device__ void store_as(void* data, std::int64_t offset, const float (&in)[N]) {
  Packed<Element, N>(in).store(static_cast<Element*>(data) + offset);
}
template <int N, class Any>
__device__ void store_run(const Any& tensor, std::int64_t offset, const float (&in)[N]) {
  if (tensor.dtype == DType::bf16)
    store_as<__nv_bfloat16>(tensor.data, offset, in);
  else if (tensor.dtype == DType::f16)
    store_as<__half>(tensor.data, offset, in);
  else
    store_as<float>(tensor.data, offset, in);
}

}  // namespace gatedelta::cuda
