"""Documents that don't see each other, layers that see a window, and what is computed again or moved away meanwhile."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import exact_attn
import model as model_module
from backprop import loss_and_gradients
from configurator import TrainConfig, UserError, load_config
from data.loader import load_corpus
from exact_attn import exact_attention, sight_of
from model import GPT, GPTConfig
from training.device import Device, flops_per_token
from training.lora import add_adapters
from training_runs import ROOT, TORCHRUN, curve, finish, same, start, train_here, weights

CPU = Device(torch.device("cpu"), torch.float32, "")
SIZES = dict(block_size=96, vocab_size=61, n_layer=3, n_head=4, n_kv_head=2, n_embd=32)
LENGTHS = [[40, 1, 23, 26], [90]]  # of the documents of two rows


def begins(lengths=LENGTHS):
    """(B, T) int32: where each token's document begins."""
    of_row = lambda row: torch.repeat_interleave(torch.tensor([0, *row[:-1]]).cumsum(0), torch.tensor(row))
    return torch.stack([of_row(row) for row in lengths]).int()


def tiny(seed=0, **keys):
    torch.manual_seed(seed)
    return GPT(GPTConfig(**{**SIZES, **keys}))


def tokens(seed=0, T=90):
    return torch.randint(61, (2, T), generator=torch.Generator().manual_seed(seed))


def gradient(model, loss):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


# -- exact attention ------------------------------------------------------------------------------


def qkv(T, N, B=2, H=4, K=2, D=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    sizes = (H, T), (K, N), (K, N)
    return [torch.randn(B, heads, rows, D, dtype=torch.float64, generator=g).requires_grad_() for heads, rows in sizes]


def seen(T, N, documents, window):
    row, key = torch.arange(N - T, N)[:, None], torch.arange(N)
    mask = (key <= row) & ((key > row - window) | (window == 0))
    return mask if documents is None else mask & (key >= documents[..., None])[:, None]


@pytest.mark.parametrize("window", [0, 1, 7, 32, 89, 90, 200])
@pytest.mark.parametrize(
    "T, documents", [(90, None), (90, begins()), (90, begins([[1] * 90, [89, 1]])), (5, None), (1, None)]
)
def test_exact_attention_is_that_under_the_mask(T, documents, window):
    tensors = qkv(T, 90)
    sight = sight_of(T, tensors[0].device, documents, window, 90 - T)
    grad_out = torch.randn(2, 4, T, 8, dtype=torch.float64)
    mask = seen(T, 90, documents, window)
    got = exact_attention(*tensors, sight)
    want = F.scaled_dot_product_attention(*tensors, mask, enable_gqa=True)
    pairs = [(got, want), *zip(*(torch.autograd.grad(x, tensors, grad_out) for x in (got, want)))]
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    if sight.ranges is not None:
        key = torch.arange(90)
        lo, hi = sight.ranges[..., None, :].unbind(-1)
        assert torch.equal((key >= lo) & (key < hi), mask if documents is None else mask[:, 0])
    else:
        assert torch.equal(mask, seen(T, 90, None, 0))


def test_no_mask_of_all_pairs_is_made(monkeypatch):
    """At T = 4096, by documents and windows, none is larger than a window's own."""
    sizes = []
    sdpa = F.scaled_dot_product_attention
    monkeypatch.setattr(
        exact_attn.F,
        "scaled_dot_product_attention",
        lambda q, k, v, mask=None, *rest, **kwargs: (
            sizes.append(0 if mask is None else mask.numel()) or sdpa(q, k, v, mask, *rest, **kwargs)
        ),
    )
    q, k, v = (x.detach() for x in qkv(4096, 4096, B=1, H=1, K=1))
    for documents, window in [(begins([[3000, 1096]]), 0), (begins([[3000, 1096]]), 64), (None, 64)]:
        exact_attention(q, k, v, sight_of(4096, q.device, documents, window))
    assert len(sizes) == 2 + 4 + 2 and max(sizes) == 64 * 127
    for window in (1000, 2100, 4000, 4095):  # nor are more scores computed than without a window, by much
        sizes.clear()
        exact_attention(q, k, v, sight_of(4096, q.device, None, window))
        rest = 4096 - window
        assert sizes[0] == 0 and sizes[1] <= (window / 4 + 1) * (1.25 * window + 1)
        assert window**2 / 2 + sizes[1] * -(-rest // (window // 4 + 1)) < 1.2 * 4096**2 / 2 + 4096


def test_varlen_attention_gets_what_each_row_sees(monkeypatch):
    """What a GPU's one call takes, by a stand-in that goes by its documentation."""

    def varlen(q, k, v, ends_q, ends_k, longest_q, longest_k, *, window_size, enable_gqa):
        assert ends_q.dtype == torch.int32 and torch.equal(ends_q, ends_k) and longest_q == longest_k
        assert longest_q >= int(ends_q.diff().max()) and enable_gqa and window_size[1] == 0
        row = torch.arange(len(q))
        document = torch.bucketize(row, ends_q.long(), right=True)
        mask = (row <= row[:, None]) & (document == document[:, None])
        if window_size[0] >= 0:
            mask &= row[:, None] - row <= window_size[0]
        out = F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)), mask, enable_gqa=True)
        return out.transpose(0, 1)

    tensors = qkv(90, 90)
    sights = [sight_of(90, torch.device("cpu"), *how) for how in [(begins(), 0), (begins(), 7), (None, 7)]]
    want = [exact_attention(*tensors, sight) for sight in sights]
    monkeypatch.setattr(exact_attn, "varlen_attention", lambda q: varlen)
    for sight, out in zip(sights, want):
        torch.testing.assert_close(exact_attention(*tensors, sight), out, rtol=1e-10, atol=1e-10)


