"""Config files, the command line, --help and the checks of TrainConfig: what is accepted, and every error's message."""

import dataclasses
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from configurator import TrainConfig, UserError, key, load_config, run_main, validate

NANOGPT_STYLE = {
    "train_gpt2": """
        # launch as: torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
        wandb_log = True
        wandb_project = 'owt'
        wandb_run_name='gpt2-124M'
        # 12 batch size * 1024 block size * 5 gradaccum * 8 GPUs
        batch_size = 12
        block_size = 1024
        gradient_accumulation_steps = 5 * 8
        max_iters = 600000
        lr_decay_iters = 600000
        eval_interval = 1000
        eval_iters = 200
        log_interval = 10
        weight_decay = 1e-1
        """,
    "train_shakespeare_char": """
        out_dir = 'out-shakespeare-char'
        eval_interval = 250 # we overfit
        always_save_checkpoint = False
        wandb_log = False # override via command line if you like
        dataset = 'shakespeare_char'
        gradient_accumulation_steps = 1
        batch_size = 64
        block_size = 256
        n_layer = 6
        n_head = 6
        n_embd = 384
        dropout = 0.2
        learning_rate = 1e-3
        lr_decay_iters = 5000
        min_lr = 1e-4
        beta2 = 0.99
        warmup_iters = 100
        # device = 'cpu'
        """,
    "finetune_shakespeare": """
        import time

        out_dir = 'out-shakespeare'
        eval_interval = 5
        wandb_run_name = 'ft-' + str(time.time())
        dataset = 'shakespeare'
        init_from = 'gpt2-xl'
        always_save_checkpoint = False
        batch_size = 1
        gradient_accumulation_steps = 32
        max_iters = 20
        learning_rate = 3e-5
        decay_lr = False
        """,
    "eval_gpt2_xl": """
        batch_size = 8
        eval_iters = 500 # use more iterations to get good estimate
        eval_only = True
        wandb_log = False
        init_from = 'gpt2-xl'
        """,
}


@pytest.fixture
def config_file(tmp_path, monkeypatch):
    """A function which writes a config file under the current folder and returns its relative path."""
    monkeypatch.chdir(tmp_path)

    def write(text, name="c.py"):
        lines = [line.strip() for line in text.strip().splitlines()] if text.startswith("\n") else [text]
        Path(name).write_text("\n".join(lines) + "\n")
        return name

    return write


def load(*argv, cls=TrainConfig):
    return load_config(cls, list(argv), usage="python train.py")


def error(*argv):
    with pytest.raises(UserError) as caught:
        load(*argv)
    return str(caught.value)


# ---- the command line


@pytest.mark.parametrize(
    "arg, value",
    [
        ("--max_iters=5000", 5000),
        ("--max_iters=5_000", 5000),
        ("--max_iters=1e4", 10000),
        ("--max_iters=12.0", 12),
        (f"--seed={2**63 - 1}", 2**63 - 1),
        ("--learning_rate=1", 1.0),
        ("--learning_rate=6e-4", 6e-4),
        ("--sus_c=10", 10.0),
        ("--sus_c=inf", math.inf),
        ("--bias=True", True),
        ("--bias=true", True),
        ("--bias=1", True),
        ("--bias=YES", True),
        ("--wandb_log=False", False),
        ("--wandb_log=false", False),
        ("--wandb_log=0", False),
        ("--wandb_log=no", False),
        ("--compile=False", False),
        ("--compile=1", True),
        ("--compile=auto", None),
        ("--compile=None", None),
        ("--out_dir=a=b", "a=b"),
        ("--out_dir=1", "1"),
        ("--out_dir=a b", "a b"),
        ("--wandb_run_name=", ""),
        ("--pos=rope", "rope"),
        ("--device=cuda:1", "cuda:1"),
    ],
)
def test_flag(arg, value):
    cfg = load(arg)
    name = arg[2:].split("=")[0]
    assert getattr(cfg, name) == value and type(getattr(cfg, name)) is type(value)
    assert cfg.explicit == {name}


