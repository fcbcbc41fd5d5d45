"""The shared core of the prepare.py scripts: documents to a corpus, four files of tokens and one of meta data in one
folder.

    train.bin, val.bin              token ids, headerless, uint16 (uint32 above 65536 ids): the documents one after the
                                    other, each followed by end-of-text where the tokenizer has one
    train_ends.bin, val_ends.bin    uint64: where in these each document ends, so the last is the number of tokens
    meta.json                       tokenizer, dtype, counts, checksums, document lengths: what else others need to know

Text is read, encoded and written a piece at a time, whatever its size. Threads encode (tiktoken leaves them free to),
and what they made is written in order: the files don't depend on how many there are.

A corpus is whole or it isn't one. It grows in the folder `unfinished` aside, with a journal, and is moved into place at
the end; while it moves, meta.json says so. A preparation that was killed is continued by the same command, with the
same bytes as if it never had been; an earlier corpus stays as it was until then.

Dims: D, the documents of a split.
"""

import codecs
import contextlib
import copy
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import IO, TYPE_CHECKING, Any, NamedTuple, NoReturn, TypedDict

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from configurator import UserError
from data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from hashlib import _Hash

    from pyarrow.parquet import ParquetFile

Json = Any  # what the module json writes, and reads back as it was
Meta = dict[str, Any]  # what is in meta.json

ASIDE, JOURNAL, LOCK = "unfinished", "journal.json", "lock"  # the folder aside, and what is in it
SPLITS = "train", "val"
LONG = {"2k": 2048, "8k": 8192, "32k": 32768, "128k": 131072}  # tokens
# Where every tokenizer begins a token, whatever came before: at a space between words, or at any white space behind a
# letter or a digit. (Punctuation may take the line's end along.)
TOKEN_START = re.compile(r"(?<=\S)(?= \S)|(?<=[^\W_])(?=\s)")
BLOCK = 1 << 20  # bytes read at once
PIECE = 1 << 20  # characters
LONGEST = (
    16  # pieces: where there is nowhere to cut for so long, it is cut all the same: that may change a token or two
)
ZST_RATIO = 4  # bytes of text from one of a compressed file, roughly
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


# -- reading text ------------------------------------------------------------------------------


def files_under(folder: Path, skip: Collection[str] = (), without: Path | None = None) -> list[Path]:
    """Sorted paths of the regular files below folder, but for hidden ones, for folders whose name is in skip, and for
    the folder `without`. Links are followed, but into no folder twice.
    """

    def refuse(error: OSError) -> NoReturn:
        raise UserError(f"can't read {error.filename}: {error.strerror}")

    def is_file(path: Path) -> bool:  # to read a pipe would wait for ever
        try:
            return path.is_file()
        except OSError as error:
            refuse(error)

    found, seen = [], {os.path.realpath(path) for path in (folder, without) if path}
    for parent, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        candidates = sorted(name for name in folders if not name.startswith(".") and name not in skip)
        folders.clear()  # os.walk goes into those that are put back
        for name in candidates:
            if (real := os.path.realpath(Path(parent, name))) not in seen:
                seen.add(real)
                folders.append(name)
        found += [Path(parent, name) for name in files if not name.startswith(".")]
    return sorted(filter(is_file, found))


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without byte order mark and with LF line ends. UserError: unreadable, or not text."""
    return "".join(text_blocks(path))


def why_not_text(value: object) -> str | None:
    """What is wrong with a row's text, or None."""
    if not isinstance(value, str):
        return f"has no text, but {type(value).__name__}"
    if "\0" in value:
        return "has a NUL in its text"
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return f"has half a surrogate pair in its text, at character {error.start:,}"
    return None


def row_text(value: str) -> str:
    """A row's text as read_text would have it, of a file."""
    return value.removeprefix("\ufeff").replace("\r\n", "\n")


def bytes_of_text(path: Path, column: str) -> int:
    """How many bytes of text are in a file, about; column is where, in those of rows. UserError: a .parquet file is
    damaged.
    """
    if path.suffix.lower() == ".parquet":
        with open_parquet(path) as file:
            places = [place for place, name in enumerate(file.schema.names) if name == column]
            groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
            return sum(group.column(place).total_uncompressed_size for group in groups for place in places)
    return path.stat().st_size * (ZST_RATIO if compressed(path) else 1)