# -- the model ------------------------------------------------------------------------------------

ARCHITECTURES = {
    "learned": {},
    "rope": dict(pos="rope", norm="rmsnorm", qk_norm=True),
    "windows": dict(pos="rope", attn_window=9, window_pattern="SL"),
    "learned, windows": dict(attn_window=30),
}
BACKWARDS = {"exact": {}, "sus": dict(attn_backward="sus", sus_c=math.inf)}


@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("keys", ARCHITECTURES)
@pytest.mark.parametrize("way", ["autograd", "analytic"])
def test_documents_that_share_a_window_are_as_alone(keys, backward, way):
    """Losses by token, and the gradient of their sum; c = inf, as the draws of a row depend on its place."""
    model = tiny(**ARCHITECTURES[keys], **BACKWARDS[backward]).double()
    x, y = tokens(), tokens(1)
    _, together = model(x, y, documents=begins(), reduction="none")
    alone = []
    for row, lengths in enumerate(LENGTHS):
        parts = zip(x[row].split(lengths), y[row].split(lengths))
        alone.append(torch.cat([model(a[None], b[None], reduction="none")[1][0] for a, b in parts]))
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-9, atol=1e-9)
    want = gradient(model, torch.stack(alone).mean())
    if way == "autograd":
        got = gradient(model, together.mean())
    else:
        loss_and_gradients(model, x, y, documents=begins())
        got = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)


def test_documents_change_what_is_seen():
    """The test above, of something that would be seen: without the mask the losses are others."""
    model, x = tiny(), tokens()
    masked, plain = (model(x, x, documents=d, reduction="none")[1] for d in (begins(), None))
    changed = (masked != plain).any(0)
    assert not changed[:40].any() and changed[40:].float().mean() > 0.9


