"""What a run begins from: scratch, its own checkpoint, another's weights, or these and adapters; and its text.

Everything that can be wrong is looked at here, before any work is done. cfg takes the keys of the model that exists;
what the user gave and what conflicts with it is a UserError.
"""

import dataclasses
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from configurator import TrainConfig, UserError, of_today, validate
from data.loader import Corpus, load_corpus
from data.tokenizer import GPT2_EOT
from model import ARCHITECTURE_KEYS, GPT, TRAINING_KEYS, GPTConfig
from training import checkpoint, hugging_face, report
from training.device import Device, resolve_device
from training.lora import add_adapters, fingerprint
from training.parallel import Processes
from training.record import relative
from training.retention import START
from training.state import size_to_save
from training.weights import CONTEXT_KEYS, adapted_model, at, load_named, model_from_checkpoint

DATA = Path(__file__).resolve().parents[1] / "data"


@dataclass(frozen=True)
class Beginning:
    """What a run has before its first step."""

    device: Device
    attention: str  # of report.describe_attention
    corpus: Corpus
    model: GPT
    lora: dict | None  # what a checkpoint keeps of the adapters and their base
    saved: dict | None  # the checkpoint to go on from


def begin(cfg: TrainConfig, processes: Processes, held: ExitStack) -> Beginning | None:
    """What cfg asks for, among the processes, which then have met; None if the run is finished. held: gets its folder.

    Everything that can be wrong is looked at before any work is done; of several processes the master looks first, and
    the others wait for it.
    """
    out_dir, master = Path(cfg.out_dir), processes.master
    writes, is_there = master and not cfg.eval_only, os.path.isdir(out_dir)
    if writes and is_there:  # before its checkpoint is read
        held.enter_context(checkpoint.own(out_dir))
    origin = find_origin(cfg, master)
    validate(cfg)
    if cfg.gradient_accumulation_steps % processes.world:
        raise UserError(
            f"gradient_accumulation_steps={cfg.gradient_accumulation_steps} must be a multiple of the "
            f"{processes.world} processes"
        )
    device = resolve_device(cfg.device, cfg.dtype, processes.local_rank)
    attention = report.describe_attention(cfg, device)
    if origin.is_finished(cfg):
        if master and origin.saved:
            print(
                f"{cfg.out_dir} is finished: its checkpoint is at iteration {origin.saved['iter_num']} of "
                f"{cfg.max_iters}. Raise --max_iters to train on."
            )
        return None
    if not cfg.eval_only:
        check_writable(out_dir)

    torch.manual_seed(cfg.seed)
    model, lora = origin.model(cfg)
    if not master:
        processes.join(cfg, device)
    corpus = open_corpus(cfg, origin, model, master)
    model = model or new_model(cfg, corpus.vocab_size)
    if writes:
        if not is_there:
            held.enter_context(checkpoint.own(out_dir))
        checkpoint.check_room(out_dir, size_to_save(model, lora), cfg.keep_checkpoints, bool(origin.saved))
    if master:
        processes.join(cfg, device)
    return Beginning(device, attention, corpus, model, lora, origin.saved)


# -- its weights -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Origin:
    """What a run begins from. All None: its weights are drawn."""

    saved: dict | None = None  # out_dir's checkpoint, to go on from
    base: dict | None = None  # of weights that are to be fine-tuned, see load_base
    base_path: Path = Path()  # a checkpoint, or a Hugging Face folder

    def is_finished(self, cfg: TrainConfig) -> bool:
        """Whether there is nothing left to train."""
        if self.saved is None or cfg.eval_only or self.saved.get("evaluation_owed"):
            return False
        return self.saved["iter_num"] >= cfg.max_iters

    def model(self, cfg: TrainConfig) -> tuple[GPT | None, dict | None]:
        """The model, None from scratch; and `lora`, what a checkpoint keeps of the adapters and their base."""
        if self.saved is not None:
            return resumed_model(cfg, self.saved)
        if self.base is not None:
            made = fine_tuned_model(cfg, self.base, self.base_path)
            self.base.pop("model")  # it has been copied
            return made
        return None, None


def find_origin(cfg: TrainConfig, master: bool) -> Origin:
    """What cfg.init_from means. cfg takes that model's keys. UserError."""
    if cfg.init_from == "resume":
        saved = checkpoint.load(Path(cfg.out_dir) / "ckpt.pt")
        adopt(cfg, saved, master)
        return Origin(saved=saved)
    if cfg.init_from == "scratch":
        return Origin()
    check_base(cfg, master)
    base, base_path = load_named(cfg.init_from)
    adopt_base(cfg, architecture_of(base), cfg.init_from)
    return Origin(base=base, base_path=base_path)


# -- the keys of a model that exists ------------------------------------------------------------------


