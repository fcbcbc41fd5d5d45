"""The prepare scripts and their shared core: what lands in the files, what is refused, what a failure leaves."""

import errno
import functools
import gzip
import hashlib
import importlib
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import types
import urllib.error
from pathlib import Path

import numpy as np
import pytest

from configurator import UserError
from data import corpus, reading, rows
from data.corpus import Document, Source, Texts, write_corpus
from data.lengths import next_step
from data.loader import load_corpus
from data.lock import locked
from data.reading import files_under, pieces, read_text
from data.tokenizer import Tokenizer, tokenizer_from_meta
from folders import LINES, tokenizer_folder

packed = functools.partial(gzip.compress, mtime=0)  # the time would be part of a test's name
ROOT = Path(__file__).resolve().parents[1]
BYTE = tokenizer_from_meta({"name": "byte"})
FILES = "train.bin", "val.bin", "train_ends.bin", "val_ends.bin"
TRAIN, VAL = [("a", "first document"), ("b", "zweites Dokument, größer")], [("c", "validation <|endoftext|> text")]
script = {name: importlib.import_module(f"data.{name}.prepare") for name in ("stdlib", "shakespeare_char", "text")}
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # the children use no other thread


@pytest.fixture(autouse=True)
def picture(monkeypatch):
    """What draws the picture of lengths. No test draws one but its own, and none waits for the disk: these take longer
    than all the rest.
    """
    draw = corpus.draw
    monkeypatch.setattr(corpus, "draw", lambda folder, meta: None)
    monkeypatch.setattr(os, "fsync", lambda number: None)
    return draw


def write(folder, train=TRAIN, val=VAL, tokenizer=BYTE, **options):
    return write_corpus(folder, Texts(train, val, {"made": "here"}), tokenizer, **options)


def documents(folder, split):
    """The documents of a byte corpus."""
    ids = np.fromfile(folder / f"{split}.bin", np.uint16)
    return [BYTE.decode(part[part != BYTE.eot]) for part in np.split(ids, np.flatnonzero(ids == BYTE.eot) + 1)[:-1]]


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# -- write_corpus ------------------------------------------------------------------------------


def test_files_hold_the_documents(tmp_path, capsys):
    meta = write(tmp_path / "new")
    assert documents(tmp_path / "new", "train") == [text for _, text in TRAIN]
    assert documents(tmp_path / "new", "val") == [VAL[0][1]]  # its '<|endoftext|>' is text and ends no document
    files = content(tmp_path / "new")
    assert files.keys() == {*FILES, "meta.json", "checked.json"}
    assert all(path.is_file() for path in (tmp_path / "new").iterdir())
    for split, ends in ("train", [15, 42]), ("val", [30]):
        assert np.fromfile(tmp_path / "new" / f"{split}_ends.bin", np.uint64).tolist() == ends
    assert (
        json.loads(files["meta.json"])
        == meta
        == {
            "vocab_size": 257,
            "dtype": "uint16",
            "tokenizer": {"name": "byte"},
            "source": {"made": "here"},
            "train_tokens": 15 + 27,
            "train_documents": 2,
            "train_sha256": hashlib.sha256(files["train.bin"]).hexdigest(),
            "val_tokens": 30,
            "val_documents": 1,
            "val_sha256": hashlib.sha256(files["val.bin"]).hexdigest(),
            **{
                f"{name}_sha256": hashlib.sha256(files[f"{name}.bin"]).hexdigest()
                for name in ("train_ends", "val_ends")
            },
            "document_lengths": {
                "min": 15,
                "median": 21,
                "mean": 21,
                "max": 27,
                "share_of_tokens_in_documents_of_at_least": {"2k": 0, "8k": 0, "32k": 0, "128k": 0},
                "documents_from_this_length_to_its_double": {"8": 1, "16": 1},
            },
            "val_document_lengths": {
                "min": 30,
                "median": 30,
                "mean": 30,
                "max": 30,
                "share_of_tokens_in_documents_of_at_least": {"2k": 0, "8k": 0, "32k": 0, "128k": 0},
                "documents_from_this_length_to_its_double": {"16": 1},
            },
            "left_out_as_too_short": 0,
        }
    )
    out, err = capsys.readouterr()
    assert "42 tokens in 2 documents" in out and "note: one split has only 30 tokens" in out
    assert "training documents in tokens: shortest 15, median 21, mean 21, longest 27\n  share of" in out
    assert "validation documents in tokens: shortest 30, median 30, mean 30, longest 30\n  share of" in out
    assert err == ""  # no progress bar where nobody looks


def test_share_of_long_documents(tmp_path, capsys):
    meta = write(tmp_path, [("long", "x" * 8191), ("short", "y" * 2046)])  # 8192 and 2047 tokens
    assert meta["document_lengths"]["share_of_tokens_in_documents_of_at_least"] == {
        "2k": round(8192 / 10239, 4),
        "8k": round(8192 / 10239, 4),
        "32k": 0,
        "128k": 0,
    }
    assert "8k: 80%, 32k: 0%" in capsys.readouterr().out


def test_a_document_that_cannot_be_encoded_is_named(tmp_path):
    tokenizer = tokenizer_from_meta({"name": "char", "chars": "abc"})
    with pytest.raises(UserError, match="^b.txt, row 7: the character 'd' is not among the 3"):
        write(tmp_path / "x", [("a.txt", "abc"), ("b.txt, row 7", "abd")], [("c", "b")], tokenizer)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "train, val, recipe, warning, command",
    [
        (9000, 5000, "long_ctx", None, "config/long_ctx.py --dataset=mine"),
        (9000, 4094, "long_ctx", None, "config/long_ctx.py --dataset=mine --block_size=2047"),
        (9000, 4096, "long_ctx", None, "config/long_ctx.py --dataset=mine --block_size=2048"),
        (9000, 4097, "long_ctx", None, "config/long_ctx.py --dataset=mine"),
        (3000, 5000, "long_ctx", None, "config/long_ctx.py --dataset=mine --block_size=1500"),
        (9000, 5000, "long_ctx_124m", None, "config/long_ctx_124m.py --dataset=mine --block_size=2500"),
        (9000, [2000] * 3, "long_ctx", "block_size=4096 (the longest: 2,001)", "config/long_ctx.py --dataset=mine"),
        (
            9000,
            [300] * 4,
            "long_ctx",
            "block_size=602 (the longest: 301)",
            "config/long_ctx.py --dataset=mine --block_size=602",
        ),
    ],
)
def test_next_step(tmp_path, capsys, train, val, recipe, warning, command):
    """The command has a block_size that there are tokens for. It is said where validation's documents are shorter."""
    texts = lambda lengths: [("", "x" * (n - (type(lengths) is int))) for n in np.atleast_1d(lengths)]
    meta = write(tmp_path, texts(train), texts(val))
    capsys.readouterr()
    next_step(meta, "mine", recipe)
    *before, last = capsys.readouterr().out.splitlines()
    assert last == f"now: python train.py {command}"
    assert len(before) == bool(warning)
    if warning:
        assert before[0].startswith(f"WARNING: no validation document has as many tokens as {warning}. Each window")
    block_size = re.search(r"block_size=(\d+)", last)
    load_corpus(tmp_path, int(block_size[1]) if block_size else 4096)


