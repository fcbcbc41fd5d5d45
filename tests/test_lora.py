"""LoRA: the layer, adapters and their merging, what is trained, their checkpoints, and longer contexts from a base."""

import copy
import math
import os
import shutil
import sys

import pytest
import torch

import export
import sample
import train
from configurator import UserError
from model import GPT, GPTConfig
from test_model import ARCHITECTURES, GPT2_LIKE, LONG, tiny, tokens
from training import checkpoint, hugging_face
from training.device import flops_per_token
from training.lora import LoRALinear, adapter_state, add_adapters, fingerprint, merge
from training.optimizer import make_optimizer
from training.record import read_record
from training.weights import model_from_checkpoint
from training_runs import TORCHRUN, arguments, curve, finish, same, start, train_here, weights

ALL = "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"


def adapted(targets="c_attn,c_proj,c_fc", dropout=0.0, dtype=torch.float64, **keys):
    """A tiny model with adapters which do something: lora_b isn't zero."""
    model = tiny(**keys).to(dtype)
    add_adapters(model, 3, 6.0, targets, dropout)
    with torch.no_grad():
        for p in adapter_state(model).values():
            p.add_(0.1 * torch.randn_like(p))
    return model


# -- the layer -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (1, 1, 5), (3, 7, 5)], ids=str)
def test_the_layer_against_its_formula(shape, bias):
    torch.manual_seed(0)
    linear = torch.nn.Linear(5, 4, bias=bias, dtype=torch.float64)
    layer = LoRALinear(linear, 2, 3.0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.equal(layer(x), linear(x))  # lora_b is zero
    torch.nn.init.normal_(layer.lora_b)
    W, A, B = layer.weight, layer.lora_a, layer.lora_b
    want = x @ (W + 3.0 / 2 * B @ A).T + (linear.bias if bias else 0)
    torch.testing.assert_close(layer(x), want)
    torch.testing.assert_close(layer.merged()(x), want)
    g = torch.randn_like(want)
    ours, theirs = (torch.autograd.grad(y, (x, A, B), g, retain_graph=True) for y in (layer(x), want))
    torch.testing.assert_close(ours, theirs)
    assert W is linear.weight and not W.requires_grad and (not bias or not layer.bias.requires_grad)
    assert W.shape == (4, 5) and A.shape == (2, 5) and B.shape == (4, 2) and {A.dtype, B.dtype} == {torch.float64}


def test_the_layers_dropout_is_before_the_adapter_only():
    layer = LoRALinear(torch.nn.Linear(1000, 1), 1, 1.0, dropout=0.25)
    with torch.no_grad():
        layer.weight.zero_(), layer.bias.fill_(7.0), layer.lora_a.fill_(1.0), layer.lora_b.fill_(1.0)
    y = layer(torch.ones(1000)).item() - 7
    assert y != 1000 and abs(y - 1000) < 4.5 * math.sqrt(1000 * 0.25 / 0.75)
    assert layer.eval()(torch.ones(1000)).item() == 1007


# -- adapters on a model -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "targets, layers",
    [
        ("c_attn", {"attn.c_attn"}),
        ("c_proj", {"attn.c_proj", "mlp.c_proj"}),
        ("mlp.c_proj", {"mlp.c_proj"}),
        ("attn.c_attn, mlp.c_fc", {"attn.c_attn", "mlp.c_fc"}),
        ("c_attn,c_proj,c_fc", set(ALL)),
        ("c_proj,mlp.c_proj", {"attn.c_proj", "mlp.c_proj"}),
    ],
)
def test_targets(targets, layers):
    model = tiny()
    add_adapters(model, 2, 4.0, targets)
    for block in model.transformer.h:
        assert {name for name, module in block.named_modules() if isinstance(module, LoRALinear)} == layers
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"transformer.h.{i}.{name}.lora_{x}" for i in range(2) for name in layers for x in "ab"}
    assert trained == adapter_state(model).keys()


