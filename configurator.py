"""Configuration: a dataclass, then config files, then the command line; the later wins.

    python train.py config/long_ctx.py --sus_c=10 --compile=False

Every key is one line of a dataclass such as TrainConfig below: its name, type, default, help and bounds. A config
file is Python made of plain assignments (`gradient_accumulation_steps = 5 * 8`), run on its own: it sees neither the
defaults nor other config files. In it, imports, functions, classes and names with a leading underscore are free to
use; every other name must be a key, so that a typo is an error rather than a key which is silently ignored.

Values are converted to the key's type or refused, each alone in load_config; what keys demand of each other is in
validate. A mistake ends in a UserError, whose message says where it is, what is wrong and what is expected.
"""

import ast
import dataclasses
import difflib
import errno
import glob
import io
import math
import operator
import os
import runpy
import sys
import textwrap
import traceback
import types
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


class UserError(Exception):
    """A mistake of the user's: run_main shows the message alone, without a traceback."""


def run_main(main: Callable[[], object]) -> None:
    """Call main(). A UserError becomes one message on stderr and exit status 1; Ctrl-C exit status 130; and a reader
    of the output which leaves early, such as head, ends it quietly.
    """
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None where it was closed, as by pythonw and >&-
    sys.stderr = sys.stderr or open(os.devnull, "w")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # whatever a model writes, a terminal of any encoding can show
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        drop_output(sys.stdout)
        sys.exit(141)
    except OSError as error:  # a file's error has its name
        if error.filename is not None or error.errno not in (errno.ENOSPC, errno.EIO):
            raise
        drop_output(sys.stdout)
        print(f"error: can't write the output: {error.strerror}", file=sys.stderr)
        sys.exit(1)


