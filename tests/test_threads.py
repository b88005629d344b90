"""Threads and processes: torch's thread count is followed, and results are right wherever an op is called from."""

import functools
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers import assert_same_bits, forward_ours, layer_op, make_gradients, make_inputs, ours, variant
from torch.utils.data import DataLoader, Dataset

import fusedrnn

CASES = [
    variant("lstm", T=7, N=1, I=32, H=64, directions=2),
    variant("gru", T=6, N=40, I=32, H=48),
    variant("rnn_tanh", I=24, H=56, lengths=(9, 8, 8, 3, 1), directions=2),
    variant("lstm_proj", T=5, N=20, I=33, H=40),
    variant("lstm", T=30, N=16, I=64, H=128),
    variant("rnn_tanh", T=3, N=20, I=256, H=64),  # fewer rows than columns
    variant("gru", T=6, N=40, I=33, H=48, dtype=torch.bfloat16),
]


def prepared():
    """Inputs and gradients of all cases, and what one thread makes of them."""
    made = [(case, make_inputs(case), make_gradients(case)) for case in CASES]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = [ours(*one) for one in made]
    torch.set_num_threads(before)
    return list(zip(made, expected, strict=True))


def check_all(work):
    for one, expected in work:
        assert_same_bits(ours(*one), expected, what=str(one[0]))


def threads_of_this_process() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


IN_A_NEW_PROCESS = """
import torch, fusedrnn
from pathlib import Path
def count(): return len(list(Path("/proc/self/task").iterdir()))
torch.set_num_threads(1)
x, h = torch.randn(20, 64, 64), torch.zeros(1, 64, 128)
weights = [torch.randn(512, 64) / 8, torch.randn(512, 128) / 8, torch.zeros(512), torch.zeros(512)]
torch.set_num_threads({threads})
before = count()
for _ in range(3):
    torch.ops.fusedrnn.lstm(x, h, h, weights, None, 1, False)
print(count() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_thread_count_is_torchs(threads):
    """A process that has run nothing else has, after large layers, set_num_threads - 1 more threads."""
    command = [sys.executable, "-c", IN_A_NEW_PROCESS.format(threads=threads)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) == threads - 1


def test_more_threads_than_cores():
    work = prepared()
    for threads in (16, 3, 61, 2, 1):
        torch.set_num_threads(threads)
        check_all(work)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_several_python_threads_at_once(threads):
    """Each its own op calls, forward and backward, with pools of their own or shared."""
    work = prepared()
    torch.set_num_threads(threads)
    start = threading.Barrier(4)

    def run(_):
        torch.set_num_threads(threads)  # OpenMP's setting belongs to a thread
        start.wait()
        for _ in range(4):
            check_all(work)

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(run, i) for i in range(4)]:
            done.result(timeout=300)


def test_modules_shared_between_python_threads():
    """One module serving several threads, under no_grad and with gradients."""
    module = fusedrnn.LSTM(16, 32, 2, bidirectional=True)
    x = torch.randn(9, 5, 16)
    expected = module(x)[0].detach()
    gradient = torch.autograd.grad(module(x)[0].sum(), module.weight_hh_l0)[0]

    def run(i):
        for _ in range(10):
            if i % 2:
                with torch.no_grad():
                    assert torch.equal(module(x)[0], expected)
            else:
                y = module(x)[0]
                assert torch.equal(torch.autograd.grad(y.sum(), module.weight_hh_l0)[0], gradient)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(4)))


def test_backward_on_another_thread():
    """Saved tensors freed and used by a thread that didn't make them."""
    module = fusedrnn.GRU(16, 32)
    x = torch.randn(9, 5, 16)
    expected = torch.autograd.grad(module(x)[0].sum(), module.weight_hh_l0)[0]
    losses = [module(x)[0].sum() for _ in range(8)]
    with ThreadPoolExecutor(4) as pool:
        gradients = list(pool.map(lambda loss: torch.autograd.grad(loss, module.weight_hh_l0)[0], losses))
    assert all(torch.equal(g, expected) for g in gradients)


