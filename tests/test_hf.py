"""sus_hf.py in models of transformers, whose "sdpa" is the oracle: five kinds, small and random, and the Trainer."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is a development requirement")

from transformers import AutoConfig, AutoModelForCausalLM, masking_utils

import sus_hf
from sus_attn import fold_in, sus_attention
from training_runs import text

inf = math.inf
SIZES = dict(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    bos_token_id=0,
    eos_token_id=0,
)
KINDS = {
    "llama": SIZES,
    "qwen3": SIZES | dict(head_dim=16),
    "qwen2": SIZES | dict(use_sliding_window=True, sliding_window=40, max_window_layers=1),  # its second layer has one
    "mistral": SIZES | dict(sliding_window=48),
    "gpt2": dict(
        vocab_size=128,
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=512,
        bos_token_id=0,
        eos_token_id=0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
    ),
}


def make(kind, attention="sus", c=None, **keys):
    """A small model whose attention is far from flat."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **KINDS.get(kind, SIZES) | keys))
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, 0, 0.2)
    return using(model, attention, c)


def using(model, attention, c=None):
    model.set_attn_implementation(attention)
    if c is not None:
        sus_hf.set_retention(model, c)
    return model.train()


def tokens(B=2, T=150, seed=0):
    return torch.randint(1, 128, (B, T), generator=torch.Generator().manual_seed(seed))


def gradient(model, x, seed=3, labels=None, **inputs):
    """(the loss, the whole gradient)"""
    model.zero_grad()
    torch.manual_seed(seed)
    loss = model(x, labels=x if labels is None else labels, **inputs).loss
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])


def packed(*lengths):
    return torch.cat([torch.arange(length) for length in lengths])[None]


def mask(B, T, row, *, left=0, right=0):
    """Of ones, but for padding in one row."""
    ones = torch.ones(B, T, dtype=torch.long)
    ones[row, :left] = 0
    ones[row, T - right :] = 0
    return ones


INPUTS = {
    "plain": {},
    "ones": dict(attention_mask=mask(2, 150, 0)),
    "left padding": dict(attention_mask=mask(2, 150, 0, left=70)),
    "right padding": dict(attention_mask=mask(2, 150, 1, right=33)),
    "packed": dict(position_ids=packed(60, 1, 89).expand(2, -1), use_cache=False),
}


@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_infinite_c_gives_the_loss_and_gradient_of_sdpa(kind, inputs):
    """In training with c = inf, and in evaluation with any c. At c = 1 the loss is the same, and the gradient not."""
    model, x = make(kind, "sdpa"), tokens()
    labels = x.masked_fill(inputs.get("attention_mask", torch.ones(1)) == 0, -100)
    loss, exact = gradient(model, x, labels=labels, **inputs)
    near = pytest.approx(loss, abs=2e-6)
    for c, train in ((inf, True), (1.0, False)):
        found, gradient_ = gradient(using(model, "sus", c).train(train), x, labels=labels, **inputs)
        assert found == near and (gradient_ - exact).norm() < 1e-5 * exact.norm()
    found, gradient_ = gradient(model.train(), x, labels=labels, **inputs)
    assert found == near and (gradient_ - exact).norm() > 0.1 * exact.norm()