def drop_output(stream: typing.TextIO) -> None:
    """What is still to be written to it goes nowhere: or else Python complains of it at its exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _uncaught(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
    # A Ctrl-C while torch is imported, before run_main is there to take it. So scripts import this module first.
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _uncaught

T = typing.TypeVar("T")
Fields = dict[str, dataclasses.Field]
HOLDS = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}


def key(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    words: tuple[str, ...] = (),
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    section: str | None = None,
    earlier: dict[str, str] | None = None,
) -> Any:
    """A dataclass field with its one-line help, for a key of type int, float, bool, str, bool | None (None is auto) or
    tuple[str, ...], which may be given several times.
    words are values besides those of the type; earlier: what values of earlier versions mean now. low and high are
    inclusive bounds, above and below exclusive ones; section is a heading for --help, from here on.
    """
    signs = {">=": low, ">": above, "<=": high, "<": below}
    bounds = {sign: bound for sign, bound in signs.items() if bound is not None}
    metadata = {
        "help": help,
        "choices": choices,
        "words": words,
        "bounds": bounds,
        "section": section,
        "earlier": earlier or {},
    }
    return dataclasses.field(default=default, metadata=metadata)


# What a key of each type takes, in the words of an error and of --help.
Kind = Any  # a type, bool | None, or TEXTS
TEXTS = tuple[str, ...]
EXPECTED: dict[Kind, str] = {
    int: "an integer",
    float: "a number",
    str: "text",
    bool: "True or False",
    bool | None: "True, False or auto (None in a config file)",
    TEXTS: "text, or a list of texts",
}
SHORT: dict[Kind, str] = {int: "int", float: "float", str: "str", bool: "bool", bool | None: "bool", TEXTS: "str"}
WORDS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def load_config(cls: type[T], argv: list[str], *, usage: str | None) -> T:
    """An instance of the dataclass cls (fields made by key()) from argv = sys.argv[1:], a list of CONFIG.py files and
    --key=value arguments. A later one wins over an earlier one, and --key=value over every file. Of a key of several
    texts, all --key=value count.
    Its attribute `explicit` is the set of the names which a file or the command line gave.
    --help prints usage and every key, then exits with status 0. Errors: UserError.
    """
    if "--help" in argv or "-h" in argv:
        print(_help(cls, usage))
        raise SystemExit(0)
    kinds = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(typing.cast(type, cls))}
    flags: dict[str, Any] = {}
    files: dict[str, Any] = {}
    for arg, following in zip(argv, [*argv[1:], "-"]):  # flags first: the 4 of `--n_layer 4` is no file
        if arg.startswith("--"):
            name, equals, text = arg[2:].partition("=")
            if name not in fields:
                raise UserError(f"{arg}: {_unknown(name, fields)}")
            if not equals:
                value = "True" if kinds[name] is bool else "VALUE"
                text = value if following.startswith("-") else following.removeprefix("=")
                raise UserError(f"{arg} has no value: write --{name}={text} (no spaces)")
            value = _checked(fields[name], kinds[name], _from_text(text, kinds[name]), arg)
            flags[name] = flags.get(name, ()) + value if kinds[name] == TEXTS else value
    for arg in argv:
        if not arg.startswith("--"):
            for name, (value, where) in _read_file(arg, fields).items():
                files[name] = _checked(fields[name], kinds[name], value, where)
    values = files | flags
    config = cls(**values)
    vars(config)["explicit"] = set(values)
    return config


def _read_file(arg: str, fields: Fields) -> dict[str, tuple[Any, str]]:
    """{name: (value, where)} of the keys which the config file assigns; where is 'FILE, line N' for messages."""
    path = Path(arg)
    if os.path.isfile(arg) and path.suffix != ".py":
        raise UserError(f"{arg!r} is no config file, whose name ends in .py; a key is written --key=value")
    if not os.path.isfile(arg):
        if arg.startswith("-") or "=" in arg:
            raise UserError(f"{arg}: a key is written --key=value, with two dashes")
        if os.path.isdir(arg) and "out_dir" in fields:
            raise UserError(f"{arg!r} is a folder, and no config file; that of a run is given by --out_dir={arg}")
        files = glob.glob("*.py", root_dir=path.parent)  # Path.glob raises where the folder's name is too long
        near = _nearest(path.name, files)
        hint = f"did you mean {path.parent / near}?" if near else "give the path of a config file, or --key=value"
        raise UserError(f"{arg!r}: no such config file; {hint}")
    try:
        tree = ast.parse(path.read_bytes(), arg)
        names = runpy.run_path(arg)
    except (Exception, SystemExit) as error:  # the file is a program: it can raise anything
        frames = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == arg]
        line = frames[-1] if frames else getattr(error, "lineno", None)
        message = f"{error.msg} (its lines are Python: key = value)" if isinstance(error, SyntaxError) else error
        raise UserError(f"{arg}{f', line {line}' if line else ''}: {type(error).__name__}: {message}") from error
    lines = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            lines[node.id] = node.lineno
        elif isinstance(node, ast.alias):
            lines[node.asname or node.name] = node.lineno
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and node.value is None:  # YAML's `n_layer: 6` is an annotation in Python
            raise UserError(f"{arg}, line {node.lineno}: ':' sets no value; write {ast.unparse(node.target)} = VALUE")
    given = {}
    for name, value in names.items():
        where = f"{arg}, line {lines[name]}" if name in lines else arg
        if name in fields:
            given[name] = value, where
        elif not (name.startswith("_") or callable(value) or isinstance(value, types.ModuleType)):
            raise UserError(f"{where}: {_unknown(name, fields)} (a helper's name starts with an underscore: _{name})")
    return given


def _from_text(text: str, kind: Kind) -> Any:
    """The Python value which an argument's text stands for; the text itself where it stands for none of the kind."""
    if kind in (bool, bool | None):
        words = WORDS if kind is bool else WORDS | {"auto": None, "none": None}
        return words.get(text.lower(), text)
    for number in (int, float) if kind in (int, float) else ():
        try:
            return number(text)
        except ValueError:
            continue
    return text