@contextlib.contextmanager
def open_parquet(path: Path) -> "Iterator[ParquetFile]":
    """A pyarrow ParquetFile; also what is read within the block. UserError: not such a file, or damaged."""
    pyarrow = import_pyarrow(path)
    from pyarrow.parquet import ParquetFile

    try:
        # Without these options all rows of a group are in memory at once.
        with ParquetFile(path, pre_buffer=False, buffer_size=BLOCK) as file:
            yield file
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} is damaged, or no parquet file ({error}): fetch it again") from None


def compressed(path: Path) -> bool:
    """Whether it is a .zst file."""
    return path.suffix.lower() == ".zst"


def raw_blocks(path: Path) -> Iterator[bytes]:
    """The bytes of a file, decompressed, block by block. UserError: unreadable, truncated."""
    try:
        if compressed(path) and not path.stat().st_size:
            raise UserError(f"{path} has 0 bytes, fewer than anything compressed has: fetch it again")
        with (
            import_pyarrow(path).input_stream(str(path), compression="zstd")
            if compressed(path)
            else open(path, "rb") as file
        ):
            while block := file.read(BLOCK):
                yield block
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror or error}") from None


def import_pyarrow(path: Path) -> ModuleType:
    """pyarrow, to read this file with. UserError: it isn't installed."""
    try:
        import pyarrow
    except ImportError:
        raise UserError(f"{path} needs a package more: pip install -r requirements-data.txt") from None
    return pyarrow


def text_blocks(path: Path) -> Iterator[str]:
    """The text of a UTF-8 file in blocks, as read_text gives it in one. UserError: unreadable, or not text."""
    decoder, begun, rest = codecs.getincrementaldecoder("utf-8")(), 0, ""
    for raw in itertools.chain(raw_blocks(path), [b""]):
        if b"\0" in raw:
            raise UserError(f"{path} is not text: byte {begun + raw.index(0):,} is NUL")
        waiting = len(decoder.getstate()[0])
        try:
            block = decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            at = begun - waiting + error.start
            raise UserError(
                f"{path} is not UTF-8 text: byte {at:,} is {error.object[error.start]:#04x} "
                "(if it is Latin-1: iconv -f latin1 -t utf-8 OLD > NEW)"
            ) from None
        block = (rest + (block if begun else block.removeprefix("\ufeff"))).replace("\r\n", "\n")
        begun += len(raw)
        rest = "\r" if block.endswith("\r") and raw else ""
        yield block.removesuffix(rest)


def pieces(text: str | Iterable[str], size: int = PIECE) -> Iterator[str]:
    """text in pieces of about size characters, so that a huge document needs little memory. Cuts are made where every
    tokenizer begins a token, see TOKEN_START and LONGEST: the pieces' ids are the whole text's ids.
    text: a string, or an iterable of strings, which are joined.
    """
    rest, searched = "", 0
    for part in [text] if isinstance(text, str) else text:
        rest += part
        start = 0
        while len(rest) - start > size:
            if found := TOKEN_START.search(rest, max(start + size, searched)):
                cut = found.start()
            elif len(rest) - start > LONGEST * size:
                cut = start + LONGEST * size
            else:
                break
            yield rest[start:cut]
            start = cut
        rest = rest[start:]
        searched = len(rest) - 2  # what follows may make a token start of that
    if rest:
        yield rest


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


def _batches(source: Source, state: Json, skip: int) -> Iterator[Batch]:
    """What comes after state, without the first `skip` pieces."""
    items: list[tuple[Document, str | None]] = []
    size, done = 0, state
    for document in source.documents(state):
        count = 0
        for count, text in enumerate(document.texts, 1):
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
    for _, text in batch.items:
        if text is None:
            found.append(None)
            continue
        ids = tokenizer.encode(text)
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
        with _locked(aside):
            try:
                if moving := _moving(aside, key):
                    meta = moving
                else:
                    unfinished = _Unfinished(aside, key)
                    _fill(unfinished, source, tokenizer, dtype, max_tokens, min_doc_tokens, val_every, workers, folder)
                    unfinished.finish()
                    meta |= _summary(unfinished, folder)
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
    _report(folder, meta)
    _draw_lengths(folder, meta)
    return meta


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """No other process may be in here; the system frees it when this one ends, however it does."""
    with open(folder / LOCK, "wb") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is preparing {folder.parent} just now") from None
        except (ImportError, OSError):
            pass  # no locks on this system, or on that file system
        yield


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
    batches = _batches(source, entry["state"], entry["skip"])
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
        if split == "train":
            meta["document_lengths"] = _statistics(np.diff(ends, prepend=np.uint64(0)).astype(np.int64))
    return meta | {"left_out_as_too_short": unfinished.entry["dropped"]}


