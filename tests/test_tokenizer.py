"""The tokenizers: every text comes back, ids stay in range, text never yields end-of-text, and cuts change nothing."""

import base64
import codecs
import hashlib
import json
import os
import random
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import tiktoken

from configurator import UserError
from data.reading import pieces
from data.tokenizer import ENCODINGS, BytePairTokenizer, load_tokenizer, tokenizer_from_meta
from folders import KINDS, LINES, tokenizer_folder
from training import checkpoint

ROOT = Path(__file__).resolve().parents[1]

TEXTS = [
    "",
    "a",
    "Hello world\n",
    "<|endoftext|>",
    "tab\tCRLF\r\nNUL\0",
    "naïve, 漢字, 🙂, e\u0301",
    " " * 50,
    "\ufeffmark",
]
CHARS = "".join(sorted(set("".join(TEXTS))))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """folder(kind): a Hugging Face folder of a kind of `tokenizer_folder`, made once."""
    pytest.importorskip("transformers")
    made = {}

    def folder(kind):
        if kind not in made:
            made[kind] = tokenizer_folder(tmp_path_factory.mktemp("folders") / kind, kind)
        return made[kind]

    return folder


@pytest.fixture(params=["byte", "char", "gpt2", "folder"])
def tokenizer(request):
    if request.param == "gpt2":
        return request.getfixturevalue("gpt2")
    if request.param == "folder":
        return load_tokenizer(str(request.getfixturevalue("folder")("smollm2")))
    return tokenizer_from_meta({"name": request.param, "chars": CHARS})


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int64 and ids.ndim == 1
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids.tolist()) == text.encode()
    assert tokenizer.eot not in ids.tolist()
    if len(ids):
        assert 0 <= ids.min() and ids.max() < tokenizer.n_vocab


def test_sizes(tokenizer):
    expected = {"byte": (257, 257, 256), "gpt2": (50257, 50304, 50256), "char": (len(CHARS), len(CHARS), None)}
    sizes = expected.get(tokenizer.name, (370, 384, 0))
    assert (tokenizer.n_vocab, tokenizer.vocab_size, tokenizer.eot) == sizes


def test_meta_brings_the_same_tokenizer_back(tokenizer):
    again = tokenizer_from_meta(json.loads(json.dumps(tokenizer.to_meta())))
    assert again.to_meta() == tokenizer.to_meta()
    assert again.encode(CHARS).tolist() == tokenizer.encode(CHARS).tolist()


