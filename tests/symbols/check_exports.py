#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Checks that the shared library exports what exported.txt lists, no more and no less.

check_exports.py SANITIZE LIBRARY            compares
check_exports.py --update LIBRARY            writes the list anew (ninja -C build update-symbols)

A symbol that is gone breaks programs that were built with an earlier version; a new one is a promise. Both are to be seen in a
change's diff.
"""
import pathlib
import subprocess
import sys

LIST = pathlib.Path(__file__).with_name("exported.txt")
HEAD = "# SPDX-License-Identifier: Apache-2.0\n# The symbols of the shared library; written by: ninja -C build update-symbols\n"


def run(*command, **options):
    return subprocess.run(command, check=True, capture_output=True, text=True, **options).stdout


def exported(library):
    names = {line.split()[-1] for line in run("nm", "-D", "--defined-only", "--extern-only", library).splitlines()}
    # Of versions given by a script that names none there is no suffix; this one is the linker's.
    return sorted(names - {"_init", "_fini", "_edata", "_end", "__bss_start"})


def readable(names):
    return dict(zip(names, run("c++filt", input="\n".join(names)).splitlines()))


def main():
    mode, library = sys.argv[1:]
    found = exported(library)
    if mode == "--update":
        texts = readable(found)
        lines = [name if texts[name] == name else f"{name}  {texts[name]}" for name in found]
        LIST.write_text(HEAD + "\n".join(lines) + "\n", encoding="utf-8")
        print(f"{LIST}: {len(found)} symbols")
        return 0
    if mode != "none":
        print(f"skipped: -Db_sanitize={mode} adds symbols of its own")
        return 77
    lines = LIST.read_text(encoding="utf-8").splitlines()
    listed = {line.split()[0] for line in lines if line and not line.startswith("#")}
    gone, new = sorted(listed - set(found)), sorted(set(found) - listed)
    for title, names in (("no longer exported", gone), ("exported, but not listed", new)):
        for text in readable(names).values() if names else ():
            print(f"{title}: {text}")
    if gone or new:
        print("If that is meant: ninja -C build update-symbols (in a build with -Ddefault_library=both)")
        return 1
    print(f"{len(found)} symbols, as listed")
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