def test_picture_of_lengths(tmp_path, monkeypatch, capsys, picture):
    """Without matplotlib, or room on the disk, there is none."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(corpus, "draw", picture)
    write(tmp_path / "x", [("long", "x" * 8191), ("short", "y" * 2046)])
    assert content(tmp_path / "x")["documents.png"].startswith(b"\x89PNG")
    assert f"their lengths as a picture: {tmp_path}/x/documents.png" in capsys.readouterr().out

    def savefig(*args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", savefig)
    write(tmp_path / "full")
    assert "no picture of their lengths: No space left on device" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    write(tmp_path / "none")
    for name in "full", "none":
        assert content(tmp_path / name).keys() == {*FILES, "meta.json", "checked.json"}


def test_char_corpus_has_no_end_of_text(tmp_path):
    tokenizer = tokenizer_from_meta({"name": "char", "chars": "abc"})
    meta = write(tmp_path, [("a", "abc"), ("b", "ca")], [("c", "b")], tokenizer)
    assert np.fromfile(tmp_path / "train.bin", np.uint16).tolist() == [0, 1, 2, 2, 0]
    assert meta["tokenizer"] == {"name": "char", "chars": "abc"} and meta["vocab_size"] == 3


class Numbers(Tokenizer):
    """A tokenizer of decimal numbers, for ids of any size."""

    eot = None

    def __init__(self, n_vocab):
        self.n_vocab = self.vocab_size = n_vocab

    def encode(self, text):
        return np.array([int(word) for word in text.split()])

    def to_meta(self):
        return {"name": "numbers"}


def test_ids_above_uint16(tmp_path):
    meta = write(tmp_path, [("a", "65535 65536 99999")], [("b", "1")], Numbers(100_000))
    assert meta["dtype"] == "uint32"
    assert np.fromfile(tmp_path / "train.bin", np.uint32).tolist() == [65535, 65536, 99999]
    assert write(tmp_path, [("a", "65535")], [("b", "1")], Numbers(65536))["dtype"] == "uint16"


@pytest.mark.parametrize("id", [70000, 65536, -1])
def test_an_id_outside_the_vocabulary_never_wraps(tmp_path, id):
    """Casting 70000 to uint16 gives 4464, in silence."""
    with pytest.raises(ValueError, match=f"{id}, but n_vocab is 65536"):
        write(tmp_path, [("a", f"{id}")], VAL, Numbers(65536))


def test_files_do_not_depend_on_the_number_of_threads(tmp_path):
    text = read_text(Path(os.__file__))
    train = [(str(i), text[i : i + n]) for i, n in enumerate([0, 1, 30_000, 10, 10, 25_000] * 20)]
    for workers in 1, 2, 7:
        write(tmp_path / f"{workers}", train, workers=workers)
    assert len({tuple((tmp_path / f"{workers}" / name).read_bytes() for name in FILES) for workers in (1, 2, 7)}) == 1
    assert documents(tmp_path / "7", "train") == [text for _, text in train if text]


def test_reading_runs_ahead_of_writing_by_a_few_batches_only(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "BATCH", 10)
    read, most = [], 0

    class Endless(Texts):
        def documents(self, state=None):
            for document in super().documents(state):
                read.append(document)
                yield document

    class Spy(type(BYTE)):
        def encode(self, text):
            nonlocal most
            most = max(most, len(read) - int(text[:3]))
            return super().encode(text)

    train = [(f"{i:03}", f"{i:03} and more") for i in range(200)]
    write_corpus(tmp_path, Endless(train, VAL[:0] + [("v", "200 val")], {}), Spy(BYTE._encoding, 257), workers=2)
    assert 1 < most <= 2 * 2 + 2 + 1


def test_empty_documents_are_left_out(tmp_path):
    assert write(tmp_path, [("empty", ""), *TRAIN, ("empty", "")])["train_documents"] == 2


@pytest.mark.parametrize("train, val, name", [([], VAL, "train"), (TRAIN, [], "val"), ([("a", "")], VAL, "train")])
def test_nothing_to_write(tmp_path, train, val, name):
    with pytest.raises(UserError, match=f"no text for {name}.bin"):
        write(tmp_path / "new", train, val)
    assert not (tmp_path / "new").exists()


class FullDisk(io.BytesIO):
    def write(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "meta.json", "moving.json"])
@pytest.mark.parametrize("earlier", [True, False])
def test_full_disk(tmp_path, monkeypatch, name, earlier):
    if earlier:
        write(tmp_path / "x", [("old", "an earlier corpus")])
        before = content(tmp_path / "x")
    monkeypatch.setattr(
        corpus, "open", lambda path, mode: FullDisk() if path.name == name else open(path, mode), raising=False
    )
    with pytest.raises(UserError, match="can't write the corpus .*x: No space left on device"):
        write(tmp_path / "x")
    if earlier:
        assert content(tmp_path / "x") == before and not (tmp_path / "x/unfinished").exists()
        load_corpus(tmp_path / "x", 8)
    else:
        assert not (tmp_path / "x").exists()


def test_folder_which_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="can't write the corpus .*file"):
        write(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "in the way"


class Numbered(Source):
    """A long document in many pieces, short ones, and some of each split. left: the process is killed when so many
    pieces and documents have come; None: it isn't.
    """

    total_bytes = 12_000

    def __init__(self, left=None):
        super().__init__({"made": "here"})
        self.left = left

    def documents(self, state=None):
        for self.count in range((state or 0) + 1, 13):
            n = self.count - 1
            text = "".join(f"{n}.{i} " for i in range(900 if n == 4 else 140 if n in (5, 10) else 20 + n))
            split = "val" if n == 7 else None if n > 9 else "train"
            yield Document(split, f"{n}", self._counted(pieces(text, 300)))

    def _counted(self, texts):
        for text in texts:
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            if self.left is not None:
                self.left -= 1
            yield text

    def state(self):
        return self.count


@pytest.fixture
def small_steps(monkeypatch):
    """The journal is written after every few pieces."""
    monkeypatch.setattr(corpus, "SAVE", 0)
    monkeypatch.setattr(corpus, "BATCH", 400)


def prepare_numbered(folder, left=None, shortest=0):
    write_corpus(folder, Numbered(left), BYTE, min_doc_tokens=shortest, val_every=3, workers=1)


def killed(function, *arguments):
    """Call it in a process of its own, in which it is killed."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments, daemon=True)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("shortest", [0, 130, 700])  # 700: what is kept has pieces that alone are too short
def test_after_a_kill_the_same_command_goes_on_and_makes_the_same_bytes(tmp_path, small_steps, capsys, shortest):
    prepare_numbered(tmp_path / "whole", shortest=shortest)
    whole = content(tmp_path / "whole")
    if shortest:
        assert json.loads(whole["meta.json"])["left_out_as_too_short"] > 3
    went_on = 0
    for left in 1, 6, 11, 19, 24:
        killed(prepare_numbered, tmp_path / "x", left, shortest)
        killed(prepare_numbered, tmp_path / "x", 2, shortest)  # and once more
        capsys.readouterr()
        prepare_numbered(tmp_path / "x", shortest=shortest)
        went_on += "going on" in capsys.readouterr().out
        assert {name: content(tmp_path / "x")[name] for name in (*FILES, "meta.json")} == {
            name: whole[name] for name in (*FILES, "meta.json")
        }
        assert not (tmp_path / "x/unfinished").exists()
    assert went_on >= 3


@pytest.mark.parametrize("earlier", [True, False])
def test_killed_while_it_writes(tmp_path, small_steps, earlier):
    """An earlier corpus stays. What is left of the killed one does not mix with another."""
    if earlier:
        write(tmp_path)
        before = content(tmp_path)
    killed(prepare_numbered, tmp_path, 20)
    assert (tmp_path / "unfinished/journal.json").exists()
    if earlier:
        assert content(tmp_path) == before
        assert load_corpus(tmp_path, 8).train_tokens == 42
    else:
        with pytest.raises(UserError, match="has no train.bin and no val.bin"):
            load_corpus(tmp_path, 8)
    assert write(tmp_path)["train_tokens"] == 42
    assert documents(tmp_path, "train") == [text for _, text in TRAIN]


@pytest.mark.parametrize("moves", range(6))
def test_killed_while_it_moves(tmp_path, monkeypatch, moves):
    """What was encoded is not encoded again; meanwhile it is no corpus, but for the very first instant."""
    write_corpus(tmp_path / "whole", Unsplit([5] * 8), BYTE)
    write(tmp_path / "x")
    left = moves

    def replace(source, target, real=os.replace):
        nonlocal left
        if str(target).endswith((".bin", "meta.json")):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(corpus, "SAVE", -1)
        patch.setattr(corpus, "BATCH", 5)
        patch.setattr(os, "replace", replace)
        killed(write_corpus, tmp_path / "x", Unsplit([5] * 8), BYTE)
    if moves:
        with pytest.raises(UserError, match="was cut off at its very end"):
            load_corpus(tmp_path / "x", 8)

    class Read(Unsplit):
        def documents(self, state=None):
            raise AssertionError

    write_corpus(tmp_path / "x", Read([5] * 8), BYTE)
    assert {name: content(tmp_path / "x")[name] for name in (*FILES, "meta.json")} == {
        name: content(tmp_path / "whole")[name] for name in (*FILES, "meta.json")
    }
    assert not (tmp_path / "x/unfinished").exists()


@pytest.mark.parametrize("broken", ["{", "[]", '{"key": 1}', None])
def test_a_journal_which_is_none_begins_anew(tmp_path, small_steps, capsys, broken):
    killed(prepare_numbered, tmp_path, 20)
    if broken is None:
        (tmp_path / "unfinished/train.bin").write_bytes(b"")  # less than the journal says
    else:
        (tmp_path / "unfinished/journal.json").write_text(broken)
    prepare_numbered(tmp_path)
    assert "going on" not in capsys.readouterr().out


def test_two_preparations_of_one_corpus(tmp_path):
    (tmp_path / "unfinished").mkdir()
    with locked(tmp_path / "unfinished", "taken"), pytest.raises(UserError, match="another process is preparing"):
        write(tmp_path)
    write(tmp_path)


def test_a_lock_where_there_is_no_fcntl(tmp_path, monkeypatch):
    """As on Windows, where msvcrt locks bytes."""
    taken = set()

    def locking(number, mode, size):
        assert mode == "LK_NBLCK" and size == 1
        file = os.fstat(number).st_ino
        if file in taken:
            raise PermissionError
        taken.add(file)

    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", types.SimpleNamespace(LK_NBLCK="LK_NBLCK", locking=locking))
    with locked(tmp_path, "taken"), pytest.raises(UserError, match="^taken$"):
        with locked(tmp_path, "taken"):
            pass