def test_the_gil_is_released():
    """Python goes on counting while an op runs; with the GIL held, nothing could count inside the call."""
    case = variant("lstm", T=1500, N=32, I=64, H=128)
    inputs = make_inputs(case)
    torch.set_num_threads(1)
    op = layer_op("lstm")
    inside, stop, counted = threading.Event(), threading.Event(), [0]

    def count():
        inside.wait()
        while not stop.is_set():
            counted[0] += 1
            time.sleep(0)  # offers the GIL

    thread = threading.Thread(target=count)
    thread.start()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # no thread gives way but by releasing the GIL itself
    try:
        inside.set()
        op(*inputs.arguments(), True)
        stop.set()
        during = counted[0]
    finally:
        stop.set()
        sys.setswitchinterval(interval)
        thread.join()
    assert during > 0


# ---- tensors that other threads let go of, or write to -------------------------------------------


@contextmanager
def meanwhile(work):
    """Another thread does `work` again and again."""
    stop, failures = threading.Event(), []

    def run():
        try:
            while not stop.is_set():
                work()
        except Exception as error:
            failures.append(error)

    thread, interval = threading.Thread(target=run), sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    thread.start()
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        thread.join()
    assert not failures, failures


def test_arguments_that_another_thread_lets_go_of():
    """The caller's are the last references, and their memory would be another's at once."""
    case = variant("lstm", T=20, N=8, I=32, H=64)
    inputs = make_inputs(case)
    expected = forward_ours(case, inputs)
    box = [inputs]

    def replace():
        box[0] = inputs.map(torch.Tensor.clone)
        for t in (inputs.x, *inputs.weights):
            torch.full_like(t, float("nan"))
        fusedrnn.release_memory()

    with meanwhile(replace):
        for _ in range(200):
            assert_same_bits(forward_ours(case, box[0]), expected)


def test_sizes_that_another_thread_changes():
    """They are read once: what was checked is what is computed with."""
    inputs = make_inputs(variant("gru", I=8, H=16, lengths=(9, 8, 8, 3, 1)))
    good, sizes = inputs.batch_sizes, inputs.batch_sizes.clone()
    lengths, x, module = torch.tensor([9, 4, 0]), torch.randn(9, 3, 8), fusedrnn.GRU(8, 16)
    changes = random.Random(0)

    def change():
        sizes[changes.randrange(len(sizes))] = changes.choice([-1, 0, 1, 5, 2**62])
        lengths[changes.randrange(3)] = changes.choice([-1, 0, 9, 10, 2**62])
        sizes.copy_(good)

    def refused():
        try:
            torch.ops.fusedrnn.gru(inputs.x, inputs.h0, None, inputs.weights, sizes, 1, True)
            module(x, lengths=lengths)
        except RuntimeError as error:
            return "batch_sizes" in str(error) or "lengths" in str(error)
        return False

    with meanwhile(change):
        assert sum(refused() for _ in range(1000)) > 0


# ---- other processes and regions -----------------------------------------------------------------


class Encoded(Dataset):
    """Runs a module in whichever process asks for an item; given items, all cores' worth of threads."""

    def __init__(self, modules, data, threads):
        self.modules, self.data, self.threads = modules, data, threads

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        torch.set_num_threads(self.threads)
        x = self.data[i].requires_grad_()
        outputs = [m(x)[0] for m in self.modules]
        return *[y.detach() for y in outputs], torch.autograd.grad(sum(y.sum() for y in outputs), x)[0]


@pytest.mark.skipif(sys.platform != "linux", reason="fork")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_data_loader_workers(context, threads):
    """Two workers, forked after the parent's pool has run, or started afresh."""
    torch.set_num_threads(2)
    modules = [fusedrnn.LSTM(16, 48, bidirectional=True), fusedrnn.GRU(16, 48)]
    dataset = Encoded(modules, list(torch.randn(6, 12, 20, 16)), threads)
    expected = [dataset[i] for i in range(6)]
    torch.set_num_threads(2)
    for module in modules:
        module(torch.randn(30, 40, 16))
    if context == "spawn":
        dataset.data = [x.detach() for x in dataset.data]
    loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context=context, timeout=120)
    for i, found in enumerate(loader):
        for a, b in zip(found, expected[i], strict=True):
            torch.testing.assert_close(a, b)


