"""SUS attention in Hugging Face models: to import this module registers attn_implementation="sus".

    import sus_hf
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="sus")
    sus_hf.set_retention(model, c=4.0)

In training each attention layer has an exact forward and the sparse, unbiased backward of sus_attn.py. In evaluation,
in generation and without gradients it is exact attention, over the same keys. model.set_attn_implementation("sdpa")
takes it out again.

A row sees a range of keys: those up to its own, of its document where documents are packed, of its window where the
layer has one, and no padding. transformers asks `key_ranges` once a forward for what it would otherwise have as a
mask; packing that only the layer is told of (position_ids behind a mask of ones, cu_seq_lens) is added there.

Dims: B batch, H query heads, K key/value heads, T query rows, N keys, D head dim.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from sus_attn import check_c, constant_in_graphs, fold_in, sus_attention

try:
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function
except ImportError as error:
    raise ImportError(f"sus_hf needs transformers 5: pip install 'nanosus[hf]' ({error})") from error

DEFAULT_C = 8.0  # sus_attention's
DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")  # what configurations call it
REFUSED = {  # arguments of models' own, and what to do
    "softcap": "softcap (Gemma 2's attn_logit_softcapping): use 'eager'",
    "s_aux": "sinks (s_aux, as GPT-OSS has them): use 'eager'",
    "position_bias": "position_bias (as T5 has it): use 'sdpa'",
    "cache": "paged cache (continuous batching): use 'sdpa' to serve the model",
    "block_indices": "block_indices, by which the model chooses keys: use 'sdpa'",
    "indices": "indices, by which the model chooses keys: use 'sdpa'",
    "sinks": "sinks, by which the model chooses keys: use 'sdpa'",
}


def set_retention(model: nn.Module, c: float) -> None:
    """Set c, a float > 0, of every layer whose attention is "sus": about how many tiles of 64 keys a row keeps in the
    backward. math.inf keeps all: the exact gradient through the same code. Until it is set, c is 8.

    Raises TypeError or ValueError where c is not a number > 0, ValueError where no attention is "sus" or can be, or the
    configuration has attention dropout.
    """
    if isinstance(c, bool) or not isinstance(c, int | float):
        raise TypeError(f"c must be a number > 0, as in set_retention(model, 8.0), not {type(c).__name__}")
    check_c(c, None, torch.device("cpu"))
    layers = [module for module in model.modules() if _implementation(module) == "sus"]
    if not layers:
        found = sorted({str(name) for module in model.modules() if (name := _implementation(module)) is not None})
        raise ValueError(
            f"no layer's attention is 'sus' ({', '.join(found) or 'this is no model of transformers'}): load the model "
            "with attn_implementation='sus', or call model.set_attn_implementation('sus') first"
        )
    for module in layers:
        # Those whose code doesn't ask for the attention function would have neither SUS nor a mask.
        if isinstance(module, PreTrainedModel) and not module._can_set_attn_implementation():
            raise ValueError(
                f"{type(module).__name__} has an attention of its own, which can't be exchanged: use 'eager'"
            )
        for key in DROPOUTS:
            if dropout := getattr(module.config, key, 0):
                raise ValueError(_no_dropout(key, dropout))
    for module in layers:
        module.sus_c = float(c)  # type: ignore[assignment]


def _no_dropout(key: str, dropout: float) -> str:
    return f"attention 'sus' has no dropout: load the model with {key}=0.0 (it is {dropout})"


def _implementation(module: nn.Module) -> str | None:
    return getattr(getattr(module, "config", None), "_attn_implementation", None)


# ---------------------------------------------------------------------------------------------
# What a row sees.
# ---------------------------------------------------------------------------------------------


def key_ranges(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_bidirectional_skip: bool | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: object,
) -> Tensor | None:
    """The mask function of "sus", in the form that transformers calls it: int32 (B or 1, 1, T, 2), row r sees the keys
    [lo, hi) of its pair. None: each row sees all keys, in a model that is not causal.

    attention_mask: bool (B, any length), False at padding, which is at the left or the right end of a row. Rows of
    padding at the right see nothing. local_size: of a window, with the row's own key; in models that are not causal so
    many keys to both sides. allow_is_bidirectional_skip: given for such models, and for no others.
    Raises ValueError where a row sees no range of keys; in compiled code, where values can't be looked at, it does not.
    """
    if attention_mask is not None and attention_mask.dim() != 2:
        shape = tuple(attention_mask.shape)
        raise ValueError(f"attention 'sus' takes an attention_mask of shape (batch, tokens), not {shape}")
    if use_vmap:
        raise ValueError("attention 'sus' can't have a mask function of the model's own (or_mask_function): use 'sdpa'")
    causal = allow_is_bidirectional_skip is None
    plain = mask_function in (causal_mask_function, bidirectional_mask_function)
    if attention_mask is None and plain and not causal:
        return None
    first, last = kv_offset, kv_offset + kv_length - 1
    row = torch.arange(q_length, device=device)[None] + q_offset
    lo, hi = torch.full_like(row, first), row + 1 if causal else torch.full_like(row, last + 1)
    if not plain:
        batch = torch.arange(batch_size, device=device)[:, None]
        sees = lambda row, key: mask_function(batch, batch, row.clamp(max=last), key.clamp(first, last))
        if not causal and local_size is not None:
            lo, hi = (row - local_size).clamp(min=first), (row + local_size + 1).clamp(max=last + 1)
        elif causal:
            # A document, or a chunk, begins at a key whose row doesn't see the key before.
            keys = torch.arange(first, last + 1, device=device)[None]
            begins = torch.where(sees(keys, keys - 1), first, keys).cummax(1).values
            lo = begins[:, (row[0] - first).clamp(max=kv_length - 1)]
            if local_size is not None:
                lo = torch.maximum(lo, hi - local_size)
        if not torch.compiler.is_compiling():
            inside = sees(row, lo) & sees(row, row) & sees(row, (lo + row) // 2) & sees(row, hi - 1)
            outside = (lo > first) & sees(row, lo - 1) | (hi <= last) & sees(row, hi)
            if not (inside & ~outside).all():
                raise ValueError("attention 'sus' needs rows that see a range of keys: use 'sdpa'")
    if attention_mask is not None:
        place = torch.arange(attention_mask.shape[1], device=device)
        start = torch.where(attention_mask, place, len(place)).amin(1, keepdim=True)
        end = torch.where(attention_mask, place + 1, 0).amax(1, keepdim=True)
        if not torch.compiler.is_compiling() and (attention_mask.sum(1) < (end - start)[:, 0]).any():
            raise ValueError(
                "attention 'sus' needs padding at the ends of attention_mask, not between tokens: pad on the right "
                "(PEFT puts virtual tokens before padding at the left), or use 'sdpa'"
            )
        lo, hi = torch.maximum(lo, start), torch.minimum(hi, end)
        hi = torch.where(row < end, hi, first) if causal else hi
    lo, hi = torch.broadcast_tensors(lo, hi)
    return (torch.stack([lo, hi], -1) - first).clamp(0, kv_length).int()[:, None]


def _documents(B: int, T: int, position_ids: Tensor | None, cu_seq_lens: Tensor | None) -> Tensor | None:
    """Where each row's document begins, (B or 1, T); None if nothing tells. In packed rows position_ids (B or 1, T) go
    back, or are 0, where a document begins. cu_seq_lens: where each begins in the batch as one row, and the last's end.
    """
    if cu_seq_lens is not None:
        begins = torch.zeros(B * T + 1, dtype=torch.bool, device=cu_seq_lens.device)
        begins = begins.index_fill(0, cu_seq_lens.long(), True)[:-1].view(B, T)
    elif position_ids is not None and position_ids.dim() == 2 and position_ids.shape[1] == T:
        begins = F.pad((position_ids.diff(dim=1) < 0) | (position_ids[:, 1:] == 0), (1, 0))
    else:
        return None
    row = torch.arange(T, device=begins.device)
    return torch.where(begins, row, 0).cummax(1).values.int()


# ---------------------------------------------------------------------------------------------
# The attention function.
# ---------------------------------------------------------------------------------------------


def sus_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """A layer's attention, in the form that transformers calls it: ((B, T, H, D) contiguous, None).

    query (B, H, T, D); key, value (B, K, N, D). attention_mask: of `key_ranges`. Raises ValueError by the name of what
    is not supported.
    """
    _refuse(module, attention_mask, dropout, others)
    B, H, T, D = query.shape
    K, N = key.shape[1:3]
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    ranges = None if attention_mask is None else attention_mask[:, 0]
    if causal:
        window = sliding_window if sliding_window is not None and sliding_window < N else None
        documents = _documents(B, T, position_ids, cu_seq_lens_q) if T == N > 1 else None
        ranges = _narrowed(ranges, T, N, query.device, window, documents)
    elif cu_seq_lens_q is not None:
        raise ValueError("attention 'sus' packs documents in causal models only: cu_seq_lens_q can't be had here")
    if T == 1 and not module.training:  # a token that is generated: the heads of a group are the rows
        place = torch.arange(N, device=query.device)
        mask = None if ranges is None else ((place >= ranges[..., :1]) & (place < ranges[..., 1:]))[:, None]
        rows = query.reshape(B, K, H // K, D)
        out = F.scaled_dot_product_attention(rows, key, value, mask, scale=scaling).reshape(B, 1, H, -1)
        return out, None
    if ranges is not None and len(ranges) == 1:
        ranges = ranges[0]
    # Without a draw the forward is all there is, and it is exact; c = inf is for a gradient in evaluation.
    c = getattr(module, "sus_c", DEFAULT_C) if module.training else math.inf
    seed = _seed(module) if module.training else 0
    width = value.shape[3]
    value = F.pad(value, (0, D - width))  # DeepSeek's are narrower than queries and keys; zeros change nothing
    out = sus_attention(query, key, value, c, key_ranges=ranges, is_causal=causal, scale=scaling, seed=seed)
    return out[..., :width].transpose(1, 2).contiguous(), None


def _narrowed(
    ranges: Tensor | None, T: int, N: int, device: torch.device, window: int | None, documents: Tensor | None
) -> Tensor | None:
    """ranges, None for all keys up to a row's own, less what is before a row's window or its document."""
    if window is None and documents is None:
        return ranges
    if ranges is None:
        hi = torch.arange(N - T + 1, N + 1, dtype=torch.int32, device=device)[None]
        lo = torch.zeros_like(hi)
    else:
        lo, hi = ranges.unbind(-1)
    if window is not None:
        lo = torch.maximum(lo, hi - window)
    if documents is not None:
        lo = torch.maximum(lo, documents)
    return torch.stack(torch.broadcast_tensors(lo, hi), -1)


def _seed(module: nn.Module) -> Tensor:
    """The draw's seed. torch's generator has its state back when gradient checkpointing repeats a layer, and may be the
    same on every process and, where something else sets it back, in every layer. Compiled code leaves the layer out:
    layers that are compiled apart would each be compiled anew for it.
    """
    layer = 0 if torch.compiler.is_compiling() else getattr(module, "layer_idx", None) or 0
    words = layer, _process()
    return torch.as_tensor(fold_in(torch.randint(2**62, ()), *words))


@constant_in_graphs
def _process() -> int:
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def _refuse(module: nn.Module, attention_mask: Tensor | None, dropout: float, others: dict[str, object]) -> None:
    if attention_mask is not None and (attention_mask.dtype != torch.int32 or attention_mask.shape[-1] != 2):
        raise ValueError(
            f"attention 'sus' takes no attention_mask of shape {tuple(attention_mask.shape)}, {attention_mask.dtype}: "
            "give one of shape (batch, tokens), True where there is no padding, and for packed documents position_ids "
            "that start again at each"
        )
    if dropout > 0:
        keys = [key for key in DROPOUTS if getattr(getattr(module, "config", None), key, 0)]
        raise ValueError(_no_dropout(keys[0] if keys else DROPOUTS[0], dropout))
    for name, what in REFUSED.items():
        if others.get(name) is not None:
            raise ValueError(f"attention 'sus' has no {what}")


AttentionInterface.register("sus", sus_attention_forward)
AttentionMaskInterface.register("sus", key_ranges)