class Failing(Texts):
    """Raises after the first document."""

    def __init__(self, error, monkeypatch):
        super().__init__([("a", "first " * 100)], VAL, {})
        self.error = error
        monkeypatch.setattr(corpus, "SAVE", -1)
        monkeypatch.setattr(corpus, "BATCH", 10)

    def documents(self, state=None):
        if state:
            raise self.error
        for document in super().documents(state):
            yield document
            if self.count == 1:
                yield from (Document("train", "more", ["more"]) for _ in range(50))
                raise self.error


@pytest.mark.parametrize(
    "error", [UserError("no network"), KeyboardInterrupt(), MemoryError(), OSError(errno.ENOSPC, "No space left")]
)
@pytest.mark.parametrize("saved", [True, False])
def test_what_was_done_is_kept(tmp_path, monkeypatch, capsys, error, saved):
    """However it fails, and also when that is before it has gone on."""
    source = Failing(error, monkeypatch)
    monkeypatch.setattr(corpus, "SAVE", -1 if saved else 5)
    for _ in range(2):
        with pytest.raises(UserError if isinstance(error, OSError) else type(error)):
            write_corpus(tmp_path / "x", source, BYTE, workers=1)
        kept = saved or isinstance(error, KeyboardInterrupt)
        assert (tmp_path / "x/unfinished/journal.json").exists() is kept and (tmp_path / "x").exists() is kept
        assert ("the same command goes on from there" in capsys.readouterr().out) is kept
    if saved:
        journal = (tmp_path / "x/unfinished/journal.json").read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(corpus, "_checksums", lambda *args: 1 / 0)  # while it looks at what is there
            with pytest.raises(ZeroDivisionError):
                write_corpus(tmp_path / "x", source, BYTE, workers=1)
        assert (tmp_path / "x/unfinished/journal.json").read_bytes() == journal


def test_room_on_the_disk_is_looked_at_beforehand(tmp_path, monkeypatch):
    class Usage:
        free = 80

    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
    with pytest.raises(UserError, match=r"needs about 0.0 MB more, and .* has 0.0 MB free"):
        write(tmp_path / "x")  # 69 bytes of text, twice as many in uint16
    assert not (tmp_path / "x").exists()
    Usage.free = 200
    write(tmp_path / "x")


# -- which documents -----------------------------------------------------------------------------


class Unsplit(Source):
    """Documents of so many letters, whose split is left open."""

    def __init__(self, lengths):
        super().__init__({})
        self.lengths = lengths

    def documents(self, state=None):
        for self.count in range((state or 0) + 1, len(self.lengths) + 1):
            yield Document(None, "", pieces(chr(96 + self.count) * self.lengths[self.count - 1]))

    def state(self):
        return self.count


def test_one_document_in_so_many_is_for_validation(tmp_path):
    write_corpus(tmp_path, Unsplit([5] * 8), BYTE, val_every=3)
    assert "".join(text[0] for text in documents(tmp_path, "val")) == "adg"
    assert "".join(text[0] for text in documents(tmp_path, "train")) == "bcefh"


def test_short_documents_are_left_out(tmp_path, capsys):
    meta = write_corpus(tmp_path, Unsplit([8, 9, 5, 10, 0, 20, 9]), BYTE, val_every=3, min_doc_tokens=10)
    assert documents(tmp_path, "val") == [
        "b" * 9,
        "g" * 9,
    ]  # 9 and end-of-text are 10; of the kept, the first and fourth
    assert documents(tmp_path, "train") == ["d" * 10, "f" * 20]
    assert meta["left_out_as_too_short"] == 2 and "too short: 2 documents" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"no text for train.bin \(2 documents were too short\)"):
        write_corpus(tmp_path, Unsplit([8, 8]), BYTE, min_doc_tokens=10)


@pytest.mark.parametrize(
    "most, kept", [(1, "a"), (6, "a"), (7, "ab"), (12, "ab"), (13, "abc"), (1000, "abcdefgh"), (0, "abcdefgh")]
)
def test_no_document_is_begun_beyond_max_tokens(tmp_path, most, kept):
    if kept == "a":
        with pytest.raises(UserError, match="no text for train.bin"):
            write_corpus(tmp_path, Unsplit([5] * 8), BYTE, max_tokens=most)
        return
    write_corpus(tmp_path, Unsplit([5] * 8), BYTE, max_tokens=most, val_every=100)
    assert [text[0] for text in documents(tmp_path, "val") + documents(tmp_path, "train")] == list(kept)


@pytest.mark.parametrize("size", [1, 7, 100])
def test_pieces_of_a_text_in_parts(size):
    """Wherever the parts end, pieces end before a word, and are the text."""
    text = "one two  three\n four 5 six-seven   eight\tnine " * 5
    for step in 1, 3, 10, 1000:
        found = list(pieces((text[i : i + step] for i in range(0, len(text), step)), size))
        assert "".join(found) == text and all(found)
        assert all(re.match(r"\s", piece) and not before[-1].isspace() for before, piece in zip(found, found[1:]))
        assert len(found) > 5 or size == 100
    assert list(pieces("")) == list(pieces([])) == list(pieces(["", ""])) == []


@pytest.mark.parametrize("moves", [1, 2, 3, 4, 5])
def test_stopped_while_it_moves(tmp_path, monkeypatch, moves):
    """Old and new files have the same sizes here, so that a mix would pass every other check; and without meta.json
    they would be taken for GPT-2's ids.
    """
    write(tmp_path, TRAIN, VAL)
    with monkeypatch.context() as patch:
        left = iter(range(moves))

        def replace(source, target, real=os.replace):
            if next(left, None) is None:
                raise KeyboardInterrupt
            real(source, target)

        patch.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, [(name, text.swapcase()) for name, text in TRAIN], VAL)
    with pytest.raises(UserError, match="cut off"):
        load_corpus(tmp_path, 8)
    write(tmp_path)
    assert load_corpus(tmp_path, 8).train_tokens == 42


# -- reading text ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raw, text",
    [
        (b"\xef\xbb\xbfmark", "mark"),
        (b"a\r\nb\r\n", "a\nb\n"),
        (b"a\rb\n", "a\rb\n"),
        ("größer".encode(), "größer"),
        (b"", ""),
        ("größer\r\n🙂".encode("utf-16"), "größer\n🙂"),
        (b"\xfe\xff" + "größer".encode("utf-16-be"), "größer"),
        ("größer".encode("utf-32"), "größer"),
        (b"\0\0\xfe\xff" + "größer".encode("utf-32-be"), "größer"),
        (packed("größer\r\n".encode()) + packed(b"more"), "größer\nmore"),
        (packed("größer".encode("utf-16")), "größer"),
    ],
)
def test_read_text(tmp_path, raw, text):
    path = tmp_path / ("f.gz" if raw.startswith(b"\x1f\x8b") else "f")
    path.write_bytes(raw)
    assert read_text(path) == text


@pytest.mark.parametrize(
    "raw, message",
    [
        (b"PNG\0...", "f is not text: byte 3 is NUL"),
        ("größer".encode("latin1"), r"f is not UTF-8 text: byte 2 is 0xf6, in 'gr\\xf6\\xdfer' \(.*iconv"),
        (b"one\ntwo \xe9 three " + b"x" * 90, r"in 'one\\ntwo \\xe9 three x{12}' \("),
        ("größer".encode("utf-16-le"), r"f is not text: byte 1 is NUL \(if it is UTF-16: iconv"),
        ("größer".encode("utf-16")[:-1], "f is not UTF-16 text, as its byte order mark says: truncated data"),
        (b"\xff\xfe\0\xd8a\0", "f is not UTF-16 text, as its byte order mark says: illegal"),
        ("a\0b".encode("utf-16"), "f is not text: there is a NUL in its UTF-16"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n", "f is not the file, .*: git lfs pull"),
        (None, "can't read .*f: No such file"),
    ],
)
def test_read_text_refuses(tmp_path, raw, message):
    if raw is not None:
        (tmp_path / "f").write_bytes(raw)
    with pytest.raises(UserError, match=message):
        read_text(tmp_path / "f")


def tree(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())


def test_files_under(tmp_path):
    tree(tmp_path, dict.fromkeys(["b.txt", "a/c.txt", "a/.hidden", ".git/x", "skip/me", "a/skip/me", "skip.txt"], "-"))
    assert [path.relative_to(tmp_path).as_posix() for path in files_under(tmp_path, ("skip",))] == [
        "a/c.txt",
        "b.txt",
        "skip.txt",
    ]


def test_links_are_followed_but_into_no_folder_twice(tmp_path):
    tree(tmp_path, dict.fromkeys(["here/a/x.txt", "here/z.txt", "there/y.txt"], "-"))
    for name, target in ("up", ".."), ("a/round", "../../here"), ("b", "a"), ("file.txt", "z.txt"), ("gone", "nowhere"):
        (tmp_path / "here" / name).symlink_to(target)
    assert [path.relative_to(tmp_path / "here").as_posix() for path in files_under(tmp_path / "here")] == [
        "a/x.txt",
        "file.txt",
        "gone",  # leads nowhere: whoever reads it says so
        "up/there/y.txt",
        "z.txt",
    ]


# -- data/stdlib -------------------------------------------------------------------------------


def test_stdlib_of_this_python(tmp_path):
    meta = script["stdlib"].prepare(tmp_path)
    load_corpus(tmp_path, 32768)
    train, val = documents(tmp_path, "train"), documents(tmp_path, "val")
    assert len(train) == meta["train_documents"] > 300
    assert not {text for text in train if len(text) > 1000} & set(val)
    stdlib = Path(sysconfig.get_path("stdlib"))
    for module in "argparse.py", "json/decoder.py", "asyncio/tasks.py":
        assert read_text(stdlib / module) in train + val
    assert read_text(stdlib / "unittest/case.py") in train + val
    assert 0.02 < meta["val_tokens"] / meta["train_tokens"] < 0.12
    assert meta["source"]["stdlib of Python"] == sys.version.split()[0]


@pytest.fixture
def small_stdlib(tmp_path, monkeypatch):
    tree(
        tmp_path / "lib",
        {f"module{i}.py": f"number = {i}\n" for i in range(400)}
        | dict.fromkeys(
            [
                "test/test_a.py",
                "json/tests/b.py",
                "idlelib/idle_test/c.py",
                "site-packages/d/e.py",
                "dist-packages/f.py",
                "a/__pycache__/g.py",
                "_sysconfigdata__linux.py",
                "config-3.11-x86/h.py",
                "readme.txt",
            ],
            "left out",
        )
        | {"latin.py": b"# caf\xe9", "empty.py": ""},
    )
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "lib"))
    return tmp_path / "lib"


