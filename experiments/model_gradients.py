"""The gradient of a whole model as one vector, and its parts: what grad_variance.py and lowrank_error.py look at.

`load_model` finds a model and `windows` its text; a `Subject` is a model whose gradients are taken, exact, by SUS or by
the low-rank backward, and its `Parts` say which of their numbers belong to which layer and head.

Dims: P weights, L layers, H query heads, K key/value heads, T tokens.
"""

from pathlib import Path

import torch
from torch import Tensor

from configurator import UserError
from data.loader import Corpus
from measure import check_sight
from model import GPT
from training import checkpoint
from training.device import Device
from training.weights import load_named, model_from_checkpoint


def load_model(out_dir: str, init_from: str = "resume", dataset: str = "") -> tuple[GPT, str, dict | None]:
    """The model, the folder of its corpus, and the tokenizer that its corpus must have (None: not known). UserError."""
    if init_from != "resume":
        if not dataset:
            raise UserError(f"--init_from={init_from} needs --dataset=NAME, a folder under data/ in its tokens")
        saved, path = load_named(init_from)
        return model_from_checkpoint(saved, path), dataset, saved.get("tokenizer")
    path = Path(out_dir) / "ckpt.pt"
    saved = checkpoint.load(path)
    if dropout := saved["config"].get("dropout"):
        raise UserError(f"{path} was trained with dropout={dropout}, which SUS does not support: its gradients differ")
    dataset = dataset or saved["config"].get("dataset")
    if not dataset:
        raise UserError(f"{path} does not say what it was trained on: give --dataset=NAME")
    model = model_from_checkpoint(saved, path)
    check_sight(model, saved["config"])
    return model, dataset, saved.get("tokenizer")


def windows(corpus: Corpus, count: int) -> tuple[Tensor, Tensor, dict]:
    """(x, y), both (count, T), no two overlapping: a sequence seen twice would count as two. And how many are whose."""
    T = corpus.block_size
    room = {"val": (corpus.val_tokens - 1) // T, "train": (corpus.train_tokens - 1) // T}
    taken = {"val": min(count, room["val"])}
    taken["train"] = count - taken["val"]
    if taken["train"] > room["train"]:
        raise UserError(
            f"{corpus.folder} has {sum(room.values())} windows of {T} tokens, not {count}: give fewer "
            "--sequences or a smaller --T"
        )
    parts = []
    for split, n in taken.items():
        last = (corpus.val_tokens if split == "val" else corpus.train_tokens) - T - 1
        if n:
            parts.append(corpus.read(split, [[(i * last // max(n - 1, 1), T)] for i in range(n)])[:2])
    x, y = (torch.cat(tensors) for tensors in zip(*parts))
    return x, y, taken


class Parts:
    """The model's gradient as one vector (P,) float32, and the parts of it that are looked at: the whole, the L layers,
    the L * H heads, and the queries and keys of all of them. A head's part is its query's rows of c_attn, and those of
    its key and value.
    """

    def __init__(self, model: GPT):
        self.parameters = list(model.parameters())
        attention = model.transformer.h[0].attn
        self.L, self.H, self.K = len(model.transformer.h), attention.n_head, attention.n_kv_head
        starts, self.P = {}, 0
        for p in self.parameters:
            starts[p] = self.P
            self.P += p.numel()
        span = lambda p: slice(starts[p], starts[p] + p.numel())
        self.layers, self.c_attn = [], []
        for block in model.transformer.h:
            own = [span(p) for p in block.parameters()]  # side by side
            self.layers.append(slice(own[0].start, own[-1].stop))
            self.c_attn.append([span(p) for p in block.attn.c_attn.parameters()])
        # Along these parts of the mean gradient the self-check looks for a bias. What is wrong in dK alone would be
        # lost among a layer's other parameters, so the rows of c_attn for q, k and v have their own.
        self.directions = {f"layer {i}": layer for i, layer in enumerate(self.layers)}
        for i, (weight, *_) in enumerate(self.c_attn):
            row = (weight.stop - weight.start) // (self.H + 2 * self.K)
            ends = [weight.start + n * row for n in (0, self.H, self.H + self.K, self.H + 2 * self.K)]
            for name, start, stop in zip("qkv", ends, ends[1:]):
                self.directions[f"layer {i}'s rows of {name}"] = slice(start, stop)

    def gradient(self, loss: Tensor) -> Tensor:
        """(P,) float32"""
        return torch.cat([g.flatten().float() for g in torch.autograd.grad(loss, self.parameters)])

    def squares(self, x: Tensor) -> Tensor:
        """The squared norm of each part of x (P,): (1 + L + L * H + 1,) float64 on the CPU."""
        layers = [x[layer].square().sum() for layer in self.layers]
        heads, queries_and_keys = [], 0
        head = torch.arange(self.H, device=x.device)
        for spans in self.c_attn:  # the rows of q for each head, then those of k and of v for each key/value head
            rows = sum(x[span].view(self.H + 2 * self.K, -1).square().sum(1) for span in spans)
            kv = self.H + head // (self.H // self.K)
            heads.append(rows[head] + rows[kv] + rows[kv + self.K])
            queries_and_keys += rows[: self.H + self.K].sum(0, keepdim=True)
        return torch.cat([torch.stack([x.square().sum(), *layers]), *heads, queries_and_keys]).cpu().double()


class Subject:
    """The model whose gradients are measured: exact, by SUS, by the low-rank backward."""

    def __init__(self, model: GPT, device: Device):
        if model.config.dropout > 0:
            raise UserError(f"the model has dropout={model.config.dropout}, which SUS does not support")
        self.model, self.device = model.to(device.device).train(), device
        self.parts = Parts(self.model)

    def gradient(self, x: Tensor, y: Tensor, seed: int = 0, **keys) -> tuple[Tensor, Tensor | None]:
        """The gradient (P,) of the mean loss on x, y (1, T), exact or with these keys of the model's config; and, of
        SUS's, sus_attention's stats of each layer, (L, 3) float64.
        """
        config, blocks = self.model.config, self.model.transformer.h
        for name, value in ({"attn_backward": "exact"} | keys).items():
            setattr(config, name, value)
        is_sus = config.attn_backward == "sus"
        for block in blocks if is_sus else []:
            block.attn.attend.stats = torch.zeros(3, device=self.device.device)
        try:
            with self.device.autocast():
                _, loss = self.model(x, y, sus_seed=torch.tensor(seed) if is_sus else None)
            gradient = self.parts.gradient(loss)
            return gradient, torch.stack([b.attn.attend.stats for b in blocks]).cpu().double() if is_sus else None
        finally:
            config.attn_backward = "exact"
            for block in blocks:
                block.attn.attend.stats = None
