#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""check_report.py REPORT...: no fast kernel may spill registers or have arrays in local memory.

Reads what tools/nvcc_report.py wrote when the kernels were compiled. Every target must have every kernel. For sm_100a, which nobody has
run or tuned yet, spills are printed and no failure.
"""
import collections
import re
import sys

ENTRY = re.compile(
    r"Compiling entry function '(\S+)' for '(\w+)'\n.*Function properties for.*\n"
    r"\s*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n.*Used (\d+) registers"
)
FAST = re.compile(r"(decode|decode_value_last|verify|serving|chunks|replay|recurrent)_kernel")

kernels = collections.defaultdict(set)
failures = []
for path in sys.argv[1:]:
    with open(path) as file:
        report = file.read()
    entries = ENTRY.findall(report)
    if len(entries) != report.count("Compiling entry function"):
        failures.append(f"{path}: not every kernel's report was understood")
    for name, target, stack, stores, loads, registers in entries:
        kernels[target].add(name)
        if FAST.search(name) and (int(stack) or int(stores) or int(loads)):
            text = f"{name} for {target}: {stack} bytes of stack, {stores} + {loads} bytes of spills, {registers} registers"
            if target == "sm_100a":
                print("not tuned:", text)
            else:
                failures.append(text)

targets = sorted(kernels)
for target in ("sm_90a", "sm_100a"):
    if target not in kernels:
        failures.append(f"no kernel was compiled for {target}")
if kernels["sm_90a"] != kernels["sm_100a"]:
    failures.append("sm_90a and sm_100a have different kernels")
fast = {target: sum(bool(FAST.search(name)) for name in names) for target, names in kernels.items()}
if not any(fast.values()):
    failures.append("there is no fast kernel in the reports")
for target in targets:
    print(f"{target}: {len(kernels[target])} kernels, {fast[target]} of them fast")
for failure in failures:
    print("FAILED", failure)
sys.exit(bool(failures))
