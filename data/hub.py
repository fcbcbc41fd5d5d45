"""Data sets on the Hugging Face hub as documents: the shared part of data/{pg19,arxiv,code,fineweb_edu}/prepare.py.

The `datasets` library streams the rows: nothing but the corpus comes onto the disk, and no more is downloaded than
max_tokens needs. Files are given by name and read by the library's own readers: no code of a data set is ever run.
--hub=FOLDER reads a copy of the same files instead. A preparation that was stopped goes on with the next row; of the
file which that is in, what comes before it is read once more.
"""

import contextlib
import glob
import io
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

from configurator import UserError, key
from data.corpus import Document, Json, Source, write_corpus
from data.lengths import Meta, next_step
from data.reading import pieces
from data.rows import bytes_of_text, row_text, why_not_text
from data.tokenizer import TOKENIZER_HELP, load_tokenizer, tokenizer_file

if TYPE_CHECKING:
    import pyarrow
    from _typeshed import WriteableBuffer
    from datasets import IterableDataset

# A validation split is cut after max_tokens / VAL_SHARE tokens or so, so that it is never most of a corpus.
VAL_SHARE = 20
TOKEN_CHARACTERS, TOKEN_CHARACTERS_AT_MOST = 4, 8  # of one of tiktoken's tokens, roughly, on the average of a document
# Packages whose errors may pass.
NETWORK = {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "aiohttp"}
ROWS = 100  # of a parquet file that are in memory at a time: books are long

Row = dict[str, Any]  # the value in each column


def name_key(default: str) -> Any:
    """The key `hub` of a script; its default is the data set's name."""
    return key(default, "data set on the Hugging Face hub, or a folder with a copy of its files")


@dataclass
class Config:
    """What the four scripts have in common; each has its own `hub`."""

    hub: str = name_key("")
    tokenizer: str = key("gpt2", TOKENIZER_HELP)
    max_tokens: int = key(1_000_000_000, "no document is begun after so many tokens; 0: all", low=0)
    min_doc_tokens: int = key(0, "shorter documents are left out", low=0)
    num_proc: int = key(0, "threads that encode; 0: one for each CPU", low=0)


def share_key() -> Any:
    """The key `val_fraction`, where a data set has no validation split of its own."""
    return key(0.005, "share of the documents that is for validation", above=0, high=0.5)


def prepare(config: Config, source: "Hub", folder: Path) -> Meta:
    """Write the corpus of source's documents to folder, and return its meta. Errors: write_corpus's, Hub's."""
    tokenizer = load_tokenizer(config.tokenizer)
    meta = write_corpus(
        folder,
        source,
        tokenizer,
        max_tokens=config.max_tokens,
        min_doc_tokens=config.min_doc_tokens,
        val_every=round(1 / getattr(config, "val_fraction", 1)),
        workers=config.num_proc,
    )
    if source.left_out:
        print(f"left out, as they are not text (NUL or broken characters): {source.left_out:,} rows")
    # long_ctx is of the size for bytes
    next_step(meta, folder.name, "long_ctx" if config.tokenizer == "byte" else "long_ctx_124m")
    return meta