def test_other_shapes_of_attention():
    """Values narrower than queries (DeepSeek's), two-sided attention (ModernBERT's), positions that repeat."""
    x = tokens()
    mla = dict(qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, kv_lora_rank=8, q_lora_rank=8, head_dim=8)
    mla |= dict(num_key_value_heads=4, first_k_dense_replace=2, n_routed_experts=8, moe_intermediate_size=16)
    model = make("deepseek_v3", "sdpa", **mla)
    loss, exact = gradient(model, x)
    found, gradient_ = gradient(using(model, "sus", inf), x)
    assert found == pytest.approx(loss, abs=2e-6) and (gradient_ - exact).norm() < 1e-5 * exact.norm()
    with torch.no_grad():
        want = using(model, "sdpa")(x[:, :1]).logits
        torch.testing.assert_close(using(model, "sus").eval()(x[:, :1]).logits, want, atol=1e-5, rtol=1e-4)
    config = AutoConfig.for_model("modernbert", **SIZES | dict(local_attention=16, pad_token_id=0, cls_token_id=0))
    encoder = transformers.AutoModel.from_config(config, attn_implementation="sdpa").eval()
    inputs = dict(attention_mask=mask(2, 150, 1, right=20))
    with torch.no_grad():
        want = encoder(x, **inputs).last_hidden_state
        encoder.set_attn_implementation("sus")
        found = encoder(x, **inputs).last_hidden_state
    torch.testing.assert_close(found[0], want[0], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(found[1, :130], want[1, :130], atol=2e-5, rtol=1e-4)
    positions = torch.arange(150).clamp(max=99)[None].expand(2, -1)  # as of the patches of an image
    model, inputs = make("llama", "sdpa"), dict(position_ids=positions, attention_mask=mask(2, 150, 0))
    want = model(x, **inputs).logits
    torch.testing.assert_close(using(model, "sus", inf)(x, **inputs).logits, want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("how", ["position_ids", "behind a mask of ones", "with a cache", "cu_seq_lens"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_are_as_if_alone(kind, how):
    """Logits, and gradients of the sum of all, also where sdpa itself mixes them."""
    lengths = (70, 3, 77)
    model, x = make(kind, "sdpa"), tokens(1)
    alone = torch.cat([model(part).logits for part in x.split(lengths, 1)], 1)
    weight = torch.randn(alone.shape, generator=torch.Generator().manual_seed(2))
    want = torch.autograd.grad((alone * weight).sum(), list(model.parameters()))
    inputs = dict(position_ids=packed(*lengths))
    if how == "behind a mask of ones":
        inputs["attention_mask"] = torch.ones_like(x)
    if how == "cu_seq_lens":
        ends = torch.tensor([0, 70, 73, 150], dtype=torch.int32)
        inputs |= dict(cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=77, max_length_k=77)
    logits = using(model, "sus", inf)(x, use_cache=how == "with a cache", **inputs).logits
    torch.testing.assert_close(logits, alone, atol=2e-5, rtol=1e-4)
    found = torch.autograd.grad((logits * weight).sum(), list(model.parameters()))
    for a, b in zip(found, want):
        assert (a - b).norm() <= 2e-5 * b.norm()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x, use_cache=False, **inputs).logits, alone, atol=2e-5, rtol=1e-4)


def max_z(kind, c, draws=60, **inputs):
    """The largest z-score of 30 random projections of the mean gradient, over draws of eight sequences that are one."""
    model, x = make(kind, "sus", c), tokens(1, 150)
    exact = gradient(model.eval(), x.expand(8, -1), **inputs)[1]
    model.train()
    projections = torch.randn(30, len(exact), generator=torch.Generator().manual_seed(4)) / exact.norm()
    found = torch.stack([projections @ gradient(model, x.expand(8, -1), seed, **inputs)[1] for seed in range(draws)])
    return ((found.mean(0) - projections @ exact) / (found.std(0) / math.sqrt(draws))).abs().max()


@pytest.mark.parametrize("kind", ["llama", *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS if k != "llama")])
def test_gradients_are_unbiased(kind):
    """Whole models at c = 1, on packed documents: the mean of 480 draws within 4.5 standard errors of the exact
    gradient, in 30 directions. A gradient that is off by a fifth of one draw's noise fails.
    """
    assert max_z(kind, 1.0, position_ids=packed(100, 50).expand(8, -1)) < 4.5


# -- the draws' seeds -------------------------------------------------------------------------------


@pytest.fixture
def seeds(monkeypatch):
    """The seeds of all calls."""
    found = []

    def note(*args, seed, **options):
        found.append(int(seed))
        return sus_attention(*args, seed=seed, **options)

    monkeypatch.setattr(sus_hf, "sus_attention", note)
    return found


def test_seeds_differ_by_layer_process_and_step(seeds, monkeypatch):
    model, x = make("llama", c=1.0), tokens()
    first = gradient(model, x)[1]
    assert torch.equal(gradient(model, x)[1], first) and seeds[:2] == seeds[2:]  # of torch's generator
    model(x)  # without setting the generator back
    torch.manual_seed(3)
    model.model.layers[1].self_attn.layer_idx = 0  # not by the layer, the generator goes on all the same
    model(x)
    model.model.layers[1].self_attn.layer_idx = 1
    monkeypatch.setattr(torch, "randint", lambda *a, **k: torch.tensor(5))  # the generator stands still
    model(x)
    monkeypatch.setattr(sus_hf.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(sus_hf.distributed, "get_rank", lambda: 1)
    model(x)
    assert seeds[2:4] == seeds[:2] and seeds[6] == seeds[0] and len(set(seeds)) == len(seeds) - 3
    assert seeds[8] == fold_in(5, 0, 0) and seeds[11] == fold_in(5, 1, 1)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_repeats_the_draws(reentrant, seeds):
    model, x = make("llama", c=1.0), tokens()
    plain = gradient(model, x)[1]
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert torch.equal(gradient(model, x)[1], plain)
    assert len(seeds) == 6 and seeds[2:4] == seeds[:2] and sorted(seeds[4:]) == sorted(seeds[:2])
    assert not torch.equal(gradient(model, x, seed=4)[1], plain)


def test_evaluation_draws_nothing():
    model, x = make("llama", c=1.0).eval(), tokens()
    torch.manual_seed(5)
    with torch.no_grad():
        model(x)
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(5)))


