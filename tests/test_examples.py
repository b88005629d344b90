"""The examples at a tiny size: they run, learn, agree with torch.nn, and are the same twice."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TINY = ["--threads", "1", "--hidden", "32", "--batch", "16", "--seq", "16", "--sample", "20"]


@pytest.fixture
def char_lm(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("char_lm")


@pytest.fixture
def tiny(tmp_path):
    """Options for a run of a second on the novel's first pages."""
    text = tmp_path / "pages.txt"
    text.write_text((EXAMPLES / "data" / "pride_and_prejudice.txt").read_text()[:60_000])
    return [*TINY, "--text", str(text), "--out", str(tmp_path / "plots" / "loss.png")]


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


@pytest.mark.parametrize("impl", ["torch", "fusedrnn"])
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
