"""The whole GPT differentiated by hand (after Boué, "Deep learning for pedestrians", arXiv 2512.23329): no autograd.

Each layer's backward is one closed form, written with whole matrices. Notation: the rows of X are tokens, dX = dL/dX
has the shape of X, o is the product of elements (Hadamard's), 1 a column of ones, and rowsum(X) = X 1, rowmean(X) its
mean, each a column that stands beside every element of its row. Every formula follows from dL = <dY, dY(X)>, where <A,
B> = sum of A o B is Frobenius's product: <A, B C> = <A C^T, B> = <B^T A, C> moves factors from one side to the other
until <dX, .> is left.

A layer's backward needs the layer's input only. Normalised inputs and GELU's output are cheap, and made again from what
is there, so that less is kept between forward and backward than autograd keeps.

`loss_and_gradients` is the forward and the backward of a model. It calls model.py's layers, in the same order: its loss
has the bits of the model's own. The gradients agree with autograd's to rounding. A tensor's gradient has the tensor's
dtype, also under autocast, as autograd's has; what isn't a product of matrices is computed in float32 at least.

Documents, windows, and what is kept for the backward are those of model.py. Deliberately missing: dropout, and the
attn_backward whose backward isn't here. Both are refused by name.

Dims: B batch, T tokens, C = n_embd, H = n_head, K = n_kv_head, D = head_dim, I width inside the MLP, V vocabulary.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F

import loss as loss_module
from exact_attn import ALL, Sight
from loss import widened
from model import GPT, Block
from rope import rotate
from sus_attn import sus_attention_and_backward
from training.lora import LoRALinear


def add_gradient(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Add to parameter.grad, as autograd's backward does."""
    if parameter.grad is None:
        parameter.grad = gradient.to(parameter.dtype)
    else:
        parameter.grad += gradient


# -- layers -----------------------------------------------------------------------------------------
# Each adds to the gradients of its layer's parameters, but for frozen ones, and returns dX in X's shape and dtype.


def embedding_backward(embedding: nn.Embedding, index: Tensor, dy: Tensor) -> None:
    """Y = P E:    dE = P^T dY

    P has a row for each token, one-hot in the column of its index. E (V, C); index (...) int64; dy (..., C).
    """
    E = embedding.weight
    if E.requires_grad:
        if E.grad is None:
            E.grad = torch.zeros_like(E)
        E.grad.index_add_(0, index.flatten(), dy.reshape(-1, dy.shape[-1]).to(E.dtype))


def linear_backward(layer: nn.Linear, x: Tensor, dy: Tensor) -> Tensor:
    """Y = X W^T + 1 b^T:    dX = dY W    dW = dY^T X    db = dY^T 1

    and where LoRA adds s X A^T B^T (arXiv 2106.09685):

        dX += s dY B A    dA = s (dY B)^T X    dB = s dY^T (X A^T)

    x (..., in); dy (..., out) in the dtype in which the layer was computed; W (out, in), A (r, in), B (out, r).
    """
    X, dY = x.reshape(-1, x.shape[-1]).to(dy.dtype), dy.reshape(-1, dy.shape[-1])
    dX = dY @ layer.weight.to(dY.dtype)
    if layer.weight.requires_grad:
        add_gradient(layer.weight, dY.T @ X)
    if layer.bias is not None and layer.bias.requires_grad:
        add_gradient(layer.bias, dY.sum(0))
    if isinstance(layer, LoRALinear):
        A, B = layer.lora_a.to(dY.dtype), layer.lora_b.to(dY.dtype)
        s_dY_B = layer.scale * (dY @ B)  # (..., r)
        dX += s_dY_B @ A
        if layer.lora_a.requires_grad:
            add_gradient(layer.lora_a, s_dY_B.T @ X)
        if layer.lora_b.requires_grad:
            add_gradient(layer.lora_b, layer.scale * (dY.T @ (X @ A.T)))
    return dX.view(x.shape).to(x.dtype)


