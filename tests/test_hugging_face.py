"""Hugging Face folders in and out, with transformers' logits as the oracle; and the layers that these models have."""

import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

transformers = pytest.importorskip("transformers", reason="transformers is a development requirement")

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import export
import sample
from backprop import loss_and_gradients
from configurator import UserError
from data.tokenizer import tokenizer_from_meta
from model import ARCHITECTURE_KEYS, GPTConfig
from rope import ROPE_KEYS, rope_table
from training import checkpoint, hugging_face
from training.hugging_face_tokenizer import tokenizer_of, write_tokenizer
from training.lora import add_adapters, merge
from training.record import read_record
from training.weights import load_base, model_from_checkpoint
from training_runs import TINY, arguments, text, train_here

ROOT = Path(__file__).resolve().parents[1]
SMOLLM2 = Path(os.environ.get("SMOLLM2", ROOT / "models" / "smollm2"))
SIZES = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=0,
    eos_token_id=0,
)
GPT2 = dict(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=0)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=5e5,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
YARN = dict(rope_type="yarn", rope_theta=1e6, factor=4.0, original_max_position_embeddings=64)
FOLDERS = {
    "gpt2": ("gpt2", GPT2 | dict(n_inner=50)),
    "llama": ("llama", SIZES),
    "llama, llama3": ("llama", SIZES | dict(rope_parameters=LLAMA3)),
    "llama, linear, biases": (
        "llama",
        SIZES
        | dict(attention_bias=True, mlp_bias=True, head_dim=16)
        | dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=4.0)),
    ),
    "mistral": ("mistral", SIZES | dict(sliding_window=40)),
    "qwen2": ("qwen2", SIZES | dict(use_sliding_window=True, sliding_window=30, max_window_layers=1)),
    "qwen3": ("qwen3", SIZES | dict(head_dim=16, tie_word_embeddings=True, rope_parameters=YARN)),
}


