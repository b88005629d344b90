"""lengths=, reset= and nested tensors, against torch.nn on each piece of each sequence and against packing."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from conftest import assert_close_to_reference
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fusedrnn

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS = {
    "lstm": ("LSTM", {}),
    "lstm_proj": ("LSTM", {"proj_size": 3}),
    "gru": ("GRU", {}),
    "rnn": ("RNN", {"nonlinearity": "tanh"}),
}
T, N, I, H = 9, 5, 4, 6
LENGTHS = torch.tensor([4, 9, 0, 1, 9])


def resets(t: int = T, n: int = N) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    reset = torch.rand(t, n, generator=generator) < 0.3
    reset[0, 0], reset[0, 1] = True, False
    return reset


def models(name, dtype, device, **options):
    """Ours, and torch.nn's with the same weights at the same dtype and in float64."""
    kind, more = MODELS[name]
    theirs = getattr(nn, kind)(I, H, **more, **options, device=device, dtype=dtype)
    ours = getattr(fusedrnn, kind)(I, H, **more, **options, device=device, dtype=dtype)
    exact = getattr(nn, kind)(I, H, **more, **options, device=device, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    exact.load_state_dict(theirs.state_dict())
    return ours, theirs, exact


def initial_states(module, batch, dtype, device):
    rows = module.num_layers * (2 if module.bidirectional else 1)
    h = torch.randn(rows, batch, module.proj_size or H, dtype=dtype, device=device)
    c = torch.randn(rows, batch, H, dtype=dtype, device=device)
    return (h, c) if module.mode == "LSTM" else (h,)


def by_pieces(module, x, states, lengths, reset):
    """torch.nn on every piece of every sequence: ``y [T, N, F]`` and the states. What each direction carries
    from piece to piece is nothing; it has the given state in its first piece and leaves its state in the last."""
    directions = 2 if module.bidirectional else 1
    outputs, finals = [], [[] for _ in states]
    for n in range(x.shape[1]):
        length = int(lengths[n])
        cuts = [0, *(t for t in range(1, length) if reset[t, n]), length] if length else [0]
        kept = [s[:, n : n + 1].clone() for s in states]
        pieces = []
        for k, (start, end) in enumerate(pairwise(cuts)):
            begins = [torch.zeros_like(s[:, n : n + 1]) for s in states]
            for d in range(directions):
                here = (k == 0 and not reset[0, n]) if d == 0 else end == length
                for begin, s in zip(begins, states, strict=True):
                    begin[d::directions] = s[d::directions, n : n + 1] * here
            hx = tuple(begins) if len(begins) == 2 else begins[0]
            y, ends = module(x[start:end, n : n + 1], hx)
            pieces.append(y)
            for d in range(directions):
                if end == length if d == 0 else k == 0:
                    for keep, s in zip(kept, ends if isinstance(ends, tuple) else (ends,), strict=True):
                        keep[d::directions] = s[d::directions]
        width = directions * (module.proj_size or H)
        pieces.append(x.new_zeros(x.shape[0] - length, 1, width))
        outputs.append(torch.cat(pieces))
        for final, keep in zip(finals, kept, strict=True):
            final.append(keep)
    return torch.cat(outputs, 1), [torch.cat(f, 1) for f in finals]


def differentiated(run, module, x, states):
    """Every result of ``run(x, states) -> (y, finals)``, and the gradients of a fixed function of all of them."""
    x, states = x.detach().requires_grad_(), [s.detach().requires_grad_() for s in states]
    y, finals = run(x, states)
    results = {"y": y, **{f"state{k}": s for k, s in enumerate(finals)}}
    generator = torch.Generator().manual_seed(7)
    loss = sum((t * torch.randn(t.shape, generator=generator).to(t)).sum() for t in results.values())
    sources = [x, *states, *module.parameters()]
    gradients = torch.autograd.grad(loss, sources)
    return {k: t.detach() for k, t in results.items()} | {f"d{k}": g for k, g in enumerate(gradients)}


def check(name, device, lengths, reset, dtype=torch.float32, batch_first=False, **options):
    ours, theirs, exact = models(name, dtype, device, **options)
    ours.batch_first = batch_first
    x = torch.randn(T, N, I, dtype=dtype, device=device)
    states = initial_states(ours, N, dtype, device)
    all_lengths = torch.full((N,), T) if lengths is None else lengths
    no_reset = torch.zeros(T, N, dtype=torch.bool) if reset is None else reset

    def run(x, states):
        swap = (lambda t: t.transpose(0, 1)) if batch_first else (lambda t: t)
        hx = tuple(states) if len(states) == 2 else states[0]
        given = {"lengths": lengths, "reset": None if reset is None else swap(reset.to(device))}
        y, finals = ours(swap(x), hx, **given)
        return swap(y), finals if isinstance(finals, tuple) else (finals,)

    found = differentiated(run, ours, x, states)
    peers = []
    for peer, d in ((theirs, dtype), (exact, torch.float64)):
        pieces = partial(by_pieces, peer, lengths=all_lengths, reset=no_reset)
        peers.append(differentiated(pieces, peer, x.to(d), [s.to(d) for s in states]))
    assert_close_to_reference(found, *peers)
    padding = torch.arange(T)[:, None] >= all_lengths
    assert not found["y"][padding.to(device)].any()
    assert not found["d0"][padding.to(device)].any()


@pytest.mark.parametrize("reset", [False, True], ids=["", "reset"])
@pytest.mark.parametrize("lengths", [False, True], ids=["full", "lengths"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["", "bidirectional"])
@pytest.mark.parametrize("name", MODELS)
def test_every_piece_is_a_sequence(name, bidirectional, lengths, reset, device):
    options = {"bidirectional": bidirectional, "num_layers": 2}
    check(name, device, LENGTHS if lengths else None, resets() if reset else None, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype, device):
    check("lstm", device, LENGTHS, resets(), dtype)


def test_batch_first(device):
    check("gru", device, LENGTHS, resets(), batch_first=True, bidirectional=True)


@pytest.mark.parametrize("bidirectional", [False, True], ids=["", "bidirectional"])
@pytest.mark.parametrize("name", MODELS)
def test_lengths_are_packing(name, bidirectional, device):
    """To the bit, with dropout between the layers too: the same rows in the same order."""
    lengths = torch.tensor([9, 7, 4, 2, 1])
    ours, *_ = models(name, torch.float32, device, bidirectional=bidirectional, num_layers=2, dropout=0.5)
    x = torch.randn(T, N, I, device=device)
    torch.manual_seed(5)
    packed, finals = ours(pack_padded_sequence(x, lengths))
    expected, _ = pad_packed_sequence(packed)
    torch.manual_seed(5)
    found, found_finals = ours(x, lengths=lengths)
    assert torch.equal(found, expected)
    assert all(torch.equal(a, b) for a, b in zip(found_finals, finals, strict=True))


@pytest.mark.parametrize(
    "lengths",
    [LENGTHS, LENGTHS.int(), LENGTHS.to(torch.uint8), LENGTHS.tolist(), LENGTHS.repeat_interleave(2)[::2]],
    ids=["int64", "int32", "uint8", "list", "strided"],
)
def test_kinds_of_lengths(lengths, device):
    module = fusedrnn.GRU(I, H, device=device)
    x = torch.randn(T, N, I, device=device)
    expected = module(x, lengths=LENGTHS)
    for given in (lengths, lengths.to(device)) if isinstance(lengths, Tensor) else (lengths,):
        for found, value in zip(module(x, lengths=given), expected, strict=True):
            assert torch.equal(found, value)


@pytest.mark.parametrize("hx", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize("name", MODELS)
def test_nothing_but_padding(name, hx, device):
    """All lengths 0: zeros, the states as they were, zero gradients."""
    ours, *_ = models(name, torch.float32, device, bidirectional=True)
    x = torch.randn(T, N, I, device=device, requires_grad=True)
    states = initial_states(ours, N, torch.float32, device)
    given = (tuple(states) if len(states) == 2 else states[0]) if hx else None
    y, finals = ours(x, given, lengths=[0] * N)
    finals = finals if isinstance(finals, tuple) else (finals,)
    assert not y.any()
    for final, state in zip(finals, states, strict=True):
        assert torch.equal(final, state if hx else torch.zeros_like(state))
    y.sum().backward()
    assert not x.grad.any()
    assert all(not p.grad.any() for p in ours.parameters())


def test_no_sequence(device):
    """An empty list says nothing of its dtype."""
    y, h_n = fusedrnn.GRU(I, H, device=device)(torch.randn(T, 0, I, device=device), lengths=[])
    assert y.shape == (T, 0, H)
    assert h_n.shape == (1, 0, H)


def test_a_reset_before_the_first_step_drops_the_given_state(device):
    module = fusedrnn.GRU(I, H, device=device)
    x, h = torch.randn(T, N, I, device=device), torch.randn(1, N, H, device=device, requires_grad=True)
    reset = torch.zeros(T, N, dtype=torch.bool, device=device)
    reset[0, 1] = True
    y, h_n = module(x, h, reset=reset)
    assert torch.equal(y[:, 1:2], module(x[:, 1:2])[0])
    (gradient,) = torch.autograd.grad(y.sum() + h_n.sum(), h)
    assert not gradient[:, 1].any()
    assert gradient[:, 0].any()


def test_single_sequence(device):
    """Unbatched input: a length without dimensions, or one in a list; a reset for each step."""
    module = fusedrnn.LSTM(I, H, device=device)
    x, reset = torch.randn(T, I, device=device), resets()[:, 0].to(device)
    y, (h, c) = module(x, lengths=torch.tensor(6), reset=reset)
    expected, (h_n, c_n) = module(x[:, None], lengths=[6], reset=reset[:, None])
    assert torch.equal(y, expected[:, 0])
    assert torch.equal(h, h_n[:, 0])
    assert torch.equal(c, c_n[:, 0])
    assert torch.equal(module(x, lengths=[6], reset=reset)[0], y)
    with pytest.raises(RuntimeError, match=r"Expected lengths size \[1\], got \[2\]"):
        module(x, lengths=[6, 6])


@pytest.mark.parametrize("bidirectional", [False, True], ids=["", "bidirectional"])
@pytest.mark.parametrize("name", MODELS)
def test_derivatives_of_both_orders(name, bidirectional, device):
    ours, *_ = models(name, torch.float64, device, bidirectional=bidirectional)
    x = torch.randn(3, 2, I, dtype=torch.float64, device=device, requires_grad=True)
    states = [s.requires_grad_() for s in initial_states(ours, 2, torch.float64, device)]
    reset = torch.tensor([[False, False], [True, False], [False, True]])

    def run(x, *states):
        y, finals = ours(x, states if len(states) == 2 else states[0], lengths=[3, 2], reset=reset)
        return y, *(finals if isinstance(finals, tuple) else (finals,))

    assert gradcheck(run, (x, *states))
    assert gradgradcheck(run, (x, *states))


def test_autocast(device):
    module = fusedrnn.LSTM(I, H, num_layers=2, device=device)
    x = torch.randn(T, N, I, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        y, (h, c) = module(x, initial_states(module, N, torch.float32, device), lengths=LENGTHS, reset=resets())
    assert y.dtype == h.dtype == c.dtype == torch.bfloat16


def test_functional(device):
    for kind in ("lstm", "gru", "rnn"):
        module = getattr(fusedrnn, kind.upper())(I, H, device=device)
        x = torch.randn(T, N, I, device=device)
        function = getattr(fusedrnn.functional, kind)
        found = function(x, list(module.parameters()), lengths=LENGTHS, reset=resets())
        expected = module(x, lengths=LENGTHS, reset=resets())
        assert torch.equal(found[0], expected[0])


# ---- nested tensors ------------------------------------------------------------------------------


def jagged(sequences, **options):
    return torch.nested.nested_tensor(sequences, layout=torch.jagged, **options)


@pytest.mark.parametrize("bidirectional", [False, True], ids=["", "bidirectional"])
@pytest.mark.parametrize("name", MODELS)
def test_nested(name, bidirectional, device):
    """Each sequence alone, in float64, with all gradients."""
    lengths = (4, 9, 1, 7)
    ours, _, exact = models(name, torch.float64, device, bidirectional=bidirectional, num_layers=2)
    sequences = [torch.randn(t, I, dtype=torch.float64, device=device) for t in lengths]
    states = initial_states(ours, len(lengths), torch.float64, device)
    hx = tuple(states) if len(states) == 2 else states[0]
    x = jagged(sequences, requires_grad=True)
    y, finals = ours(x, hx)
    assert y.layout == torch.jagged
    assert y.shape[:2] == x.shape[:2]
    pieces = [s.clone().requires_grad_() for s in sequences]
    expected = [
        exact(s, tuple(h[:, n] for h in states) if len(states) == 2 else hx[:, n]) for n, s in enumerate(pieces)
    ]
    (grad,) = torch.autograd.grad(y.values().square().sum(), x)
    grads = torch.autograd.grad(sum(e[0].square().sum() for e in expected), pieces)
    for n, (e, e_finals) in enumerate(expected):
        torch.testing.assert_close(y[n], e)
        torch.testing.assert_close(grad[n], grads[n])
        for f, ef in zip(
            finals if len(states) == 2 else (finals,), e_finals if len(states) == 2 else (e_finals,), strict=True
        ):
            torch.testing.assert_close(f[:, n], ef)


def test_nested_output_fits_its_input(device):
    """The same ragged structure, so that a residual connection can be added."""
    module = fusedrnn.GRU(H, H, device=device)
    x = jagged([torch.randn(t, H, device=device) for t in (3, 5)])
    y, _ = module(x)
    torch.testing.assert_close((x + y)[1], x[1] + y[1])


def test_nested_with_holes(device):
    """A nested view of a padded tensor: rows between the sequences belong to none."""
    module = fusedrnn.GRU(I, H, device=device)
    padded = torch.randn(3, T, I, device=device)
    x = torch.nested.narrow(padded, 1, 0, torch.tensor([4, 2, 9], device=device), layout=torch.jagged)
    y, h_n = module(x)
    module.batch_first = True
    expected, expected_h = module(padded, lengths=[4, 2, 9])
    for n, t in enumerate((4, 2, 9)):
        assert torch.equal(y[n], expected[n, :t])
    assert torch.equal(h_n, expected_h)


def test_nested_with_an_empty_sequence(device):
    module = fusedrnn.GRU(I, H, device=device)
    sequences = [torch.randn(t, I, device=device) for t in (3, 0, 5)]
    h = torch.randn(1, 3, H, device=device)
    y, h_n = module(jagged(sequences), h)
    assert y[1].shape == (0, H)
    assert torch.equal(h_n[:, 1], h[:, 1])


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lengths": [1, 2]}, RuntimeError, r"Expected lengths size \[5\], got \[2\]"),
        ({"lengths": [[1], [2], [3], [4], [5]]}, RuntimeError, r"Expected lengths size \[5\], got \[5, 1\]"),
        ({"lengths": [1, 2, 3, 4, 10]}, RuntimeError, r"Expected lengths from 0 to 9, got \[1, 2, 3, 4, 10\]"),
        ({"lengths": [1, 2, 3, -4, 1]}, RuntimeError, "Expected lengths from 0 to 9"),
        ({"lengths": torch.ones(5)}, TypeError, "expected lengths to be integers, got torch.float32"),
        ({"lengths": torch.ones(5, dtype=torch.bool)}, TypeError, "expected lengths to be integers, got torch.bool"),
        ({"reset": torch.zeros(T, N)}, TypeError, "expected reset to be a bool tensor, got torch.float32"),
        ({"reset": [False]}, TypeError, "expected reset to be a bool tensor, got list"),
        ({"reset": torch.zeros(N, T, dtype=torch.bool)}, RuntimeError, r"Expected reset size \[9, 5\], got \[5, 9\]"),
    ],
    ids=str,
)
def test_errors(options, error, message, device):
    x = torch.randn(T, N, I, device=device)
    for kind in (fusedrnn.LSTM, fusedrnn.GRU):
        with pytest.raises(error, match=message):
            kind(I, H, device=device)(x, **options)


def test_only_padded_input_has_lengths(device):
    module = fusedrnn.GRU(I, H, device=device)
    packed = pack_padded_sequence(torch.randn(T, N, I, device=device), [9, 7, 4, 2, 1])
    for input in (packed, jagged([torch.randn(3, I, device=device)])):
        for options in ({"lengths": [1]}, {"reset": resets()}):
            with pytest.raises(ValueError, match="are for padded input"):
                module(input, **options)


def test_a_nested_tensor_of_another_layout(device):
    module = fusedrnn.GRU(I, H, device=device)
    x = jagged([torch.randn(3, I, device=device), torch.randn(5, I, device=device)])
    strided = torch.nested.nested_tensor([torch.randn(3, I, device=device)])
    for wrong in (x.transpose(1, 2), strided):
        with pytest.raises(ValueError, match="jagged"):
            module(wrong)
    with pytest.raises(RuntimeError, match="input_size"):
        fusedrnn.GRU(I + 1, H, device=device)(x)
