#!/usr/bin/env python3
# cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
"""What bench/*.py make of results, and how they take a bad command line. Needs Python alone; charts, matplotlib too."""

import contextlib
import io
import json
import math
import os
import pathlib
import signal
import sys
import tempfile
import time
import types
import unittest
from unittest import mock

BENCH = pathlib.Path(__file__).resolve().parents[2] / "bench"
sys.path.insert(0, str(BENCH))
sys.dont_write_bytecode = True

import peers
import readme_table
import results

SHAPE = "65536x1024x128"


def row(name, us, **more):
    return {"name": name + "/iterations:1/manual_time", "real_time": us, "time_unit": "us", "us": us, **more}


def skipped(name):
    return {"name": name, "error_occurred": True, "error_message": "skipped: the budget of 5 s is spent"}


OWN = [row(f"quantize/cuvq/float/{SHAPE}/codes", 66.0, wrong=0),
       row(f"quantize/cuvq/float/{SHAPE}/prepared", 58.0, wrong=0),
       row(f"quantize/cuvq/float/{SHAPE}/fast", 44.0, wrong=3, label="not exact: 3 of 4096 rows"),
       row(f"ema_update/cuvq/float/{SHAPE}/uniform", 34.0, sum_error=1e-8),
       row(f"accumulate/cuvq/float/{SHAPE}/uniform", 30.0, **{"GB/s": 1180.0, "of_ceiling": 0.5}),
       row("ceiling/cublas_fp16_product", 1.0, **{"TFLOP/s": 700.0}), row("ceiling/copy", 1.0, **{"GB/s": 2500.0})]
OTHERS = [row(f"quantize/flash_kmeans/float/{SHAPE}/codes", 88.0, wrong=2, label="WRONG CODES: 2 of 4096 rows"),
          row(f"quantize/torch_addmm_fp32/float/{SHAPE}/codes", 600.0, wrong=0),
          skipped(f"quantize/torch_cdist/float/{SHAPE}/codes"),
          row(f"accumulate/torch_index_add/float/{SHAPE}/uniform", 59.0, sum_error=0.5, label="WRONG SUMS")]


class WithResults(unittest.TestCase):
    """A directory of results, as one run leaves it."""

    def setUp(self):
        scratch = tempfile.TemporaryDirectory()
        self.addCleanup(scratch.cleanup)
        self.directory = pathlib.Path(scratch.name)
        results.write(self.directory / "cuvq_float.json", {"device": "a card", "host_name": "mine"}, OWN)
        results.write(self.directory / "peers.json", {"torch": "2"}, OTHERS)

    def silently(self, call, *arguments):
        """(What it returned or exited with, what it printed to stderr.)"""
        with contextlib.redirect_stderr(io.StringIO()) as errors, contextlib.redirect_stdout(io.StringIO()):
            try:
                code = call(*arguments)
            except SystemExit as e:
                code = e.code
        return code, errors.getvalue()