@pytest.mark.parametrize(
    "arg, message",
    [
        ("--n_layer=abc", "--n_layer=abc: n_layer must be an integer, not 'abc'"),
        ("--n_layer=", "--n_layer=: n_layer must be an integer, not ''"),
        ("--n_layer=1.5", "--n_layer=1.5: n_layer must be an integer, not 1.5"),
        ("--n_layer=inf", "--n_layer=inf: n_layer must be an integer, not inf"),
        ("--n_layer=nan", "--n_layer=nan: n_layer must be an integer, not nan"),
        ("--n_layer=True", "--n_layer=True: n_layer must be an integer, not 'True'"),
        ("--dropout=nan", "--dropout=nan: dropout must be a number, not nan"),
        ("--dropout=none", "--dropout=none: dropout must be a number, not 'none'"),
        ("--bias=2", "--bias=2: bias must be True or False, not '2'"),
        ("--bias=auto", "--bias=auto: bias must be True or False, not 'auto'"),
        (
            "--compile=maybe",
            "--compile=maybe: compile must be True, False or auto (None in a config file), not 'maybe'",
        ),
        ("--n_layer=0", "--n_layer=0: n_layer must be >= 1, not 0"),
        ("--n_kv_head=-1", "--n_kv_head=-1: n_kv_head must be >= 0, not -1"),
        ("--sus_c=0", "--sus_c=0: sus_c must be > 0, not 0.0"),
        ("--dropout=1", "--dropout=1: dropout must be >= 0 and < 1, not 1.0"),
        ("--dropout=-0.1", "--dropout=-0.1: dropout must be >= 0 and < 1, not -0.1"),
        (f"--seed={2**63}", f"--seed={2**63}: seed must be >= 0 and <= {2**63 - 1}, not {2**63}"),
        ("--pos=Rope", "--pos=Rope: pos must be one of learned, rope, not 'Rope'"),
        ("--n_layers=4", "--n_layers=4: unknown key 'n_layers'; did you mean n_layer?"),
        ("--n-layer=4", "--n-layer=4: unknown key 'n-layer'; did you mean n_layer?"),
        ("--N_LAYER=4", "--N_LAYER=4: unknown key 'N_LAYER'; did you mean n_layer?"),
        ("--explicit=4", "--explicit=4: unknown key 'explicit'; --help lists the keys"),
        ("--xyzzy", "--xyzzy: unknown key 'xyzzy'; --help lists the keys"),
        ("--", "--: unknown key ''; --help lists the keys"),
        ("--eval_only", "--eval_only has no value: write --eval_only=True (no spaces)"),
        ("-n_layer=4", "-n_layer=4: a key is written --key=value, with two dashes"),
        ("n_layer=4", "n_layer=4: a key is written --key=value, with two dashes"),
        ("-x", "-x: a key is written --key=value, with two dashes"),
    ],
)
def test_flag_errors(arg, message):
    assert error(arg) == message


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--n_layer", "4"], "--n_layer has no value: write --n_layer=4 (no spaces)"),
        (["--n_layer", "=4"], "--n_layer has no value: write --n_layer=4 (no spaces)"),
        (["--n_layer", "--n_head=4"], "--n_layer has no value: write --n_layer=VALUE (no spaces)"),
    ],
)
def test_a_space_instead_of_an_equals_sign(argv, message):
    assert error(*argv) == message


def test_the_last_of_equal_flags_wins():
    assert load("--n_layer=4", "--n_layer=5").n_layer == 5


# ---- config files


def test_no_arguments_give_the_defaults():
    cfg = load()
    assert cfg == TrainConfig() and cfg.explicit == set()


def test_later_files_win_and_flags_win_over_all(config_file):
    a = config_file("n_layer = 1\nn_head = 2\nn_embd = 64", "a.py")
    b = config_file("n_head = 4\nn_embd = 128", "b.py")
    for argv in ([a, b, "--n_embd=256"], [a, "--n_embd=256", b], ["--n_embd=256", a, b]):
        cfg = load(*argv)
        assert (cfg.n_layer, cfg.n_head, cfg.n_embd) == (1, 4, 256)
        assert cfg.explicit == {"n_layer", "n_head", "n_embd"}
    assert load(b, a).n_head == 2


def test_files_are_independent_programs(config_file):
    """A file sees neither another's names nor the caller's, and leaves sys.argv and sys.modules as they were."""
    config_file("n_head = 4", "a.py")
    config_file("n_layer = n_head", "b.py")
    argv = list(sys.argv)
    assert error("a.py", "b.py") == "b.py, line 1: NameError: name 'n_head' is not defined"
    assert sys.argv == argv and "<run_path>" not in sys.modules