def _checked(field: dataclasses.Field, kind: Kind, value: Any, where: str) -> Any:
    """The value as the field's kind and within its bounds; else a UserError which starts with where."""
    words, value = field.metadata["words"], of_today(field, value)
    if isinstance(value, str) and value in words:
        return value
    if kind == TEXTS:
        texts = (value,) if isinstance(value, str) else value
        if not (isinstance(texts, list | tuple) and all(isinstance(text, str) for text in texts)):
            raise UserError(f"{where}: {field.name} must be {EXPECTED[kind]}, not {value!r}")
        return tuple(texts)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        if kind is float and is_number and not math.isnan(value):
            value = float(value)
        elif kind is int and is_number and value % 1 == 0:  # nan and inf fail this
            value = int(value)
        elif kind in (int, float) or not isinstance(value, kind):
            raise ValueError
    except (ValueError, OverflowError):
        raise UserError(
            f"{where}: {field.name} must be {' or '.join([EXPECTED[kind], *words])}, not {value!r}"
        ) from None
    choices, bounds = field.metadata["choices"], field.metadata["bounds"]
    if choices and value not in choices:
        raise UserError(f"{where}: {field.name} must be one of {', '.join(choices)}, not {value!r}")
    if not all(HOLDS[sign](value, bound) for sign, bound in bounds.items()):
        rule = " and ".join(f"{sign} {bound}" for sign, bound in bounds.items())
        raise UserError(f"{where}: {field.name} must be {rule}, not {value!r}")
    return value


def of_today(field: dataclasses.Field, value: Any) -> Any:
    """What a key's value means that may be of an earlier version."""
    return field.metadata["earlier"].get(str(value).capitalize(), value)


def _nearest(name: str, names: Iterable[str]) -> str | None:
    """The one of names which looks most like name, or None."""
    return next(iter(difflib.get_close_matches(name.lower().replace("-", "_"), names, n=1)), None)


def _unknown(name: str, fields: Fields) -> str:
    near = _nearest(name, fields)
    return f"unknown key {name!r}" + (f"; did you mean {near}?" if near else "; --help lists the keys")


def _help(cls: type, usage: str | None) -> str:
    kinds = typing.get_type_hints(cls)
    rows = []
    for field in dataclasses.fields(cls):
        default = "auto" if field.default is None else "" if field.default == () else str(field.default)
        default = default if default.isprintable() else repr(default)  # a line break would break the table
        choices = f": {' | '.join(field.metadata['choices'])}" if field.metadata["choices"] else ""
        rows.append(
            (
                field.metadata["section"],
                f"--{field.name}={default}",
                SHORT[kinds[field.name]],
                field.metadata["help"] + choices,
            )
        )
    left = max(len(row[1]) for row in rows)
    right = max(len(row[2]) for row in rows)
    lines = [
        (usage or "").strip(),
        "",
        "The keys, with their defaults. A config file has lines key = value; --key=value wins.",
    ]
    for section, example, kind, text in rows:
        if section:
            lines += ["", section]
        lines += textwrap.wrap(
            text,
            100,
            initial_indent=f"  {example:{left}}  {kind:{right}}  ",
            subsequent_indent=" " * (left + right + 6),
        )
    return "\n".join(lines)


