"""What is measured: one `Case` is one cell, shape, dtype and mode; the grids below list them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

CELLS = ("LSTM", "GRU", "RNN")
MODES = ("inference", "training", "penalty", "step", "cells", "packed", "scaling")
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


@dataclass(frozen=True)
class Shape:
    n: int
    t: int
    h: int  # the input has H features too
    layers: int = 1
    bidirectional: bool = False

    def __str__(self) -> str:
        stack = f"-{self.layers}{'bi' if self.bidirectional else 'x'}"
        return f"{self.n}x{self.t}x{self.h}" + (stack if stack != "-1x" else "")

    @staticmethod
    def parse(text: str) -> Shape:
        """Reads what `str` writes: 16x128x256, 32x100x256-2bi, 16x512x512-4x."""
        match = re.fullmatch(r"(\d+)x(\d+)x(\d+)(?:-(\d+)(bi|x))?", text.strip())
        if match is None:
            raise ValueError(f"shape {text!r}: expected NxTxH, NxTxH-<layers>x or NxTxH-<layers>bi")
        n, t, h, layers, kind = match.groups()
        return Shape(int(n), int(t), int(h), int(layers or 1), kind == "bi")


@dataclass(frozen=True)
class Case:
    mode: str
    cell: str
    dtype: str
    shape: Shape
    training: bool = False
    packed: bool = False
    axis: str = ""  # in scaling: which of N, T, H is varied

    @property
    def group(self) -> str:
        """The table it is printed in; unique with cell and shape."""
        kind = self.mode
        if self.mode in ("packed", "scaling"):
            kind += ("-" + self.axis if self.axis else "") + ("-training" if self.training else "-inference")
        return kind

    @property
    def key(self) -> str:
        return f"{self.group}/{self.cell}/{self.dtype}/{self.shape}"

    @property
    def has_state(self) -> bool:
        """Whether hx is given to the call."""
        return self.training or self.mode in ("step", "cells")

    @property
    def rows(self) -> int:
        """Steps of all sequences together."""
        return sum(self.lengths) if self.packed else self.shape.n * self.shape.t

    @property
    def lengths(self) -> list[int]:
        """Ragged lengths uniform in 1..T (a fixed generator), or all T."""
        n, t = self.shape.n, self.shape.t
        if not self.packed:
            return [t] * n
        state, lengths = 12345, []
        for _ in range(n):
            state = (1103515245 * state + 12345) % 2**31
            lengths.append(1 + (state >> 8) % t)
        return lengths


LAYERS = tuple(
    map(
        Shape.parse,
        (
            "1x128x128",
            "1x128x512",
            "16x64x128",
            "16x128x256",
            "64x128x512",
            "128x64x1024",
            "32x512x64",
            "32x100x256-2bi",
        ),
    )
)
LAYERS_HALF = LAYERS[3:6]  # the shapes measured in bfloat16 and float16
STEPS = (Shape(1, 1, 8), Shape(1, 1, 128), Shape(1, 1, 512))
CELL_STEPS = (Shape(1, 1, 8), Shape(1, 1, 128), Shape(64, 1, 512))
PENALTY = (Shape(8, 64, 32), Shape(16, 64, 128), Shape(32, 100, 256))
PACKED = (Shape(16, 64, 128), Shape(16, 128, 256), Shape(32, 512, 64))
QUICK = (Shape(1, 128, 128), Shape(16, 64, 128), Shape(16, 128, 256))
SCALING_BASE = Shape(16, 64, 128)
SCALING = {
    "N": [Shape(n, 64, 128) for n in (1, 4, 16, 64, 256)],
    "T": [Shape(16, t, 128) for t in (1, 4, 16, 64, 256, 1024)],
    "H": [Shape(16, 64, h) for h in (8, 32, 128, 256, 512, 1024)],
}

# On a GPU: cell, dtypes, shape, packed.
GPU: tuple[tuple[str, tuple[str, ...], str, bool], ...] = (
    ("LSTM", ("float16", "bfloat16", "float32"), "16x1024x768", False),
    ("LSTM", ("bfloat16",), "1x1024x512", False),
    ("LSTM", ("bfloat16",), "4x1024x512", False),
    ("LSTM", ("bfloat16",), "64x512x512", False),
    ("LSTM", ("bfloat16",), "128x512x256", False),
    ("LSTM", ("bfloat16",), "128x256x1024", False),
    ("LSTM", ("bfloat16",), "16x512x2048", False),
    ("GRU", ("bfloat16",), "16x1024x512", False),
    ("GRU", ("bfloat16",), "16x1024x1024", False),
    ("GRU", ("bfloat16",), "64x512x512", False),
    ("RNN", ("bfloat16",), "16x1024x512", False),
    ("LSTM", ("bfloat16",), "32x256x512-2bi", False),
    ("LSTM", ("bfloat16",), "16x512x512-4x", False),
    ("LSTM", ("bfloat16",), "32x512x512", True),
    ("LSTM", ("float16",), "32x512x128", False),
)


@dataclass(frozen=True)
class Selection:
    """The command line's choice; an empty `shapes` means each mode's own grid."""

    modes: Sequence[str]
    cells: Sequence[str]
    dtypes: Sequence[str]
    shapes: Sequence[Shape] = ()
    quick: bool = False
    cuda: bool = False


def select(choice: Selection) -> list[Case]:
    found = _gpu(choice) if choice.cuda and not choice.shapes else _grid(choice)
    return [
        case
        for case in found
        if case.mode in choice.modes and case.cell in choice.cells and case.dtype in choice.dtypes
    ]


def _gpu(choice: Selection) -> Iterator[Case]:
    for training in (False, True):
        for cell, dtypes, shape, packed in GPU:
            mode = "packed" if packed else "training" if training else "inference"
            for dtype in dtypes:
                yield Case(mode, cell, dtype, Shape.parse(shape), training, packed)
    for cell in CELLS:
        for size in PENALTY:
            yield Case("penalty", cell, "float32", size, training=True)


def _grid(choice: Selection) -> Iterator[Case]:
    def shapes(own: Sequence[Shape], dtype: str, t_is_1: bool = False) -> Sequence[Shape]:
        if choice.shapes:
            return [s for s in choice.shapes if not t_is_1 or s.t == 1]
        if own is LAYERS:
            own = own if dtype in ("float32", "float64") else LAYERS_HALF
        return [s for s in own if s in QUICK or s.t == 1] if choice.quick else own

    for dtype in choice.dtypes:
        for mode, training in (("inference", False), ("training", True)):
            for shape in shapes(LAYERS, dtype):
                for cell in CELLS:
                    yield Case(mode, cell, dtype, shape, training)
        if dtype != "float32" and not choice.shapes:
            continue
        for shape in shapes(PENALTY, dtype):
            for cell in CELLS:
                yield Case("penalty", cell, dtype, shape, training=True)
        for mode, own in (("step", STEPS), ("cells", CELL_STEPS)):
            for shape in shapes(own, dtype, t_is_1=True):
                for cell in CELLS:
                    yield Case(mode, cell, dtype, shape)
        for training in (False, True):
            for shape in shapes(PACKED, dtype):
                for cell in CELLS:
                    yield Case("packed", cell, dtype, shape, training, packed=True)
        for training in (False, True):
            for axis, points in SCALING.items() if not (choice.quick or choice.shapes) else ():
                for shape in points:
                    for cell in CELLS:
                        yield Case("scaling", cell, dtype, shape, training, axis=axis)
