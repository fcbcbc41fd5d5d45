"""What the Triton kernels should take on a GPU, from what they do and what the chip can do; nothing is measured.

    python experiments/cost_model.py [--T=8192,32768,131072,1048576] [--D=64] [--H=12] [--c=4]

docs/performance.md has the sources of the rates, and what is assumed. Time is the sum of the kernels' times, a kernel's
the largest of what its instructions, its products and its bytes take.

Dims: H heads, T positions, D head dimension.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from configurator import UserError, key, load_config, run_main
from measure import numbers
from output import print_table
from sus_backends import reference, triton


@dataclass
class Config:
    T: str = key("8192,32768,131072,1048576", "positions")
    D: int = key(64, "head dim, 64 or 128")
    H: int = key(12, "query heads; as many key/value heads", low=1)
    c: float = key(4.0, "the retention parameter", above=0)


# NVIDIA H200 SXM
CLOCK, SMS = 1.83e9, 132
LANES = 128 * SMS * CLOCK  # instructions of one thread a second
BF16 = 989e12  # floating-point operations a second on the tensor cores
L2, HBM = 5.5e12, 4.8e12  # bytes a second

# Rates of attention without a causal mask at T = 16k on an H100, floating-point operations a second; with one they are
# lower
EXACT = {64: dict(forward=413e12, backward=433e12), 128: dict(forward=595e12, backward=516e12)}
TRITON_FORWARD = {64: 403e12, 128: 395e12}

# Instructions of a thread, counted in the compiled loops (tests/compile_triton.py): for each score, without and with
# what the draw needs of the forward; for each row and tile; for each word of bits, and more for each bit of the fullest
# of 256; and for each score of a kept row and tile.
FORWARD, FORWARD_NOTING, DRAW, WORD, BIT, GRADIENTS = 10.9, 11.6, 31.5, 46.5, 24.5, {64: 43, 128: 65}
TILE = reference.TILE
LAUNCHES, LAUNCH = 11, 4e-6  # of each round of the backward, and what one takes at least, seconds


def predict(T: int, D: int, H: int, c: float) -> dict[str, float]:
    """Milliseconds by kernel, and of exact attention."""
    pairs, rows = H * T * T / 2, H * T
    all_tiles, kept, proposed = pairs / TILE, rows * min(c, T / TILE / 2), rows * min(2 * c, T / TILE / 2)
    vector, slots = 2 * D, reference.tile_slots(c, T)  # a row of K, V, Q or G in bytes
    # what part of the lanes' rate a loop over tiles reaches: as much as the forward, whose rate is published
    efficiency = (FORWARD / LANES) / (4 * D / TRITON_FORWARD[D])
    lanes = lambda instructions: instructions / LANES / efficiency
    bits = 32 * kept / all_tiles  # of a word
    fullest = bits + 3 * bits**0.5 + 1
    jobs = kept / triton.JOB + H * T / TILE
    rounds = -(-H * triton.parts_of(c, T) * D // triton.ROUND)
    seconds = dict(
        exact_forward=4 * D * pairs / EXACT[D]["forward"],
        exact_backward=10 * D * pairs / EXACT[D]["backward"],
        forward=4 * D * pairs / TRITON_FORWARD[D] * FORWARD_NOTING / FORWARD,
        draw=max(lanes(all_tiles * DRAW), all_tiles * 4 * 2 / HBM),
        thin=(rows * (2 * vector + slots * 12) + proposed * 64) / L2,
        list_rows=max(lanes(all_tiles / 32 * (WORD + BIT * fullest)), 2 * 2 * all_tiles / 8 / HBM),
        tile_gradients=max(
            lanes(kept * TILE * GRADIENTS[D]), kept * TILE * 10 * D / BF16, kept * (2 * vector + 4 * D + slots * 8) / L2
        ),
        sums=(kept * 4 * D + jobs * TILE * D * 16 + rows * vector) / HBM,
        launches=rounds * LAUNCHES * LAUNCH,
    )
    return {name: 1e3 * x for name, x in seconds.items()}


def main() -> None:
    cfg = load_config(Config, sys.argv[1:], usage=__doc__)
    if any(not arg.startswith("--") for arg in sys.argv[1:]):
        raise UserError("cost_model.py takes keys only, such as --T=32768")
    if cfg.D not in EXACT:
        raise UserError(f"--D={cfg.D}: the rates are known for {' and '.join(map(str, EXACT))} only")
    kernels = ["forward", "draw", "thin", "list_rows", "tile_gradients", "sums", "launches"]
    table = [["T", "exact fwd", "exact bwd", *kernels, "bwd ratio", "fwd+bwd ratio"]]
    for T in numbers("T", cfg.T, int, 16):
        ms = predict(T, cfg.D, cfg.H, cfg.c)
        backward = sum(ms[name] for name in kernels[2:])
        exact = ms["exact_forward"], ms["exact_backward"]
        table.append(
            [
                f"{T:,}",
                *(f"{x:,.3g}" for x in (*exact, *(ms[name] for name in kernels))),
                f"{exact[1] / backward:.2f}",
                f"{sum(exact) / (ms['forward'] + ms['draw'] + backward):.2f}",
            ]
        )
    print(f"predicted, not measured: ms on an H200, bf16, H = {cfg.H}, D = {cfg.D}, c = {cfg.c:g}")
    print_table(table)


if __name__ == "__main__":
    run_main(main)
