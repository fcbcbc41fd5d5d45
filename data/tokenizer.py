"""Tokenizers: text to token ids and back.

    byte              the 256 bytes of UTF-8 and <|endoftext|>: encodes any text, needs no files, 1 token a byte
    gpt2, o200k_base, ... (ENCODINGS)    the byte-pair encodings of tiktoken: any text, about 4 bytes a token; their
                      files are downloaded once
    char              the distinct characters of one corpus, as in nanoGPT's character-level Shakespeare
    a path            that of a Hugging Face folder: its tokenizer.json, read by the library tokenizers. Ids are those
                      that transformers gives. None of the folder's code is run.

byte and ENCODINGS are tiktoken.Encoding objects. A tokenizer goes into meta.json and into checkpoints as the plain dict
of to_meta(), and comes back through tokenizer_from_meta(): no pickle, and a checkpoint works without its corpus, or the
folder that its tokenizer came from.

Dims: N, the tokens of a text.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from configurator import UserError

if TYPE_CHECKING:  # these are imported where they are needed: tiktoken's import takes a while, tokenizers is optional
    import tiktoken
    import tokenizers

Ids = npt.NDArray[np.int64]

ENCODINGS = "gpt2", "r50k_base", "p50k_base", "p50k_edit", "cl100k_base", "o200k_base", "o200k_harmony"
TOKENIZERS = "byte", *ENCODINGS  # those for any text
TOKENIZER_HELP = (
    f"byte: 1 byte a token, no files; {', '.join(ENCODINGS)}: tiktoken's, about 4 bytes; or a Hugging Face folder that "
    "has tokenizer.json"
)
PADDING = 128  # the embedding of an encoding has a multiple of so many rows: faster on GPUs
GPT2_VOCAB_SIZE = 50304  # 50257, padded
GPT2_EOT = 50256
# A run of a million white-space characters overflows the stack of tiktoken's regular expressions. LONG_RUN leaves room.
LONG_RUN = 500_000
BLANK = r"\t\v\f \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # its \s, but for \n and \r
EDGE = 1000  # characters on both sides of a cut that tell whether it changes a token
MOST_JOINED = 1 << 24  # characters of a document that are encoded at once at most, where cuts would change tokens
# Where a folder says what ends a text: files, and their entries. The first that has one counts.
END_OF_TEXT = (
    ("tokenizer_config.json", "eos_token"),
    ("special_tokens_map.json", "eos_token"),
    ("generation_config.json", "eos_token_id"),
    ("config.json", "eos_token_id"),
)
# The character by which byte-level tokenizers write each byte: itself where it can be seen, else one from U+0100 on.
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
HIDDEN = sorted(set(range(256)) - set(VISIBLE))
BYTE_OF = {chr(byte): byte for byte in VISIBLE} | {chr(256 + i): byte for i, byte in enumerate(HIDDEN)}


class Tokenizer:
    """Text to token ids and back."""

    name: str  # one of TOKENIZERS, or char, or that of a tokenizer.json, which its content makes
    n_vocab: int  # number of ids: every id is below it
    vocab_size: int  # rows of the model's embedding: n_vocab, but for byte and char padded (gpt2: 50304)
    eot: int | None  # id of <|endoftext|>, which stands after every document; None for char

    def encode(self, text: str) -> Ids:
        """(N,) int64 ids of text. Never eot: a literal '<|endoftext|>' in text is text. UserError: can't be encoded."""
        raise NotImplementedError

    def pieces(self, texts: Iterable[str]) -> Iterator[str]:
        """A document as parts whose ids, one after the other, are the document's.
        texts: the document, cut where most tokenizers begin a token (data.reading.pieces).
        """
        return iter(texts)

    def decode_bytes(self, ids: npt.ArrayLike) -> bytes:
        """UTF-8 bytes of ids: (N,) ints, or one int. They can begin or end inside a character: to stream, feed them to
        codecs.getincrementaldecoder("utf-8")(errors="replace"). UserError: an id outside the vocabulary.
        """
        return self._decode_bytes(self._checked(ids))

    def _checked(self, ids: npt.ArrayLike) -> Ids:
        found = np.asarray(ids, dtype=np.int64).reshape(-1)
        if found.size and not 0 <= found.min() <= found.max() < self.n_vocab:
            raise UserError(
                f"token ids from {found.min()} to {found.max()}, but the {self.name} tokenizer has 0 to "
                f"{self.n_vocab - 1}: do the model and the tokenizer belong together?"
            )
        return found

    def _decode_bytes(self, ids: Ids) -> bytes:
        raise NotImplementedError

    def decode(self, ids: npt.ArrayLike) -> str:
        """The text of ids, (N,) ints or one int; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def to_meta(self) -> dict[str, Any]:
        """What tokenizer_from_meta needs, as a dict of strings and ints. Equal dicts are the same tokenizer."""
        return {"name": self.name}


class BytePairTokenizer(Tokenizer):
    """byte and ENCODINGS: a tiktoken.Encoding."""

    def __init__(self, encoding: "tiktoken.Encoding", vocab_size: int):
        self.name, self.n_vocab, self.eot = encoding.name, encoding.n_vocab, encoding.eot_token
        self.vocab_size = vocab_size
        self._encoding = encoding

    @property
    def ranks(self) -> dict[bytes, int]:
        """The id of each token but eot, in the order in which they are merged."""
        if self.name == "byte":
            return {bytes([byte]): byte for byte in range(256)}
        ids = (id for id in range(self.n_vocab) if id != self.eot)
        return {self._encoding.decode_single_token_bytes(id): id for id in ids}

    def encode(self, text: str) -> Ids:
        try:
            if self.name == "byte":  # hundreds of times faster than a search for merges, of which there are none
                return np.frombuffer(text.encode(), np.uint8).astype(np.int64)
            return self._ordinary(text)
        except UnicodeEncodeError as error:
            raise _no_utf8(error) from None
        except ValueError:  # the regular expression's stack
            return self._without_long_runs(text)

    def _ordinary(self, text: str) -> Ids:
        return self._encoding.encode_to_numpy(text, disallowed_special=()).astype(np.int64)

    def _without_long_runs(self, text: str) -> Ids:
        r"""What `_ordinary` would give if it had stack enough: long runs of white space are cut out and merged here.

        The rule that needs the stack, \s+(?!\S), takes white space but for its last character, which may belong to the
        word behind; at the text's end it takes all. Earlier rules of some encodings leave it less: \s*[\r\n] takes what
        ends in a line end, \s++$ what ends the text. So both ends of what is cut out are where tokens begin.
        """
        rules = self._encoding._pat_str
        by_line, at_end = r"\s*[\r\n]" in rules, r"\s++$" in rules
        space = BLANK + ("" if by_line else r"\r\n")
        behind = r"(?![\r\n])" * by_line + r"(?!\Z)" * at_end
        found, at = [], 0
        try:
            for run in re.finditer(rf"(?<![{space}])[{space}]{{{LONG_RUN},}}+{behind}", text):
                stop = run.end() - (run.end() < len(text))
                ids = self._encoding._encode_single_piece(text[run.start() : stop])
                found += [self._ordinary(text[at : run.start()]), np.array(ids, np.int64)]
                at = stop
            return np.concatenate([*found, self._ordinary(text[at:])])
        except ValueError as error:
            raise UserError(f"the {self.name} tokenizer can't encode the text ({str(error)[:200]})") from None

    def _decode_bytes(self, ids: Ids) -> bytes:
        return self._encoding.decode_bytes(ids.tolist())


class CharTokenizer(Tokenizer):
    """char: the id of a character is its place in chars, a string of distinct characters in sorted order."""

    name, eot = "char", None

    def __init__(self, chars: str):
        if not chars or list(chars) != sorted(set(chars)):
            raise UserError("a char tokenizer's vocabulary must be distinct characters in sorted order")
        self.chars = chars
        self.n_vocab = self.vocab_size = len(chars)
        self._points = _code_points(chars)

    def encode(self, text: str) -> Ids:
        points = _code_points(text)
        ids = np.searchsorted(self._points, points).clip(max=self.n_vocab - 1).astype(np.int64, copy=False)
        if (unknown := points[self._points[ids] != points]).size:
            raise UserError(
                f"the character {chr(unknown[0])!r} is not among the {self.n_vocab} of the char tokenizer: "
                f"leave it out, or train with a byte or gpt2 tokenizer. It knows {self.chars[:200]!r}"
            )
        return ids

    def _decode_bytes(self, ids: Ids) -> bytes:
        return "".join(self.chars[i] for i in ids).encode()

    def to_meta(self) -> dict[str, Any]:
        return {"name": "char", "chars": self.chars}


class FolderTokenizer(Tokenizer):
    """A tokenizer.json. Its ids are those of transformers, without the special tokens that this puts around a text.

    text    the file's
    eot     the token that ends a text, or its id
    UserError: the library is missing, text is no tokenizer.json, or it has no such token
    """

    def __init__(self, text: str, eot: str | int):
        library = _library()
        try:
            spec = json.loads(text) | {"truncation": None, "padding": None}  # for batches of a model, and not for us
            model = spec["model"]
            if "dropout" in model:  # a text has one encoding
                model["dropout"] = None
            self._json = json.dumps(spec, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
            self._tokenizer: tokenizers.Tokenizer = library.Tokenizer.from_str(self._json)
            ids = self._tokenizer.get_vocab(with_added_tokens=True)
        except Exception as error:  # the library raises that
            raise UserError(f"no tokenizer.json, or a damaged one ({str(error)[:200]}): copy it again") from None
        token = next((token for token, id in ids.items() if eot in (token, id)), None)
        if token is None:
            raise UserError(f"the token {eot!r}, which is said to end a text, is not among the {len(ids):,} tokens")
        self.n_vocab = max(ids.values()) + 1
        self.vocab_size = _padded(self.n_vocab)
        self.eot_token, self.eot = token, ids[token]
        checksum = hashlib.sha256(f"{self.eot} {self._json}".encode()).hexdigest()
        self.name = f"{model.get('type', 'hf').lower()}-{self.n_vocab}-{checksum[:8]}"
        self._tokenizer.add_special_tokens([token])  # where the file has it as a plain one
        self._tokenizer.encode_special_tokens = True  # as text
        self._unknown = ids.get(model.get("unk_token"), model.get("unk_id"))
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = [id for id, token in added.items() if token.special and id != self._unknown]
        decoder = spec.get("decoder") or {}
        self._decoders = {part["type"] for part in decoder.get("decoders", [decoder]) if part}

    def encode(self, text: str) -> Ids:
        try:
            text.encode()
            (found,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)  # thrice as fast as encode
        except UnicodeEncodeError as error:
            raise _no_utf8(error) from None
        except Exception as error:  # the library's: a character has no token, and there is none for what is unknown
            raise UserError(f"the {self.name} tokenizer can't encode the text ({str(error)[:200]})") from None
        ids = np.array(found.ids, np.int64)
        if self._unknown == self.eot and (ids == self.eot).any():
            raise UserError(
                f"the {self.name} tokenizer has no token for some character of the text, and gives {self.eot_token}, "
                "which ends texts: choose another tokenizer"
            )
        # encode_special_tokens keeps the library from cutting a text there. Models of whole words may know them still.
        if (special := np.isin(ids, self._special)).any():
            ids = np.concatenate([self._spelled(id) if there else [id] for id, there in zip(ids, special)])
        return ids

    def _spelled(self, id: int) -> Ids:
        """The ids of a special token's characters."""
        model = self._tokenizer.model
        return np.array([part.id for character in self._token(id) for part in model.tokenize(character)], np.int64)

    def pieces(self, texts: Iterable[str]) -> Iterator[str]:
        """A document as parts whose ids, one after the other, are the document's.
        Some tokenizers put a space before each text, or merge across line ends. Where a cut changes a token nearby,
        what it parts is joined again; only beyond MOST_JOINED characters it stays, and may change a token or two.
        """
        held = ""
        for text in texts:
            if held and (len(held) + len(text) > MOST_JOINED or self._may_cut(held[-EDGE:], text[:EDGE])):
                yield held
                held = ""
            held += text
        if held:
            yield held

    def _may_cut(self, before: str, behind: str) -> bool:
        try:
            whole, *parts = map(self.encode, (before + behind, before, behind))
        except UserError:  # the same comes where the piece is encoded, and there the document has a name
            return True
        return np.array_equal(whole, np.concatenate(parts))

    def decode(self, ids: npt.ArrayLike) -> str:
        return self._tokenizer.decode(self._checked(ids).tolist(), skip_special_tokens=False)

    def _decode_bytes(self, ids: Ids) -> bytes:
        """As they stand behind others: some tokenizers' decode leaves out a space at the text's beginning."""
        return b"".join(map(self._bytes, ids.tolist()))

    def _bytes(self, id: int) -> bytes:
        token = self._token(id)
        if "ByteLevel" in self._decoders:
            return bytes(map(BYTE_OF.__getitem__, token)) if BYTE_OF.keys() >= set(token) else token.encode()
        if "ByteFallback" in self._decoders and re.fullmatch("<0x[0-9A-F]{2}>", token):
            return bytes.fromhex(token[3:5])
        alone, behind = (self._tokenizer.decode([id] * times, skip_special_tokens=False) for times in (1, 2))
        return behind.removeprefix(alone).encode()

    def _token(self, id: int) -> str:
        return self._tokenizer.id_to_token(id) or ""  # some vocabularies have gaps

    def to_meta(self) -> dict[str, Any]:
        return {"name": self.name, "json": self._json, "eot": self.eot_token, "n_vocab": self.n_vocab}


