"""What the examples share: the usual options, a progress bar, and a plot of curves."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

HERE = Path(__file__).resolve().parent
MODULES = {"fusedrnn": "fusedrnn", "torch": "torch.nn"}
CELLS = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN"}


def positive_int(text: str) -> int:
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text}")
    return value


def device(text: str) -> torch.device:
    try:
        torch.empty(0, device=text)
        return torch.device(text)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"cannot use {text!r}: {reason}") from None


def example_parser(description: str, name: str, steps: int) -> argparse.ArgumentParser:
    """A parser with the options that every example has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--impl", choices=list(MODULES), default="fusedrnn", help="whose recurrent layer")
    add("--device", type=device, default="cpu", help="cpu, cuda, cuda:1, ...")
    add("--threads", type=positive_int, help="CPU threads (default: PyTorch's choice)")
    add("--seed", type=int, default=0, help="the same seed gives the same run")
    add("--steps", type=positive_int, default=steps, help="training steps")
    add("--out", type=Path, default=HERE / "out" / f"{name}.png", help="where the plot goes")
    return parser


def recurrent_layer(impl: str, cell: str) -> Callable[..., torch.nn.RNNBase]:
    """torch.nn.LSTM, fusedrnn.GRU, ..."""
    try:
        return getattr(importlib.import_module(MODULES[impl]), CELLS[cell])
    except ModuleNotFoundError as error:
        if error.name != "fusedrnn":
            raise
        hint = "run `pip install .` in the repository's root, or choose --impl torch"
        raise SystemExit(f"fusedrnn is not installed: {hint}") from None


def detached(state):
    """The state (a tensor, or an LSTM's pair) cut from the graph of the steps that led to it."""
    return tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()


def progress_bar() -> Progress:
    """Bar, count, time, and the task's `status`, in 80 columns."""
    return Progress(
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[status]}"),
    )


def save_curves(path: Path, curves: dict[str, tuple], title: str, xlabel: str, ylabel: str) -> None:
    """Draws each name's (x, y, matplotlib style) into one picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(title=title, xlabel=xlabel, ylabel=ylabel)
    for name, (x, y, style) in curves.items():
        axes.plot(x, y, label=name, **style)
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
