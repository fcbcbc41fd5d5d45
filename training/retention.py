"""A c that sets itself: SUS's retention parameter, steered so that its draws add a chosen share to the gradient's
noise.

rho = E|ghat - g|^2 / E|g - gbar|^2 is the variance which the draws add to the gradient of a micro-batch, over the
variance which it has anyway, from micro-batch to micro-batch. Both are of one micro-batch, so their ratio is that of a
whole step too. Here g is the gradient of the weights that make queries and keys, of all layers. They get most of the
noise, several times as much of it, beside their own, as the model as a whole; and AdamW, which scales each weight's
steps by its own gradient's size, gives them steps as large as any. A rho of 1 % of the whole model did cost loss
(README, "Compare").

From the kept entries each backward estimates what its draw adds to dQ, dK and dV (sus_attention's stats). That is
nearly free, but falls short of what arrives in the parameters' gradients by a factor, the amplification, which hardly
depends on c. So, every CALIBRATE iterations, three gradients are made aside: of micro-batch A with two draws, and of
B with a third. |A1 - A2|^2 / 2 is the added variance, and gives the amplification; |A1 - B|^2 / 2 is both together. In
between, every STEER iterations, c moves towards the target by the estimate of that iteration alone.
"""

import math

import torch
import torch.distributed as dist

from configurator import TrainConfig
from data.loader import Corpus
from model import GPT
from sus_attn import fold_in
from training.device import Device

START, LOW, HIGH = 4.0, 1.0, 32.0  # of c
STEER, CALIBRATE = 10, 50  # iterations
# Of the running means, a calibration. They are of logarithms: a batch's gradient may be ten times another's, and all
# fall a hundredfold as training begins. So c follows the usual batch; rho, a quotient of means, is what odd ones make
# of it.
DECAY = 0.8
POWER, GAIN = 1.6, 0.3  # rho falls as c^-POWER; the share of the way, on a log scale, that one step goes


def new_stats(model: GPT) -> list[torch.Tensor]:
    """A float32 tensor (3,) for each layer, see sus_attention."""
    # Rows of one tensor would share a version, which autograd checks in compiled code.
    return [torch.zeros(3, device=block.attn.c_attn.weight.device) for block in model.transformer.h]


def collect_stats(model: GPT, stats: list[torch.Tensor], wanted: bool = True) -> None:
    """Have each backward fill stats from now on; or not, as it takes time."""
    for block, of_layer in zip(model.transformer.h, stats):
        block.attn.attend.stats = of_layer if wanted else None


