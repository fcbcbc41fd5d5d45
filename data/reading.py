"""Files to text: which files a folder has, and what is in one, decompressed and decoded, a piece at a time."""

import codecs
import contextlib
import gzip
import itertools
import os
import re
import zlib
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from configurator import UserError

# Where every tokenizer begins a token, whatever came before: at a space between words, or at any white space behind a
# letter or a digit. (Punctuation may take the line's end along.)
TOKEN_START = re.compile(r"(?<=\S)(?= \S)|(?<=[^\W_])(?=\s)")
BLOCK = 1 << 20  # bytes read at once
PIECE = 1 << 20  # characters
LONGEST = 16  # pieces: where there is nowhere to cut for so long, it is cut all the same: it may change a token or two
# Byte order marks of other encodings than UTF-8; the longer ones first, as they begin like the others.
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # what Git LFS has in place of a file that it didn't fetch


def files_under(folder: Path, skip: Collection[str] = (), without: Path | None = None) -> list[Path]:
    """Sorted paths of the regular files below folder, but for hidden ones, for folders whose name is in skip, and for
    the folder `without`. Links are followed, but into no folder twice; one that leads nowhere is a file too, so that
    whoever reads it says so.
    """

    def refuse(error: OSError) -> NoReturn:
        raise UserError(f"can't read {error.filename}: {error.strerror}")

    def is_file(path: Path) -> bool:  # to read a pipe would wait for ever
        try:
            return path.is_file() or path.is_symlink() and not path.exists()
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


def compressed(path: Path) -> bool:
    """Whether it is a .zst or .gz file."""
    return path.suffix.lower() in (".zst", ".gz")


def kind(path: Path) -> str:
    """The suffix that tells what is in a file: a.jsonl.zst is .jsonl."""
    return (path.with_suffix("").suffix if compressed(path) else path.suffix).lower()


def import_pyarrow(path: Path) -> ModuleType:
    """pyarrow, to read this file with. UserError: it isn't installed."""
    try:
        import pyarrow
    except ImportError:
        raise UserError(f"{path} needs a package more: pip install -r requirements-data.txt") from None
    return pyarrow


def _opened(path: Path) -> contextlib.AbstractContextManager[Any]:
    match path.suffix.lower():
        case ".zst":
            return import_pyarrow(path).input_stream(str(path), compression="zstd")
        case ".gz":
            return gzip.open(path)
    return open(path, "rb")


def raw_blocks(path: Path) -> Iterator[bytes]:
    """The bytes of a file, decompressed, block by block. UserError: unreadable, truncated."""
    try:
        if compressed(path) and not path.stat().st_size:
            raise UserError(f"{path} has 0 bytes, fewer than anything compressed has: fetch it again")
        with _opened(path) as file:
            while block := file.read(BLOCK):
                yield block
    except (OSError, EOFError, zlib.error) as error:
        reason = (getattr(error, "strerror", None) or str(error)).removesuffix(".")
        raise UserError(f"can't read {path}: {reason}") from None


def utf8_blocks(path: Path) -> Iterator[bytes]:
    """The same, but of a text that a byte order mark says to be in UTF-16 or UTF-32 in UTF-8, without the mark.
    UserError: not what the mark says, a pointer in place of the file.
    """
    blocks, head = raw_blocks(path), b""
    for block in blocks:
        head += block
        if len(head) >= len(LFS_POINTER):
            break
    if head.startswith(LFS_POINTER):
        raise UserError(f"{path} is not the file, but Git LFS's pointer to it: git lfs pull")
    encoding = next((name for mark, name in MARKS.items() if head.startswith(mark)), None)
    if encoding is None:
        yield from itertools.chain([head] if head else [], blocks)
        return
    decoder = codecs.getincrementaldecoder(encoding)()
    for raw in itertools.chain([head], blocks, [b""]):
        try:
            text = decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path} is not {encoding.upper()} text, as its byte order mark says: {error.reason}"
            ) from None
        if "\0" in text:
            raise UserError(f"{path} is not text: there is a NUL in its {encoding.upper()}")
        if text:
            yield text.encode()


def text_blocks(path: Path) -> Iterator[str]:
    """The text of a file in blocks, as read_text gives it in one. UserError: unreadable, or not text."""
    decoder, begun, rest = codecs.getincrementaldecoder("utf-8")(), 0, ""
    for raw in itertools.chain(utf8_blocks(path), [b""]):
        if b"\0" in raw:
            at = begun + raw.index(0)
            hint = " (if it is UTF-16: iconv -f utf-16 -t utf-8 OLD > NEW)" if at < 2 else ""
            raise UserError(f"{path} is not text: byte {at:,} is NUL{hint}")
        waiting = len(decoder.getstate()[0])
        try:
            block = decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            at = begun - waiting + error.start
            hint = "if it is Latin-1: iconv -f latin1 -t utf-8 OLD > NEW" + "; or is its end missing?" * (not raw)
            there = error.object[max(error.start - 20, 0) : error.start + 20].decode(errors="backslashreplace")
            shown = repr(there)[1:-1].replace("\\\\", "\\")  # line ends and the like are escaped, too
            raise UserError(
                f"{path} is not UTF-8 text: byte {at:,} is {error.object[error.start]:#04x}, in '{shown}' ({hint})"
            ) from None
        block = (rest + (block if begun else block.removeprefix("\ufeff"))).replace("\r\n", "\n")
        begun += len(raw)
        rest = "\r" if block.endswith("\r") and raw else ""
        yield block.removesuffix(rest)


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, or with a byte order mark in UTF-16 or UTF-32: without that mark and with LF line
    ends. UserError: unreadable, or not text.
    """
    return "".join(text_blocks(path))


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
