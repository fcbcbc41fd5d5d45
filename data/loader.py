"""
A prepared corpus as batches of token windows.

A training batch is a pure function of (seed, iteration, micro-batch). It depends neither on what was drawn before,
nor on evaluation, nor on how many processes share the work: a resumed run sees just what an uninterrupted one does.
Validation is on fixed windows, the same for every run, so that two runs compare without noise.

Windows are read from the file, not through a memory map, whose pages would count as this process's memory as they
fill up. They lie anywhere in the packed stream: one can begin inside a document and hold the start of the next.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from configurator import UserError
from data.tokenizer import GPT2_VOCAB_SIZE


@dataclass(frozen=True)
class Corpus:
    """A checked corpus: made by load_corpus. A window is block_size tokens and the one after."""

    folder: Path
    block_size: int
    vocab_size: int  # of the model: every id is below it
    tokenizer_meta: dict  # for tokenizer_from_meta
    dtype: str
    train_tokens: int
    val_tokens: int

    def batch(self, batch_size, seed, iteration, micro):
        """
        (x, y), both (batch_size, block_size) int64: random windows of train.bin and the same shifted by one token.
        micro is the micro-batch's number within the step, over all processes. All arguments are ints >= 0.
        """
        random = np.random.default_rng(np.random.SeedSequence([seed, iteration, micro]))
        return self._windows("train", random.integers(0, self.train_tokens - self.block_size, size=batch_size))

    def val_windows(self, count):
        """(n,) int64 starts of windows, evenly spread over val.bin: n = count, or fewer where no more are distinct."""
        distinct = self.val_tokens - self.block_size
        count = min(count, distinct)
        return np.arange(count, dtype=np.int64) * (distinct - 1) // max(count - 1, 1)

    def val_batch(self, starts):
        """(x, y), both (len(starts), block_size) int64: the windows of val.bin at starts, see val_windows."""
        return self._windows("val", starts)

    def _windows(self, split, starts):
        path, dtype = self.folder / f"{split}.bin", np.dtype(self.dtype)
        length = self.block_size + 1
        try:
            with open(path, "rb") as file:
                rows = []
                for start in starts:
                    file.seek(int(start) * dtype.itemsize)
                    rows.append(np.frombuffer(file.read(length * dtype.itemsize), dtype, length))
            tokens = torch.from_numpy(np.stack(rows).astype(np.int64))  # (B, T + 1)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} has changed since training began ({error}): {_remake(self.folder)}") from error
        if tokens.max() >= self.vocab_size:
            raise UserError(f"{path} has the token id {tokens.max()}, but its vocabulary is {self.vocab_size}: "
                            f"it was made with another tokenizer; {_remake(self.folder)}")
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def load_corpus(folder, block_size):
    """
    The Corpus in folder (see data/corpus.py for its files), or a nanoGPT one: train.bin and val.bin with GPT-2 ids in
    uint16. UserError: nothing there, incomplete, or no longer than block_size.
    """
    folder = Path(folder)
    meta = _read_meta(folder)
    for split in "train", "val":
        path, tokens = folder / f"{split}.bin", meta[f"{split}_tokens"]
        size, expected = path.stat().st_size, tokens * np.dtype(meta["dtype"]).itemsize
        if size != expected:
            raise UserError(f"{path} has {size:,} bytes, but meta.json says {expected:,}: {_remake(folder)}")
        if tokens <= block_size:
            raise UserError(f"{path} has {tokens:,} tokens, too few for block_size={block_size} and one token more: "
                            f"set --block_size below {tokens}, or prepare more text")
    return Corpus(folder, block_size, meta["vocab_size"], meta["tokenizer"], meta["dtype"],
                  meta["train_tokens"], meta["val_tokens"])


def _read_meta(folder):
    """meta.json's dict with the keys that load_corpus needs, when all three files are there."""
    missing = [name for name in ("train.bin", "val.bin") if not (folder / name).is_file()]
    path = folder / "meta.json"
    if missing:
        there = {file.parent.name for kind in ("prepare.py", "train.bin") for file in folder.parent.glob(f"*/{kind}")}
        others = ", ".join(sorted(there - {folder.name, "text"}))
        raise UserError(f"{folder} has no {' and no '.join(missing)}: {_remake(folder)}"
                        + (f"; or choose another data set of {folder.parent}: {others}" if others else ""))
    if (folder / "meta.pkl").exists() and not path.exists():
        raise UserError(f"{folder} has nanoGPT's meta.pkl but no meta.json; a pickle is not read, as it could run any "
                        f"code: {_remake(folder)}")
    if not path.exists():
        print(f"{folder} has no meta.json: its ids are taken for GPT-2's in uint16, as nanoGPT writes them")
        tokens = {f"{split}_tokens": (folder / f"{split}.bin").stat().st_size // 2 for split in ("train", "val")}
        return {"vocab_size": GPT2_VOCAB_SIZE, "dtype": "uint16", "tokenizer": {"name": "gpt2"}, **tokens}
    try:
        match json.loads(path.read_bytes()):
            case {"unfinished": True}:
                raise UserError(f"the preparation of {folder} was cut off at its very end: {_remake(folder)}")
            case {"vocab_size": int(), "dtype": "uint16" | "uint32", "tokenizer": dict(),
                  "train_tokens": int(), "val_tokens": int()} as meta:
                return meta
    except (OSError, ValueError):
        pass
    raise UserError(f"{path} is no corpus's meta data: {_remake(folder)}")


def _remake(folder):
    """What makes the corpus in folder, as the end of a message."""
    if (folder / "prepare.py").exists() and folder.name != "text":
        return f"run python {folder / 'prepare.py'}"
    name = "NAME" if folder.name == "text" else folder.name
    return f"run python {folder.parent / 'text' / 'prepare.py'} --input=FILE_OR_FOLDER --out={name}"
