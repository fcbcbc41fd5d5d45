"""A GPT with weights that exist: those of a checkpoint, of a base and its adapters, or of a Hugging Face folder."""

import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from configurator import UserError
from model import ARCHITECTURE_KEYS, GPT, TRAINING_KEYS, GPTConfig
from rope import ROPE_KEYS
from training import checkpoint, hugging_face
from training.hugging_face_tokenizer import tokenizer_of
from training.lora import add_adapters, fingerprint, merge

CONTEXT_KEYS = ("block_size", *ROPE_KEYS)  # what may change from a base to its fine-tuning


def at(place: str | Path) -> Path | None:
    """The weights there: a checkpoint's file, or a Hugging Face folder; None if there are none."""
    file = checkpoint.find(place)
    if os.path.isfile(file):
        return file
    return Path(place) if hugging_face.is_folder(place) else None


def locate(name: str) -> Path:
    """The weights that a path, or a name on the hub, means; from there they are fetched. UserError."""
    there = at(name)
    if there is None and on_hub(name):
        return hugging_face.from_hub(name)
    if there is None:
        words = "scratch", "resume", *hugging_face.GPT2
        if (meant := name.lower()) in words:
            raise UserError(f"init_from={name}: did you mean --init_from={meant}?")
        raise UserError(
            f"init_from={name} is none of {', '.join(words)}, no name on the Hugging Face hub, and no path of a "
            f"checkpoint, of its folder or of a Hugging Face folder"
        )
    return there


def on_hub(name: str) -> bool:
    """Whether a name is one on the hub, and no path here."""
    owned = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not os.path.lexists(name.partition("/")[0])
    return name in hugging_face.GPT2 or bool(owned)


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

    lora_base: the base's file or folder, or its name on the hub; empty: as the checkpoint has it. UserError if it is
    not there, or another than the adapters were trained on.
    """
    lora = saved["lora"]
    base = lora_base or lora["base"]
    if on_hub(base):
        found = hugging_face.from_hub(base)
    else:
        folder = path.resolve().parent  # or the one above, for a run that was moved into earlier-1/
        places = [Path(lora_base)] if lora_base else [folder / base, folder.parent / base]
        there = next(filter(None, map(at, places)), None)
        if there is None:
            raise UserError(
                f"{path} holds adapters, and the model they belong to is not at {places[0].resolve()}: if it has "
                "moved, say where to, by --lora_base=PATH of train.py, sample.py or export.py"
            )
        found = there.resolve()
    model, base = model_from_checkpoint(load_base(found), found, **training_keys), str(found)
    if (actual := fingerprint(model)) != lora["fingerprint"]:
        raise UserError(
            f"{path} holds adapters of other weights than those in {base}, which was trained on since or is another "
            f"model (sha256 {lora['fingerprint'][:16]}... expected, {actual[:16]}... found): give the right weights, a "
            "copy or those of an earlier-N folder, by --lora_base=PATH of train.py, sample.py or export.py"
        )
    for name, value in model_args(model.config).items():  # what leaves no trace in the weights
        if name not in CONTEXT_KEYS and saved["model_args"].get(name, value) != value:
            raise UserError(
                f"{path} holds adapters of a model with {name}={saved['model_args'][name]}, but {base} has {value}: "
                "give the right base by --lora_base=PATH"
            )
    model.set_context(**{name: saved["model_args"][name] for name in CONTEXT_KEYS if name in saved["model_args"]})
    weights = model.state_dict()
    add_adapters(model, lora["rank"], lora["alpha"], lora["targets"], lora_dropout)
    load_weights(model, saved["model"] | weights, path)
    return model


def load_named(name: str) -> tuple[dict, Path]:
    """`load_base` of what a path, or a name on the hub, means, and where that is. UserError."""
    path = locate(name)
    saved = load_base(path)
    return saved | ({"tokenizer": {"name": "gpt2"}} if name in hugging_face.GPT2 else {}), path


def load_base(path: Path) -> dict:
    """The checkpoint at path, to be fine-tuned; of a Hugging Face folder what of it there is in one. UserError if it
    holds adapters only.
    """
    if path.is_dir():
        folder = hugging_face.read(path)
        tokenizer = tokenizer_of(path)
        return {"model": folder.weights, "model_args": folder.architecture, "config": {}, "tokenizer": tokenizer}
    saved = checkpoint.load(path)
    if saved.get("lora"):
        raise UserError(
            f"{path} holds adapters, not a whole model: merge them first, by "
            f"python export.py --out_dir={path.parent} --plain=FOLDER"
        )
    return saved


def load_weights(model: GPT, weights: dict, path: Path) -> None:
    """UserError if the weights, of the checkpoint at path, are not this model's."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reasons = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
        raise UserError(f"{path}: its weights do not fit its model_args: {' '.join(reasons)[:300]}") from None