def test_decode_takes_one_id_and_end_of_text(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a")[0]) == "a"
    if tokenizer.eot is not None:
        assert tokenizer.decode([tokenizer.eot]) == "<|endoftext|>"


@pytest.mark.parametrize("id", [-1, "n_vocab"])
def test_decode_refuses_ids_outside(tokenizer, id):
    with pytest.raises(UserError, match=f"{tokenizer.name} tokenizer has 0 to {tokenizer.n_vocab - 1}"):
        tokenizer.decode([0, tokenizer.n_vocab if id == "n_vocab" else id])


def test_streaming_by_an_incremental_decoder(tokenizer):
    text = "naïve, 漢字, 🙂"
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    assert "".join(decoder.decode(tokenizer.decode_bytes(id)) for id in tokenizer.encode(text)) == text


def test_pieces_change_no_token(tokenizer):
    """A cut at the wrong place, say inside a run of line ends, gives other GPT-2 tokens than the whole text."""
    words = ["a", "  two", "\n", "\n\n\n\n", "\n\nx", "12", "漢字", "it's", "...", "🙂", "\t", " ", "   "]
    rng = random.Random(0)
    text = "".join(rng.choice(["", " "]) + rng.choice(words) for _ in range(5000))
    text = text if tokenizer.name != "char" else "".join(c for c in text if c in CHARS)
    parts = list(pieces(text, size=10))
    assert len(parts) > 100 and "".join(parts) == text
    assert np.concatenate([tokenizer.encode(part) for part in parts]).tolist() == tokenizer.encode(text).tolist()


@pytest.mark.parametrize("name", ENCODINGS)
def test_pieces_end_where_tokens_do(name, monkeypatch):
    """By the pattern with which each encoding cuts a text before it looks for merges. It needs no files."""
    import regex
    from tiktoken_ext import openai_public

    for loader in "load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks":
        monkeypatch.setattr(openai_public, loader, lambda *args, **options: {})
    pattern = regex.compile(openai_public.ENCODING_CONSTRUCTORS[name]()["pat_str"])
    draw, cuts = random.Random(1), 0
    for _ in range(3000):
        text = "".join(
            draw.choices(
                [
                    "a",
                    "B",
                    "é",
                    "漢",
                    "1",
                    "23",
                    " ",
                    "  ",
                    "\n",
                    "\r\n",
                    "\t",
                    ".",
                    ",",
                    "_",
                    "'s",
                    "🙂",
                    "\u0301",
                    "/",
                ],
                k=30,
            )
        )
        found = list(pieces(text, 3))
        starts, at = [], 0
        for piece in found:
            starts += [at + match.start() for match in pattern.finditer(piece)]
            at += len(piece)
        cuts += len(found) - 1
        assert starts == [match.start() for match in pattern.finditer(text)], (text, found)
    assert cuts > 9000


def test_where_there_is_nowhere_to_cut_it_is_cut_all_the_same():
    assert [len(piece) for piece in pieces("x" * 1000, 10)] == [160] * 6 + [40]
    assert [len(piece) for piece in pieces(("x" * 7 for _ in range(100)), 10)] == [160] * 4 + [60]


@pytest.mark.parametrize(
    "run", ["x", " ", "\n", "漢字", " \n\u3000"], ids=["letters", "spaces", "lines", "han", "mixed"]
)
def test_long_runs(tokenizer, run):
    """One run without a break must neither overflow the regex engine nor take quadratic time."""
    text = f"a{run * (1_200_000 // len(run))}b"
    if tokenizer.name == "char":
        tokenizer = tokenizer_from_meta({"name": "char", "chars": "".join(sorted(set(text)))})
    assert "".join(pieces(text)) == text
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.fixture(params=["r50k_base", "cl100k_base", "o200k_base"])
def pattern_tokenizer(request, monkeypatch):
    """With the pattern of an encoding, and merges that show where it cuts: those of white space, and with a word's
    first letter. The other encodings have these patterns. It needs no files.
    """
    from tiktoken_ext import openai_public

    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *args, **options: {})
    merges = [
        b"  ",
        b"   ",
        b"    ",
        b"\n\n",
        b" \n",
        b"\n ",
        b"\t\t",
        b" a",
        b"\ta",
        b".\n",
        b".\n\n",
        b"\n/",
        b"\xc2\xa0",
    ]
    ranks = [bytes([byte]) for byte in range(256)] + merges
    encoding = tiktoken.Encoding(
        request.param,
        pat_str=openai_public.ENCODING_CONSTRUCTORS[request.param]()["pat_str"],
        mergeable_ranks={token: rank for rank, token in enumerate(ranks)},
        special_tokens={"<|endoftext|>": len(ranks)},
    )
    return BytePairTokenizer(encoding, 300)


def test_long_runs_of_white_space_are_cut_where_tokens_begin(pattern_tokenizer, monkeypatch):
    """Where tiktoken has stack enough for a run, what is done where it has not gives the same tokens."""
    monkeypatch.setattr("data.tokenizer.LONG_RUN", 4)
    draw, long = random.Random(2), 0
    words = [
        "a",
        "B",
        "é",
        "1",
        "23",
        ".",
        "/",
        "_",
        "'s",
        "🙂",
        "\u0301",
        "\x1c",
        "...",
        ".\n",
        "漢",
        "",
        "",
        "\u200b",
    ]
    blanks = [" ", "\n", "\t", " \n", "\r\n", "\u00a0 ", "\u3000", "\x1c", "\x1f \n", "\u0085\u2028", " \t"]
    for _ in range(6000):
        text = ""
        for _ in range(draw.randint(1, 5)):
            text += draw.choice(words) + "".join(draw.choices(draw.choice(blanks), k=draw.randint(0, 9)))
        plain = pattern_tokenizer._encoding.encode_ordinary(text)
        assert pattern_tokenizer.encode(text).tolist() == plain
        assert pattern_tokenizer._without_long_runs(text).tolist() == plain, repr(text)
        long += bool(re.search(r"\S\s{5,}\S", text))
    assert long > 2000


