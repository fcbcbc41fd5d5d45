"""Imports point downward only, and what is optional or slow to load is imported where it is used."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "configurator": set(),
    "sus_backends.reference": set(),
    "sus_backends.cpu_kernels": {"sus_backends.reference"},
    "sus_backends.cpu": {"sus_backends", "sus_backends.cpu_kernels", "sus_backends.reference"},
    "sus_backends.triton_kernels": {"sus_backends"},
    "sus_backends.triton": {"sus_backends", "sus_backends.reference", "sus_backends.triton_kernels"},
    "sus_attn": {"sus_backends", "sus_backends.reference"},
    "data.tokenizer": {"configurator"},
    "data.corpus": {"configurator"},
    "data.loader": {"configurator", "data.corpus", "data.tokenizer"},
    "data.hub": {"configurator", "data.corpus", "data.tokenizer"},
    "training.checkpoint": {"configurator"},
    "training.record": {"configurator"},
    "training.device": {"configurator"},
    "training.lora": {"configurator"},
    "lowrank_attn": {"sus_backends.reference", "sus_attn"},
    "model": {"training", "configurator", "training.lora", "lowrank_attn", "sus_attn"},
    "backprop": {"training.lora", "model", "sus_attn"},
    "training.probe": {"training.device", "lowrank_attn", "model", "sus_attn"},
    "training.retention": {"sus_attn"},
}
LAZY = {
    "wandb",
    "tiktoken",
    "transformers",
    "matplotlib",
    "numba",
    "llvmlite",
    "triton",
    "datasets",
    "huggingface_hub",
    "pyarrow",
    "zstandard",
}
KERNELS = {"cpu_kernels.py", "triton_kernels.py"}  # themselves imported where they are used
OURS = {"train", "sample", "experiments"} | {name.partition(".")[0] for name in MAY_IMPORT}


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("module", MAY_IMPORT)
def test_imports_point_downward(module):
    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
    ours = {name for name in imports(tree) if name.partition(".")[0] in OURS}
    assert ours <= MAY_IMPORT[module]


def files():
    return [p for p in ROOT.rglob("*.py") if not {".venv", "tests"} & set(p.relative_to(ROOT).parts)]


def test_optional_packages_are_imported_where_they_are_used():
    assert len(files()) > 15
    for path in files():
        body = ast.Module(
            body=[n for n in ast.parse(path.read_text()).body if isinstance(n, ast.Import | ast.ImportFrom)],
            type_ignores=[],
        )
        lazy = LAZY | {path.removesuffix(".py") for path in KERNELS}
        names = {part for name in imports(body) for part in name.split(".")}
        assert path.name in KERNELS or not names & lazy, path


def test_no_file_shadows_a_module_of_the_standard_library():
    names = {p.stem for p in ROOT.glob("*.py")} | {p.name for p in ROOT.iterdir() if p.is_dir()}
    assert not names & sys.stdlib_module_names
