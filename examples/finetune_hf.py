"""Continue the training of a Hugging Face model on long documents with the Trainer, by exact attention and by SUS.

    python examples/smollm2.py                                             # makes models/smollm2
    python examples/finetune_hf.py --text=FOLDER                           # all weights
    python examples/finetune_hf.py --text=FOLDER --lora=16 --steps=100 --learning_rate=2e-4

Both see the same rows of T tokens, each of one document, and start from the same weights. The table shows tokens/s and
losses side by side; what SUS trained is saved. It needs `pip install ".[hf]" tqdm`, and for --lora peft.
"""

import statistics
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configurator import UserError, key, load_config, run_main  # isort: skip (before torch)

from data.reading import files_under, read_text
from experiments.output import print_table

if TYPE_CHECKING:  # transformers is imported where it is used: its import takes a while
    from transformers import PreTrainedTokenizerBase


@dataclass
class FinetuneConfig:
    model: str = key("models/smollm2", "a Hugging Face folder")
    text: str = key("", "a text file, or a folder of them; without it the sources of Python's standard library")
    c: float = key(8.0, "about how many tiles of 64 keys a row keeps in SUS's backward", above=0)
    T: int = key(2048, "tokens in a row", low=2)
    steps: int = key(30, "optimizer steps, of a row each", low=1)
    lora: int = key(0, "the rank of LoRA adapters on all linear layers; 0 trains all weights", low=0)
    learning_rate: float = key(2e-5, "LoRA usually takes ten times as much", above=0)
    out: str = key("out-finetune-hf", "the folder that what SUS trained is saved in")


def main() -> None:
    cfg = load_config(FinetuneConfig, sys.argv[1:], usage=__doc__)
    if not Path(cfg.model, "config.json").exists():
        raise UserError(
            f"no Hugging Face folder {cfg.model}: give one by --model=FOLDER; python examples/smollm2.py makes "
            "models/smollm2"
        )
    tokenizer, rows, held_out = documents(cfg)
    print(f"{len(rows)} rows of {cfg.T:,} tokens for training, {len(held_out)} for validation", flush=True)
    if cfg.T <= 64 * cfg.c:
        print(
            f"note: c = {cfg.c:g} tiles of 64 keys are all of a row here, so that SUS saves nothing: give a larger --T"
        )
    table = [["attention", "tokens/s", "loss, first 10", "last 10 steps", "validation, before", "after"]]
    for attention in ("sdpa", "sus"):
        print(f"== {attention}", flush=True)
        figures = train(cfg, attention, tokenizer, rows, held_out)
        table.append([attention, f"{figures[0]:,.0f}", *(f"{loss:.4f}" for loss in figures[1:])])
    print_table(table)


def documents(cfg: FinetuneConfig) -> tuple["PreTrainedTokenizerBase", list[dict], list[dict]]:
    """Rows as the Trainer takes them. Of each document the last eighth is held out, and some of that validates."""
    import torch
    from transformers import AutoTokenizer, logging

    logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(cfg.model)
    place = Path(cfg.text or sysconfig.get_path("stdlib"))
    paths = [place] if place.is_file() else files_under(place, ("site-packages", "test", "__pycache__"))
    train: list[dict] = []
    held_out: list[dict] = []
    for path in paths if cfg.text else [path for path in paths if path.suffix == ".py"]:
        ids = torch.tensor(tokenizer(read_text(path)).input_ids)
        rows = [{"input_ids": row, "labels": row} for row in ids[: len(ids) // cfg.T * cfg.T].view(-1, cfg.T)]
        cut = len(rows) - len(rows) // 8
        train += rows[:cut]
        held_out += rows[cut:]
    if not held_out:
        raise UserError(
            f"{place} has no document of 8 x T = {8 * cfg.T:,} tokens, of which the last eighth is for validation: "
            "give longer ones by --text, or a smaller --T"
        )
    return tokenizer, train, held_out[:: -(-len(held_out) // 8)]


def train(
    cfg: FinetuneConfig, attention: str, tokenizer: "PreTrainedTokenizerBase", rows: list[dict], held_out: list[dict]
) -> list[float]:
    """tokens/s; the loss of the first and of the last ten steps; the validation loss before and after."""
    import torch
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

    import sus_hf

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append(time.perf_counter())

    ends: list[float] = []

    set_seed(1337)
    model = AutoModelForCausalLM.from_pretrained(cfg.model, attn_implementation=attention)
    if attention == "sus":
        sus_hf.set_retention(model, cfg.c)
    if cfg.lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=cfg.lora, lora_alpha=2 * cfg.lora, target_modules="all-linear"))
    arguments = TrainingArguments(
        cfg.out,
        max_steps=cfg.steps,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        seed=1337,
        learning_rate=cfg.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=cfg.steps // 10,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = Trainer(
        model, arguments, train_dataset=rows, eval_dataset=held_out, callbacks=[Clock()], processing_class=tokenizer
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    if attention == "sus":
        trainer.save_model()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    steps = [end - begin for begin, end in zip(ends, ends[1:])]  # the first compiles kernels
    speed = cfg.T / statistics.median(steps) if steps else float("nan")
    return [speed, statistics.mean(losses[:10]), statistics.mean(losses[-10:]), before, after]


if __name__ == "__main__":
    run_main(main)