@pytest.mark.parametrize(
    "text, overflows",
    [
        (f"a{' ' * 1_000_001}a", ("r50k_base", "cl100k_base", "o200k_base")),
        (f".{chr(10) * 1_000_001}/", ("r50k_base",)),
        (" " * 1_000_001, ("o200k_base",)),
    ],
    ids=["spaces", "lines", "nothing but spaces"],
)
def test_what_overflows_the_regular_expression_is_encoded(pattern_tokenizer, text, overflows):
    """The stack of tiktoken 0.14 has room for a million: it depends on the pattern what is too much for it."""
    ids = pattern_tokenizer.encode(text)
    try:
        plain = pattern_tokenizer._encoding.encode_to_numpy(text, disallowed_special=())
    except ValueError:
        assert pattern_tokenizer.name in overflows and pattern_tokenizer.decode(ids) == text
    else:
        assert pattern_tokenizer.name not in overflows and np.array_equal(ids, plain)


def test_text_that_tiktoken_refuses_all_the_same(gpt2, monkeypatch):
    def refuses(text, disallowed_special):
        raise ValueError("Regex error while tokenizing: no more stack")

    monkeypatch.setattr(gpt2, "_encoding", types.SimpleNamespace(_pat_str="", encode_to_numpy=refuses))
    with pytest.raises(UserError, match="gpt2 tokenizer can't encode the text .*no more stack"):
        gpt2.encode("text")


def test_byte_ids_are_the_bytes():
    assert tokenizer_from_meta({"name": "byte"}).encode("é<|endoftext|>").tolist() == list("é<|endoftext|>".encode())


def test_gpt2_ids_are_the_published_ones(gpt2):
    assert gpt2.encode("Hello world").tolist() == [15496, 995]


def test_all_of_tiktokens_encodings_can_be_named():
    assert set(ENCODINGS) == set(tiktoken.list_encoding_names())


def test_another_encoding(gpt2, tmp_path, monkeypatch):
    """r50k_base has GPT-2's ranks in another file, whose checksum tiktoken knows: so this is the real one."""
    url = "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken"
    ranks = sorted(gpt2._encoding._mergeable_ranks.items(), key=lambda pair: pair[1])
    lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks]
    (tmp_path / hashlib.sha1(url.encode()).hexdigest()).write_bytes(b"".join(lines))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    tokenizer = tokenizer_from_meta({"name": "r50k_base"})
    assert (tokenizer.name, tokenizer.n_vocab, tokenizer.vocab_size, tokenizer.eot) == (
        "r50k_base",
        50257,
        50304,
        50256,
    )
    text = "".join(TEXTS)
    assert tokenizer.encode(text).tolist() == gpt2.encode(text).tolist()


@pytest.mark.parametrize("n_vocab, rows", [(100_277, 100_352), (200_019, 200_064), (50_281, 50_304)])
def test_rows_of_the_embedding_are_padded(monkeypatch, n_vocab, rows):
    class Encoding:
        name, eot_token = "cl100k_base", 0

    Encoding.n_vocab = n_vocab
    monkeypatch.setattr("tiktoken.get_encoding", lambda name: Encoding)
    assert tokenizer_from_meta({"name": "cl100k_base"}).vocab_size == rows


def test_gpt2_files_missing(monkeypatch):
    def no_network(name):
        raise ConnectionError("unreachable")

    monkeypatch.setattr("tiktoken.get_encoding", no_network)
    with pytest.raises(UserError, match=r"TIKTOKEN_CACHE_DIR.*--tokenizer=byte.*ConnectionError: unreachable"):
        tokenizer_from_meta({"name": "gpt2"})