class Hub(Source):
    """The rows of a data set as documents.

    config      a Config; of it are used hub and max_tokens
    parts       (split, pattern of the files' names) in the order in which they are read; *.parquet or *.jsonl.zst
    columns     those that are needed, the text's first
    name        the column of the documents' names, if there is one
    keep        whether a row is wanted at all; None: all are
    options     further entries for meta.json: what else the documents depend on

    Rows without text are skipped; those with a NUL or half a surrogate pair too, and left_out counts them.
    UserError: a package is missing, no such tokenizer, data set or file, no access to it, a damaged file, no such
    column.
    And: no network, or what came over it is damaged; then the same command goes on.
    """

    def __init__(
        self,
        config: Config,
        parts: Sequence[tuple[str | None, str]],
        columns: Sequence[str],
        name: str | None = None,
        keep: Callable[[Row], bool] | None = None,
        **options: Json,
    ):
        tokenizer_file(config.tokenizer)  # a wrong name is said before anything is fetched
        self.hub, self.parts, self.columns, self.name, self.keep = config.hub, parts, columns, name, keep
        token, most = (1, 1) if config.tokenizer == "byte" else (TOKEN_CHARACTERS, TOKEN_CHARACTERS_AT_MOST)
        self.val_chars, self.min_chars = config.max_tokens * token / VAL_SHARE or math.inf, config.min_doc_tokens * most
        self.chars, self.left_out, self.part = 0, 0, 0
        self.stream: IterableDataset | None = None
        self.files: list[list[str]] = []
        _import(parts)
        folder = Path(os.path.expanduser(config.hub))
        self.local = os.path.isdir(folder)
        with self._explained():
            if self.local:
                self.root, revision = glob.escape(str(folder.absolute())), None
            else:
                from huggingface_hub import HfApi

                revision = HfApi().dataset_info(config.hub).sha
                self.root = f"hf://datasets/{config.hub}@{revision}"
            self.files = [self._files(pattern) for _, pattern in parts]
        super().__init__(
            {"hub": config.hub, "revision": revision, "files": [pattern for _, pattern in parts], **options}
        )
        if self.local and keep is None and not config.min_doc_tokens:  # else nobody knows how much of it is wanted
            size = sum(bytes_of_text(Path(path), columns[0]) for paths in self.files for path in paths)
            self.total_bytes = min(size, config.max_tokens * token) if config.max_tokens else size
        if self.local:
            self.fingerprint = json.dumps(
                [(path, os.path.getsize(path), os.stat(path).st_mtime_ns) for paths in self.files for path in paths]
            )

    def _files(self, pattern: str) -> list[str]:
        """Paths of the files of a part, in the order in which they are read."""
        if self.local:
            paths = sorted(glob.glob(f"{self.root}/{pattern}"))
        else:
            from huggingface_hub import HfFileSystem

            paths = HfFileSystem().glob(f"{self.root}/{pattern}")
        if not paths:
            raise UserError(f"{self.hub} has no files {pattern}: {self._check_name()}")
        return paths

    def documents(self, state: Json = None) -> Iterator[Document]:
        for split, row in self.rows(state):
            yield Document(split, str(row[self.name]) if self.name else self.hub, pieces(row[self.columns[0]]))

    def state(self) -> Json:
        assert self.stream is not None  # from the first row on
        return [self.part, self.stream.state_dict(), self.chars, self.left_out]

    def rows(self, state: Json = None) -> Iterator[tuple[str | None, Row]]:
        """(split, row) of each row that has a text and is wanted; after the one at which `state` was asked for."""
        first, stream, self.chars, self.left_out = state or (0, None, 0, 0)
        for self.part in range(first, len(self.parts)):
            split, pattern = self.parts[self.part]
            with self._explained():
                self.stream = None  # for _file
                self.stream = self._open(pattern)
                if stream:
                    self.stream.load_state_dict(stream)
                for table in self.stream:
                    if split == "val" and self.chars >= self.val_chars:
                        break
                    row = self._row(table)
                    if row and (self.keep is None or self.keep(row)):
                        length = len(row[self.columns[0]])
                        self.chars += length if length >= self.min_chars else 0  # what may be too short may not be kept
                        yield split, row
            stream, self.chars = None, 0

    def _open(self, pattern: str) -> "IterableDataset":
        """Tables of one row each. As tables, since a column with one bad string can't be a list."""
        from datasets import load_dataset

        where = {"data_files": f"{self.root}/{pattern}", "split": "train", "streaming": True}
        if pattern.endswith(".parquet"):
            from pyarrow.dataset import ParquetFragmentScanOptions

            little = ParquetFragmentScanOptions(pre_buffer=False, use_buffered_stream=True, buffer_size=1 << 20)
            stream = load_dataset(
                "parquet", columns=list(self.columns), batch_size=ROWS, fragment_scan_options=little, **where
            )
            self._check_columns(stream.column_names)
        else:  # as lines: the JSON reader gives up at one half of a surrogate pair
            stream = load_dataset("text", **where)
        return stream.with_format("arrow")

    def _row(self, table: "pyarrow.Table") -> Row | None:
        """{column: value} of a table of one row, its text as read_text would have it; None if it has no good text."""
        try:
            row = {name: table[name][0].as_py() for name in table.column_names}
            if self.parts[self.part][1].endswith(".jsonl.zst"):
                if not row["text"].strip():
                    return None
                row = json.loads(row["text"])
                if not isinstance(row, dict):
                    raise ValueError(f"a line is no JSON object, but {str(row)[:50]!r}")
                self._check_columns(row)
            text = row[self.columns[0]]
        except UnicodeError:  # in parquet, whatever was written without a check
            text = "\0"
        if text is None or text == "":
            return None
        problem = why_not_text(text)
        if not isinstance(text, str):
            raise UserError(f"{self._file()}: a row {problem} in the column {self.columns[0]}")
        if problem:
            self.left_out += 1
            return None
        return row | {self.columns[0]: row_text(text)}

    def _check_columns(self, names: Iterable[str]) -> None:
        if missing := set(self.columns) - set(names):
            raise UserError(f"{self._file()} has no column {', '.join(sorted(missing))}: {self._check_name()}")

    def _check_name(self) -> str:
        return (
            "is the copy whole, with the folders as they are on the hub?" if self.local else "has the data set changed?"
        )

    def _file(self) -> str:
        """The path of the file that is being read."""
        state = self.stream.state_dict() if self.stream else {}
        while "examples_iterable" in state:
            state = state["examples_iterable"]
        paths = self.files[self.part] if self.files else [self.hub]
        return paths[min(state.get("shard_idx", 0), len(paths) - 1)]

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Errors of the libraries in here become UserErrors."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            self._explain(error)

    def _explain(self, error: Exception) -> NoReturn:
        from huggingface_hub import errors

        what = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
        status = getattr(getattr(error, "response", None), "status_code", 0)
        package = type(error).__module__.partition(".")[0]
        if isinstance(error, errors.GatedRepoError):
            raise UserError(
                f"{self.hub} is only for those who accepted its terms: log in to the hub, accept them on the data "
                "set's page, then `hf auth login`, then the same command again"
            ) from error
        if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError | errors.RevisionNotFoundError):
            raise UserError(
                f"--hub={self.hub}: no such folder, and no such data set on the hub, or it is private "
                "(then: `hf auth login`)"
            ) from error
        answer = isinstance(error, errors.HfHubHTTPError | errors.EntryNotFoundError | FileNotFoundError)
        if (
            isinstance(error, ConnectionError | TimeoutError | errors.LocalEntryNotFoundError)
            or package in NETWORK
            or status == 429
            or status >= 500
            or isinstance(error, OSError)
            and not (self.local or answer)
        ):
            raise UserError(
                f"{self.hub} can't be read from the hub ({what}): with a network, the same command goes on; "
                "without one, give a copy by --hub=FOLDER"
            ) from error
        if isinstance(error, errors.EntryNotFoundError | FileNotFoundError):
            raise UserError(f"{self.hub}: a file is missing ({what}): {self._check_name()}") from error
        if isinstance(error, errors.HfHubHTTPError):
            raise UserError(f"the hub refuses to give {self.hub} ({what}): `hf auth login`?") from error
        if package in ("pyarrow", "zstandard") or isinstance(error, ValueError | EOFError | OSError):
            advice = "fetch it again" if self.local else "the same command tries again"
            raise UserError(f"{self._file()} is damaged, or not what it should be ({what}): {advice}") from error
        raise error


