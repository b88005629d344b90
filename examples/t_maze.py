"""Reinforcement learning with a memory: a recurrent policy finds its way through a T-maze.

    python examples/t_maze.py

        +---+                      At its start the agent sees a sign, left or right. Then it walks a
        | ? |                      corridor in which all looks the same, 5 to 10 steps, to a junction.
    +---+   |                      There it turns. The turn that the sign said is worth 1, the other
    | S ... |                      -1, and each bump into a wall -0.1. Without a memory of the sign
    +---+   |                      no policy gets it right more than half of the time.
        | ? |
        +---+

Many mazes are walked side by side, and where one ends the next begins: a stretch of experience
[T, N] has several episodes in a row, and the state must be zeroed before the first step of each.
torch.nn's LSTM has no way to do that within a sequence, so it is run a step at a time;
fusedrnn.LSTM takes the mask (`reset`), and the whole stretch is one call.

The gradient is the policy gradient with a learnt baseline (advantage actor-critic). At the defaults
99.9% of the last turns are right (100% with another seed).
"""

from __future__ import annotations

from types import ModuleType

import torch
from common import detached, example_parser, finish, new_figure, positive_int, progress, start
from torch import Tensor, nn

FORWARD, LEFT, RIGHT = range(3)
SIGHTS = 4  # sign to the left, sign to the right, corridor, junction
SHORTEST, LONGEST = 5, 10
DISCOUNT = 0.95

State = tuple[Tensor, Tensor]


class TMazes:
    """N mazes; the next one begins where one ends."""

    def __init__(self, n: int, device: torch.device) -> None:
        self.place = torch.zeros(n, dtype=torch.long, device=device)
        self.sign, self.length = torch.empty_like(self.place), torch.empty_like(self.place)
        self._begin(torch.ones_like(self.place, dtype=torch.bool))

    def _begin(self, ended: Tensor) -> None:
        self.place[ended] = 0
        self.sign[ended] = torch.randint_like(self.sign, LEFT, RIGHT + 1)[ended]
        self.length[ended] = torch.randint_like(self.length, SHORTEST, LONGEST + 1)[ended]

    def look(self) -> Tensor:  # [N, SIGHTS]
        sight = torch.where(self.place == 0, self.sign - LEFT, 2 + (self.place == self.length).long())
        return nn.functional.one_hot(sight, SIGHTS).float()

    def step(self, action: Tensor) -> tuple[Tensor, Tensor]:
        """Rewards [N], and whether the episode has ended [N]; what is seen then is the next one's."""
        junction = self.place == self.length
        ended = junction & (action != FORWARD)
        moved = ~junction & (action == FORWARD)
        reward = torch.where(ended, torch.where(action == self.sign, 1.0, -1.0), torch.where(moved, 0.0, -0.1))
        self.place += moved
        self._begin(ended)
        return reward, ended


class Policy(nn.Module):
    def __init__(self, rnn: ModuleType, hidden: int) -> None:
        super().__init__()
        self.lstm = rnn.LSTM(SIGHTS, hidden)
        self.actions = nn.Linear(hidden, 3)
        self.value = nn.Linear(hidden, 1)

    def forward(self, sights: Tensor, state: State, reset: Tensor) -> tuple[Tensor, Tensor, State]:
        """sights [T, N, SIGHTS], reset [T, N] -> scores of the actions [T, N, 3], values [T, N], state."""
        if isinstance(self.lstm, nn.LSTM):
            output, state = resetting(self.lstm, sights, state, reset)
        else:
            output, state = self.lstm(sights, state, reset=reset)
        return self.actions(output), self.value(output).squeeze(-1), state


def resetting(lstm: nn.LSTM, x: Tensor, state: State, reset: Tensor) -> tuple[Tensor, State]:
    """What reset= does: the state is zeroed before the steps where reset [T, N] is True."""
    outputs = []
    for x_t, reset_t in zip(x.split(1), reset.split(1), strict=True):
        h, c = (s.masked_fill(reset_t.unsqueeze(-1), 0) for s in state)
        output, state = lstm(x_t, (h, c))
        outputs.append(output)
    return torch.cat(outputs), state


