"""The shared core of the prepare.py scripts: documents to a corpus, four files of tokens and one of meta data in one
folder.

    train.bin, val.bin              token ids, headerless, uint16 (uint32 above 65536 ids): the documents one after the
                                    other, each followed by end-of-text where the tokenizer has one
    train_ends.bin, val_ends.bin    uint64: where in these each document ends, so the last is the number of tokens
    meta.json                       tokenizer, dtype, counts, checksums, document lengths: what else others need to know

Text is read, encoded and written a piece at a time, whatever its size. Threads encode (tiktoken and tokenizers leave
them free to), and what they made is written in order: the files don't depend on how many there are.

A corpus is whole or it isn't one. It grows in the folder `unfinished` aside, with a journal, and is moved into place at
the end; while it moves, meta.json says so. A preparation that was killed is continued by the same command, with the
same bytes as if it never had been; an earlier corpus stays as it was until then.

Dims: D, the documents of a split.
"""

import contextlib
import copy
import hashlib
import io
import json
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, TypedDict

import numpy as np
from tqdm import tqdm

from configurator import UserError
from data.lengths import Meta, draw, report, statistics
from data.lock import LOCK, locked
from data.reading import pieces
from data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from hashlib import _Hash

Json = Any  # what the module json writes, and reads back as it was

ASIDE, JOURNAL = "unfinished", "journal.json"  # the folder aside, and what is in it
SPLITS = "train", "val"
BATCH = 1 << 18  # characters that a thread encodes at once, or a piece if that is more
SAVE = 5.0  # seconds between two entries of the journal
ROOM = 1.1  # of the disk space that a corpus is guessed to need


# -- documents ---------------------------------------------------------------------------------


class Document(NamedTuple):
    """A text, and where it goes."""

    split: str | None  # train or val; or None: of those kept, the first and every n-th after it are for validation
    name: str
    texts: Iterable[str]  # the text, in pieces that end where a token does, see `pieces`


class Source:
    """Where documents come from, in an order that is always the same."""

    describe: dict[str, Json]  # for meta.json
    fingerprint: str = ""  # what else must be the same for an unfinished preparation to be continued
    total_bytes: int | None = None  # about how many bytes of text there are, or None

    def __init__(self, describe: dict[str, Json]):
        self.describe = describe

    def documents(self, state: Json = None) -> Iterator[Document]:
        """All documents; or those after the one that had come when `state` was asked for."""
        raise NotImplementedError

    def state(self) -> Json:
        """Where the iteration stands."""
        raise NotImplementedError


class Texts(Source):
    """Documents at hand: train and val are lists of (name, text)."""

    def __init__(self, train: Iterable[tuple[str, str]], val: Iterable[tuple[str, str]], describe: dict[str, Json]):
        super().__init__(describe)
        self.all = [(split, name, text) for split, pairs in zip(SPLITS, (train, val)) for name, text in pairs]
        raw = [text.encode("utf-8", "surrogatepass") for _, _, text in self.all]
        self.total_bytes = sum(map(len, raw))
        self.fingerprint = hashlib.sha256(b"\0".join(raw)).hexdigest()

    def documents(self, state: int | None = None) -> Iterator[Document]:
        for self.count in range((state or 0) + 1, len(self.all) + 1):
            split, name, text = self.all[self.count - 1]
            yield Document(split, name, pieces(text))

    def state(self) -> int:
        return self.count


# -- encoding, in threads and in order ---------------------------------------------------------


class Batch(NamedTuple):
    """What one thread encodes at a time."""

    items: list[tuple[Document, str | None]]  # (document, piece of its text), and (document, None) where it ends
    state: Json  # the source's, after its last whole document
    skip: int  # how many pieces of the next one have come


class Encoded(NamedTuple):
    """What became of a Batch."""

    batch: Batch
    ids: list[bytes | None]  # of each item, as in the file; None where a document ends
    size: int  # bytes of text


