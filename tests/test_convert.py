"""convert(model) and patch(): bringing ours into models and programs written for torch.nn."""

import copy
import re
from pathlib import Path

import pytest
import torch
from conftest import relative_error
from torch import nn
from torch.ao.quantization import quantize_dynamic
from torch.nn.utils import parametrizations

import fusedrnn

pytestmark = pytest.mark.usefixtures("one_thread")

MIGRATION = Path(__file__).resolve().parent.parent / "docs" / "migration.md"
NAMES = ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"]
I, H, T, N = 4, 6, 5, 3


@pytest.fixture(autouse=True)
def nothing_stays_patched():
    before = {name: getattr(nn, name) for name in NAMES}
    yield
    assert {name: getattr(nn, name) for name in NAMES} == before, "a patch was left on"


def first(output):
    return output[0] if isinstance(output, tuple) else output


class Model(nn.Module):
    """Every class, nested, in containers, one of them shared and one with everything set."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, I)
        self.stack = nn.ModuleList([nn.LSTM(I, H, 2, bidirectional=True, dropout=0.1), nn.GRU(2 * H, H, bias=False)])
        self.inner = nn.ModuleDict({"rnn": nn.RNN(H, H, nonlinearity="relu")})
        self.cells = nn.ModuleList(
            [nn.LSTMCell(H, H), nn.GRUCell(H, H, bias=False), nn.RNNCell(H, H, nonlinearity="relu")]
        )
        self.projected = nn.LSTM(H, H, proj_size=3, batch_first=True)
        self.again = self.stack[1]

    def forward(self, tokens):
        x = self.embed(tokens)
        for rnn in (*self.stack, self.inner["rnn"]):
            x, _ = rnn(x)
        for cell in self.cells:
            x = torch.stack([first(cell(step)) for step in x])
        return self.projected(x)[0]


def test_convert():
    torch.manual_seed(0)
    model = Model()
    parameters = dict(model.named_parameters())
    modules = dict(model.named_modules())
    state = copy.deepcopy(model.state_dict())
    text = repr(model)
    tokens = torch.randint(9, (T, N))
    model.eval()
    expected = model(tokens)
    assert fusedrnn.convert(model) is model
    assert all(type(m).__module__.startswith("fusedrnn") for m in (*model.stack, *model.cells, model.projected))
    assert {n: id(p) for n, p in model.named_parameters()} == {n: id(p) for n, p in parameters.items()}
    assert list(dict(model.named_modules())) == list(modules)
    assert list(model.state_dict()) == list(state)
    assert repr(model) == text
    assert model.again is model.stack[1]
    assert not any(m.training for m in model.modules())
    assert relative_error(model(tokens), expected) < 1e-5
    model.load_state_dict(state)
    before = {n: type(m) for n, m in model.named_modules()}
    fusedrnn.convert(model)
    assert {n: type(m) for n, m in model.named_modules()} == before, "twice is as once"


@pytest.mark.parametrize("name", NAMES)
def test_convert_a_single_module(name):
    module = getattr(nn, name)(I, H)
    x = torch.randn(N, I) if name.endswith("Cell") else torch.randn(T, N, I)
    expected = first(module(x))
    converted = fusedrnn.convert(module)
    assert isinstance(converted, getattr(fusedrnn, name))
    assert relative_error(first(converted(x)), expected) < 1e-5


def test_convert_goes_on_training():
    """An optimizer made before, with its momentum, goes on as if nothing had happened."""
    losses = []
    tokens = torch.randint(9, (T, N), generator=torch.Generator().manual_seed(0))
    for convert in (False, True):
        torch.manual_seed(1)
        model = Model().double()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        history = []
        for step in range(8):
            if convert and step == 3:
                fusedrnn.convert(model)
            loss = (model(tokens) - 0.3).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        losses.append(history)
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert losses[0][-1] < losses[0][0]


def test_convert_keeps_what_hangs_on_a_module():
    """Hooks, buffers, attributes, requires_grad, weights left in place by a WeightDrop."""
    module = nn.LSTM(I, H)
    calls = []
    module.register_forward_hook(lambda m, a, o: calls.append("forward"))
    module.register_forward_pre_hook(lambda m, a: calls.append("pre"))
    module.register_full_backward_hook(lambda m, gi, go: calls.append("backward"))
    module.register_buffer("note", torch.ones(2))
    module.tag = "kept"
    module.bias_hh_l0.requires_grad_(False)
    module.weight_ih_l0.register_hook(lambda g: calls.append("weight"))
    module.train(False)
    fusedrnn.convert(module)
    first(module(torch.randn(T, N, I, requires_grad=True))).sum().backward()
    assert sorted(calls) == ["backward", "forward", "pre", "weight"]
    assert module.tag == "kept" and torch.equal(module.note, torch.ones(2)) and not module.training
    assert module.bias_hh_l0.grad is None and module.bias_ih_l0.grad is not None
    module.weight_hh_l0 = nn.Parameter(torch.zeros_like(module.weight_hh_l0))
    assert torch.equal(copy.deepcopy(module)(torch.ones(T, N, I))[0], module(torch.ones(T, N, I))[0])


@pytest.mark.parametrize("name", NAMES)
def test_convert_parametrized(name):
    weight = "weight_hh" if name.endswith("Cell") else "weight_hh_l0"
    module = parametrizations.weight_norm(getattr(nn, name)(I, H), weight)
    x = torch.randn(N, I) if name.endswith("Cell") else torch.randn(T, N, I)
    expected = first(module(x))
    names = [n for n, _ in module.named_parameters()]
    fusedrnn.convert(module)
    assert isinstance(module, getattr(fusedrnn, name))
    assert [n for n, _ in module.named_parameters()] == names
    y = first(module(x))
    assert relative_error(y, expected) < 1e-5
    y.sum().backward()
    assert module.parametrizations[weight].original0.grad is not None or name.endswith("Cell")


def test_convert_leaves_others_alone():
    class Mine(nn.LSTM):
        def forward(self, x, hx=None):
            return "mine"

    model = nn.Sequential(Mine(I, H), nn.Linear(2, 2), fusedrnn.GRU(I, H))
    types = [type(m) for m in model]
    fusedrnn.convert(model)
    assert [type(m) for m in model] == types
    assert model[0](None) == "mine"


@pytest.mark.parametrize("name", ["LSTM", "GRU", "LSTMCell", "GRUCell", "RNNCell"])
@pytest.mark.filterwarnings("ignore:.*quantiz")
def test_dynamic_quantization(name):
    """By itself it passes ours by; the lines of docs/migration.md quantize them as torch.nn's."""
    recipe = re.search(r"```python\n(from torch\.ao\.quantization.*?)```", MIGRATION.read_text(), re.DOTALL)
    assert recipe
    model = nn.Sequential(getattr(nn, name)(I, H))
    x = torch.randn(N, I) if name.endswith("Cell") else torch.randn(T, N, I)
    quantized = quantize_dynamic(model)
    assert type(fusedrnn.convert(copy.deepcopy(quantized))[0]) is type(quantized[0])
    fusedrnn.convert(model)
    assert isinstance(quantize_dynamic(model)[0], getattr(fusedrnn, name))
    names = {"fusedrnn": fusedrnn, "torch": torch, "model": model}
    exec(recipe[1], names)
    assert type(names["quantized"][0]) is type(quantized[0])
    assert torch.equal(first(names["quantized"](x)), first(quantized(x)))