@pytest.mark.parametrize("targets", ["", ",", "c_atn", "attn", "lm_head", "h.0.attn.c_attn", "q_norm", "proj"])
def test_unknown_targets_are_refused_with_what_there_is(targets):
    model = tiny(**LONG)
    with pytest.raises(
        UserError, match=r"lora_targets: '.*' is none of .*c_attn, attn.c_proj, .*\(c_attn, c_proj, c_fc\)"
    ):
        add_adapters(model, 2, 4.0, targets)
    assert all(p.requires_grad for p in model.parameters())  # nothing was changed


def test_a_rank_that_spares_nothing_is_refused():
    model = tiny(**LONG)
    most = min(model.transformer.h[0].attn.c_attn.weight.shape)
    with pytest.raises(UserError, match=f"lora_rank={most + 1} is above the {most} that attn.c_attn can have"):
        add_adapters(model, most + 1, 4.0, "c_attn")
    add_adapters(model, most, 4.0, "c_attn, ")


@pytest.mark.parametrize("keys", ARCHITECTURES)
@pytest.mark.parametrize("B, T", [(1, 1), (3, 1), (2, 37), (1, 48)])
def test_merged_equals_unmerged(keys, B, T):
    model, x, y = adapted(**keys), tokens(B, T), tokens(B, T, seed=1)
    with torch.no_grad():
        for p in model.parameters():  # biases and norms count too
            p.add_(0.1 * torch.randn_like(p))
    logits, losses = model(x)[0], model(x, y, reduction="none")[1]
    plain = merge(copy.deepcopy(model))
    assert plain.state_dict().keys() == tiny(**keys).state_dict().keys() and not adapter_state(plain)
    assert all(p.requires_grad for p in plain.parameters()) and plain.lm_head.weight is plain.transformer.wte.weight
    torch.testing.assert_close(plain(x)[0], logits, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(plain(x, y, reduction="none")[1], losses, rtol=2e-6, atol=2e-6)  # losses are float32
    base = tiny(**keys).double()
    assert (base(x)[0] - logits).abs().max() > 1e-3  # the adapters did something


@pytest.mark.parametrize("keys", ARCHITECTURES)
def test_fresh_adapters_change_nothing(keys):
    base, model, x = tiny(**keys), tiny(**keys), tokens()
    add_adapters(model, 3, 6.0, "c_attn,c_proj,c_fc")
    assert torch.equal(model(x)[0], base(x)[0])
    assert all(torch.equal(a, b) for a, b in zip(merge(model).state_dict().values(), base.state_dict().values()))


def test_the_adapters_gradient_is_the_weights_projected():
    """dL/dA = scale B^T dL/dW and dL/dB = scale dL/dW A^T, with W of the merged model."""
    model, x, y = adapted(**LONG), tokens(), tokens(seed=1)
    plain = merge(copy.deepcopy(model))
    model(x, y)[1].backward()
    plain(x, y)[1].backward()
    for block, plain_block in zip(model.transformer.h, plain.transformer.h):
        for name in ALL:
            layer, dW = block.get_submodule(name), plain_block.get_submodule(name).weight.grad
            torch.testing.assert_close(layer.lora_a.grad, layer.scale * layer.lora_b.T @ dW, rtol=1e-5, atol=1e-9)
            torch.testing.assert_close(layer.lora_b.grad, layer.scale * dW @ layer.lora_a.T, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    "targets", ["c_attn,c_proj,c_fc", "mlp.c_proj"]
)  # of the latter layer 0's attention has no gradient
def test_activation_checkpointing_sus_and_compilation(targets):
    x, y, seed = tokens(), tokens(seed=1), torch.tensor(5)
    sus = dict(**LONG, attn_backward="sus", sus_c=0.4)

    def adapters_gradient(model, compiled=None):
        model.zero_grad()
        (model if compiled is None else compiled)(x, y, sus_seed=seed)[1].backward()
        assert {name for name, p in model.named_parameters() if p.grad is not None} == adapter_state(model).keys()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    want = adapters_gradient(adapted(targets, dtype=torch.float32, **sus))
    assert torch.equal(
        adapters_gradient(adapted(targets, dtype=torch.float32, activation_checkpointing=True, **sus)), want
    )
    torch._dynamo.reset()
    model = adapted(targets, dtype=torch.float32, **sus)
    got = adapters_gradient(model, torch.compile(model, backend="aot_eager", fullgraph=True))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_autocast():
    x, y = tokens(), tokens(seed=1)
    model = adapted(dtype=torch.float32, **LONG)
    want = model(x, y)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(x, y)[1]
    loss.backward()
    assert loss.dtype == torch.float32 and abs(loss - want) < 0.02
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_the_optimizer_holds_adapters_only_and_a_frozen_weight_costs_less():
    model = adapted(**GPT2_LIKE)
    groups = make_optimizer(model, 0.1, 1e-3, (0.9, 0.95), "cpu").param_groups
    adapters = [p for p in model.parameters() if p.requires_grad]
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0] and not groups[1]["params"]
    assert {id(p) for p in groups[0]["params"]} == {id(p) for p in adapters}
    n, trained = model.num_params(), sum(p.numel() for p in adapters)
    assert flops_per_token(model, 0) == 4 * n + 2 * trained
    assert flops_per_token(merge(model), 0) == 6 * model.num_params()