@pytest.mark.parametrize("keys", ["windows", "learned, windows"])
def test_sampling_sees_what_training_does(keys):
    """The logits of each next token, from the cache, however the prompt is cut, are those of one whole forward."""
    model = tiny(**ARCHITECTURES[keys]).double().eval()
    x = tokens()[:1]
    with torch.no_grad():
        whole = [model(x[:, :n])[0][0, 0] for n in range(1, 91)]
        for chunk in (1, 7, 64):
            _, cache = model.prefill(x[0, :64].tolist(), chunk)
            for n in range(65, 91):
                logits, _ = model(x[:, n - 1 : n], cache=cache)
                torch.testing.assert_close(logits[0, 0], whole[n - 1], rtol=1e-9, atol=1e-9)
    model.train()
    for backward in BACKWARDS.values():
        for name, value in backward.items():
            setattr(model.config, name, value)
        _, losses = model(x[:, :-1], x[:, 1:], reduction="none")
        want = F.cross_entropy(torch.stack(whole[:-1]), x[0, 1:], reduction="none")
        torch.testing.assert_close(losses[0], want, rtol=1e-9, atol=1e-9)


def test_which_layers_see_a_window():
    windows = lambda **keys: GPTConfig(**{**SIZES, "n_layer": 6, **keys}).layer_windows
    assert windows() == [0] * 6
    assert windows(attn_window=8) == [8, 8, 8, 0, 8, 0]
    assert windows(attn_window=8, window_pattern="S") == [8] * 5 + [0]
    assert windows(attn_window=8, window_pattern="LS") == [0, 8, 0, 8, 0, 0]
    model = tiny(n_layer=6, attn_window=8)
    assert flops_per_token(tiny(n_layer=6), 64) - flops_per_token(model, 64) == 12 * 32 * 4 * 56


def test_a_window_reaches_as_far_as_its_layers_do():
    """Two layers of 9 and one of all keys, whose own input is 16 before: what is further is not in the first two."""
    model = tiny(n_layer=2, pos="rope", attn_window=9, window_pattern="S").eval()
    found = []
    handle = model.transformer.h[0].register_forward_hook(lambda module, args, out: found.append(out))
    x = tokens()
    other = x.clone()
    other[:, 30] = (x[:, 30] + 1) % 61
    with torch.no_grad():
        model(x), model(other)
    handle.remove()
    changed = (found[0] != found[1]).any(2).any(0)
    assert changed.nonzero().flatten().tolist() == list(range(30, 39))


# -- computed again, moved away --------------------------------------------------------------------

