"""The house: imports point downward only, what is optional or slow to load is imported where it is used, and sizes."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A floor's modules may import those of the floors below it. Within a floor the order is that of the line.
FLOORS = [
    "configurator",
    "sus_backends.reference sus_backends.cpu_kernels sus_backends.cpu_poisson sus_backends.cpu"
    " sus_backends.triton_kernels sus_backends.triton",
    "sus_attn sus_hf lowrank_attn exact_attn norms rope mlp loss",
    "model",
    "data.tokenizer data.lock data.reading data.rows data.lengths data.corpus data.loader data.hub",
    "training.device training.lora backprop training.checkpoint training.optimizer training.parallel training.probe"
    " training.record training.retention training.hugging_face"
    " training.hugging_face_tokenizer training.weights training.evaluation training.state",
    "data.stdlib.prepare",  # the default corpus, which train.py makes where it isn't there
    "training.report training.start",
    "train sample export",
]
# The operator and the model know of nothing but what they compute with.
ONLY = {
    "sus_backends": {"sus_backends"},
    "sus_attn": {"sus_backends"},
    "sus_hf": {"sus_attn"},
    "lowrank_attn": {"sus_backends", "sus_attn"},
    "rope": set(),
    "exact_attn": set(),
    "loss": set(),
    "norms": set(),
    "mlp": set(),
    "model": {"sus_attn", "lowrank_attn", "exact_attn", "norms", "rope", "mlp", "loss"},
    "data": {"configurator", "data"},
}
LAZY = {"wandb", "tiktoken", "transformers", "matplotlib", "numba", "llvmlite", "triton",
        "datasets", "huggingface_hub", "safetensors", "tokenizers", "pyarrow", "zstandard"}  # fmt: skip
KERNELS = {"cpu_kernels.py", "cpu_poisson.py", "triton_kernels.py"}  # themselves imported where they are used
MODULES = [module for floor in FLOORS for module in floor.split()]
ROOMS = {"config", "data", "examples", "experiments", "sus_backends", "training"}
OURS = (
    {name.partition(".")[0] for name in MODULES}
    | {"experiments", "tests"}
    | {path.stem for room in ("experiments", "tests") for path in (ROOT / room).glob("*.py")}  # they import by these
)


def imports(tree):
    """The names of the modules that are imported, and of what is taken from packages of ours."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            whole = f"{node.module}." if node.module in ("data", "training", "sus_backends") else ""
            yield from ((whole + alias.name) if whole else node.module for alias in node.names)


def files(*but):
    """Every Python file of the product, tests and the rooms `but` excepted. Other folders are none of ours."""
    found = [*ROOT.glob("*.py"), *(path for room in sorted(ROOMS - {*but}) for path in (ROOT / room).rglob("*.py"))]
    assert len(found) > 15
    return found


def of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downward(module):
    below = set(MODULES[: MODULES.index(module)])
    ours = {name for name in imports(of(ROOT / f"{module.replace('.', '/')}.py")) if name.partition(".")[0] in OURS}
    assert ours <= below
    only = ONLY.get(module, ONLY.get(module.partition(".")[0]))
    assert only is None or {name.partition(".")[0] for name in ours} <= only


def test_every_module_has_its_floor():
    rooms = [ROOT, ROOT / "data", ROOT / "training", ROOT / "sus_backends"]
    prepares = {f"data.{name}.prepare" for name in ("stdlib",)}
    names = prepares | {
        ".".join(p.relative_to(ROOT).with_suffix("").parts) for room in rooms for p in room.glob("[a-z]*.py")
    }
    assert names == set(MODULES)
    assert all((room / "__init__.py").exists() for room in rooms[1:])  # or a package of that name elsewhere would win


def test_nothing_imports_train_but_experiments_and_tests():
    assert not [path for path in files("experiments") if {"train"} & set(imports(of(path)))]


def test_optional_packages_are_imported_where_they_are_used():
    for path in files():
        top = [n for n in of(path).body if isinstance(n, ast.Import | ast.ImportFrom)]
        names = set(imports(ast.Module(body=top, type_ignores=[])))
        lazy = LAZY - {"transformers"} if path.name == "sus_hf.py" else LAZY
        assert path.name in KERNELS or not {name.partition(".")[0] for name in names} & lazy, path
        assert path.name in KERNELS or not names & {
            f"sus_backends.{kernels.removesuffix('.py')}" for kernels in KERNELS
        }, path


def test_scripts_import_torch_after_what_makes_ctrl_c_quiet():
    scripts = [path for path in files("data") if "\n    run_main(" in path.read_text()]
    assert len(scripts) > 10
    for path in scripts:
        top = [n for n in of(path).body if isinstance(n, ast.Import | ast.ImportFrom)]
        names = [name.partition(".")[0] for name in imports(ast.Module(body=top, type_ignores=[]))]
        assert names.index("configurator") < [*names, "torch"].index("torch"), path


def test_no_file_shadows_a_module_of_the_standard_library():
    names = {p.stem for p in ROOT.glob("*.py")} | ROOMS | {"tests"}
    assert not names & sys.stdlib_module_names


def test_files_and_functions_are_read_in_one_sitting():
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files()}
    assert lines[ROOT / "train.py"] <= 350 and lines[ROOT / "model.py"] <= 400
    assert {p.name: n for p, n in lines.items() if p.parent.name == "experiments" and n > 450} == {}
    long = [
        f"{path.name}: {node.name}"
        for path in files()
        if path.name not in KERNELS
        for node in ast.walk(of(path))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 90
    ]
    assert long == []


def test_what_is_laid_out_by_hand_is_little():
    """Lines that the formatter leaves alone, and lines that are longer than it allows, in the whole project."""
    everything = [*files(), *(ROOT / "tests").glob("*.py")]
    lines = [line for path in everything for line in path.read_text(encoding="utf-8").splitlines()]
    assert sum(line.endswith("# fmt: " + "skip") for line in lines) <= 60
    assert sum(len(line) > 120 for line in lines) <= 20