def _library() -> Any:
    """The package tokenizers. Its threads are off: corpora are encoded in ours. UserError: it isn't installed."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import tokenizers
    except ImportError:
        raise UserError("a tokenizer.json needs one package more: pip install tokenizers") from None
    return tokenizers


def _no_utf8(error: UnicodeEncodeError) -> UserError:
    return UserError(f"the text has no UTF-8 form: {error.reason} at character {error.start}")


def _padded(n_vocab: int) -> int:
    return -(-n_vocab // PADDING) * PADDING


def _code_points(text: str) -> npt.NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def tokenizer_from_meta(meta: object) -> Tokenizer:
    """The Tokenizer of {"name": "byte"}, {"name": one of ENCODINGS}, {"name": "char", "chars": "..."} or
    {"name": any other, "json": tokenizer.json's text, "eot": the token that ends a text}; UserError.
    """
    match meta:
        case {"name": "byte"}:
            import tiktoken

            # One character a piece: no search for merges (there are none) in a long run without spaces.
            encoding = tiktoken.Encoding(
                "byte",
                pat_str=r"[\s\S]",
                special_tokens={"<|endoftext|>": 256},
                mergeable_ranks={bytes([byte]): byte for byte in range(256)},
            )
            return BytePairTokenizer(encoding, vocab_size=257)
        case {"name": str(name)} if name in ENCODINGS:
            encoding = _encoding(name)
            return BytePairTokenizer(encoding, vocab_size=_padded(encoding.n_vocab))
        case {"name": "char", "chars": str(chars)}:
            return CharTokenizer(chars)
        case {"name": str(), "json": str(text), "eot": str(eot)}:
            return FolderTokenizer(text, eot)
    raise UserError(
        f"unknown tokenizer {str(meta)[:200]!r}: expected the name {', '.join(TOKENIZERS)}, char with its chars, or "
        "any other with the json and the eot of a tokenizer.json"
    )


def load_tokenizer(name: str) -> Tokenizer:
    """The Tokenizer of a key --tokenizer: one of TOKENIZERS, or the path of a Hugging Face folder, or that of its
    tokenizer.json. UserError.
    """
    path = tokenizer_file(name)
    if path is None:
        return tokenizer_from_meta({"name": name})
    tokenizer = read_tokenizer(path)
    print(f"{path} is the tokenizer {tokenizer.name}; {tokenizer.eot_token} ends a text")
    return tokenizer


def read_tokenizer(path: Path) -> FolderTokenizer:
    """The Tokenizer of a tokenizer.json and the files beside it. UserError."""
    try:
        return FolderTokenizer(path.read_text(encoding="utf-8"), _end_of_text(path.parent))
    except OSError as error:
        raise UserError(f"can't read {error.filename}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text: copy it again") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def tokenizer_file(name: str) -> Path | None:
    """The tokenizer.json of a key --tokenizer, or None for one of TOKENIZERS. UserError: neither."""
    if name in TOKENIZERS:
        return None
    path = Path(os.path.expanduser(name))
    file = path / "tokenizer.json" if os.path.isdir(path) else path
    if os.path.isfile(file):
        return file
    what = f"the folder has no {file.name}" if os.path.isdir(path) else "no such tokenizer, and no such folder"
    raise UserError(f"--tokenizer={name}: {what}; give one of {', '.join(TOKENIZERS)}, or a folder with tokenizer.json")


def _end_of_text(folder: Path) -> str | int:
    """The token that ends a text, or its id, by what stands beside a tokenizer.json. UserError: nothing says it."""
    for name, entry in END_OF_TEXT:
        try:
            found = json.loads((folder / name).read_bytes())[entry]
        except (FileNotFoundError, KeyError):
            continue
        except (ValueError, TypeError) as error:
            raise UserError(f"{name} beside it is damaged ({error}): copy it again") from None
        match found:
            case str(token) | int(token) | {"content": str(token)} | [int(token), *_]:
                return token
    names = dict.fromkeys(name for name, _ in END_OF_TEXT)
    raise UserError(f"no {', '.join(names)} beside it says which token ends a text: give eos_token in the first")


def _encoding(name: str) -> "tiktoken.Encoding":
    import tiktoken

    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # depends on what lies between here and the server: requests' kinds, OSError, ValueError
        raise UserError(
            f"the files of the {name} tokenizer can't be loaded: tiktoken downloads them once, so connect to "
            "the network, or set TIKTOKEN_CACHE_DIR to a folder that has them, or prepare the text with "
            f"--tokenizer=byte ({type(error).__name__}: {str(error)[:200]})"
        ) from error
