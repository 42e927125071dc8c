# SPDX-License-Identifier: Apache-2.0
"""Checks bench/compare on made-up rows, and docs/PERFORMANCE.md against the committed results."""
import contextlib
import importlib.machinery
import importlib.util
import io
import json
import os
import pathlib
import sys
import tempfile
import unittest

ROOT = pathlib.Path(sys.argv.pop(1)).resolve()
sys.dont_write_bytecode = True  # nothing is left beside the script


def load_script():
    loader = importlib.machinery.SourceFileLoader("compare", str(ROOT / "bench/compare"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("compare", loader))
    loader.exec_module(module)
    return module


compare = load_script()


def row(**fields):
    out = {"backend": "cuda", "device": "cuda", "op": "verify", "mode": "update", "batch": 1, "tokens": 4, "q_heads": 16, "v_heads": 32,
           "key_dim": 128, "value_dim": 128, "dtype": "bf16", "state_dtype": "bf16", "layout": "vk", "cache": "cold",
           "median_us": 2.0, "limit_us": 1.9, "hardware": "NVIDIA Test, driver 1", "command": "gatedelta bench", "commit": "abc",
           "date": "2026-01-02T00:00:00Z", **fields}
    return out


def peer(name, **fields):
    return row(**{"backend": name, "peer": name, "peer_version": "1.0", "description": "says what differs", "limit_us": None,
                  "hardware": "NVIDIA Test", "command": "time_peers.py", **fields})


SYNTHETIC = [
    [row(batch=1, limit_us=1.8, median_us=2.4), row(batch=4, limit_us=3.0, median_us=4.0, noisy=True),
     row(batch=16, limit_us=10.0, median_us=12.5), row(batch=64, limit_us=30.0, median_us=33.0, op="decode", tokens=1),
     row(batch=1, limit_us=2.0, median_us=2.5, date="2026-02-02T00:00:00Z")],  # newer than the first row
    [peer("alpha", batch=1, median_us=5.0), peer("alpha", batch=16, median_us=None, error="out of shared memory"),
     peer("beta", batch=1, median_us=4.0), peer("beta", batch=4, median_us=3.0), peer("beta", batch=256, median_us=150.0)],
]


class Case(unittest.TestCase):
    def setUp(self):
        self.scratch = tempfile.TemporaryDirectory()
        self.addCleanup(self.scratch.cleanup)
        self.folder = pathlib.Path(self.scratch.name)

    def write(self, *files):
        results = self.folder / "results"
        results.mkdir()
        for number, rows in enumerate(files):
            (results / f"{number}.json").write_text(json.dumps(rows), encoding="utf-8")
        return results

    def run_compare(self, *arguments):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            code = compare.main([str(argument) for argument in arguments])
        return code, out.getvalue()

    def refused(self, *arguments):
        with self.assertRaises(SystemExit) as caught, contextlib.redirect_stderr(io.StringIO()) as err:
            compare.main([str(argument) for argument in arguments])
        return f"{caught.exception.code}{err.getvalue()}"


class Tables(Case):
    def lines(self, *arguments):
        out = self.run_compare(*arguments)[1].splitlines()
        return [[field.strip() for field in line.strip("|").split("|")] for line in out if line.startswith("|")], out

    def test_markdown(self):
        cells, out = self.lines("--markdown", self.write(*SYNTHETIC))
        head = ["T", "B", "limit", "gatedelta cuda", "alpha", "beta", "best peer / us"]
        start = cells.index(head)
        self.assertEqual(cells[start + 2:], [
            ["4", "1", "2.00", "2.50 (0.80)", "5.00 (0.40)", "4.00 (0.50)", "1.60"],  # the newest row and its limit
            ["4", "4", "3.00", "4.00 (0.75!)", "–", "3.00 (1.00)", "0.75"],
            ["4", "16", "10.00", "12.50 (0.80)", "failed [1]", "–", "–"],
            ["4", "256", "–", "–", "–", "150.0", "–"],  # no limit, so no ratio
        ])
        self.assertIn("[1] alpha: out of shared memory  ", out)
        self.assertIn("### NVIDIA Test", out)
        self.assertIn("- `gatedelta bench` (abc, 2026-01-02)", out)
        self.assertIn("- alpha 1.0: says what differs", out)
        self.assertLess(next(i for i, line in enumerate(out) if line.startswith("**decode")),
                        next(i for i, line in enumerate(out) if line.startswith("**verify")))

    def test_traffic_is_a_column_where_it_is_known(self):
        rows = [row(batch=1, traffic_us=2.0), row(batch=4), row(batch=4, traffic_us=3.8, slots="ordered")]
        cells = self.lines("--markdown", self.write(rows))[0]
        start = cells.index(["T", "B", "limit", "traffic", "gatedelta cuda", "gatedelta cuda, slots in order"])
        self.assertEqual(cells[start + 2:], [["4", "1", "1.90", "2.00 (0.95)", "2.00 (0.95)", "–"],
                                             ["4", "4", "1.90", "–", "2.00 (0.95)", "2.00 (0.95)"]])

    def test_tables_are_split_by_what_is_not_comparable(self):
        rows = [row(), row(mode="snapshots"), row(layout="kv"), row(q_heads=4, v_heads=8), row(hardware="Other")]
        self.assertEqual(self.run_compare("--markdown", self.write(rows))[1].count("(µs)"), 5)

    def test_windows_of_different_sizes_are_different_rows(self):
        self.write([row(mode="replay", window=window, accepted=4, median_us=2.0 + window) for window in (16, 32)])
        text = compare.text(compare.tables(compare.load([self.folder / "results"]))[0])
        self.assertIn("window", text)
        self.assertIn("18.0", text)
        self.assertIn("34.0", text)

    def test_text_has_the_same_numbers(self):
        out = self.run_compare(self.write(*SYNTHETIC))[1]
        line = next(line for line in out.splitlines() if "1.60" in line)
        self.assertEqual(line.split(), ["4", "1", "2.00", "2.50", "(0.80)", "5.00", "(0.40)", "4.00", "(0.50)", "1.60"])

    def test_committed_results(self):
        folder = ROOT / "bench/results/cpu"
        expected = [r for file in sorted(folder.glob("*.json")) for r in json.loads(file.read_text(encoding="utf-8"))]
        self.assertGreater(len(expected), 0)
        out = self.run_compare("--markdown", folder)[1]
        for r in expected:
            self.assertIn(f"{compare.microseconds(r['median_us'])} ({r['ratio']:.2f}{'!' if r['noisy'] else ''})", out)

    def test_bad_input(self):
        self.assertIn("no results were named", self.refused())
        self.assertIn("there is no", self.refused(self.folder / "none.json"))
        broken = self.folder / "broken.json"
        for content, message in (("{", "broken.json"), ("{}", "expected an array"), ('[{"op": "decode"}]', "row 0 has no backend")):
            broken.write_text(content, encoding="utf-8")
            self.assertIn(message, self.refused(broken))
        broken.write_text("[]", encoding="utf-8")
        self.assertIn("no rows", self.refused(broken))


class Documents(Case):
    def test_performance_is_up_to_date(self):
        os.chdir(ROOT)
        code, out = self.run_compare("--check", "docs/PERFORMANCE.md")
        self.assertEqual((code, out), (0, ""))

    def test_update_and_check(self):
        results = self.write(SYNTHETIC[0])
        document = self.folder / "numbers.md"
        document.write_text("# Text\nno marker\n", encoding="utf-8")
        self.assertEqual(self.run_compare("--check", document)[0], 1)
        self.assertIn("there is no block", self.refused("--update", document))
        document.write_text(f"# Text\n<!-- bench/compare {results} -->\nold\n<!-- end -->\ntail\n", encoding="utf-8")
        self.assertEqual(self.run_compare("--check", document)[0], 1)
        self.assertEqual(self.run_compare("--update", document)[0], 0)
        self.assertEqual(self.run_compare("--check", document), (0, ""))
        content = document.read_text(encoding="utf-8")
        self.assertTrue(content.startswith("# Text\n<!--") and content.endswith("<!-- end -->\ntail\n"))
        document.write_text(content.replace("2.50", "2.49"), encoding="utf-8")
        self.assertEqual(self.run_compare("--check", document)[0], 1)


class Plots(Case):
    def test_plots(self):
        try:
            import matplotlib  # noqa: F401
        except ImportError as error:
            self.skipTest(f"no plots are drawn: {error}")
        results, plots, document = self.write(*SYNTHETIC), self.folder / "plots", self.folder / "numbers.md"
        document.write_text(f"<!-- bench/compare --plots {plots} {results} -->\n<!-- end -->\n", encoding="utf-8")
        self.run_compare("--update", document)
        name = "nvidia-test-verify-update-16-32-128x128-vk.svg"  # decode has one batch: no plot
        self.assertEqual([file.name for file in plots.iterdir()], [name])
        self.assertIn(f"](plots/{name})", document.read_text(encoding="utf-8"))
        picture = (plots / name).read_text(encoding="utf-8")
        for word in ("gatedelta cuda", "alpha", "beta", "T = 4", "time / limit", "batch"):
            self.assertIn(word, picture)
        self.assertEqual(self.run_compare("--check", document), (0, ""))
        first = picture
        self.run_compare("--update", document)
        self.assertEqual((plots / name).read_text(encoding="utf-8"), first, "the same results give the same file")
        rows = json.loads((results / "1.json").read_text(encoding="utf-8"))
        rows[0]["median_us"] = 6.0
        (results / "1.json").write_text(json.dumps(rows), encoding="utf-8")
        self.assertIn("other numbers", self.run_compare("--check", document)[1])
        (plots / name).unlink()
        self.assertIn("there is no", self.run_compare("--check", document)[1])


if __name__ == "__main__":
    unittest.main(verbosity=2)