def _moving(aside: Path, key: str) -> Meta | None:
    """The meta data of this corpus, if it is whole already and was stopped while it moved."""
    try:
        journal, meta = (json.loads((aside / name).read_bytes()) for name in (JOURNAL, "meta.json"))
        return meta if journal["key"] == key else None
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


# -- what came of it ---------------------------------------------------------------------------


def _statistics(lengths: npt.NDArray[np.int64]) -> dict[str, Json]:
    """meta.json's document_lengths. lengths: (D,) of the training documents, in tokens."""
    share = {name: round(float(lengths[lengths >= bound].sum() / lengths.sum()), 4) for name, bound in LONG.items()}
    powers = np.bincount(np.log2(lengths).astype(int))  # log2 is exact for powers of two
    histogram = {str(2**power): int(count) for power, count in enumerate(powers) if count}
    return {
        "min": int(lengths.min()),
        "median": int(np.median(lengths)),
        "mean": int(lengths.mean()),
        "max": int(lengths.max()),
        "share_of_tokens_in_documents_of_at_least": share,
        "documents_from_this_length_to_its_double": histogram,
    }


def _report(folder: Path, meta: Meta) -> None:
    for split in SPLITS:
        print(
            f"{folder / split}.bin: {meta[f'{split}_tokens']:,} tokens in {meta[f'{split}_documents']:,} documents, "
            f"sha256 {meta[f'{split}_sha256'][:16]}"
        )
    if left_out := meta["left_out_as_too_short"]:
        print(f"left out, as they are too short: {left_out:,} documents")
    lengths = meta["document_lengths"]
    share = lengths["share_of_tokens_in_documents_of_at_least"]
    print(
        f"training documents in tokens: shortest {lengths['min']:,}, median {lengths['median']:,}, "
        f"mean {lengths['mean']:,}, longest {lengths['max']:,}"
    )
    print(
        "share of the tokens in documents of at least "
        + ", ".join(f"{name}: {part:.0%}" for name, part in share.items())
    )
    if (shorter := min(meta["train_tokens"], meta["val_tokens"])) <= LONG["2k"]:
        print(f"note: one split has only {shorter:,} tokens, and block_size must be below that")


def _draw_lengths(folder: Path, meta: Meta) -> None:
    """The lengths of the training documents as a picture, where matplotlib is there to draw it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    of_documents, of_tokens = figure.subplots(1, 2)
    ends = np.fromfile(folder / "train_ends.bin", np.uint64)
    lengths = np.diff(ends, prepend=np.uint64(0)).astype(np.int64)
    power = np.log2(lengths).astype(int)
    powers = np.arange(power.min(), power.max() + 1)
    documents, tokens = np.bincount(power)[powers], np.bincount(power, lengths)[powers]
    names = [
        f"{2**power}" if power < 10 else f"{2 ** (power - 10)}k" if power < 20 else f"{2 ** (power - 20)}M"
        for power in powers
    ]
    for ax, heights, what in (
        (of_documents, documents, "documents"),
        (of_tokens, 100 * tokens / tokens.sum(), "% of the tokens"),
    ):
        ax.bar(powers, heights, width=0.9, align="edge", color="#3b75af")
        ax.set(xlabel="length of the document, tokens", title=f"{what}, by length")
        step = -(-len(powers) // 9)
        ax.set_xticks(powers[::step], names[::step])
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{folder.name}: {meta['train_tokens']:,} training tokens in {meta['train_documents']:,} documents", fontsize=10
    )
    aside = folder / "documents.aside.png"
    try:
        figure.savefig(aside, dpi=110)
        os.replace(aside, folder / "documents.png")
    except OSError as error:
        aside.unlink(missing_ok=True)
        print(f"no picture of their lengths: {error.strerror}")
    else:
        print(f"their lengths as a picture: {folder / 'documents.png'}")


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
