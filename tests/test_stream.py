"""Stream: a step or a chunk at a time gives what the whole sequence gives, without allocation."""

import copy
import pickle
import warnings
from functools import partial

import pytest
import torch
from helpers import DTYPES, VARIANTS, layer_op, make_inputs, variant
from torch import nn
from torch.nn.utils import parametrizations, prune, remove_spectral_norm, remove_weight_norm, spectral_norm, weight_norm
from torch.profiler import ProfilerActivity, profile

import fusedrnn

pytestmark = pytest.mark.usefixtures("one_thread")

T, N, I, H = 9, 3, 5, 7


def module_of(name, device, dtype=torch.float64, **options):
    if name == "lstm_proj":
        options["proj_size"] = 3
    if name.startswith("rnn"):
        options["nonlinearity"] = name.removeprefix("rnn_")
    return getattr(fusedrnn, name.partition("_")[0].upper())(I, H, **options, device=device, dtype=dtype)


def as_tuple(state):
    return state if isinstance(state, tuple) else (state,)


def assert_same(found, expected):
    for one, other in zip(as_tuple(found), as_tuple(expected), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("batch", [1, N])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("name", VARIANTS)
def test_steps_and_chunks_make_the_sequence(name, num_layers, batch, device):
    module = module_of(name, device, num_layers=num_layers, dropout=0.5 if num_layers > 1 else 0.0)
    x = torch.randn(T, batch, I, dtype=torch.float64, device=device)
    stream = fusedrnn.Stream(module, batch)
    pieces = [stream(x[0])[None].clone(), stream(x[1])[None].clone(), stream(x[2:6]).clone(), stream(x[6:]).clone()]
    expected, state = module.eval()(x)
    torch.testing.assert_close(torch.cat(pieces), expected)
    assert_same(stream.state, state)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype, device, capability):
    module = module_of("lstm", device, dtype)
    x = torch.randn(T, N, I, dtype=dtype, device=device)
    stream = fusedrnn.Stream(module, N)
    found = torch.stack([stream(step).clone() for step in x])
    assert found.dtype == dtype
    state = None
    for step, y in zip(x, found, strict=True):
        expected, state = module(step[None], state)
        torch.testing.assert_close(y, expected[0])


def test_batch_first(device):
    module = module_of("gru", device, batch_first=True)
    x = torch.randn(N, T, I, dtype=torch.float64, device=device)
    stream = fusedrnn.Stream(module, N)
    found = torch.cat((stream(x[:, :4]).clone(), stream(x[:, 4])[:, None].clone(), stream(x[:, 5:]).clone()), 1)
    torch.testing.assert_close(found, module(x)[0])


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_state(name, device):
    module = module_of(name, device, num_layers=2)
    x = torch.randn(T, N, I, dtype=torch.float64, device=device)
    stream = fusedrnn.Stream(module, N)
    assert all(not s.any() for s in as_tuple(stream.state))
    stream(x[:5])
    kept = stream.state
    after = stream(x[5:]).clone()
    assert_same(kept, module(x[:5])[1])
    stream.state = kept
    assert torch.equal(stream(x[5:]), after)
    stream.state = kept
    stream.reset(torch.tensor([False, True, False]))
    again = stream(x[5:]).clone()
    assert torch.equal(again[:, ::2], after[:, ::2])
    torch.testing.assert_close(again[:, 1:2], module(x[5:, 1:2])[0])
    stream.reset()
    assert all(not s.any() for s in as_tuple(stream.state))
    torch.testing.assert_close(stream(x), module(x)[0])


@pytest.mark.parametrize("name", VARIANTS)
def test_a_result_may_be_the_next_input(name, device):
    """A decoder that reads what it has written, of so many units that they are computed in several turns."""
    size = 100
    options = {"proj_size": size, "hidden_size": size + 1} if name == "lstm_proj" else {"hidden_size": size}
    if name.startswith("rnn"):
        options["nonlinearity"] = name.removeprefix("rnn_")
    module = getattr(fusedrnn, name.partition("_")[0].upper())(size, **options, device=device, dtype=torch.float64)
    for shape in ((N, size), (T, N, size)):
        stream = fusedrnn.Stream(module, N)
        found = expected = torch.randn(shape, dtype=torch.float64, device=device)
        state = None
        for _ in range(3):
            found = stream(found)
            expected, state = module(expected.view(-1, N, size), state)
            torch.testing.assert_close(found, expected.view(shape))


