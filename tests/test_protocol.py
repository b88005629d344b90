"""What a torch.nn.Module is besides its forward: construction, state, copies, pickles, and weights read by name."""

import copy
import inspect
import io
import itertools
import pickle

import pytest
import torch
from conftest import relative_error
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize

import fusedrnn

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = [("LSTM", {}), ("LSTM", {"proj_size": 2}), ("GRU", {}), ("RNN", {}), ("RNN", {"nonlinearity": "relu"})]
CELLS = [("LSTMCell", {}), ("GRUCell", {}), ("RNNCell", {}), ("RNNCell", {"nonlinearity": "relu"})]
I, H, T, N = 4, 6, 5, 3


def build(library, name, seed=0, **options):
    torch.manual_seed(seed)
    return getattr(library, name)(I, H, **options)


def example(name):
    return torch.randn(N, I) if name.endswith("Cell") else torch.randn(T, N, I)


def first(output):
    return output[0] if isinstance(output, tuple) else output


LAYER_OPTIONS = [
    dict(zip(("num_layers", "bias", "batch_first", "bidirectional", "dropout"), values, strict=True))
    for values in itertools.product((1, 3), (True, False), (True, False), (True, False), (0.0, 0.25))
    if values[0] > 1 or values[4] == 0
]


@pytest.mark.parametrize("name, kind", LAYERS)
def test_construction(name, kind):
    """Same seed, same weights and names; same repr and attributes; and the generator left in the same state."""
    for options in LAYER_OPTIONS:
        ours, theirs = build(fusedrnn, name, **options, **kind), None
        after = torch.rand(1)
        theirs = build(nn, name, **options, **kind)
        assert torch.equal(after, torch.rand(1))
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
        assert repr(ours) == repr(theirs)
        for attribute in theirs.__constants__:
            assert getattr(ours, attribute) == getattr(theirs, attribute)
        assert ours.__constants__ == theirs.__constants__
        assert ours._flat_weights_names == theirs._flat_weights_names
        assert ours._all_weights == theirs._all_weights
        assert [[w.shape for w in ws] for ws in ours.all_weights] == [
            [w.shape for w in ws] for ws in theirs.all_weights
        ]
        assert getattr(ours, "nonlinearity", None) == getattr(theirs, "nonlinearity", None)


@pytest.mark.parametrize("name, kind", CELLS)
def test_cell_construction(name, kind):
    for bias in (True, False):
        ours, theirs = (build(library, name, bias=bias, **kind) for library in (fusedrnn, nn))
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
        assert repr(ours) == repr(theirs)
        assert ours.__constants__ == theirs.__constants__
        assert set(vars(theirs)) <= set(vars(ours))


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"])
def test_has_all_that_torch_nn_has(name):
    ours, theirs = getattr(fusedrnn, name), getattr(nn, name)
    public = {a for a in dir(theirs) if not a.startswith("__")}
    assert public <= set(dir(ours)) | {"__jit_unused_properties__"}
    assert ours.__name__ == name
    assert issubclass(ours, nn.RNNCellBase if name.endswith("Cell") else nn.RNNBase)
    added = {p.name for p in inspect.signature(ours.forward).parameters.values() if p.kind is p.KEYWORD_ONLY}
    kept = [p for p in inspect.signature(ours.forward).parameters if p not in added]
    assert kept == [*inspect.signature(theirs.forward).parameters]
    for method in (
        "check_forward_args",
        "permute_hidden",
        "get_expected_hidden_size",
        "check_input",
        "check_hidden_size",
    ):
        if hasattr(theirs, method):
            mine, other = (inspect.signature(getattr(c, method)) for c in (ours, theirs))
            assert [*mine.parameters] == [*other.parameters]