@pytest.mark.parametrize(
    "line, value",
    [
        ("max_iters = 600.0", 600),
        ("max_iters = 5 * 8", 40),
        ("learning_rate = 1", 1.0),
        ("compile = None", None),
        ("compile = False", False),
        ("sus_c = float('inf')", math.inf),
        ("out_dir = 'a=b'", "a=b"),
        ("n_layer: int = 4", 4),
    ],
)
def test_file_value(config_file, line, value):
    cfg = load(config_file(line))
    name = line.split(" ")[0].rstrip(":")
    assert getattr(cfg, name) == value and type(getattr(cfg, name)) is type(value)


@pytest.mark.parametrize(
    "line, message",
    [
        ("n_layer = True", "n_layer must be an integer, not True"),
        ("n_layer = 1.5", "n_layer must be an integer, not 1.5"),
        ("n_layer = '4'", "n_layer must be an integer, not '4'"),
        ("n_layer = 4,", "n_layer must be an integer, not (4,)"),
        ("n_layer = int", "n_layer must be an integer, not <class 'int'>"),
        ("dropout = False", "dropout must be a number, not False"),
        ("dropout = float('nan')", "dropout must be a number, not nan"),
        ("bias = 1", "bias must be True or False, not 1"),
        ("bias = None", "bias must be True or False, not None"),
        ("out_dir = 5", "out_dir must be text, not 5"),
        ("compile = 'auto'", "compile must be True, False or auto (None in a config file), not 'auto'"),
        ("n_layer = 0", "n_layer must be >= 1, not 0"),
        ("norm = 'rms'", "norm must be one of layernorm, rmsnorm, not 'rms'"),
        (
            "n_layers = 4",
            "unknown key 'n_layers'; did you mean n_layer? (a helper's name starts with an underscore: _n_layers)",
        ),
        ("xyzzy = 4", "unknown key 'xyzzy'; --help lists the keys (a helper's name starts with an underscore: _xyzzy)"),
        (
            "from math import pi",
            "unknown key 'pi'; --help lists the keys (a helper's name starts with an underscore: _pi)",
        ),
        ("n_layer: 4", "':' sets no value; write n_layer = VALUE"),
        ("n_layer = ", "SyntaxError: invalid syntax (its lines are Python: key = value)"),
        ("n_layer = 1 / 0", "ZeroDivisionError: division by zero"),
        ("import no_such_module_", "ModuleNotFoundError: No module named 'no_such_module_'"),
    ],
)
def test_file_errors_name_file_and_line(config_file, line, message):
    name = config_file(f"# a comment\nn_head = 4\n{line}\nn_embd = 64")
    assert error(name) == f"{name}, line 3: {message}"


def test_a_huge_integer_is_no_number(config_file):
    message = error(config_file("dropout = 10 ** 400"))
    assert message.startswith("c.py, line 1: dropout must be a number, not 1000")


def test_an_error_in_a_called_function_is_at_its_line_in_the_file(config_file):
    config_file("def _f():\n    return [][1]\n\nn_layer = _f()")
    assert error("c.py") == "c.py, line 2: IndexError: list index out of range"


