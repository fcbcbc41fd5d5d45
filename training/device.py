"""Where to compute and in which precision: `auto` resolved once, with the reason, for train.py and sample.py."""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from configurator import UserError
from model import GPT

# Dense bfloat16/float16 tensor-core peaks with float32 accumulation, TFLOP/s, from the makers' data sheets.
PEAK_TFLOPS = {
    "B200": 2250,
    "H200 NVL": 836,
    "H200": 989,
    "H100 NVL": 836,
    "H100 PCIe": 756,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "A10G": 70,
    "RTX 4090": 165,
    "RTX 3090": 71,
    "V100": 125,
    "T4": 65,
}


@dataclass(frozen=True)
class Device:
    device: torch.device
    dtype: torch.dtype  # of the forward, by autocast; the weights stay float32
    reason: str

    @property
    def type(self) -> str:
        return self.device.type

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.type, dtype=self.dtype)

    @contextlib.contextmanager
    def training_forward(self, offload: bool) -> Iterator[None]:
        """Around a forward whose gradient is wanted. offload: what is kept for it lies in the host's memory."""
        save = torch.autograd.graph.save_on_cpu(pin_memory=self.type == "cuda")
        with self.autocast(), save if offload else contextlib.nullcontext():
            yield

    def synchronize(self) -> None:
        if self.type != "cpu":
            torch.accelerator.synchronize()

    def peak_flops(self, peak_tflops: float) -> float | None:
        """The device's dense peak in FLOP/s: the one given, or by its name; None if unknown."""
        if peak_tflops:
            return peak_tflops * 1e12
        if self.type == "cuda" and self.dtype != torch.float32:
            name = torch.cuda.get_device_name(self.device)
            return next((t * 1e12 for part, t in PEAK_TFLOPS.items() if re.search(rf"\b{part}\b", name)), None)
        return None


@contextlib.contextmanager
def memory_errors(advice: str) -> Iterator[None]:
    """Where memory runs out, one clear line, a UserError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if isinstance(error, RuntimeError) and not re.search("out of memory|can't allocate memory", str(error)):
            raise
        raise UserError(f"out of memory. {advice}") from error


def resolve_device(device: str, dtype: str, local_rank: int | None = None) -> Device:
    """The Device that the keys `device` and `dtype` mean here. local_rank: of this process under
    torchrun, else None.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        why = "the fastest here"
    else:
        why = "asked for"
    try:
        resolved = torch.device(device)
        if resolved.type not in ("cpu", "cuda", "mps", "xpu"):
            raise RuntimeError("it computes nothing")
        if resolved.type == "cuda" and resolved.index is None:
            resolved = torch.device("cuda", local_rank or 0)
        elif resolved.type == "cuda" and local_rank is not None:
            raise RuntimeError("under torchrun each process takes its own GPU, so give --device=cuda without a number")
        torch.zeros(1, device=resolved)
        if resolved.type == "cuda":
            torch.cuda.set_device(resolved)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        available = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        reason = str(error).partition("\n")[0]
        raise UserError(f"device {device!r} can't be used: {reason}. Here are: {', '.join(available)}") from None
    if dtype != "auto":
        reason = "asked for"
    elif resolved.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        dtype, reason = "bfloat16", "this GPU has it"
    elif resolved.type == "cuda":
        dtype, reason = "float16", "this GPU has no bfloat16"
    else:
        dtype, reason = "float32", f"the fastest on most {resolved.type} machines"
    name = f"{resolved} ({torch.cuda.get_device_name(resolved)})" if resolved.type == "cuda" else str(resolved)
    return Device(resolved, getattr(torch, dtype), f"{name}: {why}; {dtype}: {reason}")


def flops_per_token(model: GPT, T: int) -> int:
    """Nominal floating-point operations a token, forward and backward, at context T (PaLM, arXiv 2204.02311, B).

    Nominal: attention counts as dense, T keys a query or a layer's window, whatever else the causal mask, documents or
    SUS leave out. A frozen weight has no gradient of its own: 4 operations instead of 6.
    """
    config, n = model.config, model.num_params()
    if not config.tie_head:
        n -= model.transformer.wte.weight.numel()  # looked up, not multiplied
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    trained = min(n, trained)  # n is without position embeddings
    keys = sum(min(T, window or T) for window in config.layer_windows)
    return 4 * n + 2 * trained + 12 * config.n_head * config.D * keys
