#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Counts the results in a testlog.json of Meson: "N passed, N failed, N skipped". Exit code 1 if a test failed or none ran."""
import json
import sys

PASSED = {"OK", "EXPECTEDFAIL"}


def main() -> int:
    results = []
    with open(sys.argv[1], encoding="utf-8") as log:
        results = [json.loads(line) for line in log if line.strip()]
    passed = sum(entry["result"] in PASSED for entry in results)
    skipped = [entry for entry in results if entry["result"] == "SKIP"]
    failed = len(results) - passed - len(skipped)
    for entry in skipped:
        reason = (entry.get("stdout", "") + entry.get("stderr", "")).strip().splitlines()
        print(f"skipped: {entry['name']}: {reason[-1] if reason else 'no reason given'}")
    print(f"{passed} passed, {failed} failed, {len(skipped)} skipped")
    return 0 if failed == 0 and passed > 0 else 1


if __name__ == "__main__":
    sys.exit(main())
