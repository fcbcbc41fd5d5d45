"""sus_c=auto: what a calibration measures, where c goes, and that a resumed or compiled run does the same."""

import math

import pytest
import torch

import train
from configurator import TrainConfig, UserError, load_config
from data.loader import load_corpus
from model import GPT, GPTConfig
from sus_attn import fold_in
from training import retention
from training.device import Device
from training.record import read_record
from training.retention import HIGH, LOW, START, STEER, Retention, collect_stats, new_stats
from training_runs import TORCHRUN, finish, start

CPU = Device(torch.device("cpu"), torch.float32, "")


def tiny(block_size=64, **keys):
    torch.manual_seed(0)
    return GPT(
        GPTConfig(
            block_size=block_size,
            vocab_size=257,
            n_layer=2,
            n_head=2,
            n_embd=32,
            pos="rope",
            attn_backward="sus",
            sus_c=START,
            **keys,
        )
    )


@pytest.mark.parametrize("target, want", [(0.01, 16.0), (0.08, 4.0), (1e-6, HIGH), (0.9, LOW)])
def test_c_goes_where_rho_is_the_target(target, want):
    """rho = 0.64 c^-1.5 in a made-up world, noisily seen: c settles, and stays, where that is the target."""
    model = tiny()
    stats = new_stats(model)
    collect_stats(model, stats)
    held = Retention(model, stats, target)
    held.amplification, held.own = 10.0, 10.0
    noise = torch.Generator().manual_seed(0)
    seen = []
    for it in range(1, 1001):
        true_rho = 0.64 * held.c.item() ** -1.5
        # a layer's estimate each, of the loss times 4
        for of_layer, share in zip(stats, (0.75, 0.25)):
            of_layer[2] = share * true_rho * (1 + 0.3 * torch.randn((), generator=noise)) * 16
        held.observe(4.0)
        if it % STEER == 0:
            before = held.c.item()
            held.steer()
            assert 0.79 < held.c.item() / before < 1.26 and LOW <= held.c <= HIGH
            seen.append(held.c.item())
    assert all(abs(math.log(c / want)) < 0.15 for c in seen[50:])
    assert held.config.sus_c is held.c and held.c <= held.config.sus_c_max <= HIGH
    if LOW < want < HIGH:
        assert held.rho == pytest.approx(target, rel=0.4)


def test_what_is_not_finite_moves_nothing():
    model = tiny()
    stats = new_stats(model)
    collect_stats(model, stats)
    held = Retention(model, stats, 0.01)
    held.steer()  # nothing was calibrated, nothing observed
    held.amplification, held.own = 1.0, 1.0
    stats[0][2] = math.inf  # a float16 loss scale that is too high
    held.observe(1.0)
    held.steer()
    assert held.c == START and math.isnan(held.rho)
    stats[0][2] = 1.0
    held.observe(1.0)
    held.steer()
    assert held.c == pytest.approx(1.25 * START)  # and the infinity is forgotten


def test_a_calibration_measures_added_and_own_variance(corpus, monkeypatch):
    """Against the three gradients made here, and against the variance over many draws and batches."""
    monkeypatch.setattr(retention, "DECAY", 0.0)
    model, text = tiny(), load_corpus(corpus, 64)
    held = Retention(model, new_stats(model), 0.01)
    held.config.sus_c = held.c.fill_(0.4)  # below what it would set: all 64 keys are of one tile
    cfg = TrainConfig(batch_size=2, seed=5, gradient_accumulation_steps=1)

    def gradient(it, seed):
        x, y, _ = text.batch(2, 5, 2 * it)
        loss = model(x, y, sus_seed=torch.tensor(seed))[1]
        weights = [block.attn.c_attn.weight for block in model.transformer.h]
        return torch.cat(
            [g[:64].flatten() for g in torch.autograd.grad(loss, weights)]
        )  # of 32 rows for q, k and v each

    found = []
    for it in range(40):
        held.calibrate(cfg, model, text, CPU, it, 2 * it, loss_scale=8.0)
        found.append((held.amplification, held.own))
    a, again, other = (
        gradient(0, fold_in(5, 0, 0, 1)),
        gradient(0, fold_in(5, 0, 0, 2)),
        gradient(1, fold_in(5, 0, 0, 3)),
    )
    added, both = ((a - x).square().sum().item() / 2 for x in (again, other))
    assert found[0][1] == pytest.approx(both - added, rel=1e-4)
    assert all(p.grad is None for p in model.parameters())
    amplification, own = torch.tensor(found).double().mean(0).tolist()
    draws = torch.stack([torch.stack([gradient(it, 100 * it + i) for i in range(8)]) for it in range(40)])
    within = draws.var(1).sum(1).mean().item()
    between = draws.mean(1).var(0).sum().item() - within / 8
    assert own == pytest.approx(between, rel=0.2)
    estimates = []
    for it in range(40):
        gradient(it, 7 * it)
        estimates.append(held.estimate().item())
    assert amplification == pytest.approx(within / (sum(estimates) / 40), rel=0.25)


