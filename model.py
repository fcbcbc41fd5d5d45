"""GPT, in one file: the transformer of GPT-2, the choices that long contexts ask for, and attention's backward.

With the defaults it is GPT-2 (learned positions, LayerNorm, GELU, tied head), whose weights fit. For long contexts:
rotary positions (`pos="rope"`), RMSNorm, QK-norm, grouped-query attention (`n_kv_head`), activation checkpointing, and
a cross-entropy which never holds the logits of the whole context.

While the model trains, attention's gradient is exact, SUS or low-rank (`attn_backward`, see sus_attn.py and
lowrank_attn.py). Its forward is exact unless `lowrank_forward` says otherwise, and evaluation and sampling use torch's
own attention.

Dims: B batch, T tokens, C = n_embd, H = n_head, K = n_kv_head, D = C / H, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lowrank_attn import lowrank_attention
from rope import rope_table, rotate
from sus_attn import fold_in, sus_attention


@dataclass
class GPTConfig:
    # The architecture: what the weights belong to, saved with them.
    block_size: int = 1024
    vocab_size: int = 50304  # GPT-2's 50257, padded up to a multiple of 64 for speed
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int = 0  # 0: n_head
    n_embd: int = 768
    bias: bool = True
    pos: str = "learned"  # or "rope"
    rope_theta: float = 10000.0
    rope_scaling: float = 1.0  # positions are divided by it
    norm: str = "layernorm"  # or "rmsnorm"
    qk_norm: bool = False
    qk_norm_scale: float = 0.0  # its gain; 0: learned
    # How it is trained: free to change from run to run.
    dropout: float = 0.0
    activation_checkpointing: bool = False
    attn_backward: str = "exact"  # or "sus", "lowrank"
    sus_c: float | Tensor = 8.0  # a 0-d tensor needs sus_c_max, see sus_attention
    sus_c_max: float | None = None
    sus_sampler: str = "tiles"
    sus_backend: str = "auto"
    lowrank_degree: int = 2
    lowrank_forward: str = "exact"  # or "approximate"

    def __post_init__(self) -> None:
        if self.dropout > 0 and self.attn_backward != "exact":
            raise ValueError(
                f"attention dropout is not supported with attn_backward={self.attn_backward!r}: set dropout to 0"
            )


TRAINING_KEYS = (
    "dropout", "activation_checkpointing", "attn_backward", "sus_c", "sus_sampler", "sus_backend", "lowrank_degree",
    "lowrank_forward",
)  # fmt: skip
ARCHITECTURE_KEYS = tuple(f.name for f in fields(GPTConfig) if f.name not in (*TRAINING_KEYS, "sus_c_max"))


class KVCache:
    """The keys and values of the tokens seen so far, for one batch of sequences."""

    def __init__(self, config: GPTConfig, batch_size: int, device: torch.device, dtype: torch.dtype):
        shape = (config.n_layer, batch_size, config.n_kv_head or config.n_head, config.block_size)
        self.k, self.v = torch.empty(2, *shape, config.n_embd // config.n_head, device=device, dtype=dtype)
        self.length = 0  # advanced by GPT.forward, once all layers have appended

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, K, T, D) behind what is there; returns all of it, (B, K, length + T, D)."""
        end = self.length + k.shape[2]
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]


def make_norm(config: GPTConfig) -> nn.Module:
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.n_embd, eps=1e-5)
    return nn.LayerNorm(config.n_embd, bias=config.bias)


class HeadNorm(nn.RMSNorm):
    """RMSNorm of each query or key, in the weight's precision also under autocast (QK-norm, arXiv 2302.05442).

    scale: its gain, the same for all D, for good: scores are then at most scale^2 sqrt(D). 0: one for each, learned.
    """

    def __init__(self, D: int, scale: float):
        super().__init__(D, eps=1e-5)
        if scale:
            del self.weight  # no parameter
            self.register_buffer("weight", torch.full((D,), scale), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class Attend(nn.Module):
    """softmax(q k^T / sqrt(D)) v, causal. The forward is exact; the backward is `attn_backward`'s while training."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.stats: Tensor | None = None  # a caller who wants statistics puts a tensor here, see sus_attention

    def forward(self, q: Tensor, k: Tensor, v: Tensor, seed: Tensor | None = None) -> Tensor:
        """q (B, H, T, D); k, v (B, K, N, D), where q are the last T of N positions. seed: SUS's, 0-d int64."""
        config = self.config
        if self.training and config.attn_backward == "sus":
            how: dict[str, Any] = {"sampler": config.sus_sampler, "backend": config.sus_backend, "stats": self.stats}
            return sus_attention(q, k, v, config.sus_c, c_max=config.sus_c_max, seed=seed, **how)
        if self.training and config.attn_backward == "lowrank":
            approximate = config.lowrank_forward == "approximate"
            return lowrank_attention(q, k, v, config.lowrank_degree, approximate_forward=approximate)
        T, N = q.shape[2], k.shape[2]
        mask = None
        if 1 < T < N:  # SDPA's is_causal is aligned to the top left; the last T of N positions need the bottom right
            mask = torch.ones(T, N, dtype=torch.bool, device=q.device).tril(N - T)
        dropout = config.dropout if self.training else 0.0
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=T == N, enable_gqa=grouped)


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head or config.n_head
        self.D = config.n_embd // config.n_head
        self.c_attn = nn.Linear(config.n_embd, (self.n_head + 2 * self.n_kv_head) * self.D, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.q_norm = HeadNorm(self.D, config.qk_norm_scale) if config.qk_norm else nn.Identity()
        self.k_norm = HeadNorm(self.D, config.qk_norm_scale) if config.qk_norm else nn.Identity()
        self.attend = Attend(config)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rope: Tensor | None, seed: Tensor | None, cache: KVCache | None) -> Tensor:
        B, T, C = x.shape
        heads = self.c_attn(x).view(B, T, -1, self.D).transpose(1, 2)  # (B, H + 2K, T, D)
        q, k, v = heads.split([self.n_head, self.n_kv_head, self.n_kv_head], 1)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast norms and rotations are float32
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        y = self.attend(q, k, v, seed)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(approximate="tanh")  # GPT-2's
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: Tensor | None, seed: Tensor | None, cache: KVCache | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), rope, seed, cache)
        return x + self.mlp(self.ln_2(x))


