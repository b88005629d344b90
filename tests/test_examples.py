"""The examples at a tiny size: they run, learn, agree with torch.nn, and are the same twice."""

from __future__ import annotations

import importlib
import math
from pathlib import Path

import pytest
import torch

import fusedrnn

both = pytest.mark.parametrize("impl", ["torch", "fusedrnn"])
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TINY = ["--threads", "1", "--hidden", "32", "--batch", "16", "--seq", "16", "--sample", "20"]


@pytest.fixture
def example(monkeypatch, tmp_path):
    """Runs an example by its name, with its picture in tmp_path."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def run(name: str, *arguments: str) -> dict[str, float]:
        picture = tmp_path / f"{name}.png"
        metrics = importlib.import_module(name).main(["--threads", "1", "--plot", str(picture), *arguments])
        assert picture.read_bytes().startswith(b"\x89PNG")
        return metrics

    return run


@pytest.fixture
def char_lm(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("char_lm")


@pytest.fixture
def tiny(tmp_path):
    """Options for a run of a second on the novel's first pages."""
    text = tmp_path / "pages.txt"
    text.write_text((EXAMPLES / "data" / "pride_and_prejudice.txt").read_text()[:60_000])
    return [*TINY, "--text", str(text), "--plot", str(tmp_path / "plots" / "loss.png")]


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_char_lm_learns_as_with_torch(char_lm, tiny, cell):
    results = char_lm.main([*tiny, "--steps", "100", "--compare", "--cell", cell])
    for impl in ("torch", "fusedrnn"):
        assert results[impl]["valid_bpc"] < results["unigram_bpc"] - 0.3
        assert results[impl]["sample"].startswith("It is a truth")
        assert len(results[impl]["sample"]) == len("It is a truth") + 20
    assert results["first_difference"] < 1e-5
    assert results["largest_difference"] < 1e-2
    assert Path(results["plot"]).read_bytes().startswith(b"\x89PNG")


@both
def test_char_lm_is_deterministic(char_lm, tiny, impl):
    arguments = [*tiny, "--steps", "8", "--layers", "2", "--impl", impl]
    first, second = (char_lm.main(arguments)[impl] for _ in range(2))
    assert first["losses"] == second["losses"]
    assert first["sample"] == second["sample"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "argument --steps: must be at least 1"),
        (["--lr", "nan"], "argument --lr: must be a number above 0"),
        (["--temperature", "0"], "argument --temperature: must be a number above 0"),
        (["--device", "toaster"], "argument --device: cannot use 'toaster'"),
        (["--cell", "qrnn"], "argument --cell: invalid choice: 'qrnn'"),
        (["--prompt", ""], "argument --prompt: must not be empty"),
        (["--prompt", "naïve"], "argument --prompt: not in the text: 'ï'"),
        (["--text", "no/such/file.txt"], "argument --text: "),
        (["--batch", "100000"], "are too few for --batch 100000 --seq 64"),
    ],
)
def test_char_lm_argument_errors(char_lm, arguments, message, capsys):
    with pytest.raises(SystemExit):
        char_lm.main(arguments)
    assert message in capsys.readouterr().err


@both
def test_rnn_by_hand(example, impl):
    metrics = example("rnn_by_hand", "--impl", impl, "--steps", "200", "--hidden", "32")
    assert metrics["output_difference"] < 1e-5
    assert metrics["gradient_difference"] < 1e-5
    assert metrics["bits_by_hand"] < 3.5
    assert abs(metrics["bits_by_hand"] - metrics["bits_of_the_module"]) < 1e-2


@both
def test_shape_tour(example, impl, capsys):
    assert example("shape_tour", "--impl", impl, "--steps", "8", "--batch", "2")["difference"] == 0
    assert "(8, 2, 12)    (4, 2, 6)" in capsys.readouterr().out


@both
def test_sine_to_cosine(example, impl):
    assert example("sine_to_cosine", "--impl", impl, "--steps", "150")["mse"] < 0.05


