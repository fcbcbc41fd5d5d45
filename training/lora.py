"""LoRA: fine-tuning with few trained weights (Hu et al., arXiv 2106.09685, section 4.1).

Beside the weight W (out, in) of a linear layer, which stays as it is, stand two thin matrices, A (r, in) and B (out,
r), its adapter, and the layer computes x (W + alpha / r B A)^T. Only adapters are trained: all else of the model, the
base, is frozen. B begins as zeros, so that training begins at the base. Once trained, B A can be added to W (`merge`),
and costs nothing then.
"""

import hashlib

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from configurator import UserError
from model import GPT


class LoRALinear(nn.Linear):
    """A linear layer with an adapter: y = x W^T + b + scale * dropout(x) A^T B^T, where scale = alpha / r.

    x (..., in), y (..., out). weight (out, in) and bias (out,) or None are those of `linear`, frozen; lora_a (r, in)
    and lora_b (out, r), of their dtype and on their device, are trained.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float = 0.0):
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.requires_grad_(False)
        self.lora_a = nn.Parameter(linear.weight.new_empty(rank, linear.in_features))
        self.lora_b = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))
        nn.init.normal_(self.lora_a, std=linear.in_features**-0.5)  # x A^T is of the size of x
        self.scale = alpha / rank
        self.lora_dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(self.scale * F.linear(self.lora_dropout(x), self.lora_a), self.lora_b)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The plain layer that computes the same, without the dropout."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight, linear.bias = nn.Parameter(self.weight + self.scale * self.lora_b @ self.lora_a), self.bias
        return linear


def add_adapters(model: GPT, rank: int, alpha: float, targets: str, dropout: float = 0.0) -> None:
    """Give the linear layers `targets` of each of a GPT's blocks adapters, and freeze all else.

    targets: names within a block, separated by commas; c_proj means attn.c_proj and mlp.c_proj. UserError if unknown,
    or if rank is above theirs.
    """
    layers = [name for name, module in model.transformer.h[0].named_modules() if isinstance(module, nn.Linear)]
    asked_for = [name for name in map(str.strip, targets.split(",")) if name] or [""]
    for name in asked_for:
        if not any(matches(layer, name) for layer in layers):
            bare = dict.fromkeys(layer.rpartition(".")[2] for layer in layers)
            raise UserError(
                f"lora_targets: {name!r} is none of the layers {', '.join(layers)}, nor a name of several "
                f"({', '.join(bare)})"
            )
    model.requires_grad_(False)
    for block in model.transformer.h:
        for layer in layers:
            if any(matches(layer, name) for name in asked_for):
                linear = block.get_submodule(layer)
                assert isinstance(linear, nn.Linear)
                if rank > min(linear.weight.shape):
                    raise UserError(
                        f"lora_rank={rank} is above the {min(linear.weight.shape)} that {layer} can have: no fewer "
                        "weights "
                        "would be trained; give less"
                    )
                block.set_submodule(layer, LoRALinear(linear, rank, alpha, dropout))


def matches(layer: str, name: str) -> bool:
    return layer == name or layer.endswith(f".{name}")


def merge(model: GPT) -> GPT:
    """Fold the adapters into plain layers. Returns the model, all of whose weights can be trained again."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            model.set_submodule(name, module.merged())
    return model.requires_grad_(True)


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' part of the model's state_dict."""
    return {name: t for name, t in model.state_dict().items() if name.endswith((".lora_a", ".lora_b"))}


def fingerprint(model: nn.Module) -> str:
    """What tells a base from others: the sha256 of the names, shapes, dtypes and bytes of its weights, as 64 hex
    digits.
    """
    digest = hashlib.sha256()
    for name, t in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(t.shape)} {t.dtype}\n".encode())
        digest.update(t.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