def test_a_transposed_result_as_the_next_input(device):
    module = fusedrnn.GRU(H, H, device=device, dtype=torch.float64)
    stream = fusedrnn.Stream(module, H)
    x = torch.randn(H, H, dtype=torch.float64, device=device)
    first, state = module(x[None])
    torch.testing.assert_close(stream(stream(x).T), module(first[0].T[None], state)[0][0])


def test_trained_in_place(device):
    """The parameters are read at every call."""
    module = module_of("gru", device)
    stream = fusedrnn.Stream(module)
    x = torch.randn(1, I, dtype=torch.float64, device=device)
    before = stream(x).clone()
    with torch.no_grad():
        module.weight_ih_l0 += 1
    stream.reset()
    after = stream(x)
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, module(x[None])[0][0])
    assert not after.requires_grad


@pytest.mark.parametrize("options, shape", [({}, (N, I)), ({"batch_first": True}, (N, T, I))], ids=["step", "chunk"])
def test_backward_notices_an_overwritten_result(options, shape, device):
    """A head that is trained on results: one whose memory another call has written to has no right gradient."""
    stream = fusedrnn.Stream(module_of("lstm", device, **options), N)
    head = torch.randn(H, dtype=torch.float64, device=device, requires_grad=True)
    xs = torch.randn(2, *shape, dtype=torch.float64, device=device)
    losses = [(head * stream(x)).sum() for x in xs]
    losses[1].backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses[0].backward()
    head.grad = None
    stream.reset()
    results = [stream(x).clone() for x in xs]
    sum((head * y).sum() for y in results).backward()
    torch.testing.assert_close(head.grad, sum(y.flatten(0, -2).sum(0) for y in results))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_made_and_called_in_any_mode(mode, device):
    module = module_of("lstm", device)
    x = torch.randn(3, N, I, dtype=torch.float64, device=device)
    with mode():
        stream = fusedrnn.Stream(module, N)
        first = stream(x[0]).clone()
    hx = module(x[:1])[1]
    assert hx[0].requires_grad
    stream.state = hx
    second = stream(x[1]).clone()
    stream.reset()
    assert torch.equal(stream(x[0]), first)
    with mode():
        stream.state = hx
        assert torch.equal(stream(x[1]), second)
        stream.reset(torch.tensor([0]))
        assert not stream.state[0][:, 0].any()


def through_pickle(stream):
    return pickle.loads(pickle.dumps(stream))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, through_pickle])
@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_copies(name, copied, device):
    """A copy goes on from where the stream was, and neither sees what the other one does."""
    module = module_of(name, device, num_layers=2)
    x = torch.randn(T, N, I, dtype=torch.float64, device=device)
    stream = fusedrnn.Stream(module, N)
    stream(x[:3])
    other = copied(stream)
    assert (other.module is module) == (copied is copy.copy)
    expected = module(x)[0]
    for k in range(3, T):
        torch.testing.assert_close(stream(x[k]), expected[k])
    for k in range(3, T):
        torch.testing.assert_close(other(x[k]), expected[k])


def test_copied_with_its_module(device):
    """What is one module before is one after."""
    holder = nn.Module()
    holder.lstm = module_of("lstm", device)
    holder.stream = fusedrnn.Stream(holder.lstm)
    for copied in (copy.deepcopy, through_pickle):
        other = copied(holder)
        assert other.stream.module is other.lstm is not holder.lstm


@pytest.mark.parametrize("shape", [(1, I), (4, 1, I)], ids=["step", "chunk"])
@pytest.mark.parametrize("name", ["lstm", "gru", "rnn_tanh"])
def test_nothing_is_allocated(name, shape, device):
    if device.type != "cpu":
        pytest.skip("on a GPU it runs the forward op")
    stream = fusedrnn.Stream(module_of(name, device, torch.float32, num_layers=2))
    x = torch.randn(shape)
    y = stream(x)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        for _ in range(5):
            assert stream(x).data_ptr() == y.data_ptr()
    assert sum(event.count for event in trace.key_averages() if event.key.startswith("fusedrnn::")) == 5
    assert all(event.self_cpu_memory_usage == 0 for event in trace.key_averages())