def test_char_ids_are_places_in_the_sorted_vocabulary():
    assert tokenizer_from_meta({"name": "char", "chars": "\nabé"}).encode("éa\nb").tolist() == [3, 1, 0, 2]


@pytest.mark.parametrize("text", ["az", "\x00", "🙂", "A"])
def test_char_names_the_character_it_lacks(text):
    with pytest.raises(UserError) as error:
        tokenizer_from_meta({"name": "char", "chars": "abc"}).encode(text)
    assert f"the character {text[-1]!r} is not" in str(error.value) and "'abc'" in str(error.value)


def test_text_without_utf8_form(tokenizer):
    """A lone surrogate is what Python makes of a command line's invalid bytes."""
    with pytest.raises(UserError, match="surrogates|'\\\\udcff'"):
        tokenizer.encode("ok\udcff")


@pytest.mark.parametrize(
    "meta",
    [
        {"name": "bpe"},
        {},
        {"name": "char"},
        {"name": "char", "chars": "ba"},
        {"name": "char", "chars": ""},
        {"name": "char", "chars": "aab"},
        {"name": "bpe-9-00000000", "json": "{}"},
        "gpt2",
        None,
    ],
)
def test_bad_meta(meta):
    with pytest.raises(UserError, match="unknown tokenizer|distinct characters in sorted order"):
        tokenizer_from_meta(meta)


# -- tokenizer.json ----------------------------------------------------------------------------


HARD = [
    *TEXTS,
    *LINES[:4],
    "".join(LINES),
    "  it's 1234 teas\n\n\n x",
    "<s>struck</s> <|im_start|>out<|endoftext|></s>",
    "\u0301 \u0915\u093c\n\u0958\n",
]


@pytest.fixture(params=KINDS)
def both(request, folder):
    """The tokenizer of a folder, and what transformers makes of it."""
    from transformers import AutoTokenizer

    path = str(folder(request.param))
    return load_tokenizer(path), AutoTokenizer.from_pretrained(path)


def theirs(hub, text):
    return hub(text, add_special_tokens=False, split_special_tokens=True).input_ids


def test_ids_and_text_are_those_of_transformers(both):
    """But for a special token's text where their model knows it as a word: there it is text here."""
    ours, hub = both
    special = {id for token, id in hub.get_vocab().items() if token in ("<s>", "</s>", "<|endoftext|>", "<|im_start|>")}
    for text in HARD:
        ids = ours.encode(text)
        if not special & {*theirs(hub, text)}:
            assert ids.tolist() == theirs(hub, text), text
        assert not special & {*ids.tolist()}
        assert ours.decode(ids) == hub.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert (ours.n_vocab, ours.eot) == (len(hub), hub.eos_token_id) and ours.vocab_size % 128 == 0
    assert ours.decode([ours.eot]) == hub.eos_token
    everything = range(ours.n_vocab)
    assert ours.decode(everything) == hub.decode(everything, skip_special_tokens=False)


def test_a_special_token_that_the_model_knows_is_spelled(folder):
    """A model of words (Unigram) has the end of text among them, and transformers gives its id."""
    from transformers import AutoTokenizer

    path = str(folder("unigram"))
    ours, hub = load_tokenizer(path), AutoTokenizer.from_pretrained(path)
    assert ours.eot in theirs(hub, "struck</s> text")
    ids = ours.encode("struck</s> text")
    assert ours.eot not in ids and ours.decode(ids) == "struck</s> text"


