#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""same_output.py PROGRAM PROGRAM: both succeed and print the same, which is something."""
import subprocess
import sys

first, second = (subprocess.run([program], check=True, capture_output=True, text=True).stdout for program in sys.argv[1:])
print(first, second, sep="")
sys.exit(0 if first == second and first.strip() else 1)
