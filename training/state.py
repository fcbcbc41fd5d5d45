"""What a run is made of from step to step: what a checkpoint holds, and a resumed run has again."""

import dataclasses
import math
from pathlib import Path

import torch

from configurator import TrainConfig
from data.loader import Corpus
from model import GPT
from training import checkpoint
from training.device import Device
from training.lora import adapter_state
from training.optimizer import new_optimizer
from training.retention import Retention, new_stats
from training.weights import model_args


class State:
    """Model, optimizer, counts, and c where it sets itself; as new, or as a checkpoint has them."""

    def __init__(
        self, cfg: TrainConfig, device: Device, corpus: Corpus, saved: dict | None, model: GPT, lora: dict | None,
        master: bool,
    ):  # fmt: skip
        """saved: the checkpoint to go on from. lora: what a checkpoint keeps of the adapters and their base."""
        self.cfg, self.device, self.corpus = cfg, device, corpus
        self.out_dir, self.saved, self.lora = Path(cfg.out_dir), saved, lora
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32, as nanoGPT
        self.model = model.to(device.device)
        self.optimizer, self.scaler = new_optimizer(cfg, model, device)
        self.it, self.best_val_loss = 0, math.inf
        self.window = 0  # the number of the text's next window
        self.evaluated_at: int | None = None  # the iteration that was evaluated last
        if saved is not None:
            if not cfg.eval_only:
                checkpoint.restore_optimizer(saved, self.out_dir / "ckpt.pt", self.optimizer, self.scaler)
            self.it, self.window = saved["iter_num"], windows_consumed(saved, cfg, corpus)
            if validates_alike(saved, cfg, corpus, master and not cfg.eval_only):
                self.best_val_loss = saved["best_val_loss"]
            if not cfg.eval_only and not saved.get("evaluation_owed"):
                self.evaluated_at = self.it
        self.stats = new_stats(model) if cfg.attn_backward == "sus" else None
        self.retention = None
        if self.stats is not None and cfg.sus_c == "auto":
            self.retention = Retention(model, self.stats, cfg.sus_rho)
            if held := (saved or {}).get("retention"):
                self.retention.state = held
        for name in ("model", "optimizer"):  # they are in use now, and would be in memory twice
            (saved or {}).pop(name, None)

    @property
    def evaluation_is_owed(self) -> bool:
        """Whether this iteration is to be evaluated, and hasn't been yet."""
        cfg, it = self.cfg, self.it
        return (it % cfg.eval_interval == 0 or it == cfg.max_iters or cfg.eval_only) and it != self.evaluated_at

    @property
    def is_finished(self) -> bool:
        """Whether all is trained, and its end evaluated."""
        return self.it >= self.cfg.max_iters > 0 and not self.cfg.eval_only and self.evaluated_at == self.it

    def to_save(self, run_id: str) -> dict:
        """A checkpoint's dict, under nanoGPT's names and our own: see training/checkpoint.py."""
        return {
            "model": adapter_state(self.model) if self.lora else self.model.state_dict(),
            "lora": self.lora,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "model_args": model_args(self.model.config),
            "iter_num": self.it,
            "windows_consumed": self.window,
            "evaluation_owed": self.evaluation_is_owed,
            "best_val_loss": self.best_val_loss,
            "config": dataclasses.asdict(self.cfg),
            "tokenizer": self.corpus.tokenizer_meta,
            **self.corpus.text_checksums,
            "wandb_run_id": run_id,
            "retention": self.retention.state if self.retention else None,
        }


def size_to_save(model: GPT, lora: dict | None) -> int:
    """Bytes of a checkpoint, about: the weights that it holds, and AdamW's two means of those that are trained."""
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    everything = sum(p.numel() * p.element_size() for p in model.parameters())
    return 2 * trained + (trained if lora else everything)


def windows_consumed(saved: dict, cfg: TrainConfig, corpus: Corpus) -> int:
    """How many windows of its text the run of the checkpoint `saved` has read: the next one is read next.

    0 where they were others: of another text, or of this one cut or shuffled in another way.
    """
    was = saved["config"]
    if any(was.get(name, getattr(cfg, name)) != getattr(cfg, name) for name in ("windows", "block_size", "seed")):
        return 0
    if saved.get("train_sha256") not in (None, corpus.text_checksums["train_sha256"]):
        return 0
    config = {"batch_size": cfg.batch_size, "gradient_accumulation_steps": cfg.gradient_accumulation_steps}
    config |= saved["config"]  # checkpoints of earlier versions, and nanoGPT's, have no count: all steps were alike
    a_step = config["gradient_accumulation_steps"] * config["batch_size"]
    return saved.get("windows_consumed", saved["iter_num"] * a_step)


def validates_alike(saved: dict, cfg: TrainConfig, corpus: Corpus, master: bool) -> bool:
    """Whether validation is on the same windows as in the checkpoint's run. If not, the master says so."""
    was, now = saved["config"], dataclasses.asdict(cfg)
    changed = [
        name for name in ("dataset", "windows", "doc_mask", "block_size") if was.get(name, now[name]) != now[name]
    ]
    if math.prod(was.get(name, now[name]) for name in ("eval_iters", "batch_size")) != cfg.eval_iters * cfg.batch_size:
        changed.append("eval_iters * batch_size")
    if any(saved.get(name) not in (None, checksum) for name, checksum in corpus.text_checksums.items()):
        changed.append("its text")
    if changed and master:
        print(f"resume: validation is another than before ({', '.join(changed)}), so the best loss begins anew")
    return not changed
