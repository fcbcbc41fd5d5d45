"""Files of rows: .jsonl, .parquet, and .json that is an array of objects or has an object a line. A row has its text in
one of its columns; the column a.text is the entry text of what is in a.
"""

import codecs
import contextlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configurator import UserError
from data.reading import BLOCK, compressed, import_pyarrow, kind, text_blocks, utf8_blocks

if TYPE_CHECKING:
    from pyarrow import Field
    from pyarrow.parquet import ParquetFile

Row = tuple[int, Any, str | None]  # its number; the value in the column, or None; what is wrong with the row, or None

LINES = ".jsonl", ".ndjson"
NO_COLUMN = "has no column"
COMPRESSION = 4  # bytes of text from one of a compressed file, roughly
FIRST_LINE = 1 << 26  # bytes within which a .json file's first line must end, for its lines to be rows
LONGEST_ROW = 1 << 28  # bytes, or characters: what goes on for longer lacks a line end or a quote
NEAR_END = 16  # characters: an error of JSON so near to the end of what was read may be no error but an end


class NoColumn(UserError):
    """A file has no such column: no bad file, but a mistake."""


def has_rows(path: Path) -> bool:
    """Whether a file's documents are its rows; else it is one text. UserError: can't be read."""
    if kind(path) != ".json":
        return kind(path) in (*LINES, ".parquet")
    return _is_array(path) or _is_lines(path)


def rows_of(path: Path, column: str) -> Iterator[Row]:
    """Each row of a file of rows. UserError: truncated, or not such a file. NoColumn: no such column in .parquet."""
    if kind(path) == ".parquet":
        yield from _parquet_rows(path, column)
    elif _is_array(path):
        for number, row in _Array(path).rows():
            yield number, *_value(row, column)
    else:
        yield from _line_rows(path, column)


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
    """How many bytes of text are in a file of rows, about. UserError: a .parquet file is damaged."""
    if kind(path) == ".parquet":
        with open_parquet(path) as file:
            places = [place for place in range(len(file.schema)) if file.schema.column(place).path == column]
            groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
            return sum(group.column(place).total_uncompressed_size for group in groups for place in places)
    return path.stat().st_size * (COMPRESSION if compressed(path) else 1)


def _value(row: Any, column: str) -> tuple[Any, str | None]:
    """(what is in the column of a row of JSON, None), or (None, what is wrong)."""
    if not isinstance(row, dict):
        return None, f"{NO_COLUMN} {column!r} but {type(row).__name__}: choose one by --column=NAME"
    value = row
    for name in [column] if column in row else column.split("."):
        if isinstance(value, dict) and name in value:
            value = value[name]
        elif value is not None:  # {"a": null} has no text in a.text, but nothing is wrong with it
            value = {}
    if isinstance(value, dict):
        there = ", ".join(map(repr, _names(row)))[:200]
        return None, f"{NO_COLUMN} {column!r} but {there}: choose one by --column=NAME"
    return value, None


def _names(row: dict[str, Any], before: str = "") -> Iterator[str]:
    """The columns of a row of JSON."""
    for name, value in row.items():
        if isinstance(value, dict) and before.count(".") < 3:
            yield from _names(value, f"{before}{name}.")
        else:
            yield before + name


# -- JSON, a row a line ------------------------------------------------------------------------


def _line_rows(path: Path, column: str) -> Iterator[Row]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except (ValueError, RecursionError) as error:
            yield number, None, f"is no JSON: {str(error)[:100]}"
        else:
            yield number, *_value(row, column)


def _lines(path: Path) -> Iterator[bytes]:
    parts: list[bytes] = []  # of a line that goes on; joined once, or a long one would take its length squared
    size, number = 0, 1
    for block in utf8_blocks(path):
        *lines, rest = block.split(b"\n")
        if lines:
            yield b"".join([*parts, lines[0]])
            yield from lines[1:]
            parts, size, number = [], 0, number + len(lines)
        parts.append(rest)
        size += len(rest)
        if size > LONGEST_ROW:
            raise UserError(f"{path}: row {number:,} is longer than {LONGEST_ROW:,} bytes: is a line a row in it?")
    yield b"".join(parts)


