"""Real inputs of attention: q, k, v and the output's gradient of some layers, in a file for bench_attention.py.

    python experiments/capture_attention.py models/smollm2 --text=book.txt --layers=2,10,20,24 --out=smollm2.pt
    python experiments/capture_attention.py out-long-ctx --text=book.txt --T=4096 --out=ours.pt
    python experiments/bench_attention.py --inputs=smollm2.pt

The model is a run of train.py (its folder, or a checkpoint) or a Hugging Face folder (config.json, model.safetensors,
tokenizer.json; examples/smollm2.py makes one). It reads one page, T tokens of the text, in float32. The loss is the
mean over the page of each next token's cross-entropy; nothing is trained, and dropout is off.

The file is torch.save's, and torch.load(weights_only=True) reads it: {"origin": {"model", "text", "start", "T",
"layers", "dtype", "loss"}, "layers": {LAYER: {"q", "k", "v", "grad_out"}}}. A layer whose scores are not multiplied by
1/sqrt(D) has its "scale" there too. q and k are those after rotary positions.

Dims: B batch (1), H query heads, K key/value heads, T tokens, D head dimension.
"""

import functools
import io
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from configurator import UserError, key, load_config, run_main  # isort: skip (before torch)

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recomputed
from tqdm import tqdm

from data.loader import Batch
from data.reading import read_text
from loss import chunked_cross_entropy
from measure import mib, numbers
from output import check_writable, progress_bar, write_whole
from sample import load_model
from training import checkpoint
from training.device import Device, memory_errors, resolve_device
from training.probe import capture

if TYPE_CHECKING:  # transformers is imported where it is used
    from transformers import PreTrainedModel

Layers = dict[int, dict[str, Tensor | float]]
NOT_PLAIN = ("softcap", "s_aux", "position_bias")  # arguments of attention that change it, beside a mask


@dataclass
class CaptureConfig:
    text: str = key("", "a file of text")
    start: int = key(0, "the page begins at this token of it", low=0)
    T: int = key(2048, "tokens of the page", low=16)
    layers: str = key("auto", "from 0, with commas between them; auto: the middle one")
    device: str = key("auto", "auto, cpu, cuda, cuda:1")
    out: str = key("attention.pt", "the file to write")


def main() -> None:
    cfg = load_config(CaptureConfig, [arg for arg in sys.argv[1:] if arg.startswith("-")], usage=__doc__)
    models = [arg for arg in sys.argv[1:] if not arg.startswith("-")]
    if len(models) != 1 or not cfg.text:
        raise UserError("give one model and one text: capture_attention.py out-long-ctx --text=FILE")
    check_writable(cfg.out)
    device = resolve_device(cfg.device, "float32")
    with memory_errors("Give a smaller --T"):
        run = hugging_face if os.path.exists(Path(models[0], "config.json")) else ours
        layers, loss = run(Path(models[0]), cfg, device)
    origin = {"model": models[0], "text": cfg.text, "start": cfg.start, "T": cfg.T, "layers": list(layers)}
    origin |= {"dtype": "float32", "loss": loss}
    file = io.BytesIO()
    torch.save({"origin": origin, "layers": layers}, file)
    write_whole(Path(cfg.out), file.getvalue())
    q, k = (tuple(next(iter(layers.values()))[name].shape) for name in "qk")
    print(
        f"{cfg.out}: {'layer' if len(layers) == 1 else 'layers'} {', '.join(map(str, layers))} of {models[0]}, "
        f"q {q}, k and v {k}, float32, {mib(file.tell())} MiB\n"
        f"the page's loss: {loss:.4f} nats a token"
    )