def make(folder, kind, **keys):
    """A model of transformers all of whose weights count, in a folder."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **keys)).eval()
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, 1 if "norm" in name or "ln_" in name else 0, 0.2)
    model.save_pretrained(folder)
    return model


def read(folder):
    return model_from_checkpoint(load_base(folder), folder).eval()


def logits_at(model, x, ends):
    return torch.stack([model(x[:, :end])[0][:, 0] for end in ends], 1)


def ids(B=2, T=120):
    return torch.randint(97, (B, T), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind, keys", FOLDERS.values(), ids=FOLDERS)
def test_logits_are_transformers_in_and_out(kind, keys, tmp_path):
    """In; from the KV cache; and of the folder that is written from what was read."""
    theirs = make(tmp_path / "in", kind, **keys)
    ours, x, ends = read(tmp_path / "in"), ids(), (1, 5, 60, 120)
    assert hugging_face.type_of(ours.config) == kind
    with torch.no_grad():
        want = theirs(x).logits
        torch.testing.assert_close(logits_at(ours, x, ends), want[:, [end - 1 for end in ends]], rtol=1e-4, atol=1e-4)
        last, cache = ours.prefill(x[0, :100].tolist(), chunk=30)
        torch.testing.assert_close(last, want[0, 99], rtol=1e-4, atol=1e-4)
        following = ours(x[:1, 100:101], cache=cache)[0][0, 0]
        torch.testing.assert_close(following, want[0, 100], rtol=1e-4, atol=1e-4)
        loss = ours(x[:, :-1], x[:, 1:])[1]
        torch.testing.assert_close(loss, F.cross_entropy(want[:, :-1].flatten(0, 1), x[:, 1:].flatten()))
    (tmp_path / "out").mkdir()
    hugging_face.write(tmp_path / "out", ours, kind, {})
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert type(again) is type(theirs) and torch.equal(again(x).logits, want)


@pytest.mark.parametrize("kind, keys", FOLDERS.values(), ids=FOLDERS)
def test_the_gradient_by_hand_is_autograd_s(kind, keys, tmp_path):
    make(tmp_path, kind, **keys)
    model, x = read(tmp_path).double(), ids(T=50)
    if kind in ("llama", "qwen3"):
        add_adapters(model, 4, 8.0, "c_attn,mlp.c_fc")
        for name, p in model.named_parameters():
            if "lora_b" in name:
                torch.nn.init.normal_(p, 0, 0.1)
    grads = []
    for run in (lambda: model(x, x.roll(-1))[1].backward(), lambda: loss_and_gradients(model, x, x.roll(-1))):
        model.zero_grad()
        run()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


OTHER_YARN = YARN | dict(beta_fast=16.0, beta_slow=2.0, attention_factor=1.3)
LINEAR = dict(rope_type="linear", factor=3.0, rope_theta=1e4)


@pytest.mark.parametrize("rope", [LLAMA3, YARN, OTHER_YARN, LINEAR], ids=["llama3", "yarn", "other yarn", "linear"])
@pytest.mark.parametrize("D, original", [(16, 64), (64, 8192), (128, 8192)])
def test_angles_are_transformers(rope, D, original):
    """Of each kind, against transformers.modeling_rope_utils."""
    rope = {"rope_theta": 5e5} | rope
    rope |= {"original_max_position_embeddings": original} if rope["rope_type"] != "linear" else {}
    config = AutoConfig.for_model(
        "llama", **SIZES | dict(head_dim=D, max_position_embeddings=8 * original, rope_parameters=rope)
    )
    frequency, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu")
    keys = hugging_face.rope_of({"rope_parameters": rope}, 8 * original, None)
    cos, sin = rope_table(D, 200, **keys)
    angle = torch.arange(200)[:, None] * frequency
    torch.testing.assert_close(cos, factor * angle.cos(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sin, factor * angle.sin(), rtol=1e-4, atol=1e-4)


def test_earlier_checkpoints_stretch_linearly():
    """Before there was rope_type, rope_scaling alone said so."""
    config = GPTConfig(pos="rope", rope_scaling=4.0, n_embd=32, n_head=2, block_size=8)
    assert config.rope_type == "linear"
    table = rope_table(16, 9, **{name: getattr(config, name) for name in ROPE_KEYS})
    torch.testing.assert_close(table[:, 8], rope_table(16, 3)[:, 2])


# -- what is refused, by name ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, keys, says",
    [
        ("llama", dict(hidden_act="gelu"), "hidden_act='gelu'"),
        ("llama", dict(attention_bias=True), "attention_bias"),
        ("qwen3", dict(attention_bias=True), "attention_bias=True"),
        ("llama", dict(rope_scaling={"rope_type": "dynamic", "factor": 2.0}), "rope_type='dynamic'"),
        ("llama", dict(rope_scaling={"rope_type": "yarn", "factor": 2.0, "truncate": False}), "truncate=False"),
        ("llama", dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
        ("llama", dict(quantization_config={"quant_method": "awq"}), "quantization_config='awq'"),
        ("gpt2", dict(activation_function="relu"), "activation_function='relu'"),
        ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx=True"),
        ("llama", dict(num_hidden_layers=None), "needs num_hidden_layers, a number above 0, and has None"),
        ("llama", dict(hidden_size="32"), "needs hidden_size, a number above 0, and has '32'"),
        ("falcon", {}, "a model of type 'falcon', and only gpt2, llama, mistral, qwen2, qwen3 can be read"),
    ],
)
def test_a_config_that_does_not_fit(kind, keys, says, tmp_path):
    config = (GPT2 if kind == "gpt2" else SIZES) | {"model_type": kind} | keys
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as error:
        load_base(tmp_path)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_weights_that_do_not_fit(tmp_path):
    from safetensors.torch import load_file, save_file

    make(tmp_path, "llama", **SIZES)
    path = tmp_path / "model.safetensors"
    whole, bytes_ = load_file(path), path.read_bytes()
    o_proj = "model.layers.1.self_attn.o_proj.weight"
    for weights, says in (
        ({k: v for k, v in whole.items() if k != o_proj}, f"its weights lack {o_proj}"),
        (whole | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}, "no place for its weights .*q_proj.bias"),
        (whole | {o_proj: torch.zeros(32, 31)}, "do not fit"),
    ):
        save_file(weights, path)
        with pytest.raises(UserError, match=says):
            read(tmp_path)
    path.write_bytes(bytes_[: len(bytes_) // 2])
    with pytest.raises(UserError, match="are damaged"):
        read(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match="has no model.safetensors$"):
        read(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="only pytorch_model.bin, a pickle, which may hold code and is not read"):
        read(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json is damaged"):
        read(tmp_path)


def test_shards_and_bare_models_are_read(tmp_path):
    model = make(tmp_path / "whole", "llama", **SIZES)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    want = read(tmp_path / "whole").state_dict()
    assert all(torch.equal(w, want[name]) for name, w in read(tmp_path / "shards").state_dict().items())
    tied = make(tmp_path / "tied", "llama", **SIZES | dict(tie_word_embeddings=True))
    theirs = tied.model.state_dict()  # without "model."
    from safetensors.torch import save_file

    save_file(theirs, tmp_path / "tied" / "model.safetensors")
    x = ids()
    with torch.no_grad():
        torch.testing.assert_close(read(tmp_path / "tied")(x)[0][:, 0], tied(x).logits[:, -1], rtol=1e-4, atol=1e-4)


# -- training from a folder, and back -------------------------------------------------------------------


def fine_tune(corpus, out_dir, **keys):
    """The record's lines of a run whose architecture is that of a folder."""
    named = TINY.keys() - {"block_size", *ARCHITECTURE_KEYS}
    keys = {name: TINY[name] for name in named} | dict(dataset=corpus, out_dir=out_dir) | keys
    train_here(*(f"--{name}={value}" for name, value in keys.items()))
    return read_record(out_dir / "metrics.jsonl")[1]