@pytest.mark.parametrize("name, kind", LAYERS + CELLS)
def test_state_dict_both_ways(name, kind):
    """Trained here and loaded there, the same from then on."""
    options = {} if name.endswith("Cell") else {"num_layers": 2, "bidirectional": True}
    x = example(name)
    for source, target in ((nn, fusedrnn), (fusedrnn, nn)):
        a, b = build(source, name, seed=1, **options, **kind), build(target, name, seed=2, **options, **kind)
        for step in range(3):
            for module in (a, b):
                optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
                optimizer.zero_grad()
                first(module(x)).square().sum().backward()
                optimizer.step()
            if step == 0:
                assert str(b.load_state_dict(a.state_dict())) == "<All keys matched successfully>"
        assert relative_error(first(a(x)), first(b(x))) < 1e-5
    buffer = io.BytesIO()
    torch.save(a.state_dict(), buffer)
    buffer.seek(0)
    b.load_state_dict(torch.load(buffer, weights_only=True))


@pytest.mark.parametrize("name, kind", LAYERS + CELLS)
def test_copies_and_pickles(name, kind):
    module = build(fusedrnn, name, **kind)
    x = example(name)
    expected = first(module(x))
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    copies = {
        "deepcopy": copy.deepcopy(module),
        "pickle": pickle.loads(pickle.dumps(module)),
        "torch.save": torch.load(buffer, weights_only=False),
        "copy of a copy": copy.deepcopy(pickle.loads(pickle.dumps(module))),
    }
    for how, other in copies.items():
        assert type(other) is type(module), how
        assert torch.equal(first(other(x)), expected), how
        assert all(p is not q for p, q in zip(other.parameters(), module.parameters(), strict=True)), how
        with torch.no_grad():
            for p in other.parameters():
                p.zero_()
        assert not first(other(x)).any(), f"{how}: reads its own weights"
    assert torch.equal(first(module(x)), expected)
    shallow = copy.copy(module)
    assert torch.equal(first(shallow(x)), expected)
    assert all(p is q for p, q in zip(shallow.parameters(), module.parameters(), strict=True))


@pytest.mark.parametrize("name, kind", LAYERS + CELLS)
def test_pickle_has_no_more_than_torch_nns(name, kind):
    """A restricted unpickler that is told of the class takes the module."""
    globals_in = []
    for namespace in (fusedrnn, torch.nn):
        buffer = io.BytesIO()
        torch.save(build(namespace, name, **kind), buffer)
        buffer.seek(0)
        found = torch.serialization.get_unsafe_globals_in_checkpoint(buffer)
        globals_in.append({path.rpartition(".")[2] for path in found})
    assert globals_in[0] == globals_in[1]


def test_deepcopy_after_a_forward_and_weight_changes():
    """The issue of weights held outside of the parameters: a copy must not share them."""
    module = build(fusedrnn, "LSTM")
    x = example("LSTM")
    first(module(x)).sum().backward()
    module.weight_hh_l0 = nn.Parameter(torch.zeros_like(module.weight_hh_l0))
    other = copy.deepcopy(module)
    assert torch.equal(first(other(x)), first(module(x)))
    with torch.no_grad():
        module.weight_ih_l0.zero_()
    assert not torch.equal(first(other(x)), first(module(x)))


@pytest.mark.parametrize("name, kind", LAYERS)
def test_state_of_torch_nn_becomes_ours(name, kind):
    """__setstate__ takes what torch.nn's modules of this and of old versions left."""
    theirs = build(nn, name, num_layers=2, bidirectional=True, **kind)
    x = example(name)
    for drop in ((), ("proj_size",)):
        state = {k: v for k, v in theirs.__getstate__().items() if k not in drop or kind.get("proj_size")}
        ours = getattr(fusedrnn, name).__new__(getattr(fusedrnn, name))
        ours.__setstate__(copy.deepcopy(state))
        assert relative_error(first(ours(x)), first(theirs(x))) < 1e-5


# ---- weights by name -----------------------------------------------------------------------------


