"""The tokenizer of a Hugging Face folder: the one that a folder has, and the files that give transformers one of ours.

GPT-2's is one tokenizer in two forms: tiktoken's, in which our corpora are made, and tokenizer.json. A folder that has
the second is one of "gpt2".
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from data.tokenizer import BYTE_OF, BytePairTokenizer, FolderTokenizer, Tokenizer, read_tokenizer

GPT2_VOCABULARY = "140f02bb05c0d82c3e45f14050c6be40a9b6fe2773b7dfce0fbb815918c30199"  # sha256, see _digest
CHARACTER = {byte: character for character, byte in BYTE_OF.items()}


def tokenizer_of(folder: Path) -> dict[str, Any] | None:
    """What tokenizer_from_meta takes, of the tokenizer in a folder; None if it has no tokenizer.json. UserError."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    meta = read_tokenizer(path).to_meta()
    if _digest(json.loads(meta["json"])["model"].get("vocab")) == GPT2_VOCABULARY:
        return {"name": "gpt2"}
    return meta


def _digest(vocabulary: object) -> str:
    entries = sorted(vocabulary.items(), key=lambda entry: entry[1]) if isinstance(vocabulary, dict) else []
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def write_tokenizer(folder: Path, tokenizer: Tokenizer | None, context: int) -> str:
    """tokenizer.json and tokenizer_config.json of the same tokenizer, if there is one. A line about it."""
    if isinstance(tokenizer, FolderTokenizer):
        meta = tokenizer.to_meta()
        text, end = meta["json"], meta["eot"]
    elif isinstance(tokenizer, BytePairTokenizer) and tokenizer.name in ("byte", "gpt2"):
        text, end = _byte_level(tokenizer), "<|endoftext|>"
    else:
        of = "its checkpoint doesn't say which" if tokenizer is None else f"of the {tokenizer.name} tokenizer"
        return f"without a tokenizer: {of}; transformers has none that is the same"
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "model_max_length": context}
    config |= {"clean_up_tokenization_spaces": False}
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return f"with the {tokenizer.name} tokenizer"


def _byte_level(tokenizer: BytePairTokenizer) -> str:
    """tokenizer.json of the bytes, or of GPT-2's encoding."""
    ranks = tokenizer.ranks
    written = lambda token: "".join(CHARACTER[byte] for byte in token)
    merges = [list(map(written, _parts(token, ranks))) for token in ranks if len(token) > 1]
    vocabulary = {written(token): rank for token, rank in ranks.items()} | {"<|endoftext|>": tokenizer.eot}
    by_words = tokenizer.name == "gpt2"  # its regular expression is the library's own
    level: dict[str, Any] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": by_words,
    }
    end: dict[str, Any] = {"id": tokenizer.eot, "content": "<|endoftext|>", "special": True}
    end |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    model: dict[str, Any] = {"type": "BPE", "vocab": vocabulary, "merges": merges, "dropout": None, "unk_token": None}
    model |= {"continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False}
    model |= {"byte_fallback": False, "ignore_merges": False}
    spec: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end],
        "normalizer": None,
    }
    spec |= {"pre_tokenizer": level, "post_processor": None, "decoder": level, "model": model}
    return json.dumps(spec, ensure_ascii=False)


def _parts(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two tokens that a token is merged from: its bytes, merged by all lower ranks."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks)))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts
