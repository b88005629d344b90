"""Programs written for torch.nn run unchanged on fusedrnn: `make integration`.

Each program is run three times from the same seeds: with torch.nn, under ``fusedrnn.patch()``, and with
``fusedrnn.convert`` applied to the model it has built. What it computes is the same, and fusedrnn's ops computed it.
"""

from __future__ import annotations

import random
import sys
import types
from collections import Counter
from contextlib import nullcontext
from importlib import metadata

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

import fusedrnn

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

# Several steps of training, in float32: each goes on from the rounding errors of the last.
TOLERANCE = 1e-4
N = 4


def needs_cuda(package):
    """PyPI's torchvision and torchaudio hold libraries that load beside a CUDA build of torch only."""
    try:
        return torch.version.cuda is None and "+cpu" not in metadata.version(package)
    except metadata.PackageNotFoundError:
        return False


# The programs import both and use none of their kernels: stand-ins for what loads and registers them.
if needs_cuda("torchvision"):
    sys.modules["torchvision._meta_registrations"] = types.ModuleType("_meta_registrations")
if needs_cuda("torchaudio"):
    extension = sys.modules["torchaudio._extension"] = types.ModuleType("_extension")
    extension._IS_TORCHAUDIO_EXT_AVAILABLE = False
    extension.fail_if_no_align = lambda function: function


