#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The documentation says what is there: README's first C++ block is examples/quickstart/quickstart.cpp, every line of every
other block of code is one of a program that is built and tested, every relative link of every Markdown file leads to a file,
and every command of ./run that is named exists."""
import pathlib
import re
import sys

root = pathlib.Path(sys.argv[1])
problems = []


def body(source: str) -> str:
    """A source file without the comment lines it opens with."""
    lines = source.splitlines()
    while lines and lines[0].startswith("//"):
        lines.pop(0)
    return "\n".join(lines).strip()


def documents() -> list[pathlib.Path]:
    built = ("build", "subprojects", "dist", ".")
    return [path for path in sorted(root.rglob("*.md")) if not path.relative_to(root).parts[0].startswith(built)]


def check_example() -> None:
    blocks = re.findall(r"^```cpp\n(.*?)^```$", (root / "README.md").read_text(encoding="utf-8"), re.S | re.M)
    if not blocks:
        problems.append("README.md: there is no ```cpp block")
        return
    shown = blocks[0].strip().splitlines()
    tested = body((root / "examples/quickstart/quickstart.cpp").read_text(encoding="utf-8")).splitlines()
    for number, (left, right) in enumerate(zip(shown, tested), start=1):
        if left != right:
            problems.append(f"README.md: line {number} of the C++ block is not quickstart.cpp's:\n  {left}\n  {right}")
            return
    if len(shown) != len(tested):
        problems.append(f"README.md: the C++ block has {len(shown)} lines, quickstart.cpp's body {len(tested)}")


# The programs that blocks of a language quote.
QUOTED = {
    "cpp": ("examples/**/*.cpp", "tests/interop/*.cpp"),
    "c": ("examples/**/*.c",),
    "cmake": ("examples/**/CMakeLists.txt",),
    "meson": ("examples/**/meson.build",),
}


def lines_in_order(wanted: list[str], lines: list[str]) -> bool:
    rest = iter(lines)
    return all(line in rest for line in wanted)


def check_quotes() -> None:
    """The lines of a block stand in one file in this order; indentation, and lines between them, do not count."""
    for document in documents():
        for language, block in re.findall(r"^```(\w+)\n(.*?)^```$", document.read_text(encoding="utf-8"), re.S | re.M):
            wanted = [line.strip() for line in block.splitlines() if line.strip()]
            files = [path for pattern in QUOTED.get(language, ()) for path in sorted(root.glob(pattern))]
            texts = [[line.strip() for line in path.read_text(encoding="utf-8").splitlines()] for path in files]
            if files and not any(lines_in_order(wanted, text) for text in texts):
                problems.append(f"{document.relative_to(root)}: no program has these lines of {language}:\n{block}")


def check_links() -> None:
    for document in documents():
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
            if not re.match(r"[a-z]+:", target) and not (document.parent / target).exists():
                problems.append(f"{document.relative_to(root)}: there is no {target}")


def check_commands() -> None:
    known = set(re.findall(r"^  (\w+) {2,}\S", (root / "run").read_text(encoding="utf-8"), re.M)) | {"help"}
    for document in documents():
        for command in re.findall(r"\./run (\w+)", document.read_text(encoding="utf-8")):
            if command not in known:
                problems.append(f"{document.relative_to(root)}: ./run has no command {command}")


check_example()
check_quotes()
check_links()
check_commands()
print("\n".join(problems) if problems else f"{len(documents())} documents agree with the sources")
sys.exit(1 if problems else 0)
