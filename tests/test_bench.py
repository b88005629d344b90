"""python -m bench: every contestant is checked before it is timed, and computes only when it is its turn."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fusedrnn import _C

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def bench(monkeypatch):
    """A function that imports a module of the benchmark."""
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: importlib.import_module(f"bench.{name}")


@pytest.fixture
def case(bench):
    cases = bench("cases")
    return cases.Case("inference", "GRU", "float32", cases.Shape(2, 5, 8))


def states(pid: int) -> set[str]:
    paths = Path(f"/proc/{pid}/task").glob("*/stat")
    return {path.read_text().rpartition(")")[2].split()[0] for path in paths}


def test_contestant_is_stopped_between_calls(bench, case):
    one = bench("contestant").Apart(case, "torch", None, 2)
    try:
        setup_ms, first_ms = one.build()
        assert setup_ms > 0 and first_ms > 0
        assert states(one.pid) == {"T"}
        assert one.sample(3, 1) > 0
        assert states(one.pid) == {"T"}
        assert one.peak_mib() >= 0
    finally:
        one.close()


def test_contestant_that_dies_is_left_out(bench, case):
    contestant, runner, results = bench("contestant"), bench("runner"), bench("results")
    field = {name: contestant.Apart(case, name, "fusedrnn", 1) for name in ("fusedrnn", "torch")}
    row = results.Row(case.key, case.group, "GRU", "float32", "2x5x8", 1, 10, 10)
    row.entries = {name: results.Entry() for name in field}
    options = runner.Options("fusedrnn", "cpu", 0.01, (2, 2), 1, 0, frozenset())
    try:
        for one in field.values():
            one.build()
        os.kill(field["fusedrnn"].pid, signal.SIGKILL)
        time.sleep(0.1)
        times = runner._times(dict(field), row, options)
    finally:
        for one in field.values():
            one.close()
    assert set(times) == {"torch"} and times["torch"].rounds == 2
    assert row.entries["fusedrnn"].status.startswith("failed: its process ended")
    assert row.entries["torch"].status == "ok"


def test_contestant_that_dies_in_its_first_use_keeps_its_times(bench, case, capsys):
    contestant, runner, results = bench("contestant"), bench("runner"), bench("results")

    def enter(name):
        one = contestant.Apart(case, name, "fusedrnn", 1)
        os.kill(one.pid, signal.SIGKILL)
        return one

    entry = results.Entry(median_us=1.0, setup_ms=2.0, first_ms=3.0)
    runner._first_use(entry, "torch", enter, 3)
    assert (entry.status, entry.median_us, entry.peak_mib) == ("ok", 1.0, None)
    assert "torch: no first call or peak memory: its process ended" in capsys.readouterr().err


@pytest.mark.parametrize("change", [0.0, 0.01, float("nan")])
def test_gate(bench, case, change, monkeypatch):
    """A result that is off by a little is not timed."""
    contestant, gate, runner = bench("contestant"), bench("gate"), bench("runner")
    work = bench("workload").make(case, "cpu")
    one = contestant.Contestant(case, "fusedrnn", "fusedrnn", 1, "cpu")
    error = gate.error
    monkeypatch.setattr(gate, "error", lambda w, found, e: error(w, {**found, "h_n": found["h_n"] + change}, e))
    entry = runner._checked(one, gate.reference(work), gate.tolerance(work))
    assert entry.status == ("ok" if change == 0 else "wrong")


def test_command(tmp_path):
    """A small run: all columns are there, for every mode; two results can be compared."""
    bench = [sys.executable, "-m", "bench"]
    options = ["--quick", "--shapes", "1x1x8", "--cells", "LSTM", "--dtypes", "float32", "--threads", "1", "--targets"]
    options += ["--budget", "0.01", "--rounds", "2", "2", "--without", "onnxruntime,openvino", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*bench, *options], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    groups = {"inference", "training", "penalty", "step", "cells", "packed-inference", "packed-training"}
    assert {row["group"] for row in rows} == groups
    for row in rows:
        entries = row["entries"]
        assert {"fusedrnn", "torch"} <= set(entries) and row["floor_us"] > 0
        for entry in entries.values():
            assert entry["status"] == "ok" and entry["rounds"] == 2
            assert min(entry["median_us"], entry["first_ms"], entry["setup_ms"]) > 0 <= entry["peak_mib"]
    lines = (tmp_path / "results.csv").read_text().splitlines()
    assert len(lines) == 1 + sum(len(row["entries"]) for row in rows)
    assert "first call" in (tmp_path / "tables.md").read_text()
    compared = subprocess.run(
        [*bench, "compare", str(tmp_path), str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "geometric mean, fusedrnn: 1.000" in compared.stdout, compared.stderr


def test_plan(bench, monkeypatch):
    """The plan asked for is in force while all is measured, and not afterwards."""
    main, found = bench("__main__"), []
    monkeypatch.setattr(main, "_measure", lambda options: found.append(_C.forced_cuda_plan()))
    main.main(["--plan", "loop"])
    main.main(["--plan", "loop", "--peers-only"])
    assert (*found, _C.forced_cuda_plan()) == ("loop", "", "")


def test_plans_of_a_case(bench, case, monkeypatch):
    plan = {"name": "cluster", "blocks": (16, 8, 1), "columns": 2, "together": 1}
    monkeypatch.setattr(bench("plans"), "passes", lambda package, module, shape: [plan, plan | {"together": 3}])
    found = bench("runner")._plans(bench("workload").make(case, "cpu"), "fusedrnn")
    assert found == "cluster 16x8x1 of 2 rows / cluster 16x8x1 of 2 rows, 3 layers at the same time"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(bench, case):
    one = bench("contestant").Contestant(case, "fusedrnn", "fusedrnn", 1, "cuda")
    gate = bench("gate")
    one.build()
    work = bench("workload").make(case, "cuda")
    assert one.error(gate.reference(work)) <= gate.tolerance(work)
    assert one.sample(3, 1) > 0
    assert one.peak_mib() > 0


def test_results_are_never_overwritten(bench, tmp_path):
    unused = bench("__main__")._unused
    folders = [tmp_path / name for name in ("a-2026-01-01", "a-2026-01-01-2", "a-2026-01-01-3")]
    for folder in folders:
        assert unused(folders[0]) == folder
        folder.mkdir()


def test_variants_for_a_gpu(bench, device, capsys, monkeypatch):
    """Their changes fit the sources; what a package computes is timed if it is right."""
    variants = bench("gpu_variants")
    for variant in variants.VARIANTS:
        assert variant.edits or variant.plan
        for file, old, new in variant.edits:
            assert (variants.ROOT / file).read_text().count(old) == 1 and old != new, variant.name
        for text in variant.cases:
            assert [str(case.shape) for case in variants.parse(text)] == [text.split("/")[2]] * 2
    variants.turn(["GRU/float32/2x3x4"], str(device))
    lines = list(map(json.loads, capsys.readouterr().out.splitlines()))
    assert [key for key, _, _ in lines] == ["inference/GRU/float32/2x3x4", "training/GRU/float32/2x3x4"]
    assert all(len(samples) == variants.SAMPLES and min(samples) > 0 for _, _, samples in lines)
    monkeypatch.setattr(variants.gate, "error", lambda *_: float("nan"))
    variants.turn(["GRU/float32/2x3x4"], str(device))
    assert "Infinity" in capsys.readouterr().out

    built = []

    def build(variant, base, folder):
        built.append(variant)
        return "no compiler" if "128 steps" in variant.name else ""

    def take_turn(variant, folder, texts):
        each = 2.0 if variant.name == variants.AS_IT_IS else 1.0
        cases = [case for text in texts for case in variants.parse(text) if case.training]
        return [json.dumps([case.key, variant.plan, [each]]) for case in cases]

    monkeypatch.setattr(variants, "ninja", lambda folder: "")
    monkeypatch.setattr(variants, "build", build)
    monkeypatch.setattr(variants, "take_turn", take_turn)
    assert variants.main(["chunks", "grid instead"]) == 1
    assert len(built) == 2  # a plan needs no build of its own
    out = capsys.readouterr().out
    assert "2 us ->        1 us (2.00)    -> grid" in out and "wrong, or failed" in out
    assert "chunks of 128 steps was not built: no compiler" in out


def test_small_layers(bench, device, capsys, monkeypatch):
    """What is tried on a GPU first: right everywhere, and wrong where a kernel is."""
    small = bench("gpu_small")
    assert small.main(["stepwise"], str(device)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(small.LAYERS) * len(small.TOLERANCE) and all("  ok" in line for line in lines)
    monkeypatch.setattr(small, "error", lambda found, expected: float("inf"))
    assert small.main(["stepwise"], str(device)) == 3