def test_state_goes_through_a_checkpoint():
    held = Retention(tiny(), [torch.ones(3)] * 2, 0.01)
    held.amplification, held.own = 0.5, 0.3
    held._set(7.3)
    held.observe(3.0)
    other = Retention(tiny(), [torch.ones(3)] * 2, 0.01)
    other.state = held.state
    assert all(type(value) in (int, float) for value in held.state.values())
    assert repr(other.state) == repr(held.state)  # rho is NaN
    held.steer(), other.steer()
    assert repr(other.state) == repr(held.state) and held.c != pytest.approx(7.3)


def test_one_odd_batch_does_not_upset_c():
    """A calibration whose gradients are ten times as large, in a made-up world where c is right."""
    held = Retention(tiny(), stats := [torch.zeros(3)], 0.01)
    held.amplification, held.own = 10.0, 10.0
    seen = []
    for it in range(1, 501):
        stats[0][2] = 0.01 * (held.c.item() / START) ** -1.6  # rho = 0.01 at START
        if it % 50 == 1:
            held.own = retention._running(held.own, 10.0 * (100 if it == 201 else 1))
        held.observe(1.0)
        if it % STEER == 0:
            held.steer()
            seen.append(held.c.item())
    assert (
        0.5 < min(seen) / START < 0.9
        and seen[19] == pytest.approx(START, rel=0.01)
        and seen[-1] == pytest.approx(START, rel=0.25)
    )


def test_where_all_is_kept_c_falls():
    held = Retention(tiny(), [torch.zeros(3)], 0.01)
    held.own = 1.0
    held.observe(1.0)
    held.steer()
    assert held.rho == 0 and held.c == pytest.approx(0.8 * START)


def kept_when_compiled(cs):
    """How many entries a compiled model keeps at each c in turn, from the same seed."""
    torch._dynamo.reset()
    model = tiny(512, sus_backend="reference")
    held = Retention(model, new_stats(model), 0.01)
    collect_stats(model, held.stats)
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.arange(512)[None] % 61
    for c in cs:
        held._set(c)
        compiled(x, x, sus_seed=torch.tensor(1))[1].backward()
        yield sum(of_layer[0].item() for of_layer in held.stats)


def test_a_compiled_model_goes_on_when_c_max_changes():
    kept = list(kept_when_compiled((5.0, 2.5, 1.7, 5.0, 1.0)))
    assert kept[0] == kept[3] > kept[1] > kept[2] > kept[4]


def test_a_compiled_model_needs_no_compilation_when_c_moves():
    with torch._dynamo.config.patch(error_on_recompile=True):
        kept = list(kept_when_compiled((3.9, 2.1, 3.0)))  # of one c_max
    assert kept[1] < kept[2] < kept[0]


# -- in train.py -----------------------------------------------------------------------------------


def test_a_run_sets_c_by_itself_and_resumes_the_same(run, tmp_path):
    keys = dict(
        sus_c="auto",
        sus_rho=0.05,
        block_size=512,
        max_iters=60,
        lr_decay_iters=60,
        eval_interval=30,
        log_interval=1,
        seed=3,
    )
    whole = run("whole", **keys)
    run("parts", **{**keys, "max_iters": 25})
    parts = run("parts", init_from="resume", **keys)
    pick = lambda lines: [(l["iter"], l["sus/c"], l["train/loss"]) for l in lines if "sus/c" in l and l["iter"] > 25]
    assert pick(parts) == pick(whole) and len(pick(whole)) == 35
    line = next(l for l in whole if l["iter"] == 59)
    assert line["sus/c"] != START and 0 < line["sus/rho"] and set(line["sus/added_variance"]) == {"0", "1"}


@pytest.mark.slow
def test_two_processes_set_c(corpus, tmp_path):
    finish(start(corpus, tmp_path / "two", *TORCHRUN, sus_c="auto", block_size=512, max_iters=20))
    lines = [line for line in read_record(tmp_path / "two" / "metrics.jsonl")[1] if "sus/c" in line]
    assert lines[-1]["sus/c"] != START and lines[-1]["sus/rho"] > 0


def test_the_key(tmp_path):
    assert load_config(TrainConfig, ["--sus_c=auto"], usage="").sus_c == "auto"
    (tmp_path / "a.py").write_text("sus_c = 'auto'\nsus_rho = 0.02\n")
    assert load_config(TrainConfig, [str(tmp_path / "a.py")], usage="").sus_rho == 0.02
    for wrong in ("--sus_c=often", "--sus_c=-1", "--sus_rho=0", "--sus_rho=auto"):
        with pytest.raises(UserError, match="must be"):
            load_config(TrainConfig, [wrong], usage="")


def test_statistics_are_collected_only_where_they_are_looked_at(run, monkeypatch):
    """They take time in every backward: at iterations that are logged, or that c is steered by."""
    seen = []
    real = train.train_step

    def step(cfg, model, *args):
        seen.append((args[4] + 1, model.transformer.h[0].attn.attend.stats is not None))
        return real(cfg, model, *args)

    monkeypatch.setattr(train, "train_step", step)
    run(log_interval=4, max_iters=11)
    assert [it for it, collects in seen if collects] == [4, 8, 11]
    seen.clear()
    lines = run("auto", log_interval=7, max_iters=22, sus_c="auto", block_size=256, batch_size=1)
    assert [it for it, collects in seen if collects] == [7, 10, 14, 20, 21, 22]
    assert all(sum(line["sus/added_variance"].values()) > 0 for line in lines if "sus/added_variance" in line)