@pytest.mark.parametrize("name, kind", LAYERS + CELLS)
def test_functional_call(name, kind):
    module, other = build(fusedrnn, name, seed=0, **kind), build(fusedrnn, name, seed=1, **kind)
    x = example(name)
    replaced = {n: p.detach().clone().requires_grad_() for n, p in other.named_parameters()}
    y = first(functional_call(module, replaced, x))
    assert torch.equal(y, first(other(x)))
    y.sum().backward()
    assert all(t.grad is not None for t in replaced.values())
    assert all(p.grad is None for p in module.parameters())
    some = dict(list(replaced.items())[:1])
    assert not torch.equal(first(functional_call(module, some, x)), y)


class WeightDrop(nn.Module):
    """As in the AWD-LSTM: the recurrent weight is a plain tensor, made anew from a raw parameter at each call."""

    def __init__(self, module, by):
        super().__init__()
        self.module, self.by = module, by
        raw = module.weight_hh_l0
        self.raw = nn.Parameter(raw.detach().clone())
        del module._parameters["weight_hh_l0"]

    def forward(self, x):
        dropped = nn.functional.dropout(self.raw, 0.5, self.training)
        if self.by == "setattr":
            self.module.weight_hh_l0 = dropped
        else:
            self.module.__dict__["weight_hh_l0"] = dropped
            if hasattr(self.module, "_flat_weights"):  # what such code does by hand for torch.nn
                index = self.module._flat_weights_names.index("weight_hh_l0")
                self.module._flat_weights[index] = dropped
        return self.module(x)


@pytest.mark.parametrize("by", ["setattr", "dict"])
@pytest.mark.parametrize("name, kind", LAYERS)
def test_weight_drop(name, kind, by):
    x = example(name)
    results = []
    for library in (fusedrnn, nn):
        model = WeightDrop(build(library, name, **kind), by)
        outputs = []
        for _ in range(3):
            torch.manual_seed(len(outputs))
            y = first(model(x))
            (gradient,) = torch.autograd.grad(y.square().sum(), model.raw)
            outputs += [y.detach(), gradient]
        results.append(outputs)
    for a, b in zip(*results, strict=True):
        assert relative_error(a, b) < 1e-5
    assert not torch.equal(results[0][0], results[0][2]), "another mask, another result"


@pytest.mark.parametrize("name, kind", LAYERS + CELLS)
def test_replaced_parameters(name, kind):
    """delattr and setattr, .data, in-place changes and load_state_dict are all seen by the next call."""
    weight = "weight_hh" if name.endswith("Cell") else "weight_hh_l0"
    ours, theirs = build(fusedrnn, name, **kind), build(nn, name, **kind)
    x = example(name)

    def replace(m):
        setattr(m, weight, nn.Parameter(getattr(m, weight).detach() * 0.5))

    def delete_and_register(m):
        value = getattr(m, weight).detach() * 3
        delattr(m, weight)
        m.register_parameter(weight, nn.Parameter(value))

    def set_data(m):
        getattr(m, weight).data = getattr(m, weight).data.clone().mul_(0.3)

    def in_place(m):
        with torch.no_grad():
            getattr(m, weight).sub_(0.01)

    for change in (replace, delete_and_register, set_data, in_place):
        for module in (ours, theirs):
            change(module)
        states = () if not name.endswith("Cell") else (torch.ones(N, H),)
        states = ((states[0], states[0]),) if name == "LSTMCell" else states
        assert relative_error(first(ours(x, *states)), first(theirs(x, *states))) < 1e-5, change.__name__