def test_fingerprint():
    model = tiny(**LONG)
    print_ = fingerprint(model)
    assert len(print_) == 64 and print_ == fingerprint(tiny(**LONG)) != fingerprint(tiny(seed=1, **LONG))
    assert fingerprint(tiny(**LONG).double()) != print_
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight[3, 5] += 1e-6
    assert fingerprint(model) != print_
    swapped = tiny(**LONG)
    h = swapped.transformer.h
    h[0].ln_1.weight, h[0].ln_2.weight = torch.nn.Parameter(2 * h[0].ln_2.weight), h[0].ln_1.weight
    other = copy.deepcopy(swapped)
    h = other.transformer.h
    h[0].ln_1.weight, h[0].ln_2.weight = h[0].ln_2.weight, h[0].ln_1.weight
    assert fingerprint(other) != fingerprint(swapped)  # the same bytes under other names


# -- runs --------------------------------------------------------------------------------------------


LORA = dict(lora_rank=4, lora_alpha=8, learning_rate=1e-2, min_lr=1e-3)


def fine_tune(run, out_dir="lora", base="base", **keys):
    """Adapters at 128 tokens on the base of 64 tokens that `based` made. The record's lines."""
    return run(out_dir, **{"init_from": run.tmp / base, **LORA, "block_size": 128, "rope_scaling": 2, **keys})


@pytest.fixture(scope="session")
def base(corpus, tmp_path_factory):
    """The folder of a model trained at 64 tokens."""
    out_dir = tmp_path_factory.mktemp("base") / "base"
    keys = dict(max_iters=200, lr_decay_iters=200, eval_interval=200, learning_rate=1e-2, log_interval=200)
    train_here(*arguments(corpus, out_dir, **keys))
    return out_dir


@pytest.fixture
def based(run, base, tmp_path):
    """`run`, with a copy of the base in tmp_path / base."""
    run.tmp = tmp_path
    shutil.copytree(base, tmp_path / "base")
    return run


def load(path, name="ckpt.pt"):
    return torch.load(path / name, weights_only=True)


