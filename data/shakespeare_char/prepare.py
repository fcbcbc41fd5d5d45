"""Tiny Shakespeare by characters, as in nanoGPT: the first 90 % are for training, and the ids are nanoGPT's.

python data/shakespeare_char/prepare.py                   downloads 1 MB
python data/shakespeare_char/prepare.py --input=FILE      takes a file instead: the same one, or any text
"""

import hashlib
import http.client
import os
import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import UserError, key, load_config, run_main
from data.corpus import Texts, write_corpus
from data.lengths import Meta
from data.reading import read_text
from data.tokenizer import tokenizer_from_meta

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


@dataclass
class Config:
    input: str = key("", "a text file to take; empty: download tiny Shakespeare")


def prepare(input: str = "", folder: Path = Path(__file__).parent) -> Meta:
    """Write the corpus of the text file input, or of the download, to folder. UserError: no network, no text."""
    text = read_text(Path(os.path.expanduser(input))) if input else _download()
    cut = int(0.9 * len(text))
    vocabulary = "".join(sorted(set(text)))
    if not vocabulary:
        raise UserError(f"{input} is empty")
    source = Texts([("train", text[:cut])], [("val", text[cut:])], {"input": input or URL})
    return write_corpus(folder, source, tokenizer_from_meta({"name": "char", "chars": vocabulary}))


def _download() -> str:
    try:
        with urllib.request.urlopen(URL, timeout=30) as response:
            raw = response.read()
    except (OSError, http.client.HTTPException) as error:
        problem = str(error)
    else:
        if hashlib.sha256(raw).hexdigest() == SHA256:
            return raw.decode()
        problem = f"the {len(raw):,} bytes which came are not that text"
    raise UserError(
        f"can't download {URL}: {problem}. Get that file in another way (any copy of "
        "nanoGPT's tiny Shakespeare will do), then: python data/shakespeare_char/prepare.py --input=FILE"
    )


def main() -> None:
    config = load_config(Config, sys.argv[1:], usage=__doc__)
    prepare(config.input)
    print("now: python train.py config/train_shakespeare_char.py")


if __name__ == "__main__":
    run_main(main)