def _batches(source: Source, tokenizer: Tokenizer, state: Json, skip: int) -> Iterator[Batch]:
    """What comes after state, without the first `skip` pieces."""
    items: list[tuple[Document, str | None]] = []
    size, done = 0, state
    for document in source.documents(state):
        count = 0
        for count, text in enumerate(tokenizer.pieces(document.texts), 1):
            if count <= skip:
                continue
            items.append((document, text))
            size += len(text)
            if size >= BATCH:
                yield Batch(items, done, count)
                items, size = [], 0
        items.append((document, None))
        skip, done = 0, source.state()
        if size >= BATCH or len(items) >= BATCH // 16:
            yield Batch(items, done, 0)
            items, size = [], 0
    if items:
        yield Batch(items, done, 0)


def _encode(batch: Batch, tokenizer: Tokenizer, dtype: np.dtype) -> Encoded:
    found: list[bytes | None] = []
    size = 0
    for document, text in batch.items:
        if text is None:
            found.append(None)
            continue
        try:
            ids = tokenizer.encode(text)
        except UserError as error:
            raise UserError(f"{document.name or 'a document'}: {error}") from None
        if ids.size and not 0 <= ids.min() <= ids.max() < tokenizer.n_vocab:  # a cast to dtype would wrap in silence
            raise ValueError(f"ids from {ids.min()} to {ids.max()}, but n_vocab is {tokenizer.n_vocab}")
        found.append(ids.astype(dtype).tobytes())
        size += len(text) if text.isascii() else len(text.encode())
    return Encoded(batch, found, size)


def _in_order(
    batches: Iterable[Batch], encode: Callable[[Batch], Encoded], workers: int
) -> Generator[Encoded, None, None]:
    """encode(batch) of each, some ahead of what is taken."""
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[Encoded]] = deque()
        try:
            for batch in batches:
                waiting.append(pool.submit(encode, batch))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


# -- writing -----------------------------------------------------------------------------------


class Entry(TypedDict):
    """How far a preparation is: what the journal holds."""

    key: str  # a hash of all that must be the same for it to go on
    state: Json  # of the source
    skip: int  # pieces of the document after that state that are in the files
    open: str | None  # the split into which a document is being written, unless it may still be too short
    unsplit: int  # documents with no split of their own
    dropped: int  # documents that were too short
    bytes: int  # of text that was encoded
    sizes: dict[str, int]  # bytes, by the file's name


class _Unfinished:
    """The files of a corpus that grows, and their journal. `entry` tells how far they are, `reached` the last point of
    it from which one can go on, and that is what the journal says.
    """

    def __init__(self, folder: Path, key: str):
        self.folder = folder
        self.journal = folder / JOURNAL
        self.entry: Entry = self._read(key) or self._new(key)
        self.files: dict[str, IO[bytes]] = {}
        self.reached: Entry | None = None
        self.checksums = _checksums(folder, self.entry["sizes"])
        for name, size in self.entry["sizes"].items():
            self.files[name] = open(folder / name, "r+b" if size else "wb")
            self.files[name].truncate(size)
            self.files[name].seek(size)

    def _new(self, key: str) -> Entry:
        if self.journal.exists():
            print(f"the unfinished preparation in {self.folder} was of something else, or is damaged: it is begun anew")
        for path in self.folder.iterdir():
            if path.name != LOCK:
                path.unlink()
        return {
            "key": key,
            "state": None,
            "skip": 0,
            "open": None,
            "unsplit": 0,
            "dropped": 0,
            "bytes": 0,
            "sizes": {f"{split}{kind}.bin": 0 for kind in ("", "_ends") for split in SPLITS},
        }

    def _read(self, key: str) -> Entry | None:
        """The journal's entry, if it is of this preparation and the files are there."""
        try:
            entry = json.loads(self.journal.read_bytes())
            sizes = {name: (self.folder / name).stat().st_size for name in entry["sizes"]}
            whole = all(sizes[name] >= size for name, size in entry["sizes"].items())
            return entry if entry["key"] == key and whole else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    @property
    def begun(self) -> bool:
        """Whether there is something to go on from."""
        return self.journal.exists()

    def write(self, name: str, data: bytes) -> None:
        self.files[name].write(data)
        self.checksums[name].update(data)
        self.entry["sizes"][name] += len(data)

    def save(self) -> None:
        for file in self.files.values():
            _to_disk(file)
        with _synced(self.folder / "journal.new") as file:
            file.write(json.dumps(self.reached).encode())
        os.replace(self.folder / "journal.new", self.journal)

    def finish(self) -> None:
        for file in self.files.values():
            _to_disk(file)
            file.close()
        self.reached = None  # nothing more to save

    def abandon(self) -> None:
        for file in self.files.values():
            with contextlib.suppress(OSError):
                file.close()