def test_only_adapters_are_trained_and_saved(based, tmp_path, capsys):
    before = (tmp_path / "base" / "ckpt.pt").read_bytes()
    capsys.readouterr()
    lines = fine_tune(based, max_iters=40, lr_decay_iters=40, eval_interval=20, learning_rate=3e-2)
    out = capsys.readouterr().out
    trained = 2 * 4 * ((32 + 96) + (32 + 32) + (32 + 128) + (128 + 32))
    assert f"rank 4 on c_attn, c_proj, c_fc: {trained:,} of 0.04 M weights trained" in out
    assert "context 128, positions stretched 2 x (linear), from" in out
    val = [line["val/loss"] for line in lines if "val/loss" in line]
    assert val[-1] < val[0] - 0.01
    assert (tmp_path / "base" / "ckpt.pt").read_bytes() == before
    for name in ("ckpt.pt", "ckpt_best.pt"):
        state = load(tmp_path / "lora", name)
        assert sum(t.numel() for t in state["model"].values()) == trained
        assert all(n.endswith((".lora_a", ".lora_b")) for n in state["model"])
        assert sum(s["exp_avg"].numel() for s in state["optimizer"]["state"].values()) == trained
        assert state["model_args"]["block_size"] == 128 and state["model_args"]["rope_scaling"] == 2
        assert {k: v for k, v in state["lora"].items() if k != "fingerprint"} == {
            "rank": 4,
            "alpha": 8.0,
            "targets": "c_attn,c_proj,c_fc",
            "base": os.path.join("..", "base", "ckpt.pt"),
        }
    assert (tmp_path / "lora" / "ckpt.pt").stat().st_size < len(before)


def test_training_begins_at_the_base(based, tmp_path):
    """B = 0: adapters and a full fine-tuning begin with the same validation loss, as evaluated of the base alone."""
    adapters, full = fine_tune(based, max_iters=0), fine_tune(based, "full", max_iters=0, lora_rank=0)
    assert adapters[0]["val/loss_by_position"] == full[0]["val/loss_by_position"]
    same_context = fine_tune(based, "same", max_iters=0, block_size=64, rope_scaling=1)
    end = [line for line in read_record(tmp_path / "base" / "metrics.jsonl")[1] if "val/loss" in line][-1]
    assert same_context[0]["val/loss"] == pytest.approx(end["val/loss"], abs=1e-6)


def test_adapters_resume_bit_for_bit(based, tmp_path):
    keys = dict(lora_dropout=0.1)
    whole = fine_tune(based, "whole", **keys)
    fine_tune(based, "parts", max_iters=4, **keys)
    capture = based("parts", init_from="resume", block_size=128, rope_scaling=2, **keys, **LORA)
    assert curve([l for l in capture if l["iter"] > 4]) == curve([l for l in whole if l["iter"] > 4])
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert load(tmp_path / "parts")["lora"] == load(tmp_path / "whole")["lora"]
    assert not same(
        weights(tmp_path / "whole"), {k: torch.zeros_like(v) for k, v in weights(tmp_path / "whole").items()}
    )


def test_resume_takes_the_adapters_keys_from_the_checkpoint(based, tmp_path, monkeypatch):
    fine_tune(based, max_iters=4)
    monkeypatch.setattr(
        sys, "argv", ["train.py", f"--out_dir={tmp_path / 'lora'}", "--init_from=resume", "--max_iters=6"]
    )
    train.main()
    assert load(tmp_path / "lora")["iter_num"] == 6 and load(tmp_path / "lora")["config"]["lora_rank"] == 4
    for key, value in (("lora_rank", 8), ("lora_alpha", 3.0), ("lora_targets", "c_attn"), ("rope_scaling", 4)):
        monkeypatch.setattr(
            sys, "argv", ["train.py", f"--out_dir={tmp_path / 'lora'}", "--init_from=resume", f"--{key}={value}"]
        )
        with pytest.raises(UserError, match=f"{key}={value}.* conflicts with the checkpoint"):
            train.main()
    monkeypatch.setattr(
        sys, "argv", ["train.py", f"--out_dir={tmp_path / 'base'}", "--init_from=resume", "--lora_rank=4"]
    )
    with pytest.raises(UserError, match="lora_rank=4 conflicts with the checkpoint, which has 0"):
        train.main()