def check_base(cfg: TrainConfig, master: bool) -> None:
    """UserError where init_from is the run's own folder."""
    path = at(cfg.init_from)
    if path is None:  # on the hub, or nowhere
        return
    if path.is_file() and hugging_face.is_folder(path.parent) and master:
        print(f"{path.parent} has a checkpoint of train.py and a Hugging Face model: takes {path.name}")
    folder = path if path.is_dir() else path.parent
    if folder.resolve() == Path(cfg.out_dir).resolve() and not cfg.eval_only:
        raise UserError(
            f"out_dir={cfg.out_dir} is the folder of init_from, whose run would be replaced: choose another "
            "out_dir, or --init_from=resume to go on with that run"
        )


def adopt(cfg: TrainConfig, saved: dict, master: bool) -> None:
    """Fill cfg from a checkpoint: its architecture, and of the other keys those that neither a file nor the command
    line gives. What differs from the earlier run is printed.
    """
    saved["config"] = {"doc_mask": False} | saved["config"]  # earlier versions had no such key
    take_architecture(cfg, architecture_of(saved), "the checkpoint")
    lora = saved.get("lora") or {"rank": 0}
    adapters = {f"lora_{name}": lora[name] for name in ("rank", "alpha", "targets") if name in lora}
    for name, value in adapters.items():
        if name in cfg.explicit and getattr(cfg, name) != value:
            raise UserError(
                f"{name}={getattr(cfg, name)} conflicts with the checkpoint, which has {value}: leave {name} out, or "
                "begin a fine-tuning by --init_from=PATH and another out_dir"
            )
        setattr(cfg, name, value)
    fields = {field.name: field for field in dataclasses.fields(cfg)}
    not_adopted = {"out_dir", "init_from", "eval_only", "lora_base", *ARCHITECTURE_KEYS, *adapters}
    for name, value in saved["config"].items():
        if name not in fields or name in not_adopted:
            continue
        value = of_today(fields[name], value)
        if name not in cfg.explicit:
            setattr(cfg, name, value)
        elif getattr(cfg, name) != value and master:
            print(f"resume: {name} was {value!r}, is now {getattr(cfg, name)!r}")


def adopt_base(cfg: TrainConfig, architecture: dict, owner: str) -> None:
    """Set cfg's keys of the architecture to those of a model that is to be fine-tuned. A given context stays."""
    there_are = architecture["block_size"]
    if "block_size" in cfg.explicit and architecture["pos"] == "learned" and cfg.block_size > there_are:
        raise UserError(
            f"block_size={cfg.block_size} is above the {there_are} of {owner}, which has learned "
            "positions, and so none beyond: only models trained with pos=rope can go further"
        )
    free = cfg.explicit & set(CONTEXT_KEYS)
    if "rope_type" in free and "rope_original_context" not in free and architecture["rope_type"] == "default":
        architecture = architecture | {"rope_original_context": there_are}
    take_architecture(cfg, {k: v for k, v in architecture.items() if k not in free}, owner)


def take_architecture(cfg: TrainConfig, architecture: dict, owner: str) -> None:
    """Set cfg's keys of the architecture to those of a model that exists; UserError if cfg was given others."""
    n_head = architecture["n_head"]
    for name, value in architecture.items():
        given = getattr(cfg, name, None)  # vocab_size is no key
        same = given == value or (name == "n_kv_head" and (given or n_head) == (value or n_head))
        if name in cfg.explicit and not same:
            free = name in CONTEXT_KEYS and architecture["pos"] == "rope"
            other = "begin another run, by --init_from=PATH and another out_dir" if free else "train from scratch"
            raise UserError(
                f"{name}={given} conflicts with {owner}, whose model has {value}: leave {name} out (of the config "
                f"file, too), or {other}"
            )
        if hasattr(cfg, name):
            setattr(cfg, name, value)


def architecture_of(saved: dict) -> dict:
    """A checkpoint's keys of the architecture, all of them."""
    defaults = dataclasses.asdict(GPTConfig())  # checkpoints of nanoGPT and of earlier versions lack some keys
    return {k: saved["model_args"].get(k, defaults[k]) for k in ARCHITECTURE_KEYS}


# -- models -------------------------------------------------------------------------------------------


def training_keys(cfg: TrainConfig) -> dict:
    """GPTConfig's keys of training. Where sus_c is auto, its Retention sets it in the model's config."""
    keys = {name: getattr(cfg, name) for name in TRAINING_KEYS}
    return keys | ({"sus_c": START} if cfg.sus_c == "auto" else {})


def new_model(cfg: TrainConfig, vocab_size: int) -> GPT:
    architecture = {k: getattr(cfg, k) for k in ARCHITECTURE_KEYS if k != "vocab_size"}
    return GPT(GPTConfig(vocab_size=vocab_size, **architecture, **training_keys(cfg)))


