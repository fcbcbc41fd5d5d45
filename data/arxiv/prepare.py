"""Papers: LaTeX sources from arXiv, about 1.5 million, 10,000 to 20,000 GPT-2 tokens each, 29 billion in all.

    python data/arxiv/prepare.py
    python data/arxiv/prepare.py --max_tokens=0 --min_doc_tokens=16384      all of the long ones
    python data/arxiv/prepare.py --hub=FOLDER                               from a copy of its files

Each paper is one document. Validation is the data set's own, as much of it as is about a twentieth of max_tokens,
at least one. FOLDER has arxiv/validation/*.jsonl.zst and arxiv/train/*.jsonl.zst, whose rows have a text.
The default is the part arxiv of Proof-Pile-2. Needs: pip install -r requirements-data.txt
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
    hub: str = name_key("EleutherAI/proof-pile-2")


def source(config: Config) -> Hub:
    """The papers, as a Hub."""
    return Hub(config, [("val", "arxiv/validation/*.jsonl.zst"), ("train", "arxiv/train/*.jsonl.zst")], ("text",))


def main() -> None:
    config = load_config(Config, sys.argv[1:], usage=__doc__)
    prepare(config, source(config), Path(__file__).parent)


if __name__ == "__main__":
    run_main(main)