def chosen(cfg: CaptureConfig, count: int) -> list[int]:
    """The layers that --layers means in a model that has `count` of them. UserError."""
    layers = [count // 2] if cfg.layers == "auto" else numbers("layers", cfg.layers, int, 0)
    if layers[-1] >= count:
        raise UserError(f"--layers={cfg.layers}: the model has {count} layers, and they count from 0")
    return layers


def page(ids: Any, cfg: CaptureConfig, longest: int, device: Device) -> tuple[Tensor, Tensor]:
    """x, y (1, T) int64: the page, and the next tokens. ids: those of the whole text. UserError."""
    if cfg.T > longest:
        raise UserError(f"--T={cfg.T} is above the {longest} tokens that the model reads")
    taken = torch.as_tensor(ids[cfg.start : cfg.start + cfg.T + 1], dtype=torch.long, device=device.device)[None]
    if taken.shape[1] <= cfg.T:
        raise UserError(
            f"{cfg.text} has {len(ids):,} tokens, and the page, with the token behind it, takes {cfg.T + 1:,} from "
            f"{cfg.start:,} on: give a smaller --T, a smaller --start or a longer text"
        )
    return taken[:, :-1], taken[:, 1:]


def as_saved(q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, scale: float | None = None) -> dict:
    """A layer's part of the file."""
    own = lambda x: x.detach().cpu().clone(memory_format=torch.contiguous_format)  # what it is a view of stays outside
    tensors = {name: own(x) for name, x in zip(("q", "k", "v", "grad_out"), (q, k, v, grad_out))}
    return tensors if scale in (None, q.shape[3] ** -0.5) else tensors | {"scale": scale}


# -- a model of ours --------------------------------------------------------------------------------


def ours(path: Path, cfg: CaptureConfig, device: Device) -> tuple[Layers, float]:
    """The layers, and the page's loss, of a checkpoint's model."""
    model, tokenizer = load_model(checkpoint.find(path))
    model.to(device.device).config.activation_checkpointing = "attention"
    layers = chosen(cfg, model.config.n_layer)
    if inside := [layer for layer in layers if model.config.layer_windows[layer]]:
        raise UserError(
            f"layers {', '.join(map(str, inside))} see the last {model.config.attn_window} tokens, and the file is of "
            "layers that see all: choose others by --layers"
        )
    x, y = page(tokenizer.encode(read_text(Path(cfg.text))), cfg, model.config.block_size, device)
    with progress_bar(len(layers)) as bar:
        found = {}
        for layer in layers:
            found[layer] = as_saved(*capture(model, layer, Batch(x, y), device, None)[:4])
            bar.update()
    with torch.no_grad():
        return found, model(x, y)[1].item()


# -- a model of transformers ------------------------------------------------------------------------


class Recorder:
    """Attention for a model of transformers, as its function of that name: exact, and it keeps what some layers get.

    Activation checkpointing computes a layer's forward again in the backward; what counts is the first time, as the
    loss comes from that.
    """

    def __init__(self):
        self.layers, self.seen = [], {}
        self.bar: tqdm | None = None

    def __call__(
        self,
        module: torch.nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scaling: float | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """q (B, H, T, D), k and v (B, K, T, D) to (B, T, H, D)."""
        if mask is not None or any(options.get(name) is not None for name in NOT_PLAIN) or v.shape != k.shape:
            raise UserError(f"the attention of {type(module).__name__} is not plain causal attention, and SUS's is")
        gqa = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=gqa)
        if (layer := module.layer_idx) in self.layers:
            out.requires_grad_()  # the weights ask for no gradient, so the first of these layers begins the graph
            self.seen.setdefault(layer, (q, k, v, out, scaling))
        if self.bar is not None:
            self.bar.update()
        return out.transpose(1, 2), None


def hugging_face(folder: Path, cfg: CaptureConfig, device: Device) -> tuple[Layers, float]:
    """The layers, and the page's loss, of a model in a folder that transformers reads."""
    recorder = Recorder()
    model, tokenizer = load(folder, recorder)
    checkpoint_layers(model.to(device.device).requires_grad_(False))
    config = model.config.get_text_config()
    layers = chosen(cfg, config.num_hidden_layers)
    longest = getattr(config, "max_position_embeddings", None) or cfg.T
    ids = tokenizer(read_text(Path(cfg.text)), add_special_tokens=False, verbose=False).input_ids
    x, y = page(ids, cfg, longest, device)
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        logits = model(input_ids=x[:, :16], use_cache=False).logits
        last = model.base_model(input_ids=x[:, :16], use_cache=False).last_hidden_state
        if not torch.allclose(last @ head.T, logits, rtol=0, atol=1e-4 * logits.abs().max().item()):
            raise UserError(
                f"the logits of {folder} are not its last layer's states times its head: it isn't supported"
            )
    recorder.layers = layers
    with progress_bar(2 * config.num_hidden_layers - layers[0]) as recorder.bar:
        states = model.base_model(input_ids=x, use_cache=False).last_hidden_state
        loss = chunked_cross_entropy(states, head, y).mean()
        seen = [recorder.seen[layer] for layer in layers]
        gradients = torch.autograd.grad(loss, [out for _, _, _, out, _ in seen])
    found = {
        layer: as_saved(q, k, v, gradient, scale)
        for layer, (q, k, v, _, scale), gradient in zip(layers, seen, gradients)
    }
    return found, loss.item()


def checkpoint_layers(model: "PreTrainedModel") -> None:
    """Compute each layer's activations again in the backward. transformers' own way would switch on dropout."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.forward = functools.partial(recomputed, module.forward, use_reentrant=False)


def load(folder: Path, attention: Callable) -> tuple["PreTrainedModel", Any]:
    """The folder's model, in float32, with `attention` in each layer (see Recorder), and its tokenizer. UserError."""
    try:
        from transformers import (
            AttentionInterface,
            AttentionMaskInterface,
            AutoModelForCausalLM,
            AutoTokenizer,
            logging,
        )
        from transformers.masking_utils import sdpa_mask
    except ImportError:
        raise UserError(f"{folder} is read by transformers: pip install -r requirements-dev.txt") from None
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    AttentionInterface.register("ours", attention)
    AttentionMaskInterface.register("ours", sdpa_mask)  # makes none where the mask is the causal one
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="ours", local_files_only=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a damaged file can fail at any point
        reason = str(error).strip().partition("\n")[0][:200]
        raise UserError(f"transformers can't read {folder} ({type(error).__name__}: {reason})") from error
    return model, tokenizer


if __name__ == "__main__":
    run_main(main)
