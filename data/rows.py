"""A corpus of your own text: data/NAME/ from one file, or from all files of a folder but hidden ones.

    python data/text/prepare.py --input=FILE_OR_FOLDER --out=NAME
    python data/text/prepare.py --input=books/ --out=books --tokenizer=gpt2 --strip_gutenberg=True
    python data/text/prepare.py --input=papers/ --out=papers --column=article

    .jsonl, .parquet    a document a row: its text is in the column --column. One row in 1 / val_fraction is for
                        validation
    any other           text in UTF-8 (.txt, .md, .tex, source code, ...), a document a file; its end is for validation
    .zst                one of these, compressed: .txt.zst, .jsonl.zst

An earlier data/NAME is replaced when the new one is whole. .parquet and .zst need requirements-data.txt.
"""

import hashlib
import itertools
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import UserError, key, load_config, run_main
from data.corpus import (
    Document,
    Meta,
    Source,
    bytes_of_text,
    compressed,
    files_under,
    open_parquet,
    pieces,
    raw_blocks,
    row_text,
    text_blocks,
    why_not_text,
    write_corpus,
)
from data.tokenizer import TOKENIZERS, tokenizer_from_meta

ROWS = ".jsonl", ".ndjson", ".parquet"
NO_COLUMN = "has no column"
GUTENBERG_START = re.compile(r"\*\*\* ?START OF TH(?:E|IS) PROJECT GUTENBERG EBOOK.{0,300}?\*\*\*[^\n]*\n", re.DOTALL)
GUTENBERG_END = re.compile(
    r"^(?:End of (?:The |the )?Project Gutenberg|\*\*\* ?END OF TH(?:E|IS) PROJECT GUTENBERG)", re.MULTILINE
)
GUTENBERG_LONGEST = 400  # characters that such a line has at most


@dataclass
class Config:
    input: str = key("", "file, or folder of files")
    out: str = key("", "name of the data set")
    tokenizer: str = key(
        "byte", "byte: no vocabulary to fetch; the others are tiktoken's: 4 times fewer tokens", choices=TOKENIZERS
    )
    val_fraction: float = key(0.05, "share of each document, or of the rows, that is for validation", above=0, below=1)
    column: str = key("text", "of .jsonl and .parquet files: where the text is")
    strip_gutenberg: bool = key(False, "leave out what Project Gutenberg puts before and behind a book")
    skip_bad: bool = key(False, "leave out the files and rows that are not text, instead of stopping")
    num_proc: int = key(0, "threads that encode; 0: one for each CPU", low=0)


def prepare(
    input: str,
    out: str,
    tokenizer: str = "byte",
    val_fraction: float = 0.05,
    column: str = "text",
    strip_gutenberg: bool = False,
    skip_bad: bool = False,
    num_proc: int = 0,
    data: Path = Path(__file__).parents[1],
) -> Meta:
    """Write data/out/ from the file or folder input. UserError: no such input, a file that isn't text, a bad name."""
    folder = data / out
    if not input:
        raise UserError("--input is missing: give a file, or a folder of files")
    if not re.fullmatch(r"[^\W_][\w.-]{0,99}", out) or folder.is_file():
        raise UserError(f"--out={out}: give a name of letters, digits, '_', '-' and '.', for a folder under {data}")
    if (folder / "prepare.py").exists():
        raise UserError(f"--out={out}: this data set has a prepare.py of its own; give another name")
    encoder = tokenizer_from_meta({"name": tokenizer})
    if folder.resolve() in [Path(input).resolve(), *Path(input).resolve().parents]:
        raise UserError(
            f"--input={input} is in {folder}, which is where the corpus goes: keep texts elsewhere, or give another "
            "--out"
        )
    source = Files(input, val_fraction, column, strip_gutenberg, skip_bad, without=folder)
    meta = write_corpus(folder, source, encoder, val_every=max(2, round(1 / val_fraction)), workers=num_proc)
    if source.bad_rows:
        print(f"left out, as they are not text: {source.bad_rows:,} rows")
    for mistake in source.cut_off:
        print(f"used as far as it can be read: {mistake}")
    return meta


