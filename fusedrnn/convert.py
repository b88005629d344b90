"""Bringing fusedrnn into programs written for torch.nn: a model at a time, or by the names."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from .cells import GRUCell, LSTMCell, RNNCell
from .modules import GRU, LSTM, RNN, FusedBase

_Model = TypeVar("_Model", bound=nn.Module)

_CLASSES: tuple[type[nn.Module], ...] = (RNN, LSTM, GRU, RNNCell, LSTMCell, GRUCell)
_OURS = {cls.__name__: cls for cls in _CLASSES}
_THEIRS: dict[str, type[nn.Module]] = {name: getattr(nn, name) for name in _OURS}
_COUNTERPARTS = {_THEIRS[name]: cls for name, cls in _OURS.items()}


def convert(model: _Model) -> _Model:
    """Makes every torch.nn RNN, LSTM, GRU and cell in ``model`` ours, in place; returns ``model``.

    The module objects stay the same objects and only change class, so everything held by them or
    pointing at them goes on working: parameters (and optimizers on them), hooks, the training flag,
    buffers, other attributes, modules shared between parents, ``model`` itself if it is one.
    Parametrized ones (torch.nn.utils.parametrize) are converted and stay parametrized.

    Subclasses of torch.nn's classes are left alone, as they may depend on how their base works; so
    are scripted and quantized modules. Converting twice does nothing more.
    """
    for module in model.modules():
        ours = _counterpart(type(module))
        if ours is not None:
            module.__class__ = ours
            if isinstance(module, FusedBase):
                module._name_weights()
    return model


def _counterpart(cls: type) -> type | None:
    """Our class for exactly one of torch's, or for what parametrize derives from one."""
    if cls in _COUNTERPARTS:
        return _COUNTERPARTS[cls]
    base = cls.__base__
    if base in _COUNTERPARTS and cls.__module__ == parametrize.__name__:
        members = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
        return type(cls.__name__, (_COUNTERPARTS[base],), members)
    return None


def patch() -> Patch:
    """Makes the names ``torch.nn.LSTM``, ``GRU``, ``RNN`` and those of the three cells ours.

    For code that looks the classes up (in ``torch.nn``, ``torch.nn.modules`` or
    ``torch.nn.modules.rnn``) while the patch is on: building modules, ``isinstance`` and
    subclassing see fusedrnn's classes. Names imported earlier (``from torch.nn import LSTM``)
    and modules built earlier stay torch's own; :func:`convert` is for those. Patches nest.

    torch.compile refuses what it finds under these names, so ``torch._dynamo.config.allow_rnn`` is
    on as long as the patch is, in the thread that makes it: other threads that compile set it themselves. ::

        with fusedrnn.patch():
            model = library.build_model()

        patched = fusedrnn.patch()  # or for a whole program
        patched.undo()
    """
    return Patch()


class Patch:
    """A patch that is on, until :meth:`undo` or the end of a ``with``; torch's names come back with
    the last one."""

    _active = 0
    _allow_rnn = False  # torch._dynamo's setting before the first patch

    def __init__(self) -> None:
        import torch._dynamo.config as dynamo

        self._on = True
        if Patch._active == 0:
            Patch._allow_rnn, dynamo.allow_rnn = dynamo.allow_rnn, True
        Patch._active += 1
        _bind(_OURS)

    def undo(self) -> None:
        """Ends this patch; does nothing the second time."""
        if self._on:
            self._on = False
            Patch._active -= 1
            if Patch._active == 0:
                torch._dynamo.config.allow_rnn = Patch._allow_rnn
                _bind(_THEIRS)

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *exc: object) -> None:
        self.undo()


def _bind(classes: dict[str, type[nn.Module]]) -> None:
    for namespace in (nn, nn.modules, nn.modules.rnn):
        for name, cls in classes.items():
            setattr(namespace, name, cls)
