"""From sine to cosine: an LSTM reads sin(t), a point at a time, and says cos(t).

    python examples/sine_to_cosine.py

sin(t) alone does not tell cos(t): the same value is passed once upwards and once downwards. What
came before tells them apart, so the network needs its memory. The curve is read in windows; the
state at the end of a window is the first state of the next, cut from the graph (`detached`), so that
gradients stay within a window and the memory does not.

At the defaults the mean squared error, begun with an empty memory and after one period, is 0.0001 (0.5
for the constant 0).
"""

from __future__ import annotations

import math
from types import ModuleType

import torch
from common import detached, example_parser, finish, new_figure, positive_int, progress, start
from torch import Tensor, nn

POINTS_PER_PERIOD = 40


class SineToCosine(nn.Module):
    def __init__(self, rnn: ModuleType, hidden: int) -> None:
        super().__init__()
        self.lstm = rnn.LSTM(1, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 1)

    def forward(self, x: Tensor, state=None):  # [N, T, 1] -> [N, T, 1]
        output, state = self.lstm(x, state)
        return self.head(output), state


def window(number: int, points: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """t [points], and sine and cosine of it, [1, points, 1]: one sequence of one feature."""
    t = torch.arange(number * points, (number + 1) * points, device=device) * (2 * math.pi / POINTS_PER_PERIOD)
    return t, t.sin().view(1, -1, 1), t.cos().view(1, -1, 1)


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = example_parser(__doc__.splitlines()[0], "sine_to_cosine", steps=500)
    parser.add_argument("--hidden", type=positive_int, default=32, help="hidden size")
    parser.add_argument("--window", type=positive_int, default=25, help="points in a window")
    args = parser.parse_args(argv)
    rnn = start(args)

    model = SineToCosine(rnn, args.hidden).to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    state = None
    bar = progress(args.steps)
    for step in bar:
        _, sine, cosine = window(step, args.window, args.device)
        prediction, state = model(sine, state)
        state = detached(state)
        loss = nn.functional.mse_loss(prediction, cosine)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(mse=loss.item(), refresh=False)

    with torch.no_grad():
        t, sine, cosine = window(args.steps // 8 + 1, 8 * args.window, args.device)
        prediction, _ = model(sine)
    settled = slice(POINTS_PER_PERIOD, None)
    mse = nn.functional.mse_loss(prediction[:, settled], cosine[:, settled]).item()

    figure, axes = new_figure(title="An LSTM that reads sine and says cosine", xlabel="t")
    for name, curve, style in (("sine (input)", sine, ":"), ("cosine", cosine, "-"), ("prediction", prediction, "--")):
        axes.plot(t.cpu(), curve.flatten().cpu(), style, label=name)
    return finish(args, figure, mse=mse)


if __name__ == "__main__":
    main()
