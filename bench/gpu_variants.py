"""What the constants of the CUDA kernels are worth on a GPU: the package built in several ways, timed in turns.

    python -m bench.gpu_variants [--limit SECONDS] [--out FILE] [TEXT...]

With TEXT only variants with one of these texts in their name. A variant is a copy of the package with a change to its
source, or runs by another plan. The table has microseconds of a call, the median over rounds in which every variant has
its turn, in a process of its own, in brackets how many times as fast as the package as it is, and by which plans they
ran; "wrong" where a result is not torch.nn's. No turn begins after the limit. --out has all samples, as JSON.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from . import gate, plans, timing, workload
from .cases import Case, Shape
from .implementations import torch_like

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = 15  # of a case in a turn
HANGS_S = 30  # a turn, and so much more for each case
WRONG = math.inf
MOST_ROUNDS = 3

Edits = tuple[tuple[str, str, str], ...]  # (file, old text, new text)


@dataclass(frozen=True)
class Variant:
    name: str
    cases: tuple[str, ...]  # CELL/DTYPE/SHAPE, inference and training
    edits: Edits = ()
    plan: str = ""


FEW_ROWS = ("LSTM/bfloat16/16x1024x768", "LSTM/bfloat16/16x1024x512", "GRU/bfloat16/16x1024x512")
SHORT_OF_A_CLUSTER = ("LSTM/bfloat16/16x1024x768", "LSTM/float16/16x1024x768", "LSTM/bfloat16/64x512x512")
MANY_GRADIENTS = (
    "LSTM/bfloat16/16x1024x1024",
    "GRU/bfloat16/16x1024x1024",
    "LSTM/bfloat16/16x512x2048",
    "LSTM/bfloat16/128x256x1024",
)
STACKS = ("LSTM/bfloat16/16x512x512-4x", "LSTM/bfloat16/32x256x256-4x")
SHAPE, PLAN, TILE = "csrc/cuda/cluster_shape.h", "csrc/cuda/plan.cpp", "csrc/cuda/tile.cuh"
LEAST_COLUMNS, WORTH_DIVIDING = "least_columns = {};", "worth_dividing = {};"
AHEAD, CHUNK = "n_tiles == 1 ? 8 : n_tiles == 2 ? 4 : {}>", "CHUNK = {} "


def edited(file: str, text: str, old: object, new: object) -> Edits:
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


def plan_of(case: Case, device: str) -> str:
    if torch.device(device).type != "cuda":
        return ""
    args, options = workload.arguments(case)
    module = getattr(importlib.import_module("fusedrnn"), case.cell)(
        *args, **options, device=device, dtype=getattr(torch, case.dtype)
    )
    return plans.words(plans.passes("fusedrnn", module, (case.shape.t, case.shape.n, case.shape.h))[case.training])


def turn(texts: Iterable[str], device: str) -> None:
    """Prints a line of JSON, [key, plan, samples], for each case."""
    for case in (case for text in texts for case in parse(text)):
        print(json.dumps([case.key, plan_of(case, device), microseconds(case, device)]), flush=True)


@dataclass
class Results:
    """By variant and case: samples, and plans."""

    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    plans: dict[str, dict[str, str]] = field(default_factory=dict)

    def add(self, variant: str, line: str) -> None:
        key, plan, taken = json.loads(line)
        self.samples.setdefault(variant, {}).setdefault(key, []).extend(taken)
        self.plans.setdefault(variant, {})[key] = plan

    def median(self, variant: str, key: str) -> float:
        return statistics.median(self.samples.get(variant, {}).get(key) or [WRONG])

    def table(self, variants: Iterable[Variant]) -> str:
        lines = []
        for variant in variants:
            lines.append(f"{variant.name}:")
            for case in (case for text in variant.cases for case in parse(text)):
                own, base = self.median(variant.name, case.key), self.median(AS_IT_IS, case.key)
                words = f"{own:9.0f} us ({base / own:.2f})" if own != WRONG else "    wrong, or failed"
                ways = [self.plans.get(name, {}).get(case.key, "") for name in (AS_IT_IS, variant.name)]
                lines.append(f"  {case.key:<42}{base:9.0f} us ->{words}   {' -> '.join(dict.fromkeys(ways))}")
        return "\n".join(lines)


def ninja(folder: Path) -> str:
    """Builds the package there; returns what went wrong."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    environment = {"FUSEDRNN_CUDA": "1", **os.environ}
    done = subprocess.run(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    return done.stdout[-2000:] if done.returncode else ""


def build(variant: Variant, base: Path, folder: Path) -> str:
    """A copy of what is built in `base`, with the variant's changes; returns what went wrong."""
    shutil.copytree(base, folder)
    for file, old, new in variant.edits:
        text = (folder / file).read_text()
        if text.count(old) != 1:
            return f"{old!r} is {text.count(old)} times in {file}"
        (folder / file).write_text(text.replace(old, new))
    return ninja(folder)


def take_turn(variant: Variant, folder: Path, texts: Sequence[str]) -> list[str]:
    code = f"import fusedrnn; from bench import gpu_variants as g\nwith fusedrnn.use_plan({variant.plan!r}): "
    code += f"g.turn({list(texts)!r}, 'cuda')"
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        text=True,
        stdout=subprocess.PIPE,
    )
    try:
        out, _ = process.communicate(timeout=HANGS_S * (1 + len(texts)))
    except subprocess.TimeoutExpired:
        process.kill()
        out, _ = process.communicate()
        print(f"{variant.name}: hangs", flush=True)
    return [line for line in out.splitlines() if line.startswith("[")]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_variants")
    parser.add_argument("texts", nargs="*", metavar="TEXT")
    parser.add_argument("--limit", type=float, default=420)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    end = time.monotonic() + options.limit
    wanted = [v for v in VARIANTS if not options.texts or any(text in v.name for text in options.texts)]
    every_case = tuple(dict.fromkeys(text for v in wanted for text in v.cases))
    as_it_is = Variant(AS_IT_IS, every_case)
    results = Results()
    with tempfile.TemporaryDirectory() as temporary:
        folders: dict[Edits, Path] = {(): Path(temporary) / "0"}  # plans need no build of their own
        shutil.copytree(ROOT, folders[()], ignore=shutil.ignore_patterns(".git", ".venv", "results", "cuda_host*"))
        failed: dict[Edits, str] = {(): ninja(folders[()])}
        changed = {} if failed[()] else {v.edits: v for v in wanted if v.edits}
        folders |= {edits: Path(temporary) / str(1 + i) for i, edits in enumerate(changed)}
        with ThreadPoolExecutor(8) as pool:
            builds = pool.map(lambda edits: build(changed[edits], folders[()], folders[edits]), changed)
            failed |= dict(zip(changed, builds, strict=True))
        turns = [v for v in (as_it_is, *wanted) if not failed.get(v.edits, "nothing was built")]
        for variant in turns * MOST_ROUNDS:
            if time.monotonic() > end:
                break
            for line in take_turn(variant, folders[variant.edits], variant.cases):
                results.add(variant.name, line)
            if options.out:
                options.out.write_text(json.dumps(asdict(results)))
    print(results.table(wanted))
    for variant in (as_it_is, *wanted):
        if message := failed.get(variant.edits):
            print(f"{variant.name} was not built: {message}")
    return int(any(failed.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
