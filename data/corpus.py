"""
The shared core of the prepare.py scripts: documents to train.bin, val.bin and meta.json in one folder.

    train.bin, val.bin   token ids, headerless, uint16 (uint32 above 65536 ids): the documents one after the other, each
                         followed by end-of-text where the tokenizer has one
    meta.json            tokenizer, dtype, counts and checksums: all that the loader and the model need to know

A corpus is whole or it isn't one: the files are written in a folder aside and moved into place at the end; while they
move, meta.json says so. A preparation that fails or is killed before leaves an earlier corpus as it was.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from configurator import UserError

ASIDE = "unfinished-"  # prefix of the folder aside
LONG = {"2k": 2048, "8k": 8192, "32k": 32768, "128k": 131072}  # tokens
WORD_START = re.compile(r"(?<=\S) (?=\S)")


def files_under(folder, skip=()):
    """Sorted paths of the regular files below folder, without hidden ones and without folders whose name is in skip."""
    def refuse(error):
        raise UserError(f"can't read the folder {error.filename}: {error.strerror}")

    found = []
    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in skip]
        found += [Path(parent, name) for name in files if not name.startswith(".")]
    return sorted(path for path in found if path.is_file())  # to read a pipe would wait for ever


def read_text(path):
    """The text of a UTF-8 file, without byte order mark and with LF line ends. UserError: unreadable, or not text."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from None
    if b"\0" in raw:
        raise UserError(f"{path} is not text: byte {raw.index(0):,} is NUL")
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: byte {error.start:,} is {raw[error.start]:#04x} "
                        "(if it is Latin-1: iconv -f latin1 -t utf-8 OLD > NEW)") from None


def pieces(text, size=1 << 20):
    """
    text in pieces of about size characters, so that a huge document needs little memory. A cut is only made before a
    single space between two words, where every tokenizer begins a token: the pieces' ids are the whole text's ids.
    """
    start = 0
    while start < len(text):
        cut = WORD_START.search(text, start + size)
        end = cut.start() if cut else len(text)
        yield text[start:end]
        start = end


def write_corpus(folder, train_docs, val_docs, tokenizer, *, source, total_bytes=None):
    """
    Encode documents, iterables of (name, text) that are read once and one document at a time, into folder; an earlier
    corpus there is replaced. Prints counts and document lengths and returns them as meta.json's dict.

    source       a dict for meta.json: where the documents come from
    total_bytes  about how many bytes of text there are, for the progress bar's ETA
    UserError    nothing to write, disk full; the folder is then as it was
    """
    folder = Path(folder)
    dtype = np.dtype("uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32")
    meta = {"vocab_size": tokenizer.vocab_size, "dtype": dtype.name, "tokenizer": tokenizer.to_meta(), "source": source}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        with (tempfile.TemporaryDirectory(prefix=ASIDE, dir=folder) as aside,
              tqdm(total=total_bytes, unit="B", unit_scale=True, desc=folder.name, disable=None) as bar):
            for split, docs in ("train", train_docs), ("val", val_docs):
                with _synced(Path(aside, f"{split}.bin")) as file:
                    lengths, checksum = _encode(docs, tokenizer, dtype, file, bar)
                if not lengths:
                    raise UserError(f"{folder}: there is no text for {split}.bin; more text is needed, "
                                    "or another share of it for validation")
                meta |= {f"{split}_tokens": sum(lengths), f"{split}_documents": len(lengths),
                         f"{split}_sha256": checksum}
                if split == "train":
                    meta["document_lengths"] = _statistics(lengths)
            for name, content in ("meta.json", meta), ("moving.json", {"unfinished": True}):
                with _synced(Path(aside, name)) as file:
                    file.write(json.dumps(content, indent=1).encode())
            os.replace(Path(aside, "moving.json"), folder / "meta.json")  # no corpus from here ...
            for name in "train.bin", "val.bin", "meta.json":
                os.replace(Path(aside, name), folder / name)  # ... to the last of these
    except OSError as error:
        raise UserError(f"can't write the corpus {folder}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()  # only an empty folder goes: nothing came of it
    _report(folder, meta)
    return meta


def _encode(docs, tokenizer, dtype, file, bar):
    """Write the ids of docs to file: ([tokens of each document, with its end-of-text], sha256 of what was written)."""
    lengths, checksum, total = [], hashlib.sha256(), 0

    def write(ids):
        nonlocal total
        if ids.size and not 0 <= ids.min() <= ids.max() < tokenizer.n_vocab:  # a cast to dtype would wrap in silence
            raise ValueError(f"ids from {ids.min()} to {ids.max()}, but n_vocab is {tokenizer.n_vocab}")
        data = ids.astype(dtype).tobytes()
        checksum.update(data)
        file.write(data)
        total += ids.size

    for name, text in docs:
        if not text:
            continue
        start = total
        for piece in pieces(text):
            write(tokenizer.encode(piece))
            bar.update(len(piece.encode()))
            bar.set_postfix_str(f"{total:,} tokens, {name}", refresh=False)
        if tokenizer.eot is not None:
            write(np.array([tokenizer.eot]))
        lengths.append(total - start)
    return lengths, checksum.hexdigest()


@contextlib.contextmanager
def _synced(path):
    """path opened for writing; on the disk, not only in a cache, when the block ends."""
    with open(path, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _remove_leftovers(folder):
    """Of preparations that were killed: silent for an hour, where a live one writes every few seconds."""
    for aside in folder.glob(ASIDE + "*"):
        with contextlib.suppress(FileNotFoundError):  # it was alive, and has just finished
            if time.time() - max(path.stat().st_mtime for path in [aside, *aside.iterdir()]) > 3600:
                shutil.rmtree(aside)


def _statistics(lengths):
    lengths = np.array(lengths)
    share = {name: round(float(lengths[lengths >= bound].sum() / lengths.sum()), 4) for name, bound in LONG.items()}
    return {"min": int(lengths.min()), "median": int(np.median(lengths)), "mean": int(lengths.mean()),
            "max": int(lengths.max()), "share_of_tokens_in_documents_of_at_least": share}


def _report(folder, meta):
    for split in "train", "val":
        print(f"{folder / split}.bin: {meta[f'{split}_tokens']:,} tokens in {meta[f'{split}_documents']:,} documents, "
              f"sha256 {meta[f'{split}_sha256'][:16]}")
    lengths = meta["document_lengths"]
    share = lengths["share_of_tokens_in_documents_of_at_least"]
    print(f"training documents in tokens: shortest {lengths['min']:,}, median {lengths['median']:,}, "
          f"mean {lengths['mean']:,}, longest {lengths['max']:,}")
    print("share of the tokens in documents of at least "
          + ", ".join(f"{name}: {part:.0%}" for name, part in share.items()))
    if (shorter := min(meta["train_tokens"], meta["val_tokens"])) <= LONG["2k"]:
        print(f"note: one split has only {shorter:,} tokens, and block_size must be below that")
