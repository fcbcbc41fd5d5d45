"""Configuration: `python train.py config/NAME.py --key=value`. First version; see load_config."""

import ast
import dataclasses
import difflib
import math
import runpy
import sys
import types


class UserError(Exception):
    """A mistake of the user: its message is shown alone, without a traceback."""


def run_main(main):
    """Call main(); a UserError becomes one message on stderr and exit code 1, Ctrl-C exit code 130."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def key(default, help, *, choices=None, low=None, high=None, above=None):
    """A dataclass field with its one-line help; `low` and `high` are inclusive bounds, `above` is exclusive."""
    metadata = {"help": help, "choices": choices, "low": low, "high": high, "above": above}
    return dataclasses.field(default=default, metadata=metadata)


def load_config(cls, argv, *, usage):
    """An instance of the dataclass `cls` from CONFIG.py files and --key=value arguments; later ones win."""
    if "--help" in argv or "-h" in argv:
        print(usage)
        raise SystemExit(0)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values = {}
    for arg in argv:
        if not arg.startswith("--"):
            given = {k: v for k, v in runpy.run_path(arg).items() if not k.startswith("_") and not callable(v)
                     and not isinstance(v, types.ModuleType)}
        else:
            name, equals, text = arg[2:].partition("=")
            if not equals:
                raise UserError(f"{arg}: write it as {arg}=VALUE")
            kind = fields[name].type if name in fields else str
            given = {name: text.lower() in ("true", "1", "yes") if kind is bool else kind(text)}
        for name in given:
            if name not in fields:
                raise UserError(f"unknown key {name}")
        values |= given
    config = cls(**values)
    config.explicit = set(values)
    return config


@dataclasses.dataclass
class TrainConfig:
    out_dir: str = key("out", "folder")