def test_an_unknown_character_that_would_end_the_text(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    end = "<|endoftext|>"
    made = tokenizers.Tokenizer(tokenizers.models.BPE({end: 0, "a": 1}, [], unk_token=end))
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
    ours = load_tokenizer(str(tmp_path))
    assert ours.encode("aa").tolist() == [1, 1]
    with pytest.raises(UserError, match="has no token for some character of the text"):
        ours.encode("ab")


def test_pieces_of_a_folder_s_tokenizer_change_no_id(both):
    """A byte-level one takes all cuts. Where a text gets a space before it, cuts are undone."""
    ours, _ = both
    words = ["tea", "  two", "\n", "\n\n\n\n", "\n\nx", "12", "漢字", "it's", "...", "🙂", "\t", " ", "\u0958", "]\n"]
    rng = random.Random(0)
    text = "".join(rng.choice(["", " "]) + rng.choice(words) for _ in range(3000))
    cut = list(pieces(text, size=10))
    parts = list(ours.pieces(cut))
    assert "".join(parts) == text
    assert np.concatenate([ours.encode(part) for part in parts]).tolist() == ours.encode(text).tolist()
    assert len(cut) > 300 and (parts == cut) == ("ByteLevel" in ours._decoders)
    assert list(ours.pieces([])) == list(ours.pieces([""])) == []


def test_what_is_joined_has_an_end(folder, monkeypatch):
    monkeypatch.setattr("data.tokenizer.MOST_JOINED", 30)
    parts = list(load_tokenizer(str(folder("llama"))).pieces(["tea pot", " and kettle", " and tea", " for two"]))
    assert parts == ["tea pot and kettle and tea", " for two"]


def test_streaming_of_a_folder_s_tokenizer(both):
    """Token by token, as behind others: a space that stands before the first word shows."""
    ours, _ = both
    text = "the quick fox 12\n" if "ByteLevel" not in ours._decoders else "naïve, 漢字, 🙂\n"
    ids = ours.encode(text)
    stream = b"".join(ours.decode_bytes(id) for id in ids)
    assert stream == ours.decode_bytes(ids) and stream.decode().removeprefix(" ") == text == ours.decode(ids)


def test_bytes_of_one_character_apart(folder):
    ours = load_tokenizer(str(folder("llama")))
    assert [ours.decode_bytes(id) for id in ours.encode("🙂")[1:]] == [bytes([byte]) for byte in "🙂".encode()]


def test_a_folder_s_tokenizer_comes_back_without_the_folder(both, tmp_path):
    """From meta.json, and from a checkpoint, which is read without running code."""
    ours, _ = both
    meta = ours.to_meta()
    assert {**meta, "json": ""} == {"name": ours.name, "json": "", "eot": ours.eot_token, "n_vocab": ours.n_vocab}
    state = {"model": {}, "model_args": {}, "iter_num": 0, "best_val_loss": 0.0, "config": {}, "tokenizer": meta}
    checkpoint.save(tmp_path / "ckpt.pt", state)
    for again in (json.loads(json.dumps(meta, indent=1)), checkpoint.load(tmp_path / "ckpt.pt")["tokenizer"]):
        assert again == meta
        back = tokenizer_from_meta(again)
        assert back.to_meta() == meta and (back.name, back.eot) == (ours.name, ours.eot)
        assert all(np.array_equal(back.encode(text), ours.encode(text)) for text in HARD)


def test_the_same_tokenizer_has_the_same_meta(folder, tmp_path):
    """However its JSON is laid out, wherever it is, and whatever its padding is; not with another end of text."""
    text, names = (folder("qwen") / "tokenizer.json").read_text(encoding="utf-8"), {}
    spec = json.loads(text)
    end, padding = "<|endoftext|>", {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": end}
    for name, content, eos in (
        ("a", text, end),
        ("b", json.dumps(dict(reversed(spec.items()))), {"content": end, "lstrip": False}),
        ("c", json.dumps(spec | {"padding": padding}, indent=9), end),
        ("d", text, "<|im_start|>"),
        ("e", json.dumps(spec | {"normalizer": None}), end),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(content, encoding="utf-8")
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
        names[name] = load_tokenizer(str(tmp_path / name)).to_meta()
    assert names["a"] == names["b"] == names["c"] and names["a"]["name"].startswith("bpe-373-")
    assert names["a"]["name"] != names["d"]["name"] != names["e"]["name"] != names["a"]["name"]
    assert len(tokenizer_from_meta(names["c"]).encode("tea")) < 9
    assert load_tokenizer(str(tmp_path / "a" / "tokenizer.json")).to_meta() == names["a"]


@pytest.mark.parametrize(
    "file, entry",
    [
        ("special_tokens_map.json", {"eos_token": {"content": "<|im_start|>"}}),
        ("generation_config.json", {"eos_token_id": [1, 0]}),
        ("config.json", {"eos_token_id": 1}),
    ],
)
def test_where_a_folder_says_what_ends_a_text(folder, tmp_path, file, entry):
    (tmp_path / "tokenizer.json").write_bytes((folder("gpt2") / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": None}))
    (tmp_path / file).write_text(json.dumps(entry))
    ours = load_tokenizer(str(tmp_path))
    assert (ours.eot, ours.eot_token) == (1, "<|im_start|>") and 1 not in ours.encode("<|im_start|>")


def test_an_end_of_text_that_the_file_has_as_a_plain_token(folder, tmp_path):
    spec = json.loads((folder("gpt2") / "tokenizer.json").read_text(encoding="utf-8"))
    spec["added_tokens"][0]["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    ours = load_tokenizer(str(tmp_path))
    assert 0 not in ours.encode("a<|endoftext|>b") and ours.decode([0]) == "<|endoftext|>"


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "the folder has no tokenizer.json; give one of byte, gpt2, .*, or a folder with tokenizer.json"),
        ({"tokenizer.json": "{"}, "tokenizer.json: no tokenizer.json, or a damaged one"),
        ({"tokenizer.json": "[]"}, "tokenizer.json: no tokenizer.json, or a damaged one"),
        ({"tokenizer.json": '{"model": {"type": "BPE"}}'}, "tokenizer.json: no tokenizer.json, or a damaged one"),
        ({"tokenizer.json": b"\xff\0"}, "tokenizer.json is not UTF-8 text: copy it again"),
        ({"tokenizer_config.json": "{}"}, "beside it says which token ends a text: give eos_token in the first"),
        ({"tokenizer_config.json": "{"}, "tokenizer_config.json beside it is damaged"),
        ({"tokenizer_config.json": "[]"}, "tokenizer_config.json beside it is damaged"),
        ({"tokenizer_config.json": '{"eos_token": "</s>"}'}, "the token '</s>', which .* not among the 379 tokens"),
        ({"tokenizer_config.json": "{}", "config.json": '{"eos_token_id": 999}'}, "the token 999, which is said to"),
    ],
)
def test_folders_that_are_refused(folder, tmp_path, files, message):
    good = {name: (folder("gpt2") / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    for name, content in (good | files if files else {}).items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_neither_a_name_nor_a_folder(tmp_path):
    with pytest.raises(UserError, match="--tokenizer=gtp2: no such tokenizer, and no such folder; give one of byte, g"):
        load_tokenizer("gtp2")


def test_without_the_library(folder, monkeypatch):
    path, meta = str(folder("gpt2")), load_tokenizer(str(folder("gpt2"))).to_meta()
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    for make in (lambda: load_tokenizer(path), lambda: tokenizer_from_meta(meta)):
        with pytest.raises(UserError, match="needs one package more: pip install tokenizers"):
            make()


def test_the_real_one():
    """Its ids of a page are those of transformers, and so are a book's in pieces."""
    path = Path(os.environ.get("SMOLLM2", ROOT / "models" / "smollm2"))
    if not (path / "tokenizer.json").exists():
        pytest.skip(f"no tokenizer in {path}: python examples/smollm2.py makes it; SMOLLM2 names another folder")
    hub = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(path)
    ours, page = load_tokenizer(str(path)), (ROOT / "README.md").read_text(encoding="utf-8")
    ids = ours.encode(page)
    assert ids.tolist() == theirs(hub, page) and ours.decode(ids) == page
    assert (ours.n_vocab, ours.eot) == (len(hub), hub.eos_token_id)
    parts = list(ours.pieces(pieces(page, size=500)))
    assert len(parts) > 50 and np.array_equal(np.concatenate([ours.encode(part) for part in parts]), ids)
