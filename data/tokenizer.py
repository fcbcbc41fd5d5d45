"""Tokenizers: text to token ids and back.

    byte              the 256 bytes of UTF-8 and <|endoftext|>: encodes any text, needs no files, 1 token a byte
    gpt2, o200k_base, ... (ENCODINGS)    the byte-pair encodings of tiktoken: any text, about 4 bytes a token; their
                      files are downloaded once
    char              the distinct characters of one corpus, as in nanoGPT's character-level Shakespeare

All but the last are tiktoken.Encoding objects. A tokenizer goes into meta.json and into checkpoints as the plain dict
of to_meta(), and comes back through tokenizer_from_meta(): no pickle, and a checkpoint works without its corpus.

Dims: N, the tokens of a text.
"""

import re
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from configurator import UserError

if TYPE_CHECKING:  # tiktoken is imported where it is needed: its import takes a while
    import tiktoken

Ids = npt.NDArray[np.int64]

ENCODINGS = "gpt2", "r50k_base", "p50k_base", "p50k_edit", "cl100k_base", "o200k_base", "o200k_harmony"
TOKENIZERS = "byte", *ENCODINGS  # those for any text
PADDING = 128  # the embedding of an encoding has a multiple of so many rows: faster on GPUs
GPT2_VOCAB_SIZE = 50304  # 50257, padded
GPT2_EOT = 50256
# A run of a million white-space characters overflows the stack of tiktoken's regular expressions. LONG_RUN leaves room.
LONG_RUN = 500_000
BLANK = r"\t\v\f \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # its \s, but for \n and \r


class Tokenizer:
    """Text to token ids and back."""

    name: str  # one of TOKENIZERS, or char
    n_vocab: int  # number of ids: every id is below it
    vocab_size: int  # rows of the model's embedding: n_vocab, for tiktoken's encodings padded (gpt2: 50304)
    eot: int | None  # id of <|endoftext|>, which stands after every document; None for char

    def encode(self, text: str) -> Ids:
        """(N,) int64 ids of text. Never eot: a literal '<|endoftext|>' in text is text. UserError: can't be encoded."""
        raise NotImplementedError

    def decode_bytes(self, ids: npt.ArrayLike) -> bytes:
        """UTF-8 bytes of ids: (N,) ints, or one int. They can begin or end inside a character: to stream, feed them to
        codecs.getincrementaldecoder("utf-8")(errors="replace"). UserError: an id outside the vocabulary.
        """
        found = np.asarray(ids, dtype=np.int64).reshape(-1)
        if found.size and not 0 <= found.min() <= found.max() < self.n_vocab:
            raise UserError(
                f"token ids from {found.min()} to {found.max()}, but the {self.name} tokenizer has 0 to "
                f"{self.n_vocab - 1}: do the model and the tokenizer belong together?"
            )
        return self._decode_bytes(found)

    def _decode_bytes(self, ids: Ids) -> bytes:
        raise NotImplementedError

    def decode(self, ids: npt.ArrayLike) -> str:
        """The text of ids, (N,) ints or one int; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def to_meta(self) -> dict[str, str]:
        """What tokenizer_from_meta needs, as a dict of strings."""
        return {"name": self.name}


class BytePairTokenizer(Tokenizer):
    """byte and ENCODINGS: a tiktoken.Encoding."""

    def __init__(self, encoding: "tiktoken.Encoding", vocab_size: int):
        self.name, self.n_vocab, self.eot = encoding.name, encoding.n_vocab, encoding.eot_token
        self.vocab_size = vocab_size
        self._encoding = encoding

    def encode(self, text: str) -> Ids:
        try:
            if self.name == "byte":  # hundreds of times faster than a search for merges, of which there are none
                return np.frombuffer(text.encode(), np.uint8).astype(np.int64)
            return self._ordinary(text)
        except UnicodeEncodeError as error:
            raise UserError(f"the text has no UTF-8 form: {error.reason} at character {error.start}") from None
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

    def to_meta(self) -> dict[str, str]:
        return {"name": "char", "chars": self.chars}


def _code_points(text: str) -> npt.NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def tokenizer_from_meta(meta: object) -> Tokenizer:
    """The Tokenizer of {"name": "byte"}, {"name": one of ENCODINGS} or {"name": "char", "chars": "..."}; UserError."""
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
            return BytePairTokenizer(encoding, vocab_size=-(-encoding.n_vocab // PADDING) * PADDING)
        case {"name": "char", "chars": str(chars)}:
            return CharTokenizer(chars)
    raise UserError(f"unknown tokenizer {meta!r}: expected the name {', '.join(TOKENIZERS)}, or char with its chars")


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