@dataclasses.dataclass
class TrainConfig:
    """Every key of train.py. Names and meanings are nanoGPT's where it has them."""

    out_dir: str = key("out", "folder of the checkpoints and of metrics.jsonl", section="Run")
    init_from: str = key(
        "scratch",
        "the weights: scratch | resume | gpt2 | gpt2-medium | gpt2-large | gpt2-xl, or the path of a "
        "checkpoint or its folder, to fine-tune it",
    )
    seed: int = key(1337, "seeds the weights, the batches and the draws of SUS", low=0, high=2**63 - 1)

    eval_interval: int = key(2000, "iterations between evaluations", low=1, section="Evaluation and logging")
    eval_iters: int = key(200, "micro-batches an evaluation; the windows are fixed", low=1)
    eval_only: bool = key(False, "evaluate once, then exit")
    always_save_checkpoint: bool = key(True, "False: save ckpt.pt only if validation improved")
    keep_checkpoints: int = key(0, "of ckpt.pt's iterations so many stay, as ckpt-ITERATION.pt; 0: none", low=0)
    log_interval: int = key(1, "iterations between logged lines", low=1)
    wandb_log: bool = key(True, "mirror the record to wandb, offline if not logged in")
    wandb_project: str = key("nanosus", "project of the wandb runs")
    wandb_run_name: str = key("", "empty: named after what it runs, e.g. sus-c25-ab12")

    dataset: str = key("stdlib", "folder under data/ with train.bin and val.bin", section="Data")
    windows: str = key(
        "packed",
        "of the text; packed: cut from the stream of all documents; document: each within a document that is "
        "long enough",
        choices=("packed", "document"),
    )
    gradient_accumulation_steps: int = key(40, "micro-batches a step, summed over all processes", low=1)
    batch_size: int = key(12, "sequences a micro-batch", low=1)
    block_size: int = key(1024, "context length in tokens", low=1)
    doc_mask: bool = key(False, "tokens attend within their document only, also where several share a window")

    n_layer: int = key(12, "transformer blocks", low=1, section="Model")
    n_head: int = key(12, "query heads", low=1)
    n_kv_head: int = key(0, "key/value heads; 0: n_head; fewer: grouped-query", low=0)
    n_embd: int = key(768, "width", low=1)
    head_dim: int = key(0, "of each head; 0: n_embd / n_head", low=0)
    mlp: str = key("gelu", "the layer between attentions; swiglu: as in Llama and Qwen", choices=("gelu", "swiglu"))
    intermediate_size: int = key(0, "width inside the MLP; 0: 4 n_embd", low=0)
    dropout: float = key(0.0, "of attention too, so it needs attn_backward=exact", low=0, below=1)
    bias: bool = key(False, "biases in linear layers and norms")
    qkv_bias: bool = key(False, "biases of queries, keys and values, where bias=False; as in Qwen2")
    tie_head: bool = key(True, "the head's weights are the embedding's")
    pos: str = key("learned", "position encoding", choices=("learned", "rope"))
    rope_theta: float = key(10000.0, "base of RoPE's wavelengths; larger reaches further", above=1)
    rope_scaling: float = key(1.0, "so many times a trained model's positions are stretched, by rope_type", low=1)
    rope_type: str = key(
        "default",
        "how: linear, which is the default's way, llama3 or yarn",
        choices=("default", "linear", "llama3", "yarn"),
    )
    rope_original_context: int = key(8192, "for llama3 and yarn: the context before it was stretched", low=1)
    rope_low_freq_factor: float = key(1.0, "llama3: what turns less often in that context is stretched", above=0)
    rope_high_freq_factor: float = key(4.0, "llama3: what turns more often is not", above=0)
    rope_beta_fast: float = key(32.0, "yarn: what turns more often in that context is not stretched", above=0)
    rope_beta_slow: float = key(1.0, "yarn: what turns less often is", above=0)
    rope_attention_factor: float = key(0.0, "yarn: multiplies queries and keys; 0: 0.1 ln(rope_scaling) + 1", low=0)
    norm: str = key("layernorm", "normalisation layer", choices=("layernorm", "rmsnorm"))
    norm_eps: float = key(1e-5, "added to what norms divide by, squared", above=0)
    qk_norm: bool = key(False, "normalise queries and keys")
    qk_norm_scale: float = key(
        0.0,
        "gain of qk_norm, which bounds scores by its square times the root of the head dimension; 0: learned",
        low=0,
    )
    attn_window: int = key(0, "keys, the latest, that rows of some layers see; 0: all; see window_pattern", low=0)
    window_pattern: str = key(
        "SSSL",
        "for attn_window, tiled over the layers; S: they see the window; L: all keys, as the last layer does if the "
        "pattern has no letter for it",
    )
    activation_checkpointing: str = key(
        "none",
        "what is computed again in the backward, for less memory; attention: all but attention; full: that too",
        choices=("none", "attention", "full"),
        earlier={"True": "attention", "False": "none"},
    )
    offload_activations: bool = key(False, "keep what the backward needs in the host's memory")

    lora_rank: int = key(
        0,
        "fine-tune only adapters of this rank beside the linear layers; 0: all weights",
        low=0,
        section="LoRA, to fine-tune with few trained weights",
    )
    lora_alpha: float = key(16.0, "adapters count lora_alpha / lora_rank", above=0, below=math.inf)
    lora_targets: str = key(
        "c_attn,c_proj,c_fc",
        "layers that get adapters, of attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj; c_proj: both",
    )
    lora_dropout: float = key(0.0, "of what goes into the adapters", low=0, below=1)
    lora_base: str = key("", "for init_from=resume: where the base is now, if it has moved")

    attn_backward: str = key(
        "exact", "gradient of attention", choices=("exact", "sus", "lowrank"), section="Attention's backward"
    )
    sus_c: float = key(
        8.0,
        "tiles of 64 keys kept a query row; inf: all (exact gradient); auto: sets itself, see sus_rho",
        above=0,
        words=("auto",),
    )
    sus_rho: float = key(
        0.01,
        "for sus_c=auto: the noise that SUS may add to the gradient of the weights of queries and keys, as a "
        "share of its own",
        above=0,
        high=1,
    )
    sus_sampler: str = key(
        "tiles",
        "what is drawn, and how; poisson: single keys, as in the paper",
        choices=("tiles", "weighted", "rows", "values", "rows+values", "systematic", "poisson"),
    )
    sus_backend: str = key("auto", "the kernels", choices=("auto", "reference", "cpu", "triton"))
    lowrank_degree: int = key(
        2, "of the polynomial in place of exp, even; cost grows as head dimension ^ (degree + 1)", low=2
    )
    lowrank_forward: str = key(
        "exact", "in training; approximate: by the polynomial too", choices=("exact", "approximate")
    )

    learning_rate: float = key(6e-4, "peak learning rate", low=0, section="Optimizer")
    max_iters: int = key(600000, "training steps", low=0)
    weight_decay: float = key(0.1, "of the weight matrices, by AdamW", low=0)
    beta1: float = key(0.9, "AdamW's decay of the mean", low=0, below=1)
    beta2: float = key(0.95, "AdamW's decay of the mean square", low=0, below=1)
    grad_clip: float = key(1.0, "largest norm of the gradient; 0: off", low=0)
    decay_lr: bool = key(True, "warm-up, then cosine decay; False: constant")
    warmup_iters: int = key(2000, "steps of linear warm-up", low=0)
    lr_decay_iters: int = key(600000, "step at which the decay ends", low=0)
    min_lr: float = key(6e-5, "learning rate after the decay", low=0)

    device: str = key("auto", "auto, cpu, cuda, cuda:1, mps", section="Machine")
    dtype: str = key("auto", "of the forward", choices=("auto", "float32", "bfloat16", "float16"))
    backprop: str = key(
        "autograd",
        "what makes the gradients; analytic: closed forms by hand, in less memory",
        choices=("autograd", "analytic"),
    )
    compile: bool | None = key(None, "torch.compile; auto: on CUDA only")
    backend: str = key("auto", "of DDP", choices=("auto", "nccl", "gloo"))
    peak_tflops: float = key(0.0, "dense peak, for the MFU; 0: by the device's name", low=0)

    def __post_init__(self) -> None:
        self.explicit: set[str] = set()  # see load_config; none where a program makes the configuration

    @property
    def D(self) -> int:
        """The head dimension."""
        return self.head_dim or self.n_embd // self.n_head


