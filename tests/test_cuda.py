"""What only the CUDA kernels have: plans, TF32, launches of many steps, streams and graphs."""

import ctypes
import itertools

import helpers
import pytest
import torch
from conftest import FLOORS, on_cuda_kernels, relative_error
from helpers import (
    VARIANTS,
    assert_same_bits,
    forward_ours,
    in_float64,
    layer_backward_op,
    layer_op,
    make_gradients,
    make_inputs,
    needs_of,
    ours,
    ragged_lengths,
    variant,
)

import fusedrnn
from fusedrnn import _C, explanation

TF32_FLOOR = 4e-3  # a few roundings to 10 bits of mantissa, relative to the largest value

H200 = {"processors": 132, "shared_bytes": 227 * 1024, "cluster_blocks": 16}
NO_CLUSTERS = {**H200, "cluster_blocks": 0}
A100 = {"processors": 108, "shared_bytes": 163 * 1024, "cluster_blocks": 0}


@pytest.fixture
def cuda_kernels(request):
    if not on_cuda_kernels(request.config):
        pytest.skip("needs --device cuda, or the CUDA kernels built for the CPU")


def plan(N, H, device=H200, cell_gates=4, directions=1, element=2, tensor_cores=True, backward=False, P=0, **options):
    shape = {"N": N, "H": H, "P": P or H, "projected": P > 0, "directions": directions, "gates": cell_gates}
    shape |= {"backward": backward, "element": element, "tensor_cores": tensor_cores}
    return _C.cuda_plan(**shape, **device, **options)


