"""What the experiments show: tables on the terminal, pictures, and files that are written whole or not at all.

What an experiment has measured are rows: dicts with the same keys. `each` and `pick` look things up in them.
"""

import io
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from tqdm import tqdm

from configurator import UserError

if TYPE_CHECKING:  # matplotlib is imported where a picture is drawn
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

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


# -- rows -------------------------------------------------------------------------------------------


def each(rows: list[dict], name: str) -> list:
    """The values that a column has, in their order, each once."""
    return list(dict.fromkeys(row[name] for row in rows))


def pick(rows: list[dict], **wanted) -> list[dict]:
    """The rows that have these values."""
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


# -- the terminal -----------------------------------------------------------------------------------


def print_table(rows: list[list[str]]) -> None:
    """Rows of cells, the first of them the titles; the first column is flush left."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for name, *cells in rows:
        print("  ".join([name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:]))]))


def progress_bar(work: float) -> tqdm:
    """A bar with its time left, for steps of different size: update(amount of work)."""
    form = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    return tqdm(total=work, disable=None, dynamic_ncols=True, smoothing=0, bar_format=form)


def deliver(
    data: dict,
    report: Callable[[dict], None],
    json_file: str,
    draw: Callable[[dict], "Figure"] | None = None,
    picture: str = "",
    dpi: int = 160,
) -> None:
    """Write every figure to json_file, draw the picture, and print the report. A file without a name is left out.

    The report is last: a reader that leaves early, such as head, must not cost the minutes of measuring.
    """
    if json_file:
        write_json(Path(json_file), data)
    if picture:
        save_picture(draw(data), Path(picture), dpi)
    report(data)
    for what, path in (("every figure", json_file), ("picture", picture)):
        if path:
            print(f"{what}: {path}")


# -- pictures ---------------------------------------------------------------------------------------


def import_pyplot() -> ModuleType:
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


def save_picture(figure: "Figure", path: Path, dpi: int = 160) -> None:
    """See write_whole."""
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix[1:], dpi=dpi)
    write_whole(path, picture.getvalue())


def add_caption(figure: "Figure", text: str) -> None:
    """A small line above the panels, on the left."""
    figure.suptitle(text, fontsize=9, color="dimgrey", x=0.01, ha="left")


def shades(color: str, count: int) -> list[tuple[float, ...]]:
    """From a light one to the color itself, which is "#rrggbb"."""
    rgb = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return [tuple(1 - (1 - x) * (i + 2) / (count + 1) for x in rgb) for i in range(count)]


def label_points(ax: "Axes", xs: Iterable[float]) -> None:
    """Ticks on the x axis at these points and nowhere else, with 4096 as 4k."""
    xs = sorted(set(xs))
    ax.set_xticks(xs, [f"{x // 1024}k" if x >= 1024 and x % 1024 == 0 else f"{x:.10g}" for x in xs])
    ax.minorticks_off()


def label_powers(axis: "Axis", form: str, between: bool) -> None:
    """Plain numbers at a logarithmic axis's powers of ten, and at 2, 3 and 5 between them where that is wanted."""
    axis.set_major_formatter(lambda value, _: format(value, form))
    axis.set_minor_formatter(lambda value, _: format(value, form) if between and f"{value:e}"[0] in "235" else "")


# -- files ------------------------------------------------------------------------------------------


def check_writable(*paths: str) -> None:
    """UserError for a file that can't be written: better before the minutes of measuring than after."""
    for path in map(Path, filter(None, paths)):
        why = "it is a folder" if os.path.isdir(path) else ""
        if not os.access(path.absolute().parent, os.W_OK):
            why = f"{path.parent} is no folder that can be written to"
        try:
            os.lstat(_aside(path))
        except FileNotFoundError:
            pass
        except OSError as error:  # a name that is too long, say
            why = why or error.strerror
        if why:
            raise UserError(f"can't write {path}: {why}")


def _aside(path: Path) -> Path:
    return Path(f"{path}.aside")


def write_whole(path: Path, data: bytes) -> None:
    """UserError if it can't be written; a file that was there is then kept."""
    aside = _aside(path)
    try:
        aside.write_bytes(data)
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise UserError(f"can't write {path}: {error.strerror}") from error


def write_json(path: Path, data: dict) -> None:
    """See write_whole."""
    write_whole(path, (json.dumps(data, indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path, benchmark: str) -> dict:
    """What write_json wrote for that benchmark. UserError."""
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from error
    except ValueError:
        data = None
    if not isinstance(data, dict) or data.get("benchmark") != benchmark:
        raise UserError(f"{path} is not what {benchmark}.py wrote by --json=FILE")
    return data
