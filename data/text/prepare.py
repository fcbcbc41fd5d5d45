"""
A corpus of your own text: data/NAME/ from one file, or from all files of a folder but hidden ones, one document each.

    python data/text/prepare.py --input=FILE_OR_FOLDER --out=NAME
    python data/text/prepare.py --input=books/ --out=books --tokenizer=gpt2

Files are UTF-8. The last val_fraction of each document is for validation. An earlier data/NAME is replaced.
"""

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import UserError, key, load_config, run_main
from data.corpus import files_under, read_text, write_corpus
from data.tokenizer import tokenizer_from_meta


@dataclass
class Config:
    input: str = key("", "text file, or folder of text files")
    out: str = key("", "name of the data set")
    tokenizer: str = key("byte", "byte: no vocabulary to fetch; gpt2: 4 times fewer tokens", choices=("byte", "gpt2"))
    val_fraction: float = key(0.05, "share of each document that is for validation: its end", above=0, below=1)


def prepare(input, out, tokenizer="byte", val_fraction=0.05, data=Path(__file__).parents[1]):
    """Write data/out/ from the file or folder input. UserError: no such input, a file that isn't text, a bad name."""
    folder = data / out
    if not input:
        raise UserError("--input is missing: give a text file, or a folder of text files")
    if not re.fullmatch(r"[^\W_][\w.-]{0,99}", out) or folder.is_file():
        raise UserError(f"--out={out}: give a name of letters, digits, '_', '-' and '.', for a folder under {data}")
    if (folder / "prepare.py").exists():
        raise UserError(f"--out={out}: this data set has a prepare.py of its own; give another name")
    paths = _text_files(input)
    encoder = tokenizer_from_meta({"name": tokenizer})

    def documents(select):
        for path in paths:
            text = read_text(path)
            yield path.name, select(text, len(text) - int(len(text) * val_fraction))

    return write_corpus(folder, documents(lambda text, cut: text[:cut]), documents(lambda text, cut: text[cut:]),
                        encoder, source={"input": input, "files": len(paths), "val_fraction": val_fraction},
                        total_bytes=sum(path.stat().st_size for path in paths))


def _text_files(input):
    """Paths of the files, each checked to be text, so that a stray picture stops an hour's work before it begins."""
    where = Path(os.path.expanduser(input))
    if not (os.path.isdir(where) or os.path.isfile(where)):
        raise UserError(f"--input={input}: no such file or folder; give a text file, or a folder of text files")
    paths = files_under(where) if os.path.isdir(where) else [where]
    if not paths:
        raise UserError(f"--input={input}: this folder has no files (hidden ones don't count)")
    mistakes = []
    for path in paths:
        try:
            read_text(path)
        except UserError as mistake:
            mistakes.append(str(mistake))
    if mistakes:
        raise UserError("\n  ".join([f"{len(mistakes)} of {len(paths)} files can't be used; convert or move them:",
                                     *mistakes[:10], *["..."] * (len(mistakes) > 10)]))
    return paths


def main():
    config = load_config(Config, sys.argv[1:], usage=__doc__)
    meta = prepare(config.input, config.out, config.tokenizer, config.val_fraction)
    shortest = min(meta["train_tokens"], meta["val_tokens"])
    block_size = f" --block_size={shortest // 2}" if shortest <= 2048 else ""
    print(f"now: python train.py config/long_ctx.py --dataset={config.out} --out_dir=out-{config.out}{block_size}")


if __name__ == "__main__":
    run_main(main)