def norm_backward(norm: nn.Module, x: Tensor, dy: Tensor) -> Tensor:
    """LayerNorm (Y = X^ o 1 g^T + 1 b^T, X^ = (X - rowmean(X)) o r, r = 1 / sqrt(rowmean((X - rowmean(X))^2) + eps)):

        dX = r o (dX^ - rowmean(dX^) - X^ o rowmean(dX^ o X^))    dX^ = dY o 1 g^T    dg = (dY o X^)^T 1    db = dY^T 1

    RMSNorm is the same without the mean and the bias: X^ = X o r, r = 1 / sqrt(rowmean(X^2) + eps), and

        dX = r o (dX^ - X^ o rowmean(dX^ o X^))

    norm: an nn.LayerNorm or nn.RMSNorm over the last dim, or nn.Identity, whose dX = dY. x, dy (..., C).
    """
    if isinstance(norm, nn.Identity):
        return dy
    g = norm.weight
    X, dY = x.to(g.dtype), dy.to(g.dtype)  # QK-norm computes in g's dtype
    centred = isinstance(norm, nn.LayerNorm)
    if centred:
        X = X - X.mean(-1, keepdim=True)
    r = torch.rsqrt(X.square().mean(-1, keepdim=True) + norm.eps)
    X_hat = X * r
    if g.requires_grad:
        add_gradient(g, (dY * X_hat).flatten(0, -2).sum(0))
    if centred and norm.bias is not None and norm.bias.requires_grad:
        add_gradient(norm.bias, dY.flatten(0, -2).sum(0))
    dX_hat = dY * g
    dX = dX_hat - X_hat * (dX_hat * X_hat).mean(-1, keepdim=True)
    if centred:
        dX -= dX_hat.mean(-1, keepdim=True)
    return dX.mul_(r).to(x.dtype)


def gelu_backward(x: Tensor, dy: Tensor) -> Tensor:
    """GELU in GPT-2's form, Y = X o (1 + tanh(Z)) / 2 with Z = a (X + b X^3), a = sqrt(2 / pi), b = 0.044715:

    dX = dY o ((1 + tanh(Z)) + X o (1 - tanh(Z)^2) o a (1 + 3 b X^2)) / 2
    """
    a, b = math.sqrt(2 / math.pi), 0.044715
    X = widened(x)
    square = X.square()
    tanh = torch.tanh(a * X * (1 + b * square))
    slope = (1 - tanh.square()).mul_(X).mul_(a * (1 + 3 * b * square))
    return slope.add_(tanh).add_(1).mul_(dy).mul_(0.5).to(x.dtype)


def swiglu_backward(h: Tensor, dy: Tensor) -> Tensor:
    """Y = G o s(G) o U with [G U] = H and the logistic function s (arXiv 2002.05202):

    dU = dY o G o s(G)    dG = dY o U o s(G) o (1 + G o (1 - s(G)))

    h (..., 2 I), dy (..., I). Returns dH.
    """
    G, U = widened(h).chunk(2, -1)
    s = torch.sigmoid(G)
    return torch.cat([(1 - s).mul_(G).add_(1).mul_(s).mul_(U).mul_(dy), s.mul_(G).mul_(dy)], -1).to(h.dtype)


def rope_backward(dy: Tensor, table: Tensor) -> Tensor:
    """Every row is rotated, y = R x, so dx = R^T dy: rotated back. dy (B, H, T, D); table (2, T, D/2),
    see rope_table.
    """
    cos, sin = table
    return rotate(dy, torch.stack([cos, -sin]))


BLOCK_ROWS = (
    64  # of W, that stand in memory at once. With fewer, products are thin, and dK and dV are gone through more often.
)


