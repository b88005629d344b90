"""What the package says about itself: explain, ranges and names in the profiler, build_info."""

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import fusedrnn
from fusedrnn import _C, explanation

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def ranges():
    fusedrnn.profile_ranges(True)
    yield
    fusedrnn.profile_ranges(False)


def names(run):
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        run()
    return {event.key: event.count for event in trace.key_averages()}


def test_ops_have_names(device):
    module, x = fusedrnn.GRU(4, 6, num_layers=2, device=device), torch.randn(5, 3, 4, device=device)
    found = names(lambda: module(x)[0].sum().backward())
    assert found["fusedrnn::gru"] == found["fusedrnn::gru_backward"] == 2
    assert not any("layer" in name for name in found)


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_ranges(grad, num_layers, ranges, device):
    module, x = fusedrnn.LSTM(4, 6, num_layers=num_layers, device=device), torch.randn(5, 3, 4, device=device)
    with torch.set_grad_enabled(grad):
        found = names(lambda: module(x))
    assert {name: n for name, n in found.items() if "layer" in name} == {
        f"fusedrnn lstm layer {k}": 1 for k in range(num_layers)
    }


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_ranges_of_cells(grad, ranges, device):
    cell, x, h = fusedrnn.GRUCell(4, 6, device=device), torch.randn(3, 4, device=device), torch.randn(3, 6)
    for states in ((), (h.to(device),)):
        with torch.set_grad_enabled(grad):
            found = names(lambda states=states: cell(x, *states))
        assert {name: n for name, n in found.items() if "layer" in name} == {"fusedrnn gru layer 0": 1}


def test_ranges_leave_results_alone(ranges, device):
    module, x = fusedrnn.LSTM(4, 6, device=device), torch.randn(5, 3, 4, device=device)
    found, _ = module(x)
    fusedrnn.profile_ranges(False)
    assert torch.equal(found, module(x)[0])


@pytest.mark.parametrize("threads", [1, 2])
def test_explain(threads, capability, capsys):
    torch.set_num_threads(threads)
    capability = capability or _C.cpu_capability()
    module = fusedrnn.LSTM(64, 128, num_layers=2, bidirectional=True, proj_size=32)
    first, second = fusedrnn.explain(module, (100, 16, 64))
    assert first == {
        **first, "layer": 0, "device": "cpu", "cell": "lstm", "dtype": "float32", "T": 100, "N": 16, "I": 64, "H": 128,
        "P": 32, "directions": 2, "projected": True, "capability": capability, "threads": threads,
        "max_threads": threads, "multiply_adds": 100 * 16 * 2 * 4 * 128 * 96, "packed": True,
    }  # fmt: skip
    assert first["row_groups"] * first["unit_groups"] == 1  # of the threads, one for each direction
    assert (second["layer"], second["I"]) == (1, 64)
    printed = capsys.readouterr().out
    assert "layer 0: lstm, float32, T 100, N 16, I 64, H 128, both directions, on cpu" in printed
    assert f"{capability} instructions" in printed
    assert f"{threads} of {threads}: 157,286,400 multiply-adds" in printed.splitlines()[2]
    assert ("both directions at once" in printed) == (threads == 2)


def test_explain_recompute(capsys):
    for recompute in (False, True):
        (found,) = fusedrnn.explain(fusedrnn.GRU(4, 6, recompute=recompute), (5, 2, 4))
        assert found["recompute"] == recompute
        assert ("training: by chunks" in capsys.readouterr().out) == recompute


def test_explain_small_and_large():
    torch.set_num_threads(2)
    (step,) = fusedrnn.explain(fusedrnn.GRU(8, 8), (1, 1, 8))
    assert (step["threads"], step["packed"]) == (1, False)
    (large,) = fusedrnn.explain(fusedrnn.GRU(256, 256), (100, 64, 256))
    assert large["threads"] == large["row_groups"] * large["unit_groups"] == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_explain_every_kind(name, dtype):
    module = getattr(fusedrnn, name)(4, 6, dtype=dtype, batch_first=True)
    (facts,) = fusedrnn.explain(module, (3, 7, 4))
    assert (facts["N"], facts["T"]) == (3, 7)
    (facts,) = fusedrnn.explain(module, (7, 4))
    assert (facts["N"], facts["T"]) == (1, 7)