def test_a_folder_is_fine_tuned_and_exported(corpus, tmp_path, monkeypatch, capsys):
    """By LoRA, with SUS, on documents, at a longer context by YaRN; then a folder that transformers reads."""
    make(tmp_path / "hf", "qwen3", **SIZES | dict(vocab_size=257, head_dim=16, max_position_embeddings=64))
    keys = dict(init_from=tmp_path / "hf", block_size=128, rope_type="yarn", rope_scaling=2.0, lora_rank=4)
    keys |= dict(attn_backward="sus", sus_c=2.0, doc_mask=True, max_iters=4)
    lines = fine_tune(corpus, tmp_path / "out", **keys)
    printed = capsys.readouterr().out
    assert "has no tokenizer: takes" in printed
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert losses and all(map(math.isfinite, losses))
    saved = checkpoint.load(tmp_path / "out" / "ckpt.pt")
    assert saved["model_args"]["rope_original_context"] == 64 and saved["model_args"]["mlp"] == "swiglu"
    assert fine_tune(corpus, tmp_path / "out", init_from="resume", max_iters=6)[-1]["iter"] == 6
    saved = checkpoint.load(tmp_path / "out" / "ckpt.pt")
    monkeypatch.setattr(sys, "argv", ["export.py", f"--out_dir={tmp_path / 'out'}", f"--to={tmp_path / 'new'}"])
    export.main()
    ours = merge(model_from_checkpoint(saved, tmp_path / "out" / "ckpt.pt")).eval()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "new").eval()
    x = torch.randint(257, (1, 128))
    with torch.no_grad():
        torch.testing.assert_close(ours(x)[0][0, 0], theirs(x).logits[0, -1], rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="new exists already: choose another --to"):
        export.main()


def texts():
    return text(3000), "caf\u00e9 \u4f60\u597d\U0001f600", "  a\n\n\tb  12345  'll <|endoftext|> end", ""


@pytest.mark.parametrize("name", ["byte", "gpt2"])
def test_the_tokenizer_goes_along(name, tmp_path, request):
    """transformers gives the ids of ours, and ours comes back from the folder."""
    if name == "gpt2":
        request.getfixturevalue("gpt2")
    ours = tokenizer_from_meta({"name": name})
    assert write_tokenizer(tmp_path, ours, 64) == f"with the {name} tokenizer"
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == ours.eot and theirs.model_max_length == 64
    for written in texts():
        want = ours.encode(written).tolist()
        if "<|endoftext|>" not in written:  # which is text in ours
            assert theirs(written).input_ids == want
        assert theirs.decode(want) == written
    back = tokenizer_of(tmp_path)
    assert back == {"name": "gpt2"} if name == "gpt2" else back["n_vocab"] == 257
    assert tokenizer_from_meta(back).encode(texts()[2]).tolist() == ours.encode(texts()[2]).tolist()


