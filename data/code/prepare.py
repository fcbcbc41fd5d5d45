"""Code: projects from GitHub, the files of one kept together, so that a long context has something to look back to.

    python data/code/prepare.py
    python data/code/prepare.py --languages=Python,C --min_doc_tokens=16384
    python data/code/prepare.py --hub=FOLDER                                  from a copy of its files

Each project is one document: its files in the order of their paths, each after a line === path ===, which is no comment
in any language and so the same in all. The data set isn't sorted by project: rows are gathered until buffer_mb of
text is there, then come the projects in it, in the order in which they first appear. A project whose rows are in two
such lots becomes two documents. One project in 1 / val_fraction is for validation.
FOLDER has data/*.parquet, with the columns code, repo_name, path and language.
Needs: pip install -r requirements-data.txt
"""

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import UserError, key, load_config, run_main
from data.corpus import Document, Json
from data.hub import Config as HubConfig
from data.hub import Hub, Row, name_key, prepare, share_key
from data.reading import pieces

TRIED = 20_000  # files, until a language that none of them has must be a mistake


@dataclass
class Config(HubConfig):
    hub: str = name_key("codeparrot/github-code-clean")
    languages: str = key("", "only these, such as Python,C; empty: all")
    buffer_mb: int = key(256, "text that is gathered at a time to put projects together", low=1)
    val_fraction: float = share_key()


class Projects(Hub):
    """Rows, which are files, put together by project."""

    def __init__(self, config: Config):
        self.wanted = {name.strip().lower() for name in config.languages.split(",") if name.strip()}
        self.seen: Counter[str] = Counter()  # rows, by language
        super().__init__(
            config,
            [(None, "data/*.parquet")],
            ("code", "repo_name", "path", "language"),
            keep=self._is_wanted if self.wanted else None,
            languages=sorted(self.wanted),
            buffer_mb=config.buffer_mb,
        )
        self.buffer = config.buffer_mb << 20

    def documents(self, state: Json = None) -> Iterator[Document]:
        start, given = state or (None, 0)  # where the lot begins, and how many of its projects have come
        rows, more = self.rows(start), True
        while more:
            projects: dict[str, list[tuple[str, str]]] = {}  # (path, code) of each one's files
            size = 0
            for _, row in rows:
                projects.setdefault(row["repo_name"], []).append((str(row["path"]), row["code"]))
                size += len(row["code"])
                if size >= self.buffer:
                    break
            else:
                more = False
                self._check_languages()
            end = super().state()
            for count, (name, files) in enumerate(projects.items(), 1):
                if count > given:
                    self.place = start, count
                    yield Document(None, str(name), pieces(_joined(files)))
            start, given = end, 0

    def _is_wanted(self, row: Row) -> bool:
        self.seen[str(row["language"]).lower()] += 1
        if self.seen.total() == TRIED:
            self._check_languages()
        return str(row["language"]).lower() in self.wanted

    def _check_languages(self) -> None:
        if self.seen and not self.wanted & self.seen.keys():
            raise UserError(
                f"--languages={','.join(sorted(self.wanted))}: none of the first {self.seen.total():,} files is in "
                f"these, but in {', '.join(sorted(self.seen))}"
            )

    def state(self) -> Json:
        return self.place


def _joined(files: list[tuple[str, str]]) -> Iterator[str]:
    for path, code in sorted(files):
        yield f"=== {path} ===\n{code}" + "\n" * (not code.endswith("\n"))


def main() -> None:
    config = load_config(Config, sys.argv[1:], usage=__doc__)
    prepare(config, Projects(config), Path(__file__).parent)


if __name__ == "__main__":
    run_main(main)