class _Writer:
    """Puts what was encoded into the files: which document goes where, and whether it is kept."""

    def __init__(self, unfinished: _Unfinished, tokenizer: Tokenizer, dtype: np.dtype, min_tokens: int, every: int):
        self.unfinished, self.entry, self.dtype = unfinished, unfinished.entry, dtype
        self.min_bytes, self.every = min_tokens * dtype.itemsize, every
        self.eot = b"" if tokenizer.eot is None else np.array([tokenizer.eot], dtype).tobytes()
        self.held: list[bytes] = []  # of a document that may still turn out too short

    def tokens(self, split: str) -> int:
        return self.entry["sizes"][f"{split}.bin"] // self.dtype.itemsize

    def add(self, document: Document, data: bytes | None) -> None:
        """data: the ids of the document's next piece, or None where it ends."""
        if data is not None:
            if data:
                self.held.append(data)
            if not self.entry["open"] and sum(map(len, self.held)) < max(1, self.min_bytes - len(self.eot)):
                return
            self._flush(document)
            return
        if self.held and sum(map(len, self.held)) + len(self.eot) >= self.min_bytes:
            self._flush(document)
        if self.entry["open"]:
            split = self.entry["open"]
            self.unfinished.write(f"{split}.bin", self.eot)
            self.unfinished.write(f"{split}_ends.bin", np.uint64(self.tokens(split)).tobytes())
            self.entry["unsplit"] += document.split is None
        elif self.held:
            self.entry["dropped"] += 1
        self.entry["open"], self.held = None, []

    def _flush(self, document: Document) -> None:
        if not self.entry["open"]:
            self.entry["open"] = document.split or ("train" if self.entry["unsplit"] % self.every else "val")
        for data in self.held:
            self.unfinished.write(f"{self.entry['open']}.bin", data)
        self.held = []