@pytest.mark.slow
def test_two_processes_follow_one(based, corpus, tmp_path):
    keys = dict(init_from=tmp_path / "base", block_size=128, rope_scaling=2, **LORA)
    fine_tune(based, "one")
    finish(start(corpus, tmp_path / "two", *TORCHRUN, **keys))
    a, b = (read_record(tmp_path / name / "metrics.jsonl")[1] for name in ("one", "two"))
    for x, y in zip(a, b, strict=True):
        for name in {"train/loss", "val/loss", "train/grad_norm"} & x.keys():
            assert abs(x[name] - y[name]) < 2e-4 * max(1, x[name]), (x["iter"], name)


def test_c_sets_itself_by_the_adapters(based):
    keys = dict(sus_c="auto", sus_rho=0.05, block_size=512, rope_scaling=8, max_iters=21, lr_decay_iters=21)
    lines = fine_tune(based, **keys)
    c = [line["sus/c"] for line in lines if "sus/c" in line]
    assert c[-1] != c[0] and lines[-2]["sus/rho"] > 0
    with pytest.raises(UserError, match="lora_targets=c_proj leaves out: add c_attn"):
        fine_tune(based, "other", lora_targets="c_proj", **keys)


def test_targets_above_the_probed_layer(based):
    """In a model of one layer, attention below the first adapters has no gradient of its own: it is measured all the
    same.
    """
    based("small", n_layer=1, max_iters=4)
    lines = fine_tune(based, base="small", n_layer=1, lora_targets="mlp.c_proj", max_iters=4)
    assert lines[0]["attn/backward_ms"] > 0 and lines[0]["sus/kept_per_row"] > 0


# -- the base ----------------------------------------------------------------------------------------


def resume(run, **keys):
    return run("lora", **{**LORA, "init_from": "resume", "block_size": 128, "rope_scaling": 2, **keys})


def test_another_base_is_refused(based, tmp_path):
    fine_tune(based, max_iters=4)
    based("base", max_iters=20, lr_decay_iters=20, eval_interval=20, seed=2)  # in its place
    with pytest.raises(
        UserError, match="adapters of other weights than those in .*base.ckpt.pt.*expected.*found"
    ) as caught:
        resume(based)
    assert str(tmp_path / "lora" / "ckpt.pt") in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="adapters of other weights"):
        sample.load_model(tmp_path / "lora" / "ckpt.pt")
    earlier = tmp_path / "base" / "earlier-1"
    assert resume(based, lora_base=earlier)[-1]["iter"] == 12
    assert load(tmp_path / "lora")["lora"]["base"] == os.path.join("..", "base", "earlier-1", "ckpt.pt")
    assert resume(based, max_iters=14)[-1]["iter"] == 14  # it is found from now on


def test_a_base_of_the_same_weights_and_another_architecture_is_refused(based, tmp_path):
    fine_tune(based, max_iters=4)
    path = tmp_path / "base" / "ckpt.pt"
    state = load(tmp_path / "base")
    torch.save(state | {"model_args": state["model_args"] | {"norm_eps": 0.5}}, path)
    with pytest.raises(UserError, match=r"adapters of a model with norm_eps=1e-05, but .*base.ckpt.pt has 0.5"):
        sample.load_model(tmp_path / "lora" / "ckpt.pt")


def test_adapters_that_were_moved_aside_find_their_base(based, tmp_path, capsys):
    fine_tune(based, max_iters=4)
    fine_tune(based, max_iters=4)
    assert sample.load_model(tmp_path / "lora" / "earlier-1" / "ckpt.pt")[0].config.block_size == 128