class ResultsTest(WithResults):
    def test_named_shapes_are_those_of_shapes_hpp(self):
        self.assertEqual(results.shapes_of("small"), [(256, 512, 64), (1024, 512, 64), (1024, 1024, 128),
                                                      (4096, 512, 64), (4096, 1024, 128), (8192, 512, 64)])
        self.assertIn(("models", "Mimi, 8 frames", (8, 2048, 256)), results.named_shapes())
        table = (BENCH / "shapes.hpp").read_text()
        self.assertEqual(len(results.named_shapes()), table.count('    {"'))

    def test_files_name_no_machine_and_hold_a_row_to_a_line(self):
        text = (self.directory / "cuvq_float.json").read_text()
        self.assertNotIn("mine", text)
        self.assertNotIn("manual_time", text)
        self.assertEqual(len(text.splitlines()), len(OWN) + 5)
        self.assertEqual(json.loads(text)["benchmarks"][0]["wrong"], 0)

    def test_rows(self):
        rows = results.Results(self.directory)
        self.assertEqual(rows.own_variant, "prepared")
        flash = results.quantize_row(rows, "flash_kmeans", (65536, 1024, 128))
        self.assertEqual((flash.us, flash.wrong, flash.spoiled), (88.0, 2, True))
        self.assertFalse(results.quantize_row(rows, "cuvq", (65536, 1024, 128)).spoiled)
        self.assertTrue(results.quantize_row(rows, "cuvq/fast", (65536, 1024, 128)).spoiled)
        self.assertTrue(results.update_row(rows, "torch_index_add", (65536, 1024, 128)).spoiled)
        self.assertIsNone(results.quantize_us(rows, "torch_cdist", (65536, 1024, 128)))
        self.assertEqual(rows.ceilings(), (700.0, 2500.0))

    def test_of_rows_of_one_name_the_first_that_ran_counts(self):
        name = f"quantize/rectokens/float/{SHAPE}/codes"
        for file, entry in (("a", skipped(name)), ("b", row(name, 7.0)), ("c", row(name, 9.0))):
            results.write(self.directory / f"{file}.json", {}, [entry])
        self.assertEqual(results.quantize_us(results.Results(self.directory), "rectokens", (65536, 1024, 128)), 7.0)

    def test_of_several_runs_the_median_is_kept(self):
        runs = self.directory / "runs"
        runs.mkdir()
        files = [runs / f"{name}.json" for name in "abc"]
        for file, fast, slow in zip(files, (3.0, 1.0, 2.0), (90.0, 300.0, 100.0)):  # by geometric means c, a, b
            results.write(file, {}, [row("quantize/cuvq/float/8x2x4/codes", fast),
                                     row("quantize/cuvq/float/9x2x4/codes", slow)])
        results.main(["--median", str(runs / "kept.json"), *map(str, files)])
        self.assertEqual([p.name for p in runs.iterdir()], ["kept.json"])
        kept = results.Results(runs)
        self.assertEqual(kept.us("quantize", "cuvq", (8, 2, 4), variant="codes"), 3.0)
        self.assertIn("the middle one of 3 runs", kept.run_text())

    def test_a_run_that_was_cut_short_is_no_median(self):
        whole, short = self.directory / "whole.json", self.directory / "short.json"
        results.write(whole, {}, OWN)
        results.write(short, {}, [row(OWN[0]["name"], 1.0), *(skipped(entry["name"]) for entry in OWN[1:])])
        results.main(["--median", str(whole), str(short), str(whole)])
        self.assertFalse(short.exists())
        self.assertEqual(len(results.load(whole)["benchmarks"]), len(OWN))

    def test_aggregates_of_repetitions_are_no_rows(self):
        path = self.directory / "a.json"
        path.write_text(json.dumps({"context": {}, "benchmarks": [
            {**row(f"accumulate/cuvq/float/{SHAPE}/one", 3.0), "run_type": "iteration"},
            {**row(f"accumulate/cuvq/float/{SHAPE}/one", 3.0), "name": f"accumulate/cuvq/float/{SHAPE}/one_median",
             "run_type": "aggregate"}]}))
        self.assertFalse([r for r in results.Results(self.directory).rows if "median" in r.variant])
        self.assertEqual(results.main([str(path)]), 0)
        self.assertEqual(path.read_text().count("accumulate"), 1)

    def test_runs_of_two_commits_are_not_mixed(self):
        results.write(self.directory / "a.json", {"commit": "1"}, [])
        results.write(self.directory / "b.json", {"commit": "2"}, [])
        self.assertIn("several commits (1, 2)", self.silently(results.Results, self.directory)[0])

    def test_ratios(self):
        results.add_ratios(self.directory)
        by_name = {e["name"]: e for e in json.loads((self.directory / "cuvq_float.json").read_text())["benchmarks"]}
        prepared = by_name[f"quantize/cuvq/float/{SHAPE}/prepared"]
        self.assertAlmostEqual(prepared["vs_flash_kmeans"], 58 / 88, places=4)
        self.assertNotIn("vs_torch_cdist", prepared)  # was skipped
        self.assertNotIn("vs_torch_index_add", prepared)
        update = by_name[f"ema_update/cuvq/float/{SHAPE}/uniform"]
        self.assertAlmostEqual(update["vs_torch_index_add"], 34 / 59, places=4)

    def test_of_a_peer_timed_twice_the_faster_row_counts(self):
        name = f"quantize/flash_kmeans/float/{SHAPE}/codes"
        for file, us in (("peers_again.json", 80.0), ("peers_later.json", 99.0)):
            results.write(self.directory / file, {}, [row(name, us, wrong=2)])
        self.assertEqual(results.Results(self.directory).us("quantize", "flash_kmeans", (65536, 1024, 128),
                                                            variant="codes"), 80.0)
        results.add_ratios(self.directory)
        by_name = {e["name"]: e for e in json.loads((self.directory / "cuvq_float.json").read_text())["benchmarks"]}
        self.assertAlmostEqual(by_name[f"quantize/cuvq/float/{SHAPE}/prepared"]["vs_flash_kmeans"], 58 / 80, places=4)

    def test_peers_get_the_rates_of_the_same_job(self):
        results.add_ratios(self.directory)
        by_name = {e["name"]: e for e in json.loads((self.directory / "peers.json").read_text())["benchmarks"]}
        sums = by_name[f"accumulate/torch_index_add/float/{SHAPE}/uniform"]
        self.assertAlmostEqual(sums["GB/s"], 1180 * 30 / 59, places=4)
        self.assertAlmostEqual(sums["of_ceiling"], 0.5 * 30 / 59, places=4)
        self.assertNotIn("GB/s", by_name[f"quantize/torch_addmm_fp32/float/{SHAPE}/codes"])  # cuvq's row has none