def resumed_model(cfg: TrainConfig, saved: dict) -> tuple[GPT, dict | None]:
    """The model of out_dir's checkpoint, and the checkpoint's `lora` (None: it has no adapters)."""
    path = Path(cfg.out_dir, "ckpt.pt")
    lora = saved.get("lora")
    if not lora:
        return model_from_checkpoint(saved, path, **training_keys(cfg)), None
    model = adapted_model(saved, path, cfg.lora_base, cfg.lora_dropout, **training_keys(cfg))
    return model, lora | ({"base": base_from(cfg.out_dir, cfg.lora_base)} if cfg.lora_base else {})


def fine_tuned_model(cfg: TrainConfig, base: dict, base_path: Path) -> tuple[GPT, dict | None]:
    """A model that begins as the one in `base`, see load_base, and what a checkpoint keeps as `lora`."""
    model = model_from_checkpoint(base, base_path, **training_keys(cfg))
    lora = None
    if cfg.lora_rank:  # the fingerprint is of the base as it is, before its context is changed
        lora = {
            "rank": cfg.lora_rank,
            "alpha": cfg.lora_alpha,
            "targets": cfg.lora_targets,
            "base": base_from(cfg.out_dir, cfg.init_from),
            "fingerprint": fingerprint(model),
        }
    model.set_context(**{name: getattr(cfg, name) for name in CONTEXT_KEYS})
    if lora:
        add_adapters(model, cfg.lora_rank, cfg.lora_alpha, cfg.lora_targets, cfg.lora_dropout)
    return model, lora


def base_from(out_dir: str, base: str) -> str:
    """The base of adapters, as their checkpoint keeps it: by its path from out_dir, or its name on the hub."""
    there = at(base)
    if there is None:
        return base
    return relative(there.resolve(), Path(out_dir).resolve())


def check_writable(out_dir: Path) -> None:
    """UserError if out_dir can't be written to, or can't be made; it isn't made yet."""
    try:
        os.lstat(out_dir)
    except FileNotFoundError:
        pass
    except OSError as error:  # a name that is too long, say
        raise UserError(f"out_dir={out_dir} can't be used: {error.strerror}") from None
    there = next(folder for folder in (out_dir, *out_dir.absolute().parents) if os.path.lexists(folder))
    if not there.is_dir():
        raise UserError(f"out_dir={out_dir} can't be used: {there} is not a folder")
    if not os.access(there, os.W_OK):
        raise UserError(f"out_dir={out_dir} can't be used: no permission to write in {there}")


# -- the text -----------------------------------------------------------------------------------------


def open_corpus(cfg: TrainConfig, origin: Origin, model: GPT | None, master: bool) -> Corpus:
    """The corpus cfg.dataset. The master makes it if it is the default one, looks at its checksums for all processes,
    and so comes first. UserError if it doesn't fit the model's tokens.
    """
    if master:
        prepare_stdlib(cfg)
    corpus = load_corpus(DATA / cfg.dataset, cfg.block_size, cfg.windows, cfg.doc_mask)
    saved = origin.saved or origin.base or {}
    tokenizer = saved.get("tokenizer")
    if tokenizer is not None and tokenizer != corpus.tokenizer_meta:
        made = tokenizer["name"]
        if "json" in tokenizer:
            of_folder = origin.base is not None and origin.base_path.is_dir()
            made = cfg.init_from if of_folder else "FOLDER, that of the tokenizer.json"
        raise UserError(
            f"dataset={cfg.dataset} is in tokens of the {corpus.tokenizer_meta['name']} tokenizer, but the "
            f"model's are {tokenizer['name']}'s: choose a data set made with --tokenizer={made}"
        )
    if model is not None and tokenizer is None:
        of = corpus.tokenizer_meta  # n_vocab: without the rows that pad an embedding
        ids = of.get("n_vocab") or (GPT2_EOT + 1 if of["name"] == "gpt2" else corpus.vocab_size)
        if ids > model.config.vocab_size:
            raise UserError(f"dataset={cfg.dataset} has {ids} token ids, the model {model.config.vocab_size}")
    if master and tokenizer is None and origin.base_path.is_dir() and origin.base is not None:
        print(f"{cfg.init_from} has no tokenizer: takes {corpus.folder}, whose ids fit")
    checksum = (origin.saved or {}).get("train_sha256")
    if master and not cfg.eval_only and checksum not in (None, corpus.text_checksums["train_sha256"]):
        print(f"resume: the training text in {corpus.folder} is not the one that the run began with")
    return corpus


def prepare_stdlib(cfg: TrainConfig) -> None:
    """Make the default corpus if it is wanted and not there."""
    if cfg.dataset == "stdlib" and not (DATA / "stdlib" / "meta.json").exists():
        from data.stdlib.prepare import prepare

        print("preparing data/stdlib, the sources of Python's standard library (once)")
        prepare()
