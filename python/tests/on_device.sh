#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The Python tests on a machine with a CUDA device, PyTorch and no network: on_device.sh WHEEL [FLASHINFER FLA], where the last two are
# checkouts of these projects. Logs and measurements go to the folder $OUT (default: build-python). $STEPS is an expression for the
# names of the steps to run (default: all).
set -uo pipefail

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." || exit
if [ $# -lt 1 ]; then
  sed -n 3,5p "$0" >&2
  exit 2
fi
out=${OUT:-build-python}
site=$(mktemp -d)
failed=0
mkdir -p "$out"
python3 -m pip install --quiet --no-index --no-deps --target "$site" "$1" || exit 1
export PYTHONPATH=$site

# step NAME COMMAND...: its output in a file, the end of it here.
step() {
  local name=$1
  shift
  [[ $name =~ ${STEPS-} ]] || return 0
  echo "== $name"
  "$@" >"$out/$name.log" 2>&1 || failed=1
  tail -n 12 "$out/$name.log" | cut -c 1-300
}

step backends python3 -c 'import gatedelta; print(*gatedelta.backends(), sep="\n")'
step tests python3 -m pytest -s -p no:cacheprovider
step decode python3 examples/python/decode.py --batch 64
step decode-compiled python3 examples/python/decode.py --batch 64 --compile
processes=$(python3 -c 'import torch; print(torch.cuda.device_count())')
for count in $(printf '%s\n' 1 "$processes" | sort -u); do
  for batch in 16 128 512; do
    step "parallel-$count-$batch" python3 -m torch.distributed.run --nproc-per-node "$count" examples/python/tensor_parallel.py \
      --batch "$batch" --json "$out/parallel-$count-$batch.json"
  done
done
if [ $# -ge 3 ]; then
  step flashinfer python3 python/tests/run_peer_tests.py flashinfer "$2" --durations=5
  step fla python3 python/tests/run_peer_tests.py fla "$3" --durations=5
  step fla-forward python3 python/tests/run_peer_tests.py fla-forward "$3" --durations=5
fi
exit "$failed"
