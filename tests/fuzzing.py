"""What the fuzz tests share: layers, what callers get wrong, and a record of the call at hand.

A call is data and becomes tensors only when it runs: its repr, which is written down first, is all that it takes to
run it again when the process has died (`python tests/fuzzing.py build/fuzz_case.txt`).
"""

from __future__ import annotations

import faulthandler
import os
import random
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from conftest import assert_close_to_reference
from helpers import DTYPES, VARIANTS, Case, variant
from hypothesis import HealthCheck, Phase, event, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fusedrnn import _C

CASES = int(os.environ.get("FUSEDRNN_FUZZ", 0))  # 0: few, the same in every run
RECORD = Path(__file__).parents[1] / "build" / "fuzz_case.txt"

# What a refused call may raise; anything else is a mistake of ours.
ERRORS = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, MemoryError, OverflowError)

# Memory for these is refused: always, or under a limit such as `make fuzz` sets.
HUGE = [2**48, 2**61, 2**62] + ([2**31, 2**32, 2**33, 2**40] if _C.build_info()["sanitize"] else [])
NUMBERS = [0, 1, 2, 3, -1, 5, 255, 2**31, 2**32 + 1, -(2**31), 2**62, 2**63 - 1, -(2**63), 2**64, 2**70, 1.5, -0.5]
NUMBERS += [float("nan"), True, None, "1", [2], (), torch.float16, torch.tensor(2)]
# Of modules, whose number of layers is a loop of torch's.
OPTIONS = [-1, 0, 1, 3, 0.5, -0.5, float("nan"), True, None, "5", [2], torch.int64, torch.float16, "meta"]
TYPES = [*DTYPES, torch.complex64, torch.bool, torch.uint8, torch.int64, torch.int32, torch.float8_e5m2]


def calls(share: float, usually: int) -> settings:
    """So many in a normal run; with FUSEDRNN_FUZZ=n this share of n, others for every --hypothesis-seed."""
    return settings(
        max_examples=int(CASES * share) or usually,
        derandomize=not CASES,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )


def attempt(call: Any) -> None:
    """Runs a call, recorded; it returns, or raises one of ERRORS. What it returns, it checks itself."""
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text(f"{call!r}\n")
    # A call that hangs is as bad as one that crashes.
    faulthandler.dump_traceback_later(60, exit=True, file=sys.__stderr__)
    try:
        check = call.run()
    except ERRORS as error:
        if not call.mistakes:
            raise
        event(f"{call.what} raised {type(error).__name__}")
        return
    event(f"{call.what} returned{' in spite of its mistakes' if not harmless(call.mistakes) else ''}")
    check()


# ---- layers, and what is right -----------------------------------------------------------------

sizes = st.integers(1, 9) | st.sampled_from([0, 15, 16, 17, 31, 33, 48, 65])
lengths = st.lists(st.integers(1, 6), min_size=1, max_size=9).map(lambda ls: tuple(sorted(ls, reverse=True)))


@st.composite
def layers(draw: Any) -> Case:
    options = {name: draw(sizes) for name in "NIH"}
    options |= {name: draw(st.booleans()) for name in ("bias", "states")}
    options |= {"T": draw(st.integers(0, 6)), "directions": draw(st.integers(1, 2))}
    options |= {"lengths": draw(st.none() | lengths), "dtype": draw(st.sampled_from(DTYPES))}
    return variant(draw(st.sampled_from(VARIANTS)), **options)


def close(found: list[Tensor], expected: list[Tensor], what: object, slack: float = 1) -> None:
    """As one tensor: an error that is small by the largest result will do, however small its own."""
    one = {"all results": torch.cat([t.flatten() for t in found])}
    other = {"all results": torch.cat([t.flatten().double() for t in expected])}
    assert [t.shape for t in found] == [t.shape for t in expected], what
    assert_close_to_reference(one, None, other, what=str(what), slack=slack)


