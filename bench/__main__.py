"""python -m bench: measure, show, compare."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from . import compare, contestant, environment, limits, plots, report, runner
from .cases import CELLS, MODES, Selection, Shape, select
from .results import Results, load

RESULTS = Path(__file__).parent / "results"


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["compare"]:
        parser = argparse.ArgumentParser("python -m bench compare")
        parser.add_argument("a", type=Path, help="a result's folder or results.json")
        parser.add_argument("b", type=Path)
        paths = parser.parse_args(arguments[1:])
        compare.show(load(paths.a), load(paths.b))
        return 0
    if arguments[:1] == ["show"]:
        parser = argparse.ArgumentParser("python -m bench show")
        parser.add_argument("result", type=Path, help="a result's folder or results.json")
        parser.add_argument("--targets", action="store_true")
        options = parser.parse_args(arguments[1:])
        results = load(options.result)
        report.show(results, options.targets)
        folder = options.result if options.result.is_dir() else options.result.parent
        _write(results, folder, options.targets)
        return 0
    options = _parse(arguments)
    with _plan(options):
        return _measure(options)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m bench",
        description="Times fusedrnn and its peers. Also: compare A B, show RESULT.",
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="few shapes, short rounds: under 2 minutes")
    add("--modes", default=",".join(MODES), help="of %(default)s")
    add("--cells", default=",".join(CELLS), help="of %(default)s")
    add("--dtypes", help="default float32,bfloat16 (on a GPU float16 too)")
    add("--shapes", help="NxTxH[-<layers>x|-<layers>bi],... in place of each mode's own")
    add("--threads", default="1,all", help="default %(default)s; with --quick all")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--budget", type=float, help="seconds of timing a case (default 2, quick 0.2)")
    add("--rounds", type=int, nargs=2, metavar=("MIN", "MAX"), help="default 7 101, quick 3 21")
    add("--peers-only", action="store_true", help="without fusedrnn")
    add("--ours", default="fusedrnn", help="package under test; torch.nn gives the noise")
    add("--plan", default="", help="how ours runs on a GPU (fusedrnn.use_plan)")
    add("--without", default="", help="peers to leave out, e.g. openvino,onnxruntime")
    add("--no-first-use", action="store_true", help="no first-call times and peak memory")
    add("--limit", type=float, help="seconds after which no case is begun (quick 100)")
    add("--targets", action="store_true", help="show the ratios aimed at")
    add("--out", type=Path, help="folder; default a new bench/results/<machine>-<date>")
    options = parser.parse_args(arguments)
    options.budget = options.budget or (0.2 if options.quick else 2.0)
    options.rounds = tuple(options.rounds or ((3, 21) if options.quick else (7, 101)))
    if options.device == "cuda":
        options.threads = "all"
        options.rounds = (max(20, options.rounds[0]), max(20, options.rounds[1]))
    elif options.quick and "--threads" not in arguments:
        options.threads = "all"
    if options.dtypes is None:
        options.dtypes = "float32,bfloat16" + (",float16" if options.device == "cuda" else "")
    return options


def _plan(options: argparse.Namespace) -> AbstractContextManager[None]:
    if options.plan and not options.peers_only:
        return importlib.import_module(options.ours).use_plan(options.plan)
    return nullcontext()


def _measure(options: argparse.Namespace) -> int:
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: torch finds no GPU")
    ours = None if options.peers_only else options.ours
    if ours and importlib.util.find_spec(ours) is None:
        sys.exit(f"{ours} is not installed: `pip install .` first, or give --peers-only")
    every = len(os.sched_getaffinity(0))
    counts = [every if t == "all" else int(t) for t in options.threads.split(",")]
    counts = list(dict.fromkeys(counts))
    cases = select(
        Selection(
            options.modes.split(","),
            options.cells.split(","),
            options.dtypes.split(","),
            [Shape.parse(s) for s in options.shapes.split(",")] if options.shapes else (),
            options.quick,
            options.device == "cuda",
        )
    )
    fixed = runner.Options(
        ours,
        options.device,
        options.budget,
        options.rounds,
        1 if options.quick else 4,
        0 if options.no_first_use else 1 if options.quick else 3,
        frozenset(filter(None, options.without.split(","))),
    )
    if options.device == "cpu":
        contestant.start_server()
    results = Results(environment.collect(ours, options.device, counts))
    date = results.environment["date"][:10]
    folder = options.out or _unused(RESULTS / f"{environment.machine_name(results.environment)}-{date}")
    limit_s = options.limit or (100.0 if options.quick else float("inf"))
    left_out: list[str] = []
    started = time.perf_counter()
    for threads in counts:
        torch.set_num_threads(threads)
        dtypes = sorted({case.dtype for case in cases})
        limit = limits.measure(dtypes, threads, options.device, fixed.tries)
        results.limits.append(limit)
        for i, case in enumerate(cases):
            if case.mode == "scaling" and threads != counts[-1]:
                continue
            if time.perf_counter() - started > limit_s:
                left_out.append(f"{threads} thread(s): {case.key}")
                continue
            _progress(f"{threads} thread(s), {i + 1}/{len(cases)}: {case.key}", started)
            results.rows.append(runner.run(case, threads, limit, fixed))
            results.save(folder)
    _progress("", started)
    report.show(results, options.targets)
    for path in _write(results, folder, options.targets):
        report.print_text(f"wrote {path}")
    report.print_text(f"{time.perf_counter() - started:.0f} s")
    if left_out:
        report.print_text(f"left out at the limit of {limit_s:.0f} s: " + ", ".join(left_out))
    wrong = [
        f"{row.key}: {name}: {entry.status}"
        for row in results.rows
        for name, entry in row.entries.items()
        if entry.status == "wrong" or entry.status.startswith("failed")
    ]
    for line in wrong:
        sys.stderr.write(f"not timed: {line}\n")
    return 1 if any(": fusedrnn" in line for line in wrong) else 0


def _unused(folder: Path) -> Path:
    """The folder, or the first of ``<folder>-2``, ``-3``, ... that isn't there yet."""
    names = itertools.chain([folder], (folder.with_name(f"{folder.name}-{k}") for k in itertools.count(2)))
    return next(path for path in names if not path.exists())


def _write(results: Results, folder: Path, with_targets: bool) -> list[Path]:
    results.save(folder)
    table = folder / "tables.md"
    table.write_text(report.markdown(results, with_targets))
    return [folder / "results.json", folder / "results.csv", table, *plots.draw(results, folder)]


def _progress(text: str, started: float) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text and f'{time.perf_counter() - started:5.0f} s  {text}'}")
    elif text:
        sys.stderr.write(f"{time.perf_counter() - started:5.0f} s  {text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
