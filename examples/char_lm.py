"""A character-level language model: it reads a novel, then writes in its manner.

    python examples/char_lm.py                     # train fusedrnn.LSTM and print a sample
    python examples/char_lm.py --impl torch        # the same with torch.nn.LSTM
    python examples/char_lm.py --compare           # both from the same seed, step by step

The text is cut into `--batch` streams that are read side by side, `--seq` characters a step. The
state at the end of a step is the next step's first state, but gradients stop there (truncated
backpropagation through time). Losses are in bits per character: how many yes/no questions the
next character costs on average.

At the defaults it reaches 1.81 bits per character on text it has not read; a model that knows only
how frequent each character is needs 4.49.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import (
    CELLS,
    HERE,
    detached,
    example_parser,
    implementation,
    new_figure,
    positive_float,
    positive_int,
    progress,
    save,
)
from torch import Tensor, nn

MAX_GRAD_NORM = 1.0
VALID_FRACTION = 0.1  # the end of the text; the model never trains on it
VALID_STREAMS = 32
VALID_TIMES = 10  # how often in a run


class CharLM(nn.Module):
    def __init__(self, layer: Callable[..., nn.RNNBase], n_chars: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(n_chars, min(hidden, 64))
        self.rnn = layer(self.embed.embedding_dim, hidden, layers)
        self.head = nn.Linear(hidden, n_chars)

    def forward(self, chars: Tensor, state=None):  # chars [T, N] -> scores [T, N, n_chars]
        output, state = self.rnn(self.embed(chars), state)
        return self.head(output), state


def bits(scores: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of the targets, in bits per character."""
    return nn.functional.cross_entropy(scores.flatten(0, 1), targets.flatten()) / math.log(2)


def streams(text: Tensor, n: int) -> Tensor:
    """Cuts text [chars] into n long pieces side by side: [chars // n, n], time first."""
    length = len(text) // n
    return text[: length * n].view(n, length).t().contiguous()


def unigram_bits(train: Tensor, valid: Tensor, n_chars: int) -> float:
    """Bits per character on valid of a model that knows only how frequent each character is."""
    counts = torch.bincount(train, minlength=n_chars).double() + 1
    return -(counts / counts.sum()).log2()[valid].mean().item()


