"""Who runs in bench_attention.py, on which inputs, and whether SUS's results may be believed.

A contender is one way to compute attention, causal, in documents or in a window: a backend of torch's SDPA, SUS at some
c, FlexAttention. Before any of them is timed, `Check` compares SUS's forward and gradients with exact ones.

Dims: B batch, H query heads, K key/value heads, T tokens, D head dimension.
"""

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from configurator import UserError
from exact_attn import exact_attention
from measure import gradients
from sus_attn import check_inputs, sus_attention
from training.device import Device

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

SDPA = {
    "cpu": ("FLASH_ATTENTION", "MATH"),
    "cuda": ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"),
}
SLICE = 512  # tokens of the check in float64
DRAWS, BLOCKS, SIGMAS = 32, 8, 6.0  # of the check of the mean; some hundred numbers are compared
UNSEEN = 16  # what happens so often, on average, doesn't happen at all once in e^16 times


# -- what is measured -------------------------------------------------------------------------------


class Sight(NamedTuple):
    """What rows see: keys up to their own, of their own document and window."""

    documents: int = 0  # tokens of each; 0: all are of one
    window: int = 0  # so many keys, with its own; 0: any number


ALL = Sight()


class Contender(NamedTuple):
    """One way to compute attention: a function of q (B, H, T, D) and k, v (B, K, T, D) to (B, H, T, D)."""

    name: str
    kind: str  # "exact"; "sus"; "undrawn", SUS's forward where no gradient is wanted, so none is prepared; "peer"
    how: str  # the backend, of SDPA or of SUS; or "flex"
    c: float | None = None
    sampler: str = "tiles"
    sight: Sight = ALL
    apart: bool = False  # SUS by a call for each document

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, seed: int = 0, stats: Tensor | None = None) -> Tensor:
        T, (documents, window) = q.shape[2], self.sight
        gqa = q.shape[1] != k.shape[1]
        if self.how == "flex":
            mask = flex_blocks(T, q.device) if self.sight == ALL else flex_mask(T, self.sight, q.device)
            return compiled_flex()(q, k, v, block_mask=mask, enable_gqa=gqa)
        if self.kind == "exact":
            with sdpa_kernel(getattr(SDPBackend, self.how)):
                if window:
                    mask = sdpa_mask(T, self.sight, q.device)
                    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=gqa)
                parts = zip(*(x.split(documents or T, 2) for x in (q, k, v)))  # a call for each document
                return (
                    torch.cat([exact_attention(*part) for part in parts], 2) if documents else exact_attention(q, k, v)
                )
        options = dict(seed=seed, sampler=self.sampler, backend=self.how, stats=stats)
        with torch.set_grad_enabled(self.kind != "undrawn"):
            if self.apart:
                within = self._replace(sight=Sight(window=window), apart=False)
                parts = zip(*(x.split(documents, 2) for x in (q, k, v)))
                return torch.cat([within(*part, seed, stats) for part in parts], 2)
            ranges = None if self.sight == ALL else key_ranges(T, self.sight, q.device)
            return sus_attention(q, k, v, self.c, key_ranges=ranges, **options)


@functools.cache
def key_ranges(T: int, sight: Sight, device: torch.device) -> Tensor:
    """(T, 2) int32, of sus_attention."""
    row = torch.arange(T, device=device)
    lo = torch.zeros_like(row)
    if sight.documents:
        lo = row // sight.documents * sight.documents
    if sight.window:
        lo = torch.maximum(lo, row + 1 - sight.window)
    return torch.stack([lo, row + 1], -1).int()


def seen(ranges: Tensor, T: int) -> Tensor:
    """Whether rows of these ranges (R, 2) see each of T keys, bool (R, T)."""
    key = torch.arange(T, device=ranges.device)
    return (key >= ranges[:, :1]) & (key < ranges[:, 1:])


@functools.cache
def sdpa_mask(T: int, sight: Sight, device: torch.device) -> Tensor:
    """(T, T) bool."""
    return seen(key_ranges(T, sight, device), T)


@functools.cache
def flex_mask(T: int, sight: Sight, device: torch.device) -> "BlockMask":
    from torch.nn.attention.flex_attention import create_block_mask

    ranges = key_ranges(T, sight, device)
    return create_block_mask(lambda b, h, i, j: (j >= ranges[i, 0]) & (j < ranges[i, 1]), None, None, T, T, device)


