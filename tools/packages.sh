# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
# The Debian and Ubuntu packages of this project, and how to install those that are missing. Sourced by run and .ci/run.
# shellcheck disable=SC2034  # the lists are read there

# Programs, each as package:command; a command that is there counts, wherever it comes from.
build_programs=(g++:g++ ninja-build:ninja pkg-config:pkg-config cmake:cmake python3:python3)
# Header-only or small libraries; subprojects/*.wrap stands in for each of them.
build_libraries=(libeigen3-dev doctest-dev libcli11-dev libfmt-dev nlohmann-json3-dev libbenchmark-dev libdlpack-dev)
# What CI needs on top.
ci_programs=(clang:clang++ clang-format-14:clang-format-14 shellcheck:shellcheck ccache:ccache git:git doxygen:doxygen)
ci_libraries=(libomp-dev libtrilinos-kokkos-dev)

meson_minimum=1.0.0

# The packages of these program lists whose commands are not there.
missing_programs() {
  local entry
  for entry in "$@"; do
    command -v "${entry#*:}" >/dev/null || echo "${entry%%:*}"
  done
}

# Those of these packages that are not installed.
missing_libraries() {
  local installed package
  # dpkg-query fails if it knows nothing of a package; what it prints is complete all the same.
  installed=$(dpkg-query -W -f='${Package} ${db:Status-Status}\n' "$@" 2>/dev/null || true)
  for package in "$@"; do
    grep -qxF -- "$package installed" <<<"$installed" || echo "$package"
  done
}

# The version of a Meson, or 0 if it does not run.
meson_version() { "$1" --version 2>/dev/null || echo 0; }

is_at_least() { [ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1)" = "$2" ]; }

# Runs as root: directly, or through sudo.
as_root() {
  if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo "$@"; fi
}

can_be_root() { [ "$(id -u)" -eq 0 ] || command -v sudo >/dev/null; }

apt_install() {
  as_root apt-get update -q &&
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$@"
}