@both
def test_word_lm(example, impl, tmp_path):
    text = tmp_path / "pages.txt"
    text.write_text((EXAMPLES / "data" / "pride_and_prejudice.txt").read_text()[:200_000])
    sizes = ["--hidden", "48", "--batch", "16", "--seq", "16", "--dropout", "0.1", "--lr", "2e-2"]
    metrics = example("word_lm", "--impl", impl, "--steps", "200", "--text", str(text), *sizes)
    assert metrics["perplexity"] < 0.95 * metrics["unigram_perplexity"]


@both
def test_intents(example, impl, capsys):
    assert example("intents", "--impl", impl, "--steps", "100", "--ask", "wake me at six")["accuracy"] > 0.5
    assert "'wake me at six': alarm" in capsys.readouterr().out


@both
def test_translation(example, impl, capsys):
    arguments = ["--steps", "300", "--batch", "32", "--say", "is she happy ?"]
    assert example("translation", "--impl", impl, *arguments)["exact_match"] > 0.1
    assert "is she happy ?  ->  est-ce qu' elle" in capsys.readouterr().out


def test_translation_of_an_unknown_word(example, capsys):
    with pytest.raises(SystemExit):
        example("translation", "--say", "is she hungry ?")
    assert "argument --say: not among the words: hungry" in capsys.readouterr().err


@both
def test_forecast(example, impl):
    metrics = example("forecast", "--impl", impl, "--steps", "60", "--days", "600", "--hidden", "16")
    assert metrics["of_the_naive"] < 0.9
    assert metrics["of_the_naive"] == metrics["rmse"] / metrics["naive_rmse"]


def test_forecast_of_a_csv(example, tmp_path):
    path = tmp_path / "waves.csv"
    path.write_text("day,high,low\n" + "".join(f"{t},{math.sin(t / 3)},7\n" for t in range(300)))
    metrics = example("forecast", "--csv", str(path), "--column", "high", "--steps", "60", "--hidden", "16")
    assert metrics["naive_rmse"] == pytest.approx(2 * math.sin(1 / 6) / math.sqrt(2), rel=0.1)
    assert metrics["of_the_naive"] < 0.5


@pytest.mark.parametrize("text", ["", "value\nseven\n", "value\n1\n2\n"])
def test_forecast_of_a_bad_csv(example, tmp_path, text, capsys):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(SystemExit):
        example("forecast", "--csv", str(path))
    assert "error: " in capsys.readouterr().err


@both
def test_vanishing_gradients(example, impl):
    metrics = example("vanishing_gradients", "--impl", impl, "--steps", "200", "--length", "40")
    assert metrics["rnn"] < 1e-6 < 1e-2 < min(metrics["lstm"], metrics["gru"])
    assert metrics["accuracy_clipped"] > 0.9
    assert metrics["accuracy_not_clipped"] < 0.6


@both
def test_t_maze(example, impl, monkeypatch):
    monkeypatch.setattr("t_maze.SHORTEST", 1)
    monkeypatch.setattr("t_maze.LONGEST", 2)
    assert example("t_maze", "--impl", impl, "--steps", "120", "--mazes", "32", "--stretch", "16")["right_turns"] > 0.9


def test_t_maze_resets(example):
    """The loop for torch.nn does what `reset` does in fusedrnn."""
    t_maze = importlib.import_module("t_maze")
    policy = t_maze.Policy(fusedrnn, 8)
    sights, reset = torch.randn(6, 3, t_maze.SIGHTS), torch.rand(6, 3) < 0.4
    state = (torch.randn(1, 3, 8), torch.randn(1, 3, 8))
    output, (h_n, c_n) = policy.lstm(sights, state, reset=reset)
    expected, (expected_h_n, expected_c_n) = t_maze.resetting(policy.lstm, sights, state, reset)
    torch.testing.assert_close((output, h_n, c_n), (expected, expected_h_n, expected_c_n))
