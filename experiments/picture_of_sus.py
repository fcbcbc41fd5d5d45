"""A picture of SUS at work: one head's attention weights, and those that its backward keeps.

    python experiments/picture_of_sus.py --out_dir=out-long-ctx --out=sus.png

The head's queries and keys are those of a trained model on a window of its validation text. The left half shows all
causal weights, the right half the kept ones, coloured by the weight that they get, W/q.

Dims: T tokens, D head dimension.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from configurator import UserError, key, load_config, run_main  # isort: skip (before torch)

import torch
from torch import Tensor

from measure import check_sight, trained_inputs
from output import check_picture, import_pyplot, save_picture
from sus_backends.reference import Known, row_weights, sus_multiplier
from training import checkpoint
from training.device import resolve_device
from training.weights import model_from_checkpoint


@dataclass
class PictureConfig:
    out_dir: str = key("out", "a run of train.py")
    dataset: str = key("", "folder under data/; empty: the run's own")
    layer: int = key(1, "layer, from 0", low=0)
    head: int = key(0, "head, from 0", low=0)
    c: float = key(4.0, "the retention parameter", above=0)
    seed: int = key(0, "seeds the draw", low=0, high=2**63 - 1)
    out: str = key("sus.png", "the picture: .png, .svg or .pdf")


def main() -> None:
    cfg = load_config(PictureConfig, sys.argv[1:], usage=__doc__)
    check_picture(cfg.out)
    path = Path(cfg.out_dir) / "ckpt.pt"
    saved = checkpoint.load(path)
    model = model_from_checkpoint(saved, path)
    check_sight(model, saved["config"])
    config = model.config
    if cfg.layer >= config.n_layer or cfg.head >= config.n_head:
        raise UserError(
            f"the model has {config.n_layer} layers of {config.n_head} heads: --layer and --head count from 0"
        )
    dataset, device = cfg.dataset or saved["config"]["dataset"], resolve_device("cpu", "float32")
    q, k, _, grad_out = trained_inputs(model, cfg.layer, dataset, config.block_size, device)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    T, D = q.shape[2:]
    scores = (q[:, [cfg.head]] @ k[:, [cfg.head]].mT) * D**-0.5
    w = torch.softmax(scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf), -1)
    known = Known(row_weights(grad_out)[:, [cfg.head], :, None], None, None)
    m, _ = sus_multiplier(torch.tensor(cfg.c), cfg.c, "tiles", torch.tensor(cfg.seed), None, T)(w, range(T), known)
    kept = (m > 0).sum().item()
    print(
        f"layer {cfg.layer}, head {cfg.head}, c = {cfg.c:g}: {kept / T:.1f} of {(T + 1) / 2:.1f} entries a row kept, "
        f"{kept / (T * (T + 1) / 2):.2%}; they hold {(w * (m > 0)).sum() / T:.1%} of the attention"
    )
    draw(w[0, 0], (w * m)[0, 0], kept / (T * (T + 1) / 2), cfg)
    print(f"picture: {cfg.out}")


def draw(w: Tensor, w_kept: Tensor, fraction: float, cfg: PictureConfig) -> None:
    plt = import_pyplot()
    from matplotlib.colors import LogNorm

    T = len(w)
    side = min(T, 512)
    pool = T // side  # a pixel shows the largest of its weights
    figure, axes = plt.subplots(1, 2, figsize=(10, 5.2), layout="constrained", sharey=True)
    titles = ("forward: all weights $W$", f"backward: the {fraction:.1%} that SUS keeps, as $W/q$ (c = {cfg.c:g})")
    for axis, weights, title in zip(axes, (w, w_kept), titles):
        pixels = torch.nn.functional.max_pool2d(weights[None, None], pool)[0, 0]
        pixels[pixels <= 1e-6] = torch.nan
        image = axis.imshow(
            pixels.numpy(), norm=LogNorm(1e-4, 1), cmap="viridis_r", interpolation="nearest", extent=(0, T, T, 0)
        )
        axis.set(title=title, xlabel="key position")
    axes[0].set_ylabel("query position")
    figure.colorbar(image, ax=axes, label="attention weight", shrink=0.8)
    save_picture(figure, Path(cfg.out), dpi=110)


if __name__ == "__main__":
    run_main(main)
