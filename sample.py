"""Sample text from a trained model.

    python sample.py --out_dir=out-long-ctx --start='import os' --num_samples=3
    python sample.py --out_dir=out-long-ctx --start=FILE:prompt.txt --temperature=0.7 --top_p=0.9
    python sample.py --init_from=models/smollm2 --start='What is the answer to life?'    # a Hugging Face folder
    python sample.py --init_from=gpt2 --start='What is the answer to life?'              # or a name on its hub

The text appears as it is drawn. Tokenizer and model come from the checkpoint, which needs nothing else.
"""

import codecs
import glob
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from configurator import UserError, key, load_config, run_main  # isort: skip (before torch)

import torch

from data.tokenizer import Tokenizer, tokenizer_from_meta
from model import GPT
from training import checkpoint
from training.device import resolve_device
from training.weights import load_named, model_from_checkpoint


@dataclass
class SampleConfig:
    init_from: str = key(
        "resume",
        "resume: out_dir's checkpoint; or a Hugging Face folder, or a name on the hub, such as gpt2",
        section="Model",
    )
    out_dir: str = key("out", "folder of the checkpoint")
    ckpt: str = key("ckpt.pt", "its file: ckpt.pt (the latest), ckpt_best.pt, or ckpt-N.pt of keep_checkpoints")
    lora_base: str = key("", "of a checkpoint with adapters: where the base is now, if it has moved")
    start: str = key("\n", "the prompt; FILE:prompt.txt reads it from a file", section="Text")
    num_samples: int = key(10, "samples to draw", low=1)
    max_new_tokens: int = key(500, "tokens of each sample", low=1)
    temperature: float = key(0.8, "below 1: less random; 0: always the likeliest token", low=0)
    top_k: int = key(200, "draw from the k likeliest tokens; 0: from all", low=0)
    top_p: float = key(1.0, "draw from the fewest tokens that hold probability p", above=0, high=1)
    stop_at_eot: bool = key(True, "end a sample at the end-of-text token")
    seed: int = key(1337, "seeds the draws", low=0, high=2**63 - 1)
    device: str = key("auto", "auto, cpu, cuda, cuda:1, mps", section="Machine")
    dtype: str = key("auto", "of the forward", choices=("auto", "float32", "bfloat16", "float16"))
    compile: bool = key(False, "torch.compile: slow to start, then faster")


def main() -> None:
    cfg = load_config(SampleConfig, sys.argv[1:], usage=__doc__)
    device = resolve_device(cfg.device, cfg.dtype)
    start = read_start(cfg.start)
    if cfg.init_from == "resume":
        model, tokenizer = load_model(find_checkpoint(cfg.out_dir, cfg.ckpt), cfg.lora_base)
    else:
        model, tokenizer = as_model(*load_named(cfg.init_from))
    model.eval().to(device.device)
    if cfg.compile:
        model.compile(dynamic=True)

    prompt = tokenizer.encode(start).tolist()
    if not prompt and tokenizer.eot is None:
        raise UserError("--start is empty: give at least one character to continue")
    prompt = prompt or [tokenizer.eot]
    if len(prompt) > model.config.block_size:
        print(
            f"the prompt has {len(prompt)} tokens; the model reads the last {model.config.block_size} of them",
            file=sys.stderr,
        )
    generator = torch.Generator().manual_seed(cfg.seed)
    for _ in range(cfg.num_samples):
        decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode  # a token may end inside a character
        print(start, end="", flush=True)
        with device.autocast():
            for token in model.generate(
                prompt,
                cfg.max_new_tokens,
                temperature=cfg.temperature,
                top_k=cfg.top_k or None,
                top_p=cfg.top_p if cfg.top_p < 1 else None,
                n_vocab=tokenizer.n_vocab,
                generator=generator,
            ):
                if token == tokenizer.eot and cfg.stop_at_eot:
                    break
                print(decode(tokenizer.decode_bytes(token)), end="", flush=True)
        print(decode(b"", final=True) + "\n---------------")


def read_start(start: str) -> str:
    if not start.startswith("FILE:"):
        return start
    path = Path(start.removeprefix("FILE:"))
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"--start={start}: can't read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"--start={start}: {path} is not UTF-8 text") from None


def find_checkpoint(out_dir: str, ckpt: str) -> Path:
    """The file. UserError if it isn't there, but others are."""
    path = Path(out_dir) / ckpt
    if not os.path.isfile(path) and (others := sorted(glob.glob("*.pt", root_dir=path.parent))):
        raise UserError(f"no checkpoint at {path}; --ckpt=NAME takes another one there: {', '.join(others)}")
    return path


def load_model(path: Path, lora_base: str = "") -> tuple[GPT, Tokenizer]:
    """The model and the tokenizer of a checkpoint."""
    return as_model(checkpoint.load(path), path, lora_base)


def as_model(saved: dict, path: Path, lora_base: str = "") -> tuple[GPT, Tokenizer]:
    """The model and the tokenizer of what `path` holds: a checkpoint's dict, or load_base's."""
    model = model_from_checkpoint(saved, path, lora_base)
    if saved.get("tokenizer") is None and model.config.vocab_size not in (50257, 50304):
        raise UserError(
            f"{path} does not say which tokenizer it was trained with: only models with GPT-2's tokens are read without"
        )
    return model, tokenizer_from_meta(saved.get("tokenizer") or {"name": "gpt2"})


if __name__ == "__main__":
    run_main(main)
