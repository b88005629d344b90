"""Fused LSTM, GRU and RNN for PyTorch: drop-in replacements for the recurrent modules of torch.nn.

    import fusedrnn
    lstm = fusedrnn.LSTM(input_size=64, hidden_size=128)  # instead of torch.nn.LSTM
    fusedrnn.convert(model)                               # every torch.nn RNN inside a model
    with fusedrnn.patch(): ...                            # torch.nn.LSTM is fusedrnn.LSTM in here

Derivatives of any order work; no gradient, no memory for one.
"""

from . import flops, functional, onnx, ops, reference
from ._C import build_info, release_memory
from .cells import GRUCell, LSTMCell, RNNCell
from .convert import convert, patch
from .explanation import explain
from .migrate import convert_gru_weights, load_keras_weights, load_onnx_weights
from .modules import GRU, LSTM, RNN
from .plan import use_plan
from .profiling import profile_ranges
from .stream import Stream

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "Stream",
    "build_info",
    "convert",
    "convert_gru_weights",
    "explain",
    "functional",
    "load_keras_weights",
    "load_onnx_weights",
    "onnx",
    "ops",
    "patch",
    "profile_ranges",
    "reference",
    "release_memory",
    "use_plan",
]
__version__ = "0.1.0"

flops.register()