def test_a_base_that_is_gone_is_refused_and_found_where_it_went(based, tmp_path, monkeypatch, capsys):
    fine_tune(based, max_iters=4)
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="the model they belong to is not at .*base.ckpt.pt.*--lora_base=PATH"):
        resume(based)
    argv = ["sample.py", f"--out_dir={tmp_path / 'lora'}", "--device=cpu", "--num_samples=1", "--start=def f"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(UserError, match="--lora_base=PATH"):
        sample.main()
    monkeypatch.setattr(sys, "argv", [*argv, f"--lora_base={tmp_path / 'elsewhere' / 'ckpt.pt'}"])
    capsys.readouterr()
    sample.main()
    assert capsys.readouterr().out.startswith("def f")
    assert resume(based, lora_base=tmp_path / "elsewhere")[-1]["iter"] == 12


def test_adapters_move_with_their_base(based, tmp_path, monkeypatch):
    fine_tune(based, max_iters=4)
    (tmp_path / "there").mkdir()
    for name in ("base", "lora"):
        (tmp_path / name).rename(tmp_path / "there" / name)
    monkeypatch.chdir(tmp_path / "there")
    assert sample.load_model(checkpoint.find("lora"))[0].config.block_size == 128


def test_base_mistakes(based, tmp_path):
    for keys, message in [
        (dict(init_from="gpt3"), "init_from=gpt3 is none of scratch, resume, gpt2, .*, and no path"),
        (dict(init_from=tmp_path), "and no path of a checkpoint"),
        (dict(out_dir=tmp_path / "base"), "is the folder of init_from"),
        (dict(init_from="scratch"), "lora_rank=4 needs a trained model"),
        (dict(lora_base=tmp_path), "lora_base=.* is for resuming"),
        (dict(n_layer=3), "n_layer=3 conflicts with .*base"),
        (dict(pos="learned"), "pos=learned conflicts with .*base"),
        (dict(lora_targets="c_atn"), "lora_targets: 'c_atn' is none"),
        (dict(rope_scaling=0.5), "rope_scaling must be >= 1"),
        (dict(lora_rank=-1), "lora_rank must be >= 0"),
        (dict(lora_alpha=0), "lora_alpha must be > 0"),
    ]:
        with pytest.raises(UserError, match=message):
            fine_tune(based, **keys)
    assert not (tmp_path / "lora").exists()
    fine_tune(based, max_iters=4)
    with pytest.raises(UserError, match="holds adapters, not a whole model: merge them first"):
        fine_tune(based, "again", base="lora")
    with pytest.raises(UserError, match="lora_base=.* is for adapters"):
        sample.load_model(tmp_path / "base" / "ckpt.pt", "somewhere")


def test_the_tokenizer_of_the_base_must_be_the_corpus_s(based, tmp_path, corpus):
    chars = tmp_path / "chars"
    shutil.copytree(corpus, chars)
    (chars / "meta.json").write_text((corpus / "meta.json").read_text().replace('"byte"', '"gpt2"'))
    with pytest.raises(UserError, match="gpt2 tokenizer, but the model's are byte's"):
        fine_tune(based, dataset=chars)


def test_a_truncated_or_spoiled_adapter_checkpoint(based, tmp_path):
    fine_tune(based, max_iters=4)
    path = tmp_path / "lora" / "ckpt.pt"
    whole, state = path.read_bytes(), load(tmp_path / "lora")
    path.write_bytes(whole[:-1000])
    with pytest.raises(UserError, match="truncated"):
        resume(based)
    for lora_, message in [
        (True, "rank, alpha"),
        ({**state["lora"], "fingerprint": None}, "wrong type: fingerprint"),
        ({**state["lora"], "rank": 0, "alpha": math.nan}, "wrong type: rank, alpha"),
    ]:
        torch.save({**state, "lora": lora_}, path)
        with pytest.raises(UserError, match=f"no adapter checkpoint.*{message}"):
            resume(based)
    name = next(iter(state["model"]))
    adapters = state["model"]
    for model, message in [
        ({k: v for k, v in adapters.items() if k != name}, "Missing"),
        ({**adapters, "a.lora_a": torch.zeros(2)}, "Unexpected"),
        ({**adapters, name: torch.zeros(3, 3)}, "size mismatch"),
    ]:
        torch.save({**state, "model": model}, path)
        with pytest.raises(UserError, match=f"do not fit.*{message}"):
            resume(based)
    path.write_bytes(whole)
    assert resume(based)[-1]["iter"] == 12


def test_gpt2_as_the_base(run, corpus, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers", reason="transformers is a development requirement")
    sizes = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=128, vocab_size=257)
    small, other = transformers.GPT2LMHeadModel(sizes), transformers.GPT2LMHeadModel(sizes)
    small.save_pretrained(tmp_path / "small"), other.save_pretrained(tmp_path / "other")
    monkeypatch.setattr(hugging_face, "from_hub", lambda name: tmp_path / "small")
    bpe = tmp_path / "bpe"  # the bytes, declared to be GPT-2's tokens
    bpe.mkdir()
    for name in ("train.bin", "val.bin"):
        (bpe / name).write_bytes((corpus / name).read_bytes())
    keys = dict(pos="learned", bias=True, dataset=bpe, **LORA)
    with pytest.raises(UserError, match="block_size=256 is above the 128 of gpt2, which has learned positions"):
        run(init_from="gpt2", **{**keys, "block_size": 256})
    run(init_from="gpt2", max_iters=4, **keys)
    whole = run("whole", init_from="gpt2", **keys)
    assert load(tmp_path / "out")["lora"]["base"] == "gpt2"
    assert curve(run(init_from="resume", **keys)[-3:]) == curve(whole[-3:])
    model = model_from_checkpoint(checkpoint.load(tmp_path / "out" / "ckpt.pt"), tmp_path / "out" / "ckpt.pt")
    assert model.config.block_size == 64 and model.transformer.wpe.weight.shape == (64, 32)
    monkeypatch.setattr(hugging_face, "from_hub", lambda name: tmp_path / "other")
    with pytest.raises(UserError, match="adapters of other weights than those in .*other"):
        run(init_from="resume", max_iters=14, **keys)


# -- sampling and merging ----------------------------------------------------------------------------


def test_sampling_merges_and_reads_beyond_the_base_s_context(based, tmp_path, monkeypatch, capsys):
    fine_tune(based)
    path = tmp_path / "lora" / "ckpt.pt"
    model, _ = sample.load_model(path)
    assert type(model.transformer.h[0].attn.c_attn) is torch.nn.Linear and model.config.block_size == 128
    (tmp_path / "prompt.txt").write_text("import os\n" * 11)
    argv = [
        "sample.py",
        f"--out_dir={path.parent}",
        "--device=cpu",
        "--num_samples=1",
        "--max_new_tokens=40",
        f"--start=FILE:{tmp_path / 'prompt.txt'}",
    ]
    monkeypatch.setattr(sys, "argv", argv)
    capsys.readouterr()
    sample.main()
    drawn = capsys.readouterr()
    assert len(drawn.out) > 110 + 10 and "reads the last" not in drawn.err
    # the same, from the merged checkpoint alone
    monkeypatch.setattr(sys, "argv", ["export.py", f"--out_dir={path.parent}", f"--plain={tmp_path / 'merged'}"])
    export.main()
    with pytest.raises(UserError, match="exists already"):
        export.main()
    monkeypatch.setattr(sys, "argv", ["export.py", f"--out_dir={path.parent}", f"--plain={'x' * 300}"])
    with pytest.raises(UserError, match="can't write x+/ckpt.pt: File name too long"):
        export.main()
    shutil.rmtree(tmp_path / "base"), shutil.rmtree(tmp_path / "lora")
    monkeypatch.setattr(sys, "argv", [argv[0], f"--out_dir={tmp_path / 'merged'}", *argv[2:]])
    capsys.readouterr()
    sample.main()
    assert capsys.readouterr().out == drawn.out
    assert fine_tune(based, "again", base="merged", max_iters=4)[-1]["iter"] == 4
    monkeypatch.setattr(sys, "argv", ["export.py", f"--out_dir={tmp_path / 'merged'}", f"--plain={tmp_path / 'twice'}"])
    with pytest.raises(UserError, match="nothing to merge"):
        export.main()
    monkeypatch.setattr(
        sys, "argv", ["train.py", f"--out_dir={tmp_path / 'merged'}", "--init_from=resume", "--max_iters=99"]
    )
    with pytest.raises(UserError, match="no optimizer's state to go on with: fine-tune it by --init_from=.*merged"):
        train.main()


# -- other contexts, without adapters ----------------------------------------------------------------


@pytest.mark.parametrize("T, scaling", [(1, 1.0), (37, 2.0), (64, 8.0), (100, 3.0)])
def test_a_model_at_another_context_is_one_made_for_it(T, scaling):
    model, made = tiny(**LONG), tiny(**{**LONG, "block_size": T, "rope_scaling": scaling})
    made.load_state_dict(model.state_dict())
    model.set_context(T, rope_scaling=scaling)
    assert torch.equal(model.rope, made.rope) and model.config == made.config
    assert torch.equal(model(tokens(T=T))[0], made(tokens(T=T))[0])


def test_full_fine_tuning_crops_and_extends(based, tmp_path):
    for name, block_size in (("short", 32), ("long", 200)):
        lines = based(name, init_from=tmp_path / "base" / "ckpt.pt", block_size=block_size, max_iters=4)
        state = load(tmp_path / name)
        assert state["lora"] is None and state["model_args"]["block_size"] == block_size and state["iter_num"] == 4
        assert lines[0]["iter"] == 0 and state["model"].keys() == weights(tmp_path / "base").keys()
        assert based(name, init_from="resume", block_size=block_size, max_iters=6)[-1]["iter"] == 6


def test_learned_positions_are_cropped_and_not_extended(run, tmp_path):
    keys = dict(pos="learned", bias=True)
    run("base", max_iters=4, **keys)
    base = dict(init_from=tmp_path / "base", **keys)
    run("short", max_iters=4, block_size=32, learning_rate=1e-12, min_lr=0, **base)
    wpe = weights(tmp_path / "short")["transformer.wpe.weight"]
    torch.testing.assert_close(wpe, weights(tmp_path / "base")["transformer.wpe.weight"][:32])
    run("lora", max_iters=4, block_size=32, **base, **LORA)
    assert sample.load_model(tmp_path / "lora" / "ckpt.pt")[0].transformer.wpe.weight.shape == (32, 32)
    with pytest.raises(UserError, match="block_size=65 is above the 64 of .*learned positions"):
        run("other", block_size=65, **base)
    with pytest.raises(UserError, match="rope_scaling=2.0 is for rotary positions"):
        run("other", rope_scaling=2, **base)
    with pytest.raises(ValueError, match="learned positions"):
        GPT(GPTConfig(block_size=8, vocab_size=5, n_layer=1, n_head=1, n_embd=8)).set_context(9)


def test_a_base_of_an_earlier_version_lacks_rope_scaling(based, tmp_path):
    state = load(tmp_path / "base")
    del state["model_args"]["rope_scaling"], state["lora"]
    for name in [n for n in state["config"] if n.startswith("lora_") or n == "rope_scaling"]:
        del state["config"][name]
    torch.save(state, tmp_path / "base" / "ckpt.pt")
    assert sample.load_model(tmp_path / "base" / "ckpt.pt")[0].config.rope_scaling == 1
    assert based("base", init_from="resume", max_iters=202, lr_decay_iters=200)[-1]["iter"] == 202
    assert fine_tune(based, max_iters=4)[-1]["iter"] == 4
