"""A recurrent network by hand: the recurrence in three lines of tensors, beside the module.

    python examples/rnn_by_hand.py

    H_t = tanh(X_t Wxh + H_{t-1} Whh + b)      X_t one-hot characters [N, n_chars], H_t [N, hidden]
    Y_t = H_t Why + b_y                        scores of the next character [N, n_chars]

Both models start from the same weights and read the same text (the first page of a novel), so their
outputs, their gradients and their whole training agree; only the time they take differs.

At the defaults both reach 0.49 bits per character (4.3 for a model that knows only how frequent each
character is): the page is nearly learnt by heart.
"""

from __future__ import annotations

import argparse
from types import ModuleType
from typing import Any

import torch
from common import HERE, example_parser, finish, new_figure, positive_int, progress, start
from torch import Tensor, nn
from torch.utils.benchmark import Timer

PAGE = 1000  # characters


class RNNByHand(nn.Module):
    def __init__(self, n_inputs: int, hidden: int) -> None:
        super().__init__()
        self.Wxh = nn.Parameter(torch.randn(n_inputs, hidden) / hidden**0.5)
        self.Whh = nn.Parameter(torch.randn(hidden, hidden) / hidden**0.5)
        self.b = nn.Parameter(torch.zeros(hidden))

    def forward(self, X: Tensor) -> tuple[Tensor, Tensor]:  # [T, N, n_inputs] -> [T, N, hidden], [N, hidden]
        H = X.new_zeros(X.shape[1], len(self.b))
        states = []
        for X_t in X:
            H = torch.tanh(X_t @ self.Wxh + H @ self.Whh + self.b)
            states.append(H)
        return torch.stack(states), H


def module_with_weights_of(by_hand: RNNByHand, rnn: ModuleType) -> nn.RNNBase:
    """The module keeps its weights transposed, and has two biases: one is enough here."""
    n_inputs, hidden = by_hand.Wxh.shape
    module = rnn.RNN(n_inputs, hidden)
    with torch.no_grad():
        module.weight_ih_l0.copy_(by_hand.Wxh.T)
        module.weight_hh_l0.copy_(by_hand.Whh.T)
        module.bias_ih_l0.copy_(by_hand.b)
        module.bias_hh_l0.zero_()
    module.bias_hh_l0.requires_grad_(False)
    return module


class NextCharacter(nn.Module):
    """A recurrence and the output layer on its states."""

    def __init__(self, rnn: nn.Module, output: nn.Linear) -> None:
        super().__init__()
        self.rnn = rnn
        self.output = nn.Linear(output.in_features, output.out_features)
        self.output.load_state_dict(output.state_dict())

    def loss(self, X: Tensor, targets: Tensor) -> Tensor:  # bits per character
        H, _ = self.rnn(X)
        scores = self.output(H)
        return nn.functional.cross_entropy(scores.flatten(0, 1), targets.flatten()) / torch.tensor(2.0).log()


def windows(text: Tensor, seq: int, batch: int) -> tuple[Tensor, Tensor]:
    """Random windows of the text and the characters that follow: [seq, batch] each."""
    begins = torch.randint(len(text) - seq, (batch,), device=text.device)
    at = begins + torch.arange(seq, device=text.device).unsqueeze(1)
    return text[at], text[at + 1]


def difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def differences(by_hand: NextCharacter, module: NextCharacter, X: Tensor, Y: Tensor) -> tuple[float, float]:
    """The largest difference of outputs, and of the loss's gradients."""
    outputs = difference(by_hand.rnn(X)[0], module.rnn(X)[0])
    for model in (by_hand, module):
        model.zero_grad()
        model.loss(X, Y).backward()
    a: Any = by_hand.rnn
    b: Any = module.rnn
    gradients = [
        (a.Wxh.grad.T, b.weight_ih_l0.grad),
        (a.Whh.grad.T, b.weight_hh_l0.grad),
        (a.b.grad, b.bias_ih_l0.grad),
    ]
    return outputs, max(difference(p, q) for p, q in gradients)


def milliseconds(model: NextCharacter, X: Tensor, Y: Tensor) -> float:
    """Of a forward and a backward pass."""
    timer = Timer(
        "loss(X, Y).backward()", globals={"loss": model.loss, "X": X, "Y": Y}, num_threads=torch.get_num_threads()
    )
    return 1e3 * timer.timeit(20).mean


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = example_parser(__doc__.splitlines()[0], "rnn_by_hand", steps=1000)
    parser.add_argument("--hidden", type=positive_int, default=64, help="hidden size")
    args: argparse.Namespace = parser.parse_args(argv)
    rnn = start(args)

    page = (HERE / "data" / "pride_and_prejudice.txt").read_text()[:PAGE]
    vocab = sorted(set(page))
    text = torch.tensor([vocab.index(c) for c in page], device=args.device)

    recurrence, output = RNNByHand(len(vocab), args.hidden), nn.Linear(args.hidden, len(vocab))
    by_hand = NextCharacter(recurrence, output).to(args.device)
    module = NextCharacter(module_with_weights_of(recurrence, rnn), output).to(args.device)

    def batch() -> tuple[Tensor, Tensor]:
        chars, targets = windows(text, seq=32, batch=16)
        return nn.functional.one_hot(chars, len(vocab)).float(), targets

    X, Y = batch()
    outputs, gradients = differences(by_hand, module, X, Y)
    print(f"same weights: outputs differ by {outputs:.1e} at most, gradients by {gradients:.1e}")
    ms = {"by hand": milliseconds(by_hand, X, Y), args.impl: milliseconds(module, X, Y)}
    print("forward and backward: " + ", ".join(f"{name} {t:.3f} ms" for name, t in ms.items()))

    models = {"by hand": by_hand, args.impl: module}
    optimizers = [torch.optim.Adam(model.parameters(), 3e-3) for model in models.values()]
    losses: dict[str, list[float]] = {name: [] for name in models}
    bar = progress(args.steps)
    for _ in bar:
        X, Y = batch()
        for (name, model), optimizer in zip(models.items(), optimizers, strict=True):
            loss = model.loss(X, Y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
        bar.set_postfix({name: curve[-1] for name, curve in losses.items()}, refresh=False)

    figure, axes = new_figure(title="The same network twice", xlabel="training step", ylabel="bits per character")
    for (name, curve), style in zip(losses.items(), ("-", ":"), strict=True):
        axes.plot(curve, style, lw=1 if style == "-" else 2, label=f"{name}, {ms[name]:.2f} ms a step")
    last = {name: sum(curve[-20:]) / len(curve[-20:]) for name, curve in losses.items()}
    return finish(
        args,
        figure,
        bits_by_hand=last["by hand"],
        bits_of_the_module=last[args.impl],
        output_difference=outputs,
        gradient_difference=gradients,
        speedup=ms["by hand"] / ms[args.impl],
    )


if __name__ == "__main__":
    main()