def test_an_error_in_an_imported_module_is_at_the_import(config_file, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    config_file("n_layer = (", "broken_module_.py")
    config_file("n_head = 4\nimport broken_module_")
    assert error("c.py").startswith("c.py, line 2: SyntaxError: '(' was never closed")


def test_a_name_without_a_visible_assignment_still_names_the_file(config_file):
    config_file("globals()['xyzzy'] = 1")
    assert error("c.py").startswith("c.py: unknown key 'xyzzy'")


@pytest.mark.parametrize("content", [b"out_dir = '\xff\xfe'\n", b"\x00\x01\x02"])
def test_a_file_which_is_no_text(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    Path("c.py").write_bytes(content)
    assert error("c.py").startswith(("c.py: SyntaxError: ", "c.py: ValueError: ", "c.py, line 1: SyntaxError: "))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file(config_file):
    os.chmod(config_file("n_layer = 4"), 0)
    assert error("c.py").startswith("c.py: PermissionError: ")


def test_helpers_in_a_file(config_file):
    config_file(
        "import math\nfrom math import sqrt\nfrom pathlib import Path\n_x = 3\ndef f():\n    return 4\n"
        "class C:\n    depth: int\nn_layer = f() + _x"
    )
    cfg = load("c.py")
    assert cfg.n_layer == 7 and cfg.explicit == {"n_layer"}


def test_a_missing_file(config_file, tmp_path):
    Path("config").mkdir()
    config_file("n_layer = 4", "config/long_ctx.py")
    assert error("config/long_ctx") == "'config/long_ctx': no such config file; did you mean config/long_ctx.py?"
    assert error("config/long-ctx.py") == "'config/long-ctx.py': no such config file; did you mean config/long_ctx.py?"
    elsewhere = "no such config file; give the path of a config file, or --key=value"
    assert error("config") == "'config' is a folder, and no config file; that of a run is given by --out_dir=config"
    for arg in ("nowhere/x.py", "", "4", "x" * 5000, "x" * 300 + "/a.py"):
        assert error(arg) == f"{arg!r}: {elsewhere}"


# ---- nanoGPT's own files


@pytest.mark.parametrize("name", NANOGPT_STYLE)
def test_nanogpt_files_load_and_validate(config_file, name):
    cfg = load(config_file(NANOGPT_STYLE[name]), "--attn_backward=exact")
    validate(cfg)
    assert cfg.explicit == {"attn_backward", *re.findall(r"^ *(\w+) ?=", NANOGPT_STYLE[name], re.MULTILINE)}


def test_nanogpt_values(config_file):
    assert load(config_file(NANOGPT_STYLE["train_gpt2"])).gradient_accumulation_steps == 40
    assert load(config_file(NANOGPT_STYLE["finetune_shakespeare"])).wandb_run_name.startswith("ft-1")


def test_nanogpt_dropout_meets_sus(config_file):
    validate(load(config_file(NANOGPT_STYLE["train_shakespeare_char"])))
    with pytest.raises(UserError, match="attn_backward=sus does not support"):
        validate(load("c.py", "--attn_backward=sus"))
    validate(load("c.py", "--attn_backward=sus", "--dropout=0.0"))


# ---- what keys demand of each other


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--n_embd=100", "--n_head=3"], "n_embd=100 must be a multiple of n_head=3, or give --head_dim=64, say"),
        (["--n_head=12", "--n_kv_head=5"], "n_head=12 must be a multiple of n_kv_head=5 (0: as n_head)"),
        (["--n_head=12", "--n_kv_head=24"], "n_head=12 must be a multiple of n_kv_head=24 (0: as n_head)"),
        (["--n_embd=36", "--pos=rope"], "pos=rope needs an even head dimension, but n_embd / n_head = 36 / 12 = 3"),
        (
            ["--dropout=0.1", "--attn_backward=sus"],
            "dropout=0.1 includes attention dropout, which attn_backward=sus does not support: "
            "set --dropout=0.0 or --attn_backward=exact",
        ),
        (
            ["--backprop=analytic", "--init_from=gpt2", "--lora_rank=2", "--lora_dropout=0.1"],
            "lora_dropout=0.1 is not covered by backprop=analytic: set --lora_dropout=0.0 or --backprop=autograd",
        ),
        (
            ["--backprop=analytic", "--dropout=0.1"],
            "dropout=0.1 is not covered by backprop=analytic: set --dropout=0.0 or --backprop=autograd",
        ),
        (
            ["--backprop=analytic", "--attn_backward=sus", "--sus_c=auto"],
            "sus_c=auto measures its noise by autograd, so it is not covered by backprop=analytic: give a number, e.g. "
            "--sus_c=4, or "
            "--backprop=autograd",
        ),
        (
            ["--backprop=analytic", "--compile=True"],
            "compile=True compiles autograd's backward, not that of backprop=analytic: set "
            "--compile=False or --backprop=autograd",
        ),
        (
            ["--dropout=0.1", "--attn_backward=lowrank"],
            "dropout=0.1 includes attention dropout, which attn_backward=lowrank does not "
            "support: set --dropout=0.0 or --attn_backward=exact",
        ),
        (
            ["--lowrank_degree=3"],
            "lowrank_degree=3 must be even: polynomials of odd degree are negative somewhere, and weights must not be",
        ),
        (
            ["--qk_norm_scale=0.5"],
            "qk_norm_scale=0.5 is the gain of qk_norm, which is off: set --qk_norm=True, or --qk_norm_scale=0",
        ),
        (
            ["--lr_decay_iters=100"],
            "lr_decay_iters=100 is below warmup_iters=2000: raise the one (usually to max_iters), "
            "lower the other, or set --decay_lr=False",
        ),
        (
            ["--learning_rate=1e-5"],
            "min_lr=6e-05 is above learning_rate=1e-05: lower the one (usually to "
            "learning_rate / 10), raise the other, or set --decay_lr=False",
        ),
        (
            ["--rope_scaling=8"],
            "rope_scaling=8.0 is for rotary positions, and pos=learned: leave it out, or set --pos=rope",
        ),
        (["--lora_alpha=8"], "lora_alpha=8.0 needs adapters: give --lora_rank=8, say, or leave lora_alpha out"),
        (
            ["--lora_targets=c_fc", "--init_from=gpt2"],
            "lora_targets=c_fc needs adapters: give --lora_rank=8, say, or leave lora_targets out",
        ),
        (["--lora_dropout=0.1"], "lora_dropout=0.1 needs adapters: give --lora_rank=8, say, or leave lora_dropout out"),
        (["--lora_rank=8"], "lora_rank=8 needs a trained model, the base: --init_from=PATH of a checkpoint, or gpt2"),
        (
            ["--lora_rank=8", "--init_from=gpt2", "--lora_base=a"],
            "lora_base=a is for resuming a run with adapters, whose base has moved: "
            "leave it out; --init_from=PATH gives a new run's base",
        ),
        (
            ["--lora_rank=8", "--init_from=gpt2", "--lora_targets=c_fc,c_proj", "--attn_backward=sus", "--sus_c=auto"],
            "sus_c=auto goes by the gradient of c_attn, which lora_targets=c_fc,c_proj leaves out: add c_attn, or give "
            "a number",
        ),
        (["--out_dir="], "out_dir is empty: name a folder"),
        (["--dataset="], "dataset is empty: name a folder"),
    ],
)
def test_validate_refuses(argv, message):
    with pytest.raises(UserError) as caught:
        validate(load(*argv))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--n_kv_head=12"],
        ["--n_kv_head=1"],
        ["--n_embd=36"],
        ["--pos=rope"],
        ["--dropout=0.1", "--attn_backward=exact"],
        ["--sus_c=inf"],
        ["--lr_decay_iters=2000"],
        ["--lr_decay_iters=100", "--decay_lr=False"],
        ["--learning_rate=1e-5", "--decay_lr=False"],
        ["--learning_rate=6e-5"],
        ["--max_iters=0"],
        ["--pos=rope", "--rope_scaling=8"],
        ["--lora_rank=0", "--lora_alpha=8"],
        [
            "--init_from=gpt2",
            "--lora_rank=4",
            "--lora_targets=c_fc, attn.c_attn",
            "--attn_backward=sus",
            "--sus_c=auto",
        ],
        ["--backprop=analytic", "--attn_backward=sus"],
        ["--backprop=analytic", "--sus_c=auto"],
        ["--backprop=analytic", "--compile=False", "--activation_checkpointing=True"],
    ],
    ids=" ".join,
)
def test_validate_accepts(argv):
    validate(load(*argv))


