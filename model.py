"""GPT, in one file: the transformer of GPT-2, the choices that long contexts ask for, and attention's backward.

With the defaults it is GPT-2 (learned positions, LayerNorm, GELU, tied head), whose weights fit. Other keys make it a
Llama, a Mistral or a Qwen. For long contexts: rotary positions (`pos="rope"`), RMSNorm, QK-norm, grouped-query
attention (`n_kv_head`), layers that see a window (`attn_window`), documents that don't see each other, activation
checkpointing, and a cross-entropy which never holds the logits of the whole context.

While the model trains, attention's gradient is exact, SUS or low-rank (`attn_backward`, see sus_attn.py and
lowrank_attn.py). Its forward is exact unless `lowrank_forward` says otherwise, and evaluation and sampling use torch's
own attention (exact_attn.py).

Dims: B batch, T tokens, C = n_embd, H = n_head, K = n_kv_head, D = head_dim, V vocabulary.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from exact_attn import ALL, Sight, exact_attention, sight_of
from loss import chunked_cross_entropy
from lowrank_attn import lowrank_attention
from mlp import MLP
from norms import HeadNorm, make_norm
from rope import ROPE_KEYS, rope_table, rotate
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
    head_dim: int = 0  # 0: n_embd / n_head
    mlp: str = "gelu"  # or "swiglu"
    intermediate_size: int = 0  # of the MLP; 0: 4 n_embd
    bias: bool = True
    qkv_bias: bool = False  # of queries, keys and values, where the rest has none
    tie_head: bool = True  # the head is the embedding
    pos: str = "learned"  # or "rope"
    rope_type: str = "default"  # or "linear", "llama3", "yarn": see rope.py, also for the next ones
    rope_theta: float = 10000.0
    rope_scaling: float = 1.0
    rope_original_context: int = 8192
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_beta_fast: float = 32.0
    rope_beta_slow: float = 1.0
    rope_attention_factor: float = 0.0
    norm: str = "layernorm"  # or "rmsnorm"
    norm_eps: float = 1e-5
    qk_norm: bool = False
    qk_norm_scale: float = 0.0  # its gain; 0: learned
    attn_window: int = 0  # keys that rows of layers S see, the latest; 0: all
    window_pattern: str = "SSSL"  # tiled over the layers: S, or L, which see all; see layer_windows
    # How it is trained: free to change from run to run.
    dropout: float = 0.0
    activation_checkpointing: str = "none"  # or "attention": all but attention is computed again; "full": that too
    offload_activations: bool = False  # what is kept for the backward lies in host memory, see Device.training_forward
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
        if self.rope_type == "default" and self.rope_scaling != 1:  # as earlier versions had it
            self.rope_type = "linear"
        earlier: dict[Any, str] = {True: "attention", False: "none"}  # as earlier versions had it
        self.activation_checkpointing = earlier.get(self.activation_checkpointing, self.activation_checkpointing)

    @property
    def D(self) -> int:
        return self.head_dim or self.n_embd // self.n_head

    @property
    def layer_windows(self) -> list[int]:
        """How many keys the rows of each layer see; 0: all. The last layer sees all, if the pattern doesn't name it."""
        letters = (self.window_pattern * self.n_layer)[: self.n_layer - 1] + "L"
        if len(self.window_pattern) == self.n_layer:
            letters = self.window_pattern
        return [self.attn_window if letter == "S" else 0 for letter in letters]


TRAINING_KEYS = (
    "dropout", "activation_checkpointing", "offload_activations", "attn_backward", "sus_c", "sus_sampler",
    "sus_backend", "lowrank_degree", "lowrank_forward",
)  # fmt: skip
ARCHITECTURE_KEYS = tuple(f.name for f in fields(GPTConfig) if f.name not in (*TRAINING_KEYS, "sus_c_max"))