KINDS = {
    "exact": {},
    "sus": dict(attn_backward="sus", sus_c=0.4),
    "lowrank": dict(attn_backward="lowrank"),
    "sus, windows": dict(attn_backward="sus", sus_c=0.4, attn_window=20),
    "dropout": dict(dropout=0.2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_is_computed_again_or_moved_the_bits_are_the_same(kind):
    x, documents = tokens(), None if kind == "lowrank" else begins()
    found = []
    for again, offload in itertools.product(["none", "attention", "full"], [False, True]):
        model = tiny(**KINDS[kind], activation_checkpointing=again, offload_activations=offload)
        torch.manual_seed(1)
        with CPU.training_forward(offload):
            _, loss = model(x, x, documents=documents, sus_seed=torch.tensor(5))
        found.append((loss, gradient(model, loss)))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


@pytest.mark.parametrize("again, forwards", [("none", 3), ("attention", 3), ("full", 6)])
def test_attention_is_computed_again_only_where_all_is(monkeypatch, again, forwards):
    calls = []
    attention = model_module.sus_attention
    monkeypatch.setattr(model_module, "sus_attention", lambda *a, **k: calls.append(1) or attention(*a, **k))
    model = tiny(attn_backward="sus", sus_c=0.4, activation_checkpointing=again)
    model(tokens(), tokens())[1].backward()
    assert len(calls) == forwards


def test_what_is_kept_falls_from_none_to_full():
    kept = {}
    for again in ("none", "attention", "full"):
        model, stored = tiny(n_layer=8, attn_backward="sus", activation_checkpointing=again), {}

        def pack(x, stored=stored):
            stored[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            _, loss = model(tokens(), tokens())
        for p in model.parameters():
            stored.pop(p.untyped_storage().data_ptr(), None)
        kept[again] = sum(stored.values())
    assert kept["full"] < 0.5 * kept["attention"] < 0.25 * kept["none"]


def test_what_is_kept_is_moved():
    """With pinning it takes a GPU (tests/test_cuda.py); here what is packed is on the CPU and all of it passes by."""
    model, packed = tiny(activation_checkpointing="attention"), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x) or x, lambda x: x):
        model(tokens(), tokens())
    shapes = {tuple(x.shape) for x in packed}
    assert {(2, 90, 32), (2, 4, 90, 8), (2, 2, 90, 8)} <= shapes  # a block's input, queries, keys


@pytest.mark.parametrize("value, means", [(True, "attention"), (False, "none"), ("full", "full")])
def test_values_of_earlier_versions(tmp_path, value, means):
    assert GPTConfig(activation_checkpointing=value).activation_checkpointing == means
    (tmp_path / "a.py").write_text(f"activation_checkpointing = {value!r}\n")
    for argv in ([str(tmp_path / "a.py")], [f"--activation_checkpointing={value}"]):
        assert load_config(TrainConfig, argv, usage="").activation_checkpointing == means
    with pytest.raises(UserError, match="must be one of none, attention, full, not 'yes'"):
        load_config(TrainConfig, ["--activation_checkpointing=yes"], usage="")


# -- the text --------------------------------------------------------------------------------------


def corpus_of(folder, lengths, val_lengths=(200,), ends=True, tokenizer="byte"):
    """Documents of these lengths, in tokens below 200; 256 at the end of each."""
    import json

    sizes = {"train": lengths, "val": val_lengths}
    meta = {"vocab_size": 257, "dtype": "uint16", "tokenizer": {"name": tokenizer}}
    for split, of_split in sizes.items():
        documents = [np.append(np.arange(n - 1) % 200, 256) for n in of_split]
        np.concatenate(documents).astype(np.uint16).tofile(folder / f"{split}.bin")
        meta |= {f"{split}_tokens": sum(of_split), f"{split}_documents": len(of_split)}
        if ends:
            np.cumsum(of_split).astype(np.uint64).tofile(folder / f"{split}_ends.bin")
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.mark.parametrize("windows", ["packed", "document"])
@pytest.mark.parametrize("ends", [True, False])
def test_where_documents_begin(tmp_path, windows, ends):
    """Each token's document begins at the last place behind an end, or where another piece of text begins."""
    lengths = [100, 7, 500, 3, 1, 390, 64, 65]
    if windows == "document" and not ends:
        return  # needs them
    corpus = load_corpus(corpus_of(tmp_path, lengths, (70, 130), ends), 64, windows, doc_mask=True)
    plain, several, val = load_corpus(tmp_path, 64, windows), 0, [0, 60, 69, 70, 100]
    taken = [
        (corpus.batch(4, 1, n), plain.batch(4, 1, n), [corpus._window(1, n + i) for i in range(4)])
        for n in range(0, 40, 4)
    ]
    taken.append((corpus.val_batch(val), plain.val_batch(val), [[(start, 64)] for start in val]))
    for batch, without, pieces in taken:
        assert torch.equal(batch.x, without.x) and torch.equal(batch.y, without.y) and without.documents is None
        assert batch.documents.dtype == torch.int32 and batch.documents.shape == batch.x.shape
        for x, row, of_row in zip(batch.x.tolist(), batch.documents.tolist(), pieces):
            joints = {0, *itertools.accumulate(length for _, length in of_row)}
            begin = 0
            for i in range(64):
                if i in joints or x[i - 1] == 256:
                    begin = i
                assert row[i] == begin
            several += len(set(row)) > 1
    assert several > 5


def test_a_corpus_that_says_nothing_of_documents(tmp_path):
    import json

    corpus_of(tmp_path, [500], ends=False)
    meta = json.loads((tmp_path / "meta.json").read_text())
    (tmp_path / "meta.json").write_text(json.dumps(meta | {"tokenizer": {"name": "char", "chars": "ab"}}))
    with pytest.raises(UserError, match=r"doc_mask=True needs .* no train_ends.bin .*char tokenizer.*--doc_mask=False"):
        load_corpus(tmp_path, 64, doc_mask=True)
    load_corpus(tmp_path, 64)
    (np.arange(500, dtype=np.uint16) % 200).tofile(tmp_path / "train.bin")  # bytes, and no end of a text among them
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match=r"nor tokens of the byte tokenizer that end a text"):
        load_corpus(tmp_path, 64, doc_mask=True)