class Trainer:
    """One model, its optimizer, and where it is in the text."""

    def __init__(self, impl: str, args: argparse.Namespace, train: Tensor, valid: Tensor, n_chars: int) -> None:
        torch.manual_seed(args.seed)  # the same seed gives both implementations the same weights
        layer = getattr(implementation(impl), CELLS[args.cell])
        self.model = CharLM(layer, n_chars, args.hidden, args.layers).to(args.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), args.lr)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, args.steps)
        self.train = streams(train, args.batch)
        self.valid = streams(valid, min(VALID_STREAMS, len(valid) // 2))
        self.seq = args.seq
        self.position, self.state = 0, None
        self.losses: list[float] = []
        self.valid_curve: list[tuple[int, float]] = []  # (steps done, bits per character)
        self.seconds = 0.0  # in training steps alone

    def step(self) -> float:
        start = time.perf_counter()
        if self.position + self.seq + 1 > len(self.train):  # the end of the text: begin again
            self.position, self.state = 0, None
        window = self.train[self.position : self.position + self.seq + 1]
        self.position += self.seq

        scores, state = self.model(window[:-1], self.state)
        self.state = detached(state)
        loss = bits(scores, window[1:])
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()
        self.schedule.step()

        self.losses.append(loss.item())
        self.seconds += time.perf_counter() - start
        return self.losses[-1]

    @torch.no_grad()
    def validate(self) -> float:
        inputs, targets, state, total = self.valid[:-1], self.valid[1:], None, 0.0
        for x, y in zip(inputs.split(256), targets.split(256), strict=True):
            scores, state = self.model(x, state)
            total += bits(scores, y).item() * len(x)
        self.valid_curve.append((len(self.losses), total / len(inputs)))
        return self.valid_curve[-1][1]

    def metrics(self) -> dict:
        recent = self.losses[-max(1, len(self.losses) // VALID_TIMES) :]
        return {
            "train_bpc": sum(recent) / len(recent),
            "valid_bpc": self.valid_curve[-1][1],
            "chars_per_second": len(self.losses) * self.seq * self.train.shape[1] / self.seconds,
            "seconds": self.seconds,
            "losses": self.losses,
        }


@torch.no_grad()
def sample(model: CharLM, vocab: str, prompt: str, length: int, temperature: float, seed: int) -> str:
    """Continues the prompt, one character at a time; a low temperature plays safe."""
    generator = torch.Generator().manual_seed(seed)
    chars = [vocab.index(c) for c in prompt]
    where = model.head.weight.device
    scores, state = model(torch.tensor(chars, device=where).unsqueeze(1))
    for _ in range(length):
        probabilities = (scores[-1, 0].float().cpu() / temperature).softmax(0)
        chars.append(int(torch.multinomial(probabilities, 1, generator=generator)))
        scores, state = model(torch.tensor([[chars[-1]]], device=where), state)
    return "".join(vocab[c] for c in chars)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = example_parser(__doc__.splitlines()[0], "char_lm", steps=1000)
    add = parser.add_argument
    add("--compare", action="store_true", help="train torch.nn's and fusedrnn's side by side")
    add("--cell", choices=list(CELLS), default="lstm", help="kind of recurrent layer")
    add("--hidden", type=positive_int, default=256, help="hidden size")
    add("--layers", type=positive_int, default=1, help="stacked layers")
    add("--batch", type=positive_int, default=16, help="streams of text read side by side")
    add("--seq", type=positive_int, default=64, help="characters of each stream in a step")
    add("--lr", type=positive_float, default=1e-2, help="Adam's first learning rate")
    add("--temperature", type=positive_float, default=0.6, help="of the sample text")
    add("--prompt", default="It is a truth", help="how the sample text begins")
    add("--sample", type=positive_int, default=400, help="characters of sample text")
    add("--text", type=Path, default=HERE / "data" / "pride_and_prejudice.txt", help="to learn")
    args = parser.parse_args(argv)

    try:
        args.text = args.text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"argument --text: {error}")
    args.n_train = int(len(args.text) * (1 - VALID_FRACTION))
    if args.n_train // args.batch < args.seq + 1 or len(args.text) - args.n_train < 4:
        parser.error(
            f"argument --text: {len(args.text)} characters are too few for --batch {args.batch} "
            f"--seq {args.seq}; lower these or give a longer text"
        )
    if not args.prompt:
        parser.error("argument --prompt: must not be empty")
    if unknown := sorted(set(args.prompt) - set(args.text)):
        parser.error(f"argument --prompt: not in the text: {' '.join(map(repr, unknown))}")
    return args


def train_all(trainers: dict[str, Trainer], steps: int) -> None:
    """Trains side by side, so that what else the machine does slows all of them alike."""
    every = max(1, steps // VALID_TIMES)
    bar = progress(steps)
    for step in bar:
        losses = {name: trainer.step() for name, trainer in trainers.items()}
        if (step + 1) % every == 0 or step + 1 == steps:
            valid = [trainer.validate() for trainer in trainers.values()][-1]
            bar.set_postfix(losses, validation=valid, refresh=False)


def compare(torch_run: dict, our_run: dict) -> dict:
    differences = [abs(a - b) for a, b in zip(torch_run["losses"], our_run["losses"], strict=True)]
    return {
        "first_difference": differences[0],
        "largest_difference": max(differences),
        "speedup": torch_run["seconds"] / our_run["seconds"],
    }


def plot(args: argparse.Namespace, trainers: dict[str, Trainer], unigram: float) -> None:
    title = f"Character-level {args.cell.upper()}, hidden size {args.hidden}"
    figure, axes = new_figure(title=title, xlabel="training step", ylabel="bits per character")
    for i, (name, trainer) in enumerate(trainers.items()):
        axes.plot(trainer.losses, f"C{i}", lw=0.5, label=f"{name}, training")
        dots = {"marker": "o", "ms": 9 - 5 * i, "ls": "-" if i == 0 else ":"}
        axes.plot(*zip(*trainer.valid_curve, strict=True), color=f"C{i}", label=f"{name}, validation", **dots)
    axes.axhline(unigram, color="gray", ls="--", label="unigram model")
    save(figure, args.plot)


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)

    vocab = "".join(sorted(set(args.text)))
    index = {c: i for i, c in enumerate(vocab)}
    text = torch.tensor([index[c] for c in args.text], device=args.device)
    train, valid = text[: args.n_train], text[args.n_train :]
    unigram = unigram_bits(train, valid, len(vocab))

    names = ["torch", "fusedrnn"] if args.compare else [args.impl]
    trainers = {name: Trainer(name, args, train, valid, len(vocab)) for name in names}
    parameters = sum(p.numel() for p in trainers[names[0]].model.parameters())
    print(f"{len(train):,} characters to learn, {len(valid):,} to validate, {len(vocab)} different")
    print(f"{args.cell}, {parameters:,} parameters, {args.device}, {torch.get_num_threads()} CPU threads")
    train_all(trainers, args.steps)

    results: dict = {"unigram_bpc": unigram, "plot": str(args.plot)}
    print(f"\n{'bits per character':20}{'train':>8}{'valid.':>8}{'chars/s':>10}{'seconds':>9}")
    print(f"{'unigram model':20}{'':8}{unigram:8.3f}")
    for name, trainer in trainers.items():
        run = results[name] = trainer.metrics()
        run["sample"] = sample(trainer.model, vocab, args.prompt, args.sample, args.temperature, args.seed)
        print(f"{name:20}{run['train_bpc']:8.3f}{run['valid_bpc']:8.3f}", end="")
        print(f"{run['chars_per_second']:10,.0f}{run['seconds']:9.1f}")
    if args.compare:
        results |= compare(results["torch"], results["fusedrnn"])
        print(f"\nthe two losses are {results['first_difference']:.1e} apart at the first step, ", end="")
        print(f"at most {results['largest_difference']:.1e} in all {args.steps}")
        print(f"fusedrnn trains {results['speedup']:.2f}x as fast as torch.nn")
    print(f"\n{results[names[-1]]['sample']}\n")
    plot(args, trainers, unigram)
    print(f"plot: {args.plot}")
    print(f"result: {results[names[-1]]['valid_bpc']:.3f} bits per character (unigram model {unigram:.3f})")
    return results


if __name__ == "__main__":
    main()
