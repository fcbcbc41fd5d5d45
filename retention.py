"""A c that sets itself: SUS's retention parameter, steered so that its draws add a chosen share to the gradient's noise.

rho = E|ghat - g|^2 / E|g - gbar|^2 is the variance which the draws add to the gradient of a micro-batch, over the variance
which it has anyway, from micro-batch to micro-batch. Both are of one micro-batch, so their ratio is that of a whole step too.

From the kept entries each backward estimates what its draw adds to dQ, dK and dV (sus_attention's stats). That is
nearly free, but falls short of what arrives in the parameters' gradients by a factor, the amplification, which hardly
depends on c. So, every CALIBRATE iterations, three gradients are made aside: of micro-batch A with two draws, and of
B with a third. |A1 - A2|^2 / 2 is the added variance, and gives the amplification; |A1 - B|^2 / 2 is both together. In
between, every STEER iterations, c moves towards the target by the free estimate alone.
"""

import math

import torch
import torch.distributed as dist

from sus_attn import fold_in

START, LOW, HIGH = 25.0, 2.0, 64.0  # of c
STEER, CALIBRATE = 10, 50  # iterations
DECAY = 0.8  # of the running means, a calibration
POWER, GAIN = 1.5, 0.3  # rho falls as c^-POWER; the share of the way, on a log scale, that one step goes


def collect_stats(model) -> torch.Tensor:
    """Float32 (layers, 3), from now on filled by each backward with every layer's stats, see sus_attention."""
    stats = torch.zeros(len(model.transformer.h), 3, device=next(model.parameters()).device)
    for block, row in zip(model.transformer.h, stats):
        block.attn.attend.stats = row
    return stats


class Retention:
    """c, what it is steered by, and how. The model reads c through its config; state is what a checkpoint keeps of it."""

    def __init__(self, model, stats, target: float):
        """stats: of `collect_stats`. target: of rho."""
        self.config, self.stats, self.target = model.config, stats, target
        self.c = torch.tensor(START)  # a tensor, so that a compiled model needs no compilation when it changes
        self.rho = math.nan  # as last estimated
        # running sums, all with the same weights, of the calibrations: added variance, estimate of it, own variance
        self.added = self.estimate = self.own = 0.0
        self.seen, self.n = torch.zeros((), device=stats.device), 0  # estimates since c last moved
        self._set(START)

    def _set(self, c: float) -> None:
        self.c.fill_(c)
        # c_max sizes buffers, and a compiled model is compiled anew when it changes: in few steps
        self.config.sus_c, self.config.sus_c_max = self.c, min(HIGH, 2.0 ** math.ceil(math.log2(c)))

    @property
    def state(self) -> dict[str, float]:
        return {"c": self.c.item(), "rho": self.rho, "added": self.added, "estimate": self.estimate, "own": self.own,
                "seen": self.seen.item(), "n": self.n}  # fmt: skip

    @state.setter
    def state(self, state: dict[str, float]) -> None:
        self.rho, self.added, self.estimate, self.own, self.n = (
            state[name] for name in ("rho", "added", "estimate", "own", "n")
        )
        self.seen.fill_(state["seen"])
        self._set(state["c"])

    def calibrate(self, cfg, model, corpus, device, it: int, rank: int = 0, world: int = 1) -> None:
        """Three micro-batches' gradients; the model's own (.grad) stay what they are. model: compiled or not, not in DDP."""
        parameters = [p for p in model.parameters() if p.requires_grad]

        def gradient(batch: int, draw: int) -> list[torch.Tensor]:
            x, y = (t.to(device.device) for t in corpus.batch(cfg.batch_size, cfg.seed, batch, rank))
            with device.autocast():
                _, loss = model(x, y, sus_seed=torch.tensor(fold_in(cfg.seed, it, rank, 1 + draw)))
            return torch.autograd.grad(loss, parameters)

        def half_distance(a, b) -> torch.Tensor:
            return sum((x.float() - y.float()).square().sum() for x, y in zip(a, b)) / 2

        first = gradient(it, 0)
        estimate = self.stats[:, 2].sum()
        added = half_distance(first, gradient(it, 1))
        estimate = (estimate + self.stats[:, 2].sum()) / 2
        both = half_distance(first, gradient(it + 1, 2))
        found = _mean(torch.stack([added, estimate, (both - added).clamp(min=0)]), world)
        if found.isfinite().all():
            self.added, self.estimate, self.own = (
                DECAY * old + (1 - DECAY) * new for old, new in zip((self.added, self.estimate, self.own), found.tolist())
            )

    def observe(self, loss_scale: float) -> None:
        """After each step. loss_scale: what the loss of its last micro-batch was multiplied by."""
        self.seen += self.stats[:, 2].sum() / loss_scale**2
        self.n += 1

    def steer(self, world: int = 1) -> None:
        """Move c, by what was observed since the last time."""
        seen = _mean(self.seen / max(self.n, 1), world).item()
        self.seen.zero_()
        self.n = 0
        if not (math.isfinite(seen) and self.estimate > 0 and self.own > 0):
            return  # a loss scale that is being sought, or all entries are kept
        self.rho = self.added / self.estimate * seen / self.own
        factor = max(self.rho / self.target, 1e-3) ** (GAIN / POWER)
        self._set(min(max(self.c.item() * min(max(factor, 0.8), 1.25), LOW), HIGH))


def _mean(x: torch.Tensor, world: int) -> torch.Tensor:
    """Over the processes: all must come to the same c."""
    if world > 1:
        dist.all_reduce(x)
    return x / world
