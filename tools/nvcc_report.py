#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""nvcc_report.py REPORT NVCC ARGUMENTS...: runs nvcc and keeps what the assembler says of every kernel.

The report of registers and spills goes to the file REPORT; warnings and errors go to stderr as usual.
"""
import subprocess
import sys

report, *command = sys.argv[1:]
result = subprocess.run(command + ["-Xptxas=-v"], stderr=subprocess.PIPE, text=True)
usage = ("ptxas info", "    ")
lines = result.stderr.splitlines()
with open(report, "w") as file:
    file.writelines(line + "\n" for line in lines if line.startswith(usage))
rest = lines if result.returncode else [line for line in lines if not line.startswith(usage)]
if rest:
    print("\n".join(rest), file=sys.stderr)
sys.exit(result.returncode)