def test_errors(device):
    lstm = module_of("lstm", device)
    with pytest.raises(TypeError, match="expected fusedrnn's LSTM, GRU or RNN, got LSTM"):
        fusedrnn.Stream(nn.LSTM(I, H))
    with pytest.raises(ValueError, match="bidirectional"):
        fusedrnn.Stream(module_of("lstm", device, bidirectional=True))
    stream = fusedrnn.Stream(lstm, N)
    x = torch.randn(N, I, dtype=torch.float64, device=device)
    with pytest.raises(RuntimeError, match=r"Expected hidden\[0\] size"):
        stream(x[:2])
    with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size. Expected 5, got 4"):
        stream(x[:, :4])
    with pytest.raises(ValueError, match="Expected input to be 2D or 3D, got 1D instead"):
        stream(x[0])
    for _ in range(2):
        with pytest.raises((ValueError, RuntimeError), match="dtype"):
            stream(x.float())
        stream(x)  # a good one between them changes nothing
    with pytest.raises(RuntimeError, match=r"Expected hidden\[1\] size"):
        stream.state = (torch.zeros(1, N, H), torch.zeros(1, N, H + 1))
    with pytest.raises(ValueError, match="argument"):
        stream.state = (torch.zeros(1, N, H),)


def test_no_sequences(device):
    for batch_size in (0, -1):
        with pytest.raises(ValueError, match=f"expected batch_size to be 1 or more, got {batch_size}"):
            fusedrnn.Stream(module_of("lstm", device), batch_size)


def test_a_module_of_another_dtype(device):
    module = module_of("lstm", device)
    stream = fusedrnn.Stream(module, N)
    x = torch.randn(T, N, I, dtype=torch.float64, device=device)
    expected = stream(x[0]).clone()
    module.float()
    for given in (x[0], x[0].float(), x.float()):  # before it, the same shape, another one
        with pytest.raises(RuntimeError, match=r"for a module of torch.float64 on .* has become torch.float32 on"):
            stream(given)
    module.double()
    stream.reset()
    torch.testing.assert_close(stream(x[0]), expected)


class Scaled(fusedrnn.LSTM):
    def forward(self, input, hx=None):
        return super().forward(2 * input, hx)


def test_a_forward_of_its_own(device):
    with pytest.raises(TypeError, match="doesn't call forward, and that of Scaled is not fusedrnn's own"):
        fusedrnn.Stream(Scaled(I, H, device=device))
    module = module_of("lstm", device)
    module.forward = lambda x: x
    with pytest.raises(TypeError, match="doesn't call forward"):
        fusedrnn.Stream(module)