def test_stdlib_takes_sources_only(small_stdlib, tmp_path, capsys):
    meta = script["stdlib"].prepare(tmp_path / "out")
    train, val = documents(tmp_path / "out", "train"), documents(tmp_path / "out", "val")
    assert sorted(train + val) == sorted(f"number = {i}\n" for i in range(400))
    assert meta["source"]["skipped"] == 1 and "not UTF-8 text: 1" in capsys.readouterr().out
    assert 8 <= len(val) <= 32  # 20 expected
    assert train == sorted(train, key=lambda text: f"module{text.split()[-1]}.py")


def test_stdlib_split_is_by_path_alone(small_stdlib, tmp_path):
    """A module stays on its side when others change, so that other Python versions have about the same split."""
    script["stdlib"].prepare(tmp_path / "out")
    before = documents(tmp_path / "out", "val")
    tree(small_stdlib, {"another.py": "x = 1\n"})
    (small_stdlib / "module0.py").unlink()
    script["stdlib"].prepare(tmp_path / "out")
    assert set(before) - {"number = 0\n"} == set(documents(tmp_path / "out", "val")) - {"x = 1\n"}


def test_stdlib_val_fraction(small_stdlib, tmp_path):
    assert 160 <= script["stdlib"].prepare(tmp_path / "out", val_fraction=0.5)["val_documents"] <= 240


def test_stdlib_without_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match="no Python sources"):
        script["stdlib"].prepare(tmp_path / "out")


# -- data/shakespeare_char ---------------------------------------------------------------------

PLAY = "First Citizen:\nSpeak!\n" * 100


def test_shakespeare_from_a_file(tmp_path):
    (tmp_path / "play.txt").write_text(PLAY)
    meta = script["shakespeare_char"].prepare(str(tmp_path / "play.txt"), tmp_path / "out")
    assert meta["tokenizer"]["chars"] == "".join(sorted(set(PLAY))) and meta["vocab_size"] == len(set(PLAY))
    assert (meta["train_tokens"], meta["val_tokens"]) == (int(0.9 * len(PLAY)), len(PLAY) - int(0.9 * len(PLAY)))
    decode = tokenizer_from_meta(meta["tokenizer"]).decode
    assert "".join(decode(np.fromfile(tmp_path / f"out/{split}.bin", np.uint16)) for split in ("train", "val")) == PLAY