def walk(mazes: TMazes, policy: Policy, state: State, reset: Tensor, steps: int) -> dict[str, Tensor]:
    """A stretch of experience: sights, resets, actions, rewards and ends, each [T, N] or [T, N, .]."""
    stretch: dict[str, list[Tensor]] = {"sights": [], "reset": [], "action": [], "reward": [], "ended": []}
    for _ in range(steps):
        sights = mazes.look()
        scores, _, state = policy(sights.unsqueeze(0), state, reset.unsqueeze(0))
        action = torch.multinomial(scores[0].softmax(-1), 1).squeeze(-1)
        reward, ended = mazes.step(action)
        for name, value in zip(stretch, (sights, reset, action, reward, ended), strict=True):
            stretch[name].append(value)
        reset = ended
    return {name: torch.stack(values) for name, values in stretch.items()}


def discounted(reward: Tensor, ended: Tensor, beyond: Tensor) -> Tensor:
    """Returns [T, N]: rewards to come in the episode; beyond [N] are those after the stretch."""
    returns = []
    for r, e in zip(reward.flip(0), ended.flip(0), strict=True):
        beyond = r + DISCOUNT * beyond.masked_fill(e, 0)
        returns.append(beyond)
    return torch.stack(returns[::-1])


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = example_parser(__doc__.splitlines()[0], "t_maze", steps=400)
    parser.add_argument("--hidden", type=positive_int, default=32, help="hidden size")
    parser.add_argument("--mazes", type=positive_int, default=64, help="walked side by side")
    parser.add_argument("--stretch", type=positive_int, default=32, help="steps of experience in a training step")
    args = parser.parse_args(argv)
    rnn = start(args)

    policy = Policy(rnn, args.hidden).to(args.device)
    optimizer = torch.optim.Adam(policy.parameters(), 5e-3)
    mazes = TMazes(args.mazes, args.device)
    state: State = (torch.zeros(1, args.mazes, args.hidden, device=args.device),) * 2
    reset = torch.ones(args.mazes, dtype=torch.bool, device=args.device)
    curve: list[float] = []  # fraction of right turns
    bar = progress(args.steps)
    for _ in bar:
        with torch.no_grad():
            stretch = walk(mazes, policy, state, reset, args.stretch)
        scores, values, state = policy(stretch["sights"], state, stretch["reset"])
        state, reset = detached(state), stretch["ended"][-1]

        with torch.no_grad():
            _, beyond, _ = policy(mazes.look().unsqueeze(0), state, reset.unsqueeze(0))
        returns = discounted(stretch["reward"], stretch["ended"], beyond[0])
        advantage = (returns - values).detach()
        log_probabilities = scores.log_softmax(-1)
        said = log_probabilities.gather(-1, stretch["action"].unsqueeze(-1)).squeeze(-1)
        entropy = -(log_probabilities.exp() * log_probabilities).sum(-1)
        loss = (-said * advantage + 0.5 * (returns - values).square() - 0.01 * entropy).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
        optimizer.step()

        turns = stretch["reward"][stretch["ended"]]
        if len(turns):
            curve.append((turns > 0).float().mean().item())
            bar.set_postfix(right_turns=curve[-1], refresh=False)

    figure, axes = new_figure(title="A recurrent policy in a T-maze", xlabel="training step", ylabel="right turns")
    axes.plot(curve, lw=0.7, label=f"LSTM, {args.hidden} units")
    axes.axhline(0.5, color="gray", ls="--", label="without a memory")
    last = curve[-max(1, len(curve) // 20) :] or [float("nan")]
    return finish(args, figure, right_turns=sum(last) / len(last))


if __name__ == "__main__":
    main()
