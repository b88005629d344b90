"""The shapes of a recurrent layer's results, from one layer and five steps to two layers, both ways.

    python examples/shape_tour.py

T steps, N sequences side by side, I features of the input, H of the state, L layers, D directions:

    output [T, N, D*H]   what the last layer says at every step
    h_n    [L*D, N, H]   what every layer and direction remembers at its end

so the last layer's h_n is in the output too: forwards at the last step, backwards (which reads the
sequence from its end) at the first. The tour checks that at every stop (they differ by 0); the plot
shows where.
"""

from __future__ import annotations

import torch
from common import example_parser, finish, new_figure, positive_int, progress, start
from torch import Tensor

I, H = 10, 6


def last_states(output: Tensor, directions: int) -> list[Tensor]:
    """Each direction's state at its end, taken from the output: [N, H] each."""
    forwards = output[-1, :, :H]
    return [forwards] if directions == 1 else [forwards, output[0, :, H:]]


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = example_parser(__doc__.splitlines()[0], "shape_tour", 40, "time steps of the longer sequences")
    parser.add_argument("--batch", type=positive_int, default=3, help="sequences")
    args = parser.parse_args(argv)
    rnn = start(args)

    stops = {
        "one layer": (5, rnn.RNN(I, H)),
        "longer sequences": (args.steps, rnn.RNN(I, H)),
        "two layers": (args.steps, rnn.RNN(I, H, num_layers=2)),
        "both directions": (args.steps, rnn.RNN(I, H, bidirectional=True)),
        "two layers, both directions": (args.steps, rnn.RNN(I, H, num_layers=2, bidirectional=True)),
    }
    print(f"{'':28} {'input':>14} {'output':>14} {'h_n':>12}")
    largest = 0.0
    for _, (name, (steps, layer)) in zip(bar := progress(len(stops), "stop"), stops.items(), strict=True):
        x = torch.randn(steps, args.batch, I, device=args.device)
        output, h_n = layer.to(args.device)(x)
        bar.write(f"{name:28} {tuple(x.shape)!s:>14} {tuple(output.shape)!s:>14} {tuple(h_n.shape)!s:>12}")

        directions = 2 if layer.bidirectional else 1
        assert output.shape == (steps, args.batch, directions * H)
        assert h_n.shape == (layer.num_layers * directions, args.batch, H)
        for from_output, state in zip(last_states(output, directions), h_n[-directions:], strict=True):
            largest = max(largest, (from_output - state).abs().max().item())
    print(f"the last layer's h_n and its place in the output differ by {largest:.1g}")

    figure, axes = new_figure(title=f"{name}: output of one sequence; h_n is in the frames", xlabel="step")
    axes.imshow(output[:, 0].detach().cpu().T.numpy(), aspect="auto", cmap="RdBu", vmin=-1, vmax=1)
    axes.set_yticks([H / 2 - 0.5, 1.5 * H - 0.5], ["forwards", "backwards"])
    last, top, bottom = len(output) - 1, -0.5, H - 0.5
    for step, edge in ((last, top), (0, bottom)):
        left, right = step - 0.5, step + 0.5
        axes.plot([left, right, right, left, left], [edge, edge, edge + H, edge + H, edge], "k", lw=3)
    return finish(args, figure, difference=largest)


if __name__ == "__main__":
    main()
