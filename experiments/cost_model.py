"""What the Triton kernels should take on a GPU, from what they do and what the chip can do; nothing is measured.

    python experiments/cost_model.py [--T=8192,32768,131072,1048576] [--D=64] [--H=12] [--c=4]

docs/performance.md has the sources of the rates, and what is assumed. The GPU's time is the sum of the kernels' times,
a kernel's the largest of what its instructions, its products and its bytes take. Where the host needs longer to launch
them, its time counts.

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

# Rates of attention at T = 16k on an H100, floating-point operations a second: the forwards' with the causal mask (at
# D = 128 it is assumed to cost the share that it does at D = 64), the backwards' without, as none is published with it
EXACT = {64: dict(forward=388e12, backward=433e12), 128: dict(forward=559e12, backward=516e12)}
TRITON_FORWARD = {64: 363e12, 128: 356e12}

# Instructions of a thread, counted in the compiled loops (tests/compile_triton.py): for each score, without and with
# what the draw needs of the forward; for each row and tile; for each word of bits, and more for each bit of the fullest
# of 256; and for each score of a kept row and tile.
FORWARD, FORWARD_NOTING, DRAW, WORD, BIT, GRADIENTS = 11.0, 11.9, 26.3, 58, 13.5, {64: 45, 128: 67}
TILE = reference.TILE
# Seconds. Of a warp with others too few to hide it: an instruction, two clocks, and a wait for memory. A step of plan.
ISSUE, WAIT, STEP = 2 / CLOCK, 0.6e-6, 2e-6
SOME, RESIDENT, PLANNED = 8, 8, 2048  # draw's tiles at once, its programs on an SM; plan's regions at once
# Of the device, a launch; of the host, Triton's Python for one of 7 arguments, and for each more, an operation of
# PyTorch, a new tensor, and the operator with its autograd
LAUNCH, PYTHON, ARGUMENT, OPERATION, TENSOR, OPERATOR = 4e-6, 27e-6, 2.4e-6, 8e-6, 2e-6, 50e-6
ARGUMENTS = dict(forward=36, draw=27), dict(thin=34, plan=7, list_rows=8, tile_gradients=50, sum_parts=24)


def host(kernels: dict[str, int], rounds: int, operations: int, operations_once: int, tensors: int) -> float:
    """Seconds of a forward or a backward."""
    launches = sum(PYTHON + ARGUMENT * (arguments - 7) for arguments in kernels.values())
    return rounds * (launches + OPERATION * operations) + OPERATION * operations_once + TENSOR * tensors + OPERATOR


def draw(T: int, H: int) -> float:
    """Seconds of the rounds' programs, one after the other on an SM as there is room, each step by step."""
    seconds = 0.0
    for _, heads, row, rows in triton.rounds_of(H, T, T, 0):
        waves = -(-heads * -(-rows // triton.ROWS) // (RESIDENT * SMS))
        seconds += waves * (row + rows / 2) / TILE / SOME * (WAIT + SOME * DRAW * ISSUE)
    return seconds


def predict(T: int, D: int, H: int, c: float) -> dict[str, float]:
    """Milliseconds by kernel, of the host, and of exact attention."""
    pairs, rows = H * T * T / 2, H * T
    all_tiles, kept, proposed = pairs / TILE, rows * min(c, T / TILE / 2), rows * min(2 * c, T / TILE / 2)
    vector, slots = 2 * D, reference.tile_slots(c, T)  # a row of K, V, Q or G in bytes
    # what part of the lanes' rate a loop over tiles reaches: as much as the forward, whose rate is published
    efficiency = (FORWARD / LANES) / (4 * D / TRITON_FORWARD[D])
    lanes = lambda instructions: instructions / LANES / efficiency
    bits = 32 * kept / all_tiles  # of a word
    fullest = bits + 3 * bits**0.5 + 1
    jobs = kept / triton.JOB + H * T / TILE
    heads = triton.heads_at_once(H, 1, T, T, D, slots)
    forwards, backwards = len(triton.rounds_of(H, T, T, 0)), -(-H // heads)
    seconds = dict(
        exact_forward=4 * D * pairs / EXACT[D]["forward"],
        exact_backward=10 * D * pairs / EXACT[D]["backward"],
        forward=4 * D * pairs / TRITON_FORWARD[D] * FORWARD_NOTING / FORWARD,
        draw=max(lanes(all_tiles * DRAW), all_tiles * 4 * 2 / HBM, draw(T, H)),
        thin=(rows * (3 * vector + slots * 12) + proposed * 64) / HBM,  # G once more for its norms
        lists=max(lanes(all_tiles / 32 * (WORD + BIT * fullest)), 2 * 2 * all_tiles / 8 / HBM)
        + backwards * -(-heads * T // TILE // PLANNED) * STEP,
        tile_gradients=max(
            lanes(kept * TILE * GRADIENTS[D]), kept * TILE * 10 * D / BF16, kept * (2 * vector + 4 * D + slots * 8) / L2
        ),
        sums=(kept * 4 * D + jobs * TILE * D * 16 + rows * vector) / HBM,
        launches_forward=2 * forwards * LAUNCH,
        launches=(6 * backwards + 2) * LAUNCH,
        host_forward=host(ARGUMENTS[0], forwards, 0, 2, 5),
        host_backward=host(ARGUMENTS[1], backwards, 1, 8, 17),
    )
    return {name: 1e3 * x for name, x in seconds.items()}


def main() -> None:
    cfg = load_config(Config, sys.argv[1:], usage=__doc__)
    if any(not arg.startswith("--") for arg in sys.argv[1:]):
        raise UserError("cost_model.py takes keys only, such as --T=32768")
    if cfg.D not in EXACT:
        raise UserError(f"--D={cfg.D}: the rates are known for {' and '.join(map(str, EXACT))} only")
    of_forward = ["forward", "draw", "launches_forward"]
    of_backward = ["thin", "lists", "tile_gradients", "sums", "launches"]
    table = [["T", "exact fwd", "exact bwd", *of_forward[:2], *of_backward, "host", "bwd ratio", "fwd+bwd ratio"]]
    for T in numbers("T", cfg.T, int, 16):
        ms = predict(T, cfg.D, cfg.H, cfg.c)
        forward, backward = sum(ms[name] for name in of_forward), sum(ms[name] for name in of_backward)
        exact, host = (ms["exact_forward"], ms["exact_backward"]), ms["host_forward"] + ms["host_backward"]
        ms["launches"] += ms["launches_forward"]
        table.append(
            [
                f"{T:,}",
                *(f"{x:,.3g}" for x in (*exact, *(ms[name] for name in of_forward[:2] + of_backward), host)),
                f"{exact[1] / max(backward, ms['host_backward']):.2f}",
                f"{sum(exact) / max(forward + backward, host):.2f}",
            ]
        )
    print(f"predicted, not measured: ms on an H200, bf16, H = {cfg.H}, D = {cfg.D}, c = {cfg.c:g}")
    print_table(table)


if __name__ == "__main__":
    run_main(main)
