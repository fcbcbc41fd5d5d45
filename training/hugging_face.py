"""Hugging Face folders, as a GPT's weights and the other way: of the types gpt2, llama, mistral, qwen2 and qwen3.

A folder has config.json, and the weights in safetensors. No code of it is run, and no pickle is read. What a
config.json asks for and model.py lacks is refused by its name there; what a GPT has and no type fits, by our key.

Our layers carry GPT-2's names. Two are others' layers joined: c_attn is q_proj, k_proj and v_proj, and SwiGLU's c_fc is
gate_proj and up_proj.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from configurator import UserError
from model import GPT, GPTConfig

TYPES = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
GPT2 = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # names on the hub that need no owner
FILES = [
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*.json",
    "special_tokens_map.json",
]
# What models of these types may say that ours can't do otherwise; the first value is that of a config without it.
FIXED: dict[str, dict[str, tuple]] = {
    "gpt2": {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    "llama": {"hidden_act": ("silu", "swish"), "pretraining_tp": (1,)},
    "mistral": {"hidden_act": ("silu", "swish")},
    "qwen2": {"hidden_act": ("silu", "swish")},
    "qwen3": {"hidden_act": ("silu", "swish"), "attention_bias": (False,)},
}
CONTEXT = {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768}  # max_position_embeddings, unless given


class Folder(NamedTuple):
    """What `read` finds."""

    architecture: dict[str, Any]  # of GPTConfig's keys
    weights: dict[str, Tensor]  # float32, under our names
    kind: str  # of TYPES


# -- a folder, found --------------------------------------------------------------------------------


def is_folder(path: str | os.PathLike) -> bool:
    return os.path.isfile(os.path.join(path, "config.json"))


def from_hub(name: str) -> Path:
    """The folder of a model on the hub, or in its cache here: OWNER/MODEL, or one of GPT2. UserError."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f"init_from={name} is a name on the hub, which needs: pip install huggingface_hub") from None
    try:
        return Path(snapshot_download(name, allow_patterns=FILES))
    except Exception as error:  # of the network, of the hub, of its cache
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"init_from={name}: the model can't be had, neither from the hub nor from its cache on this machine "
            f"({type(error).__name__}: {reason[:200]})"
        ) from None


# -- a folder, read ---------------------------------------------------------------------------------


def read_config(folder: Path) -> dict[str, Any]:
    """config.json. UserError."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{path} is damaged: it is not JSON") from None
    if not isinstance(config, dict) or config.get("model_type") not in TYPES:
        kind = config.get("model_type") if isinstance(config, dict) else None
        raise UserError(f"{folder} holds a model of type {kind!r}, and only {', '.join(TYPES)} can be read")
    return config


def read(folder: Path) -> Folder:
    """The model in a folder. UserError, by name, for what doesn't fit."""
    config = read_config(folder)
    architecture = architecture_of(config, folder)
    return Folder(
        architecture, read_weights(folder, GPTConfig(**architecture), config["model_type"]), config["model_type"]
    )