def ordinary(t: object) -> bool:
    """Whether it is a tensor in memory of its own, and small."""
    strided = isinstance(t, Tensor) and t.device.type == "cpu" and t.layout is torch.strided
    if not strided or t.is_quantized or t.is_neg() or max(t.shape, default=0) > 10_000:
        return False
    return t.untyped_storage().nbytes() >= t.numel() * t.itemsize


# ---- the same values elsewhere: no mistake at all ------------------------------------------------


def sliced(t: Tensor) -> Tensor:
    """Amidst values that would be seen in any result."""
    fill = float("nan") if t.is_floating_point() else True if t.dtype is torch.bool else 2**62
    inner = t.new_full([n + 2 for n in t.shape], fill)[(slice(1, -1),) * t.dim()]
    return inner.copy_(t)


def transposed(t: Tensor) -> Tensor:
    order = list(reversed(range(t.dim())))
    return t.permute(order).contiguous().permute(order)


DISGUISES: dict[str, Callable[[Tensor], Tensor]] = {
    "sliced": sliced,
    "transposed": transposed,
    "every second": lambda t: torch.stack([t, torch.zeros_like(t)], -1)[..., 0],
    "negated": lambda t: torch._neg_view(-t) if t.is_floating_point() else t,
    "copy on write": lambda t: torch._lazy_clone(t),
}

# ---- mistakes ------------------------------------------------------------------------------------


def _resized(t: Tensor, rng: random.Random) -> Tensor:
    """Of a shape that is wrong by little."""
    d = rng.randrange(t.dim()) if t.dim() else 0
    changed: list[Callable[[], Tensor]] = [lambda: t[None], lambda: t.flatten(), lambda: t[..., None]]
    if t.dim():
        changed += [
            lambda: t[0],
            lambda: t.narrow(d, 0, rng.randrange(t.shape[d] + 1)),
            lambda: torch.cat([t] * rng.randrange(1, 4), d),
            lambda: torch.cat([t, t.narrow(d, 0, 1)], d),
            lambda: t.movedim(0, -1),
            lambda: t.new_empty([rng.choice([0, n]) for n in t.shape]),
        ]
    return rng.choice(changed)()


def _huge(t: Tensor, rng: random.Random) -> Tensor:
    """In next to no memory, or, with a size of 0, in none."""
    shape, wide = list(t.shape), rng.randrange(t.dim())
    shape[wide] = rng.choice(HUGE)
    if rng.random() < 0.3:
        return torch.empty_strided([*shape, 0][: t.dim()] if wide < t.dim() - 1 else [0, *shape[1:]], [0] * t.dim())
    return t.narrow(wide, 0, 1).expand(shape)


def _special(t: Tensor, rng: random.Random) -> Tensor:
    """One number, or all, of no use."""
    worst = [float("nan"), float("inf"), -float("inf"), 1e30, 1e-40] if t.is_floating_point() else [-1, 0, 1, 2**62]
    t, value = t.clone(), rng.choice(worst)
    if rng.random() < 0.5:
        return t.fill_(value)
    t.view(-1)[rng.randrange(t.numel())] = value
    return t


