#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# check_many.sh CHECKKERNEL BACKEND [CASES [SEED]]: a long list of differential cases (20,000 if not given), all families of calls
# alike, in as many processes as there are processors. Prints what failed, with the commands that repeat it, and the sum.
set -euo pipefail

if [ $# -lt 2 ]; then
  sed -n 's/^# check_many/usage: check_many/p' "$0" >&2
  exit 2
fi
export CHECKKERNEL=$1 BACKEND=$2 PART=100 LOGS
cases=${3:-20000} seed=${4:-1}
if ! "$CHECKKERNEL" --backend "$BACKEND" --cases 1 --test step >/dev/null; then
  echo "the $BACKEND backend does not run here"
  exit 77
fi
mapfile -t families < <("$CHECKKERNEL" --list --cases 1 2>/dev/null | sed -n 's#^\([a-z]*\)/0.*#\1#p')
LOGS=$(mktemp -d)
trap 'rm -rf "$LOGS"' EXIT

# Each part has a seed of its own, so that all cases differ.
parts=$(((cases + PART * ${#families[@]} - 1) / (PART * ${#families[@]})))
# shellcheck disable=SC2016  # the inner shell expands these
for ((part = 0; part < parts; ++part)); do
  for family in "${families[@]}"; do echo "$family $((seed + part))"; done
done | xargs -P "$(nproc)" -L 1 bash -c '
  "$CHECKKERNEL" --backend "$BACKEND" --test "$0" --cases "$PART" --seed "$1" >"$LOGS/$0-$1" 2>&1 || touch "$LOGS/$0-$1.failed"'

for failed in "$LOGS"/*.failed; do
  [ -e "$failed" ] && cat "${failed%.failed}"
done
count() { cat "$LOGS"/* | sed -n "s/^checkkernel: .*[ :]\([0-9]\+\) $1.*/\1/p" | awk '{ n += $1 } END { print n + 0 }'; }
echo "$BACKEND: $(count passed) passed, $(count failed) failed, $(count skipped) skipped"
! ls "$LOGS"/*.failed >/dev/null 2>&1