class ReadmeTest(WithResults):
    def test_what_was_wrong_is_marked(self):
        readme = self.directory / "README.md"
        readme.write_text(f"before\n{readme_table.BEGIN}\nold\n{readme_table.END}\nafter\n")
        self.assertEqual(readme_table.main([str(self.directory), str(readme)]), 0)
        text = readme.read_text()
        lines = [line for line in text.splitlines() if line.startswith("| 65536, 1024, 128")]
        quantize, update = lines[0], next(line for line in lines if "uniform" in line)
        self.assertEqual(quantize, "| 65536, 1024, 128 | **58.0** | **66.0** | 44.0 (3) | 88.0 (2) | 600 |")
        self.assertTrue(update.startswith("| 65536, 1024, 128, uniform | **34.0** | 59.0 (wrong) |"), update)
        self.assertTrue(text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text)
        readme_table.main([str(self.directory), str(readme)])
        self.assertEqual(readme.read_text(), text)

    def test_a_missing_folder_or_a_broken_file_gets_one_line(self):
        readme = self.directory / "README.md"
        text = f"{readme_table.BEGIN}\nold\n{readme_table.END}\n"
        readme.write_text(text)
        missing = self.directory / "none"
        code, errors = self.silently(readme_table.main, [str(missing), str(readme)])
        self.assertEqual((code, errors.count("\n"), readme.read_text()), (2, 1, text))
        self.assertIn(f"{missing}: no such folder", errors)
        self.assertEqual(self.silently(results.main, [str(missing / "a.json")])[0], 2)
        self.assertEqual(self.silently(readme_table.main, [str(self.directory), str(missing)])[0], 2)
        for broken in ("", "[]", '{"context": {}}', '{"context": {}, "benchmarks": [{}]}',
                       '{"context": {}, "benchmarks": [{"name": "a/b/float/1x2"}, '):
            (self.directory / "broken.json").write_text(broken)
            for main, arguments in ((readme_table.main, [str(self.directory), str(readme)]),
                                    (results.main, ["--ratios", str(self.directory)]),
                                    (results.main, [str(self.directory / "broken.json")])):
                code, errors = self.silently(main, arguments)
                self.assertEqual((code, errors.count("\n"), readme.read_text()), (2, 1, text), broken)
                self.assertIn("broken.json: is no result", errors)

    def test_a_run_of_the_cpu_path_is_no_run(self):
        for file in self.directory.glob("*.json"):
            file.unlink()
        results.write(self.directory / "cpu.json", {}, [row("quantize/cuvq_reference/float/64x40x8/codes", 9.0)])
        rows = results.Results(self.directory)
        self.assertEqual(readme_table.block(rows, self.directory, self.directory / "README.md"), readme_table.NO_RUN)

    def test_small_differences_and_negative_ratios(self):
        self.assertIsNone(readme_table.difference(1031.0, 1017.0))
        self.assertIsNone(readme_table.difference(None, 1017.0))
        self.assertAlmostEqual(readme_table.difference(19.8, 18.1), 1.7)
        self.assertEqual(readme_table.ratio(-3.0, 2.0), "−1.50")
        self.assertEqual(readme_table.ratio(None, 2.0), "–")

    def test_train_step_beside_others(self):
        rows = [row(f"train_step/cuvq/float/{SHAPE}", 133.0, wrong=0),
                row(f"train_step/rectokens/float/{SHAPE}", 5000.0)]
        results.write(self.directory / "train.json", {}, rows)
        table = readme_table.row_table(results.Results(self.directory), ("large",), readme_table.TRAIN)
        self.assertIn("| N, K, D | **cuvq** | RecTokens |", table)
        self.assertIn("| 65536, 1024, 128 | **133** | 5,000 |", table)

    def test_a_readme_without_markers_stays_as_it_is(self):
        readme = self.directory / "README.md"
        readme.write_text("mine\n")
        code, errors = self.silently(readme_table.main, [str(self.directory), str(readme)])
        self.assertEqual((code, readme.read_text()), (1, "mine\n"))
        self.assertIn("wants one", errors)


