"""A corpus of your own text: data/NAME/ from files, or from all files of folders but hidden ones.

    python data/text/prepare.py --input=FILE_OR_FOLDER --out=NAME
    python data/text/prepare.py --input=books/ --input=more/ --out=books --tokenizer=gpt2 --strip_gutenberg=True
    python data/text/prepare.py --input=books/ --out=books --tokenizer=models/smollm2      a Hugging Face folder's
    python data/text/prepare.py --input=papers/ --out=papers --column=article.body

    .jsonl, .parquet    a document a row: its text is in the column --column; article.body is the entry body of what is
                        in the column article
    .json               the same, of an array of objects, or of an object a line; another .json is a text
    any other           a text, a document a file (.txt, .md, .tex, source code, ...), in UTF-8, or in UTF-16 with a
                        byte order mark
    .gz, .zst           one of these, compressed: .txt.gz, .jsonl.zst; .parquet is compressed by itself

Of 1 / val_fraction documents and more, some are for validation, whole, so that about val_fraction of the text is; of
fewer, the end of each. An earlier data/NAME is replaced when the new one is whole. .parquet and .zst need
requirements-data.txt.
"""

import hashlib
import itertools
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import UserError, key, load_config, run_main
from data.corpus import Document, Source, write_corpus
from data.lengths import Meta, next_step
from data.reading import files_under, kind, pieces, text_blocks
from data.rows import NO_COLUMN, NoColumn, bytes_of_text, has_rows, row_text, rows_of, why_not_text
from data.tokenizer import TOKENIZER_HELP, load_tokenizer

GUTENBERG_START = re.compile(r"\*\*\* ?START OF TH(?:E|IS) PROJECT GUTENBERG EBOOK.{0,300}?\*\*\*[^\n]*\n", re.DOTALL)
GUTENBERG_END = re.compile(
    r"^(?:End of (?:The |the )?Project Gutenberg|\*\*\* ?END OF TH(?:E|IS) PROJECT GUTENBERG)", re.MULTILINE
)
GUTENBERG_LONGEST = 400  # characters that such a line has at most


@dataclass
class Config:
    input: tuple[str, ...] = key((), "file, or folder of files; may be given several times")
    out: str = key("", "name of the data set")
    tokenizer: str = key("byte", TOKENIZER_HELP)
    val_fraction: float = key(
        0.05, "share of the documents that is for validation, or of each if they are few", above=0, below=1
    )
    column: str = key("text", "of files of rows: where the text is; a.b is b in a")
    strip_gutenberg: bool = key(False, "leave out what Project Gutenberg puts before and behind a book")
    skip_bad: bool = key(False, "leave out the files and rows that are not text, instead of stopping")
    num_proc: int = key(0, "threads that encode; 0: one for each CPU", low=0)


def prepare(
    input: str | Sequence[str],
    out: str,
    tokenizer: str = "byte",
    val_fraction: float = 0.05,
    column: str = "text",
    strip_gutenberg: bool = False,
    skip_bad: bool = False,
    num_proc: int = 0,
    data: Path = Path(__file__).parents[1],
) -> Meta:
    """Write data/out/ from the file or folder input, or from several. UserError: no such input, a file that isn't
    text, a bad name.
    """
    folder = data / out
    inputs = [input] if isinstance(input, str) else list(input)
    if not inputs or "" in inputs:
        raise UserError("--input is missing: give a file, or a folder of files")
    too_long = len(os.fsencode(out)) > 255  # of a file system's names
    if not re.fullmatch(r"[^\W_][\w.-]{0,99}", out) or too_long or os.path.isfile(folder):
        raise UserError(f"--out={out}: give a name of letters, digits, '_', '-' and '.', for a folder under {data}")
    if (folder / "prepare.py").exists():
        raise UserError(f"--out={out}: this data set has a prepare.py of its own; give another name")
    encoder = load_tokenizer(tokenizer)
    for name in inputs:
        where = Path(os.path.expanduser(name)).resolve()
        if folder.resolve() in [where, *where.parents]:
            raise UserError(
                f"--input={name} is in {folder}, which is where the corpus goes: keep texts elsewhere, or give another "
                "--out"
            )
    source = Files(inputs, val_fraction, column, strip_gutenberg, skip_bad, without=folder)
    meta = write_corpus(folder, source, encoder, workers=num_proc)
    if source.bad_rows:
        print(f"left out, as they are not text: {source.bad_rows:,} rows")
    for mistake in source.cut_off:
        print(f"used as far as it can be read: {mistake}")
    return meta