def write_corpus(
    folder: str | os.PathLike[str],
    source: Source,
    tokenizer: Tokenizer,
    *,
    max_tokens: int = 0,
    min_doc_tokens: int = 0,
    val_every: int = 200,
    workers: int = 0,
) -> Meta:
    """Encode the documents of a Source into folder; an earlier corpus there is replaced at the end. Prints counts and
    document lengths and returns them as meta.json's dict.

    max_tokens       no further document is begun when there are so many, training and validation together; 0: no limit
    min_doc_tokens   shorter documents are left out, end-of-text counted
    val_every        of documents with no split of their own, one in so many is for validation
    workers          threads; 0: one for each CPU
    UserError        nothing to write, disk full, another preparation there. An earlier corpus is then as it was, and
                     what is in the journal is kept for the same command to go on from
    """
    folder = Path(folder)
    workers = workers or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    dtype = np.dtype("uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32")
    meta = {
        "vocab_size": tokenizer.vocab_size,
        "dtype": dtype.name,
        "tokenizer": tokenizer.to_meta(),
        "source": source.describe,
    }
    key = hashlib.sha256(
        json.dumps([meta, source.fingerprint, max_tokens, min_doc_tokens, val_every]).encode()
    ).hexdigest()
    aside = folder / ASIDE
    unfinished = None
    try:
        aside.mkdir(parents=True, exist_ok=True)
        with locked(aside, f"another process is preparing {folder} just now"):
            try:
                if moving := _moving(aside, key):
                    meta = moving
                else:
                    unfinished = _Unfinished(aside, key)
                    _fill(unfinished, source, tokenizer, dtype, max_tokens, min_doc_tokens, val_every, workers, folder)
                    unfinished.finish()
                    meta |= _summary(unfinished, folder)
                    meta["tokenizer"] = meta.pop("tokenizer")  # to the end: a tokenizer.json is a very long line
                _move_into_place(aside, folder, meta)
                shutil.rmtree(aside)
            except BaseException as error:
                if unfinished is not None:
                    if isinstance(error, KeyboardInterrupt) and unfinished.reached:
                        unfinished.save()
                    unfinished.abandon()
                if (aside / JOURNAL).exists():
                    print(f"what is done so far is kept in {aside}: the same command goes on from there")
                else:
                    shutil.rmtree(aside, ignore_errors=True)
                raise
    except OSError as error:
        raise UserError(f"can't write the corpus {folder}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()  # only an empty folder goes: nothing came of it
    report(folder, meta)
    draw(folder, meta)
    return meta


def _fill(
    unfinished: _Unfinished,
    source: Source,
    tokenizer: Tokenizer,
    dtype: np.dtype,
    max_tokens: int,
    min_doc_tokens: int,
    val_every: int,
    workers: int,
    folder: Path,
) -> None:
    """Encode and write all that is still to come."""
    entry, writer = unfinished.entry, _Writer(unfinished, tokenizer, dtype, min_doc_tokens, val_every)
    written = lambda: sum(map(writer.tokens, SPLITS))
    if unfinished.begun:
        print(f"going on with the preparation of {folder}: {written():,} tokens are there")
    by_bytes = source.total_bytes is not None
    total, unit = (source.total_bytes, "B") if by_bytes else (max_tokens or None, "tok")
    batches = _batches(source, tokenizer, entry["state"], entry["skip"])
    first, saved, began, had = True, time.monotonic(), time.monotonic(), written()
    with (
        contextlib.closing(_in_order(batches, lambda batch: _encode(batch, tokenizer, dtype), workers)) as encoded,
        tqdm(
            total=total,
            initial=entry["bytes"] if by_bytes else had,
            unit=unit,
            unit_scale=True,
            desc=folder.name,
            disable=None,
        ) as bar,
    ):
        for batch, found, size in encoded:
            if first:
                _check_space(
                    unfinished.folder,
                    source,
                    entry["bytes"],
                    size,
                    sum(len(ids) for ids in found if ids),
                    (max_tokens - had) * dtype.itemsize if max_tokens else None,
                )
                first = False
            for (document, _), ids in zip(batch.items, found):
                if max_tokens and not entry["open"] and written() >= max_tokens:
                    return
                writer.add(document, ids)
            entry["bytes"] += size
            bar.update(size if by_bytes else written() - bar.n)
            rate = (written() - had) / (time.monotonic() - began)
            bar.set_postfix_str(f"{written():,} tokens, {rate:,.0f}/s, {document.name[-20:]:20}", refresh=False)
            if not writer.held:
                entry["state"], entry["skip"] = batch.state, batch.skip
                unfinished.reached = copy.deepcopy(entry)
                if time.monotonic() - saved > SAVE:
                    unfinished.save()
                    saved = time.monotonic()


def _check_space(folder: Path, source: Source, done: int, size: int, encoded: int, most: int | None) -> None:
    """UserError if the disk hasn't room for what is to come, guessed from `size` bytes of text that became `encoded`;
    it is `most` bytes at most.
    """
    guesses: list[float] = [most] if most is not None else []
    if source.total_bytes is not None:
        guesses.append((source.total_bytes - done) * encoded / max(size, 1))
    need, free = ROOM * min(guesses, default=0), shutil.disk_usage(folder).free
    if need > free:
        fewer = "; a smaller --max_tokens needs less" if most is not None else ""
        raise UserError(
            f"the corpus needs about {need / 1e6:,.1f} MB more, and {folder} has {free / 1e6:,.1f} MB free{fewer}"
        )


def _summary(unfinished: _Unfinished, folder: Path) -> Meta:
    """meta.json's entries on what was written."""
    meta: Meta = {}
    for split in SPLITS:
        ends = np.fromfile(unfinished.folder / f"{split}_ends.bin", np.uint64)
        if not len(ends):
            unfinished.journal.unlink(missing_ok=True)  # to go on would end here again
            short = (
                f" ({unfinished.entry['dropped']:,} documents were too short)" if unfinished.entry["dropped"] else ""
            )
            raise UserError(
                f"{folder}: there is no text for {split}.bin{short}; more text is needed, "
                "or another share of it for validation"
            )
        meta |= {
            f"{split}_tokens": int(ends[-1]),
            f"{split}_documents": len(ends),
            f"{split}_sha256": unfinished.checksums[f"{split}.bin"].hexdigest(),
            f"{split}_ends_sha256": unfinished.checksums[f"{split}_ends.bin"].hexdigest(),
        }
        meta["document_lengths" if split == "train" else "val_document_lengths"] = statistics(ends)
    return meta | {"left_out_as_too_short": unfinished.entry["dropped"]}


def _moving(aside: Path, key: str) -> Meta | None:
    """The meta data of this corpus, if it is whole already and was stopped while it moved."""
    try:
        journal, meta = (json.loads((aside / name).read_bytes()) for name in (JOURNAL, "meta.json"))
        return meta if journal["key"] == key and "val_document_lengths" in meta else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _move_into_place(aside: Path, folder: Path, meta: Meta) -> None:
    for name, content in ("meta.json", meta), ("moving.json", {"unfinished": True}):
        with _synced(aside / name) as file:
            file.write(json.dumps(content, indent=1).encode())
    os.replace(aside / "moving.json", folder / "meta.json")  # no corpus from here ...
    for name in *(f"{split}{kind}.bin" for split in SPLITS for kind in ("", "_ends")), "meta.json":
        if (aside / name).exists():  # else it has moved before
            os.replace(aside / name, folder / name)  # ... to the last of these
    note_checked(folder)


def _checksums(folder: Path, sizes: dict[str, int]) -> "dict[str, _Hash]":
    """sha256 of the first bytes of files, to go on with. sizes: how many, by name. With a progress bar."""
    checksums = {name: hashlib.sha256() for name in sizes}
    with tqdm(
        total=sum(sizes.values()), unit="B", unit_scale=True, desc=f"checking {folder.name}", disable=None, leave=False
    ) as bar:
        for name, left in sizes.items():
            with open(folder / name, "rb") if left else io.BytesIO() as file:
                while left and (data := file.read(min(left, 1 << 24))):
                    checksums[name].update(data)
                    left -= len(data)
                    bar.update(len(data))
    return checksums


def _to_disk(file: IO[bytes]) -> None:
    """What was written to file is on the disk, not only in a cache."""
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def _synced(path: Path) -> Iterator[IO[bytes]]:
    """path opened for writing; on the disk when the block ends."""
    with open(path, "wb") as file:
        yield file
        _to_disk(file)


# -- is it still what was written? -------------------------------------------------------------


def note_checked(folder: Path) -> None:
    """Note in checked.json that the files are what meta.json says, as long as they and it are those of now."""
    with contextlib.suppress(OSError):  # where that can't be written, they are checked each time
        (folder / "checked.json").write_text(json.dumps(_stamps(folder)))


def _stamps(folder: Path) -> dict[str, list[int]]:
    """What a copy of a file can't have: its number and the time when the system last touched it."""
    stats = {path.name: path.stat() for path in [*sorted(folder.glob("*.bin")), folder / "meta.json"] if path.exists()}
    return {name: [stat.st_size, stat.st_ino, stat.st_ctime_ns] for name, stat in stats.items()}


def changed_files(folder: Path, meta: Meta) -> list[str]:
    """The names of the files whose checksums are not those of meta.json. Looks once, with a progress bar, until sizes
    or times change.
    """
    try:
        if json.loads((folder / "checked.json").read_bytes()) == _stamps(folder):
            return []
    except (OSError, ValueError):
        pass
    wanted = {
        f"{name}.bin": meta[f"{name}_sha256"]
        for split in SPLITS
        for name in (split, f"{split}_ends")
        if f"{name}_sha256" in meta and (folder / f"{name}.bin").exists()
    }
    sizes = {name: (folder / name).stat().st_size for name in wanted}
    try:
        changed = [name for name, checksum in _checksums(folder, sizes).items() if checksum.hexdigest() != wanted[name]]
    except OSError as error:
        raise UserError(f"can't read {error.filename}: {error.strerror}") from None
    if not changed:
        note_checked(folder)
    return changed