def _is_lines(path: Path) -> bool:
    """Whether a .json file has a JSON object a line, two at least. One alone is a text, such as a configuration."""
    head, first, behind = b"", b"", b""
    for block in utf8_blocks(path):
        head = (head + block).removeprefix(codecs.BOM_UTF8).lstrip()
        first, _, behind = head.partition(b"\n")
        if behind.strip() or not head.startswith(b"{") or len(head) > FIRST_LINE:
            break
    try:
        return behind.lstrip().startswith(b"{") and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


# -- JSON, an array ----------------------------------------------------------------------------


def _is_array(path: Path) -> bool:
    """Whether a file is a JSON array of objects, or of nothing."""
    head = b""
    for block in utf8_blocks(path):
        head = (head + block).removeprefix(codecs.BOM_UTF8).lstrip()
        if found := re.match(rb"(\S)\s*(\S)", head):
            return found[1] == b"[" and found[2] in b"{]"
    return False


class _Array:
    """A JSON array that is read as far as it is needed: no more of it is in memory than about twice an element."""

    def __init__(self, path: Path):
        self.path, self.blocks = path, text_blocks(path)
        self.text, self.at = "", 0  # what was read, and how far it is decoded
        self.decode = json.JSONDecoder().raw_decode

    def rows(self) -> Iterator[tuple[int, Any]]:
        """(number, value) of each element. UserError: one is no JSON; what comes behind that can't be told."""
        number, sign = 0, self._sign()
        self.at += 1
        if self._sign() == "]":
            sign = "]"
        while sign != "]":
            number += 1
            yield number, self._value(number)
            sign = self._sign()
            if not sign or sign not in ",]":
                raise UserError(f"{self.path}: " + (f"{sign!r} is behind row {number:,}" if sign else "it is cut off"))
            self.at += sign == ","
        self.at += 1
        if sign := self._sign():
            raise UserError(f"{self.path}: {sign!r} is behind the array's end")

    def _more(self) -> bool:
        """Read on, as much as waits already, so that a long element isn't begun too often. False: that was all."""
        parts, wanted = [], len(self.text) - self.at
        while wanted >= 0 and (block := next(self.blocks, None)) is not None:
            parts.append(block)
            wanted -= len(block)
        if parts:
            self.text, self.at = "".join([self.text[self.at :], *parts]), 0
        return bool(parts)

    def _sign(self) -> str:
        """The next character that isn't blank; empty: there is none."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\n\r":
                self.at += 1
            if self.at < len(self.text) or not self._more():
                return self.text[self.at : self.at + 1]

    def _value(self, number: int) -> Any:
        while True:
            self._sign()
            try:
                value, end = self.decode(self.text, self.at)
                if end == len(self.text) and self._more():  # a number may go on
                    continue
            except (ValueError, RecursionError) as error:  # ValueError itself: a number of too many digits
                what, at = getattr(error, "msg", str(error)), getattr(error, "pos", 0)
                cut_off = at >= len(self.text) - NEAR_END or what.startswith("Unterminated string")
                if not (cut_off and len(self.text) - self.at <= LONGEST_ROW and self._more()):
                    raise UserError(f"{self.path}: row {number:,} is no JSON: {what} (is it whole?)") from None
            else:
                self.at = end
                return value


# -- parquet -----------------------------------------------------------------------------------


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


def _parquet_rows(path: Path, column: str) -> Iterator[Row]:
    if compressed(path):
        raise UserError(f"{path}: .parquet files are compressed by themselves; unpack it first (unzstd, gunzip)")
    with open_parquet(path) as file:
        names = list(_leaves(file.schema_arrow))
        if column not in names:
            raise NoColumn(
                f"{path} {NO_COLUMN} {column!r} but {', '.join(map(repr, names))}: choose one by --column=NAME"
            )
        inside = [] if column in file.schema_arrow.names else column.split(".")[1:]
        number = 0
        for batch in file.iter_batches(batch_size=64, columns=[column]):
            for value in batch.column(0):
                number += 1
                try:
                    text, problem = value.as_py(), None
                except UnicodeDecodeError as error:
                    text, problem = None, f"is not UTF-8: {error.reason}"
                for name in inside:
                    text = text and text[name]
                yield number, text, problem


def _leaves(fields: "Iterable[Field]") -> Iterator[str]:
    """The columns of a parquet file."""
    for field in fields:
        inside = field.flatten()  # itself, if it isn't a struct
        if len(inside) == 1 and inside[0].name == field.name:
            yield field.name
        else:
            yield from _leaves(inside)