def test_the_defaults_obey_their_own_types_and_bounds():
    for field in dataclasses.fields(TrainConfig):
        default = "none" if field.default is None else field.default
        assert getattr(load(f"--{field.name}={default}"), field.name) == field.default


def test_nanogpt_keys_are_here():
    names = """out_dir eval_interval log_interval eval_iters eval_only always_save_checkpoint init_from dataset
        gradient_accumulation_steps batch_size block_size n_layer n_head n_embd dropout bias learning_rate max_iters
        weight_decay beta1 beta2 grad_clip decay_lr warmup_iters lr_decay_iters min_lr backend device dtype compile
        wandb_log wandb_project wandb_run_name""".split()
    assert set(names) <= {field.name for field in dataclasses.fields(TrainConfig)}


# ---- --help


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["--n_layers=oops", "nowhere.py", "--help"]])
def test_help(capsys, argv):
    with pytest.raises(SystemExit) as caught:
        load(*argv)
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("python train.py\n") and max(map(len, out.splitlines())) <= 100
    for field in dataclasses.fields(TrainConfig):
        default = "auto" if field.default is None else field.default
        lines = [line for line in out.splitlines() if line.startswith(f"  --{field.name}={default} ")]
        assert len(lines) == 1 and field.metadata["help"].split()[0] in lines[0]
        assert all(choice in out for choice in field.metadata["choices"] or ())
    assert "\nModel\n" in out


