"""What hooks into autograd: hooks on saved tensors, checkpoints, anomaly mode."""

import warnings

import pytest
import torch
from test_gradients import MODULES, flat, make_modules
from test_transforms import assert_same
from torch import nn
from torch.autograd import grad
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import fusedrnn

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name, options", MODULES)
def test_gradients_are_the_same_bits(name, options, packed, device):
    """Under checkpointing, hooks on saved tensors and anomaly detection."""
    options = {"input_size": 3, "hidden_size": 4, "num_layers": 2, "bidirectional": True, **options}
    module, _ = make_modules(name, **options)
    module.to(device)
    x = torch.randn(5, 2, 3, device=device)
    if packed:
        x = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3])).data

    def run(x):
        sequence = nn.utils.rnn.PackedSequence(x, torch.tensor([2, 2, 2, 1, 1])) if packed else x
        y, *states = flat(module(sequence))
        return (y.data if packed else y, *states)

    def gradients(run):
        leaf = x.clone().requires_grad_()
        leaves = [leaf, *module.parameters()]
        module.zero_grad()
        sum(t.sin().sum() for t in run(leaf)).backward()
        return [t.grad for t in leaves]

    def hooked(x):
        with saved_tensors_hooks(lambda t: (t.device, t.cpu().clone()), lambda pair: pair[1].to(pair[0])):
            return run(x)

    def on_cpu(x):
        with save_on_cpu():
            return run(x)

    def anomalous(x):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with torch.autograd.detect_anomaly():
                return run(x)

    ways = {
        "checkpoint": lambda x: checkpoint(run, x, use_reentrant=False),
        "reentrant checkpoint": lambda x: checkpoint(run, x, use_reentrant=True),
        "hooks": hooked,
        "save_on_cpu": on_cpu,
        "anomaly": anomalous,
    }
    expected = gradients(run)
    for way, f in ways.items():
        assert all(torch.equal(a, b) for a, b in zip(gradients(f), expected, strict=True)), way


@pytest.mark.parametrize("name", ["LSTM", "GRUCell"])
def test_hooks_that_cast(name, device):
    """They get floating-point tensors alone: batch_sizes, of packed input and of a cell's step, are no others."""
    module = getattr(fusedrnn, name)(3, 4, device=device)
    x = torch.randn(2, 3, device=device)
    given = (x, x.new_zeros(2, 4)) if name.endswith("Cell") else (nn.utils.rnn.PackedSequence(x, torch.tensor([1, 1])),)

    def gradients(kept):
        with saved_tensors_hooks(lambda t: t.to(kept), lambda t: t.float()):
            y = tree_leaves(module(*given))[0]
        return grad(y.sum(), list(module.parameters()))

    for found, expected in zip(gradients(torch.float16), gradients(torch.float32), strict=True):
        torch.testing.assert_close(found, expected, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("name, options", MODULES)
def test_second_order_in_checkpoints_and_hooks(name, options, device):
    module, _ = make_modules(name, input_size=3, hidden_size=4, dtype=torch.float64, device=device, **options)
    leaves = [torch.randn(4, 2, 3, dtype=torch.float64, device=device, requires_grad=True), *module.parameters()]

    def penalty(run):
        loss = sum(t.pow(3).sum() for t in run(leaves[0]))
        return grad(sum(g.pow(2).sum() for g in grad(loss, leaves, create_graph=True)), leaves)

    expected = penalty(lambda x: flat(module(x)))
    assert_same(penalty(lambda x: checkpoint(lambda x: flat(module(x)), x, use_reentrant=False)), expected)
    with save_on_cpu():
        assert_same(penalty(lambda x: flat(module(x))), expected)


def test_anomaly_names_the_layer(device):
    """A NaN gradient is found, and traced to the forward call."""
    module = fusedrnn.LSTM(3, 4, device=device)
    with torch.no_grad():
        module.weight_hh_l0[0, 0] = torch.inf
    with pytest.warns(UserWarning, match="Anomaly"), torch.autograd.detect_anomaly():
        y, _ = module(torch.randn(5, 2, 3, device=device))
        with pytest.raises(RuntimeError, match="'LayerBackward' returned nan"):
            y.sum().backward()