FORKED = """
import os, sys, torch, fusedrnn
torch.set_num_threads(2)
module = fusedrnn.{name}(32, 64)
x = torch.randn(20, 8, 32)  # small enough for torch's own ops, which would hang in the child, to stay on one thread
expected = module(x)[0]
expected.sum().backward()
for _ in range(3):
    child = os.fork()
    if child == 0:
        module.zero_grad()
        y = module(x)[0]
        y.sum().backward()
        os._exit(0 if torch.equal(y, expected) and module.weight_hh_l0.grad.isfinite().all() else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(module(x)[0], expected)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="fork")
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_forked_child(name):
    """A child of a process whose pool has already run; in a process of its own, as a deadlock would be."""
    command = [sys.executable, "-c", FORKED.format(name=name)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_in_the_inter_op_pool():
    """Called by several workers of torch's own pool of threads at the same time."""

    def one_layer(x: torch.Tensor, h: torch.Tensor, w_ih: torch.Tensor, w_hh: torch.Tensor) -> torch.Tensor:
        return torch.ops.fusedrnn.lstm(x, h, h, [w_ih, w_hh], None, 1, False)[0]

    layer = torch.jit.script(one_layer)

    def many(x: torch.Tensor, h: torch.Tensor, w_ih: torch.Tensor, w_hh: torch.Tensor):
        futures = [torch.jit.fork(layer, x, h, w_ih, w_hh) for _ in range(6)]
        return [torch.jit.wait(f) for f in futures]

    torch.set_num_threads(2)
    case = variant("lstm", T=30, N=16, I=64, H=128, bias=False)
    inputs = make_inputs(case)
    arguments = (inputs.x, inputs.h0, *inputs.weights)
    with torch.no_grad():
        found = torch.jit.script(many)(*arguments)
    expected = one_layer(*arguments)
    assert all(torch.equal(y, expected) for y in found)


NESTED = """
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

// Calls fusedrnn::gru from every chunk of a parallel region.
at::Tensor nested(const at::Tensor& x, const at::Tensor& h, at::TensorList weights, int64_t calls) {
  auto op = c10::Dispatcher::singleton().findSchemaOrThrow("fusedrnn::gru", "");
  at::Tensor y = at::empty({calls, x.size(0), x.size(1), h.size(2)});
  at::parallel_for(0, calls, 1, [&](int64_t begin, int64_t end) {
    at::NoGradGuard no_grad;
    for (int64_t i = begin; i < end; ++i) {
      torch::jit::Stack stack{x, h, c10::IValue(), weights.vec(), c10::IValue(), int64_t(1), false, false};
      op.callBoxed(&stack);
      y[i].copy_(stack[0].toTensor());
    }
  });
  return y;
}
TORCH_LIBRARY_FRAGMENT(fusedrnn_tests, m) { m.def("nested", &nested); }
"""


def test_nested_parallel_region(tmp_path):
    """From within at::parallel_for, where another region runs its chunks one by one: a barrier would wait forever."""
    load_nested(tmp_path)
    case = variant("gru", T=12, N=2, I=64, H=256)
    inputs = make_inputs(case)
    expected = forward_ours(case, inputs)["y"]
    for threads in (2, 4, 1):
        torch.set_num_threads(threads)
        found = torch.ops.fusedrnn_tests.nested(inputs.x, inputs.h0, inputs.weights, 6)
        assert all(torch.equal(y, expected) for y in found)


@functools.cache
def load_nested(folder):
    from torch.utils import cpp_extension

    try:
        cpp_extension.verify_ninja_availability()
    except RuntimeError as error:
        pytest.skip(str(error))
    options = {"is_python_module": False, "extra_cflags": ["-fopenmp", "-O1"], "build_directory": str(folder)}
    cpp_extension.load_inline("fusedrnn_tests_nested", NESTED, **options)