def attention_backward(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, m: Tensor | None = None, ranges: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal attention of a head, O = W V, W = softmax(S) by rows, S = Q K^T / sqrt(D) of the keys that a row sees:

        dV = W^T dO    dW = dO V^T    dS = W o (dW - rowsum(dW o W))    dQ = dS K / sqrt(D)    dK = dS^T Q / sqrt(D)

    SUS (arXiv 2505.15080) has W~ = W o M in W's place, but for the exact rowsum(dW o W) = rowsum(dO o O).

    q, do (B, H, T, D); k, v (B, K, T, D), where H / K query heads share a key and value head, whose gradients are
    summed over them. m: None, or M (B, H, T, T). ranges: those of Sight; None: the keys up to a row's own. Returns dq,
    dk, dv. A block of rows of W at a time: nothing of size T^2 is made.
    """
    B, H, T, D = q.shape
    K, scale = k.shape[1], 1 / math.sqrt(D)
    q_, do_ = (widened(x).unflatten(1, (K, H // K)) for x in (q, do))  # (B, K, G, T, D)
    k_, v_ = (widened(x).unsqueeze(2) for x in (k, v))  # (B, K, 1, T, D)
    dq, dk, dv = torch.empty_like(q_), torch.zeros_like(k_), torch.zeros_like(v_)
    for start in range(0, T, BLOCK_ROWS):
        end = min(start + BLOCK_ROWS, T)  # rows start..end see the keys before end
        first = 0 if ranges is None else int(ranges[..., start:end, 0].min())
        rows, keys = (..., slice(start, end), slice(None)), (..., slice(first, end), slice(None))
        Q, dO, K_, V = q_[rows], do_[rows], k_[keys], v_[keys]
        S = (Q * scale) @ K_.mT  # (B, K, G, R, N)
        if ranges is None:
            unseen = torch.ones(end - start, end - start, dtype=torch.bool, device=q.device).triu(1)
            S[..., start:].masked_fill_(unseen, -math.inf)  # before start all is seen
        else:
            key, (lo, hi) = torch.arange(first, end, device=q.device), ranges[..., start:end, :, None].unbind(-2)
            unseen = (key < lo) | (key >= hi)  # (R, N) or (B, R, N)
            S.masked_fill_(unseen if ranges.dim() == 2 else unseen[:, None, None], -math.inf)
        W = S.softmax(-1)
        dS = dO @ V.mT  # dW, as yet
        dS -= (dS * W).sum(-1, keepdim=True)
        if m is not None:
            W = W * m[:, :, start:end, first:end].unflatten(1, (K, H // K))
        dS *= W
        dv[keys] += (W.mT @ dO).sum(2, keepdim=True)
        dk[keys] += (dS.mT @ Q).sum(2, keepdim=True) * scale
        dq[rows] = dS @ K_ * scale
    return dq.flatten(1, 2).to(q.dtype), dk.squeeze(2).to(k.dtype), dv.squeeze(2).to(v.dtype)


def cross_entropy(head: nn.Linear, x: Tensor, targets: Tensor, scale: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
    """L = <1, (logsumexp(Z) - rowsum(Z o Y)) o u> / n, Z = X E^T:

        dZ = (softmax(Z) - Y) o u / n    dX = dZ E    dE = dZ^T X

    Y is one-hot in the targets; u is 0 where the target is -1, else 1, and n = <1, u>.

    x (B, T, C); targets (B, T) int64; E = head.weight (V, C). Returns the loss, 0-d, and scale * dx (B, T, C). Logits
    are made once, for loss and gradient, a chunk of tokens at a time, see loss.chunked_cross_entropy.
    """
    E = head.weight
    n = (targets != -1).sum()
    losses, dx = [], []
    chunk = max(1, loss_module.LOSS_CHUNK // E.shape[0])
    for X, target in zip(x.flatten(0, 1).split(chunk), targets.flatten().split(chunk)):
        logits = F.linear(X, E)
        Z = widened(logits)
        losses.append(F.cross_entropy(Z, target, ignore_index=-1, reduction="none"))
        with torch.autocast(x.device.type, enabled=False):
            dZ = Z.softmax(-1)
            dZ[torch.arange(len(target), device=x.device), target.clamp(min=0)] -= 1
            dZ = dZ.mul_(((target != -1).to(Z.dtype) * scale / n)[:, None]).to(logits.dtype)
            dx.append((dZ @ E.to(dZ.dtype)).to(x.dtype))
            if E.requires_grad:
                add_gradient(E, dZ.T @ X.to(dZ.dtype))
    return torch.cat(losses).view(targets.shape).sum() / n, torch.cat(dx).view(x.shape)


# -- the model --------------------------------------------------------------------------------------


class Activations(NamedTuple):
    """What a block's backward needs."""

    x: Tensor  # (B, T, C), its input
    heads: Tensor  # (B, H + 2K, T, D), c_attn's output
    attention_backward: Callable  # dO (B, H, T, D) -> (dQ, dK, dV), of queries and keys normalised and rotated
    o: Tensor  # (B, T, H D), c_proj's input
    x_mid: Tensor  # (B, T, C), what MLP's norm reads
    h: Tensor  # (B, T, I) or (B, T, 2 I), c_fc's output


def block_forward(
    block: Block,
    x: Tensor,
    rope: Tensor | None,
    seed: Tensor | None,
    sight: Sight = ALL,
    attended: tuple[Tensor, Callable] | None = None,
) -> tuple[Tensor, Activations]:
    """model.Block's forward. attended: o and attention_backward of its Activations, where they are kept."""
    attn, mlp = block.attn, block.mlp
    B, T, _ = x.shape
    heads = attn.c_attn(block.ln_1(x)).view(B, T, -1, attn.D).transpose(1, 2)
    if attended is None:
        q, k, v = heads.split([attn.n_head, attn.n_kv_head, attn.n_kv_head], 1)
        q, k = attn.q_norm(q), attn.k_norm(k)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        q, k = q.to(v.dtype), k.to(v.dtype)
        o, backward = attend(attn, q, k, v, seed, sight)
        attended = o.transpose(1, 2).flatten(2), backward
    o, backward = attended
    x_mid = x + attn.c_proj(o)
    h = mlp.c_fc(block.ln_2(x_mid))
    return x_mid + mlp.c_proj(mlp.activate(h)), Activations(x, heads, backward, o, x_mid, h)


def attend(
    attn: nn.Module, q: Tensor, k: Tensor, v: Tensor, seed: Tensor | None, sight: Sight
) -> tuple[Tensor, Callable]:
    """model.Attend's forward, and its backward dO -> (dQ, dK, dV): the closed form, or SUS's kernels."""
    config = attn.attend.config
    if attn.training and config.attn_backward == "sus":
        return sus_attention_and_backward(
            q,
            k,
            v,
            config.sus_c,
            c_max=config.sus_c_max,
            seed=seed,
            sampler=config.sus_sampler,
            backend=config.sus_backend,
            stats=attn.attend.stats,
            key_ranges=sight.ranges,
        )
    return attn.attend(q, k, v, None, sight), lambda do: attention_backward(q, k, v, do, ranges=sight.ranges)


def block_backward(block: Block, a: Activations, dy: Tensor, rope: Tensor | None) -> Tensor:
    """A residual, Y = X + f(X):    dX = dY + (f's backward of dY). Twice: dy (B, T, C) is the block's output's."""
    attn, mlp = block.attn, block.mlp
    activation_backward = swiglu_backward if mlp.kind == "swiglu" else gelu_backward
    dh = activation_backward(a.h, linear_backward(mlp.c_proj, mlp.activate(a.h), dy.to(a.h.dtype)))
    dx_mid = dy + norm_backward(block.ln_2, a.x_mid, linear_backward(mlp.c_fc, block.ln_2(a.x_mid), dh))
    do = linear_backward(attn.c_proj, a.o, dx_mid.to(a.o.dtype))
    dq, dk, dv = a.attention_backward(do.unflatten(2, (-1, attn.D)).transpose(1, 2))
    if rope is not None:
        dq, dk = rope_backward(dq, rope), rope_backward(dk, rope)
    q, k, _ = a.heads.split([attn.n_head, attn.n_kv_head, attn.n_kv_head], 1)
    dq, dk = norm_backward(attn.q_norm, q, dq), norm_backward(attn.k_norm, k, dk)
    dheads = torch.cat([dq.to(dv.dtype), dk.to(dv.dtype), dv], 1).transpose(1, 2).flatten(2)  # (B, T, (H + 2K) D)
    return dx_mid + norm_backward(block.ln_1, a.x, linear_backward(attn.c_attn, block.ln_1(a.x), dheads))


def check_covered(model: GPT) -> None:
    """ValueError, by name, for what has no backward here."""
    if (
        model.training
        and (p := max((layer.p for layer in model.modules() if isinstance(layer, nn.Dropout)), default=0)) > 0
    ):
        raise ValueError(f"the analytic backward doesn't cover dropout, which is {p}: set it to 0")
    if model.config.attn_backward not in ("exact", "sus"):
        raise ValueError(
            f"the analytic backward doesn't cover attn_backward={model.config.attn_backward!r}: exact or sus"
        )


@torch.no_grad()
def loss_and_gradients(
    model: GPT, idx: Tensor, targets: Tensor, *, documents: Tensor | None = None, sus_seed: Tensor | None = None,
    scale: float | Tensor = 1.0,
) -> Tensor:  # fmt: skip
    """The mean loss, 0-d, of idx and targets (B, T) int64, as model(idx, targets, documents=documents,
    sus_seed=sus_seed) gives it under autocast or not; and its gradients times scale, added to p.grad of every parameter
    that requires one.

    With SUS, no sus_seed is one seed drawn from torch's default generator. Raises ValueError for what isn't covered.
    """
    check_covered(model)
    config, parts = model.config, model.transformer
    T = idx.shape[1]
    if T > config.block_size:
        raise ValueError(f"{T} tokens do not fit into block_size = {config.block_size}")
    if sus_seed is None and config.attn_backward == "sus":
        sus_seed = torch.randint(2**62, ())
    position = model.positions(0, T, documents)
    x = parts.wte(idx)
    if config.pos == "learned":
        x = x + parts.wpe(position)
    rope = None if model.rope is None else model.rope[:, :T]
    again = config.activation_checkpointing if model.training else "none"
    kept: list = []
    of_layers = list(zip(parts.h, model.seeds_by_layer(sus_seed), model.sights(T, documents)))
    for block, seed, sight in of_layers:
        y, a = block_forward(block, x, rope, seed, sight)
        kept.append({"none": a, "attention": (x, (a.o, a.attention_backward)), "full": (x, None)}[again])
        x = y
        del a
    loss, dx = cross_entropy(model.lm_head, parts.ln_f(x), targets, scale)
    with torch.autocast(idx.device.type, enabled=False):
        dx = norm_backward(parts.ln_f, x, dx)
    for block, seed, sight in reversed(of_layers):
        a = kept.pop()
        if again != "none":
            x, attended = a
            _, a = block_forward(block, x, rope, seed, sight, attended)
        with torch.autocast(idx.device.type, enabled=False):  # the dtypes are the forward's
            dx = block_backward(block, a, dx, rope)
        del a
    embedding_backward(parts.wte, idx, dx)
    if config.pos == "learned":
        embedding_backward(parts.wpe, position, dx.sum(0) if documents is None else dx)
    return loss