PARAMETRIZATIONS = {
    "weight_norm": parametrizations.weight_norm,
    # every read of the weight is a power iteration, and torch.nn reads it more often: let them converge
    "spectral_norm": lambda m, n: parametrizations.spectral_norm(m, n, n_power_iterations=100),
    "orthogonal": parametrizations.orthogonal,
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("how", PARAMETRIZATIONS)
@pytest.mark.parametrize("name, kind", LAYERS + CELLS)
def test_parametrizations(name, kind, how):
    weight = "weight_hh" if name.endswith("Cell") else "weight_hh_l0"
    x = example(name)
    results = []
    for library in (fusedrnn, nn):
        module = build(library, name, **kind)
        torch.manual_seed(1)
        module = PARAMETRIZATIONS[how](module, weight)
        outputs = []
        for _ in range(2):
            states = () if not name.endswith("Cell") else (torch.ones(N, H),)
            states = ((states[0], states[0]),) if name == "LSTMCell" else states
            y = first(module(x, *states))
            module.zero_grad()
            y.square().sum().backward()
            gradients = {n: p.grad for n, p in module.named_parameters()}
            outputs.append((y.detach(), gradients))
            torch.optim.SGD(module.parameters(), lr=0.1).step()
        results.append(outputs)
    for (y, gradients), (nn_y, nn_gradients) in zip(*results, strict=True):
        assert relative_error(y, nn_y) < 1e-4
        assert gradients.keys() == nn_gradients.keys()
        for n, g in nn_gradients.items():
            assert (gradients[n] is None) == (g is None), n
            assert g is None or relative_error(gradients[n], g) < 1e-4, n
    if hasattr(module, "parametrizations"):
        assert parametrize.is_parametrized(module, weight)


def test_tied_weights():
    """Both directions, and two modules, on the same Parameter: its gradient is the sum."""
    results = []
    for library in (fusedrnn, nn):
        module = build(library, "GRU", bidirectional=True, dtype=torch.float64)
        other = build(library, "GRU", seed=1, dtype=torch.float64)
        module.weight_hh_l0_reverse = module.weight_hh_l0
        other.weight_hh_l0 = module.weight_hh_l0
        assert len(list(module.parameters())) == 7
        x = torch.randn(T, N, I, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        (first(module(x)).square().sum() + first(other(x)).square().sum()).backward()
        results.append([p.grad for p in (*module.parameters(), *other.parameters())])
    for a, b in zip(*results, strict=True):
        assert relative_error(a, b) < 1e-12


# ---- moving and converting -----------------------------------------------------------------------


@pytest.mark.parametrize("name, kind", LAYERS + CELLS)
def test_to_dtype_and_device(name, kind, device):
    module = build(fusedrnn, name, **kind)
    for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.float32):
        assert module.to(dtype) is module
        y = first(module.to(device)(example(name).to(device, dtype)))
        assert y.dtype == dtype and y.device == device
    if not name.endswith("Cell"):
        assert module.flatten_parameters() is None
    module.share_memory()
    first(module(example(name).to(device)))


@pytest.mark.parametrize("name, kind", LAYERS + CELLS)
def test_meta_device(name, kind):
    """Built without memory, shapes computed without memory, then given weights."""
    for how in ("argument", "context", "to"):
        with torch.device("meta" if how == "context" else "cpu"):
            module = build(fusedrnn, name, **kind, **({"device": "meta"} if how == "argument" else {}))
        module = module.to("meta") if how == "to" else module
        y = first(module(example(name).to("meta")))
        assert y.device.type == "meta" and y.shape == first(build(fusedrnn, name, **kind)(example(name))).shape
        module = module.to_empty(device="cpu")
        source = build(fusedrnn, name, **kind)
        module.load_state_dict(source.state_dict())
        x = example(name)
        assert torch.equal(first(module(x)), first(source(x)))
    with torch.device("meta"):
        module = build(fusedrnn, name, **kind)
    module.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(first(module(x)), first(source(x)))


@pytest.mark.parametrize("name, kind", LAYERS + CELLS)
def test_hooks_and_flags(name, kind):
    module = build(fusedrnn, name, **kind)
    seen = []
    module.register_forward_pre_hook(lambda m, args: seen.append("before"))
    module.register_forward_hook(lambda m, args, output: seen.append("after"))
    module.register_full_backward_hook(lambda m, gi, go: seen.append("backward"))
    x = example(name).requires_grad_()
    first(module(x)).sum().backward()
    assert seen == ["before", "after", "backward"]
    assert not module.eval().training and module.train().training
    module.requires_grad_(False)
    assert not first(module(example(name))).requires_grad
