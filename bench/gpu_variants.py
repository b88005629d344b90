"""What the constants of the CUDA kernels are worth on a GPU: the package built in several ways, timed in turns.

    python -m bench.gpu_variants [--rounds N] [--out FILE] [TEXT...]

With TEXT only variants with one of these texts in their name. A variant is a copy of the package with a change to its
source, or runs by another plan; all are built at the same time. The table has microseconds of a call, the median over
rounds in which every variant has its turn, in a process of its own, and in brackets how many times as fast as the
package as it is; "wrong" where a result is not torch.nn's. --out writes all samples as JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from . import gate, timing, workload
from .cases import Case, Shape
from .implementations import torch_like

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = 20  # of a case in a turn
TURN_S = 90  # then it hangs
WRONG = math.inf


@dataclass(frozen=True)
class Variant:
    name: str
    cases: tuple[str, ...]  # CELL/DTYPE/SHAPE, inference and training
    edits: tuple[tuple[str, str, str], ...] = ()  # (file, old text, new text)
    plan: str = ""


FEW_ROWS = ("LSTM/bfloat16/16x1024x768", "LSTM/bfloat16/16x1024x512", "GRU/bfloat16/16x1024x512")
SHORT_OF_A_CLUSTER = ("LSTM/bfloat16/16x1024x768", "LSTM/float16/16x1024x768", "LSTM/bfloat16/64x512x512")
MANY_GRADIENTS = (
    *("LSTM/bfloat16/16x1024x1024", "GRU/bfloat16/16x1024x1024"),
    *("LSTM/bfloat16/16x512x2048", "LSTM/bfloat16/128x256x1024"),
)
STACKS = ("LSTM/bfloat16/16x512x512-4x", "LSTM/bfloat16/32x256x256-4x")
SHAPE, PLAN, TILE = "csrc/cuda/cluster_shape.h", "csrc/cuda/plan.cpp", "csrc/cuda/tile.cuh"
LEAST_COLUMNS, WORTH_DIVIDING = "least_columns = {};", "worth_dividing = {};"
AHEAD, CHUNK = "n_tiles == 1 ? 8 : n_tiles == 2 ? 4 : {}>", "CHUNK = {} "


def edited(file: str, text: str, old: object, new: object) -> tuple[tuple[str, str, str], ...]:
    return ((file, text.format(old), text.format(new)),)


AS_IT_IS = "as it is"
VARIANTS = (
    Variant("clusters of 4 entries or more", FEW_ROWS, edited(SHAPE, LEAST_COLUMNS, 2, 4)),
    Variant("clusters of 8 entries", FEW_ROWS, edited(SHAPE, LEAST_COLUMNS, 2, 8)),
    Variant("grid instead of clusters", SHORT_OF_A_CLUSTER, plan="grid"),
    Variant("split wherever it fits", MANY_GRADIENTS, edited(PLAN, WORTH_DIVIDING, "128 * 1024", 0)),
    Variant("grid instead of split", MANY_GRADIENTS, plan="grid"),
    Variant("4 blocks of k under way with many rows", MANY_GRADIENTS[3:], edited(TILE, AHEAD, 2, 4)),
    Variant("chunks of 32 steps", STACKS, edited("fusedrnn/stacked.py", CHUNK, 64, 32)),
    Variant("chunks of 128 steps", STACKS, edited("fusedrnn/stacked.py", CHUNK, 64, 128)),
    Variant("loop instead of what is on the chip", ("LSTM/bfloat16/16x1024x768", *MANY_GRADIENTS[:1]), plan="loop"),
)


def parse(text: str) -> list[Case]:
    cell, dtype, shape = text.split("/")
    return [Case("training" if t else "inference", cell, dtype, Shape.parse(shape), t) for t in (False, True)]


def microseconds(case: Case, device: str) -> list[float]:
    """Samples of the imported package's time, or [WRONG]."""
    work = workload.make(case, device)
    runner = torch_like("fusedrnn")(work, 1)
    with torch.set_grad_enabled(case.training):
        found = runner.outputs(runner.call())
        if not gate.error(work, found, gate.reference(work)) <= gate.tolerance(work):
            return [WRONG]
        return [timing.sample(runner.call, 1, 1, device) / 1e3 for _ in range(SAMPLES)]


def turn(texts: Iterable[str], device: str) -> None:
    """Prints a line of JSON, [key, samples], for each case."""
    for case in (case for text in texts for case in parse(text)):
        print(json.dumps([case.key, microseconds(case, device)]), flush=True)


def build(variant: Variant, folder: Path) -> str:
    """The variant's package in `folder`; returns what went wrong."""
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "build", "results", "lib", "*.so"))
    for file, old, new in variant.edits:
        text = (folder / file).read_text()
        if text.count(old) != 1:
            return f"{old!r} is {text.count(old)} times in {file}"
        (folder / file).write_text(text.replace(old, new))
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    environment = {"FUSEDRNN_CUDA": "1", **os.environ}
    done = subprocess.run(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    return done.stdout[-2000:] if done.returncode else ""


def take_turn(variant: Variant, folder: Path, texts: Iterable[str]) -> dict[str, list[float]]:
    code = f"from bench import gpu_variants as g; import fusedrnn as f\nwith f.use_plan({variant.plan!r}): "
    code += f"g.turn({list(texts)!r}, 'cuda')"
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = ["timeout", str(TURN_S), sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE)
    return dict(map(json.loads, done.stdout.splitlines()))


def table(samples: dict[str, dict[str, list[float]]], variants: Iterable[Variant]) -> str:
    """Lines "variant: case: time (ratio)"."""

    def median(name: str, key: str) -> float:
        return statistics.median(samples[name].get(key) or [WRONG])

    lines = []
    for variant in variants:
        for case in (case for text in variant.cases for case in parse(text)):
            own, base = median(variant.name, case.key), median(AS_IT_IS, case.key)
            words = f"{own:9.0f} us ({base / own:.2f})" if own != WRONG else "    wrong, or failed"
            lines.append(f"{variant.name:<40}{case.key:<42}{base:9.0f} us ->{words}")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_variants")
    parser.add_argument("texts", nargs="*", metavar="TEXT")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    wanted = [v for v in VARIANTS if not options.texts or any(text in v.name for text in options.texts)]
    every_case = tuple(dict.fromkeys(text for v in wanted for text in v.cases))
    all_variants = [Variant(AS_IT_IS, every_case), *wanted]
    samples: dict[str, dict[str, list[float]]] = {v.name: {} for v in all_variants}
    with tempfile.TemporaryDirectory() as temporary:
        folders = {v.edits: Path(temporary) / str(i) for i, v in enumerate(all_variants)}  # one for all without edits
        builds = {v.edits: v for v in all_variants}
        with ThreadPoolExecutor(len(folders)) as pool:
            failed = dict(
                zip(folders, pool.map(lambda edits: build(builds[edits], folders[edits]), folders), strict=True)
            )
        for i in range(options.rounds):
            for variant in all_variants[:: -1 if i % 2 else 1]:
                if failed[variant.edits]:
                    continue
                for key, taken in take_turn(variant, folders[variant.edits], variant.cases).items():
                    samples[variant.name].setdefault(key, []).extend(taken)
    if options.out:
        options.out.write_text(json.dumps(samples))
    print(table(samples, wanted))
    for variant in all_variants:
        if failed[variant.edits]:
            print(f"{variant.name} was not built: {failed[variant.edits]}")
    return int(any(failed.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