def test_shakespeare_download(tmp_path, monkeypatch):
    module = script["shakespeare_char"]
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: io.BytesIO(PLAY.encode()))
    with pytest.raises(UserError, match="2,200 bytes which came are not that text"):  # say, a hotel's log-in page
        module.prepare(folder=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(module, "SHA256", hashlib.sha256(PLAY.encode()).hexdigest())
    assert module.prepare(folder=tmp_path / "out")["source"] == {"input": module.URL}


@pytest.mark.parametrize("error", [urllib.error.URLError("no network"), TimeoutError("no network")])
def test_shakespeare_without_network(tmp_path, monkeypatch, error):
    def urlopen(url, timeout):
        raise error

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    with pytest.raises(UserError, match="can't download .*no network.*--input=FILE"):
        script["shakespeare_char"].prepare(folder=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shakespeare_empty_file(tmp_path):
    (tmp_path / "empty").touch()
    with pytest.raises(UserError, match="empty is empty"):
        script["shakespeare_char"].prepare(str(tmp_path / "empty"), tmp_path / "out")


# -- data/text ---------------------------------------------------------------------------------


def text_corpus(tmp_path, files, **options):
    tree(tmp_path / "in", files)
    meta = script["text"].prepare(str(tmp_path / "in"), "mine", data=tmp_path / "data", **options)
    return meta, tmp_path / "data/mine"


def test_text_of_a_folder(tmp_path):
    """The end of each document is validation; byte order marks and CR go; hidden and empty files don't count."""
    first, second = "ab" * 100, "größer " * 30
    meta, folder = text_corpus(
        tmp_path,
        {
            "b/two.md": second,
            "a.txt": b"\xef\xbb\xbf" + first.encode(),
            ".x": "hidden",
            ".git/y": b"\0",
            "c.txt": "one\r\ntwo\r\n",
            "d.txt": "",
        },
        val_fraction=0.1,
    )
    assert documents(folder, "train") == [first[:180], second[:189], "one\ntwo\n"]
    assert documents(folder, "val") == [first[180:], second[189:]]
    assert meta["source"] == {
        "input": str(tmp_path / "in"),
        "files": 4,
        "val_fraction": 0.1,
        "validation": "the end of each document",
    }
    assert load_corpus(folder, 8).tokenizer_meta == {"name": "byte"}


def held_out(folder):
    """The share of the tokens that is for validation."""
    meta = json.loads((folder / "meta.json").read_bytes())
    return meta["val_tokens"] / (meta["val_tokens"] + meta["train_tokens"])


def draw_lengths(count, seed):
    """Of the kind that documents have: most short, most of the text in long ones."""
    return np.random.default_rng(seed).lognormal(5, 1.3, count).astype(int) + 1


def letters(lengths):
    """A text of each length; no two are the same."""
    return [(f"{i} " + "abcdefghij " * (n // 11 + 1))[:n] for i, n in enumerate(lengths)]


@pytest.mark.parametrize("count, length", [(300, 8000), (1000, 11), (20, 500), (21, 500), (39, 500)])
def test_text_holds_out_whole_documents(tmp_path, count, length):
    """Of files as of rows. The documents of validation are as long as the others, and from all over the input."""
    texts = letters([length] * count)
    for name, files in (
        ("files", {f"{i:04}.txt": text for i, text in enumerate(texts)}),
        ("rows", {"a.jsonl": jsonl(*({"text": text} for text in texts))}),
    ):
        meta, folder = text_corpus(tmp_path / name, files)
        train, val = documents(folder, "train"), documents(folder, "val")
        assert sorted(train + val) == sorted(texts) and len(val) == pytest.approx(count / 20, abs=0.51)
        assert meta["source"]["validation"] == "whole documents"
        if count >= 300:
            places = np.array([texts.index(text) for text in val]) / count
            assert places.min() < 0.25 and places.max() > 0.75 and np.diff(np.sort(places)).max() < 0.4


@pytest.mark.parametrize("kind", ["files", "rows"])
@pytest.mark.parametrize(
    "count, val_fraction, off", [(60, 0.05, 0.025), (400, 0.05, 0.01), (400, 0.3, 0.02), (100, 0.9, 0.1)]
)
def test_text_holds_out_that_share_of_the_text(tmp_path, kind, count, val_fraction, off):
    """However different the documents' lengths are; and by their lengths none is preferred."""
    train, val = [], []
    for seed in range(6):
        texts = letters(draw_lengths(count, seed))
        files = {f"{i:04}.txt": text for i, text in enumerate(texts)}
        if kind == "rows":
            files = {"a.jsonl": jsonl(*({"text": text} for text in texts))}
        _, folder = text_corpus(tmp_path / f"{seed}", files, val_fraction=val_fraction)
        assert abs(held_out(folder) - val_fraction) < off
        for split, lengths in ("train", train), ("val", val):
            lengths += map(len, documents(folder, split))
    # The logarithm of a length has a standard deviation of 1.3: this is four standard errors, and finds a factor of two
    # with 400 documents.
    means = [np.mean(np.log(lengths)) for lengths in (train, val)]
    assert abs(means[0] - means[1]) < 4 * 1.3 * np.sqrt(1 / len(train) + 1 / len(val))


@pytest.mark.parametrize("val_fraction", [0.05, 0.19, 0.3, 0.4, 0.5, 0.6, 0.95])
def test_text_has_both_splits_from_how_many_documents_on(tmp_path, val_fraction):
    """Of files, rows, and both; with fewer the end of each is for validation."""
    enough = max(2, int(np.ceil(1 / val_fraction)))
    for count in enough - 1, enough, enough + 1:
        for rows_of_it in {0, 1, count // 2, count - 1, count} - {-1}:
            texts = letters(draw_lengths(count, count + rows_of_it) + 40)
            files = {f"{i}.md": text for i, text in enumerate(texts[rows_of_it:])}
            files["z.jsonl"] = jsonl(*({"text": text} for text in texts[:rows_of_it]))
            _, folder = text_corpus(tmp_path / f"{count}-{rows_of_it}", files, val_fraction=val_fraction)
            train, val = documents(folder, "train"), documents(folder, "val")
            assert train and val
            assert (sorted(train + val) == sorted(texts)) is (count >= enough)
            if count < enough:
                assert {a + b for a in train for b in val} >= set(texts)
                assert held_out(folder) == pytest.approx(val_fraction, abs=0.03)


def test_text_holds_out_the_same_wherever_it_is(tmp_path):
    """Which files are for validation depends on neither threads nor the folder's place."""
    files = {f"{i % 7}/{i:03}.txt": text for i, text in enumerate(letters(draw_lengths(100, 0)))}
    whole = {}
    for place, workers in ("a", 1), ("b/c", 3):
        _, folder = text_corpus(tmp_path / place, files, num_proc=workers)
        whole[place] = [(folder / name).read_bytes() for name in FILES]
    assert whole["a"] == whole["b/c"]


def prepare_and_be_killed(tmp_path, left):
    """A preparation of tmp_path/in that ends after `left` documents."""
    real = script["text"].Files.documents

    def documents(self, state=None):
        for count, document in enumerate(real(self, state)):
            if count == left:
                os.kill(os.getpid(), signal.SIGKILL)
            yield document

    script["text"].Files.documents = documents
    script["text"].prepare(str(tmp_path / "in"), "mine", data=tmp_path / "data", num_proc=1)


def test_text_killed_goes_on_and_holds_out_the_same(tmp_path, small_steps, capsys):
    texts = letters(draw_lengths(120, 3))
    files = {f"{i:03}.txt": text for i, text in enumerate(texts[:60])}
    files |= {"rows.json": json.dumps([{"text": text} for text in texts[60:]], indent=1)}
    whole = content(text_corpus(tmp_path / "whole", files)[1])
    tree(tmp_path / "in", files)
    for left in 30, 40, 25:  # each of those documents that are left then
        killed(prepare_and_be_killed, tmp_path, left)
    capsys.readouterr()
    script["text"].prepare(str(tmp_path / "in"), "mine", data=tmp_path / "data")
    assert "going on" in capsys.readouterr().out
    assert all(content(tmp_path / "data/mine")[name] == whole[name] for name in FILES)


def test_text_of_a_file(tmp_path):
    tree(tmp_path, {"book.txt": "word " * 20_000})
    script["text"].prepare(str(tmp_path / "book.txt"), "book", data=tmp_path)
    load_corpus(tmp_path / "book", 2048)


def test_text_with_gpt2(tmp_path, gpt2):
    meta, folder = text_corpus(tmp_path, {"a": "Hello world" * 10, "b": "<|endoftext|>" * 40}, tokenizer="gpt2")
    assert (meta["vocab_size"], meta["tokenizer"]) == (50304, {"name": "gpt2"})
    ids = np.fromfile(folder / "train.bin", np.uint16)
    assert ids[:2].tolist() == [15496, 995] and (ids == gpt2.eot).sum() == 2
    end = "<|endoftext|>"
    assert gpt2.decode(ids) == ("Hello world" * 10)[:105] + end + (end * 40)[:494] + end


def test_text_with_the_tokenizer_of_a_folder(tmp_path, monkeypatch, capsys):
    """The corpus needs the folder no more. A document of many pieces has the ids of the whole, whatever the threads,
    also where the tokenizer puts a space before a text.
    """
    pytest.importorskip("transformers")
    monkeypatch.setattr("data.corpus.BATCH", 500)
    monkeypatch.setattr(script["text"], "pieces", functools.partial(pieces, size=100))
    for kind in ("smollm2", "llama"):
        path = tokenizer_folder(tmp_path / kind, kind)
        files = {"a": "".join(LINES) * 5, "b": "tea </s><|endoftext|>" * 40}
        made = []
        for workers in (1, 3):
            meta, folder = text_corpus(tmp_path, files, tokenizer=str(path), num_proc=workers, val_fraction=0.1)
            made.append(np.fromfile(folder / "train.bin", np.uint16))
        assert f"{path}/tokenizer.json is the tokenizer {meta['tokenizer']['name']}; " in capsys.readouterr().out
        shutil.rmtree(path)
        tokenizer = tokenizer_from_meta(load_corpus(folder, 8).tokenizer_meta)
        assert meta["vocab_size"] == tokenizer.vocab_size
        assert list(json.loads((folder / "meta.json").read_bytes()))[-1] == "tokenizer"  # a very long line
        ends = np.flatnonzero(made[0] == tokenizer.eot)
        assert np.array_equal(*made) and len(ends) == 2
        first = tokenizer.decode(made[0][: ends[0]])
        assert files["a"].startswith(first) and np.array_equal(tokenizer.encode(first), made[0][: ends[0]])


def test_ids_above_65535_of_a_folder(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {chr(0x10000 + i): i for i in range(70_000)} | {"</s>": 70_000}
    (tmp_path / "folder").mkdir()
    tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [])).save(str(tmp_path / "folder" / "tokenizer.json"))
    (tmp_path / "folder" / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    text = chr(0x10000) + chr(0x10000 + 69_999)
    meta, folder = text_corpus(tmp_path, {"a": text * 50}, tokenizer=str(tmp_path / "folder"), val_fraction=0.1)
    assert (meta["vocab_size"], meta["dtype"]) == (70_016, "uint32")
    assert np.fromfile(folder / "train.bin", np.uint32).tolist() == [0, 69_999] * 45 + [70_000]


def test_text_with_a_million_spaces(tmp_path, gpt2):
    """More than the regular expression can take, in one file, and in a row."""
    spaces = "word" + " " * 1_100_000 + "end"
    files = {"a.txt": spaces + "text " * 100_000, "b.jsonl": jsonl({"text": spaces})}
    _, folder = text_corpus(tmp_path, files, tokenizer="gpt2", num_proc=2)
    ids = np.fromfile(folder / "train.bin", np.uint16)
    assert gpt2.decode(ids).startswith(spaces) and (ids == 220).sum() > 2_000_000


def test_text_which_is_none(tmp_path):
    """All files are looked at before anything is written, and all the bad ones are named."""
    with pytest.raises(UserError) as error:
        text_corpus(tmp_path, {"good.txt": "text", "picture.png": b"\x89PNG\0", "sub/latin.txt": b"caf\xe9"})
    message = str(error.value)
    assert "2 of 3 files" in message and "picture.png is not text" in message and "latin.txt is not UTF-8" in message
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    "files, message",
    [({".hidden": "text"}, "no files"), ({"a": ""}, "no text for train"), ({"a": "short"}, "no text for val.bin")],
)
def test_text_too_little(tmp_path, files, message):
    with pytest.raises(UserError, match=message):
        text_corpus(tmp_path, files)
    assert not (tmp_path / "data/mine").exists()


@pytest.mark.parametrize("input", ["nowhere", "x" * 5000])
def test_text_missing(tmp_path, input):
    with pytest.raises(UserError, match="no such file or folder"):
        script["text"].prepare(str(tmp_path / input), "mine", data=tmp_path)


def test_text_without_input(tmp_path):
    with pytest.raises(UserError, match="--input is missing"):
        script["text"].prepare("", "mine", data=tmp_path)


@pytest.mark.parametrize(
    "out",
    [
        "",
        ".",
        "..",
        "../up",
        "a/b",
        "a\\b",
        "/tmp/x",
        ".hidden",
        "-x",
        "with space",
        "__pycache__",
        "loader.py",
        "a\n",
        "x" * 300,
        "漢" * 100,  # of 300 bytes
        "stdlib",
        "shakespeare_char",
        "text",
    ],
)
def test_text_bad_name(tmp_path, out):
    tree(
        tmp_path,
        {
            "data/loader.py": "",
            "data/stdlib/prepare.py": "",
            "data/shakespeare_char/prepare.py": "",
            "data/text/prepare.py": "",
            "in.txt": "text " * 100,
        },
    )
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="--out=(?s:.*)(give a name|another name)"):
        script["text"].prepare(str(tmp_path / "in.txt"), out, data=tmp_path / "data")
    assert sorted(tmp_path.rglob("*")) == before


def parquet(path, **columns):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table(columns), path)


def compressed(raw):
    return pytest.importorskip("zstandard").compress(raw)


def jsonl(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_text_of_mixed_files(tmp_path):
    """A row is a document, and so is a text."""
    (tmp_path / "in").mkdir()
    parquet(tmp_path / "in/d.parquet", text=["seventh", "eighth"], other=[1, 2])
    meta, folder = text_corpus(
        tmp_path,
        {
            "a.tex": "\\section{One} " * 10,
            "b.jsonl": jsonl(*({"text": t, "id": 1} for t in ("first", "", "second\r\n", None, "third"))),
            "c.jsonl.zst": compressed(jsonl({"text": "fourth"}, {"text": "fifth"})),
            "e.md.zst": compressed("größer ".encode() * 20),
        },
        val_fraction=0.2,
    )
    one, two = "\\section{One} " * 10, "größer " * 20
    rows = ["first", "second\n", "third", "fourth", "fifth", "seventh", "eighth"]
    train, val = documents(folder, "train"), documents(folder, "val")
    assert sorted(train + val) == sorted([one, two, *rows])
    assert val == ["third", "eighth"]  # of the two texts, one would be far more than a fifth
    assert meta["source"]["files"] == 5 and meta["source"]["validation"] == "whole documents"


def test_text_in_gzip(tmp_path):
    rows = jsonl(*({"text": f"row {i}"} for i in range(50)))
    files = {"a.md.gz": packed("größer ".encode() * 20), "b.jsonl.gz": packed(rows[:300]) + packed(rows[300:])}
    _, folder = text_corpus(tmp_path, files)
    there = documents(folder, "train") + documents(folder, "val")
    assert sorted(there) == sorted(["größer " * 20, *(f"row {i}" for i in range(50))])


@pytest.mark.parametrize(
    "name, raw, message",
    [
        ("a.txt.gz", b"no gzip", "can't read .*a.txt.gz: Not a gzipped file"),
        ("a.txt.gz", b"", "a.txt.gz has 0 bytes"),
        ("a.jsonl.gz", packed(os.urandom(5000))[:3000], "can't read .*a.jsonl.gz: Compressed file ended before"),
        ("a.txt.gz", packed(b"text " * 99)[:10] + b"\xff" * 50, "can't read .*a.txt.gz: Error -3 while decomp"),
        ("a.parquet.gz", packed(b"x"), "a.parquet.gz: .parquet files are compressed by themselves"),
        ("a.tar.gz", packed(b"x\0y"), "a.tar.gz is not text: byte 1 is NUL"),
    ],
)
def test_text_in_broken_gzip(tmp_path, name, raw, message):
    with pytest.raises(UserError, match=message):
        text_corpus(tmp_path, {name: raw})


def test_text_in_utf16(tmp_path):
    """What a shell on Windows writes: texts and rows."""
    files = {
        "a.txt": ("größer " * 20).encode("utf-16"),
        "b.jsonl": jsonl({"text": "one"}, {"text": "two"}).decode().encode("utf-16"),
    }
    _, folder = text_corpus(tmp_path, files, val_fraction=0.34)
    assert documents(folder, "train") + documents(folder, "val") == ["größer " * 20, "one", "two"]


ROWS = [
    {"id": i, "text": text} for i, text in enumerate(["one", "", "[two]", 'th"r\\ee', "vier, ümlaut", None, "🙂" * 30])
]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz"])
@pytest.mark.parametrize("block", [1, 2, 7, 1 << 20])
@pytest.mark.parametrize("layout", [{}, {"indent": 2}, {"separators": (",", ":"), "ensure_ascii": False}])
def test_text_in_an_array_of_json(tmp_path, monkeypatch, name, block, layout):
    monkeypatch.setattr(reading, "BLOCK", block)
    raw = f"\n {json.dumps(ROWS, **layout)}\n\n".encode()
    (tmp_path / name).write_bytes(packed(raw) if name.endswith("gz") else raw)
    assert rows.has_rows(tmp_path / name)
    found = list(rows.rows_of(tmp_path / name, "text"))
    assert found == [(n, row["text"], None) for n, row in enumerate(ROWS, 1)]


@pytest.mark.parametrize(
    "name, text, is_rows",
    [
        ("a.json", '[{"text": "x"}]', True),
        ("a.json", "[]", True),
        ("a.json", "\ufeff [\n{}]", True),
        ("a.json", '{"text": "x"}\n\n{"text": "y"}\n', True),
        ("a.json", '{"text": "x"}', False),
        ("a.json", '{"text": "x"}\n', False),
        ("a.json", '{\n"scripts": {\n}\n}', False),
        ("a.json", '{\n{"text": "x"}', False),
        ("a.json", "[1, 2]", False),
        ("a.json", '["text"]', False),
        ("a.json", "[", False),
        ("a.json", "", False),
        ("a.json", "no json", False),
        ("a.txt", '[{"text": "x"}]', False),
        ("a.ndjson", "", True),
    ],
)
def test_which_files_have_rows(tmp_path, name, text, is_rows):
    """A settings file is a text."""
    (tmp_path / name).write_text(text)
    assert rows.has_rows(tmp_path / name) is is_rows


@pytest.mark.parametrize(
    "text, message",
    [
        ('[{"text": "x"}, {"text": "y"', "row 2 is no JSON: .*is it whole"),
        ('[{"text": "x"}, {"text": "y', "row 2 is no JSON: Unterminated string"),
        ('[{"text": "x"}, {"text": y, "a": "and so on"}]', "row 2 is no JSON: Expecting value"),
        ('[{"text": "x"} {"text": "y"}]', "'{' is behind row 1"),
        ('[{"text": "x"}', "it is cut off"),
        ('[{"text": "x"},', "row 2 is no JSON"),
        ('[{"text": "x"},]', "row 2 is no JSON"),
        ('[{"text": "x"}][{"text": "y"}]', r"'\[' is behind the array's end"),
        ('[{"text": "x"}, 5]', "row 2 has no column 'text' but int"),
        ('[{"text": "x"}, {"id": ' + "9" * 5000 + "}]", "row 2 is no JSON: Exceeds the limit"),
        ('[{"text": "x"}, {"text": 5}]', "row 2 has no text, but int"),
        ('[{"text": "x"}, ' + "[" * 100_000, "row 2 is no JSON"),
        ('[{"text": "x"}, {"text": "y\0"}]', "a.json is not text"),
        ('[{"text": "x"}, {"text": "\\ud800"}]', "row 2 has half a surrogate pair"),
        ('[{"id": 1}]', r"1 of 1 files can't be used(?s:.*)first row has no column 'text' but 'id': choose one"),
        ('{"a": 1}\n{"a": 1}\n', r"1 of 1 files can't be used(?s:.*)first row has no column 'text' but 'a'"),
    ],
)
def test_text_in_broken_json(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as error:
        text_corpus(tmp_path, {"a.json": text})
    assert "/in/a.json" in str(error.value)


def test_text_an_array_is_used_as_far_as_it_can_be_read(tmp_path, capsys):
    texts = letters([50] * 40)
    broken = json.dumps([{"text": text} for text in texts])[:-100]
    _, folder = text_corpus(tmp_path, {"a.json": broken, "b.json": '[{"id": 1}]'}, skip_bad=True)
    assert sorted(documents(folder, "train") + documents(folder, "val")) == sorted(texts[:38])
    out = capsys.readouterr().out
    assert re.search(r"used as far as it can be read: \S+a.json: row 39 is no JSON", out)
    assert re.search(r"1 of 2 files are left out:\n.*b.json: the first row has no column 'text' but 'id'", out)


def test_text_in_an_array_takes_little_memory(tmp_path, monkeypatch):
    """No more of the array than the longest element, twice, and a block; and none is begun too often."""
    monkeypatch.setattr(reading, "BLOCK", 100)
    texts = ["x" * n for n in (5, 10_000, *[50] * 4000, 40_000)]
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in texts]))
    array = rows._Array(tmp_path / "a.json")
    tries, decode = [], array.decode
    array.decode = lambda *arguments: tries.append(len(array.text)) or decode(*arguments)
    most = [len(array.text) for n, row in array.rows() if n != 2]
    assert len(most) == len(texts) - 1 and max(most[:-1]) < 21_000 and most[-1] < 81_000
    assert sum(tries) < 12 * 50_000 + 4000 * 400


def test_text_without_end(tmp_path, monkeypatch):
    """What lacks a line end or a quote is not read for ever."""
    monkeypatch.setattr(reading, "BLOCK", 100)
    monkeypatch.setattr(rows, "LONGEST_ROW", 5000)
    long = '{"text": "' + "x" * 20_000
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' + long)
    with pytest.raises(UserError, match="a.jsonl: row 2 is longer than 5,000 bytes"):
        list(rows.rows_of(tmp_path / "a.jsonl", "text"))
    (tmp_path / "a.json").write_text('[{"text": "x"},' + long)
    with pytest.raises(UserError, match="a.json: row 2 is no JSON: Unterminated string"):
        list(rows.rows_of(tmp_path / "a.json", "text"))


NESTED = [
    {"a": {"text": "one", "b": {"c": "two"}}, "d.e": "three"},
    {"a": None, "d.e": "four"},
    {"a": {"text": None, "b": None}, "d.e": None},
]


@pytest.mark.parametrize(
    "column, values",
    [("a.text", ["one", None, None]), ("a.b.c", ["two", None, None]), ("d.e", ["three", "four", None])],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_text_of_a_nested_column(tmp_path, name, column, values):
    if name == "a.parquet":
        parquet(tmp_path / name, **{key: [row[key] for row in NESTED] for key in NESTED[0]})
        assert 0 < rows.bytes_of_text(tmp_path / name, column) < 1000
    else:
        (tmp_path / name).write_bytes(jsonl(*NESTED) if name == "a.jsonl" else json.dumps(NESTED).encode())
    found = list(rows.rows_of(tmp_path / name, column))
    assert found == [(n, value, None) for n, value in enumerate(values, 1)]


@pytest.mark.parametrize("column", ["a", "a.x", "a.text.x", "text", "a.", "a.b"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_text_of_a_nested_column_that_is_none(tmp_path, name, column):
    """It is said which there are."""
    if name == "a.parquet":
        (tmp_path / "in").mkdir()
        parquet(tmp_path / "in" / name, **{key: [row[key] for row in NESTED] for key in NESTED[0]})
    files = {name: jsonl(*NESTED)} if name == "a.jsonl" else {}
    names = re.escape("'a.text', 'a.b.c', 'd.e'")
    with pytest.raises(UserError, match=rf"{name}(: the first row)? has no column {column!r} but {names}: choose one"):
        text_corpus(tmp_path, files, column=column)


def test_text_of_a_column_where_there_are_no_rows(tmp_path):
    with pytest.raises(UserError, match="--column=body: none of the files has rows"):
        text_corpus(tmp_path, {"a.txt": "text " * 20}, column="body")


def test_text_says_what_it_takes_for_what(tmp_path, capsys):
    files = {
        "a.txt": "text " * 20,
        "b.TXT": "more " * 30,
        "c.json": "{}",
        "d": "and " * 20,
        "e.jsonl": jsonl({"text": "a"}),
    }
    text_corpus(tmp_path, files)
    out = capsys.readouterr().out
    assert "a document a file: 2 .txt, 1 .json, 1 without suffix\na document a row, column text: 1 .jsonl\n" in out


def test_text_of_several_inputs(tmp_path, monkeypatch, capsys):
    """In their order, and what two of them have once. The last of them isn't the only one."""
    tree(tmp_path, {"one/b.txt": "first " * 30, "two/a.txt": "second " * 30, "two/in/c.txt": "third " * 30})
    inputs = [str(tmp_path / name) for name in ("one", "two/in", "two", "two/a.txt")]
    meta = script["text"].prepare(inputs, "mine", data=tmp_path / "data")
    assert [text[:5] for text in documents(tmp_path / "data/mine", "train")] == ["first", "third", "secon"]
    assert meta["source"]["input"] == inputs and "are taken once: 2\n" in capsys.readouterr().out
    real = script["text"].prepare
    monkeypatch.setattr(script["text"], "prepare", functools.partial(real, data=tmp_path / "data"))
    monkeypatch.setattr(sys, "argv", ["prepare.py", *(f"--input={name}" for name in inputs), "--out=other"])
    script["text"].main()
    assert content(tmp_path / "data/other")["train.bin"] == content(tmp_path / "data/mine")["train.bin"]
    for wrong, message in ([str(tmp_path / "none")], "none: no such file or folder"), ([""], "--input is missing"):
        with pytest.raises(UserError, match=message):
            real([*inputs, *wrong], "mine", data=tmp_path / "data")


def test_text_behind_a_link_that_leads_nowhere(tmp_path):
    """As in a repository whose large files were not fetched."""
    tree(tmp_path / "in", {"a.txt": "text " * 20})
    (tmp_path / "in/b.txt").symlink_to("nowhere")
    with pytest.raises(UserError, match="1 of 2 files can't be used(?s:.*)can't read .*b.txt: No such file"):
        text_corpus(tmp_path, {})
    assert text_corpus(tmp_path, {}, skip_bad=True)[0]["source"]["left_out"] == 1


def test_text_of_a_column(tmp_path):
    meta, folder = text_corpus(
        tmp_path,
        {"a.jsonl": jsonl({"body": "one"}, {"body": "two"}, {"body": "three"})},
        column="body",
        val_fraction=0.4,
    )
    assert documents(folder, "train") + documents(folder, "val") == ["one", "three", "two"]


@pytest.mark.parametrize(
    "files, message",
    [
        ({"a.jsonl": b'{"text": "x"}\n\n\n{"text": '}, "a.jsonl: row 4 is no JSON"),
        (
            {"a.jsonl": jsonl({"text": "x"}, {"body": "y"})},
            "a.jsonl: row 2 has no column 'text' but 'body': choose one by --column=NAME",
        ),
        ({"a.jsonl": jsonl({"text": "x"}, ["text"])}, "a.jsonl: row 2 has no column 'text' but list"),
        ({"a.jsonl": jsonl({"text": "x"}, {"text": 5})}, "a.jsonl: row 2 has no text, but int"),
        ({"a.JSONL": jsonl({"text": "x"}, {"text": "a\0"})}, "a.JSONL: row 2 has a NUL"),
        ({"a.jsonl": b'{"text": "x"}\n{"text": "\\ud800"}'}, "a.jsonl: row 2 has half a surrogate pair"),
        ({"a.jsonl": b'{"text": "x"}\n' + b"[" * 100_000}, "a.jsonl: row 2 is no JSON"),
        ({"a.jsonl": b'{"text": "x"}\n{"text": "\xff"}'}, "a.jsonl: row 2 is no JSON"),
        ({"a.parquet.zst": b"x"}, "a.parquet.zst: .parquet files are compressed by themselves"),
        ({"a.parquet": b"PAR1 and more"}, "a.parquet is damaged, or no parquet file"),
        ({"a.txt.zst": b"no zstd"}, "can't read .*a.txt.zst: ZSTD decompress failed"),
    ],
)
def test_text_in_broken_files(tmp_path, files, message):
    if not all(name.lower().endswith("jsonl") for name in files):
        pytest.importorskip("pyarrow")
    with pytest.raises(UserError, match=message):
        text_corpus(tmp_path, files)
    assert not (tmp_path / "data/mine").exists()


def test_text_in_truncated_files(tmp_path):
    text = json.dumps({"text": "".join(f"{i} " for i in range(50_000))}).encode()
    with pytest.raises(UserError, match="b.jsonl.zst: Truncated compressed stream"):
        text_corpus(tmp_path, {"a.txt": "good " * 100, "b.jsonl.zst": compressed(text)[:-100]})
    parquet(tmp_path / "c.parquet", text=["x" * 1000] * 100)
    with pytest.raises(UserError, match="c.parquet is damaged, or no parquet file"):
        text_corpus(tmp_path / "2", {"c.parquet": (tmp_path / "c.parquet").read_bytes()[:-50]})
    with pytest.raises(UserError, match="c.parquet has no column 'body' but 'text': choose one by --column=NAME"):
        text_corpus(tmp_path / "3", {"c.parquet": (tmp_path / "c.parquet").read_bytes()}, column="body")


@pytest.mark.parametrize("size", [0, 5])
def test_text_in_no_bytes(tmp_path, size):
    pytest.importorskip("pyarrow")
    with pytest.raises(UserError, match="a.jsonl.zst(: Truncated| has 0 bytes)"):
        text_corpus(tmp_path, {"a.jsonl.zst": compressed(b"{}")[:size]})


def test_text_as_far_as_it_can_be_read(tmp_path, capsys):
    rows = [{"text": "".join(f"{n}.{i} " for i in range(9000))} for n in range(40)]
    files = {"a.jsonl.zst": compressed(jsonl(*rows))[:-100], "b.txt": "text " * 20}
    _, folder = text_corpus(tmp_path, files, skip_bad=True)
    there = documents(folder, "train") + documents(folder, "val")
    assert 30 < len(there) < 42 and {row["text"] for row in rows[:30]} < set(there)
    assert "used as far as it can be read: can't read" in capsys.readouterr().out


def test_text_with_the_corpus_in_its_own_folder(tmp_path):
    """A preparation that goes on must not read what it has made."""
    tree(tmp_path, {"a.txt": "text " * 20, "data/mine/unfinished/train.bin": b"\0", "data/other/b.txt": "more " * 20})
    (tmp_path / "data/other/link").symlink_to("../mine")
    meta = script["text"].prepare(str(tmp_path), "mine", data=tmp_path / "data")
    assert meta["source"]["files"] == 2


def test_text_in_parquet_takes_little_memory(tmp_path):
    """Rows of one group are not read all at once."""
    pyarrow = pytest.importorskip("pyarrow")
    draw = np.random.default_rng(0)
    parquet(tmp_path / "a.parquet", text=[draw.bytes(10_000).hex() for _ in range(8000)])
    before = pyarrow.total_allocated_bytes()
    most = max(pyarrow.total_allocated_bytes() for _ in rows.rows_of(tmp_path / "a.parquet", "text"))
    assert most - before < (tmp_path / "a.parquet").stat().st_size / 2


def test_text_without_the_package_it_needs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="a.txt.zst needs a package more: pip install -r requirements-data.txt"):
        text_corpus(tmp_path, {"a.txt.zst": b"x"})


def test_text_leaves_bad_rows_out_if_told_to(tmp_path, capsys):
    rows = (
        jsonl({"text": "one"}, {"text": 5}, {"body": "x"}, {"text": "a\0"}, {"text": None}, {"text": "\ufefftwo"})
        + b"{\n"
    )
    _, folder = text_corpus(tmp_path, {"a.jsonl": rows}, skip_bad=True, val_fraction=0.5)
    assert documents(folder, "train") + documents(folder, "val") == ["one", "two"]
    assert "not text: 4 rows" in capsys.readouterr().out


def test_text_a_wrong_column_is_no_bad_file(tmp_path):
    files = {"a.jsonl": jsonl({"body": "one"}), "b.txt": "text " * 20}
    with pytest.raises(
        UserError,
        match="1 of 2 files have no such column.*\n  .*a.jsonl: the first row has no column 'text' but 'body'",
    ):
        text_corpus(tmp_path, files, skip_bad=True)


@pytest.mark.parametrize("val_fraction, count", [(0.1, 8), (0.3, 4)])  # two halves of each; whole ones
def test_text_goes_on_with_the_next_document(tmp_path, val_fraction, count):
    tree(
        tmp_path,
        {"a.jsonl": jsonl({"text": "one"}, {"text": 5}, {"text": "two"}), "b.txt": "text " * 20, "c.md": "more " * 30},
    )
    files = script["text"].Files([str(tmp_path)], val_fraction, "text", False, True, None)
    read = lambda documents: [(d.split, d.name, "".join(d.texts)) for d in documents]
    whole = read(files.documents())
    assert len(whole) == count
    for n, _ in enumerate(files.documents(), 1):
        state = json.loads(json.dumps(files.state()))
        assert state == n
    again = lambda: script["text"].Files([str(tmp_path)], val_fraction, "text", False, True, None)
    for state in range(count + 1):
        assert read(again().documents(state)) == whole[state:]
    before = files.fingerprint
    os.utime(tmp_path / "b.txt", (1, 1))
    assert again().fingerprint != before


def test_text_is_not_taken_from_where_the_corpus_goes(tmp_path):
    tree(tmp_path / "data/mine", {"a.txt": "text " * 100})
    with pytest.raises(UserError, match="is in .*mine, which is where the corpus goes"):
        script["text"].prepare(str(tmp_path / "data/mine"), "mine", data=tmp_path / "data")


def test_text_a_long_line(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "BLOCK", 7)
    texts = ["word " * n for n in (0, 100, 1, 50)]
    (tmp_path / "a.jsonl").write_bytes(b"\n" + jsonl(*({"text": text} for text in texts)) + b"\n")
    assert list(rows.rows_of(tmp_path / "a.jsonl", "text")) == [(n, text, None) for n, text in enumerate(texts, 2)]


def test_text_share_of_rows_beside_files(tmp_path):
    """That files give their ends to validation does not change which rows do."""
    files = {
        f"{i:02}.{kind}": content
        for i in range(30)
        for kind, content in (("txt", "text " * 20), ("jsonl", jsonl({"text": f"row {i}"})))
    }
    _, folder = text_corpus(tmp_path, files, val_fraction=0.34)
    assert sum(text.startswith("row") for text in documents(folder, "val")) == 10


def test_text_leaves_bad_files_out_if_told_to(tmp_path, capsys):
    files = {"good.txt": "text " * 20, "picture.png": b"\x89PNG\0"}
    meta, folder = text_corpus(tmp_path, files, skip_bad=True)
    assert re.search("1 of 2 files are left out:\n  .*picture.png is not text", capsys.readouterr().out)
    assert documents(folder, "train") == [("text " * 20)[:95]]
    assert (meta["source"]["files"], meta["source"]["left_out"]) == (1, 1)
    with pytest.raises(UserError, match="there is no text; .*picture.png is not text"):
        text_corpus(tmp_path / "2", {"picture.png": b"\x89PNG\0"}, skip_bad=True)


@pytest.mark.parametrize("block", [1 << 20, 500, 150])  # the first has to hold where the book begins
def test_text_without_project_gutenberg(tmp_path, monkeypatch, capsys, block):
    monkeypatch.setattr(reading, "BLOCK", block)
    head = "The Project Gutenberg EBook of X\n\n*** START OF THIS PROJECT GUTENBERG EBOOK X ***\n"
    book = "\n Chapter 1\n" + "Call me Ishmael. " * 100 + "***\n* * *\nThe End of it.\n"
    for n, end in enumerate(
        [
            "End of the Project Gutenberg EBook of X\n*** END OF",
            "End of Project Gutenberg’s X\n\n\n*** END OF",
            "***END OF THE PROJECT GUTENBERG EBOOK X***\n",
        ]
    ):
        _, folder = text_corpus(tmp_path / f"{n}", {"x.txt": head + book + end + " more" * 300}, strip_gutenberg=True)
        assert documents(folder, "train")[0] + documents(folder, "val")[0] == book
    assert "Gutenberg" not in capsys.readouterr().out
    text_corpus(tmp_path / "two", {"x.txt": head + book, "y.txt": book}, strip_gutenberg=True)
    assert "without Project Gutenberg's frame, so used whole: 1 of 2 texts\n" in capsys.readouterr().out
    for name, file in ("other", {"x.txt": book}), ("row", {"x.jsonl": jsonl({"text": head + book + end})}):
        _, folder = text_corpus(tmp_path / name, file, strip_gutenberg=True)
        assert documents(folder, "train")[0] + documents(folder, "val")[0] == book


@pytest.mark.parametrize("block", [1, 2, 3, 5, 1000])
def test_text_is_read_in_blocks(tmp_path, monkeypatch, block):
    monkeypatch.setattr(reading, "BLOCK", block)
    (tmp_path / "f").write_bytes("größer\r\n漢字\r🙂\r".encode())
    assert read_text(tmp_path / "f") == "größer\n漢字\r🙂\r"
    (tmp_path / "g").write_bytes("größer".encode() + b"\xe6\xbc")
    with pytest.raises(UserError, match="byte 8 is 0xe6, .*is its end missing"):
        read_text(tmp_path / "g")


# -- as commands -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, arguments, folder, now",
    [
        ("stdlib", ["--val_fraction=0.5"], {"folder": "stdlib"}, "config/long_ctx.py"),
        ("shakespeare_char", ["--input=in.txt"], {"folder": "shakespeare_char"}, "config/train_shakespeare_char.py"),
        (
            "text",
            ["--input=in.txt", "--out=mine"],
            {"data": ""},
            "config/long_ctx.py --dataset=mine --out_dir=out-mine --block_size=55",
        ),
    ],
)
def test_main(small_stdlib, tmp_path, monkeypatch, capsys, name, arguments, folder, now):
    """The commands as they are given, but for where the corpus goes."""
    monkeypatch.chdir(tmp_path)
    Path("in.txt").write_text(PLAY)
    where = {key: tmp_path / value for key, value in folder.items()}
    monkeypatch.setattr(script[name], "prepare", functools.partial(script[name].prepare, **where))
    monkeypatch.setattr(sys, "argv", ["prepare.py", *arguments])
    script[name].main()
    assert load_corpus(tmp_path / ("mine" if name == "text" else name), 8).val_tokens > 8
    assert capsys.readouterr().out.endswith(f"now: python train.py {now}\n")


@pytest.mark.parametrize(
    "name, argument, code, output",
    [
        ("stdlib", "--help", 0, "--val_fraction=0.05"),
        (
            "shakespeare_char",
            "--input=/no/such/file",
            1,
            "error: can't read /no/such/file: No such file or directory\n",
        ),
        ("text", "--inptu=x", 1, "error: --inptu=x: unknown key 'inptu'; did you mean input?\n"),
    ],
)
def test_command(tmp_path, name, argument, code, output):
    done = subprocess.run(
        [sys.executable, ROOT / "data" / name / "prepare.py", argument], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == code
    assert output in done.stdout if code == 0 else output == done.stderr


def test_files_under_skips_what_is_no_regular_file(tmp_path):
    """A pipe in the folder would be waited for for ever."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "text.txt").write_text("x")
    assert files_under(tmp_path) == [tmp_path / "text.txt"]
