"""Long web pages: those of FineWeb-Edu, pages of educational value, that have at least min_doc_tokens tokens.

    python data/fineweb_edu/prepare.py
    python data/fineweb_edu/prepare.py --min_doc_tokens=32768 --sample=100BT
    python data/fineweb_edu/prepare.py --hub=FOLDER                           from a copy of its files

Each page is one document. Most pages are short: of a sample's tokens, only a small share is in long ones, so this reads
far more than it keeps. One page in 1 / val_fraction is for validation.
FOLDER has sample/10BT/*.parquet (or that of another --sample), with the columns text and token_count. Needs: pip
install -r requirements-data.txt
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import key, load_config, run_main
from data.hub import Config as HubConfig
from data.hub import Hub, Row, name_key, prepare, share_key


@dataclass
class Config(HubConfig):
    hub: str = name_key("HuggingFaceFW/fineweb-edu")
    sample: str = key("10BT", "how much there is to choose from, in tokens", choices=("10BT", "100BT", "350BT"))
    min_doc_tokens: int = key(8192, "shorter pages are left out", low=0)
    val_fraction: float = share_key()


def source(config: Config) -> Hub:
    """The pages, as a Hub, without most of those that are too short."""

    def keep(row: Row) -> bool:  # what is surely too short needn't be encoded
        if config.tokenizer == "gpt2":  # token_count is by GPT-2's tokenizer: half of it is on the safe side
            return (row["token_count"] or 0) >= config.min_doc_tokens / 2
        return 4 * len(row["text"]) + 1 >= config.min_doc_tokens  # a character has up to 4 bytes

    return Hub(config, [(None, f"sample/{config.sample}/*.parquet")], ("text", "token_count"), keep=keep)


def main() -> None:
    config = load_config(Config, sys.argv[1:], usage=__doc__)
    prepare(config, source(config), Path(__file__).parent)


if __name__ == "__main__":
    run_main(main)