def _freed(t: Tensor, rng: random.Random) -> Tensor:
    """As FSDP leaves it."""
    if t.untyped_storage().nbytes() >= t.numel() * t.itemsize:  # else it has been, and torch would read what is gone
        t = t.clone()
        t.untyped_storage().resize_(rng.choice([0, t.untyped_storage().nbytes() // 2]))
    return t


def _of_another_kind(t: Tensor, rng: random.Random) -> Any:
    kinds: list[Callable[[], Any]] = [
        lambda: t.to("meta"),
        lambda: t.to_sparse(),
        lambda: t.to_mkldnn(),
        lambda: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
        lambda: torch.nested.nested_tensor(list(t), layout=rng.choice([torch.jagged, torch.strided])),
        lambda: torch._efficientzerotensor(t.shape, dtype=t.dtype),
        lambda: t.tolist(),
        lambda: t.numpy(),
        lambda: torch.nn.Parameter(t),
        lambda: t.clone().requires_grad_() * 1,
    ]
    return rng.choice(kinds)()


MISTAKES: dict[str, Callable[[Tensor, random.Random], Any]] = {
    "dtype": lambda t, rng: t.to(rng.choice(TYPES)),
    "resized": _resized,
    "huge": _huge,
    "repeated": lambda t, rng: t.new_ones(()).expand(t.shape),
    "overlapping": lambda t, rng: torch.as_strided(t.flatten().repeat(2), t.shape, [1] * t.dim()),
    "special": _special,
    "shifted": lambda t, rng: t + rng.choice([1, -1, 2**40]),
    "freed": _freed,
    "of another kind": _of_another_kind,
    "none": lambda t, rng: None,
    "another": lambda t, rng: t,  # of the arguments
}
KINDS = [*DISGUISES, *MISTAKES]
Mistakes = tuple[tuple[int, str, int], ...]  # which argument, what is done to it, a number that decides the rest
mistakes = st.lists(st.tuples(st.integers(0, 99), st.sampled_from(KINDS), st.integers(0, 999)), max_size=3).map(tuple)


def harmless(mistakes: Mistakes) -> bool:
    return all(kind in DISGUISES for _, kind, _ in mistakes)


def spoil(arguments: dict[str, Any], mistakes: Mistakes, options: int = 0) -> dict[str, Any]:
    """The arguments with mistakes in them; the first `options` are a module's."""
    arguments = dict(arguments)
    if any(kind == "freed" for _, kind, _ in mistakes):  # torch crashes where it copies such a tensor, or prints it
        mistakes = tuple([m for m in mistakes if m[1] == "freed"])
    for index, kind, number in mistakes:
        of_module = options > 0 and index % 4 == 0
        names = list(arguments)[:options] if of_module else list(arguments)[options:]
        name, rng = names[index % len(names)], random.Random(number)
        if kind in DISGUISES:
            arguments[name] = _disguised(arguments[name], DISGUISES[kind])
        elif of_module:
            arguments[name] = rng.choice(OPTIONS)
        else:
            arguments[name] = _spoiled(arguments[name], kind, rng, list(arguments.values()))
    return arguments


def _disguised(value: Any, disguise: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, PackedSequence):
        return value._replace(data=disguise(value.data))
    if isinstance(value, list | tuple):
        return type(value)([_disguised(v, disguise) for v in value])
    dense = isinstance(value, Tensor) and value.layout is torch.strided and not value.is_nested
    return disguise(value) if dense and not value.is_quantized else value  # no views of those: torch crashes


def _spoiled(value: Any, kind: str, rng: random.Random, others: list[Any]) -> Any:
    one = partial(_spoiled, kind=kind, rng=rng, others=others)
    if kind == "freed" and not isinstance(value, Tensor | PackedSequence | list | tuple):
        return value
    if kind == "another":
        return rng.choice(others)
    if value is None:
        return rng.choice([torch.zeros(2, 3, 4), *NUMBERS])
    if isinstance(value, PackedSequence):
        field = rng.choice(value._fields)
        return value._replace(**{field: one(getattr(value, field))})
    if isinstance(value, list | tuple) and value:
        i = rng.randrange(len(value))
        changed = [value[:i], value * rng.choice([2, 100]), type(value)(rng.sample(value, len(value)))]
        return rng.choice([*changed, *[type(value)([*value[:i], one(value[i]), *value[i + 1 :]])] * 6])
    if not isinstance(value, Tensor):
        return rng.choice(NUMBERS)
    try:
        return MISTAKES[kind](value, rng)
    except (RuntimeError, ValueError, IndexError, TypeError):
        return None  # torch does not make that


if __name__ == "__main__":
    import test_fuzz_api
    import test_fuzz_ops

    warnings.simplefilter("ignore")
    eval(Path(sys.argv[1]).read_text(), {**vars(test_fuzz_ops), **vars(test_fuzz_api)}).run()()