def test_tokenizers_that_stay_behind(tmp_path):
    for tokenizer in (None, tokenizer_from_meta({"name": "char", "chars": "ab"})):
        assert write_tokenizer(tmp_path, tokenizer, 64).startswith("without a tokenizer: ")
    assert list(tmp_path.iterdir()) == [] and tokenizer_of(tmp_path) is None


def test_pipeline_says_what_sample_does(corpus, tmp_path, monkeypatch, capsys):
    """Greedily, of a run of ours in bytes, as a Llama."""
    keys = dict(norm="rmsnorm", mlp="swiglu", intermediate_size=48, tie_head=False, max_iters=4)
    train_here(*arguments(corpus, tmp_path / "out", **keys))
    to = tmp_path / "models" / "mine"
    monkeypatch.setattr(sys, "argv", ["export.py", f"--out_dir={tmp_path / 'out'}", f"--to={to}"])
    capsys.readouterr()
    export.main()
    assert capsys.readouterr().out.splitlines()[0].startswith(f"{to}: llama, 0.0")
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert len({path.stat().st_mode for path in to.iterdir()}) == 1
    assert {path.name for path in to.iterdir()} == names and [path.name for path in to.parent.iterdir()] == ["mine"]
    pipe = transformers.pipeline("text-generation", str(to), device="cpu")
    (found,) = pipe("def fa(", max_new_tokens=12, do_sample=False)
    said = []
    for where in (f"--out_dir={tmp_path / 'out'}", f"--init_from={to}"):
        options = ("--num_samples=1", "--max_new_tokens=12", "--temperature=0", "--start=def fa(", "--device=cpu")
        monkeypatch.setattr(sys, "argv", ["sample.py", where, *options])
        sample.main()
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and said[0] == found["generated_text"] + "\n---------------\n"


@pytest.mark.parametrize(
    "keys, says",
    [
        ({}, "nearest, gpt2, is pos=rope"),
        (dict(pos="learned", bias=True, qk_norm=True), "nearest, gpt2, is qk_norm=True"),
        (dict(norm="rmsnorm", mlp="swiglu", attn_window=8), "nearest, .*window"),
    ],
)
def test_what_no_type_fits_stays(keys, says, corpus, tmp_path, monkeypatch):
    train_here(*arguments(corpus, tmp_path / "out", max_iters=1, **keys))
    monkeypatch.setattr(sys, "argv", ["export.py", f"--out_dir={tmp_path / 'out'}", f"--to={tmp_path / 'to'}"])
    with pytest.raises(UserError, match=f"of none of the types gpt2, llama, mistral, qwen2, qwen3: .*{says}"):
        export.main()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="no models/smollm2: python examples/smollm2.py makes it")
def test_smollm2_in_and_out(tmp_path):
    """The real one, on a page of the README: logits, tokens, and the folder that is written."""
    theirs, words = AutoModelForCausalLM.from_pretrained(SMOLLM2).eval(), AutoTokenizer.from_pretrained(SMOLLM2)
    saved = load_base(SMOLLM2)
    ours = model_from_checkpoint(saved, SMOLLM2).eval()
    page = (ROOT / "README.md").read_text(encoding="utf-8")[:3000]
    ids = tokenizer_from_meta(saved["tokenizer"]).encode(page)
    assert ids.tolist() == words(page).input_ids
    x = torch.from_numpy(ids)[None, :512]
    hugging_face.write(tmp_path, ours, "llama", {})
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        want = theirs(x).logits
        torch.testing.assert_close(logits_at(ours, x, (9, 512)), want[:, [8, 511]], rtol=1e-4, atol=1e-4)
        assert torch.equal(again(x).logits, want)
