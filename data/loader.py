"""A prepared corpus as batches of token windows.

A training batch is a pure function of (seed, number of its first window). It depends neither on what was drawn before,
nor on evaluation, nor on how many processes share the work: a resumed run sees just what an uninterrupted one does.
Validation is on fixed windows, the same for every run, so that two runs compare without noise.

An epoch takes each token once. Its text is cut into windows of block_size tokens, and these are shuffled; the next
epoch cuts elsewhere. How it is cut is the key `windows`:

    packed      the stream of all documents as if it were one, as in nanoGPT: a window begins anywhere, and can hold the
                end of one document and the start of the next
    document    windows lie within documents, as many in each as it has room for, so that the context is real. What is
                left of these, and documents that are shorter, share windows.

Windows are read from the file, not through a memory map, whose pages would count as this process's memory as they
fill up. The files stay open: a corpus that is prepared anew takes their names, not their bytes, and the run goes on
with the text that it began with.

Dims: B windows in a batch, T tokens in a window (block_size), D documents.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from configurator import UserError
from data.corpus import SPLITS, changed_files
from data.tokenizer import GPT2_EOT, GPT2_VOCAB_SIZE, tokenizer_from_meta

Window = list[tuple[int, int]]  # stretches (start, length) of a file's tokens, mostly one; their lengths add up to T
Places = npt.NDArray[np.int64]  # in a file, in tokens
Opened = tuple[io.BufferedReader, int]  # a file, and when it was last written to, in ns


class Batch(NamedTuple):
    """Windows of text."""

    x: Tensor  # (B, T) int64
    y: Tensor  # (B, T) int64, the token after each of x
    documents: Tensor | None = None  # (B, T) int32, with doc_mask: where in its window each token's document begins

    def to(self, device: torch.device) -> "Batch":
        documents = None if self.documents is None else self.documents.to(device)
        return Batch(self.x.to(device), self.y.to(device), documents)


class TextChanged(UserError):
    """A corpus is no longer what was opened."""


class Epoch:
    """One epoch's windows of T tokens. documents, (D + 1,): where each begins and where the last one ends, in tokens
    that have a next one.

    A document of n tokens has n // T windows, with a random part of the rest before them and the other behind. These
    rests, and shorter documents, in random order, are one stream that makes the other windows; what the last of them
    lacks is taken from a whole window, or from the stream's beginning if there is none, and comes twice.
    """

    def __init__(self, documents: Places, T: int, seed: int, epoch: int):
        random = np.random.default_rng(np.random.SeedSequence([seed, epoch]))
        starts, lengths = documents[:-1], np.diff(documents)
        whole, rest = lengths // T, lengths % T
        before = np.where(whole > 0, random.integers(0, rest, endpoint=True), 0)  # shorter documents stay whole
        self.T, self.first, self.ends = T, starts + before, whole.cumsum()
        at, size = np.concatenate([starts, documents[1:] - (rest - before)]), np.concatenate([before, rest - before])
        order = random.permutation(np.flatnonzero(size))
        self.rest_starts, self.rest_ends = at[order], size[order].cumsum()
        self.whole, self.rest = int(whole.sum()), int(rest.sum())
        self.order = random.permutation(self.whole - (-self.rest // T))

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, n: int) -> Window:
        """The n-th window."""
        number = int(self.order[n])
        if number < self.whole:
            return [self._whole(number)]
        position = (number - self.whole) * self.T
        stretches, room = [], self.T
        place = int(np.searchsorted(self.rest_ends, position, side="right"))
        while room:
            if place == len(self.rest_ends):  # the stream's end
                if self.whole:
                    stretches.append((self._whole(number % self.whole)[0], room))
                    break
                position = place = 0
            left = int(self.rest_ends[place]) - position
            size = int(self.rest_ends[place] - (self.rest_ends[place - 1] if place else 0))
            length = min(left, room)
            stretches.append((int(self.rest_starts[place]) + size - left, length))
            position, room, place = position + length, room - length, place + 1
        return stretches

    def _whole(self, number: int) -> tuple[int, int]:
        document = int(np.searchsorted(self.ends, number, side="right"))
        before = int(self.ends[document - 1]) if document else 0
        return int(self.first[document]) + (number - before) * self.T, self.T


@dataclass(frozen=True)
class Corpus:
    """A checked corpus: made by load_corpus. A window is T = block_size tokens and the one after."""

    folder: Path
    block_size: int
    vocab_size: int  # of the model: every id is below it
    tokenizer_meta: dict[str, Any]  # for tokenizer_from_meta
    dtype: str
    train_tokens: int
    val_tokens: int
    windows: str = "packed"
    doc_mask: bool = False  # batches tell where documents begin
    eot: int | None = None  # the token that ends a document, where doc_mask has no *_ends.bin to go by
    checksums: dict[str, str] = field(default_factory=dict)  # SHA-256 by file name; empty: of nanoGPT's make
    _files: dict[str, Opened] = field(default_factory=dict, init=False, repr=False, compare=False)
    # Where documents begin, by split; the last epochs used, by (seed, epoch).
    _starts: dict[str, Places] = field(default_factory=dict, init=False, repr=False, compare=False)
    _epochs: dict[tuple[int, int], Epoch] = field(default_factory=dict, init=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}}  # another process opens its own

    def batch(self, batch_size: int, seed: int, first: int) -> Batch:
        """Windows of train.bin. first: the number of the first one, counted from 0 since the run began, over all steps
        and processes.
        """
        return self.read("train", [self._window(seed, n) for n in range(first, first + batch_size)])

    def _window(self, seed: int, n: int) -> Window:
        """The n-th window of a run."""
        if not self._epochs:
            self._epochs[seed, 0] = Epoch(self._documents("train"), self.block_size, seed, 0)
        epoch, n = divmod(n, len(next(iter(self._epochs.values()))))  # all have as many
        if (seed, epoch) not in self._epochs:
            while len(self._epochs) > 1:  # a batch may need two
                del self._epochs[next(iter(self._epochs))]
            self._epochs[seed, epoch] = Epoch(self._documents("train"), self.block_size, seed, epoch)
        return self._epochs[seed, epoch][n]

    def _documents(self, split: str) -> Places:
        """(D + 1,) where the documents begin, and where the last ends, of the tokens that have a next one."""
        last = getattr(self, f"{split}_tokens") - 1
        if self.windows == "packed":
            return np.array([0, last])
        return np.concatenate([[0], self._ends(split)[:-1], [last]])

    def _ends(self, split: str) -> Places:
        """(D,) where the documents end."""
        file = self.file(f"{split}_ends.bin")
        file.seek(0)
        return np.frombuffer(file.read(), np.uint64).astype(np.int64)

    @property
    def text_checksums(self) -> dict[str, str | None]:
        """Those of the tokens, as checkpoints and records keep them; None: of nanoGPT's make."""
        return {f"{split}_sha256": self.checksums.get(f"{split}.bin") for split in SPLITS}

    @property
    def longest_val_document(self) -> int:
        """How many tokens it has; all of val.bin's where nothing tells where documents end."""
        path = self.folder / "val_ends.bin"
        ends = np.fromfile(path, np.uint64).astype(np.int64) if path.is_file() else np.array([self.val_tokens])
        return int(np.diff(ends, prepend=0).max(initial=0))

    def file(self, name: str) -> io.BufferedReader:
        """One of the folder's files, open. TextChanged: it was written to since it was opened."""
        if name not in self._files:
            opened = open(self.folder / name, "rb")
            self._files[name] = opened, os.fstat(opened.fileno()).st_mtime_ns
        file, written = self._files[name]
        if (now := os.fstat(file.fileno()).st_mtime_ns) != written:
            file.seek(0)
            if hashlib.file_digest(file, "sha256").hexdigest() != self.checksums.get(name):
                raise TextChanged(f"{self.folder / name} has changed since training began: {_remake(self.folder)}")
            self._files[name] = file, now  # it was but touched, or written over with the same
        return file

    def val_windows(self, count: int) -> Places:
        """(n,) int64 starts of windows, evenly spread over val.bin: n = count, or fewer where no more are distinct.
        With windows=document first of those within documents; where they are too few, all of them, and the rest from
        the stream, but for those that are among them.
        """
        inside = np.zeros(0, np.int64)
        if self.windows == "document":
            documents = self._documents("val")
            whole = np.diff(documents) // self.block_size
            number = _evenly(count, int(whole.sum()))
            document = np.searchsorted(whole.cumsum(), number, side="right")
            inside = documents[document] + (number - (whole.cumsum() - whole)[document]) * self.block_size
        return np.unique(np.concatenate([inside, _evenly(count - len(inside), self.val_tokens - self.block_size)]))

    def val_batch(self, starts: Iterable[int]) -> Batch:
        """The windows of val.bin at starts, see val_windows."""
        return self.read("val", [[(int(start), self.block_size)] for start in starts])

    def read(self, split: str, windows: list[Window]) -> Batch:
        """The tokens of the windows."""
        path, dtype = self.folder / f"{split}.bin", np.dtype(self.dtype)
        x = np.empty((len(windows), self.block_size), np.int64)
        y = np.empty_like(x)
        try:
            file = self.file(path.name)
            for row, stretches in enumerate(windows):
                at = 0
                for start, length in stretches:
                    file.seek(start * dtype.itemsize)
                    tokens = np.frombuffer(file.read((length + 1) * dtype.itemsize), dtype, length + 1)
                    x[row, at : at + length], y[row, at : at + length] = tokens[:-1], tokens[1:]
                    at += length
        except (OSError, ValueError) as error:
            raise TextChanged(f"{path} has changed since training began ({error}): {_remake(self.folder)}") from error
        if (largest := max(x.max(), y.max())) >= self.vocab_size:
            raise UserError(
                f"{path} has the token id {largest}, but its vocabulary is {self.vocab_size}: "
                f"it was made with another tokenizer; {_remake(self.folder)}"
            )
        documents = torch.from_numpy(self._begins(split, windows, x)) if self.doc_mask else None
        return Batch(torch.from_numpy(x), torch.from_numpy(y), documents)

    def _begins(self, split: str, windows: list[Window], x: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        """(B, T): where in its window the document of each of the tokens x begins. So does one with each stretch."""
        begins = np.zeros(x.shape, np.int32)
        if self.eot is not None:
            begins[:, 1:] = np.where(x[:, :-1] == self.eot, np.arange(1, self.block_size), 0)
        elif split not in self._starts:
            self._starts[split] = self._ends(split)
        for row, stretches in zip(begins, windows):
            at = 0
            for start, length in stretches:
                row[at] = at
                if self.eot is None:
                    starts = self._starts[split]
                    first, last = np.searchsorted(starts, [start, start + length - 1], side="right")
                    inside = starts[first:last] - start + at
                    row[inside] = inside
                at += length
        return np.maximum.accumulate(begins, 1)


def _evenly(count: int, distinct: int) -> Places:
    """`count` of the numbers below `distinct`, or all of them, evenly spread."""
    count = min(count, distinct)
    return np.arange(count, dtype=np.int64) * (distinct - 1) // max(count - 1, 1)


def load_corpus(
    folder: str | os.PathLike[str], block_size: int, windows: str = "packed", doc_mask: bool = False
) -> Corpus:
    """The Corpus in folder (see data/corpus.py for its files), or a nanoGPT one: train.bin and val.bin with GPT-2 ids
    in uint16. UserError: nothing there, incomplete, not what was written, or no longer than block_size.
    """
    folder = Path(folder)
    meta = _read_meta(folder)
    for split in "train", "val":
        path, tokens = folder / f"{split}.bin", meta[f"{split}_tokens"]
        size, expected = path.stat().st_size, tokens * np.dtype(meta["dtype"]).itemsize
        if size != expected:
            raise UserError(f"{path} has {size:,} bytes, but meta.json says {expected:,}: {_remake(folder)}")
        if tokens <= block_size:
            raise UserError(
                f"{path} has {tokens:,} tokens, too few for block_size={block_size} and one token more: "
                f"set --block_size below {tokens}, or prepare more text"
            )
    of_ends = {f"{split}_ends.bin": 8 * meta.get(f"{split}_documents", 0) for split in ("train", "val")}
    fits = lambda name: os.path.isfile(folder / name) and (folder / name).stat().st_size == of_ends[name]
    missing = next((name for name in of_ends if not fits(name)), None)
    if windows == "document" and missing:
        raise UserError(
            f"windows=document needs to know where documents end, and {folder} has no {missing} that fits: "
            f"{_remake(folder)}; or set --windows=packed"
        )
    eot = None
    if doc_mask and missing:  # nanoGPT's make, mostly, whose tokenizer's files need not be here
        eot = GPT2_EOT if meta["tokenizer"].get("name") == "gpt2" else tokenizer_from_meta(meta["tokenizer"]).eot
    if doc_mask and missing and (eot is None or eot not in np.memmap(folder / "train.bin", meta["dtype"], "r")):
        raise UserError(
            f"doc_mask=True needs to know where documents end, and {folder} has no {missing} that fits, nor tokens of "
            f"the {meta['tokenizer']['name']} tokenizer that end a text: {_remake(folder)}; or set --doc_mask=False"
        )
    corpus = Corpus(
        folder,
        block_size,
        meta["vocab_size"],
        meta["tokenizer"],
        meta["dtype"],
        meta["train_tokens"],
        meta["val_tokens"],
        windows,
        doc_mask,
        eot,
        {f"{name.removesuffix('_sha256')}.bin": value for name, value in meta.items() if name.endswith("_sha256")},
    )
    for name in ("train.bin", "val.bin", *(of_ends if not missing and (doc_mask or windows == "document") else ())):
        corpus.file(name)  # from here on these bytes are read, whatever takes the names
    if changed := changed_files(folder, meta):
        raise UserError(
            f"{folder / changed[0]} is not what was written there: its checksum differs from meta.json's. "
            f"Copy it again, or {_remake(folder)}"
        )
    return corpus


def _read_meta(folder: Path) -> dict[str, Any]:
    """meta.json's dict with the keys that load_corpus needs, when all three files are there."""
    missing = [
        name for name in ("train.bin", "val.bin") if not os.path.isfile(folder / name)
    ]  # of too long a name, too
    path = folder / "meta.json"
    if missing:
        ours = Path(__file__).parent / folder.name  # meant by a path such as data/stdlib
        is_other = folder.name != "text" and not os.path.isfile(folder / "prepare.py")
        if is_other and any(os.path.isfile(ours / name) for name in ("train.bin", "prepare.py")) and ours != folder:
            raise UserError(f"{folder} has no {' and no '.join(missing)}; did you mean --dataset={folder.name}?")
        files = folder.parent.glob("*/train.bin") if os.path.isdir(folder.parent) else ()  # a long name: glob raises
        there = {file.parent.name for file in files}
        there |= {"stdlib"} if os.path.isfile(folder.parent / "stdlib" / "prepare.py") else set()  # made when wanted
        others = ", ".join(sorted(there - {folder.name}))
        raise UserError(
            f"{folder} has no {' and no '.join(missing)}: {_remake(folder)}"
            + (f"; or choose another data set of {folder.parent}: {others}" if others else "")
        )
    if (folder / "meta.pkl").exists() and not path.exists():
        raise UserError(
            f"{folder} has nanoGPT's meta.pkl but no meta.json; a pickle is not read, as it could run any "
            f"code: {_remake(folder)}"
        )
    if not path.exists():
        print(f"{folder} has no meta.json: its ids are taken for GPT-2's in uint16, as nanoGPT writes them")
        tokens = {f"{split}_tokens": (folder / f"{split}.bin").stat().st_size // 2 for split in ("train", "val")}
        return {"vocab_size": GPT2_VOCAB_SIZE, "dtype": "uint16", "tokenizer": {"name": "gpt2"}, **tokens}
    try:
        match json.loads(path.read_bytes()):
            case {"unfinished": True}:
                raise UserError(f"the preparation of {folder} was cut off at its very end: {_remake(folder)}")
            case {
                "vocab_size": int(),
                "dtype": "uint16" | "uint32",
                "tokenizer": dict(),
                "train_tokens": int(),
                "val_tokens": int(),
            } as meta:
                return meta
    except (OSError, ValueError):
        pass
    raise UserError(f"{path} is no corpus's meta data: {_remake(folder)}")


def _remake(folder: Path) -> str:
    """What makes the corpus in folder, as the end of a message."""
    if os.path.isfile(folder / "prepare.py") and folder.name != "text":
        return f"run python {folder / 'prepare.py'}"
    name, script = "NAME" if folder.name == "text" else folder.name, Path("text", "prepare.py")
    if os.path.isfile(folder.parent / script):
        return f"run python {folder.parent / script} --input=FILE_OR_FOLDER --out={name}"
    ours = Path(__file__).parent / script  # which writes beside itself, and nowhere else
    return f"run python {ours} --input=FILE_OR_FOLDER --out={name}, and give --dataset={name}"