def test_another_dataclass_even_with_text_annotations(capsys):
    """`from __future__ import annotations` in a script turns the types of its fields into text."""
    cls = dataclasses.make_dataclass(
        "Prepare",
        [
            ("input", "str", key("", "i")),
            ("rate", "float", key(1.0, "r")),
            ("fast", "bool | None", key(None, "f", section="Speed")),
        ],
    )
    cfg = load("--rate=2", "--fast=auto", cls=cls)
    assert (cfg.input, cfg.rate, cfg.fast) == ("", 2.0, None) and type(cfg.rate) is float
    with pytest.raises(SystemExit):
        load("--help", cls=cls)
    assert "  --fast=auto  bool   f\n" in capsys.readouterr().out


def test_key_bounds():
    cls = dataclasses.make_dataclass("Bounds", [("x", float, key(0.5, "x", above=0, high=1))])
    assert load("--x=1", cls=cls).x == 1
    for bad in ("0", "1.01", "inf"):
        with pytest.raises(UserError, match=r"x must be > 0 and <= 1, not"):
            load(f"--x={bad}", cls=cls)


def test_a_file_of_another_kind_is_not_run(tmp_path):
    (tmp_path / "notes.txt").write_text("n_layer = 3")
    with pytest.raises(UserError, match=r"notes.txt' is no config file, whose name ends in .py"):
        load(str(tmp_path / "notes.txt"))


# ---- run_main


def run(code):
    root = Path(__file__).resolve().parent.parent
    return subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)


def test_run_main_shows_a_user_error_without_a_traceback():
    done = run("from configurator import *\ndef main(): raise UserError('no such thing')\nrun_main(main)")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "error: no such thing\n")


def test_run_main_on_ctrl_c():
    done = run("import configurator\nraise KeyboardInterrupt")  # as torch is imported
    assert done.stderr == "interrupted\n" and done.stdout == ""
    done = run("import configurator\nraise KeyError('bug')")
    assert "Traceback" in done.stderr and "bug" in done.stderr
    done = run("from configurator import *\ndef main(): raise KeyboardInterrupt\nrun_main(main)")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_run_main_ends_quietly_when_its_reader_leaves():
    code = "from configurator import *\ndef main(): print('x' * 10**6)\nrun_main(main)"
    script = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} | head -c 5"
    done = subprocess.run(
        script, shell=True, capture_output=True, text=True, cwd=Path(__file__).resolve().parent.parent
    )
    assert done.stdout == "xxxxx" and done.stderr == ""


def test_run_main_hides_no_bug():
    done = run("from configurator import *\ndef main(): raise KeyError('bug')\nrun_main(main)")
    assert done.returncode == 1 and "Traceback" in done.stderr and "KeyError: 'bug'" in done.stderr


def test_run_main_lets_success_through(capsys):
    run_main(lambda: print("done"))
    assert capsys.readouterr().out == "done\n"


def test_the_bottom_layer_imports_nothing_heavy():
    done = run("import sys, configurator\nprint(sorted({'torch', 'numpy', 'wandb'} & set(sys.modules)))")
    assert done.stdout == "[]\n"


@dataclasses.dataclass
class Several:
    input: tuple[str, ...] = key((), "files")
    out: str = key("", "folder")


def test_a_key_of_several_texts(tmp_path):
    """All that are given on the command line count; they win over a config file's, as with any key."""
    load = lambda *argv: load_config(Several, list(argv), usage=None)
    assert load().input == () and load("--input=a").input == ("a",)
    assert load("--input=a", "--out=x", "--input=b,c", "--out=y") == Several(("a", "b,c"), "y")
    for value, expected in ("'a'", ("a",)), ("['a', 'b']", ("a", "b")), ("('a',)", ("a",)):
        (tmp_path / "c.py").write_text(f"input = {value}")
        assert load(str(tmp_path / "c.py")).input == expected
        assert load("--input=d", str(tmp_path / "c.py")).input == ("d",)
    for value in "5", "[5]", "None":
        (tmp_path / "c.py").write_text(f"input = {value}")
        with pytest.raises(UserError, match=r"c.py, line 1: input must be text, or a list of texts, not "):
            load(str(tmp_path / "c.py"))


def test_help_of_a_key_of_several_texts(capsys):
    with pytest.raises(SystemExit):
        load_config(Several, ["--help"], usage=None)
    assert re.search(r"--input=  +str  files\n", capsys.readouterr().out)
