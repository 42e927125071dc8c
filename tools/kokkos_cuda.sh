#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# kokkos_cuda.sh KOKKOS_SOURCES FOLDER [ARCHITECTURE]: builds Kokkos with its CUDA space for one GPU architecture (HOPPER90) and the
# library, its tests and its tool with that, and puts those that need a GPU into FOLDER/bundle. On the machine with the GPU:
#
#     export LD_LIBRARY_PATH=$PWD/FOLDER/bundle/lib
#     FOLDER/bundle/checkkernel --backend kokkos --cases 200
#     CUDA_TEST_BACKEND=kokkos FOLDER/bundle/cuda_test
#     FOLDER/bundle/kokkos_test
#     FOLDER/bundle/gatedelta bench --backend cuda,kokkos
#
# Needs nvcc 12 or newer in PATH; nvcc 13 needs Kokkos 4.7.
set -euo pipefail

if [ $# -lt 2 ]; then
  echo "usage: $0 KOKKOS_SOURCES FOLDER [ARCHITECTURE]" >&2
  exit 2
fi
sources=$(realpath -- "$1")
architecture=${3:-HOPPER90}
mkdir -p -- "$2"
folder=$(realpath -- "$2")
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

# CUDA as CMake's own language, so that no compiler wrapper is needed; CMake adds no flag for the standard that it takes for
# nvcc's default.
cmake -G Ninja -S "$sources" -B "$folder/kokkos-build" -DCMAKE_INSTALL_PREFIX="$folder/kokkos" -DCMAKE_BUILD_TYPE=Release \
  -DKokkos_ENABLE_CUDA=ON -DKokkos_ENABLE_SERIAL=ON -DKokkos_ENABLE_COMPILE_AS_CMAKE_LANGUAGE=ON "-DKokkos_ARCH_$architecture=ON" \
  -DCMAKE_CXX_STANDARD=20 -DCMAKE_CUDA_STANDARD=20 -DCMAKE_CUDA_FLAGS=-std=c++20 -DCMAKE_POSITION_INDEPENDENT_CODE=ON
ninja -C "$folder/kokkos-build" install

if [ ! -f "$folder/build/build.ninja" ]; then
  meson setup "$folder/build" -Dkokkos=enabled -Dcuda=enabled -Dtools=enabled -Dtests=enabled -Dexamples=disabled \
    --cmake-prefix-path="$folder/kokkos"
fi
programs=(gatedelta tests/checkkernel/checkkernel tests/unit/cuda_test tests/interop/kokkos_test)
ninja -C "$folder/build" "${programs[@]}"
tools/bundle.sh "$folder/bundle" "${programs[@]/#/$folder/build/}"
