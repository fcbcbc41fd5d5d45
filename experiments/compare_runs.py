"""Train runs to compare, or compare those there are: one picture, and tables of the gaps beside those of seeds.

    python experiments/compare_runs.py config/long_ctx.py --sweep=exact,2,4 --seeds=1,2,3 [--key=value of train.py ...]
    python experiments/compare_runs.py out-sweep [--out=curves.png]          # all the runs in a folder
    python experiments/compare_runs.py OUT_DIR [OUT_DIR ...]                 # these runs; they may still be training

A sweep trains, one run after the other, exact attention, SUS at each c, and lowrank, all with the first seed, then all
with the next: interrupted, it can be compared already. Runs of one seed start from the same weights and see the same
batches. Each has a folder in --runs, with its train.log. Ctrl-C saves and leaves; the same command then goes on from
there.

Whether SUS costs anything is a question of how far apart runs are that differ in the seed only. So runs are grouped by
their configuration, and compared at the last iteration which all have evaluated; those not finished are left out once
others make a comparison. ± is a standard error, of the mean over seeds or, in the distance from exact, over pairs of
runs of one seed. More than 8 runs are drawn as groups, by their mean and a band from the lowest to the highest.
"""

import dataclasses
import itertools
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from compare_runs_report import MANY, draw, summary, table
from configurator import TrainConfig, UserError, key, load_config, run_main, validate
from output import check_picture, print_table, save_picture
from runs import Run, check_copies, rank, read_run, validated_unlike
from sweep import Planned, look, own, train_all


@dataclasses.dataclass
class CompareConfig(TrainConfig):
    out: str = key("curves.png", "the picture: .png, .svg or .pdf", section="Comparison")
    sweep: str = key("", "train these: exact, lowrank, and SUS by its c, a number or auto; e.g. exact,2,4,auto")
    seeds: str = key("1,2,3", "of the sweep: integers, each for all of it")
    runs: str = key("out-sweep", "folder of the sweep's runs")


def main() -> None:
    cfg = load_config(CompareConfig, [arg for arg in sys.argv[1:] if arg.startswith("-")], usage=__doc__)
    paths = [arg for arg in sys.argv[1:] if not arg.startswith("-")]
    check_picture(cfg.out)  # now rather than after hours of training
    if "sweep" in cfg.explicit:
        planned = plan(cfg, paths)
        with own(Path(cfg.runs)):
            train_all([look(run) for run in planned])  # again: another sweep may have been here until now
        runs = sorted((read_run(run.folder) for run in planned), key=rank)
    else:
        runs = read_all(cfg, [Path(path) for path in paths])
    save_picture(draw(runs), Path(cfg.out))  # first: nobody may be there any more to read the tables
    if differing := validated_unlike(runs):
        print(f"WARNING: losses are of different validation, as the runs differ in {', '.join(differing)}")
    if len(runs) <= MANY:
        print_table(table(runs))
    lines, groups = summary(runs)
    print("".join(f"{line}\n" for line in lines), end="")
    if groups:
        print_table(groups)
    print(f"picture: {cfg.out}")


def read_all(cfg: CompareConfig, paths: list[Path]) -> list[Run]:
    """The runs in these folders, a folder of runs standing for all in it, under names of their own. Those that have no
    lines yet are named, and left out.
    """
    for name in sorted(cfg.explicit - {"out"}):
        raise UserError(f"--{name} is for training: leave it out, or give a config file and --sweep=exact,25")
    if not paths:
        raise UserError("which runs? Give the out_dir of one or more, e.g. compare_runs.py out-exact out-sus")
    runs, empty = [], []
    for path in paths:
        if path.suffix == ".py":
            raise UserError(f"{path} is a config file: give folders of runs alone, or it alone and --sweep=exact,25")
        alone = os.path.exists(path / "metrics.jsonl") or not os.path.isdir(path)
        inside = [] if alone else [file.parent for file in path.glob("*/metrics.jsonl")]
        found = [read_run(folder) for folder in inside or [path]]
        runs += sorted((run for run in found if run.lines), key=rank)
        empty += [str(run.folder) for run in found if not run.lines]
    if not runs:
        raise UserError(f"no lines yet: {', '.join(empty)}; wait for a first evaluation")
    if empty:
        print(f"left out, since there are no lines yet: {', '.join(empty)}")
    check_copies(runs)
    names = [run.name for run in runs]  # the user's, which may repeat
    return [dataclasses.replace(r, name=f"{r.name} ({r.folder})") if names.count(r.name) > 1 else r for r in runs]


def plan(cfg: CompareConfig, paths: list[str]) -> list[Planned]:
    """The runs in their order. UserError, before any is trained, if a key doesn't fit or a folder holds another run."""
    for folder in [path for path in paths if os.path.isdir(path)]:
        raise UserError(f"{folder} is a folder: --sweep takes a config file; to compare runs, leave --sweep out")
    for name in sorted({"attn_backward", "sus_c", "seed", "out_dir", "wandb_run_name"} & cfg.explicit):
        raise UserError(f"--{name} is set by --sweep, --seeds and --runs: leave it out")
    modes, seeds = {}, cfg.seeds.split(",")
    for c in cfg.sweep.split(","):
        try:
            name = c if c in ("exact", "lowrank") else f"sus-c{c}" if c == "auto" else f"sus-c{float(c):g}"
            if name in modes or c not in ("exact", "lowrank", "auto") and not float(c) > 0:
                raise ValueError
        except ValueError:
            raise UserError(
                f"--sweep={cfg.sweep}: {c!r} is not exact, lowrank, auto or a c above 0, or comes twice"
            ) from None
        modes[name] = [f"--attn_backward={c}"] if name == c else ["--attn_backward=sus", f"--sus_c={c}"]
    if not all(seed.isascii() and seed.isdigit() for seed in seeds) or len(set(map(int, seeds))) < len(seeds):
        raise UserError(f"--seeds={cfg.seeds} must be a list of integers, each once, such as 1,2,3")
    given, planned = [a for a in sys.argv[1:] if not a.startswith(("--out=", "--sweep=", "--seeds=", "--runs="))], []
    for seed, mode in itertools.product(map(int, seeds), modes):
        folder = Path(cfg.runs) / f"{mode}-seed{seed}"
        arguments = [*given, *modes[mode], f"--seed={seed}", f"--out_dir={folder}", f"--wandb_run_name={folder.name}"]
        config = load_config(TrainConfig, arguments, usage="")
        validate(config)
        if config.eval_only or config.init_from == "resume":
            raise UserError("a sweep trains, and resumes by itself: leave out eval_only and init_from=resume")
        planned.append(look(Planned(folder.name, folder, arguments, config)))
    return planned


if __name__ == "__main__":
    run_main(main)