class Retention:
    """c, what it is steered by, and how. The model reads c through its config. A checkpoint keeps `state`."""

    def __init__(self, model: GPT, stats: list[torch.Tensor], target: float):
        """stats: of `new_stats`. target: of rho."""
        self.model, self.config, self.stats, self.target = model, model.config, stats, target
        layers = [block.attn for block in model.transformer.h]
        # With LoRA c_attn.weight is frozen. lora_b's gradient, of the same rows, is what its own would be, projected by
        # lora_a.
        self.weights = [getattr(layer.c_attn, "lora_b", layer.c_attn.weight) for layer in layers]
        self.rows = (layers[0].n_head + layers[0].n_kv_head) * layers[0].D  # of these: those of queries and keys
        # A tensor, so that a compiled model needs no compilation when it changes; on the device, so that nothing waits.
        self.c = torch.tensor(START, device=stats[0].device)
        self.rho: float = math.nan  # as last estimated
        self.amplification = self.own = math.nan  # running means of the calibrations: added / estimated, own variance
        self.seen = torch.zeros((), device=stats[0].device)  # estimates since c last moved: their sum
        self.n: float = 0  # and how many
        self._set(START)

    def _set(self, c: float) -> None:
        c = min(max(c, LOW), HIGH)
        self.c.fill_(c)
        # c_max sizes buffers, and a compiled model is compiled anew when it changes: in few steps
        self.config.sus_c, self.config.sus_c_max = self.c, min(HIGH, 2.0 ** math.ceil(math.log2(c)))

    @property
    def state(self) -> dict[str, float]:
        return {
            "c": self.c.item(),
            "rho": self.rho,
            "amplification": self.amplification,
            "own": self.own,
            "seen": self.seen.item(),
            "n": self.n,
        }

    @state.setter
    def state(self, state: dict[str, float]) -> None:
        self.rho, self.amplification, self.own, self.n = (state[name] for name in ("rho", "amplification", "own", "n"))
        self.seen.fill_(state["seen"])
        self._set(state["c"])

    def estimate(self) -> torch.Tensor:
        """What the last backward's draw added to dQ, dK and dV of all layers."""
        return torch.stack([of_layer[2] for of_layer in self.stats]).sum()

    def calibrate(
        self,
        cfg: TrainConfig,
        model: torch.nn.Module,
        corpus: Corpus,
        device: Device,
        it: int,
        first: int,
        rank: int = 0,
        world: int = 1,
        loss_scale: float = 1.0,
    ) -> None:
        """Three micro-batches' gradients; the model's own (.grad) stay what they are. model: compiled or not, not in
        DDP. first: the number of iteration it's first window. loss_scale: for float16, see GradScaler.
        """

        def gradient(steps: int, draw: int) -> list[torch.Tensor]:
            window = first + (steps * cfg.gradient_accumulation_steps + rank) * cfg.batch_size
            x, y, documents = corpus.batch(cfg.batch_size, cfg.seed, window).to(device.device)
            sus_seed = torch.tensor(fold_in(cfg.seed, it, rank, 1 + draw))
            with device.training_forward(cfg.offload_activations):
                _, loss = model(x, y, documents=documents, sus_seed=sus_seed)
            return [g[: self.rows] for g in torch.autograd.grad(loss * loss_scale, self.weights)]

        def half_distance(a: list[torch.Tensor], b: list[torch.Tensor]) -> torch.Tensor:
            squares = (((x.float() - y.float()) / loss_scale).square().sum() for x, y in zip(a, b))
            return torch.as_tensor(sum(squares)) / 2

        collect_stats(self.model, self.stats)
        a = gradient(0, 0)
        estimate = self.estimate() / loss_scale**2
        added = half_distance(a, gradient(0, 1))
        estimate = (estimate + self.estimate() / loss_scale**2) / 2
        both = half_distance(a, gradient(1, 2))
        mean_added, mean_estimate, own = _mean(torch.stack([added, estimate, both - added]), world).tolist()
        if mean_added > 0 and mean_estimate > 0:  # not if all was kept
            self.amplification = _running(self.amplification, mean_added / mean_estimate)
        if own > 0:
            self.own = _running(self.own, own)

    def observe(self, loss_scale: float, world: int = 1) -> None:
        """After a step that collected stats. loss_scale: what the loss of its last micro-batch was multiplied by."""
        self.seen += _mean(self.estimate() / loss_scale**2, world)
        self.n += 1

    def steer(self) -> None:
        """Move c, by what was observed since the last time."""
        seen = self.seen.item() / max(self.n, 1)
        self.seen.zero_()
        self.n = 0
        rho = 0.0 if seen == 0 else self.amplification * seen / self.own  # 0: all was kept
        if not (math.isfinite(rho) and math.isfinite(self.own)):
            return  # nothing is known yet, or float16's loss scale is still sought
        self.rho = rho
        factor = max(rho / self.target, 1e-3) ** (GAIN / POWER)
        self._set(self.c.item() * min(max(factor, 0.8), 1.25))


def _running(mean: float, new: float) -> float:
    """The running geometric mean."""
    if not math.isfinite(new):
        return mean
    return mean**DECAY * new ** (1 - DECAY) if math.isfinite(mean) else new


def _mean(x: torch.Tensor, world: int) -> torch.Tensor:
    """Over the processes: all must come to the same c."""
    if world > 1:
        dist.all_reduce(x)
    return x / world