def test_a_compiled_model_has_no_graph_break_and_new_draws():
    model, x = make("llama", c=1.0), tokens()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    exact = gradient(model.eval(), x)[1]
    model.train()
    a, b, c = (gradient(compiled, x, seed)[1] for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c) and not torch.equal(a, exact)


@pytest.mark.slow  # the same without padding and packing is above
@pytest.mark.parametrize("inputs", [INPUTS["left padding"], INPUTS["packed"]], ids=["left padding", "packed"])
def test_a_compiled_model_follows_sdpa(inputs):
    model, x = make("llama", "sdpa"), tokens()
    loss, exact = gradient(model, x, **inputs)
    compiled = torch.compile(using(model, "sus", inf), backend="aot_eager", fullgraph=True)
    found, gradient_ = gradient(compiled, x, **inputs)
    assert found == pytest.approx(loss, abs=2e-6) and (gradient_ - exact).norm() < 1e-5 * exact.norm()


@pytest.mark.slow  # as above
def test_a_compiled_model_takes_any_length():
    x = tokens()
    dynamic = torch.compile(make("llama", "sus", inf), backend="eager", fullgraph=True, dynamic=True)
    for T in (150, 64):
        want = make("llama", "sdpa")(x[:, :T]).logits
        torch.testing.assert_close(dynamic(x[:, :T]).logits, want, atol=2e-5, rtol=1e-4)


# -- evaluation and generation ----------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("kind", KINDS)
def test_generates_what_sdpa_does(kind, cache):
    """Greedily, a batch with a padded row, beyond the windows."""
    model, x = make(kind).eval(), tokens(2, 60)
    keys = dict(attention_mask=mask(2, 60, 0, left=21), max_new_tokens=30, do_sample=False, pad_token_id=0)
    keys |= dict(cache_implementation="static") if cache == "static" else {}
    with_sus = model.generate(x, **keys)
    model.set_attn_implementation("sdpa")
    assert torch.equal(with_sus, model.generate(x, **keys))