def test_patch_as_a_context():
    before = {name: getattr(nn, name) for name in NAMES}
    old = nn.LSTM(I, H)
    with fusedrnn.patch():
        for name in NAMES:
            assert getattr(nn, name) is getattr(fusedrnn, name)
            assert getattr(nn.modules.rnn, name) is getattr(torch.nn, name)
            assert isinstance(getattr(nn, name)(I, H), getattr(fusedrnn, name))
        new = nn.LSTM(I, H, 2, bidirectional=True)
        assert isinstance(new, nn.LSTM) and isinstance(new, nn.RNNBase)
        first(old(torch.randn(T, N, I)))
    assert {name: getattr(nn, name) for name in NAMES} == before
    assert isinstance(new, fusedrnn.LSTM) and not isinstance(nn.LSTM(I, H), fusedrnn.LSTM)
    first(new(torch.randn(T, N, I))).sum().backward()


def test_patch_as_a_call():
    original = nn.GRU
    patched = fusedrnn.patch()
    assert nn.GRU is fusedrnn.GRU
    patched.undo()
    assert nn.GRU is original
    patched.undo()
    assert nn.GRU is original


def test_patches_nest():
    original = nn.RNN
    with fusedrnn.patch():
        with fusedrnn.patch():
            assert nn.RNN is fusedrnn.RNN
        assert nn.RNN is fusedrnn.RNN
    assert nn.RNN is original


def test_patch_is_undone_after_an_error():
    original = nn.LSTM
    with pytest.raises(KeyError), fusedrnn.patch():
        raise KeyError
    assert nn.LSTM is original


def test_patch_and_subclasses():
    """What pytorch-forecasting and others do: derive from torch.nn.LSTM, call super, look the class up by name."""
    with fusedrnn.patch():

        class Named(nn.LSTM):
            def __init__(self, size):
                super().__init__(size, size, batch_first=True)

            def forward(self, x, hx=None):
                y, state = super().forward(x, hx)
                return y + x, state

        module = Named(H)
    assert isinstance(module, fusedrnn.LSTM)
    theirs = nn.LSTM(H, H, batch_first=True)
    theirs.load_state_dict(module.state_dict())
    x = torch.randn(N, T, H)
    assert relative_error(module(x)[0], theirs(x)[0] + x) < 1e-5
    with fusedrnn.patch():
        built = getattr(nn, "GRU")(I, H)  # noqa: B009 - darts' way
    assert isinstance(built, fusedrnn.GRU)


def test_patched_model_loads_torch_nn_state():
    torch.manual_seed(0)
    theirs = Model().eval()
    with fusedrnn.patch():
        ours = Model().eval()
    assert isinstance(ours.projected, fusedrnn.LSTM)
    ours.load_state_dict(theirs.state_dict())
    tokens = torch.randint(9, (T, N))
    assert relative_error(ours(tokens), theirs(tokens)) < 1e-5


def test_errors_while_patched():
    """The words of errors are looked up in torch.nn, which is then ours: no endless recursion."""
    with fusedrnn.patch():
        for name in NAMES:
            with pytest.raises((RuntimeError, ValueError)):
                getattr(nn, name)(I, H)(torch.randn(T, I + 1))
            with pytest.raises((TypeError, ValueError)):
                getattr(nn, name)(I)
