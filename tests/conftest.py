"""Options, fixtures, and the one rule that says when a result is right.

A result is right when its error against the float64 reference is at most twice the error torch.nn makes at the same
dtype, plus a floor. The floors below are the only tolerances of these comparisons.
"""

from __future__ import annotations

import random

import pytest
import torch

# Error that is always allowed, relative to the largest magnitude in the float64 reference of the same tensor: a few
# roundings of the storage dtype, for the small tensors where torch.nn's own error is zero by luck.
FLOORS = {
    torch.float64: 1e-12,  # torch.nn does the very operations of the reference: its error says nothing
    torch.float32: 2e-6,
    torch.bfloat16: 1.6e-2,
    torch.float16: 2e-3,
}
FACTOR = 2.0

# Lowest first. A capability can run where the processor's own is at least as high.
CPU_CAPABILITIES = ("default", "avx2", "avx512", "avx512_bf16", "amx")


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest absolute difference, over the largest magnitude of the reference; nan counts as infinite."""
    if reference.numel() == 0:
        return 0.0
    reference = reference.double()
    difference = (value.double() - reference).abs().max().item()
    scale = reference.abs().max().item()
    if difference != difference:
        return float("inf")
    return difference / scale if scale > 0 else (0.0 if difference == 0 else float("inf"))


def assert_close_to_reference(
    ours, nn_result, float64_reference, nn_reference=None, what: str = "", slack: float = 1
) -> None:
    """Check a dict of named tensors.

    `nn_result` may be None (torch.nn can't do it): then only the floor is allowed. `nn_reference` is what torch.nn's
    error is taken against, where it isn't `float64_reference`. `slack` floors are allowed.
    """
    nn_reference = float64_reference if nn_reference is None else nn_reference
    assert set(ours) == set(float64_reference), f"{what}: results {sorted(ours)}"
    failures = []
    for name, reference in float64_reference.items():
        value = ours[name]
        assert value.shape == reference.shape, f"{what} {name}: {value.shape}, not {reference.shape}"
        # A tensor of subnormal size can't be more accurate than the spacing of subnormal numbers.
        scale = reference.abs().max().item() if reference.numel() else 0.0
        smallest = torch.finfo(value.dtype).smallest_normal / scale if scale > 0 else 0.0
        floor = slack * FLOORS[value.dtype] + smallest
        nn_error = relative_error(nn_result[name], nn_reference[name]) if nn_result is not None else 0.0
        error = relative_error(value, reference)
        if not error <= FACTOR * nn_error + floor:
            failures.append(f"{name}: error {error:.3g}, torch.nn's {nn_error:.3g}, floor {floor:.3g}")
    assert not failures, f"{what}\n  " + "\n  ".join(failures)


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="device the suite runs on (cpu, cuda, cuda:1)")
    parser.addoption("--ops", default="fusedrnn", help="torch.library namespace whose layer ops are tested")
    parser.addoption("--plan", default="", help="on a GPU, this plan and slower ones only")
    # Best a prime: the sample then meets every cell, dtype, shape and plan of a parametrised test.
    parser.addoption("--every", type=int, default=1, help="run every n-th test only")


def pytest_collection_modifyitems(config, items):
    config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % config.getoption("--every")])
    items[:] = items[:: config.getoption("--every")]


def pytest_configure(config):
    import helpers

    helpers.NAMESPACE = config.getoption("--ops")
    if plan := config.getoption("--plan"):
        from fusedrnn import _C

        _C.force_cuda_plan(plan)


# How the CUDA kernels run, fastest first; each stands for itself and a slower one where a shape is too large for it.
CUDA_PLANS = ("split", "cluster", "grid", "loop", "stepwise")


def on_cuda_kernels(config) -> bool:
    return config.getoption("--device") != "cpu" or config.getoption("--ops") != "fusedrnn"


def available_capabilities(config) -> list[str]:
    """What the op tests run under: the processor's instruction sets, highest first, or the plans on a GPU."""
    if on_cuda_kernels(config):
        return list(CUDA_PLANS[CUDA_PLANS.index(config.getoption("--plan") or CUDA_PLANS[0]) :])
    from fusedrnn import _C

    highest = CPU_CAPABILITIES.index(_C.cpu_capability())
    return list(reversed(CPU_CAPABILITIES[: highest + 1]))


def pytest_generate_tests(metafunc):
    if "capability" in metafunc.fixturenames:
        metafunc.parametrize("capability", available_capabilities(metafunc.config), indirect=True)


@pytest.fixture
def capability(request):
    """Runs the test under one instruction set, or one plan, and gives its name."""
    import fusedrnn
    from fusedrnn import _C

    if on_cuda_kernels(request.config):
        with fusedrnn.use_plan(request.param):
            yield request.param
        return
    before = _C.cpu_capability()
    _C.set_cpu_capability(request.param)
    assert _C.cpu_capability() == request.param
    yield request.param
    _C.set_cpu_capability(before)


@pytest.fixture
def device(request) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def fixed_seeds():
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def same_thread_count():
    """A test may change the number of threads; the next one doesn't see it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(same_thread_count):
    """For tests that run torch.nn: OpenMP's own barriers take seconds where something else uses the cores."""
    torch.set_num_threads(1)