class KVCache:
    """The keys and values of the tokens seen so far, for one batch of sequences."""

    def __init__(self, config: GPTConfig, batch_size: int, device: torch.device, dtype: torch.dtype):
        shape = (config.n_layer, batch_size, config.n_kv_head or config.n_head, config.block_size)
        self.k, self.v = torch.empty(2, *shape, config.D, device=device, dtype=dtype)
        self.length = 0  # advanced by GPT.forward, once all layers have appended

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, K, T, D) behind what is there; returns all of it, (B, K, length + T, D)."""
        end = self.length + k.shape[2]
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]


class Attend(nn.Module):
    """softmax(q k^T / sqrt(D)) v, causal. The forward is exact; the backward is `attn_backward`'s while training."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.stats: Tensor | None = None  # a caller who wants statistics puts a tensor here, see sus_attention

    def forward(self, q: Tensor, k: Tensor, v: Tensor, seed: Tensor | None = None, sight: Sight = ALL) -> Tensor:
        """q (B, H, T, D); k, v (B, K, N, D), where q are the last T of N positions. seed: SUS's, 0-d int64."""
        config = self.config
        if self.training and config.attn_backward == "sus":
            how: dict[str, Any] = {"sampler": config.sus_sampler, "backend": config.sus_backend, "stats": self.stats}
            how |= {"c_max": config.sus_c_max, "seed": seed, "key_ranges": sight.ranges}
            return sus_attention(q, k, v, config.sus_c, **how)
        if self.training and config.attn_backward == "lowrank":
            if sight.ranges is not None:  # its running sums are over all keys before a row
                raise ValueError("the low-rank backward covers neither documents nor windows: take exact or sus")
            approximate = config.lowrank_forward == "approximate"
            return lowrank_attention(q, k, v, config.lowrank_degree, approximate_forward=approximate)
        return exact_attention(q, k, v, sight, config.dropout if self.training else 0.0)


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head or config.n_head
        self.D, C = config.D, config.n_embd
        bias = config.bias or config.qkv_bias
        self.c_attn = nn.Linear(C, (self.n_head + 2 * self.n_kv_head) * self.D, bias=bias)
        self.c_proj = nn.Linear(self.n_head * self.D, C, bias=config.bias)
        norm = lambda: HeadNorm(self.D, config.qk_norm_scale, config.norm_eps) if config.qk_norm else nn.Identity()
        self.q_norm, self.k_norm = norm(), norm()
        self.attend = Attend(config)
        self.resid_dropout = nn.Dropout(config.dropout)

    def heads(self, x: Tensor, rope: Tensor | None, cache: KVCache | None) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, H, T, D); k, v (B, K, N, D), of x (B, T, C)."""
        B, T, _ = x.shape
        heads = self.c_attn(x).view(B, T, -1, self.D).transpose(1, 2)  # (B, H + 2K, T, D)
        q, k, v = heads.split([self.n_head, self.n_kv_head, self.n_kv_head], 1)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast norms and rotations are float32
        return q, *((k, v) if cache is None else cache.append(self.layer, k, v))

    def project(self, y: Tensor) -> Tensor:
        """(B, T, C), of what the heads (B, H, T, D) make."""
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        C = config.n_embd
        self.ln_1 = make_norm(config.norm, C, config.bias, config.norm_eps)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = make_norm(config.norm, C, config.bias, config.norm_eps)
        self.mlp = MLP(config.mlp, C, config.intermediate_size or 4 * C, config.bias, config.dropout)

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None,
        seed: Tensor | None = None,
        sight: Sight = ALL,
        cache: KVCache | None = None,
        again: str = "none",
    ) -> Tensor:
        """again: what the backward computes again, of activation_checkpointing's values. Attention is never a part of
        "attention", so the cheap rest alone is.
        """
        if again == "full":
            return checkpoint(self, x, rope, seed, sight, cache, "none", use_reentrant=False)
        run = functools.partial(checkpoint, use_reentrant=False) if again == "attention" else lambda f, *args: f(*args)
        y = self.attn.attend(*run(self.before_attention, x, rope, cache), seed, sight)
        return run(self.behind_attention, x, y)

    def before_attention(self, x: Tensor, rope: Tensor | None, cache: KVCache | None) -> tuple[Tensor, Tensor, Tensor]:
        return self.attn.heads(self.ln_1(x), rope, cache)

    def behind_attention(self, x: Tensor, y: Tensor) -> Tensor:
        x = x + self.attn.project(y)
        return x + self.mlp(self.ln_2(x))


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
                "ln_f": make_norm(config.norm, config.n_embd, config.bias, config.norm_eps),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_head:
            self.lm_head.weight = self.transformer.wte.weight
        self._set_rope()
        self.apply(self._init_weights)
        for name, parameter in self.named_parameters():  # GPT-2's scaled initialisation of the residual projections
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))

    def _set_rope(self) -> None:
        c, table = self.config, None
        if c.pos == "rope":
            table = rope_table(c.D, c.block_size, **{name: getattr(c, name) for name in ROPE_KEYS})
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
        self, idx: Tensor, targets: Tensor | None = None, *, documents: Tensor | None = None,
        sus_seed: Tensor | None = None, cache: KVCache | None = None, reduction: str = "mean",
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        """(None, loss) with targets, else (logits of the last token (B, 1, V), None).

        idx (B, T) int64; targets (B, T) int64, -1 is ignored. reduction: "mean" gives a 0-d loss, "none" the loss of
        each token (B, T). documents (B, T) int32: where in its row each token's document begins, whose tokens are all
        that it sees; None: each row is one. sus_seed: 0-d int64 for the draws of SUS, made different for every layer;
        None draws from torch's default generator. cache: idx continues the tokens in it, and is appended.
        """
        start = cache.length if cache is not None else 0
        T = idx.shape[1]
        if start + T > self.config.block_size:
            raise ValueError(f"{start + T} tokens do not fit into block_size = {self.config.block_size}")
        x = self.transformer.wte(idx)
        if self.config.pos == "learned":
            x = x + self.transformer.wpe(self.positions(start, T, documents))
        x = self.transformer.drop(x)
        rope = None if self.rope is None else self.rope[:, start : start + T]
        again = self.config.activation_checkpointing if self.training else "none"
        sights = self.sights(T, documents, start)
        for block, seed, sight in zip(self.transformer.h, self.seeds_by_layer(sus_seed), sights):
            x = block(x, rope, seed, sight, cache, again)
        x = self.transformer.ln_f(x)
        if cache is not None:
            cache.length += T
        if targets is None:
            return self.lm_head(x[:, [-1]]), None
        loss = chunked_cross_entropy(x, self.lm_head.weight, targets)
        if reduction == "mean":
            loss = loss.sum() / (targets != -1).sum()
        return None, loss

    def positions(self, start: int, T: int, documents: Tensor | None) -> Tensor:
        """The learned positions of T tokens behind `start` others, (T,) or (B, T): they begin anew with documents."""
        row = torch.arange(start, start + T, device=self.lm_head.weight.device)
        return row if documents is None else row - documents

    def sights(self, T: int, documents: Tensor | None, start: int = 0) -> list[Sight]:
        """What each layer's rows see, see GPT.forward; start: tokens before them."""
        device, windows = self.lm_head.weight.device, self.config.layer_windows
        made = {window: sight_of(T, device, documents, window, start) for window in set(windows)}
        return [made[window] for window in windows]

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

    def set_context(self, block_size: int, **rope: Any) -> None:
        """Change the length of the context, and how rotary positions are stretched (of ROPE_KEYS, see `rope_table`).

        Learned positions can be cut, but there are no more of them: ValueError.
        """
        config = self.config
        if config.pos == "learned" and (block_size > config.block_size or rope.get("rope_scaling", 1) != 1):
            raise ValueError(f"learned positions do not go beyond the model's {config.block_size}, nor scale")
        config.block_size = block_size
        for name, value in rope.items():
            setattr(config, name, value)
        config.__post_init__()
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
