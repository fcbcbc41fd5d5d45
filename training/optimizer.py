"""The optimizer of a run, and its learning rate by iteration."""

import math

import torch
from torch import nn

from configurator import TrainConfig
from training.device import Device


def make_optimizer(
    model: nn.Module, weight_decay: float, learning_rate: float, betas: tuple[float, float], device_type: str
) -> torch.optim.AdamW:
    """AdamW of the weights that are trained, with weight decay on matrices and embeddings only."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=device_type in ("cpu", "cuda", "mps"))


def new_optimizer(cfg: TrainConfig, model: nn.Module, device: Device) -> tuple[torch.optim.AdamW, torch.amp.GradScaler]:
    """AdamW, and the scaler of float16's loss (disabled for other dtypes)."""
    optimizer = make_optimizer(model, cfg.weight_decay, cfg.learning_rate, (cfg.beta1, cfg.beta2), device.type)
    return optimizer, torch.amp.GradScaler(device.type, enabled=device.dtype == torch.float16)


def learning_rate(cfg: TrainConfig, it: int) -> float:
    """Linear warm-up, cosine decay to min_lr, then constant."""
    if not cfg.decay_lr:
        return cfg.learning_rate
    if it < cfg.warmup_iters:
        return cfg.learning_rate * (it + 1) / (cfg.warmup_iters + 1)
    if it >= cfg.lr_decay_iters:
        return cfg.min_lr
    progress = (it - cfg.warmup_iters) / (cfg.lr_decay_iters - cfg.warmup_iters)
    return cfg.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (cfg.learning_rate - cfg.min_lr)