def architecture_of(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """GPTConfig's keys of the architecture, of a config.json. UserError."""
    kind = config["model_type"]

    def refuse(name: str, value: object) -> NoReturn:
        raise UserError(f"{folder}: config.json has {name}={value!r}, which models here can't be")

    def number(name: str, default: int | None = None) -> int:
        value = default if config.get(name) is None else config[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{folder}: config.json needs {name}, a number above 0, and has {value!r}")
        return value

    for name, allowed in FIXED[kind].items():
        if config.get(name, allowed[0]) not in allowed:
            refuse(name, config[name])
    if config.get("quantization_config"):
        refuse("quantization_config", config["quantization_config"].get("quant_method", "..."))
    if kind == "gpt2":
        width = number("n_embd", 768)
        inner = number("n_inner", 4 * width)
        return {
            "block_size": number("n_positions", 1024),
            "vocab_size": number("vocab_size", 50257),
            "n_layer": number("n_layer", 12),
            "n_head": number("n_head", 12),
            "n_embd": width,
            "intermediate_size": 0 if inner == 4 * width else inner,
            "bias": True,
            "norm_eps": config.get("layer_norm_epsilon", 1e-5),
            "tie_head": config.get("tie_word_embeddings", True),
        }
    width, heads, n_layer = number("hidden_size"), number("num_attention_heads"), number("num_hidden_layers")
    context = number("max_position_embeddings", CONTEXT[kind])
    head_dim = number("head_dim", 128 if kind == "qwen3" else width // heads)
    biases = [config.get(name, False) for name in ("attention_bias", "mlp_bias")] if kind == "llama" else [False, False]
    if biases[0] != biases[1]:
        refuse("attention_bias", f"{biases[0]}, mlp_bias={biases[1]}")
    return {
        "block_size": context,
        "vocab_size": number("vocab_size"),
        "n_layer": n_layer,
        "n_head": heads,
        "n_kv_head": number("num_key_value_heads", heads),
        "n_embd": width,
        "head_dim": 0 if head_dim * heads == width else head_dim,
        "mlp": "swiglu",
        "intermediate_size": number("intermediate_size"),
        "bias": bool(biases[0]),
        "qkv_bias": kind == "qwen2",
        "tie_head": config.get("tie_word_embeddings", False),
        "pos": "rope",
        "norm": "rmsnorm",
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "qk_norm": kind == "qwen3",
        **windows_of(config, n_layer, context),
        **rope_of(config, context, refuse),
    }


def windows_of(config: dict[str, Any], n_layer: int, context: int) -> dict[str, Any]:
    """attn_window and window_pattern."""
    kind = config["model_type"]
    window = config.get("sliding_window", 4096 if kind == "mistral" else None)
    used = kind == "mistral" or kind != "llama" and config.get("use_sliding_window", False)
    if not used or not window or window >= context:
        return {}
    if kind == "mistral":
        return {"attn_window": window, "window_pattern": "S" * n_layer}
    first = config.get("max_window_layers", 28)
    layers = config.get("layer_types") or ["sliding_attention" if i >= first else "" for i in range(n_layer)]
    return {"attn_window": window, "window_pattern": "".join("LS"[name == "sliding_attention"] for name in layers)}


def rope_of(config: dict[str, Any], context: int, refuse: Callable[[str, object], NoReturn]) -> dict[str, Any]:
    """ROPE_KEYS, of both forms that config.json has had."""
    rope = (config.get("rope_parameters") or {}) | (config.get("rope_scaling") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "llama3", "yarn"):
        refuse("rope_type", kind)
    if (part := rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))) != 1:
        refuse("partial_rotary_factor", part)
    keys = {"rope_type": kind, "rope_theta": float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))}
    if kind == "default":
        return keys
    original = rope.get("original_max_position_embeddings") or context
    factor = float(rope.get("factor") or context / original)
    keys |= {"rope_scaling": factor}
    if kind == "llama3":
        names = {"rope_low_freq_factor": "low_freq_factor", "rope_high_freq_factor": "high_freq_factor"}
        return keys | {"rope_original_context": original} | {ours: float(rope[name]) for ours, name in names.items()}
    if kind == "yarn":
        if rope.get("truncate", True) is not True:
            refuse("truncate", rope["truncate"])
        sharper = lambda scale: 0.1 * scale * math.log(factor) + 1
        attention = rope.get("attention_factor") or 0.0
        if not attention and rope.get("mscale") and rope.get("mscale_all_dim"):
            attention = sharper(rope["mscale"]) / sharper(rope["mscale_all_dim"])
        keys |= {"rope_original_context": original, "rope_attention_factor": float(attention)}
        keys |= {
            "rope_beta_fast": float(rope.get("beta_fast") or 32),
            "rope_beta_slow": float(rope.get("beta_slow") or 1),
        }
    return keys


def read_weights(folder: Path, config: GPTConfig, kind: str) -> dict[str, Tensor]:
    """The weights in float32, under our names. UserError: none in safetensors, damaged, missing, of other shapes, or
    more than the model has.
    """
    theirs = _tensors(folder)
    base = "transformer." if kind == "gpt2" else "model."  # which files of a bare model lack
    taken, ours = set(), {}
    for name, parts, transposed in names(config, kind):
        found = []
        for part in parts:
            place = part if part in theirs else part.removeprefix(base)
            if place not in theirs:
                raise UserError(f"{folder}: its weights lack {part}, which its config.json asks for")
            taken.add(place)
            found.append(theirs[place].float())
        ours[name] = torch.cat([part.T for part in found] if transposed else found).contiguous()
    neutral = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # tables that older files keep
    tied = {"lm_head.weight"} if config.tie_head else set()
    if more := sorted(name for name in theirs.keys() - taken - tied if not name.endswith(neutral)):
        raise UserError(f"{folder}: models here have no place for its weights {', '.join(more[:3])}")
    return ours


