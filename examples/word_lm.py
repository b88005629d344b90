"""A word-level language model: two layers of LSTM with dropout.

    python examples/word_lm.py

As char_lm.py, with words and punctuation marks for characters. There are far more of them than in
an alphabet and each is seen less often, so the network would soon know the text by heart: dropout
(between embedding, layers and output) keeps it from that. Words that are too rare to learn are all
one word, <unk>, which the sample text never uses.

At the defaults it reaches a perplexity of 111 on text it has not read: it is as uncertain as if it
had to choose among 111 words. A model that knows only how frequent each word is has 294.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path
from types import ModuleType

import torch
from char_lm import streams
from common import HERE, detached, example_parser, finish, new_figure, positive_float, positive_int, progress, start
from torch import Tensor, nn

RARE = 5  # a word that occurs less often is <unk>
VALID_FRACTION = 0.1
VALID_TIMES = 10


class WordLM(nn.Module):
    def __init__(self, rnn: ModuleType, n_words: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(n_words, hidden)
        self.lstm = rnn.LSTM(hidden, hidden, num_layers=2, dropout=dropout)
        self.head = nn.Linear(hidden, n_words)
        self.head.weight = self.embed.weight  # one vector a word, read and written
        self.dropout = nn.Dropout(dropout)
        nn.init.uniform_(self.embed.weight, -0.1, 0.1)

    def forward(self, words: Tensor, state=None):  # [T, N] -> scores [T, N, n_words]
        output, state = self.lstm(self.dropout(self.embed(words)), state)
        return self.head(self.dropout(output)), state


def split_words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z]+(?:'[a-z]+)?|[.,;:!?]", text)


def cross_entropy(scores: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(scores.flatten(0, 1), targets.flatten())


@torch.no_grad()
def perplexity(model: WordLM, text: Tensor) -> float:  # text [T, N]
    model.eval()
    inputs, targets, state, total = text[:-1], text[1:], None, 0.0
    for x, y in zip(inputs.split(64), targets.split(64), strict=True):
        scores, state = model(x, state)
        total += cross_entropy(scores, y).item() * len(x)
    model.train()
    return math.exp(total / len(inputs))


def unigram_perplexity(train: Tensor, valid: Tensor, n_words: int) -> float:
    counts = torch.bincount(train, minlength=n_words).double() + 1
    return (counts / counts.sum()).log()[valid].mean().neg().exp().item()


@torch.no_grad()
def sample(model: WordLM, vocab: list[str], length: int, temperature: float) -> str:
    """Begins after a full stop."""
    model.eval()
    device = model.head.weight.device
    words, state = ["."], None
    for _ in range(length):
        scores, state = model(torch.tensor([[vocab.index(words[-1])]], device=device), state)
        scores = scores[0, 0] / temperature
        scores[0] = -math.inf  # <unk>
        words.append(vocab[int(torch.multinomial(scores.softmax(0), 1))])
    return re.sub(r" ([.,;:!?])", r"\1", " ".join(words[1:]))


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = example_parser(__doc__.splitlines()[0], "word_lm", steps=600)
    add = parser.add_argument
    add("--hidden", type=positive_int, default=200, help="hidden size")
    add("--batch", type=positive_int, default=32, help="streams of text read side by side")
    add("--seq", type=positive_int, default=32, help="words of each stream in a step")
    add("--dropout", type=float, default=0.4, help="probability of dropping a value")
    add("--lr", type=positive_float, default=5e-3, help="Adam's first learning rate")
    add("--temperature", type=positive_float, default=0.8, help="of the sample text")
    add("--text", type=Path, default=HERE / "data" / "pride_and_prejudice.txt", help="to learn")
    args = parser.parse_args(argv)
    rnn = start(args)

    words = split_words(args.text.read_text())
    vocab = ["<unk>", *sorted(word for word, count in Counter(words).items() if count >= RARE)]
    index = {word: i for i, word in enumerate(vocab)}
    text = torch.tensor([index.get(word, 0) for word in words], device=args.device)
    train, valid = text.split([len(text) - int(VALID_FRACTION * len(text)), int(VALID_FRACTION * len(text))])
    unigram = unigram_perplexity(train, valid, len(vocab))
    print(f"{len(train):,} words to learn, {len(valid):,} to validate, {len(vocab):,} different")
    train, valid = streams(train, args.batch), streams(valid, min(args.batch, len(valid) // 2))

    model = WordLM(rnn, len(vocab), args.hidden, args.dropout).to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), args.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    losses, curve = [], []
    position, state = 0, None
    bar = progress(args.steps)
    for step in bar:
        if position + args.seq + 1 > len(train):  # the end of the text: begin again
            position, state = 0, None
        window = train[position : position + args.seq + 1]
        position += args.seq
        scores, state = model(window[:-1], state)
        state = detached(state)
        loss = cross_entropy(scores, window[1:])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.exp().item())
        if (step + 1) % max(1, args.steps // VALID_TIMES) == 0 or step + 1 == args.steps:
            curve.append((step, perplexity(model, valid)))
            bar.set_postfix(training=losses[-1], validation=curve[-1][1], refresh=False)

    print(f"\n{sample(model, vocab, 60, args.temperature)}\n")
    figure, axes = new_figure(title="Word-level LSTM, 2 layers", xlabel="training step", ylabel="perplexity")
    axes.semilogy(losses, lw=0.5, label="training")
    axes.semilogy(*zip(*curve, strict=True), "o-", label="validation")
    axes.axhline(unigram, color="gray", ls="--", label="unigram model")
    return finish(args, figure, perplexity=curve[-1][1], unigram_perplexity=unigram)


if __name__ == "__main__":
    main()