def validate(cfg: TrainConfig) -> None:
    """What TrainConfig's keys demand of each other; UserError. Devices, files and checkpoints are checked elsewhere."""
    for name in ("out_dir", "dataset"):
        if not getattr(cfg, name):
            raise UserError(f"{name} is empty: name a folder")
    _validate_architecture(cfg)
    _validate_lora(cfg)
    _validate_backward(cfg)
    if cfg.backprop == "analytic":
        _validate_analytic(cfg)
    if cfg.decay_lr and cfg.lr_decay_iters < cfg.warmup_iters:
        raise UserError(
            f"lr_decay_iters={cfg.lr_decay_iters} is below warmup_iters={cfg.warmup_iters}: raise the one "
            "(usually to max_iters), lower the other, or set --decay_lr=False"
        )
    if cfg.decay_lr and cfg.min_lr > cfg.learning_rate:
        raise UserError(
            f"min_lr={cfg.min_lr} is above learning_rate={cfg.learning_rate}: lower the one (usually to "
            "learning_rate / 10), raise the other, or set --decay_lr=False"
        )


def _validate_architecture(cfg: TrainConfig) -> None:
    if not cfg.head_dim and cfg.n_embd % cfg.n_head:
        raise UserError(f"n_embd={cfg.n_embd} must be a multiple of n_head={cfg.n_head}, or give --head_dim=64, say")
    if cfg.n_kv_head and cfg.n_head % cfg.n_kv_head:
        raise UserError(f"n_head={cfg.n_head} must be a multiple of n_kv_head={cfg.n_kv_head} (0: as n_head)")
    if cfg.pos == "rope" and cfg.D % 2:
        of = "head_dim" if cfg.head_dim else f"n_embd / n_head = {cfg.n_embd} / {cfg.n_head}"
        raise UserError(f"pos=rope needs an even head dimension, but {of} = {cfg.D}")
    _validate_rope(cfg)
    if not cfg.window_pattern or set(cfg.window_pattern) - {"S", "L"}:
        raise UserError(f"window_pattern={cfg.window_pattern!r} must be made of S and L, such as SSSL")
    if cfg.attn_window == 0 and "window_pattern" in cfg.explicit and "S" in cfg.window_pattern:
        raise UserError(
            f"window_pattern={cfg.window_pattern} needs a window: give --attn_window=1024, say, or leave it out"
        )
    if cfg.attn_window >= cfg.block_size and "attn_window" in cfg.explicit:
        raise UserError(
            f"attn_window={cfg.attn_window} leaves nothing out of a context of block_size={cfg.block_size}: give a "
            "smaller window, or --attn_window=0"
        )
    literal = len(cfg.window_pattern) == cfg.n_layer
    if cfg.attn_window and "S" not in (cfg.window_pattern * cfg.n_layer)[: cfg.n_layer - 1 + literal]:
        raise UserError(
            f"attn_window={cfg.attn_window} is for layers S, of which window_pattern={cfg.window_pattern} makes none "
            f"here: the last of the {cfg.n_layer} layers is always L"
        )
    if cfg.qk_norm_scale and not cfg.qk_norm:
        raise UserError(
            f"qk_norm_scale={cfg.qk_norm_scale:g} is the gain of qk_norm, which is off: set --qk_norm=True, or "
            "--qk_norm_scale=0"
        )


