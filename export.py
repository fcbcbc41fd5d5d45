"""Write a run's model as a Hugging Face folder, or as a plain checkpoint; adapters are merged into their base.

    python export.py --out_dir=out-long-ctx --to=models/mine      # config.json, safetensors, the tokenizer
    python export.py --out_dir=out-lora --plain=out-merged        # a ckpt.pt without adapters

AutoModelForCausalLM.from_pretrained reads the folder, and so do train.py and sample.py (--init_from=models/mine). The
model must be of a type that transformers knows: gpt2, llama, mistral, qwen2 or qwen3. The plain checkpoint has no
optimizer: it is for sampling, for experiments, and for fine-tuning it again (--init_from=out-merged).
"""

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from configurator import UserError, key, load_config, run_main
from data.tokenizer import tokenizer_from_meta
from model import GPT
from sample import find_checkpoint
from training import checkpoint, hugging_face
from training.hugging_face_tokenizer import write_tokenizer
from training.weights import model_args, model_from_checkpoint


@dataclass
class ExportConfig:
    out_dir: str = key("out", "folder of the run")
    ckpt: str = key("ckpt.pt", "its file: ckpt.pt (the latest), ckpt_best.pt, or ckpt-N.pt of keep_checkpoints")
    lora_base: str = key("", "of a checkpoint with adapters: where the base is now, if it has moved")
    to: str = key("", "the Hugging Face folder to make")
    plain: str = key("", "the folder to write a plain ckpt.pt to")


def main() -> None:
    cfg = load_config(ExportConfig, sys.argv[1:], usage=__doc__)
    if bool(cfg.to) == bool(cfg.plain):
        raise UserError("give --to=FOLDER for a Hugging Face folder, or --plain=FOLDER for a plain checkpoint")
    path = find_checkpoint(cfg.out_dir, cfg.ckpt)
    target = Path(cfg.to or Path(cfg.plain, "ckpt.pt"))
    if os.path.lexists(target):
        raise UserError(f"{target} exists already: choose another --{'to' if cfg.to else 'plain'}")
    saved = checkpoint.load(path)
    if cfg.plain and not saved.get("lora"):
        raise UserError(f"{path} holds a whole model already: there is nothing to merge")
    model = model_from_checkpoint(saved, path, cfg.lora_base)
    try:
        if cfg.to:
            write_folder(target, model, saved)
        else:
            write_plain(target, model, saved)
    except OSError as error:
        raise UserError(f"can't write {target}: {error.strerror or error}") from None


def write_plain(target: Path, model: GPT, saved: dict) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    kept = {name: saved[name] for name in ("iter_num", "best_val_loss", "tokenizer") if name in saved}
    config = saved["config"] | {"out_dir": str(target.parent), "lora_rank": 0}
    checkpoint.save(
        target, {"model": model.state_dict(), "model_args": model_args(model.config), "config": config, **kept}
    )
    print(f"{target}: {model.num_params() / 1e6:.2f} M parameters, {target.stat().st_size / 1e6:.1f} MB")


def write_folder(target: Path, model: GPT, saved: dict) -> None:
    """The folder, whole or not at all."""
    kind = hugging_face.type_of(model.config)
    tokenizer = tokenizer_from_meta(saved["tokenizer"]) if "tokenizer" in saved else None
    aside = target.with_name(target.name + ".aside")
    shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed
    try:
        aside.mkdir(parents=True)
        end = {} if tokenizer is None or tokenizer.eot is None else {"eos_token_id": tokenizer.eot}
        hugging_face.write(aside, model, kind, end)
        line = write_tokenizer(aside, tokenizer, model.config.block_size)
        os.rename(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    size = (target / "model.safetensors").stat().st_size
    print(f"{target}: {kind}, {model.num_params() / 1e6:.2f} M parameters, {size / 1e6:.1f} MB\n{line}")


if __name__ == "__main__":
    run_main(main)