def test_a_corpus_of_nanogpts_make_needs_no_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setattr("data.loader.tokenizer_from_meta", None)
    for split in ("train", "val"):
        np.where(np.arange(500) % 100 == 99, 50256, 7).astype(np.uint16).tofile(tmp_path / f"{split}.bin")
    batch = load_corpus(tmp_path, 64, doc_mask=True).val_batch([0, 90])
    assert batch.documents[:, -1].tolist() == [0, 10]


# -- runs -------------------------------------------------------------------------------------------

SUS, EXACT = dict(attn_backward="sus"), dict(attn_backward="exact")


@pytest.mark.parametrize(
    "keys",
    [
        dict(doc_mask=True),
        dict(doc_mask=True, windows="document", attn_window=16, attn_backward="exact"),
        dict(doc_mask=True, attn_window=16, activation_checkpointing="attention", offload_activations=True),
        dict(doc_mask=True, attn_window=16, backprop="analytic", activation_checkpointing="attention"),
        dict(doc_mask=True, sus_c="auto"),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(run, tmp_path, capsys, keys):
    whole = run("whole", **keys)
    out = capsys.readouterr().out
    assert "within documents" in out
    assert ("; all but attention computed again" in out) == ("activation_checkpointing" in keys)
    assert ("; activations in the host's memory" in out) == ("offload_activations" in keys)
    run("parts", **keys, max_iters=5)
    parts = run("parts", **keys, init_from="resume")
    assert curve(parts[-8:]) == curve(whole[-8:]) and same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


def test_the_mask_is_the_runs_own(run, tmp_path, capsys):
    """A resumed run keeps it; that of a run without says that validation differs."""
    run("a", doc_mask=True, max_iters=4)
    run("a", init_from="resume", max_iters=8)
    assert "within documents" in capsys.readouterr().out
    state = torch.load(tmp_path / "a" / "ckpt.pt", weights_only=True)
    run("a", init_from="resume", doc_mask=False)
    out = capsys.readouterr().out
    assert "doc_mask was True, is now False" in out and "validation is another than before (doc_mask)" in out
    del state["config"]["doc_mask"]  # as an earlier version's
    torch.save(state, tmp_path / "a" / "ckpt.pt")
    run("a", init_from="resume", doc_mask=True)
    out = capsys.readouterr().out
    assert "doc_mask was False, is now True" in out and "validation is another than before (doc_mask)" in out


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param(dict(attn_backward="exact"), marks=pytest.mark.slow),
        dict(sus_c="inf", activation_checkpointing="attention", offload_activations=True),
    ],
    ids=["exact", "sus"],
)
def test_processes_share_documents(corpus, tmp_path, keys):
    keys = dict(doc_mask=True, attn_window=16, **keys)
    finish(start(corpus, tmp_path / "one", **keys))
    finish(start(corpus, tmp_path / "two", *TORCHRUN, **keys))
    one, two = (weights(tmp_path / name) for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5)


SUS = dict(attn_backward="sus", sus_c=0.4)
COMPILED = {"sus-attention": (SUS, "attention"), "exact-none": (EXACT, "none")}
SLOW = {
    f"{name}-{again}": (keys, again)
    for name, keys in (("sus", SUS), ("exact", EXACT))
    for again in ("none", "attention", "full")
    if f"{name}-{again}" not in COMPILED
}


