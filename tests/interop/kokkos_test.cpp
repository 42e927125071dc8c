// SPDX-License-Identifier: Apache-2.0
#define DOCTEST_CONFIG_IMPLEMENT
#include "gatedelta/interop/kokkos.hpp"

#include <cstdio>

#include "same.hpp"

using namespace gatedelta;
using interop::from_kokkos;
using interop::KokkosView;

namespace {

using Host = Kokkos::HostSpace;

}  // namespace

TEST_CASE("views of every layout") {
  const Kokkos::View<float***, Kokkos::LayoutRight, Host> right("right", 2, 3, 4);
  check_view(from_kokkos(right), right.data(), DType::f32, {2, 3, 4}, {12, 4, 1});
  const Kokkos::View<float** [4], Kokkos::LayoutLeft, Host> left("left", 2, 3);
  check_view(from_kokkos(left), left.data(), DType::f32, {2, 3, 4}, {1, 2, 6});
  const Kokkos::View<const float***, Kokkos::LayoutRight, Host> constant = right;
  check_view(from_kokkos(constant), right.data(), DType::f32, {2, 3, 4}, {12, 4, 1});
  const Kokkos::View<std::int64_t*, Host> slots("slots", 5);
  check_view(from_kokkos(slots), slots.data(), DType::i64, {5}, {1});
  const auto part = Kokkos::subview(right, Kokkos::ALL, 1, Kokkos::make_pair(1, 3));
  check_view(from_kokkos(part), &right(0, 1, 1), DType::f32, {2, 2}, {12, 1});
  const Kokkos::View<float**, Kokkos::LayoutStride, Host> strided(right.data(), Kokkos::LayoutStride(2, 1, 3, 8));
  check_view(from_kokkos(strided), right.data(), DType::f32, {2, 3}, {1, 8});
  bfloat16 memory[6];
  const Kokkos::View<bfloat16**, Kokkos::LayoutLeft, Host, Kokkos::MemoryUnmanaged> foreign(memory, 2, 3);
  check_view(from_kokkos(foreign), memory, DType::bf16, {2, 3}, {1, 2});
}

TEST_CASE("other elements and ranks do not compile") {
  CHECK(KokkosView<Kokkos::View<float*****, Host>>);
  CHECK_FALSE(KokkosView<Kokkos::View<float******, Host>>);
  CHECK_FALSE(KokkosView<Kokkos::View<float, Host>>);
  CHECK_FALSE(KokkosView<Kokkos::View<double**, Host>>);
}

#ifdef KOKKOS_ENABLE_CUDA
TEST_CASE("spaces of CUDA") {
  const Kokkos::View<float*, Kokkos::CudaSpace> device("device", 4);
  const Device cuda = {DeviceType::cuda, Kokkos::Cuda().cuda_device()};
  check_view(from_kokkos(device), device.data(), DType::f32, {4}, {1}, cuda);
  const Kokkos::View<float*, Kokkos::CudaUVMSpace> managed("managed", 4);
  check_view(from_kokkos(managed), managed.data(), DType::f32, {4}, {1}, cuda);
  const Kokkos::View<float*, Kokkos::CudaHostPinnedSpace> pinned("pinned", 4);
  check_view(from_kokkos(pinned), pinned.data(), DType::f32, {4}, {1});
}
#endif

TEST_CASE("a call on Kokkos's views") {
  const Kokkos::View<float****, Kokkos::LayoutLeft, Host> k("k", 1, 1, 2, 2), o("o", 1, 1, 2, 2);
  const Kokkos::View<float****, Kokkos::LayoutRight, Host> v("v", 1, 1, 2, 2);
  const Kokkos::View<float***, Host> b("b", 1, 1, 2);
  for (int head = 0; head < 2; ++head) {
    k(0, 0, head, head) = 1;
    for (int i = 0; i < 2; ++i) v(0, 0, head, i) = static_cast<float>(2 + 4 * head + 2 * i);
  }
  check_step(from_kokkos(k), from_kokkos(k), from_kokkos(v), from_kokkos(o), from_kokkos(b));
  for (int head = 0; head < 2; ++head)
    for (int i = 0; i < 2; ++i) CHECK(o(0, 0, head, i) == doctest::Approx(1 + 2 * head + i).epsilon(1e-5));
}

int main(int argc, char** argv) {
#ifdef KOKKOS_ENABLE_CUDA
  if (int count = 0; cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
    std::puts("there is no CUDA device");
    return 77;
  }
#endif
  const Kokkos::ScopeGuard guard(argc, argv);
  return doctest::Context(argc, argv).run();
}
