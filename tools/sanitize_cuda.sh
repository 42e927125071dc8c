#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# sanitize_cuda.sh CHECKKERNEL [CASES]: the cuda backend's tests under the four tools of compute-sanitizer, on a short list of cases.
set -euo pipefail

checkkernel=$1 cases=${2:-6}
sanitizer=$(command -v compute-sanitizer || command -v /usr/local/cuda/bin/compute-sanitizer) || {
  echo "there is no compute-sanitizer"
  exit 77
}
if ! "$checkkernel" --backend cuda --cases 1 --test step >/dev/null; then
  echo "the cuda backend does not run here"
  exit 77
fi
for tool in memcheck racecheck initcheck synccheck; do
  echo "== $tool"
  "$sanitizer" --tool "$tool" --error-exitcode 9 "$checkkernel" --backend cuda --cases "$cases"
done