class PeersTest(WithResults):
    def test_bad_flags_get_one_line(self):
        for flag, says in (("--budget=-3", "argument --budget: got '-3'; wants seconds, above 0 and at most 1000000"),
                           ("--time=nan", "argument --time: got 'nan'; wants seconds, above 0 and at most 1000000"),
                           ("--shape=1,0,3", "--shape: got '1,0,3'; wants N,K,D: whole numbers from 1"),
                           ("--shapes=huge", "--shapes: got 'huge'; wants large, models, scaling, small"),
                           ("--hot", "unrecognized arguments: --hot")):
            self.assertEqual(self.silently(peers.parse, [flag]), (2, f"peers.py: {says}\n"))

    def test_an_output_that_cannot_be_written_gets_one_line(self):
        path = self.directory / "none" / "peers.json"
        self.assertEqual(self.silently(peers.main, [f"--out={path}"]),
                         (2, f"peers.py: --out: cannot write '{path}': No such file or directory\n"))

    def test_a_sigterm_costs_the_rows_that_are_left(self):
        asked, saved = [], []

        def measure(*_):
            asked.append(1)
            if len(asked) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)  # not to its end
            return {"us": 1.0}, ""

        torch = types.SimpleNamespace(cuda=types.SimpleNamespace(
            get_device_properties=lambda _: None, empty_cache=lambda: None, synchronize=lambda: None))
        options = peers.parse(["--shapes=small", "--peers=torch_cdist"])
        for number in (signal.SIGALRM, signal.SIGTERM):
            self.addCleanup(signal.signal, number, signal.getsignal(number))
        with mock.patch.object(peers, "measure", measure), \
                mock.patch.object(peers, "Problem", lambda _, shape, *more: types.SimpleNamespace(shape=shape)):
            code, _ = self.silently(peers.run, torch, options, lambda entries, _: saved.append(list(entries)))
        self.assertEqual((code, len(asked), [len(entries) for entries in saved]), (143, 3, [1, 2, 3, 6]))
        self.assertEqual([e.get("error_message") for e in saved[-1]],
                         [None] * 2 + ["skipped: the run was ended by SIGTERM"] * 4)

    def test_the_dear_rows_come_last(self):
        options = peers.parse(["--shapes=small,large"])
        rows = [(p.test, p.who) for p, shape, _ in peers.planned(options.peers, options.shapes, options.scaling_only)]
        dear = [who == "rectokens" for _, who in rows]
        self.assertEqual(dear, sorted(dear))

    def test_what_charts_alone_want_of_the_dear_comes_after_all_named_shapes(self):
        options = peers.parse(["--shapes=small,large,models,scaling"])
        late = [shape in options.scaling_only
                for p, shape, _ in peers.planned(options.peers, options.shapes, options.scaling_only)
                if p.who == "rectokens" and math.prod(shape) <= peers.DEAR]
        self.assertEqual(late, sorted(late))
        self.assertEqual(set(late), {False, True})

    def test_what_tunes_goes_shape_by_shape(self):
        options = peers.parse(["--shapes=small,models"])
        tuned = [(options.shapes.index(shape), p.test) for p, shape, _ in
                 peers.planned(options.peers, options.shapes, options.scaling_only)
                 if p.tunes and (not p.grows or math.prod(shape) <= peers.DEAR)]
        self.assertEqual([at for at, _ in tuned], sorted(at for at, _ in tuned))
        self.assertEqual([test for at, test in tuned if at == 0], ["quantize", "train_step"])

    def test_shapes_come_once(self):
        options = peers.parse(["--shape=1024,1024,128", "--shapes=small,scaling"])
        self.assertEqual(len(options.shapes), 6 + 16 - 2)
        self.assertNotIn((4096, 1024, 128), options.scaling_only)
        self.assertEqual((options.time, options.budget), (0.1, 1e6))

    def test_every_peer_that_the_table_and_charts_show_exists(self):
        in_the_binary = {"cuvq", "cublas_tf32_argmin", "cublas_fp32_argmin", "cublas_fp16_product", "cub_sort_reduce",
                         "cublas_one_hot", "read_x", "cublas_fp16_argmin", "cublas_bf16_argmin"}
        known = {p.who for p in peers.PEERS} | in_the_binary
        shown = {who.split("/")[0] for names, _ in readme_table.QUANTIZE + readme_table.PYTORCH for who in names}
        shown |= {who for _, _, who, *_ in readme_table.HALVES + readme_table.TRAIN + readme_table.OWN}
        self.assertLessEqual(shown | {who for who, _ in readme_table.UPDATE}, known)


