"""The contestants. Each builds a `Runner` for a workload or says why it can't."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .workload import Workload, arguments, class_name

OURS = "fusedrnn"
PADDED = "fusedrnn padded"  # the padded batch that a packed one stands for
RECOMPUTE = "fusedrnn recompute"  # training with recompute=True
STREAM = "fusedrnn stream"  # a step through Stream
OWN = (OURS, PADDED, RECOMPUTE, STREAM)  # never peers


@dataclass
class Runner:
    call: Callable[[], Any]
    # Takes what `call` returned; gives tensors by name, float32, in torch.nn's layout.
    outputs: Callable[[Any], dict[str, Tensor]]


class Unavailable(Exception):
    """Raised by a builder: "not installed" or "n/a"."""


Builder = Callable[[Workload, int], Runner]  # (workload, threads)


def _flatten(result: Any) -> tuple[Tensor, ...]:
    """(y, h_n) or (y, (h_n, c_n)), of a module or a cell, packed or not, to plain tensors."""
    if isinstance(result, Tensor):
        return (result,)
    if isinstance(result, PackedSequence):
        return (result.data,)
    return tuple(t for part in result for t in _flatten(part))


def torch_like(namespace: str, **options: Any) -> Builder:
    """A module from `namespace` with torch.nn's interface; `options` are attributes to set."""

    def build(work: Workload, threads: int) -> Runner:
        case = work.case
        package = importlib.import_module(namespace)
        args, kwargs = arguments(case)
        dtype = getattr(torch, case.dtype)
        if work.weights:
            dtype = next(iter(work.weights.values())).dtype
        module = getattr(package, class_name(case))(*args, **kwargs, dtype=dtype)
        module.to(work.device).load_state_dict(work.weights)
        module.train(case.training)
        for name, value in options.items():
            setattr(module, name, value)
        x, hx = work.x, work.state
        if not case.training:
            names = ("y", "h_n", "c_n") if case.mode != "cells" else ("h_n", "c_n")

            def named(result: Any) -> dict[str, Tensor]:
                return {k: v.float() for k, v in zip(names, _flatten(result), strict=False)}

            return Runner(lambda: module(x, hx), named)

        data = x.data if isinstance(x, PackedSequence) else x
        if case.mode == "penalty":
            return _penalty(module, data, hx, work.upstream[0])
        leaves = {"dx": data}
        leaves |= {f"d{name}0": h for name, h in zip("hc", work.hx, strict=False)}
        leaves |= {f"d{name}": w for name, w in module.named_parameters()}
        inputs, upstream = tuple(leaves.values()), work.upstream

        def step() -> tuple[Tensor, ...]:
            return torch.autograd.grad(_flatten(module(x, hx)), inputs, upstream)

        def gradients(found: tuple[Tensor, ...]) -> dict[str, Tensor]:
            return {name: g.float() for name, g in zip(leaves, found, strict=True)}

        return Runner(step, gradients)

    return build


def _penalty(module: torch.nn.Module, x: Tensor, hx: Any, upstream: Tensor) -> Runner:
    """A gradient penalty: the gradients of |dy/dx|^2 in the weights, y summed up with ``upstream``."""
    weights = dict(module.named_parameters())

    def step() -> tuple[Tensor, ...]:
        (slope,) = torch.autograd.grad(module(x, hx)[0], x, upstream, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), tuple(weights.values()))

    def gradients(found: tuple[Tensor, ...]) -> dict[str, Tensor]:
        return {f"d{name}": g.float() for name, g in zip(weights, found, strict=True)}

    return Runner(step, gradients)


def stream(namespace: str) -> Builder:
    """A step through `namespace`.Stream, which goes on from its own state at the next call."""

    def build(work: Workload, threads: int) -> Runner:
        case = work.case
        package = importlib.import_module(namespace)
        if not hasattr(package, "Stream"):
            raise Unavailable("n/a")
        args, kwargs = arguments(case)
        dtype = next(iter(work.weights.values())).dtype
        module = getattr(package, class_name(case))(*args, **kwargs, dtype=dtype)
        module.to(work.device).load_state_dict(work.weights)
        made = package.Stream(module.eval(), case.shape.n)
        made.state = work.state

        def named(result: Tensor) -> dict[str, Tensor]:
            states = zip(("h_n", "c_n"), _flatten(made.state), strict=False)
            return {"y": result.float(), **{name: state.float() for name, state in states}}

        return Runner(lambda: made(work.x), named)

    return build


def without_cudnn(work: Workload, threads: int) -> Runner:
    runner = torch_like("torch.nn")(work, threads)

    def call() -> Any:
        torch.backends.cudnn.enabled = False
        try:
            return runner.call()
        finally:
            torch.backends.cudnn.enabled = True

    return Runner(call, runner.outputs)


