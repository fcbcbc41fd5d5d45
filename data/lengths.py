"""How long the documents of a corpus are: figures for meta.json, what a preparation prints at its end, a picture.

Dims: D, the documents of a split.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from configurator import TrainConfig, load_config

Meta = dict[str, Any]  # what is in meta.json

LONG = {"2k": 2048, "8k": 8192, "32k": 32768, "128k": 131072}  # tokens
RECIPES = Path(__file__).parents[1] / "config"


def statistics(ends: npt.NDArray[np.uint64]) -> dict[str, Any]:
    """meta.json's figures on a split's documents, in tokens. ends: (D,) where each ends."""
    lengths = np.diff(ends, prepend=np.uint64(0)).astype(np.int64)
    share = {name: round(float(lengths[lengths >= bound].sum() / lengths.sum()), 4) for name, bound in LONG.items()}
    powers = np.bincount(np.log2(lengths).astype(int))  # log2 is exact for powers of two
    histogram = {str(2**power): int(count) for power, count in enumerate(powers) if count}
    return {
        "min": int(lengths.min()),
        "median": int(np.median(lengths)),
        "mean": int(lengths.mean()),
        "max": int(lengths.max()),
        "share_of_tokens_in_documents_of_at_least": share,
        "documents_from_this_length_to_its_double": histogram,
    }


def report(folder: Path, meta: Meta) -> None:
    """Print what was written to folder."""
    for split in "train", "val":
        print(
            f"{folder / split}.bin: {meta[f'{split}_tokens']:,} tokens in {meta[f'{split}_documents']:,} documents, "
            f"sha256 {meta[f'{split}_sha256'][:16]}"
        )
    if left_out := meta["left_out_as_too_short"]:
        print(f"left out, as they are too short: {left_out:,} documents")
    for split, entry in ("training", "document_lengths"), ("validation", "val_document_lengths"):
        lengths = meta[entry]
        share = lengths["share_of_tokens_in_documents_of_at_least"]
        print(
            f"{split} documents in tokens: shortest {lengths['min']:,}, median {lengths['median']:,}, "
            f"mean {lengths['mean']:,}, longest {lengths['max']:,}"
        )
        print(
            "  share of the tokens in documents of at least "
            + ", ".join(f"{name}: {part:.0%}" for name, part in share.items())
        )
    if (shorter := min(meta["train_tokens"], meta["val_tokens"])) <= LONG["2k"]:
        print(f"note: one split has only {shorter:,} tokens, and block_size must be below that")


def next_step(meta: Meta, dataset: str, recipe: str = "long_ctx", options: str = "") -> None:
    """Print the command that trains on a corpus, with a block_size for which it has tokens enough; and before it, if no
    document of validation is that long.
    """
    path = RECIPES / f"{recipe}.py"
    block_size = load_config(TrainConfig, [str(path)], usage=None).block_size
    if (shorter := min(meta["train_tokens"], meta["val_tokens"])) <= block_size:
        block_size = max(1, shorter // 2)
        options += f" --block_size={block_size}"
    if (longest := meta["val_document_lengths"]["max"]) < block_size:
        print(
            f"WARNING: no validation document has as many tokens as block_size={block_size} (the longest: "
            f"{longest:,}). Each window then holds several documents, and the validation loss says nothing of long "
            "contexts: prepare longer documents, or train with a smaller --block_size"
        )
    print(f"now: python train.py config/{path.name} --dataset={dataset}{options}")


def draw(folder: Path, meta: Meta) -> None:
    """The lengths of the training documents as a picture, where matplotlib is there to draw it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    of_documents, of_tokens = figure.subplots(1, 2)
    ends = np.fromfile(folder / "train_ends.bin", np.uint64)
    lengths = np.diff(ends, prepend=np.uint64(0)).astype(np.int64)
    power = np.log2(lengths).astype(int)
    powers = np.arange(power.min(), power.max() + 1)
    documents, tokens = np.bincount(power)[powers], np.bincount(power, lengths)[powers]
    names = [
        f"{2**power}" if power < 10 else f"{2 ** (power - 10)}k" if power < 20 else f"{2 ** (power - 20)}M"
        for power in powers
    ]
    for ax, heights, what in (
        (of_documents, documents, "documents"),
        (of_tokens, 100 * tokens / tokens.sum(), "% of the tokens"),
    ):
        ax.bar(powers, heights, width=0.9, align="edge", color="#3b75af")
        ax.set(xlabel="length of the document, tokens", title=f"{what}, by length")
        step = -(-len(powers) // 9)
        ax.set_xticks(powers[::step], names[::step])
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{folder.name}: {meta['train_tokens']:,} training tokens in {meta['train_documents']:,} documents", fontsize=10
    )
    aside = folder / "documents.aside.png"
    try:
        figure.savefig(aside, dpi=110)
        os.replace(aside, folder / "documents.png")
    except OSError as error:
        aside.unlink(missing_ok=True)
        print(f"no picture of their lengths: {error.strerror}")
    else:
        print(f"their lengths as a picture: {folder / 'documents.png'}")