class PlotTest(WithResults):
    def setUp(self):
        super().setUp()
        try:
            import plot
        except SystemExit as e:
            self.skipTest(str(e))
        self.plot = plot
        plot.SAVED.clear()

    def test_hollow_marks_are_explained_where_there_are_some(self):
        self.assertEqual(self.silently(self.plot.main, [str(self.directory)]), (0, ""))
        self.assertIn(self.plot.HOLLOW, (self.directory / "speedup_large.svg").read_text())
        self.assertIn(self.plot.HOLLOW, (self.directory / "roofline.svg").read_text())
        sound = [{**e, "wrong": 0, "label": ""} if "wrong" in e else e for e in OWN + OTHERS]
        results.write(self.directory / "cuvq_float.json", {}, sound)
        results.write(self.directory / "peers.json", {}, [])
        self.assertEqual(self.silently(self.plot.main, [str(self.directory)]), (0, ""))
        self.assertNotIn(self.plot.HOLLOW, (self.directory / "speedup_large.svg").read_text())

    def test_nothing_to_draw_is_said(self):
        for file in self.directory.glob("*.json"):
            file.unlink()
        results.write(self.directory / "cpu.json", {}, [row("quantize/cuvq_reference/float/64x40x8/codes", 9.0)])
        code, errors = self.silently(self.plot.main, [str(self.directory)])
        self.assertEqual(code, 1)
        self.assertIn("nothing to draw", errors)


if __name__ == "__main__":
    unittest.main()
