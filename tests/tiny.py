"""What the tests of the experiments share: a small corpus, and a script that runs in the tests' process."""

from pathlib import Path
from types import ModuleType

import pytest

from data.corpus import Texts, write_corpus
from data.tokenizer import tokenizer_from_meta
from training_runs import text


def write_tiny_corpus(folder: Path, train: int, val: int) -> Path:
    """The folder, which gets a corpus of so many bytes of training and validation text."""
    whole, tokenizer = text(train + val), tokenizer_from_meta({"name": "byte"})
    write_corpus(folder, Texts([("a", whole[:train])], [("b", whole[train:])], {}), tokenizer)
    return folder


def command(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """python experiments/MODULE.py ARGUMENTS"""
    monkeypatch.setattr("sys.argv", [f"{module.__name__}.py", *map(str, arguments)])
    module.main()
