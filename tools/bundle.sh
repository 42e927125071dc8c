#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# bundle.sh FOLDER PROGRAM...: copies programs, and into FOLDER/lib the shared libraries that they need except for those of the C
# and C++ run time and of the GPU driver. There: LD_LIBRARY_PATH=FOLDER/lib FOLDER/PROGRAM
set -euo pipefail

if [ $# -lt 2 ]; then
  echo "usage: $0 FOLDER PROGRAM..." >&2
  exit 2
fi
folder=$1
shift
mkdir -p "$folder/lib"
for program in "$@"; do
  cp -- "$program" "$folder/"
  ldd -- "$program" | awk '$2 == "=>" && $1 !~ /^(libc|libm|libdl|librt|libpthread|libstdc\+\+|libgcc_s|libcuda)\.so/ { print $3 }' |
    xargs -r cp -L -t "$folder/lib" --
done