def normed(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return weight_norm(module, "weight_hh_l0")


HOOKS = {
    "forward": lambda m: m.register_forward_hook(lambda m, x, y: y).remove,
    "pre-forward": lambda m: m.register_forward_pre_hook(lambda m, x: x).remove,
    "prune": lambda m: partial(prune.remove, prune.l1_unstructured(m, "weight_hh_l0", 0.5), "weight_hh_l0"),
    "weight_norm": lambda m: partial(remove_weight_norm, normed(m), "weight_hh_l0"),
    "spectral_norm": lambda m: partial(remove_spectral_norm, spectral_norm(m, "weight_hh_l0"), "weight_hh_l0"),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks(kind, device):
    """They don't run in a stream; what they computed can be made permanent."""
    module = module_of("lstm", device)
    undo = HOOKS[kind](module)
    with pytest.raises(ValueError, match="doesn't run the module's forward hooks"):
        fusedrnn.Stream(module)
    undo()
    x = torch.randn(T, 1, I, dtype=torch.float64, device=device)
    torch.testing.assert_close(fusedrnn.Stream(module)(x), module(x)[0])


def test_parametrizations(device):
    """They are evaluated at every call, and so may be trained."""
    module = parametrizations.weight_norm(module_of("lstm", device), "weight_hh_l0")
    stream = fusedrnn.Stream(module)
    x = torch.randn(T, 1, I, dtype=torch.float64, device=device)
    torch.testing.assert_close(stream(x), module(x)[0])
    with torch.no_grad():
        module.parametrizations.weight_hh_l0.original0.mul_(2)
    stream.reset()
    torch.testing.assert_close(stream(x), module(x)[0])


# ---- the ops -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"lengths": (5, 3, 3, 1)}], ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_advance_op(name, options, layers, device, capability):
    """As the forward op layer by layer, in place, to the bit; by opcheck's rules."""
    case = variant(name, **options)
    cases = [case] + [case.but(I=case.output)] * (layers - 1)
    inputs = [make_inputs(one, device, seed=k) for k, one in enumerate(cases)]
    x, batch_sizes, weights = inputs[0].x, inputs[0].batch_sizes, [w for one in inputs for w in one.weights]
    y, finals = x, []
    for one in inputs:
        y, *states = layer_op(case.cell)(y, one.h0, one.c0, one.weights, batch_sizes, 1, False)
        finals.append(states)
    h, c = torch.cat([i.h0 for i in inputs]), None if inputs[0].c0 is None else torch.cat([i.c0 for i in inputs])
    found = torch.full_like(y, 7)
    op = getattr(torch.ops.fusedrnn, f"{case.cell}_advance").default
    copies = [t if t is None else t.clone() for t in (h, c)]
    torch.library.opcheck(op, (x, *copies, weights, batch_sizes, layers, found.clone()))
    op(x, h, c, weights, batch_sizes, layers, found)
    assert torch.equal(found, y)
    assert torch.equal(h, torch.cat([states[0] for states in finals]))
    assert c is None or torch.equal(c, torch.cat([states[1] for states in finals]))


def test_advance_op_is_out_of_autograd(device):
    """It neither records nor minds that its arguments could be."""
    module = module_of("gru", device)
    x = torch.randn(T, N, I, dtype=torch.float64, device=device, requires_grad=True)
    h, y = x.new_zeros(1, N, H), x.new_empty(T, N, H)
    torch.ops.fusedrnn.gru_advance(x, h, None, list(module.parameters()), None, 1, y)
    assert not y.requires_grad
    assert not h.requires_grad
    torch.testing.assert_close(y, module(x)[0])


def test_weights_without_memory():
    module = fusedrnn.GRU(4, 6)
    module.weight_hh_l0.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="freed or made smaller"):
        fusedrnn.Stream(module)


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_advance_op_refuses(name, device):
    if device.type != "cpu":
        pytest.skip("on a GPU it runs the forward op")
    case = variant(name)
    x, h, c, weights, batch_sizes, layers = make_inputs(case, device).arguments()
    y = x.new_zeros(case.T, case.N, case.H)
    op = getattr(torch.ops.fusedrnn, f"{name}_advance").default
    wrong = [
        ({"y": y[:, :, 1:]}, "y: expected shape"),
        ({"y": y.double()}, "y: expected dtype"),
        ({"y": y.transpose(0, 1).contiguous().transpose(0, 1)}, "contiguous"),
        ({"y": y[:1].expand(y.shape)}, "contiguous"),
        ({"h": h[:, :1].expand(h.shape)}, "contiguous"),
        ({"h": h[:, 1:]}, "h0: expected shape"),
        ({"c": None} if name == "lstm" else {"c": h}, "c0?: expected"),
        ({"h": y[:1]}, "memory of their own"),
        *([({"c": h}, "memory of their own"), ({"c": y[1:2]}, "memory of their own")] if name == "lstm" else []),
        ({"layers": 0}, "layers: expected 1 or more, got 0"),
        ({"layers": 3}, "weights: expected 2 to 5 tensors for each of the 3 layers"),
        ({"layers": 2, "weights": weights * 2}, rf"w_ih: expected shape \[{weights[1].shape[0]}, {case.H}\]"),
        ({"layers": 2, "weights": [*weights, weights[1], *weights[1:]]}, r"h0: expected shape \[2, "),
    ]
    good = {"x": x, "h": h, "c": c, "weights": weights, "sizes": batch_sizes, "layers": layers, "y": y}
    for change, message in wrong:
        with pytest.raises(RuntimeError, match=message):
            op(*{**good, **change}.values())