def _tensors(folder: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise UserError(f"{folder} is read by: pip install safetensors") from None
    index = folder / "model.safetensors.index.json"
    try:
        if index.exists():
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        else:
            files = ["model.safetensors"]
            if not (folder / files[0]).exists():
                pickles = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
                raise UserError(
                    f"{folder} has no model.safetensors"
                    + (
                        f", only {pickles[0]}, a pickle, which may hold code and is not read. If you trust it: python "
                        f"-c \"from transformers import AutoModelForCausalLM as M; M.from_pretrained('{folder}')"
                        f".save_pretrained('{folder}')\""
                        if pickles
                        else ""
                    )
                )
        tensors: dict[str, Tensor] = {}
        for name in files:
            tensors |= load_file(folder / Path(name).name)
        return tensors
    except OSError as error:
        raise UserError(f"can't read the weights in {folder}: {error.strerror or error}") from None
    except (SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"the weights in {folder} are damaged ({str(error)[:100]}): copy them again") from None


def names(config: GPTConfig, kind: str) -> Iterable[tuple[str, list[str], bool]]:
    """Our name of each weight, theirs, in the order in which they are joined, and whether theirs are transposed."""
    both = lambda layer: [".weight", ".bias"] if layer else [".weight"]
    yield "transformer.wte.weight", ["transformer.wte.weight" if kind == "gpt2" else "model.embed_tokens.weight"], False
    if kind == "gpt2":
        yield "transformer.wpe.weight", ["transformer.wpe.weight"], False
    for i in range(config.n_layer):
        ours = f"transformer.h.{i}."
        theirs = ours if kind == "gpt2" else f"model.layers.{i}."
        for layer, parts in LAYERS["gpt2" if kind == "gpt2" else "llama"].items():
            norm = layer.endswith(("ln_1", "ln_2", "_norm"))
            if layer.endswith(("q_norm", "k_norm")) and not config.qk_norm:
                continue
            biased = config.bias and (kind == "gpt2" or not norm) or layer == "attn.c_attn" and config.qkv_bias
            for part in both(biased):
                turned = kind == "gpt2" and not norm and part == ".weight"  # GPT-2's are stored transposed
                yield ours + layer + part, [theirs + name + part for name in parts], turned
    for part in both(kind == "gpt2"):
        yield f"transformer.ln_f{part}", [f"transformer.ln_f{part}" if kind == "gpt2" else f"model.norm{part}"], False
    yield (
        "lm_head.weight",
        (
            ["transformer.wte.weight" if kind == "gpt2" else "model.embed_tokens.weight"]
            if config.tie_head
            else ["lm_head.weight"]
        ),
        False,
    )


LAYERS = {
    "gpt2": {name: [name] for name in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")},
    "llama": {
        "ln_1": ["input_layernorm"],
        "attn.c_attn": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "attn.q_norm": ["self_attn.q_norm"],
        "attn.k_norm": ["self_attn.k_norm"],
        "attn.c_proj": ["self_attn.o_proj"],
        "ln_2": ["post_attention_layernorm"],
        "mlp.c_fc": ["mlp.gate_proj", "mlp.up_proj"],
        "mlp.c_proj": ["mlp.down_proj"],
    },
}


# -- a folder, written ------------------------------------------------------------------------------


def type_of(config: GPTConfig) -> str:
    """The first of TYPES that the model is. UserError that names the keys which fit none."""
    llama = {"pos": ("rope",), "norm": ("rmsnorm",), "mlp": ("swiglu",), "qk_norm_scale": (0.0,)}
    whole = {"attn_window": (0,)}
    fits: dict[str, dict[str, tuple]] = {
        "gpt2": whole
        | {"pos": ("learned",), "norm": ("layernorm",), "mlp": ("gelu",), "bias": (True,), "qk_norm": (False,)}
        | {"n_kv_head": (0, config.n_head), "head_dim": (0, config.n_embd // config.n_head)},
        "llama": llama | whole | {"qk_norm": (False,), "qkv_bias": (False, config.bias)},
        "mistral": llama | {"bias": (False,), "qkv_bias": (False,), "qk_norm": (False,)},
        "qwen2": llama | {"bias": (False,), "qkv_bias": (True,), "qk_norm": (False,)},
        "qwen3": llama | {"bias": (False,), "qkv_bias": (False,), "qk_norm": (True,)},
    }
    wrong: dict[str, list[str]] = {}
    for kind, wanted in fits.items():
        wrong[kind] = [
            f"{name}={getattr(config, name)}" for name, ok in wanted.items() if getattr(config, name) not in ok
        ]
        if kind == "mistral" and not (config.attn_window and all(config.layer_windows)):
            wrong[kind].append(f"window_pattern={config.window_pattern}")
        if not wrong[kind]:
            return kind
    nearest = min(wrong, key=lambda kind: len(wrong[kind]))
    raise UserError(
        f"the model is of none of the types {', '.join(TYPES)}: what keeps it from the nearest, {nearest}, is "
        f"{', '.join(wrong[nearest])}"
    )


def config_of(config: GPTConfig, kind: str) -> dict[str, Any]:
    """config.json of a model of that type, in the form that transformers 4 and 5 read."""
    classes = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
    classes |= {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
    out: dict[str, Any] = {"architectures": [classes[kind]], "model_type": kind, "dtype": "float32"}
    out |= {"vocab_size": config.vocab_size, "tie_word_embeddings": config.tie_head, "use_cache": True}
    inner = config.intermediate_size or 4 * config.n_embd
    if kind == "gpt2":
        return out | {
            "n_positions": config.block_size,
            "n_embd": config.n_embd,
            "n_layer": config.n_layer,
            "n_head": config.n_head,
            "n_inner": inner,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": config.norm_eps,
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
        }
    out |= {
        "hidden_size": config.n_embd,
        "intermediate_size": inner,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head or config.n_head,
        "head_dim": config.D,
        "hidden_act": "silu",
        "max_position_embeddings": config.block_size,
        "rms_norm_eps": config.norm_eps,
        "attention_dropout": 0.0,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
    }
    if config.rope_type != "default":
        rope: dict[str, Any] = {"rope_type": config.rope_type, "factor": config.rope_scaling}
        if config.rope_type != "linear":
            rope["original_max_position_embeddings"] = config.rope_original_context
        if config.rope_type == "llama3":
            rope |= {"low_freq_factor": config.rope_low_freq_factor, "high_freq_factor": config.rope_high_freq_factor}
        if config.rope_type == "yarn":
            rope |= {"beta_fast": config.rope_beta_fast, "beta_slow": config.rope_beta_slow}
            rope |= {"attention_factor": config.rope_attention_factor} if config.rope_attention_factor else {}
        out["rope_scaling"] = rope
    if kind == "llama":
        out |= {"attention_bias": config.bias, "mlp_bias": config.bias}
    elif kind == "mistral":
        out |= {"sliding_window": config.attn_window}
    else:
        types = ["sliding_attention" if window else "full_attention" for window in config.layer_windows]
        out |= {"use_sliding_window": config.attn_window > 0, "sliding_window": config.attn_window or None}
        out |= {"layer_types": types, "max_window_layers": config.n_layer}
        out |= {"attention_bias": False} if kind == "qwen3" else {}
    return out


def tensors_of(config: GPTConfig, kind: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our weights under their names."""
    q, kv = config.n_head * config.D, (config.n_kv_head or config.n_head) * config.D
    inner = config.intermediate_size or 4 * config.n_embd
    out: dict[str, Tensor] = {}
    for name, parts, transposed in names(config, kind):
        if name == "lm_head.weight" and config.tie_head:
            continue
        sizes = [q, kv, kv] if len(parts) == 3 else [inner, inner] if len(parts) == 2 else [len(weights[name])]
        for part, weight in zip(parts, weights[name].split(sizes)):
            out[part] = (weight.T if transposed else weight).contiguous().clone()
    return out


def write(folder: Path, model: GPT, kind: str, end: dict[str, int]) -> None:
    """config.json, generation_config.json and model.safetensors. end: eos_token_id, where there is one."""
    from safetensors.torch import save_file

    config = config_of(model.config, kind) | {"bos_token_id": None, "eos_token_id": None} | end
    for name, content in {"config.json": config, "generation_config.json": end}.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    tensors = tensors_of(model.config, kind, model.state_dict())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # the library makes it its owner's alone