def _import(parts: Sequence[tuple[str | None, str]]) -> None:
    """The packages are there, and quiet: a bar of theirs would be drawn over ours. UserError: one isn't."""
    try:
        import datasets
        import huggingface_hub.utils

        if any(pattern.endswith(".zst") for _, pattern in parts):
            import zstandard  # noqa: F401
    except ImportError as error:
        raise UserError(f"the package {error.name} is missing: pip install -r requirements-data.txt") from None
    from fsspec.compression import register_compression

    datasets.disable_progress_bars()
    huggingface_hub.utils.disable_progress_bars()
    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # we report errors ourselves
    # But that a lost connection is tried again, for minutes, is said.
    logging.getLogger("datasets.utils.file_utils").setLevel(logging.WARNING)
    huggingface_hub.utils.logging.set_verbosity(logging.ERROR)
    register_compression("zstd", lambda file, mode: io.BufferedReader(_Zstd(file), 1 << 20), "zst", force=True)


class _Zstd(io.RawIOBase):
    """What is in a .zst file. The reader that fsspec has by default takes the end of the first of several frames for
    the end of the file, and a file that is cut off for a whole one, without a word. EOFError: cut off.
    """

    def __init__(self, file: IO[bytes]):
        self.file, self.input, self.output = file, b"", memoryview(b"")
        self.frame: Any = None  # zstandard's decompressor of a frame that has begun

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        import zstandard

        while not self.output:
            data = self.input or self.file.read(1 << 20)
            if not data:
                if self.frame:
                    raise EOFError("it is cut off")
                return 0
            self.frame = self.frame or zstandard.ZstdDecompressor().decompressobj()
            self.output, self.input = memoryview(self.frame.decompress(data)), b""
            if self.frame.eof:
                self.frame, self.input = None, self.frame.unused_data
        room = memoryview(buffer)
        size = min(len(room), len(self.output))
        room[:size], self.output = self.output[:size], self.output[size:]
        return size

    def close(self) -> None:
        self.file.close()
        super().close()