class Files(Source):
    """The documents of files, and of folders' files but those in the folder `without`. Texts are looked through
    beforehand, so that a stray picture stops an hour's work before it begins.
    """

    def __init__(
        self,
        inputs: list[str],
        val_fraction: float,
        column: str,
        strip_gutenberg: bool,
        skip_bad: bool,
        without: Path | None,
    ):
        self.val_fraction, self.column = val_fraction, column
        self.strip_gutenberg, self.skip_bad = strip_gutenberg, skip_bad
        self.count, self.bad_rows = 0, 0
        self.cut_off: list[str] = []
        self.names = _names_of_files(inputs, without)
        self.rows: set[Path] = set()  # of the paths, those of files of rows
        self.characters: dict[Path, int] = {}  # how many there are in each text
        self.unframed = 0  # texts without Project Gutenberg's frame, where that is to be left out
        self.stats: list[tuple[str, int, int]] = []  # what tells that a file has changed
        self.total_bytes, left_out = self._look_at_all()
        if column != "text" and not self.rows:
            raise UserError(f"--column={column}: none of the files has rows; leave it out to take each as one text")
        self.rows_at_least = 0  # with text; exactly so many, if there are fewer than 1 / val_fraction documents
        self.whole, self.held = self._held_out()
        how = [column, strip_gutenberg, skip_bad, "whole documents are held out"]
        self.fingerprint = hashlib.sha256(json.dumps([self.stats, how]).encode()).hexdigest()
        super().__init__(
            {
                "input": inputs[0] if len(inputs) == 1 else inputs,
                "files": len(self.names),
                "val_fraction": val_fraction,
                "validation": "whole documents" if self.whole else "the end of each document",
            }
            | ({"left_out": left_out} if left_out else {})
            | ({"strip_gutenberg": True} if strip_gutenberg else {})
        )

    # What there is

    def _look_at_all(self) -> tuple[int, int]:
        """(about how many bytes of text there are, how many files can't be used). These are taken out of names."""
        size, mistakes, columns = 0, {}, []
        for path in self.names:
            try:
                size += self._look_at(path)
            except NoColumn as mistake:
                columns.append(str(mistake))
            except UserError as mistake:
                mistakes[path] = str(mistake)
        if columns:
            raise UserError(
                f"{len(columns)} of {len(self.names)} files have no such column; choose another, or move "
                f"them:{_listed(columns)}"
            )
        if mistakes:
            what, messages = f"{len(mistakes)} of {len(self.names)} files", list(mistakes.values())
            if not self.skip_bad:
                raise UserError(
                    f"{what} can't be used; convert or move them, or leave them out by --skip_bad=True:"
                    f"{_listed(messages)}"
                )
            print(f"{what} are left out:{_listed(messages)}")
            self.names = {path: name for path, name in self.names.items() if path not in mistakes}
            if not self.names:
                raise UserError(f"--input: there is no text; the first file that can't be used: {messages[0]}")
        for paths, how in (
            (self.characters, "a document a file"),
            (self.rows, f"a document a row, column {self.column}"),
        ):
            kinds = Counter(kind(path) or "without suffix" for path in self.names if path in paths)
            if kinds:
                listed = [f"{count:,} {name}" for name, count in kinds.most_common(8)] + ["..."] * (len(kinds) > 8)
                print(f"{how}: {', '.join(listed)}")
        if self.unframed:
            print(
                f"without Project Gutenberg's frame, so used whole: {self.unframed:,} of {len(self.characters):,} texts"
            )
        return size, len(mistakes)

    def _look_at(self, path: Path) -> int:
        """About how many bytes of text a file has; counts a text's characters. UserError if it can't be used."""
        try:
            stat = path.stat()
        except OSError as error:
            raise UserError(f"can't read {path}: {error.strerror}") from None
        self.stats.append((str(path), stat.st_size, stat.st_mtime_ns))
        if has_rows(path):
            for number, text, problem in itertools.islice(rows_of(path, self.column), 1):
                if problem and problem.startswith(NO_COLUMN):
                    # An array in a .json file may be anything, and is left out like other bad files.
                    raise (UserError if kind(path) == ".json" else NoColumn)(f"{path}: the first row {problem}")
                self._row(path, number, text, problem)
            self.rows.add(path)
            return bytes_of_text(path, self.column)
        characters, size = 0, 0
        for block in self._blocks(path):
            characters += len(block)
            size += len(block) if block.isascii() else len(block.encode())
        self.characters[path] = characters
        if self.strip_gutenberg and not GUTENBERG_START.search(next(text_blocks(path), "")):
            self.unframed += 1
        return size

    def _held_out(self) -> tuple[bool, set[Path]]:
        """Whether whole documents are for validation, as there are 1 / val_fraction of them; and then, which texts are.

        These are val_fraction of all text, as near as whole ones come to it. They are taken in an order that is like a
        draw, but the same everywhere: so they come from all over the input, and are as long as the others.
        """
        texts = [path for path in self.names if self.characters.get(path)]
        enough = max(2, math.ceil(1 / self.val_fraction))
        all_rows = (row for path in self.names if path in self.rows for row in self._rows(path))
        rows = self.rows_at_least = sum(1 for _ in itertools.islice(all_rows, enough))
        self.bad_rows, self.cut_off = 0, []  # they are counted when they are used
        held: set[Path] = set()
        if len(texts) + rows < enough:
            return False, held
        draw = lambda path: hashlib.sha256(os.fsencode(f"validation/{self.names[path]}")).digest()
        missing = self.val_fraction * sum(self.characters.values())
        for path in sorted(texts, key=draw):
            if self.characters[path] <= 2 * missing and (rows or len(held) < len(texts) - 1):  # never all there is
                held.add(path)
                missing -= self.characters[path]
        return True, held

    # The documents

    def documents(self, state: int | None = None) -> Iterator[Document]:
        self.count, self.bad_rows, self.cut_off = 0, 0, []
        for document in self._all():
            self.count += 1
            if self.count > (state or 0):  # what was passed over is read again, but not encoded
                yield document

    def state(self) -> int:
        return self.count

    def _all(self) -> Iterator[Document]:
        held_out = _HeldOut(self.val_fraction, 0 if self.held else self.rows_at_least)
        for path in self.names:
            if path in self.characters and self.whole:
                yield Document("val" if path in self.held else "train", str(path), pieces(self._blocks(path)))
            elif path in self.characters:
                total = self.characters[path]
                cut = total - int(total * self.val_fraction)
                yield Document("train", str(path), pieces(_span(self._blocks(path), 0, cut)))
                yield Document("val", str(path), pieces(_span(self._blocks(path), cut, total)))
            for name, text in self._rows(path) if path in self.rows else ():
                if self.whole:
                    yield Document("val" if held_out(len(text)) else "train", name, pieces(text))
                else:
                    cut = len(text) - int(len(text) * self.val_fraction)
                    yield Document("train", name, pieces(text[:cut]))
                    yield Document("val", name, pieces(text[cut:]))

    def _blocks(self, path: Path) -> Iterator[str]:
        blocks = text_blocks(path)
        return _without_gutenberg(blocks) if self.strip_gutenberg else blocks

    def _rows(self, path: Path) -> Iterator[tuple[str, str]]:
        """(name, text) of each row that has text."""
        try:
            for number, value, problem in rows_of(path, self.column):
                if text := self._row(path, number, value, problem):
                    yield f"{path}, row {number:,}", text
        except UserError as mistake:
            if not self.skip_bad:
                raise
            self.cut_off.append(str(mistake))

    def _row(self, path: Path, number: int, value: Any, problem: str | None) -> str | None:
        """A row's text, or None. UserError: it has a problem, and is not to be skipped."""
        if problem is None and value is not None:
            problem = why_not_text(value)
        if problem is None:
            text = row_text(value or "")
            return "".join(_without_gutenberg(iter([text]))) if self.strip_gutenberg else text
        if not self.skip_bad:
            raise UserError(
                f"{path}: row {number:,} {problem} (rows that are not text are left out by --skip_bad=True)"
            )
        self.bad_rows += 1
        return None


