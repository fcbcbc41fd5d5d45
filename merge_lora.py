"""Write an adapter checkpoint and its base as one plain checkpoint, which anything reads.

    python merge_lora.py --out_dir=out-lora --merged=out-merged

The result has no optimizer: it is for sampling, for experiments, and for fine-tuning it again (--init_from=out-merged).
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from configurator import UserError, key, load_config, run_main
from sample import find_checkpoint
from training import checkpoint
from training.weights import model_args, model_from_checkpoint


@dataclass
class MergeConfig:
    out_dir: str = key("out", "folder of the adapter checkpoint")
    ckpt: str = key("ckpt.pt", "its file: ckpt.pt (the latest), ckpt_best.pt, or ckpt-N.pt of keep_checkpoints")
    lora_base: str = key("", "where the base is now, if it has moved")
    merged: str = key("", "folder to write ckpt.pt to")


def main() -> None:
    cfg = load_config(MergeConfig, sys.argv[1:], usage=__doc__)
    path, target = find_checkpoint(cfg.out_dir, cfg.ckpt), Path(cfg.merged) / "ckpt.pt"
    if not cfg.merged:
        raise UserError("--merged is empty: name the folder to write to")
    if os.path.lexists(target):
        raise UserError(f"{target} exists already: choose another --merged")
    saved = checkpoint.load(path)
    if not saved.get("lora"):
        raise UserError(f"{path} holds a whole model already: there is nothing to merge")
    model = model_from_checkpoint(saved, path, cfg.lora_base)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"can't make {target.parent}: {error.strerror}") from None
    kept = {name: saved[name] for name in ("iter_num", "best_val_loss", "tokenizer") if name in saved}
    config = saved["config"] | {"out_dir": cfg.merged, "lora_rank": 0}
    checkpoint.save(
        target, {"model": model.state_dict(), "model_args": model_args(model.config), "config": config, **kept}
    )
    print(f"{target}: {model.num_params() / 1e6:.2f} M parameters, {target.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_main(main)