def test_layers_of_one_op():
    layers = explanation._layers_of_one_op
    assert layers(fusedrnn.LSTM(4, 6, num_layers=3), 65) == 3
    assert layers(fusedrnn.LSTM(4, 6, num_layers=3), 64) == 1
    assert layers(fusedrnn.LSTM(4, 6, num_layers=3, bidirectional=True), 65) == 1
    assert layers(fusedrnn.LSTM(4, 6, num_layers=3, recompute=True), 65) == 1
    module = fusedrnn.LSTM(4, 6, num_layers=3, dropout=0.5)
    assert (layers(module, 65), layers(module.eval(), 65)) == (1, 3)


def test_layers_with_ranges_run_one_by_one(ranges):
    assert explanation._layers_of_one_op(fusedrnn.LSTM(4, 6, num_layers=3), 65) == 1


def test_explain_needs_no_memory_for_the_steps():
    module = fusedrnn.GRU(4, 6)
    (many,), (few,) = fusedrnn.explain(module, (2**36, 1, 4)), fusedrnn.explain(module, (2**20, 1, 4))
    for name in ("T", "multiply_adds"):
        assert many.pop(name) == 2**16 * few.pop(name)
    assert many == few


def test_explain_refuses():
    with pytest.raises(TypeError, match="fusedrnn's LSTM, GRU or RNN"):
        fusedrnn.explain(nn.LSTM(4, 6), (5, 3, 4))
    for shape in ((5, 3, 5), (4,), (0, 3, 4), (1, 5, 3, 4)):
        with pytest.raises(ValueError, match="expected the shape of an input with 4 features"):
            fusedrnn.explain(fusedrnn.LSTM(4, 6), shape)
    for shape in ((3, 2**62, 4), (2**62, 3, 4), (2**36, 2, 4)):
        with pytest.raises(ValueError, match="rows"):
            fusedrnn.explain(fusedrnn.LSTM(4, 6), shape)
    good = {"T": 1, "N": 1, "I": 1, "H": 1, "P": 1, "directions": 1, "projected": False}
    for wrong in ({"cell": "lstm", "dtype": "int8"}, {"cell": "elman", "dtype": "float32"}):
        with pytest.raises(ValueError, match="unknown"):
            _C.cpu_plan(**good, **wrong)


def test_build_info():
    info = fusedrnn.build_info()
    assert info["version"] == fusedrnn.__version__
    assert "default" in info["cpu_capabilities"]


H200 = {"processors": 132, "shared_bytes": 227 * 1024, "cluster_blocks": 16}


def on_a_gpu(facts, device=H200, layers=1):
    """What is said of a device that isn't here."""
    dtype = getattr(torch, facts["dtype"])
    shape = {name: facts[name] for name in ("N", "H", "P", "directions", "projected")}
    shape |= {"gates": 4, "element": dtype.itemsize, "tensor_cores": dtype.itemsize == 2}
    plan = lambda backward: _C.cuda_plan(**shape, **device, backward=backward, layers=layers)  # noqa: E731
    return {**facts, **explanation._cuda_plan(dtype, False, plan)}


def test_explain_a_gpu():
    facts = {"T": 100, "N": 16, "I": 512, "H": 512, "P": 512, "directions": 1, "projected": False}
    facts |= {"layer": 0, "device": "cuda:0", "cell": "lstm", "dtype": "bfloat16", "recompute": False}
    assert explanation._words(on_a_gpu(facts)) == [
        "layer 0: lstm, bfloat16, T 100, N 16, I 512, H 512, on cuda:0",
        "  math:     tensor cores",
        "  forward:  cluster, as the weights fit in a cluster; 16 x 8 x 1 blocks for 32 units, 2 rows each",
        "  backward: cluster, as the weights fit in a cluster; 16 x 8 x 1 blocks for 32 units, 2 rows each",
    ]
    assert explanation._words(on_a_gpu(facts, layers=4))[-1].endswith("8 rows each; 4 layers at the same time")
    slow = on_a_gpu({**facts, "dtype": "float32"}, {**H200, "processors": 16, "cluster_blocks": 0})
    assert slow["math"] == "multiply-adds" and slow["forward"]["name"] == "stepwise"