class Files(Source):
    """The documents of a file, or of a folder's files but those in the folder `without`. Texts are looked through
    beforehand, so that a stray picture stops an hour's work before it begins.
    """

    def __init__(
        self, input: str, val_fraction: float, column: str, strip_gutenberg: bool, skip_bad: bool, without: Path | None
    ):
        where = Path(os.path.expanduser(input))
        if not (os.path.isdir(where) or os.path.isfile(where)):
            raise UserError(f"--input={input}: no such file or folder; give a file, or a folder of files")
        self.paths = files_under(where, without=without) if os.path.isdir(where) else [where]
        if not self.paths:
            raise UserError(f"--input={input}: this folder has no files (hidden ones don't count)")
        self.val_fraction, self.column = val_fraction, column
        self.strip_gutenberg, self.skip_bad = strip_gutenberg, skip_bad
        self.count, self.bad_rows = 0, 0
        self.cut_off: list[str] = []
        stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in self.paths]
        self.fingerprint = hashlib.sha256(json.dumps([stats, column, strip_gutenberg, skip_bad]).encode()).hexdigest()
        self.characters: dict[Path, int] = {}  # how many there are in each text file
        size, mistakes, columns = 0, [], []
        for path in self.paths:
            try:
                size += self._look_at(path)
            except NoColumn as mistake:
                columns.append(str(mistake))
            except UserError as mistake:
                mistakes.append((path, str(mistake)))
        if columns:
            raise UserError(
                f"{len(columns)} of {len(self.paths)} files have no such column; choose another, or move "
                f"them:{_listed(columns)}"
            )
        if mistakes:
            what = f"{len(mistakes)} of {len(self.paths)} files"
            messages = _listed([message for _, message in mistakes])
            if not skip_bad:
                raise UserError(
                    f"{what} can't be used; convert or move them, or leave them out by --skip_bad=True:{messages}"
                )
            print(f"{what} are left out:{messages}")
        bad = {path for path, _ in mistakes}
        self.paths = [path for path in self.paths if path not in bad]
        if not self.paths:
            raise UserError(f"--input={input}: there is no text; the first file that can't be used: {mistakes[0][1]}")
        self.total_bytes = size
        super().__init__(
            {"input": input, "files": len(self.paths), "val_fraction": val_fraction}
            | ({"left_out": len(bad)} if bad else {})
            | ({"strip_gutenberg": True} if strip_gutenberg else {})
        )

    def _look_at(self, path: Path) -> int:
        """About how many bytes of text a file has; counts a text's characters. UserError if it can't be used."""
        if kind(path) in ROWS:
            for number, text, problem in itertools.islice(rows_of(path, self.column), 1):
                if problem and problem.startswith(NO_COLUMN):
                    raise NoColumn(f"{path}: the first row {problem}")
                self._row(path, number, text, problem)
            self.bad_rows = 0
            return bytes_of_text(path, self.column)
        self.characters[path], size = 0, 0
        for block in self._blocks(path):
            self.characters[path] += len(block)
            size += len(block) if block.isascii() else len(block.encode())
        return size

    def documents(self, state: int | None = None) -> Iterator[Document]:
        self.count, self.bad_rows, self.cut_off = 0, 0, []
        for path in self.paths:
            for document in self._rows(path) if kind(path) in ROWS else self._halves(path):
                self.count += 1
                if self.count > (state or 0):  # what was passed over is read again, but not encoded
                    yield document

    def state(self) -> int:
        return self.count

    def _halves(self, path: Path) -> Iterator[Document]:
        total = self.characters[path]
        cut = total - int(total * self.val_fraction)
        yield Document("train", path.name, pieces(_span(self._blocks(path), 0, cut)))
        yield Document("val", path.name, pieces(_span(self._blocks(path), cut, total)))

    def _blocks(self, path: Path) -> Iterator[str]:
        blocks = text_blocks(path)
        return _without_gutenberg(blocks) if self.strip_gutenberg else blocks

    def _rows(self, path: Path) -> Iterator[Document]:
        try:
            for row in rows_of(path, self.column):
                if document := self._row(path, *row):
                    yield document
        except UserError as mistake:
            if not self.skip_bad:
                raise
            self.cut_off.append(str(mistake))

    def _row(self, path: Path, number: int, text: Any, problem: str | None) -> Document | None:
        """The Document of a row, if there is text in it. UserError: it has a problem, and is not to be skipped."""
        if problem is None and text is not None:
            problem = why_not_text(text)
        if problem is None:
            return Document(None, f"{path.name}, row {number:,}", pieces(row_text(text))) if text else None
        if not self.skip_bad:
            raise UserError(
                f"{path}: row {number:,} {problem} (rows that are not text are left out by --skip_bad=True)"
            )
        self.bad_rows += 1
        return None


