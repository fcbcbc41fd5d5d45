"""A GPT with weights that exist: those of a checkpoint, of a base and its adapters, or of GPT-2."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from configurator import UserError
from model import ARCHITECTURE_KEYS, GPT, TRAINING_KEYS, GPTConfig
from training import checkpoint
from training.lora import add_adapters, fingerprint, merge

PRETRAINED = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


def model_args(config: GPTConfig) -> dict:
    """The architecture's part of a config: what a checkpoint keeps as `model_args`."""
    return {name: value for name, value in asdict(config).items() if name in ARCHITECTURE_KEYS}


def model_from_checkpoint(saved: dict, path: Path, lora_base: str = "", **training_keys: Any) -> GPT:
    """The model of a checkpoint's dict, ours or nanoGPT's; path is its file. UserError if they do not fit.

    Of an adapter checkpoint it is the base with the adapters merged. lora_base: where the base is, see `adapted_model`.
    """
    if saved.get("lora"):
        return merge(adapted_model(saved, path, lora_base, **training_keys))
    if lora_base:
        raise UserError(f"lora_base={lora_base} is for adapters, and {path} holds a whole model: leave it out")
    architecture = {k: v for k, v in saved["model_args"].items() if k not in TRAINING_KEYS}
    if unknown := architecture.keys() - set(ARCHITECTURE_KEYS):
        raise UserError(f"{path} is of another version: its model has the unknown keys {', '.join(sorted(unknown))}")
    model = GPT(GPTConfig(**architecture, **training_keys))
    load_weights(model, saved["model"], path)
    return model


def adapted_model(saved: dict, path: Path, lora_base: str = "", lora_dropout: float = 0.0, **training_keys: Any) -> GPT:
    """The model of an adapter checkpoint's dict, its adapters not merged; path is its file.

    lora_base: the base's file or folder, or GPT-2's name; empty: as the checkpoint has it. UserError if it is not
    there, or another than the adapters were trained on.
    """
    lora = saved["lora"]
    base = lora_base or lora["base"]
    if base in PRETRAINED:
        model = load_pretrained(base, **training_keys)
    else:
        folder = path.resolve().parent  # or the one above, for a run that was moved into earlier-1/
        places = [Path(lora_base)] if lora_base else [folder / base, folder.parent / base]
        files = [checkpoint.find(place) for place in places]
        base = next((file for file in files if os.path.isfile(file)), files[0]).resolve()
        if not os.path.isfile(base):
            raise UserError(
                f"{path} holds adapters, and the model they belong to is not at {base}: if it has moved, say "
                "where to, by --lora_base=PATH of train.py, sample.py or merge_lora.py"
            )
        model = model_from_checkpoint(load_base(base), base, **training_keys)
    if (actual := fingerprint(model)) != lora["fingerprint"]:
        raise UserError(
            f"{path} holds adapters of other weights than those in {base}, which was trained on since or is another "
            f"model (sha256 {lora['fingerprint'][:16]}... expected, {actual[:16]}... found): give the right weights, a "
            "copy or those of an earlier-N folder, by --lora_base=PATH of train.py, sample.py or merge_lora.py"
        )
    for name, value in model_args(model.config).items():  # what leaves no trace in the weights
        if name not in ("block_size", "rope_scaling") and saved["model_args"].get(name, value) != value:
            raise UserError(
                f"{path} holds adapters of a model with {name}={saved['model_args'][name]}, but {base} has {value}: "
                "give the right base by --lora_base=PATH"
            )
    model.set_context(saved["model_args"]["block_size"], saved["model_args"].get("rope_scaling", 1.0))
    weights = model.state_dict()
    add_adapters(model, lora["rank"], lora["alpha"], lora["targets"], lora_dropout)
    load_weights(model, saved["model"] | weights, path)
    return model


def load_base(path: Path) -> dict:
    """The checkpoint at path, to be fine-tuned. UserError if it holds adapters only."""
    saved = checkpoint.load(path)
    if saved.get("lora"):
        raise UserError(
            f"{path} holds adapters, not a whole model: merge them first, by "
            f"python merge_lora.py --out_dir={path.parent} --merged=FOLDER"
        )
    return saved


def load_weights(model: GPT, weights: dict, path: Path) -> None:
    """UserError if the weights, of the checkpoint at path, are not this model's."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reasons = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
        raise UserError(f"{path}: its weights do not fit its model_args: {' '.join(reasons)[:300]}") from None


def load_pretrained(name: str, **training_keys: Any) -> GPT:
    """GPT-2's weights (name: one of PRETRAINED) from the hub or its cache, by `transformers`. UserError."""
    try:
        from transformers import GPT2LMHeadModel

        hf = GPT2LMHeadModel.from_pretrained(name)
    except ImportError:
        raise UserError(f"init_from={name} needs transformers: pip install -r requirements-dev.txt") from None
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"init_from={name}: the weights can't be had, neither from the hub nor from its cache on this "
            f"machine ({reason})"
        ) from None
    return from_hf(hf, **training_keys)


def from_hf(hf: Any, **training_keys: Any) -> GPT:
    """A GPT with the weights of `hf`, a transformers GPT2LMHeadModel."""
    h = hf.config
    config = GPTConfig(
        block_size=h.n_positions,
        vocab_size=h.vocab_size,
        n_layer=h.n_layer,
        n_head=h.n_head,
        n_embd=h.n_embd,
        bias=True,
        **training_keys,
    )
    model = GPT(config)
    theirs = hf.state_dict()
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            # their linear layers store the transposed matrix
            transposed = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
            weight.copy_(theirs[name].T if transposed else theirs[name])
    return model