def _validate_rope(cfg: TrainConfig) -> None:
    given = [name for name in sorted(cfg.explicit) if name.startswith("rope_") and name != "rope_theta"]
    if cfg.pos != "rope" and (given or cfg.rope_scaling != 1):
        name = given[0] if given else "rope_scaling"
        raise UserError(
            f"{name}={getattr(cfg, name)} is for rotary positions, and pos={cfg.pos}: leave it out, or set --pos=rope"
        )
    if cfg.rope_type == "default" and cfg.rope_scaling != 1:
        if "rope_type" in cfg.explicit:
            raise UserError(f"rope_type=default stretches nothing: leave rope_scaling={cfg.rope_scaling} out")
        cfg.rope_type = "linear"
    if cfg.rope_low_freq_factor >= cfg.rope_high_freq_factor:
        raise UserError(
            f"rope_low_freq_factor={cfg.rope_low_freq_factor} must be below "
            f"rope_high_freq_factor={cfg.rope_high_freq_factor}"
        )
    if cfg.rope_beta_slow >= cfg.rope_beta_fast:
        raise UserError(f"rope_beta_slow={cfg.rope_beta_slow} must be below rope_beta_fast={cfg.rope_beta_fast}")


def _validate_lora(cfg: TrainConfig) -> None:
    if cfg.lora_rank == 0 and "lora_rank" not in cfg.explicit:  # given as 0, it switches off what a config file has
        for name in ("lora_alpha", "lora_targets", "lora_dropout"):
            if name in cfg.explicit:
                raise UserError(
                    f"{name}={getattr(cfg, name)} needs adapters: give --lora_rank=8, say, or leave {name} out"
                )
    if cfg.lora_rank and cfg.init_from == "scratch":
        raise UserError(
            f"lora_rank={cfg.lora_rank} needs a trained model, the base: --init_from=PATH of a checkpoint, or gpt2"
        )
    if cfg.lora_base and not (cfg.lora_rank and cfg.init_from == "resume"):
        raise UserError(
            f"lora_base={cfg.lora_base} is for resuming a run with adapters, whose base has moved: leave it out"
            + (", as this run has none" if cfg.init_from == "resume" else "; --init_from=PATH gives a new run's base")
        )
    if cfg.lora_rank and cfg.attn_backward == "sus" and cfg.sus_c == "auto":
        if not {"c_attn", "attn.c_attn"} & {name.strip() for name in cfg.lora_targets.split(",")}:
            raise UserError(
                f"sus_c=auto goes by the gradient of c_attn, which lora_targets={cfg.lora_targets} leaves out: "
                "add c_attn, or give a number"
            )