def test_a_cluster_has_the_weights_where_they_fit():
    for N, H, blocks, columns in (
        (1, 512, 16, 2),
        (16, 768, 16, 2),  # as few batch entries to a cluster as there is room for
        (32, 512, 16, 4),
        (64, 512, 16, 8),
        (128, 256, 8, 8),
        (5, 100, 7, 2),
    ):
        for backward in (False, True):
            found = plan(N, H, backward=backward)
            assert found["name"] == "cluster", found
            assert (found["blocks"], found["columns"]) == ((blocks, -(-N // columns), 1), columns)
            assert found["units"] * (blocks - 1) < H <= found["units"] * blocks
            assert found["shared_bytes"] <= H200["shared_bytes"]


def test_weights_stay_on_the_chip_where_they_fit():
    for N, H in ((1, 512), (4, 512), (16, 768), (64, 512), (128, 256), (16, 1024), (128, 1024), (16, 2048)):
        for backward in (False, True):
            found = plan(N, H, NO_CLUSTERS, backward=backward)
            assert found["name"] == "grid", found
            blocks = found["blocks"]
            assert blocks[0] * 16 >= H and blocks[1] * found["columns"] >= N
            assert blocks[0] * blocks[1] * blocks[2] <= H200["processors"]
            assert found["shared_bytes"] <= H200["shared_bytes"]


def test_blocks_divide_k_where_a_step_has_many_gradients():
    for N, H, gates, blocks in ((16, 2048, 4, 128), (128, 1024, 4, 64), (64, 1000, 4, 64), (64, 1024, 3, 64)):
        found = plan(N, H, cell_gates=gates, backward=True)
        assert found["name"] == "split" and "too large for a cluster" in found["reason"], found
        assert found["blocks"][0] == blocks and found["shared_bytes"] <= H200["shared_bytes"]
        assert plan(N, H, cell_gates=gates)["name"] == "grid"
        assert plan(N, H, NO_CLUSTERS, cell_gates=gates, backward=True)["name"] == "grid"
    assert plan(16, 1024, backward=True)["name"] == "grid"
    with fusedrnn.use_plan("split"):
        assert plan(16, 1024, backward=True)["name"] == "split"
        assert plan(16, 2048, backward=True, directions=2)["name"] == "stepwise"
        found = plan(8, 1041, backward=True, directions=2)  # 34 clusters of 4 are too many
        assert (found["name"], found["blocks"]) == ("split", (66, 1, 2))
        for options, reason in (
            ({"backward": False}, "only the backward pass"),
            ({"device": NO_CLUSTERS}, "no clusters"),
            ({"N": 64, "H": 2048}, "don't fit on the chip"),
            ({"element": 4, "tensor_cores": False}, "only tensor cores"),
        ):
            found = plan(**{"N": 8, "H": 1024, "backward": True, **options})
            assert found["name"] in ("grid", "loop") and reason in found["reason"], found


def test_slower_plans_say_why():
    found = plan(16, 1024)
    assert found["name"] == "grid" and "too large for a cluster; the weights fit on the chip" in found["reason"]
    found = plan(128, 512)
    assert found["name"] == "grid" and "16 clusters of 11 blocks are too many" in found["reason"]
    found = plan(16, 512, NO_CLUSTERS)
    assert found["name"] == "grid" and "the device has no clusters" in found["reason"]
    found = plan(16, 512, P=100)
    assert found["name"] == "grid" and "a cluster has no projection" in found["reason"]
    found = plan(64, 2048)
    assert found["name"] == "loop" and "shared memory" in found["reason"]
    found = plan(16, 768, element=4, tensor_cores=False)
    assert found["name"] == "loop" and found["reason"] == "only tensor cores' weights stay on the chip"
    found = plan(1000, 4096)
    assert found["name"] == "stepwise" and "132 processors" in found["reason"]
    assert plan(64, 1024, A100)["name"] == "loop"


def test_layers_run_at_the_same_time_where_their_clusters_do():
    for (N, H, layers), together, blocks in (
        ((16, 512, 3), 3, 16),
        ((16, 512, 4), 4, 11),  # four of larger clusters would leave too little for the projections
        ((16, 512, 6), 3, 16),
        ((32, 512, 4), 2, 11),
        ((32, 256, 4), 4, 6),
        ((64, 512, 4), 1, 16),  # already a layer fills the device
        ((16, 768, 4), 2, 16),
        ((16, 1024, 4), 1, 64),  # not of a cluster
    ):
        for backward in (False, True):
            found = plan(N, H, backward=backward, layers=layers)
            assert (found["together"], found["blocks"][0]) == (together, blocks), found
            if together > 1:
                assert found["name"] == "cluster" and blocks * -(-N // 8) * together <= H200["processors"] * 3 / 4
    assert plan(16, 512, NO_CLUSTERS, layers=4)["together"] == 1
    for name, together in {"grid": 1, "loop": 1, "stepwise": 1, "cluster": 4}.items():
        with fusedrnn.use_plan(name):
            assert plan(64, 512, layers=4)["together"] == together


def test_every_shape_has_a_plan_that_fits():
    for device in (H200, A100, {"processors": 1, "shared_bytes": 99 * 1024, "cluster_blocks": 8}):
        for N in (1, 7, 8, 9, 64, 65, 1000):
            for H in (0, 1, 7, 100, 4096):
                for element, tensor_cores in ((2, True), (4, True), (4, False), (8, False)):
                    for gates in (1, 3, 4):
                        for backward in (False, True):
                            found = plan(N, H, device, gates, 2, element, tensor_cores, backward)
                            assert found["shared_bytes"] <= device["shared_bytes"], (N, H, found)
                            assert found["blocks"][1] * found["columns"] >= N
                            if found["name"] != "stepwise":
                                assert found["blocks"][0] * found["blocks"][1] * 2 <= device["processors"]


def test_a_plan_can_be_forced():
    for name in ("grid", "loop", "stepwise"):
        with fusedrnn.use_plan(name):
            assert plan(16, 512)["name"] == name
            assert plan(1000, 4096)["name"] == "stepwise"
    with fusedrnn.use_plan("cluster"):
        assert plan(16, 512)["name"] == plan(1000, 512)["name"] == "cluster"
        assert plan(1000, 4096)["name"] == "stepwise"
    expected = r"plan 'cluser' is unknown: expected stepwise, loop, grid, split, cluster or ''"
    with pytest.raises(ValueError, match=expected), fusedrnn.use_plan("cluser"):
        pass
    assert plan(16, 512)["name"] == "cluster"


@pytest.mark.usefixtures("cuda_kernels")
@pytest.mark.parametrize("name", VARIANTS)
def test_tf32(name, device, capability):
    # Weights in shared memory beside those in registers: of a cluster, and of a grid with many rows.
    large = {"gru": [(2, 3, 4, 304)], "lstm": [(2, 40, 4, 150)]}.get(name, [])
    for T, N, I, H in [(5, 3, 9, 7), (6, 20, 8, 40), *large]:
        case = variant(name, T=T, N=N, I=I, H=H, directions=2 if H < 100 else 1)
        inputs, gradients = make_inputs(case, device), make_gradients(case, device)
        outputs = layer_op(case.cell)(*inputs.arguments(), True, True)
        y, h_n, _, gates, cells = outputs
        backward = layer_backward_op(case.cell)
        upstream = [*gradients[:3], None]
        dx, dh0, _, dweights = backward(*upstream, *inputs.arguments(), y, gates, cells, needs_of(inputs), True)
        found = {"y": y, "h_n": h_n, "dx": dx, "dh0": dh0, **{f"d{i}": d for i, d in enumerate(dweights)}}
        expected = in_float64(case, inputs, gradients, y)
        for what, value in found.items():
            assert relative_error(value, expected[what]) < TF32_FLOOR, (str(case), what)
        exact = forward_ours(case, inputs)["y"]
        assert not torch.equal(y, exact), "TF32 made no difference"


@pytest.mark.usefixtures("cuda_kernels")
@pytest.mark.parametrize("torch_too", [False, True])
def test_tf32_of_the_products(device, torch_too, monkeypatch):
    """A step from a zero state multiplies nothing but x and W_ih, and backward for dx and dW_ih."""
    if device.type == "cuda":
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", torch_too)
    elif torch_too:
        pytest.skip("needs --device cuda")
    case = variant("gru", T=1, N=64, I=128, H=32, directions=2)  # of sizes that suit tensor cores
    inputs, gradients = make_inputs(case, device), make_gradients(case, device)
    inputs.h0.zero_()
    y, _, _, gates, cells = layer_op("gru")(*inputs.arguments(), True, True)
    exact = in_float64(case, inputs, gradients, y)
    upstream = [*gradients[:3], None]
    found = layer_backward_op("gru")(*upstream, *inputs.arguments(), y, gates, cells, needs_of(inputs), True)
    dx, _, _, dweights = found
    for what, value in {"y": y, "dx": dx, "dw_ih": dweights[0]}.items():
        error = relative_error(value, exact[what.replace("dw_ih", "d0")])
        assert 2e-5 < error < TF32_FLOOR, f"{what}: {error:.3g}"


@pytest.mark.usefixtures("cuda_kernels")
@pytest.mark.parametrize("strides", ["expanded", "transposed", "one row", "one input"])
def test_tf32_of_any_strides(strides, device):
    options = {"one row": {"T": 1, "N": 1}, "one input": {"I": 1}}.get(strides, {})
    case = variant("lstm_proj", **{"T": 3, "N": 4, "I": 5, "H": 6, **options})
    inputs, gradients = make_inputs(case, device), make_gradients(case, device)
    if strides == "expanded":
        inputs.x = inputs.x[:1, :1].expand(inputs.x.shape)
    elif strides == "transposed":
        inputs.x = inputs.x.transpose(1, 2).contiguous().transpose(1, 2)
        inputs.weights = [w.t().contiguous().t() if w.dim() == 2 else w for w in inputs.weights]
    y, _, _, gates, cells = layer_op("lstm")(*inputs.arguments(), True, True)
    expected = in_float64(case, inputs, gradients, y)
    upstream = [*gradients[:3], None]
    dx, _, _, dweights = layer_backward_op("lstm")(
        *upstream, *inputs.arguments(), y, gates, cells, needs_of(inputs), True
    )
    for what, value in {"y": y, "dx": dx, **{f"d{i}": d for i, d in enumerate(dweights)}}.items():
        assert relative_error(value, expected[what]) < TF32_FLOOR, what


@pytest.mark.usefixtures("cuda_kernels")
@pytest.mark.parametrize("name", VARIANTS)
def test_plans_agree(name, device):
    """To the last bit where they differ only in launches and in where weights are; clusters have orders of their own.

    Of 48 rows, three clusters at least run one after another.
    """
    for options in ({"T": 5, "N": 48}, {"lengths": ragged_lengths(11, 9)}):
        for dtype in (torch.float32, torch.bfloat16):
            case = variant(name, I=6, H=37, directions=2, dtype=dtype, **options)
            inputs, gradients = make_inputs(case, device), make_gradients(case, device)
            found = []
            for forced in ("grid", "loop", "stepwise", "cluster", "split"):
                with fusedrnn.use_plan(forced):
                    found.append(ours(case, inputs, gradients))
            assert_same_bits(found[0], found[1], str(case))
            assert_same_bits(found[0], found[2], str(case))
            if name != "rnn_relu":  # its derivative jumps
                for other, (what, value) in itertools.product(found[3:], found[0].items()):
                    assert relative_error(other[what], value) <= FLOORS[dtype], (str(case), what)


@pytest.mark.usefixtures("cuda_kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_does_not_reach_inside(dtype, device):
    """An op computes in the dtype of its arguments; casting them is for whoever calls it."""
    case = variant("lstm_proj", directions=2, dtype=dtype)
    inputs, gradients = make_inputs(case, device), make_gradients(case, device)
    expected = ours(case, inputs, gradients)
    with torch.autocast(device.type, torch.float16 if dtype == torch.bfloat16 else torch.bfloat16):
        assert_same_bits(ours(case, inputs, gradients), expected)


@pytest.fixture
def host_device(request):
    """A function that sets how many of the 12 blocks that the device runs at the same time something else takes."""
    if request.config.getoption("--ops") == "fusedrnn":
        pytest.skip("needs the CUDA kernels built for the CPU")
    import cuda_host

    configure = request.config.stash[cuda_host.LIBRARY].fusedrnn_cuda_host_configure
    configure.argtypes = [ctypes.c_uint64, ctypes.c_int, ctypes.c_int]
    yield lambda busy: configure(0, 12, busy)
    configure(0, 12, 0)


def device_plan(backward=False, name="lstm", dtype=torch.bfloat16, N=16, H=40, layers=1, directions=1):
    op = getattr(getattr(torch.ops, helpers.NAMESPACE), f"{name}_plan")
    facts = {"N": N, "H": H, "P": H, "directions": directions, "projected": False}
    return explanation._device_plan(op, torch.empty(0, dtype=dtype), facts, False, layers, backward)


@pytest.mark.parametrize("backward", [False, True])
def test_why_a_device_refuses(backward, host_device):
    """As with MPS, or beside another kernel: a plan that it has no room for is not taken, and explained."""
    found = device_plan(backward)
    assert (found["name"], found["reason"]) == ("cluster", "the weights fit in a cluster")
    assert (found["blocks"], found["columns"]) == ((3, 4, 1), 4)
    host_device(busy=3)
    found = device_plan(backward)
    assert (found["blocks"], found["columns"]) == ((3, 2, 1), 8)
    host_device(busy=7)
    found = device_plan(backward)
    refused = "the device has room for 1 of 2 clusters of {} at the same time; "
    assert (found["blocks"], found["columns"]) == ((2, 2, 1), 8)
    assert found["reason"] == refused.format("3 blocks") + "the weights fit in a cluster"
    assert device_plan(backward, N=8)["blocks"] == (3, 1, 1)
    host_device(busy=11)
    found = device_plan(backward)
    assert found["name"] == "stepwise"
    assert found["reason"] == refused.format("1 blocks") + "the device has room for 1 of 6 blocks at the same time"
    with fusedrnn.use_plan("cluster"):  # one after another
        assert device_plan(backward)["blocks"] == (1, 8, 1)
        host_device(busy=12)
        assert device_plan(backward)["name"] == "stepwise"


def test_a_device_divides_as_it_has_room(host_device):
    refused = "the device has room for {} of {} clusters of {} blocks at the same time; "
    with fusedrnn.use_plan("split"):
        found = device_plan(backward=True, N=32)
        assert (found["name"], found["blocks"], found["columns"]) == ("split", (4, 2, 1), 16)
        host_device(busy=5)
        found = device_plan(backward=True, N=32)  # in larger tiles
        assert (found["name"], found["blocks"], found["columns"]) == ("split", (4, 1, 1), 32)
        assert found["reason"] == refused.format(1, 2, 4) + "this plan was asked for"
        host_device(busy=9)
        found = device_plan(backward=True, H=20)
        assert (found["name"], found["blocks"]) == ("split", (2, 1, 1))
        assert found["reason"] == refused.format(0, 1, 4) + "this plan was asked for"
        host_device(busy=11)
        found = device_plan(backward=True, H=20)
    assert found["name"] == "stepwise"
    assert refused.format(0, 1, 4) + refused.format(0, 1, 2) in found["reason"]


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_two_blocks_divide_k(name, host_device):
    case = variant(name, T=5, N=20, I=6, H=20, directions=2, dtype=torch.bfloat16)
    inputs, gradients = make_inputs(case), make_gradients(case)
    with fusedrnn.use_plan("grid"):
        expected = ours(case, inputs, gradients)
    host_device(busy=6)
    with fusedrnn.use_plan("split"):
        assert device_plan(backward=True, name=name, N=20, H=20, directions=2)["blocks"] == (2, 1, 2)
        found = ours(case, inputs, gradients)
    for what, value in expected.items():
        assert relative_error(found[what], value) <= FLOORS[torch.bfloat16], what


def test_more_batch_entries_than_a_launch_takes(host_device):
    assert device_plan(N=65535 * 64)["name"] == "stepwise"
    with pytest.raises(RuntimeError, match="4194241 batch entries are too many, a GPU takes 4194240"):
        device_plan(N=65535 * 64 + 1)


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_a_busy_device(name, host_device):
    """Gives the same results."""
    case = variant(name, T=5, N=16, I=6, H=40, dtype=torch.bfloat16)
    inputs, gradients = make_inputs(case), make_gradients(case)
    with fusedrnn.use_plan("stepwise"):
        expected = ours(case, inputs, gradients)
    host_device(busy=11)
    assert_same_bits(ours(case, inputs, gradients), expected)


@pytest.fixture
def gpu(device):
    if device.type != "cuda":
        pytest.skip("needs --device cuda")
    return device


def test_current_stream_and_graph(gpu):
    case = variant("lstm", T=7, N=5, I=6, H=40, dtype=torch.bfloat16, lengths=(7, 5, 5, 2, 1))
    inputs = make_inputs(case, gpu)
    expected = forward_ours(case, inputs)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            forward_ours(case, inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # on another stream than the one that was warm
        captured = forward_ours(case, inputs)
    inputs.x.mul_(2)
    doubled = forward_ours(case, inputs)
    graph.replay()
    torch.cuda.synchronize()
    assert_same_bits(captured, doubled)
    assert not torch.equal(doubled["y"], expected["y"])


def test_long_sequences(gpu):
    case = variant("gru", T=70000, N=2, I=3, H=8)
    inputs = make_inputs(case, gpu)
    y = forward_ours(case, inputs)["y"]
    assert relative_error(y, in_float64_on_cpu(case, inputs)) < 1e-4


def in_float64_on_cpu(case, inputs):
    on_cpu = inputs.map(lambda t: t.cpu().double())
    return getattr(torch.ops.fusedrnn, case.cell)(*on_cpu.arguments(), False)[0].to(inputs.x.device)