LOSS_CHUNK = 1 << 25  # logits that stand in memory at once: 128 MiB in float32


def widened(x: Tensor) -> Tensor:
    """x in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def chunked_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy of each token, (B, T) float32 (float64 for float64 weights); 0 where the target is -1.

    x (B, T, C) hidden states, weight (V, C) the head, targets (B, T) int64. The logits are made, and made again in
    the backward, a chunk of tokens at a time: at T = 32k and V = 50k all of them are 6.6 GB.
    """

    def chunk_loss(x: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(widened(F.linear(x, weight)), targets, ignore_index=-1, reduction="none")

    x, flat_targets = x.flatten(0, 1), targets.flatten()
    chunk = max(1, LOSS_CHUNK // weight.shape[0])
    if len(x) <= chunk:
        return chunk_loss(x, flat_targets).view(targets.shape)
    losses = [
        checkpoint(chunk_loss, x_chunk, targets_chunk, use_reentrant=False, preserve_rng_state=False)
        for x_chunk, targets_chunk in zip(x.split(chunk), flat_targets.split(chunk))
    ]
    return torch.cat(losses).view(targets.shape)


class Transformer(nn.ModuleDict):
    """The layers under GPT-2's names."""

    wte: nn.Embedding
    wpe: nn.Embedding  # with learned positions only
    drop: nn.Dropout
    h: Sequence[Block]
    ln_f: nn.Module


class GPT(nn.Module):
    rope: Tensor | None

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = Transformer(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                **({"wpe": nn.Embedding(config.block_size, config.n_embd)} if config.pos == "learned" else {}),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)]),
                "ln_f": make_norm(config),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        self._set_rope()
        self.apply(self._init_weights)
        for name, parameter in self.named_parameters():  # GPT-2's scaled initialisation of the residual projections
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))

    def _set_rope(self) -> None:
        c, table = self.config, None
        if c.pos == "rope":
            table = rope_table(c.n_embd // c.n_head, c.block_size, c.rope_theta, c.rope_scaling)
            table = table.to(self.lm_head.weight.device)
        self.register_buffer("rope", table, persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> "GPT":  # what .to(), .bfloat16() and so on are made of
        super()._apply(fn, recurse)
        if self.rope is not None and self.rope.dtype != torch.float32:
            self._set_rope()  # rounded, its angles would be off by whole turns
        return self

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, *,
        sus_seed: Tensor | None = None, cache: KVCache | None = None, reduction: str = "mean",
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        """(None, loss) with targets, else (logits of the last token (B, 1, V), None).

        idx (B, T) int64; targets (B, T) int64, -1 is ignored. reduction: "mean" gives a 0-d loss, "none" the loss of
        each token (B, T). sus_seed: 0-d int64 for the draws of SUS, made different for every layer; None draws
        from torch's default generator. cache: idx continues the tokens in it, and is appended.
        """
        start = cache.length if cache is not None else 0
        T = idx.shape[1]
        if start + T > self.config.block_size:
            raise ValueError(f"{start + T} tokens do not fit into block_size = {self.config.block_size}")
        x = self.transformer.wte(idx)
        if self.config.pos == "learned":
            x = x + self.transformer.wpe(torch.arange(start, start + T, device=idx.device))
        x = self.transformer.drop(x)
        rope = None if self.rope is None else self.rope[:, start : start + T]
        for block, seed in zip(self.transformer.h, self.seeds_by_layer(sus_seed)):
            if self.config.activation_checkpointing and self.training:
                x = checkpoint(block, x, rope, seed, cache, use_reentrant=False)
            else:
                x = block(x, rope, seed, cache)
        x = self.transformer.ln_f(x)
        if cache is not None:
            cache.length += T
        if targets is None:
            return self.lm_head(x[:, [-1]]), None
        loss = chunked_cross_entropy(x, self.lm_head.weight, targets)
        if reduction == "mean":
            loss = loss.sum() / (targets != -1).sum()
        return None, loss

    def seeds_by_layer(self, sus_seed: Tensor | None) -> Sequence[Tensor | None]:
        """Another seed for each layer, 0-d int64: folded on the model's device, so that nothing waits for it."""
        if sus_seed is None:
            return [None] * self.config.n_layer
        seeds = fold_in(sus_seed, torch.arange(self.config.n_layer, device=self.lm_head.weight.device))
        return seeds.repeat_interleave(2)[::2].unbind()  # each at a multiple of 16 bytes: Triton compiles for that once

    def num_params(self) -> int:
        """Parameters, without the position embedding (as nanoGPT counts)."""
        n = sum(p.numel() for p in self.parameters())
        return n - (self.transformer.wpe.weight.numel() if self.config.pos == "learned" else 0)

    def flops_per_token(self, T: int) -> int:
        """Nominal floating-point operations a token, forward and backward, at context T (PaLM, arXiv 2204.02311, B).

        Nominal: attention counts as dense, T keys a query, whatever the causal mask or SUS leaves out. A frozen weight
        has no gradient of its own: 4 operations instead of 6.
        """
        n = self.num_params()
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        trained = min(n, trained)  # n is without position embeddings
        return 4 * n + 2 * trained + 12 * self.config.n_layer * self.config.n_embd * T

    def set_context(self, block_size: int, rope_scaling: float = 1.0) -> None:
        """Change the length of the context, and the scaling of rotary positions (see `rope_table`).

        Learned positions can be cut, but there are no more of them: ValueError.
        """
        config = self.config
        if config.pos == "learned" and (block_size > config.block_size or rope_scaling != 1):
            raise ValueError(f"learned positions do not go beyond the model's {config.block_size}, nor scale")
        config.block_size, config.rope_scaling = block_size, rope_scaling
        if config.pos == "learned":
            self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight[:block_size].detach().clone())
        else:
            self._set_rope()

    # -- sampling --------------------------------------------------------------------------------

    @torch.no_grad()
    def prefill(self, tokens: list[int], chunk: int = 1024) -> tuple[Tensor, KVCache]:
        """Run a prompt of at most block_size tokens, in chunks. Returns the logits of its last token (V,) and the
        cache.
        """
        weight = self.lm_head.weight
        cache = KVCache(self.config, 1, weight.device, self._compute_dtype())
        idx = torch.tensor(tokens, device=weight.device)[None]
        for part in idx.split(chunk, 1):
            logits, _ = self(part, cache=cache)
        return logits[0, -1], cache

    def _compute_dtype(self) -> torch.dtype:
        device_type = self.lm_head.weight.device.type
        if torch.is_autocast_enabled(device_type):
            return torch.get_autocast_dtype(device_type)
        return self.lm_head.weight.dtype

    @torch.no_grad()
    def generate(
        self, tokens: list[int], max_new_tokens: int, *, temperature: float = 1.0, top_k: int | None = None,
        top_p: float | None = None, n_vocab: int | None = None, generator: torch.Generator | None = None,
    ) -> Iterator[int]:  # fmt: skip
        """Continue a non-empty prompt, yielding each new token as it is drawn. Call model.eval() first.

        temperature 0 takes the likeliest token. top_k, top_p: keep the k likeliest (0 or None: all), or the fewest
        that hold probability p. n_vocab: ids from there on (a padded vocabulary) are never drawn. generator: of the
        CPU. What doesn't fit into block_size is forgotten: of a longer prompt the last block_size tokens are read, and
        whenever the context is full, its older half is dropped.
        """
        tokens = list(tokens)
        block_size = self.config.block_size
        logits, cache = self.prefill(tokens[-block_size:])
        for i in range(max_new_tokens):
            if i > 0 and cache.length == block_size:
                logits, cache = self.prefill(tokens[-max(1, block_size // 2) :])
            elif i > 0:
                logits = self(torch.tensor([tokens[-1:]], device=logits.device), cache=cache)[0][0, -1]
            token = sample_token(logits[:n_vocab], temperature, top_k, top_p, generator)
            tokens.append(token)
            yield token


def sample_token(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> int:
    """Draw one id from logits (V,)."""
    logits = logits.float().cpu()
    if temperature < 1e-6:  # also where a division would overflow
        return int(logits.argmax())
    logits = logits / temperature
    if top_k:  # None and 0: all
        logits[logits < logits.topk(min(top_k, len(logits))).values[-1]] = -math.inf
    probabilities, order = torch.softmax(logits, -1).sort(descending=True)
    if top_p is not None:
        before = probabilities.cumsum(-1) - probabilities  # the likeliest token stays, whatever top_p
        probabilities[before >= top_p] = 0
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])
