#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Checks that the table of docs/SUPPORT.md is what the backends report, or writes it anew.

support_table.py TOOL             compares
support_table.py TOOL --update    writes (ninja -C build update-support)

TOOL is the command-line tool. Columns of backends that its build does not have (cuda, in one for the processor alone) stay as
they are; a line that is new is then to be written by a build that has them all.
"""
import pathlib
import subprocess
import sys

DOCUMENT = pathlib.Path(__file__).resolve().parents[1] / "docs/SUPPORT.md"


def cells(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def parse(lines):
    """{feature: {backend: answer}}, in the table's order."""
    backends = cells(lines[0])[1:]
    return backends, {row[0]: dict(zip(backends, row[1:])) for row in map(cells, lines[2:])}


def main():
    tool, update = sys.argv[1], "--update" in sys.argv[2:]
    printed = subprocess.run([tool, "info", "--support"], check=True, capture_output=True, text=True).stdout
    asked, found = parse(printed.splitlines())
    text = DOCUMENT.read_text(encoding="utf-8").splitlines()
    begin = next(i for i, line in enumerate(text) if line.startswith("|"))
    end = next(i for i in range(begin, len(text) + 1) if i == len(text) or not text[i].startswith("|"))
    listed, documented = parse(text[begin:end])
    # In the tool's order; a backend that it lacks keeps its place.
    backends = list(listed)
    for name, later in reversed(list(zip(asked, [*asked[1:], None]))):
        if name not in backends:
            backends.insert(backends.index(later) if later else len(backends), name)
    merged = {feature: {**documented.get(feature, {}), **answers} for feature, answers in found.items()}
    gaps = [f"{feature}, {name}" for feature, row in merged.items() for name in backends if name not in row]
    if gaps:
        print("these have to be written by a build with all backends of the table:", *gaps, sep="\n  ")
        return 1
    rows = [f"| {feature} | " + " | ".join(row[name] for name in backends) + " |" for feature, row in merged.items()]
    table = ["| | " + " | ".join(backends) + " |", "|---|" + "---|" * len(backends), *rows]
    if update:
        DOCUMENT.write_text("\n".join([*text[:begin], *table, *text[end:]]) + "\n", encoding="utf-8")
        print(f"{DOCUMENT}: {len(rows)} features, {len(asked)} backends asked")
        return 0
    for old, new in zip(text[begin:end] + [""] * len(table), table):
        if old != new:
            print(f"docs/SUPPORT.md has\n  {old or 'no more lines'}\nbut the backends report\n  {new}\nwrite it with: ninja -C build update-support")
            return 1
    if end - begin > len(table):
        print(f"docs/SUPPORT.md has lines that no backend was asked for:\n  {text[begin + len(table)]}")
        return 1
    print(f"{len(rows)} features as {', '.join(asked)} report them; not asked: {', '.join(set(backends) - set(asked)) or 'none'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
