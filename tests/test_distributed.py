"""Training on two processes, checkpoints, and state that moves between torch.nn's modules and ours."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import assert_close_to_reference
from safetensors.torch import load_file, load_model, save_file, save_model
from test_gradients import MODULES, flat
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import fusedrnn

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLE = Path(__file__).resolve().parent.parent / "examples/distributed.py"


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def checkpoint(request, tmp_path_factory):
    """What two processes have trained, each of their steps' gradients compared with a single process's."""
    folder = tmp_path_factory.mktemp(request.param)
    on_gpu = request.config.getoption("--device") != "cpu"
    processes = torch.cuda.device_count() if on_gpu else 2
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += [str(EXAMPLE), "--strategy", request.param, "--device", "cuda" if on_gpu else "cpu"]
    command += [
        "--check",
        "--checkpoint",
        str(folder),
        "--steps",
        "11",
        "--batch",
        "8",
        "--length",
        "6",
        "--hidden",
        "5",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"{request.param}, {processes} processes" in done.stdout
    return folder


class Classifier(nn.Module):
    """The example's, of torch.nn's parts."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(1, 5, num_layers=2, bidirectional=True)
        self.head = nn.Linear(10, 1)


def test_two_processes_and_their_checkpoint(checkpoint):
    """It loads into one process, and there into torch.nn's modules, with the optimizer's state."""
    model = Classifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=checkpoint)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    assert optimizer.state[model.rnn.weight_hh_l1]["step"] == 11
    torch.manual_seed(0)
    at_first = fusedrnn.LSTM(1, 5, num_layers=2, bidirectional=True)
    for name, p in model.rnn.named_parameters():
        moved = (p - getattr(at_first, name)).abs()
        assert 0 < moved.max() <= 11 * 3e-3 * 1.01, name
        assert optimizer.state[p]["exp_avg"].shape == p.shape
        assert optimizer.state[p]["exp_avg"].any()


@pytest.mark.parametrize("to_torch", [True, False])
@pytest.mark.parametrize("name, options", [*MODULES, ("LSTMCell", {}), ("GRUCell", {}), ("RNNCell", {})])
def test_state_moves_to_and_from_torch(name, options, to_torch, device, tmp_path):
    """By state_dict, safetensors' two ways and a distributed checkpoint: the same names, shapes and bits."""
    layers = {} if name.endswith("Cell") else {"num_layers": 2, "bidirectional": True}
    make = lambda library: getattr(library, name)(3, 4, **layers, **options, device=device)  # noqa: E731
    libraries = (fusedrnn, nn) if to_torch else (nn, fusedrnn)
    source, saved = make(libraries[0]), tmp_path / "model.safetensors"
    expected = source.state_dict()

    def by_state_dict(target):
        target.load_state_dict(source.state_dict())

    def by_file(target):
        save_file(source.state_dict(), saved)
        target.load_state_dict(load_file(saved, device=str(device)))

    def by_model(target):
        save_model(source, str(saved))
        assert load_model(target, str(saved), device=str(device)) == (set(), [])

    def by_checkpoint(target):
        dcp.save(source.state_dict(), checkpoint_id=tmp_path / "checkpoint")
        state = target.state_dict()
        dcp.load(state, checkpoint_id=tmp_path / "checkpoint")
        target.load_state_dict(state)

    for way in (by_state_dict, by_file, by_model, by_checkpoint):
        target = make(libraries[1])
        way(target)
        found = target.state_dict()
        assert list(found) == list(expected)
        assert all(torch.equal(found[n], expected[n]) for n in expected), way.__name__


@pytest.mark.parametrize("optimizer_class", [torch.optim.Adam, torch.optim.SGD], ids=lambda c: c.__name__)
@pytest.mark.parametrize("name, options", MODULES)
def test_optimizer_state_stays_through_convert(name, options, optimizer_class, device):
    """Converted in the middle of training, a model goes on as it would have."""
    extra = {"momentum": 0.9} if optimizer_class is torch.optim.SGD else {}
    x = torch.randn(5, 2, 3, dtype=torch.float64, device=device)
    histories = []
    for convert in (False, True):
        torch.manual_seed(1)
        trained = nn.Sequential(getattr(nn, name)(3, 4, dtype=torch.float64, device=device, **options))
        optimizer = optimizer_class(trained.parameters(), lr=0.05, **extra)
        history = []
        for step in range(6):
            if convert and step == 3:
                fusedrnn.convert(trained)
                assert type(trained[0]) is getattr(fusedrnn, name)
            loss = sum(t.square().sum() for t in flat(trained(x)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        histories.append(torch.tensor(history, dtype=torch.float64))
    expected, found = ({"losses": history} for history in histories)
    assert_close_to_reference(found, None, expected)