def padded(namespace: str) -> Builder:
    """The padded batch of a packed case, to see what raggedness costs per row."""

    def build(work: Workload, threads: int) -> Runner:
        case = replace(work.case, packed=False)
        upstream = work.upstream
        if upstream:
            h = upstream[0].shape[-1]
            upstream = (torch.randn(case.shape.t, case.shape.n, h).to(upstream[0]), *upstream[1:])
        plain = replace(work, case=case, x=work.padded, upstream=upstream)
        runner = torch_like(namespace)(plain, threads)
        return Runner(runner.call, lambda result: {})  # a different result: nothing to compare

    return build


def _numpy_inputs(work: Workload) -> dict[str, Any]:
    names = ("x", "initial_h", "initial_c")
    assert isinstance(work.x, Tensor)
    return {name: t.detach().float().numpy() for name, t in zip(names, (work.x, *work.hx), strict=False)}


def _onnx_model(work: Workload, module: str) -> bytes:
    """The case as an ONNX model, or Unavailable if it isn't one that `module` could run."""
    case = work.case
    if case.training or case.packed or case.mode == "cells":
        raise Unavailable("n/a")
    for needed in (module, "onnx"):
        if importlib.util.find_spec(needed) is None:
            raise Unavailable("not installed")
    from .onnx_graph import model

    return model(work)


def onnxruntime(work: Workload, threads: int) -> Runner:
    if work.case.dtype != "float32":
        raise Unavailable("n/a")
    graph = _onnx_model(work, "onnxruntime")
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    held = [ort.OrtValue.ortvalue_from_numpy(v) for v in _numpy_inputs(work).values()]
    for name, value in zip(_numpy_inputs(work), held, strict=True):
        binding.bind_ortvalue_input(name, value)
    for output in session.get_outputs():  # buffers allocated once, as a server would
        value = ort.OrtValue.ortvalue_from_shape_and_type(output.shape, "float32")
        binding.bind_ortvalue_output(output.name, value)

    def outputs(_: Any) -> dict[str, Tensor]:
        return _from_onnx(work, [torch.from_numpy(v) for v in binding.copy_outputs_to_cpu()])

    return Runner(lambda: session.run_with_iobinding(binding), outputs)


def openvino(work: Workload, threads: int) -> Runner:
    precision = {"float32": "f32", "bfloat16": "bf16"}.get(work.case.dtype)
    if precision is None:
        raise Unavailable("n/a")
    graph = _onnx_model(work, "openvino")
    import openvino as ov

    config = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": precision,
    }
    compiled = ov.Core().compile_model(ov.Core().read_model(graph), "CPU", config)
    request = compiled.create_infer_request()
    inputs = _numpy_inputs(work)
    for name, value in inputs.items():
        request.set_tensor(name, ov.Tensor(value, shared_memory=True))

    def outputs(_: Any) -> dict[str, Tensor]:
        assert inputs  # the request reads these arrays: they live as long as it does
        found = [request.get_output_tensor(i).data for i in range(len(compiled.outputs))]
        return _from_onnx(work, [torch.from_numpy(v).clone() for v in found])

    return Runner(lambda: request.infer(share_outputs=True), outputs)


def _from_onnx(work: Workload, found: list[Tensor]) -> dict[str, Tensor]:
    """ONNX's Y [T, D, N, H] and the states of each layer to torch.nn's y and h_n, c_n."""
    y, *states = (t.float() for t in found)
    layers = work.case.shape.layers
    named = {"y": y.transpose(1, 2).flatten(2)}
    for i, name in enumerate(("h_n", "c_n") if work.case.cell == "LSTM" else ("h_n",)):
        named[name] = torch.cat(states[i * layers : (i + 1) * layers])
    return named


def contestants(work: Workload, ours: str | None) -> dict[str, Builder]:
    """By name, in the order of the tables' columns. `ours` is a package, None for peers only."""
    found: dict[str, Builder] = {}
    if ours:
        found[OURS] = torch_like(ours)
        if work.case.packed:
            found[PADDED] = padded(ours)
        if work.case.mode == "training":
            found[RECOMPUTE] = torch_like(ours, recompute=True)
        if work.case.mode == "step":
            found[STREAM] = stream(ours)
    if work.device != "cuda" or work.case.mode != "penalty":  # cuDNN has no second derivatives
        found["torch"] = torch_like("torch.nn")
    if work.device == "cuda":
        found["torch, cuDNN off"] = without_cudnn
    else:
        found |= {"onnxruntime": onnxruntime, "openvino": openvino}
    return found
