"""Training on several processes: DistributedDataParallel, or with --strategy fsdp fully sharded (FSDP2).

    torchrun --standalone --nproc-per-node 2 examples/distributed.py --strategy fsdp

The processes share each batch out among them; on GPUs (one each) they talk over NCCL, else over gloo. The task: was the
sum of a sequence of numbers above zero at more than half of its steps? --check compares every gradient with that of one
process that has the whole batch.
"""

from __future__ import annotations

import argparse
import copy
import gc
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import fusedrnn


class Classifier(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.rnn = fusedrnn.LSTM(1, hidden, num_layers=2, bidirectional=True)
        self.head = nn.Linear(2 * hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(x)
        return self.head(y.mean(0)).squeeze(-1)


def make_batch(step: int, size: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The same numbers on every process."""
    x = torch.randn(length, size, 1, generator=torch.Generator().manual_seed(step))
    target = (x.cumsum(0) > 0).float().mean(0).squeeze(-1) > 0.5
    return x.to(device), target.float().to(device)


def loss_of(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(model(x), target)


def parallelize(model: Classifier, strategy: str) -> nn.Module:
    if strategy == "ddp":
        return DistributedDataParallel(model)
    for part in (model.rnn, model.head, model):
        fully_shard(part)
    return model


def whole(t: Tensor | None) -> Tensor:
    assert t is not None
    return t.full_tensor() if isinstance(t, DTensor) else t


def check(model: nn.Module, alone: Classifier, x: Tensor, target: Tensor) -> None:
    """Gives `alone` the model's parameters and the whole batch, and compares the gradients."""
    with torch.no_grad():
        for p, q in zip(alone.parameters(), model.parameters(), strict=True):
            p.copy_(whole(q))
    alone.zero_grad()
    loss_of(alone, x, target).backward()
    for p, q in zip(alone.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(whole(q.grad), p.grad)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--strategy", choices=["ddp", "fsdp"], default="ddp")
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--steps", type=int, default=100)
    add("--batch", type=int, default=64, help="of all processes together")
    add("--length", type=int, default=40)
    add("--hidden", type=int, default=64)
    add("--check", action="store_true", help="compare the gradients of every step with a single process's")
    add("--checkpoint", type=Path, help="where to save the model and the optimizer's state in the end")
    return parser.parse_args()


def train(args: argparse.Namespace) -> None:
    rank, processes = dist.get_rank(), dist.get_world_size()
    if args.batch % processes:
        raise SystemExit(f"--batch {args.batch} does not divide among {processes} processes")
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)

    torch.manual_seed(0)
    model = Classifier(args.hidden).to(device)
    alone = copy.deepcopy(model)
    parallel = parallelize(model, args.strategy)
    optimizer = torch.optim.Adam(parallel.parameters(), lr=3e-3)
    for step in range(args.steps):
        x, target = make_batch(step, args.batch, args.length, device)
        optimizer.zero_grad()
        loss = loss_of(parallel, x[:, rank::processes], target[rank::processes])
        loss.backward()
        if args.check:
            check(model, alone, x, target)
        optimizer.step()
        if rank == 0 and step % 10 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    if args.checkpoint:
        model_state, optimizer_state = get_state_dict(parallel, optimizer)
        dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=args.checkpoint)
    if rank == 0:
        print(f"{args.strategy}, {processes} processes, {device.type}: loss {loss.item():.3f}")


def main() -> None:
    args = parse_args()
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    train(args)
    # The last to let go of a gloo group waits for its threads, and they may wait for Python's lock: that must not be a
    # DistributedDataParallel, which holds it. At the barrier they drop the tensors that they had sent.
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
