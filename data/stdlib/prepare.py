"""A long-context corpus which every machine already has: the sources of Python's standard library, about 12 MB.

    python data/stdlib/prepare.py

Each module is one document, whole, in bytes. The standard library's tests are left out. Validation is by file: a
module is in it if the hash of its path says so, so that no module is on both sides. The corpus depends on the
Python version: compare runs by the checksums which are printed here and kept in meta.json.
"""

import hashlib
import platform
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import UserError, key, load_config, run_main
from data.corpus import Texts, write_corpus
from data.lengths import Meta
from data.reading import files_under, read_text
from data.tokenizer import tokenizer_from_meta

SKIP = ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__")
BUILD = ("_sysconfigdata", "config-")  # prefixes of what the build of this one Python wrote


@dataclass
class Config:
    val_fraction: float = key(0.05, "about this share of the files is for validation", above=0, below=1)


def prepare(folder: Path = Path(__file__).parent, val_fraction: float = 0.05) -> Meta:
    """Write the corpus of the running Python's standard library to folder. UserError: no sources, disk full."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    splits: dict[str, list[tuple[str, str]]] = {"train": [], "val": []}
    total, skipped = 0, 0
    for path in files_under(stdlib, SKIP):
        name = path.relative_to(stdlib).as_posix()
        if path.suffix != ".py" or name.startswith(BUILD):
            continue
        try:
            text = read_text(path)
        except UserError:
            skipped += 1
            continue
        # Evenly in [0, 1). By the hash of the bare name, one file of tables would be most of the validation text.
        place = int(hashlib.sha256(f"validation/{name}".encode()).hexdigest()[:8], 16) / 2**32
        splits["val" if place < val_fraction else "train"].append((name, text))
        total += len(text)
    if not total:
        raise UserError(
            f"{stdlib} has no Python sources: this Python comes without them; use another, "
            "or your own text by data/text/prepare.py"
        )
    version = platform.python_version()
    source = {"stdlib of Python": version, "skipped": skipped, "val_fraction": val_fraction}
    meta = write_corpus(folder, Texts(splits["train"], splits["val"], source), tokenizer_from_meta({"name": "byte"}))
    print(f"standard library of Python {version}; files left out because they are not UTF-8 text: {skipped}")
    return meta


def main() -> None:
    config = load_config(Config, sys.argv[1:], usage=__doc__)
    prepare(val_fraction=config.val_fraction)
    print("now: python train.py config/long_ctx.py")


if __name__ == "__main__":
    run_main(main)
