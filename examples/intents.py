"""What is wanted? The intent of short questions, from the last hidden state of a bidirectional LSTM.

    python examples/intents.py
    python examples/intents.py --ask "will it rain in paris"

Questions differ in length: they are packed, so that no step is spent on padding, and h_n holds each
sequence's own last state. It has one row for each direction: forwards after the last word, backwards
after the first. Both, side by side, are what the classifier sees.

The questions come from patterns with places to fill in. The test is on patterns held out: none of
its questions differs from one in training by a name alone. At the defaults 98% of them are right,
with other seeds 86% and more (14% by chance).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import chain
from types import ModuleType

import torch
from common import example_parser, finish, new_figure, positive_int, progress, start
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

FILLINGS = {
    "city": ["paris", "london", "rome", "oslo", "cairo", "lima", "delhi", "tokyo"],
    "day": ["today", "tomorrow", "on monday", "on friday", "this evening", "next week"],
    "time": ["at six", "at seven", "at noon", "at nine thirty", "in ten minutes", "in two hours"],
    "music": ["some jazz", "the beatles", "a waltz", "bach", "that new song", "something quiet"],
    "person": ["anna", "my mother", "the doctor", "john", "my boss", "the plumber"],
    "dish": ["lasagne", "onion soup", "a pancake", "rice", "bread", "apple pie"],
    "language": ["french", "spanish", "german", "latin", "dutch", "greek"],
    "word": ["bread", "monday", "rain", "song", "doctor", "alarm"],
}
PATTERNS = {
    "weather": [
        "will it rain in {city} {day}",
        "how warm will it be {day} in {city}",
        "what is the weather in {city}",
        "do i need an umbrella {day}",
        "is it cold in {city} {day}",
        "will the sun shine {day}",
        "tell me the weather {day}",
        "is there rain in {city}",
    ],
    "alarm": [
        "wake me {time}",
        "set an alarm {time} {day}",
        "can you wake me up {day} {time}",
        "i need to get up {time}",
        "please set the alarm for me {time}",
        "ring {time} so that i get up",
        "set my alarm {day}",
        "wake us {time} {day}",
    ],
    "music": [
        "play {music}",
        "i want to hear {music}",
        "can you play {music} {time}",
        "put on {music} please",
        "let me hear {music} {day}",
        "could we hear {music}",
        "please play {music}",
        "would you put on {music}",
    ],
    "call": [
        "call {person}",
        "phone {person} {time}",
        "can you ring {person} for me",
        "i want to talk to {person}",
        "please call {person} {day}",
        "could you phone {person}",
        "let me talk to {person}",
        "ring {person} {time}",
    ],
    "cooking": [
        "how do i cook {dish}",
        "what do i need for {dish}",
        "how long does {dish} take in the oven",
        "tell me how to make {dish}",
        "i want to cook {dish} {day}",
        "is {dish} hard to make",
        "find me a recipe for {dish}",
        "what is a good recipe for {dish}",
    ],
    "translation": [
        "what is {word} in {language}",
        "how do you say {word} in {language}",
        "translate {word} to {language}",
        "tell me the {language} for {word}",
        "what does {word} mean in {language}",
        "how is {word} said in {language}",
        "can you translate {word} for me to {language}",
        "say {word} in {language}",
    ],
    "time": [
        "what time is it in {city}",
        "how late is it",
        "tell me the time in {city}",
        "is it noon in {city}",
        "what is the time",
        "how late is it now in {city}",
        "do you know what time it is",
        "can you tell me what time it is",
    ],
}
HELD_OUT = 2  # the last patterns of each intent
INTENTS = list(PATTERNS)


def questions(patterns: Sequence[str], count: int, chance: random.Random) -> list[str]:
    """Random ones: a pattern with its places filled in."""
    return [
        chance.choice(patterns).format(**{name: chance.choice(fill) for name, fill in FILLINGS.items()})
        for _ in range(count)
    ]


class IntentClassifier(nn.Module):
    def __init__(self, rnn: ModuleType, n_words: int, hidden: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(n_words, 32)
        self.lstm = rnn.LSTM(32, hidden, bidirectional=True)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(2 * hidden, len(INTENTS))

    def forward(self, words: PackedSequence) -> Tensor:  # -> scores [N, intents]
        embedded = words._replace(data=self.dropout(self.embed(words.data)))
        _, (h_n, _) = self.lstm(embedded)
        forwards, backwards = h_n  # [N, hidden] each
        return self.head(self.dropout(torch.cat([forwards, backwards], -1)))


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = example_parser(__doc__.splitlines()[0], "intents", steps=300)
    parser.add_argument("--hidden", type=positive_int, default=32, help="hidden size of each direction")
    parser.add_argument("--batch", type=positive_int, default=64, help="questions in a step")
    parser.add_argument("--ask", help="a question of your own, after the training")
    args = parser.parse_args(argv)
    rnn = start(args)
    chance = random.Random(args.seed)

    known = {intent: patterns[:-HELD_OUT] for intent, patterns in PATTERNS.items()}
    texts = chain(*known.values(), *FILLINGS.values())
    vocab = ["<unk>", *sorted({word for text in texts for word in text.split()})]
    index = {word: i for i, word in enumerate(vocab)}

    def packed(texts: Sequence[str]) -> PackedSequence:
        numbers = [torch.tensor([index.get(word, 0) for word in text.split()]) for text in texts]
        return pack_sequence(numbers, enforce_sorted=False).to(args.device)

    model = IntentClassifier(rnn, len(vocab), args.hidden).to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    bar = progress(args.steps)
    for _ in bar:
        intents = [chance.randrange(len(INTENTS)) for _ in range(args.batch)]
        asked = [questions(known[INTENTS[i]], 1, chance)[0] for i in intents]
        loss = nn.functional.cross_entropy(model(packed(asked)), torch.tensor(intents, device=args.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        bar.set_postfix(loss=losses[-1], refresh=False)

    model.eval()
    confusion = torch.zeros(len(INTENTS), len(INTENTS))  # [true, said]
    with torch.no_grad():
        for true, patterns in enumerate(PATTERNS.values()):
            said = model(packed(questions(patterns[-HELD_OUT:], 100, chance))).argmax(-1)
            confusion[true] = torch.bincount(said.cpu(), minlength=len(INTENTS)) / 100
        for text in [args.ask] if args.ask else ["could you wake me at noon", "is it warm in lima"]:
            probabilities = model(packed([text]))[0].softmax(-1)
            print(f"{text!r}: {INTENTS[int(probabilities.argmax())]} ({probabilities.max():.0%})")

    figure, axes = new_figure(title="Held-out questions: what was meant, what was understood", xlabel="understood")
    axes.imshow(confusion.numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(INTENTS)), INTENTS, rotation=30)
    axes.set_yticks(range(len(INTENTS)), INTENTS)
    for true, said in confusion.nonzero():
        axes.text(said, true, f"{confusion[true, said]:.0%}", ha="center", va="center", color="C1")
    return finish(args, figure, accuracy=confusion.diagonal().mean().item())


if __name__ == "__main__":
    main()
