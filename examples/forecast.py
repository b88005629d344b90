"""Forecasting a series with an LSTM of two layers: tomorrow's value from all that came before.

    python examples/forecast.py                                    # a generated, price-like series
    python examples/forecast.py --csv prices.csv --column close    # a series of your own

The hardest simple rival is the naive forecast, "tomorrow is as today": nothing beats it on a random
walk. A series with seasons can be known better. The network reads changes (a level is nothing that
it has seen before) and says the next one; the last fifth of the series is for the test, where the
network reads on, day by day, and never sees what it forecasts.

At the defaults the root mean squared error of the test is 0.49 of the naive forecast's.
"""

from __future__ import annotations

import argparse
import csv
import math
from pathlib import Path
from types import ModuleType

import torch
from common import example_parser, finish, new_figure, positive_int, progress, start
from torch import Tensor, nn

TEST_FRACTION = 0.2
WINDOW = 100  # days of a training sequence


class Forecaster(nn.Module):
    def __init__(self, rnn: ModuleType, hidden: int) -> None:
        super().__init__()
        self.lstm = rnn.LSTM(1, hidden, num_layers=2, batch_first=True)
        self.head = nn.Linear(hidden, 1)

    def forward(self, changes: Tensor) -> Tensor:  # [N, T] -> the change after each, [N, T]
        output, _ = self.lstm(changes.unsqueeze(-1))
        return self.head(output).squeeze(-1)


def price_like(days: int, generator: torch.Generator) -> Tensor:
    """A trend, a week, a month and a random walk, multiplied together as prices are: [days]."""
    t = torch.arange(days)
    seasons = 0.04 * (2 * math.pi * t / 7).sin() + 0.08 * (2 * math.pi * t / 30).sin()
    walk = 0.01 * torch.randn(days, generator=generator).cumsum(0)
    return 100 * (0.0005 * t + seasons + walk).exp()


def read_csv(path: Path, column: str | None) -> Tensor:
    """A column of numbers (by default the last one) of a file with a line of names."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    name = column or list(rows[0])[-1]
    return torch.tensor([float(row[name]) for row in rows])


def windows(changes: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Random windows of changes and what follows each of their days: [count, WINDOW] both."""
    length = min(WINDOW, len(changes) - 1)
    begins = torch.randint(len(changes) - length, (count, 1), device=changes.device)
    at = begins + torch.arange(length, device=changes.device)
    return changes[at], changes[at + 1]


def rmse(forecast: Tensor, truth: Tensor) -> float:
    return (forecast - truth).square().mean().sqrt().item()


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = example_parser(__doc__.splitlines()[0], "forecast", steps=300)
    add = parser.add_argument
    add("--csv", type=Path, help="a file with the series (default: one is generated)")
    add("--column", help="its column (default: the last one)")
    add("--days", type=positive_int, default=1500, help="length of the generated series")
    add("--hidden", type=positive_int, default=32, help="hidden size")
    args = parser.parse_args(argv)
    try:
        args.series = read_csv(args.csv, args.column) if args.csv else None
    except (OSError, ValueError, KeyError, IndexError) as error:
        parser.error(f"argument --csv: {args.csv}: {error!r}")
    days = args.days if args.series is None else len(args.series)
    if days < 20:
        parser.error(f"the series has {days} values; at least 20 are needed")
    return args


def main(argv: list[str] | None = None) -> dict[str, float]:
    args = parse(argv)
    rnn = start(args)
    series = price_like(args.days, torch.Generator().manual_seed(args.seed)) if args.series is None else args.series
    n_train = int(len(series) * (1 - TEST_FRACTION))

    changes = series.diff()  # changes[i] leads from series[i] to series[i + 1]
    scale = changes[: n_train - 1].std()
    scaled = (changes / scale).to(args.device)

    model = Forecaster(rnn, args.hidden).to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    bar = progress(args.steps)
    for _ in bar:
        past, following = windows(scaled[: n_train - 1], count=32)
        loss = nn.functional.mse_loss(model(past), following)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(mse=loss.item(), refresh=False)

    with torch.no_grad():
        expected = model(scaled[:-1].unsqueeze(0))[0].cpu() * scale
    forecast = series[1:-1] + expected  # of series[2:]
    truth, naive = series[2:], series[1:-1]
    test = slice(n_train - 2, None)
    error, naive_error = rmse(forecast[test], truth[test]), rmse(naive[test], truth[test])

    figure, axes = new_figure(title="One day ahead, in the test's first days", xlabel="day", ylabel="value")
    days = range(n_train, len(series))[:90]
    for name, curve, style in (("truth", truth, "k-"), ("naive", naive, "C1:"), ("LSTM", forecast, "C0--")):
        axes.plot(days, curve[test][: len(days)], style, label=name)
    return finish(args, figure, rmse=error, naive_rmse=naive_error, of_the_naive=error / naive_error)


if __name__ == "__main__":
    main()
