"""What the tests of the experiments share: a small corpus, and a script that runs in the tests' process."""

import random
from pathlib import Path
from types import ModuleType

import pytest

from data.corpus import Texts, write_corpus
from data.tokenizer import tokenizer_from_meta

WORDS = "def return self for in if not is None ( ) : , = the a of number value text line".split()


def made_text(characters: int) -> str:
    """Lines of words, the same on every machine."""
    rng, text = random.Random(0), ""
    while len(text) < characters:
        text += " ".join(rng.choices(WORDS, k=rng.randint(3, 12))) + "\n"
    return text[:characters]


def write_tiny_corpus(folder: Path, train: int, val: int) -> Path:
    """The folder, which gets a corpus of so many bytes of training and validation text."""
    text = made_text(train + val)
    tokenizer = tokenizer_from_meta({"name": "byte"})
    write_corpus(folder, Texts([("a", text[:train])], [("b", text[train:])], {}), tokenizer)
    return folder


def command(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """python experiments/MODULE.py ARGUMENTS"""
    monkeypatch.setattr("sys.argv", [f"{module.__name__}.py", *map(str, arguments)])
    module.main()