def test_a_part_of_the_rows_behind_a_cache():
    model, x = make("mistral").eval(), tokens()
    with torch.no_grad():
        whole = model(x).logits
        first = model(x[:, :90])
        rest = model(x[:, 90:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(rest, whole[:, 90:], atol=2e-5, rtol=1e-4)


# -- key ranges against transformers' own masks -----------------------------------------------------


def dense(ranges, N):
    key = torch.arange(N)
    return (key >= ranges[..., :1]) & (key < ranges[..., 1:])


PATTERNS = ["causal", "window", "chunked", "documents", "both sides", "window to both sides"]


@pytest.mark.parametrize("q_offset, kv_offset, T, N", [(0, 0, 30, 30), (9, 0, 21, 30), (0, 0, 12, 30), (25, 9, 5, 21)])
@pytest.mark.parametrize("padding", [None, "left", "right", "short"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_ranges_are_the_masks_of_transformers(pattern, padding, q_offset, kv_offset, T, N):
    """For every row that is no padding, with caches that are full, empty in part, and slide."""
    B, length = 2, kv_offset + N
    functions = {
        "causal": (masking_utils.causal_mask_function, None),
        "window": (masking_utils.sliding_window_causal_mask_function(8), 8),
        "chunked": (masking_utils.chunked_causal_mask_function(8, torch.tensor([0, 3])), 8),
        "documents": (
            masking_utils.and_masks(
                masking_utils.packed_sequence_mask_function(torch.arange(length)[None].expand(B, -1) // 11),
                masking_utils.causal_mask_function,
            ),
            None,
        ),
        "both sides": (masking_utils.bidirectional_mask_function, None),
        "window to both sides": (masking_utils.sliding_window_bidirectional_mask_function(4), 4),
    }
    function, size = functions[pattern]
    ones = torch.ones(B, length, dtype=torch.bool)
    if padding == "left":
        ones[0, :5] = False
    elif padding in ("right", "short"):
        ones[0, length - 6 :] = False
    if padding == "short":  # as behind a static cache
        ones = ones[:, : length - 4]
    arguments = dict(
        batch_size=B,
        q_length=T,
        kv_length=N,
        q_offset=q_offset,
        kv_offset=kv_offset,
        local_size=size,
        mask_function=function,
        attention_mask=None if padding is None else ones,
    )
    want = masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False, device="cpu")[:, 0].expand(B, -1, -1)
    found = sus_hf.key_ranges(**arguments | ({"allow_is_bidirectional_skip": True} if "sides" in pattern else {}))
    if found is None:
        assert pattern == "both sides" and padding is None
        found = torch.ones(1, T, N).bool()
    else:
        assert found.dtype == torch.int32 and found.shape[1:] == (1, T, 2)
        found = dense(found[:, 0], N)
    full = masking_utils.prepare_padding_mask(ones, N, kv_offset)
    for b in range(B):
        for row in range(T):
            if padding is None or q_offset + row < full.shape[1] and full[b, q_offset + row]:
                assert torch.equal(found.expand(B, -1, -1)[b, row], want[b, row]), (b, row)


def test_masks_that_are_no_ranges_are_refused():
    x = tokens()
    model = make("llama", "sus")
    holes = torch.ones_like(x)
    holes[1, 40:50] = 0
    with pytest.raises(ValueError, match="padding at the ends of attention_mask, not between tokens"):
        model(x, attention_mask=holes)
    with pytest.raises(ValueError, match=r"of shape \(batch, tokens\), not \(2, 150, 150\)"):
        model(x, attention_mask=torch.ones(2, 150, 150))
    with pytest.raises(ValueError, match=r"no attention_mask of shape \(2, 1, 150, 150\), torch.bool.*position_ids"):
        model(x, attention_mask=torch.ones(2, 1, 150, 150, dtype=torch.bool))
    keys = dict(config=model.config, inputs_embeds=torch.zeros(2, 20, 32), attention_mask=None, past_key_values=None)
    blocks = torch.full((2, 20), -1)
    blocks[:, 5:9] = 1
    with pytest.raises(ValueError, match="rows that see a range of keys"):
        masking_utils.create_causal_mask(**keys, block_sequence_ids=blocks)
    with pytest.raises(ValueError, match="or_mask_function"):
        masking_utils.create_causal_mask(**keys, or_mask_function=lambda b, h, q, k: k == 0)


# -- what is refused by name ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, value, says",
    [
        ("dropout", 0.1, "no dropout: load the model with attention_dropout=0.0 .it is 0.1."),
        ("softcap", 50.0, "no softcap .* use 'eager'"),
        ("s_aux", torch.zeros(4), "no sinks .s_aux"),
        ("position_bias", torch.zeros(1), "no position_bias"),
        ("cache", object(), "no paged cache"),
        ("block_indices", torch.zeros(1), "no block_indices, by which the model chooses keys"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(name, value, says):
    module = make("llama").model.layers[0].self_attn
    q = torch.randn(1, 4, 8, 8)
    with pytest.raises(ValueError, match=f"^attention 'sus' has {says}"):
        sus_hf.sus_attention_forward(module, q, q, q, None, **{name: value})


def test_dropout_names_the_key_to_set():
    with pytest.raises(ValueError, match="load the model with attn_pdrop=0.0 .it is 0.1."):
        make("gpt2", attn_pdrop=0.1)(tokens())
    make("gpt2", attn_pdrop=0.1).eval()(tokens())
    with pytest.raises(ValueError, match="load the model with attention_dropout=0.0 .it is 0.2."):
        make("llama", attention_dropout=0.2)(tokens())
    with pytest.raises(ValueError, match="load the model with attn_pdrop=0.0 .it is 0.1."):
        sus_hf.set_retention(make("gpt2", attn_pdrop=0.1), 4.0)
    with pytest.raises(ValueError, match="no softcap"):
        make("gemma2", head_dim=16)(tokens())


def test_retention_is_checked_and_set_in_every_layer():
    model = make("llama", "sdpa")
    with pytest.raises(ValueError, match="no layer's attention is 'sus' .sdpa.: load the model with attn_impl"):
        sus_hf.set_retention(model, 4.0)
    with pytest.raises(ValueError, match="this is no model of transformers"):
        sus_hf.set_retention(torch.nn.Linear(2, 2), 4.0)
    own = AutoConfig.for_model("codegen", vocab_size=128, n_embd=32, n_layer=1, n_head=4, rotary_dim=4)
    own = AutoModelForCausalLM.from_config(own, attn_implementation="sus")
    with pytest.raises(ValueError, match="CodeGen.* has an attention of its own.*: use 'eager'"):
        sus_hf.set_retention(own, 4.0)
    with pytest.raises(RuntimeError):  # it doesn't go on without its causal mask
        own(tokens())
    model.set_attn_implementation("sus")
    for bad, kind in (
        (0, ValueError),
        (-1.0, ValueError),
        (math.nan, ValueError),
        ("4", TypeError),
        (model, TypeError),
    ):
        with pytest.raises(kind, match="^c must be "):
            sus_hf.set_retention(model, bad)
    sus_hf.set_retention(model, 3)
    assert [layer.self_attn.sus_c for layer in model.model.layers] == [3.0, 3.0]
    assert "sus_c" not in json.dumps(model.config.to_dict())


# -- the Trainer ------------------------------------------------------------------------------------


def documents(count=12):
    """Tokens of text, in documents of several lengths."""
    ids = list(text(6000, 0).encode("ascii", "ignore"))
    lengths = [40 + 37 * i % 120 for i in range(count)]
    return [{"input_ids": ids[100 * i : 100 * i + length]} for i, length in enumerate(lengths)]


def trained(model, folder, steps=3, packs=True, **arguments):
    """The losses of the Trainer on packed documents, three a step, in one row."""
    collator = transformers.DataCollatorWithFlattening() if packs else None
    data = documents()
    if not packs:
        data = [{"input_ids": d, "labels": d} for d in (row["input_ids"][:40] for row in data)]
    options = transformers.TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=3,
        learning_rate=3e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        **arguments,
    )
    trainer = transformers.Trainer(model, options, train_dataset=data, data_collator=collator)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def adapted(model):
    peft = pytest.importorskip("peft", reason="peft is a development requirement")
    torch.manual_seed(2)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, 0, 0.1)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_the_trainer_follows_sdpa(kind, tmp_path):
    exact = trained(make(kind, "sdpa"), tmp_path)
    assert trained(make(kind, "sus", inf), tmp_path) == pytest.approx(exact, abs=1e-4)
    noisy = trained(make(kind, "sus", 1.0), tmp_path)
    assert noisy[0] == pytest.approx(exact[0], abs=1e-4) and noisy[1:] != pytest.approx(exact[1:], abs=1e-4)


def test_the_script_in_the_docs(tmp_path):
    """docs/operator.md's, on a small model."""
    page = (Path(__file__).resolve().parents[1] / "docs" / "operator.md").read_text(encoding="utf-8")
    (script,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "Trainer(" in block)
    script = script.replace("max_steps=100", 'max_steps=2, report_to="none", use_cpu=True, logging_steps=1')
    names = dict(model=make("llama", "sus", 1.0), output_dir=str(tmp_path), documents=documents())
    exec(script, names)
    losses = [entry["loss"] for entry in names["trainer"].state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(map(math.isfinite, losses))


WAYS = {
    "checkpointing": dict(gradient_checkpointing=True),
    "lora": {},
    "lora, checkpointing": dict(gradient_checkpointing=True),
    "compile": dict(torch_compile=True, torch_compile_backend="aot_eager"),
}
QUICK = [("llama", way) for way in WAYS if way != "compile"]  # that a compiled model does the same is tested above
SLOW = [(kind, way) for kind in KINDS for way in WAYS if (kind, way) not in QUICK]


@pytest.mark.parametrize("kind, way", [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_the_trainer_with(kind, way, tmp_path):
    """As "sdpa" does at c = inf. Checkpointing changes no bit of what SUS draws."""
    kinds = lambda *attention: adapted(make(kind, *attention)) if "lora" in way else make(kind, *attention)
    run = lambda model, **arguments: trained(model, tmp_path, **arguments)
    exact = run(kinds("sdpa"), **WAYS[way])
    model = kinds("sus", inf)
    assert run(model, **WAYS[way]) == pytest.approx(exact, abs=2e-4)
    noisy = run(kinds("sus", 1.0), **WAYS[way])
    assert noisy[1:] != pytest.approx(exact[1:], abs=2e-4)
    if "checkpointing" in way:
        assert noisy == run(kinds("sus", 1.0))
    if "lora" in way:
        changed = {n for n, p in model.named_parameters() if p.requires_grad}
        assert changed and all("lora" in name for name in changed)


@pytest.mark.slow  # inductor's compilation; the same graphs run eagerly above
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_the_trainer_with_inductor(kind, tmp_path):
    exact = trained(make(kind, "sdpa"), tmp_path)
    found = trained(make(kind, "sus", inf), tmp_path, torch_compile=True)
    assert found == pytest.approx(exact, abs=5e-4)


RANKS = """
import sys, torch
sys.path[:0] = sys.argv[1:3]
import test_hf
seeds = []
real = test_hf.sus_hf.sus_attention
test_hf.sus_hf.sus_attention = lambda *a, seed, **k: seeds.append(int(seed)) or real(*a, seed=seed, **k)
model = test_hf.make("llama", "sus", 1.0)
losses = test_hf.trained(model, sys.argv[3], ddp_backend="gloo")
print("RESULT", torch.distributed.get_rank(), *seeds, float(sum(p.double().sum() for p in model.parameters())))
"""


@pytest.mark.slow  # two processes; the seeds are tested above
def test_processes_of_a_trainer_draw_apart_and_stay_together(tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(tmp_path / "ranks.py"), str(root), str(root / "tests"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ)
    assert done.returncode == 0, done.stderr
    a, b = (line.split()[2:] for line in done.stdout.splitlines() if line.startswith("RESULT"))
    assert len(a) == 7 and a[-1] == b[-1] and not set(a[:-1]) & set(b[:-1])


# -- what pip installs ------------------------------------------------------------------------------


@pytest.mark.slow  # .ci/run installs into an environment that has nothing else
def test_a_wheel_works_in_another_folder(tmp_path):
    """Built from what git has; installed beside this environment's packages, and without the repository."""
    root = Path(__file__).resolve().parents[1]
    copy = tmp_path / "copy"
    for path in ("pyproject.toml", "LICENSE", "sus_attn.py", "sus_hf.py", "sus_backends"):
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (root / path).is_dir() else shutil.copy)(root / path, copy / path)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(copy)]
    install = [*pip, "install", "--no-deps", "--target", str(tmp_path / "site")]
    for command in (build, [*install, str(tmp_path / "nanosus-0.1.0-py3-none-any.whl")]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    modules = sorted(path.name for path in (tmp_path / "site").iterdir() if path.name != "__pycache__")
    assert modules == ["nanosus-0.1.0.dist-info", "sus_attn.py", "sus_backends", "sus_hf.py"]
    shutil.copy(root / "tests" / "installed.py", tmp_path)
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "installed.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"nanosus 0.1.0 works from {tmp_path / 'site' / 'sus_attn.py'}\n"