@functools.cache
def compiled_flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@functools.cache
def flex_blocks(T: int, device: torch.device) -> "BlockMask":
    """FlexAttention's causal mask by its blocks: its own create_block_mask makes all T^2 entries, 17 GB at T = 128k."""
    from torch.nn.attention.flex_attention import BlockMask

    size = 128
    n = -(-T // size)
    row = torch.arange(n, dtype=torch.int32, device=device)
    all_blocks = row.expand(1, 1, n, n).contiguous()  # of a row the first ones count
    diagonal = torch.zeros_like(all_blocks)
    diagonal[..., 0] = row
    counts = (torch.ones_like(row)[None, None], diagonal, row[None, None], all_blocks)  # masked blocks, then whole ones
    causal = lambda b, h, i, j: i >= j
    return BlockMask.from_kv_blocks(*counts, BLOCK_SIZE=size, mask_mod=causal, seq_lengths=(T, T))


def label(backend: str) -> str:
    return backend.removesuffix("_ATTENTION").lower()


def contenders(
    device: Device, backends: dict[float, str], sampler: str = "tiles", sight: Sight = ALL
) -> list[Contender]:
    """Everything there is for the device. backends: SUS's, of each c."""
    typical = min(backends, key=lambda c: abs(c - 4))
    backend = backends[typical]
    members = [Contender(f"SDPA {label(name)}", "exact", name) for name in SDPA.get(device.type, ("MATH",))]
    members += [Contender(f"SUS c={c:g}", "sus", how, c, sampler) for c, how in backends.items()]
    members += [
        Contender("SUS undrawn", "undrawn", backend, typical, sampler),
        Contender("FlexAttention", "peer", "flex"),
    ]
    if backend != "reference":
        members.append(Contender(f"reference c={typical:g}", "peer", "reference", typical, sampler))
    if sight.documents:
        members.append(Contender(f"SUS c={typical:g} by document", "peer", backend, typical, sampler, apart=True))
    return [member._replace(sight=sight) for member in members]


def random_inputs(H: int, T: int, D: int, seed: int, device: Device) -> tuple[Tensor, ...]:
    """q, k, v and the output's gradient, each (1, H, T, D), normal random numbers in the device's dtype."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(1, H, T, D, generator=generator).to(device.device, device.dtype) for _ in range(4))


def captured_inputs(path: Path) -> tuple[str, dict[int, tuple[Tensor, ...]]]:
    """What capture_attention.py wrote: where it is from, and by layer q, k, v and the output's gradient. UserError."""
    try:
        saved = torch.load(path, weights_only=True)
        layers = {}
        for layer, kept in saved["layers"].items():
            q, k, v, grad_out = (kept[name] for name in ("q", "k", "v", "grad_out"))
            check_inputs(q, k, v)
            if "scale" in kept:  # all contenders multiply scores by 1 / sqrt(D)
                q = q * (kept["scale"] * q.shape[3] ** 0.5)
            layers[layer] = q, k, v, grad_out
        (_,) = {(x.shape, k.shape) for q, k, _, grad_out in layers.values() for x in (q, grad_out)}  # all alike
        names = ("layers " if len(layers) > 1 else "layer ") + ", ".join(map(str, layers))
        return f"{names} of {saved['origin']['model']} on {saved['origin']['text']}", layers
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from error
    except Exception as error:  # another file, or a damaged one, can fail at any point
        raise UserError(f"{path} is not what capture_attention.py wrote by --out=FILE") from error


def captured_layer(path: Path, layer: int, device: Device) -> tuple[Tensor, ...]:
    """q (1, H, T, D), k, v (1, K, T, D) and the output's gradient of one of its layers, in the device's dtype."""
    return tuple(x.to(device.device, device.dtype) for x in captured_inputs(path)[1][layer])


# -- is it right? -----------------------------------------------------------------------------------


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Memory that torch hands out is full of NaN: what a kernel leaves unwritten can't pass for a number."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # that fills it; what it warns of is no concern here
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def relative_error(x: Tensor, truth: Tensor) -> float:
    return ((x.double() - truth).norm() / truth.norm()).item()


def products(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> Tensor:
    """The inner products of two gradients (dq, dk, dv), of each tensor, head and block of rows: (n,) float64."""
    blocks = [zip(x.double().tensor_split(BLOCKS, 2), y.tensor_split(BLOCKS, 2)) for x, y in zip(a, b)]
    return torch.cat([(x * y).sum((0, 2, 3)) for pairs in blocks for x, y in pairs])


def largest_rows(a: tuple[Tensor, ...]) -> Tensor:
    """Of each block of `products`: the square of the largest row."""
    return torch.cat([x.square().sum((0, 3)).amax(1) for y in a for x in y.tensor_split(BLOCKS, 2)])


class Check:
    """Finds out whether SUS's results may be believed, and keeps what it compared: {what, value, limit} each."""

    def __init__(self, where: str = ""):
        self.where = where  # what is checked: "layer 2"
        self.findings = []
        self.deviation = {}  # c: of one draw's share of the whole gradient, for dq, dk, dv
        self.rounding = 0.0  # SDPA's own error in the gradients

    def compare(self, what: str, value: float, limit: float) -> None:
        what = f"{self.where}: {what}" if self.where else what
        self.findings.append({"what": what, "value": value, "limit": limit})
        if not value <= limit:  # NaN fails
            raise UserError(f"SUS is wrong here, so there are no figures: {what} is {value:.3g}, above {limit:.3g}")

    def start(self, exact: Contender, sus: list[Contender], q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor) -> None:
        """On a short slice of the inputs: all values in float64's light, and the mean of many draws at each c.

        Documents and windows are cut down with it, to an uneven quarter of the slice at most, so that it has their
        edges.
        """
        short = Sight(*(min(size, SLICE // 4 + 5) for size in exact.sight))
        exact, sus = exact._replace(sight=short), [contender._replace(sight=short) for contender in sus]
        inputs = tuple(x[:, :, :SLICE] for x in (q, k, v, grad_out))
        math_ = exact._replace(how="MATH")
        truth = gradients(math_, *(x.double() for x in inputs))
        tiny = torch.finfo(q.dtype).eps  # in float64 SDPA's error may be less than one rounding
        own = [relative_error(x, t) for x, t in zip(gradients(exact, *inputs), truth)]
        self.rounding = max(*own, tiny)
        size = products(truth[1:], truth[1:])
        norms = torch.cat([t.norm().expand(BLOCKS * t.shape[1]) for t in truth[1:]])
        room = 2 * self.rounding * norms / size.sqrt() / SIGMAS
        # A cut so rare that no draw has it shows in no standard deviation, but all draws are scaled up for it: at most
        # by UNSEEN cuts in DRAWS draws, of a row that matters most in its block.
        unseen = UNSEEN / DRAWS / SIGMAS * largest_rows(truth[1:]) / size
        with poisoned():
            full = gradients(sus[0]._replace(c=math.inf), *inputs)
        for name, x, t, error in zip(("forward", "dq at c = inf", "dk at c = inf", "dv at c = inf"), full, truth, own):
            self.compare(f"the relative error of the {name}", relative_error(x, t), 2 * error + tiny)
        for contender in sus:
            with poisoned():
                draws = [gradients(contender, *inputs, seed=seed) for seed in range(DRAWS)]
            self.compare(
                f"the relative error of the forward at c = {contender.c:g}",
                relative_error(draws[0][0], truth[0]),
                2 * own[0] + tiny,
            )
            # How much of the truth is in a draw, block by block: 1 on average. An error that is small beside the whole
            # gradient may be large in a block where that is small.
            off = torch.stack([products(grads, truth[1:]) for _, *grads in draws]) / size - 1  # (draws, n)
            error = torch.maximum(off.std(0) / DRAWS**0.5, unseen) + room
            self.compare(
                f"the distance of the gradient's mean over {DRAWS} draws at c = {contender.c:g}, in standard errors,",
                (off.mean(0) / error).abs().nan_to_num(math.inf).max().item(),
                SIGMAS,
            )
            self.deviation[contender.c] = whole_shares([grads for _, *grads in draws], truth[1:]).std(0)

    def at(
        self, exact: tuple[Tensor, ...], results: tuple[Tensor, ...], sus: Contender, q: Tensor, k: Tensor, v: Tensor
    ) -> None:
        """At full length: some rows of the forward in float64's light, and whether one draw is off by too much."""
        T, G, c = q.shape[2], q.shape[1] // k.shape[1], sus.c
        rows = torch.linspace(0, T - 1, min(T, 64), device=q.device).long()
        k, v = (x.double().repeat_interleave(G, 1) for x in (k, v))
        scores = q[:, :, rows].double() @ k.mT * q.shape[3] ** -0.5
        scores.masked_fill_(~seen(key_ranges(T, sus.sight, q.device)[rows], T), -math.inf)
        truth = scores.softmax(-1) @ v
        own = relative_error(exact[0][:, :, rows], truth)
        self.compare(
            f"the relative error of the forward at T = {T}, c = {c:g}",
            relative_error(results[0][:, :, rows], truth),
            2 * own + torch.finfo(q.dtype).eps,
        )
        off = whole_shares([results[1:]], [x.double() for x in exact[1:]])[0] - 1
        # That of the slice, where a large c may have kept all; with even weights it would be 1 / sqrt(c * H * D).
        even = (c * exact[0].shape[1] * exact[0].shape[3]) ** -0.5
        allowed = self.deviation[c].clamp(min=even) + 2 * self.rounding / SIGMAS
        self.compare(
            f"the distance of one draw's gradient at T = {T}, c = {c:g}, in standard deviations,",
            (off.abs() / allowed).nan_to_num(math.inf).max().item(),
            SIGMAS,
        )


def whole_shares(draws: list[tuple[Tensor, ...]], truth: tuple[Tensor, ...]) -> Tensor:
    """(draws, 3) float64: each draw's share of the exact dq, dk, dv."""
    return torch.tensor(
        [[((g.double() * t).sum() / (t * t).sum()).item() for g, t in zip(grads, truth)] for grads in draws],
        dtype=torch.float64,
    )