class Calls(TorchDispatchMode):
    """Counts fusedrnn's ops by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "fusedrnn":
            self.counts[op._opname] += 1
        return op(*args, **(kwargs or {}))


def run(program, how, *arguments):
    """What the program gives, by name, and the calls of our ops; `how` is torch.nn, patch or convert.

    Every recurrent module that runs is of torch.nn, or every one is ours.
    """
    owners = set()

    def note_owner(module, inputs):
        if isinstance(module, nn.RNNBase | nn.RNNCellBase):
            owners.add(type(module).__module__.split(".")[0])

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    with (
        Calls() as calls,
        register_module_forward_pre_hook(note_owner),
        fusedrnn.patch() if how == "patch" else nullcontext(),
    ):
        found = program(fusedrnn.convert if how == "convert" else lambda model: model, *arguments)
    assert owners == {"torch" if how == "torch.nn" else "fusedrnn"}
    return found, calls.counts


def check(program, how, *arguments, cell):
    expected, none = run(program, "torch.nn", *arguments)
    found, calls = run(program, how, *arguments)
    assert not none
    assert calls[cell] > 0 and calls[f"{cell}_backward"] > 0, calls
    assert set(found) == set(expected)
    errors = {name: relative_error(found[name], expected[name]) for name in expected}
    assert max(errors.values()) < TOLERANCE, errors


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def values(model):
    return {name: t.clone() for name, t in model.state_dict().items() if t.is_floating_point()}


both_ways = pytest.mark.parametrize("how", ["patch", "convert"])


# ---- PyTorch's examples/word_language_model ------------------------------------------------------


class LanguageModel(nn.Module):
    def __init__(self, rnn_type, ntoken, ninp, nhid, nlayers, dropout=0.5, tie_weights=False):
        super().__init__()
        self.rnn_type, self.nhid, self.nlayers, self.ntoken = rnn_type, nhid, nlayers, ntoken
        self.drop = nn.Dropout(dropout)
        self.encoder = nn.Embedding(ntoken, ninp)
        if rnn_type in ["LSTM", "GRU"]:
            self.rnn = getattr(nn, rnn_type)(ninp, nhid, nlayers, dropout=dropout)
        else:
            nonlinearity = {"RNN_TANH": "tanh", "RNN_RELU": "relu"}[rnn_type]
            self.rnn = nn.RNN(ninp, nhid, nlayers, nonlinearity=nonlinearity, dropout=dropout)
        self.decoder = nn.Linear(nhid, ntoken)
        if tie_weights:
            self.decoder.weight = self.encoder.weight

    def forward(self, input, hidden):
        output, hidden = self.rnn(self.drop(self.encoder(input)), hidden)
        decoded = self.decoder(self.drop(output)).view(-1, self.ntoken)
        return F.log_softmax(decoded, dim=1), hidden

    def init_hidden(self, bsz):
        weight = next(self.parameters())
        zeros = weight.new_zeros(self.nlayers, bsz, self.nhid)
        return (zeros, zeros.clone()) if self.rnn_type == "LSTM" else zeros


def repackage_hidden(h):
    return h.detach() if isinstance(h, torch.Tensor) else tuple(repackage_hidden(v) for v in h)


def word_language_model(prepare, rnn_type):
    ntoken, bptt = 20, 7
    corpus = torch.randint(ntoken, (4 * bptt + 1, N))
    model = prepare(LanguageModel(rnn_type, ntoken, 12, 12, 2, dropout=0.2, tie_weights=True))
    criterion = nn.NLLLoss()
    losses = []
    for _ in range(2):
        model.train()
        hidden = model.init_hidden(N)
        for i in range(0, len(corpus) - 1, bptt):
            data, targets = corpus[i : i + bptt], corpus[i + 1 : i + 1 + bptt].reshape(-1)
            model.zero_grad()
            hidden = repackage_hidden(hidden)
            output, hidden = model(data, hidden)
            loss = criterion(output, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25)
            for p in model.parameters():
                p.data.add_(p.grad, alpha=-2.0)
            losses.append(loss.detach())
    model.eval()
    with torch.no_grad():
        output, _ = model(corpus[:-1], model.init_hidden(N))
    return {"losses": torch.stack(losses), "output": output, **values(model)}


@both_ways
@pytest.mark.parametrize("rnn_type", ["LSTM", "GRU", "RNN_TANH", "RNN_RELU"])
def test_word_language_model(how, rnn_type):
    check(word_language_model, how, rnn_type, cell=rnn_type.lower())


# ---- sb3-contrib: RecurrentPPO -------------------------------------------------------------------


def recurrent_ppo(prepare, policy_kwargs):
    from sb3_contrib import RecurrentPPO

    settings = {"n_steps": 32, "batch_size": 32, "n_epochs": 2, "seed": 0, "device": "cpu"}
    agent = RecurrentPPO("MlpLstmPolicy", "CartPole-v1", policy_kwargs=policy_kwargs, **settings)
    prepare(agent.policy)
    agent.learn(96)
    env, states, starts, actions = agent.get_env(), None, np.ones(1, dtype=bool), []
    observation = env.reset()
    for _ in range(20):
        action, states = agent.predict(observation, state=states, episode_start=starts, deterministic=True)
        observation, _, starts, _ = env.step(action)
        actions.append(torch.from_numpy(action))
    return {
        "actions": torch.stack(actions),
        "h": torch.from_numpy(states[0]),
        "c": torch.from_numpy(states[1]),
        **values(agent.policy),
    }


@both_ways
@pytest.mark.parametrize("shared", [False, True])
def test_recurrent_ppo(how, shared):
    pytest.importorskip("sb3_contrib")
    kwargs = {
        "lstm_hidden_size": 16,
        "shared_lstm": shared,
        "enable_critic_lstm": not shared,
        "n_lstm_layers": 1 + shared,
    }
    check(recurrent_ppo, how, kwargs, cell="lstm")


# ---- fastai: AWD-LSTM, its hidden-to-hidden weights plain tensors behind a WeightDropout ---------


def awd_lstm(prepare):
    from fastai.text.all import (
        AWD_LSTM,
        CrossEntropyLossFlat,
        DataLoaders,
        Learner,
        LMDataLoader,
        awd_lstm_lm_config,
        get_language_model,
        perplexity,
        rnn_cbs,
    )

    texts = [torch.randint(2, 30, (40,)) for _ in range(8)]
    loaders = [LMDataLoader(texts, bs=N, seq_len=10, shuffle=False, device=torch.device("cpu")) for _ in range(2)]
    model = get_language_model(AWD_LSTM, 30, {**awd_lstm_lm_config, "emb_sz": 12, "n_hid": 16})
    prepare(model)
    learner = Learner(
        DataLoaders(*loaders), model, loss_func=CrossEntropyLossFlat(), cbs=rnn_cbs(alpha=2, beta=1), metrics=perplexity
    )
    with learner.no_bar(), learner.no_logging():
        learner.fit(2, 0.01)
    return {"record": torch.tensor(learner.recorder.values), **values(model)}


@both_ways
def test_awd_lstm(how):
    pytest.importorskip("fastai.text.all")
    check(awd_lstm, how, cell="lstm")


# ---- darts: RNNModel -----------------------------------------------------------------------------


def rnn_model(prepare, name):
    from darts import TimeSeries
    from darts.models import RNNModel
    from pytorch_lightning import Callback

    class Prepare(Callback):
        def on_fit_start(self, trainer, module):
            prepare(module)

    series = TimeSeries.from_values(np.sin(np.arange(60) / 4).astype(np.float32))
    trainer = {
        "callbacks": [Prepare()],
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    settings = {"hidden_dim": 8, "n_rnn_layers": 2, "dropout": 0.1, "batch_size": 16, "random_state": 0}
    model = RNNModel(8, model=name, training_length=12, pl_trainer_kwargs=trainer, **settings)
    model.fit(series, epochs=2)  # where darts builds the network
    forecast = torch.from_numpy(model.predict(10, verbose=False).values())
    return {"forecast": forecast, **values(model.model)}


@both_ways
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_rnn_model(how, name):
    pytest.importorskip("darts.models.forecasting.rnn_model")
    check(rnn_model, how, name, cell={"RNN": "rnn_tanh"}.get(name, name.lower()))


# ---- open-unmix ----------------------------------------------------------------------------------


def open_unmix(prepare):
    from openunmix.model import OpenUnmix, Separator

    targets = {name: OpenUnmix(nb_bins=129, nb_channels=2, hidden_size=16, nb_layers=3) for name in ("vocals", "drums")}
    separator = prepare(Separator(targets, niter=1, n_fft=256, n_hop=64, nb_channels=2))
    audio = torch.randn(2, 2, 4096)
    spectrogram = separator.complexnorm(separator.stft(audio))
    for model in targets.values():
        model.input_mean.requires_grad_(False)  # the batch norm behind it takes it away again: its gradient is noise
        F.mse_loss(model(spectrogram), spectrogram / 2).backward()
    found = gradients(separator)
    separator.freeze()
    with torch.no_grad():
        return {"estimates": separator(audio), **found}


def test_open_unmix():
    """It imports the name (from torch.nn import LSTM), so this is a case for convert."""
    pytest.importorskip("openunmix")
    check(open_unmix, "convert", cell="lstm")


# ---- speechbrain ---------------------------------------------------------------------------------


def speech_layer(prepare, name):
    from speechbrain.nnet import RNN

    layer = prepare(getattr(RNN, name)(10, input_size=6, num_layers=2, bidirectional=True, dropout=0.1))
    x = torch.randn(N, 9, 6, requires_grad=True)
    y, h_n = layer(x, lengths=torch.tensor([1.0, 0.4, 0.8, 0.7]))
    state = h_n if isinstance(h_n, tuple) else (h_n,)
    (y.square().sum() + sum(s.square().sum() for s in state)).backward()
    return {"y": y.detach(), "dx": x.grad, **gradients(layer)}


def speech_decoder(prepare, name):
    from speechbrain.nnet.RNN import AttentionalRNNDecoder

    decoder = prepare(AttentionalRNNDecoder(name, "content", 7, 5, 2, enc_dim=6, input_size=4))
    outputs, attention = decoder(torch.randn(N, 5, 4), torch.randn(N, 9, 6), torch.tensor([1.0, 0.4, 0.8, 0.7]))
    outputs.square().sum().backward()
    return {"outputs": outputs.detach(), "attention": attention.detach(), **gradients(decoder)}


@both_ways
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_speechbrain_layers(how, name):
    pytest.importorskip("speechbrain")
    check(speech_layer, how, name, cell={"RNN": "rnn_relu"}.get(name, name.lower()))


@both_ways
@pytest.mark.parametrize("name", ["lstm", "gru", "rnn"])
def test_speechbrain_cells(how, name):
    pytest.importorskip("speechbrain")
    check(speech_decoder, how, name, cell={"rnn": "rnn_relu"}.get(name, name))


# ---- opacus, which asks for exactly torch.nn's classes -------------------------------------------


def private_step(parameters):
    """A step on the gradients of the entries of a batch, clipped, without noise."""
    from opacus.optimizers import DPOptimizer

    sgd = torch.optim.SGD(parameters, lr=1.0)
    DPOptimizer(sgd, noise_multiplier=0.0, max_grad_norm=0.5, expected_batch_size=N).step()


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_opacus(name, monkeypatch):
    """Both ways of docs/migration.md: replaced by opacus' layer, or per-sample gradients of ours by torch.func."""
    pytest.importorskip("opacus")
    from opacus import GradSampleModule
    from opacus.validators import ModuleValidator, gru, lstm, register_module_fixer, register_module_validator

    monkeypatch.setattr(ModuleValidator, "VALIDATORS", dict(ModuleValidator.VALIDATORS))
    monkeypatch.setattr(ModuleValidator, "FIXERS", dict(ModuleValidator.FIXERS))
    model = nn.ModuleDict({"rnn": getattr(fusedrnn, name)(3, 5, batch_first=True)})
    x = torch.randn(N, 6, 3)

    for ours, theirs in ((fusedrnn.LSTM, lstm), (fusedrnn.GRU, gru)):
        register_module_validator(ours)(theirs.validate)
        register_module_fixer(ours)(theirs.fix)
    assert len(ModuleValidator.validate(model)) == 1
    fixed = ModuleValidator.fix(model)
    assert not ModuleValidator.validate(fixed)
    wrapped = GradSampleModule(fixed["rnn"], loss_reduction="sum")
    wrapped(x)[0].square().sum().backward()
    private_step(wrapped.parameters())

    def loss(parameters, sample):
        return torch.func.functional_call(model["rnn"], parameters, sample[None])[0].square().sum()

    parameters = dict(model["rnn"].named_parameters())
    with Calls() as calls:
        samples = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    assert calls.counts[f"{name.lower()}_backward"] > 0
    for weight, parameter in parameters.items():
        parameter.grad_sample = samples[weight]
    private_step(parameters.values())
    expected = fixed["rnn"].state_dict()
    assert max(relative_error(p, expected[weight]) for weight, p in parameters.items()) < TOLERANCE