def _validate_backward(cfg: TrainConfig) -> None:
    if cfg.attn_backward == "lowrank" and (cfg.doc_mask or cfg.attn_window):
        name, otherwise = ("doc_mask", " or --doc_mask=False") if cfg.doc_mask else ("attn_window", "")
        raise UserError(
            f"{name}={getattr(cfg, name)} is not covered by attn_backward=lowrank, whose running sums are over all "
            f"earlier tokens: set --attn_backward=sus, --attn_backward=exact{otherwise}"
        )
    if cfg.lowrank_degree % 2:
        raise UserError(
            f"lowrank_degree={cfg.lowrank_degree} must be even: polynomials of odd degree are negative somewhere, and "
            "weights must not be"
        )
    if cfg.dropout > 0 and cfg.attn_backward != "exact":
        raise UserError(
            f"dropout={cfg.dropout} includes attention dropout, which attn_backward={cfg.attn_backward} does not "
            "support: "
            "set --dropout=0.0 or --attn_backward=exact"
        )


def _validate_analytic(cfg: TrainConfig) -> None:
    for name in "dropout", "lora_dropout":
        if (value := getattr(cfg, name)) > 0:
            raise UserError(
                f"{name}={value} is not covered by backprop=analytic: set --{name}=0.0 or --backprop=autograd"
            )
    if cfg.attn_backward not in ("exact", "sus"):
        raise UserError(
            f"attn_backward={cfg.attn_backward} is not covered by backprop=analytic: set --attn_backward=exact, "
            "--attn_backward=sus or --backprop=autograd"
        )
    if cfg.attn_backward == "sus" and cfg.sus_c == "auto":
        raise UserError(
            "sus_c=auto measures its noise by autograd, so it is not covered by backprop=analytic: give a number, "
            "e.g. --sus_c=4, or --backprop=autograd"
        )
    if cfg.offload_activations:
        raise UserError(
            "offload_activations=True moves what autograd keeps, and backprop=analytic does without it: set "
            "--offload_activations=False or --backprop=autograd"
        )
    if cfg.compile:
        raise UserError(
            "compile=True compiles autograd's backward, not that of backprop=analytic: set --compile=False or "
            "--backprop=autograd"
        )