@pytest.mark.parametrize(
    "keys, again",
    [
        *(pytest.param(*case, id=name) for name, case in COMPILED.items()),
        *(pytest.param(*case, id=name, marks=pytest.mark.slow) for name, case in SLOW.items()),
    ],
)
def test_compiled(keys, again):
    """Windows within one graph; documents, which make exact attention break it, with the same gradient."""
    torch._dynamo.reset()
    x, seed = tokens(), torch.tensor(3)
    model = tiny(**keys, pos="rope", attn_window=20, activation_checkpointing=again)
    for documents, fullgraph in [
        (None, True),
        (begins(), keys is not EXACT),
        (begins([[90], [45, 45]]), keys is not EXACT),
    ]:
        compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
        want, got = (gradient(model, m(x, x, documents=documents, sus_seed=seed)[1]) for m in (model, compiled))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_lora():
    """Adapters' gradients under documents: with c = inf those of exact attention."""
    found = []
    for keys, again in itertools.product(BACKWARDS.values(), ["none", "attention", "full"]):
        model = tiny(**keys, attn_window=30, activation_checkpointing=again)
        add_adapters(model, 3, 4.0, "c_attn,c_proj,c_fc")
        model.double()
        trained = [p for p in model.parameters() if p.requires_grad]
        torch.manual_seed(2)
        for p in trained:
            torch.nn.init.normal_(p, std=0.1)
        _, loss = model(tokens(), tokens(1), documents=begins())
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)]))
    for gradient in found[1:]:
        torch.testing.assert_close(gradient, found[0], rtol=1e-7, atol=1e-10)


def test_unbiased_under_documents_and_windows():
    """A bias of 5 % of the gradient's norm along it would be found: 300 draws, a standard error of some 1 %."""
    model = tiny(attn_backward="sus", sus_c=0.4, attn_window=70, sus_backend="cpu").train()
    x, y = tokens(), tokens(1)
    draw = lambda s: gradient(model, model(x, y, documents=begins(), sus_seed=torch.tensor(s))[1])
    model.config.attn_backward = "exact"
    exact = gradient(model, model(x, y, documents=begins())[1])
    model.config.attn_backward = "sus"
    along = torch.stack([draw(s) @ exact / (exact @ exact) for s in range(300)])
    error = along.std() / math.sqrt(300)
    assert error < 0.015 and abs(along.mean() - 1) < 4 * error


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--attn_window=8 --window_pattern=SX", "window_pattern='SX' must be made of S and L"),
        ("--window_pattern=SL", "window_pattern=SL needs a window: give --attn_window=1024"),
        ("--attn_window=8 --window_pattern=L", "window_pattern=L makes none here"),
        ("--attn_window=64 --block_size=64", "attn_window=64 leaves nothing out of a context of block_size=64"),
        ("--attn_window=8 --n_layer=1", "the last of the 1 layers is always L"),
        (
            "--doc_mask=True --attn_backward=lowrank",
            "doc_mask=True is not covered by attn_backward=lowrank.*, --attn_backward=exact or --doc_mask",
        ),
        ("--attn_window=8 --attn_backward=lowrank", "attn_window=8 is not covered by attn_backward=lowrank"),
        ("--offload_activations=True --backprop=analytic", "offload_activations=True moves what autograd keeps"),
    ],
)
def test_what_does_not_go_together(corpus, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        train_here(f"--dataset={corpus}", f"--out_dir={tmp_path / 'o'}", "--wandb_log=False", *arguments.split())


def test_low_rank_refuses_documents_by_name():
    model = tiny(attn_backward="lowrank")
    with pytest.raises(ValueError, match="low-rank backward"):
        model(tokens(), tokens(), documents=begins())


@pytest.mark.parametrize("script", ["grad_variance", "lowrank_error", "picture_of_sus"])
def test_what_measures_whole_attention_refuses_windows(run, tmp_path, script, capsys, monkeypatch):
    import importlib
    import sys

    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    run(attn_window=16, max_iters=1, eval_interval=1)
    monkeypatch.setattr(
        sys, "argv", ["a", f"--out_dir={tmp_path / 'out'}", *(["--parts=sides"] * (script == "lowrank_error"))]
    )
    with pytest.raises(UserError, match="the model's layers see windows"):
        importlib.import_module(script).main()