class NoColumn(UserError):
    """A file has no such column: no bad file, but a mistake."""


def _listed(messages: list[str]) -> str:
    """The first ten of them, one a line."""
    return "".join(f"\n  {message}" for message in [*messages[:10], *["..."] * (len(messages) > 10)])


def kind(path: Path) -> str:
    """The suffix that tells what is in a file: a.jsonl.zst is .jsonl."""
    return (path.with_suffix("").suffix if compressed(path) else path.suffix).lower()


def _without_gutenberg(blocks: Iterator[str]) -> Iterator[str]:
    """The text between the lines by which Project Gutenberg frames a book; all of it where the first is missing."""
    rest, begun = next(blocks, ""), False
    if start := GUTENBERG_START.search(rest):
        rest, begun = rest[start.end() :], True
    for block in itertools.chain(blocks, [""]):
        if begun and (end := GUTENBERG_END.search(rest + block)):
            yield (rest + block)[: end.start()]
            return
        rest += block
        yield rest[:-GUTENBERG_LONGEST]
        rest = rest[-GUTENBERG_LONGEST:]
    yield rest


def _span(blocks: Iterable[str], start: int, stop: int) -> Iterator[str]:
    """The characters from start to stop of a text in blocks."""
    for block in blocks:
        yield block[max(start, 0) : max(stop, 0)]
        start, stop = start - len(block), stop - len(block)
        if stop <= 0:
            return


def rows_of(path: Path, column: str) -> Iterator[tuple[int, Any, str | None]]:
    """(number, value in column, None) of each row of a .jsonl or .parquet file, or (number, None, what is wrong with
    the row). UserError: truncated, or not such a file.
    """
    if kind(path) == ".parquet":
        yield from _parquet_rows(path, column)
        return
    for number, line in enumerate(_lines(raw_blocks(path)), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except (ValueError, RecursionError) as error:
            yield number, None, f"is no JSON: {str(error)[:100]}"
            continue
        if isinstance(row, dict) and column in row:
            yield number, row[column], None
        else:
            there = ", ".join(map(repr, row))[:200] if isinstance(row, dict) else type(row).__name__
            yield number, None, f"{NO_COLUMN} {column!r} but {there}: choose one by --column=NAME"


def _lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    parts: list[bytes] = []  # of a line that goes on; joined once, or a long one would take its length squared
    for block in blocks:
        *lines, rest = block.split(b"\n")
        if lines:
            yield b"".join([*parts, lines[0]])
            yield from lines[1:]
            parts = []
        parts.append(rest)
    yield b"".join(parts)


def _parquet_rows(path: Path, column: str) -> Iterator[tuple[int, Any, str | None]]:
    if compressed(path):
        raise UserError(f"{path}: .parquet files are compressed by themselves; unpack it first (unzstd)")
    with open_parquet(path) as file:
        if column not in file.schema_arrow.names:
            raise NoColumn(
                f"{path} {NO_COLUMN} {column!r} but {', '.join(map(repr, file.schema_arrow.names))}: choose one "
                "by --column=NAME"
            )
        number = 0
        for batch in file.iter_batches(batch_size=64, columns=[column]):
            for value in batch.column(0):
                number += 1
                try:
                    text, problem = value.as_py(), None
                except UnicodeDecodeError as error:
                    text, problem = None, f"is not UTF-8: {error.reason}"
                yield number, text, problem


def main() -> None:
    config = load_config(Config, sys.argv[1:], usage=__doc__)
    meta = prepare(
        config.input,
        config.out,
        config.tokenizer,
        config.val_fraction,
        config.column,
        config.strip_gutenberg,
        config.skip_bad,
        config.num_proc,
    )
    shortest = min(meta["train_tokens"], meta["val_tokens"])
    block_size = f" --block_size={shortest // 2}" if shortest <= 2048 else ""
    print(f"now: python train.py config/long_ctx.py --dataset={config.out} --out_dir=out-{config.out}{block_size}")


if __name__ == "__main__":
    run_main(main)
