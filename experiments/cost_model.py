"""
What the Triton kernels should take on a GPU, from what they do and what the chip can do; nothing is measured.

    python experiments/cost_model.py [--T=8192,32768,131072,1048576] [--D=64] [--H=12] [--c=25]

docs/performance.md has the sources of the rates, and what is assumed. Time is the sum of the kernels' times, a kernel's
the largest of what its instructions, its products and its bytes take.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from configurator import UserError, key, load_config, run_main
from measure import numbers
from output import print_table


@dataclass
class Config:
    T: str = key("8192,32768,131072,1048576", "positions")
    D: int = key(64, "head dim", choices=(64, 128))
    H: int = key(12, "query heads; as many key/value heads", low=1)
    c: float = key(25.0, "the retention parameter, of the weighted sampler", above=0)


# NVIDIA H200 SXM
CLOCK, SMS = 1.83e9, 132
LANES = 128 * SMS * CLOCK  # instructions of one thread a second
BF16 = 989e12  # floating-point operations a second on the tensor cores
L2, HBM = 5.5e12, 4.8e12  # bytes a second

# Rates of attention without a causal mask at T = 16k on an H100, floating-point operations a second; with one they are lower
EXACT = {64: dict(forward=413e12, backward=433e12), 128: dict(forward=595e12, backward=516e12)}
TRITON_FORWARD = {64: 403e12, 128: 395e12}

# Instructions of a thread for each score, counted in the compiled loop over tiles (tests/compile_triton.py), and for each
# turn of the loop that stores what was kept, of which a tile takes about two.
FORWARD, DRAW, DRAW_TURN, TURNS = 11, 16.3, 3.6, 2
TILE, BLOCKS, SOME = 64, 4, 8  # of key_gradients: keys, and entries at once
LEFT = 0.5  # of the proposals, after thinning


def predict(T: int, D: int, H: int, c: float) -> dict[str, float]:
    """Milliseconds by kernel, and of exact attention."""
    pairs, rows = H * T * T / 2, H * T
    proposals = rows * min(2 * c, T / 2)
    left, vector = LEFT * proposals, 2 * D  # bytes of a row of K, V, Q or G
    # what part of the lanes' rate a loop over tiles reaches: as much as the forward, whose rate is published
    efficiency = (FORWARD / LANES) / (4 * D / TRITON_FORWARD[D])
    regions = max(proposals / (BLOCKS * SOME), H * (T / TILE) ** 2 / 2 / BLOCKS)
    seconds = dict(
        exact_forward=4 * D * pairs / EXACT[D]["forward"],
        exact_backward=10 * D * pairs / EXACT[D]["backward"],
        forward=4 * D * pairs / TRITON_FORWARD[D],
        draw=max(pairs * (DRAW + DRAW_TURN * TURNS) / LANES / efficiency, 2 * D * pairs / BF16),
        slopes=(proposals * (2 * vector + 16) + rows * 3 * vector) / L2,
        thin=proposals * 24 / HBM,
        query_gradients=(left * vector + proposals * 8 + rows * vector) / L2,
        key_gradients=max(
            (left * 2 * vector + proposals * 16) / L2,
            regions * BLOCKS * SOME * TILE * D * 4 / BF16 / efficiency,
        ),
    )
    return {name: 1e3 * x for name, x in seconds.items()}


def main():
    cfg = load_config(Config, sys.argv[1:], usage=__doc__)
    if any(not arg.startswith("--") for arg in sys.argv[1:]):
        raise UserError("cost_model.py takes keys only, such as --T=32768")
    kernels = ["forward", "draw", "slopes", "thin", "query_gradients", "key_gradients"]
    table = [["T", "exact fwd", "exact bwd", *kernels, "bwd ratio", "fwd+bwd ratio"]]
    for T in numbers("T", cfg.T, int, 16):
        ms = predict(T, cfg.D, cfg.H, cfg.c)
        backward = sum(ms[name] for name in kernels[1:])
        exact = ms["exact_forward"], ms["exact_backward"]
        table.append([f"{T:,}", *(f"{x:,.3g}" for x in (*exact, *(ms[name] for name in kernels))),
                      f"{exact[1] / backward:.2f}", f"{sum(exact) / (ms['forward'] + backward):.2f}"])  # fmt: skip
    print(f"predicted, not measured: ms on an H200, bf16, H = {cfg.H}, D = {cfg.D}, c = {cfg.c:g}, weighted draws")
    print_table(table)


if __name__ == "__main__":
    run_main(main)
