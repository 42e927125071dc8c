#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Checks that the instruction set variants of the cpu backend share no symbols.

check_symbols.py SANITIZE NAME=LIBRARY...

An inline function or template that two variants both define would be merged by the linker, which may keep the copy that uses
instructions the CPU does not have. So each variant may define one external symbol, its table, and nothing weak.
"""
import subprocess
import sys


def main():
    sanitize, *variants = sys.argv[1:]
    if sanitize != "none":
        print(f"skipped: -Db_sanitize={sanitize} adds symbols of its own")
        return 77
    if len(variants) < 1:
        print("no variant was given")
        return 1
    failed = False
    for variant in variants:
        name, library = variant.split("=", 1)
        output = subprocess.run(["nm", "--defined-only", "--extern-only", "--demangle", library], check=True,
                                capture_output=True, text=True).stdout
        symbols = [line.split(" ", 2)[1:] for line in output.splitlines() if line.count(" ") >= 2]
        expected = f"gatedelta::cpu::kernels_{name}"
        wrong = [f"{kind} {symbol}" for kind, symbol in symbols if symbol != expected]
        if wrong or len(symbols) != 1:
            failed = True
            print(f"{name}: expected one external symbol, {expected}; found also: {', '.join(wrong) or 'not even that'}")
        else:
            print(f"{name}: {expected} alone")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