class _HeldOut:
    """Which rows are for validation, one after the other: their share of all characters so far is about `fraction`.

    A row is held out if, with one of the usual length, half a row would be missing. Its own length plays no part: the
    long ones are as often held out as the short ones. Only what would make the share more than twice as large goes to
    training. If that was so with all, the row number `at_last` is held out whatever its length; 0: none need be.
    """

    def __init__(self, fraction: float, at_last: int):
        self.fraction, self.at_last = fraction, at_last
        self.rows, self.characters, self.held = 0, 0, 0

    def __call__(self, length: int) -> bool:
        usual = self.characters / max(self.rows, 1)
        missing = self.fraction * (self.characters + usual) - self.held
        self.rows, self.characters = self.rows + 1, self.characters + length
        held = (
            self.rows > 1
            and missing >= usual / 2
            and self.held + length <= 2 * self.fraction * self.characters
            or not self.held
            and self.rows == self.at_last
        )
        self.held += length * held
        return held


def _names_of_files(inputs: list[str], without: Path | None) -> dict[Path, str]:
    """The paths of all files, and their names: with the folders in which they are below an input. UserError: no such
    input, or nothing in it.
    """
    names: dict[Path, str] = {}
    seen: set[str] = set()
    twice = 0
    for name in inputs:
        where = Path(os.path.expanduser(name))
        if not (os.path.isdir(where) or os.path.isfile(where)):
            raise UserError(f"--input={name}: no such file or folder; give a file, or a folder of files")
        paths = files_under(where, without=without) if os.path.isdir(where) else [where]
        if not paths:
            raise UserError(f"--input={name}: this folder has no files (hidden ones don't count)")
        for path in paths:
            if (real := os.path.realpath(path)) in seen:
                twice += 1
                continue
            seen.add(real)
            names[path] = path.relative_to(where).as_posix() if path != where else path.name
    if twice:
        print(f"files that are there twice, by links or by several --input, are taken once: {twice:,}")
    return names


def _listed(messages: list[str]) -> str:
    """The first ten of them, one a line."""
    return "".join(f"\n  {message}" for message in [*messages[:10], *["..."] * (len(messages) > 10)])


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
    next_step(meta, config.out, options=f" --out_dir=out-{config.out}")


if __name__ == "__main__":
    run_main(main)
