"""What the experiments show: tables on the terminal, pictures, and files that are written whole or not at all."""

import io
import os
from pathlib import Path

from tqdm import tqdm

from configurator import UserError

COLORS = [
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#8C8C8C",
]  # of Okabe and Ito, with a grey for black
STYLE = {
    "font.size": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "legend.frameon": False,
}


def print_table(rows: list[list[str]]) -> None:
    """Rows of cells, the first of them the titles; the first column is flush left."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for name, *cells in rows:
        print("  ".join([name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:]))]))


def progress_bar(work: float) -> tqdm:
    """A bar with its time left, for steps of different size: update(amount of work)."""
    form = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    return tqdm(total=work, disable=None, dynamic_ncols=True, smoothing=0, bar_format=form)


def import_pyplot():
    """matplotlib's pyplot, in our style. UserError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("the picture needs matplotlib: pip install -r requirements-dev.txt") from None
    matplotlib.use("Agg")  # no display needed
    import matplotlib.pyplot as plt

    plt.rcParams.update(STYLE)
    return plt


def check_picture(out: str) -> None:
    """UserError if matplotlib is missing, or can't write such a file."""
    check_writable(out)
    if Path(out).suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--out={out}: the picture's name must end in .png, .svg or .pdf")
    import_pyplot()


def save_picture(figure, path: Path, dpi: int = 160) -> None:
    """See write_whole."""
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix[1:], dpi=dpi)
    write_whole(path, picture.getvalue())


def check_writable(*paths: str) -> None:
    """UserError for a file that can't be written: better before the minutes of measuring than after."""
    for path in map(Path, filter(None, paths)):
        if path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
            why = "it is a folder" if path.is_dir() else f"{path.parent} is no folder that can be written to"
            raise UserError(f"can't write {path}: {why}")


def write_whole(path: Path, data: bytes) -> None:
    """UserError if it can't be written; a file that was there is then kept."""
    aside = path.with_name(path.name + ".aside")
    try:
        aside.write_bytes(data)
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise UserError(f"can't write {path}: {error.strerror}") from error
