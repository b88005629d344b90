"""What the examples share: the usual options, a progress bar, the final line, and plots."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from tqdm import tqdm

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


def example_parser(description: str, name: str, steps: int, steps_are: str = "training steps") -> Any:
    """A parser with the options that every example has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--impl", choices=list(MODULES), default="fusedrnn", help="whose recurrent layers")
    add("--device", type=device, default="cpu", help="cpu, cuda, cuda:1, ...")
    add("--threads", type=positive_int, help="CPU threads (default: PyTorch's choice)")
    add("--seed", type=int, default=0, help="the same seed gives the same run")
    add("--steps", type=positive_int, default=steps, help=steps_are)
    add("--plot", type=Path, default=Path(f"{name}.png"), help="where the plot goes")
    return parser


def start(args: argparse.Namespace) -> ModuleType:
    """Sets the seed and the threads; gives the module whose LSTM, GRU and RNN the example uses."""
    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    return implementation(args.impl)


def implementation(impl: str) -> ModuleType:
    """fusedrnn or torch.nn."""
    try:
        return importlib.import_module(MODULES[impl])
    except ModuleNotFoundError as error:
        if error.name != "fusedrnn":
            raise
        hint = "run `pip install .` in the repository's root, or choose --impl torch"
        raise SystemExit(f"fusedrnn is not installed: {hint}") from None


def progress(steps: int, unit: str = "step") -> tqdm:
    """A progress bar over range(steps); its set_postfix shows numbers beside it."""
    return tqdm(range(steps), unit=unit, ncols=100)


def detached(state):
    """The state (a tensor, or an LSTM's pair) cut from the graph of the steps that led to it."""
    return tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()


def finish(args: argparse.Namespace, figure: Any, **metrics: float) -> dict[str, float]:
    """Saves the plot and prints the final line; gives the metrics."""
    save(figure, args.plot)
    print(f"plot: {args.plot}")
    print("result: " + ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in metrics.items()))
    return metrics


def new_figure(columns: int = 1, **axes: Any) -> tuple[Any, Any]:
    """A matplotlib figure and its axes, one beside the other, without a window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5 if columns == 1 else 5.5 * columns, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, subplot_kw=axes)


def save(figure: Any, path: Path) -> None:
    """Writes the figure, with a legend wherever curves have names."""
    for axes in figure.axes:
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
