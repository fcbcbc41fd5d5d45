"""data/hub.py and its four scripts, on small copies of the data sets' files: what lands in the corpus, going on after a
kill, what is refused. Through the same calls of the `datasets` library as from the hub itself.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("datasets", reason="pip install -r requirements-data.txt")
import pyarrow
import pyarrow.parquet
import zstandard

from configurator import UserError
from data import corpus, hub
from data.tokenizer import tokenizer_from_meta
from folders import tokenizer_folder

ROOT = Path(__file__).resolve().parents[1]
BYTE = tokenizer_from_meta({"name": "byte"})
NAMES = "pg19", "arxiv", "code", "fineweb_edu"
script = {name: importlib.import_module(f"data.{name}.prepare") for name in NAMES}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """To draw the lengths and to wait for the disk takes longer than all the rest."""
    monkeypatch.setattr(corpus, "draw", lambda folder, meta: None)
    monkeypatch.setattr(os, "fsync", lambda number: None)


def parquet(path, rows, schema=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), path, row_group_size=3)


def zst(path, lines, frames=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = "".join(f"{line}\n" for line in lines).encode()
    cuts = np.linspace(0, len(raw), frames + 1).astype(int)
    path.write_bytes(b"".join(zstandard.compress(raw[start:end]) for start, end in zip(cuts, cuts[1:])))


def text(name, i, size=600):
    return f"{name}, number {i}: " + " ".join(str(i * j) for j in range(size // 4))


def pg19_copy(folder):
    for split, files in ("validation", 1), ("train", 3):
        for i in range(files):
            parquet(
                folder / f"data/{split}-0000{i}-of-0000{files}-ab12.parquet",
                [
                    {
                        "short_book_title": f"{split} {i}.{j}",
                        "publication_date": 1900,
                        "url": "u",
                        "text": text(split, 10 * i + j),
                    }
                    for j in range(7)
                ],
            )
    parquet(folder / "data/test-00000-of-00001-ab12.parquet", [{"short_book_title": "t", "text": "a test text " * 50}])


def arxiv_copy(folder):
    for split, files in ("validation", 1), ("train", 3), ("test", 1):
        for i in range(files):
            # The fields of meta differ from row to row, as they do there.
            zst(
                folder / f"arxiv/{split}/arXiv_00{i}.jsonl.zst",
                frames=1 + i,
                lines=[
                    json.dumps(
                        {"text": text(split, 10 * i + j), "meta": {("yymm" if j % 2 else "id"): j if i else str(j)}}
                    )
                    for j in range(7)
                ],
            )


def code_copy(folder):
    """Files of five projects, in turns."""
    for i in range(2):
        parquet(
            folder / f"data/train-0000{i}-of-00002.parquet",
            [
                {
                    "code": f"code {i}.{j}\n" + "x = 1\n" * 60,
                    "repo_name": f"user/project{(7 * i + j) % 5}",
                    "path": f"src/{chr(122 - j)}.py",
                    "language": "C" if j % 4 == 3 else "Python",
                    "license": "mit",
                    "size": 9,
                }
                for j in range(12)
            ],
        )


def fineweb_edu_copy(folder):
    for i in range(3):
        parquet(
            folder / f"sample/10BT/00{i}_00000.parquet",
            [
                {"text": text("page", 10 * i + j, 300 * (1 + j % 4)), "id": "i", "token_count": 100 * (1 + j % 4)}
                for j in range(8)
            ],
        )
    parquet(folder / "sample/100BT/000_00000.parquet", [{"text": text("other", 1), "token_count": 100}] * 3)


copy = {"pg19": pg19_copy, "arxiv": arxiv_copy, "code": code_copy, "fineweb_edu": fineweb_edu_copy}


def config(name, folder, **options):
    """The script's, for the byte tokenizer and no shortest length unless given."""
    return script[name].Config(hub=str(folder), **{"tokenizer": "byte", "min_doc_tokens": 0, "num_proc": 2} | options)


def source(config):
    module = importlib.import_module(type(config).__module__)
    return module.Projects(config) if "languages" in vars(config) else module.source(config)


def prepare(config, folder):
    return hub.prepare(config, source(config), folder)


def documents(folder, split):
    ids = np.fromfile(folder / f"{split}.bin", np.uint16)
    ends = np.fromfile(folder / f"{split}_ends.bin", np.uint64).astype(int)
    return [BYTE.decode(ids[start : end - 1]) for start, end in zip([0, *ends], ends)]


def content(folder):
    return {
        name: (folder / name).read_bytes()
        for name in ("train.bin", "val.bin", "train_ends.bin", "val_ends.bin", "meta.json")
    }


def taken(documents):
    return [(document.split, document.name, "".join(document.texts)) for document in documents]


# -- what lands in the corpus ------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_main(tmp_path, monkeypatch, capfd, name):
    """The commands as they are given, but for where the corpus goes."""
    copy[name](tmp_path / "copy")
    into = lambda config, source, folder: hub.prepare(config, source, tmp_path / folder.name)
    monkeypatch.setattr(script[name], "prepare", into)
    options = ["--tokenizer=byte", "--min_doc_tokens=0", f"--hub={tmp_path}/copy"]
    monkeypatch.setattr(sys, "argv", ["prepare.py", *options])
    script[name].main()
    assert documents(tmp_path / name, "train") and documents(tmp_path / name, "val")
    meta = json.loads((tmp_path / name / "meta.json").read_bytes())
    block_size = min(meta["train_tokens"], meta["val_tokens"]) // 2  # where there is less than the recipe wants
    options = f" --block_size={block_size}" if block_size < 2048 else ""
    assert capfd.readouterr().out.endswith(f"now: python train.py config/long_ctx.py --dataset={name}{options}\n")


def test_pg19(tmp_path, capfd):
    pg19_copy(tmp_path / "copy")
    meta = prepare(config("pg19", tmp_path / "copy"), tmp_path / "pg19")
    assert documents(tmp_path / "pg19", "val") == [text("validation", j) for j in range(7)]
    assert documents(tmp_path / "pg19", "train") == [text("train", 10 * i + j) for i in range(3) for j in range(7)]
    assert meta["source"] == {
        "hub": str(tmp_path / "copy"),
        "revision": None,
        "files": ["data/validation-*.parquet", "data/train-*.parquet"],
    }
    out, err = capfd.readouterr()
    assert out.endswith("now: python train.py config/long_ctx.py --dataset=pg19 --block_size=1891\n") and err == ""
    assert "WARNING: no validation document has as many tokens as block_size=1891" in out


def test_the_tokenizer_of_a_folder(tmp_path):
    pytest.importorskip("transformers")
    pg19_copy(tmp_path / "copy")
    folder = tokenizer_folder(tmp_path / "model", "smollm2")
    meta = prepare(config("pg19", tmp_path / "copy", tokenizer=str(folder)), tmp_path / "pg19")
    tokenizer = tokenizer_from_meta(meta["tokenizer"])
    ids = np.fromfile(tmp_path / "pg19" / "val.bin", np.uint16)
    assert tokenizer.decode(ids[: np.argmax(ids == tokenizer.eot)]) == text("validation", 0)


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_tokenizer_is_said_before_anything_is_fetched(name):
    with pytest.raises(UserError, match="--tokenizer=gtp2: no such tokenizer, and no such folder"):
        source(script[name].Config(tokenizer="gtp2"))


def test_arxiv(tmp_path):
    """All frames of a .zst file are read; and fields that we don't need may be anything."""
    arxiv_copy(tmp_path / "copy")
    prepare(config("arxiv", tmp_path / "copy"), tmp_path / "arxiv")
    assert documents(tmp_path / "arxiv", "val") == [text("validation", j) for j in range(7)]
    assert documents(tmp_path / "arxiv", "train") == [text("train", 10 * i + j) for i in range(3) for j in range(7)]


def test_code_keeps_projects_together(tmp_path):
    code_copy(tmp_path / "copy")
    found = taken(source(config("code", tmp_path / "copy")).documents())
    assert [name for _, name, _ in found] == [f"user/project{i}" for i in range(5)]
    split, name, project = found[1]
    assert split is None and project.startswith("=== src/o.py ===\ncode 0.11\nx = 1\n") and project.endswith("x = 1\n")
    paths = [line for line in project.splitlines() if line.startswith("===")]
    assert paths == sorted(paths) and len(paths) == 5
    assert sum(project.count("=== src/") for _, _, project in found) == 24


def test_code_of_two_lots(tmp_path):
    """A project whose rows are in two lots becomes two documents."""
    code_copy(tmp_path / "copy")
    projects = source(config("code", tmp_path / "copy"))
    projects.buffer = 2000
    found = taken(projects.documents())
    assert len(found) > 5 and sum(project.count("=== src/") for _, _, project in found) == 24


def test_code_of_some_languages(tmp_path, monkeypatch):
    code_copy(tmp_path / "copy")
    found = taken(source(config("code", tmp_path / "copy", languages="c, Rust")).documents())
    assert sum(project.count("=== src/") for _, _, project in found) == 6
    monkeypatch.setattr(script["code"], "TRIED", 20)
    with pytest.raises(UserError, match="--languages=pyhton: none of the first 20 files is in these, but in c, python"):
        taken(source(config("code", tmp_path / "copy", languages="pyhton")).documents())


def test_fineweb_edu_leaves_out_short_pages(tmp_path, monkeypatch):
    fineweb_edu_copy(tmp_path / "copy")
    meta = prepare(config("fineweb_edu", tmp_path / "copy", min_doc_tokens=1000, val_fraction=0.25), tmp_path / "out")
    expected = [text("page", 10 * i + j, 300 * (1 + j % 4)) for i in range(3) for j in range(8)]
    expected = [page for page in expected if len(page) + 1 >= 1000]
    assert 4 < len(expected) < 20 and meta["train_documents"] + meta["val_documents"] == len(expected)
    assert documents(tmp_path / "out", "val") == expected[::4]
    # With GPT-2's tokenizer by token_count: what has less than half isn't even given to it.
    found = taken(source(config("fineweb_edu", tmp_path / "copy", min_doc_tokens=600, tokenizer="gpt2")).documents())
    assert len(found) == 3 * 4


def test_max_tokens(tmp_path):
    """Validation is at most about a twentieth of it, but a document at least."""
    pg19_copy(tmp_path / "copy")
    meta = prepare(config("pg19", tmp_path / "copy", max_tokens=6000), tmp_path / "out")
    assert meta["val_documents"] == 1 and 5000 < meta["train_tokens"] + meta["val_tokens"] < 7500
    many = config("pg19", tmp_path / "copy", max_tokens=20 * 1500)
    assert prepare(many, tmp_path / "out")["val_documents"] == 4
    assert [len(validation) for validation in documents(tmp_path / "out", "val")] == [
        321,
        511,
        566,
        583,
    ]  # 1500 is in the last


def test_text_is_normalised_or_left_out(tmp_path, capfd):
    """NUL, half a surrogate pair, and in parquet bytes that are no UTF-8: the row goes. CRLF and byte
    order marks go.
    """
    bad = pyarrow.StringArray.from_buffers(
        5, *pyarrow.array([b"one\r\ntwo", b"\xed\xa0\x80", b"N\0L", None, b""]).buffers()[1:]
    )
    table = pyarrow.table({"text": bad, "short_book_title": list("abcde")})
    for split in "validation", "train":
        (tmp_path / "copy/data").mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(table, tmp_path / f"copy/data/{split}-0.parquet")
        zst(
            tmp_path / f"copy/arxiv/{split}/a.jsonl.zst",
            [
                r'{"text": "\ufeffone\r\ntwo"}',
                r'{"text": "\ud800"}',
                r'{"text": "N\u0000L"}',
                '{"text": null}',
                '{"text": ""}',
                "",
            ],
        )
    for name in "pg19", "arxiv":
        prepare(config(name, tmp_path / "copy"), tmp_path / "out")
        assert documents(tmp_path / "out", "train") == documents(tmp_path / "out", "val") == ["one\ntwo"]
        assert "not text (NUL or broken characters): 4 rows" in capfd.readouterr().out


# -- going on ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_goes_on_after_every_document(tmp_path, name, monkeypatch):
    """Also across files, and twice."""
    copy[name](tmp_path / "copy")
    monkeypatch.setattr(hub, "ROWS", 2)

    def new():
        projects = source(config(name, tmp_path / "copy", max_tokens=20 * 1500))
        if name == "code":
            projects.buffer = 2000
        return projects

    first, found, states = new(), [], []
    for document in first.documents():
        found += taken([document])
        states.append(json.loads(json.dumps(first.state())))
    assert len(found) >= 14
    for i, state in enumerate(states):
        second = new()
        some = taken(document for _, document in zip(range(3), second.documents(state)))
        assert some == found[i + 1 : i + 4]
        if some:
            assert taken(new().documents(json.loads(json.dumps(second.state())))) == found[i + 4 :]


KILLED = """
import os, signal, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
from pathlib import Path
from data import corpus, hub
import test_hub
corpus.SAVE, corpus.BATCH = 0, 500
rows = hub.Hub.rows
def killed(self, state=None):
    for count, row in enumerate(rows(self, state)):
        if count == int(sys.argv[5]):
            os.kill(os.getpid(), signal.SIGKILL)
        yield row
hub.Hub.rows = killed
test_hub.prepare_small(*sys.argv[2:5])
"""


def prepare_small(name, copy, folder):
    """With a buffer for code that makes several lots."""
    small = config(name, copy, **({"val_fraction": 0.2} if name == "code" else {}))
    rows = source(small)
    rows.buffer = 2000
    hub.prepare(small, rows, Path(folder))


@pytest.mark.parametrize("name", ["pg19", *(pytest.param(name, marks=pytest.mark.slow) for name in ("arxiv", "code"))])
def test_killed(tmp_path, name, capfd):
    """kill -9 in the midst of the second file, then the same command: the same bytes as if it had not been."""
    copy[name](tmp_path / "copy")
    prepare_small(name, tmp_path / "copy", tmp_path / "whole")
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, ROOT, name, tmp_path / "copy", tmp_path / "out", "18"], capture_output=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert json.loads((tmp_path / "out/unfinished/journal.json").read_bytes())["sizes"]["train.bin"] > 0
    capfd.readouterr()
    prepare_small(name, tmp_path / "copy", tmp_path / "out")
    assert "going on with the preparation" in capfd.readouterr().out
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert not (tmp_path / "out/unfinished").exists()


def test_network_fails_in_the_midst(tmp_path, monkeypatch, capfd):
    """What was done is kept, and the same command goes on."""
    copy["pg19"](tmp_path / "copy")
    prepare_small("pg19", tmp_path / "copy", tmp_path / "whole")
    monkeypatch.setattr("data.corpus.SAVE", 0)
    monkeypatch.setattr("data.corpus.BATCH", 500)
    row = hub.Hub._row

    def fails(self, table):
        if "train 2.3" in str(table["short_book_title"]):
            raise ConnectionError("Server Disconnected")
        return row(self, table)

    with monkeypatch.context() as patch:
        patch.setattr(hub.Hub, "_row", fails)
        with pytest.raises(UserError, match="Server Disconnected.*the same command goes on"):
            prepare_small("pg19", tmp_path / "copy", tmp_path / "out")
    prepare_small("pg19", tmp_path / "copy", tmp_path / "out")
    assert "going on with the preparation" in capfd.readouterr().out
    assert content(tmp_path / "out") == content(tmp_path / "whole")


# -- what is refused ---------------------------------------------------------------------------


def refused(name, tmp_path, message, kind=UserError, **options):
    with pytest.raises(UserError, match=message) as error:
        prepare(config(name, tmp_path / "copy", **options), tmp_path / "out")
    assert type(error.value) is kind and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_no_network(tmp_path):
    """As a command, by the data set's name: one line, and nothing is left."""
    folder = ROOT / "data/pg19"
    before = sorted(folder.rglob("*"))
    done = subprocess.run(
        [sys.executable, folder / "prepare.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith(
        "error: emozilla/pg19 can't be read from the hub (OfflineModeIsEnabled"
    )
    assert "the same command goes on" in done.stderr
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("name", NAMES)
def test_no_network_for_any(name):
    with pytest.raises(UserError, match=f"{script[name].Config().hub} can't be read from the hub"):
        source(script[name].Config())


def answer(status):
    import httpx2

    return httpx2.Response(status, request=httpx2.Request("GET", "http://localhost"))


def errors():
    import httpx2
    from huggingface_hub import errors as of_hub

    return {
        "gated": (
            of_hub.GatedRepoError("x", response=answer(403)),
            UserError,
            "accept them on the data set's page.*hf auth login",
        ),
        "unknown": (
            of_hub.RepositoryNotFoundError("x", response=answer(401)),
            UserError,
            "no such data set on the hub, or it is private",
        ),
        "refused": (of_hub.HfHubHTTPError("x", response=answer(403)), UserError, "the hub refuses.*hf auth login"),
        "busy": (of_hub.HfHubHTTPError("x", response=answer(503)), UserError, "the same command goes on"),
        "too many": (of_hub.HfHubHTTPError("x", response=answer(429)), UserError, "the same command goes on"),
        "not cached": (of_hub.LocalEntryNotFoundError("x"), UserError, "the same command goes on"),
        "gone": (of_hub.RemoteEntryNotFoundError("x", response=answer(404)), UserError, "a file is missing"),
        "connection": (
            httpx2.ConnectError("[Errno -2] Name or service not known"),
            UserError,
            "Name or service not known",
        ),
        "slow": (httpx2.ReadTimeout("x"), UserError, "the same command goes on"),
    }


@pytest.mark.parametrize(
    "case", ["gated", "unknown", "refused", "busy", "too many", "not cached", "gone", "connection", "slow"]
)
def test_what_the_hub_answers(tmp_path, monkeypatch, case):
    error, kind, message = errors()[case]
    pg19_copy(tmp_path / "copy")

    def load_dataset(*args, **options):
        raise error

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    refused("pg19", tmp_path, message, kind)


@pytest.mark.parametrize("hub_name", ["/no/such/folder", "a/b/c", "-x"])
def test_no_such_folder(tmp_path, hub_name):
    with pytest.raises(UserError, match="no such folder, and no such data set"):
        source(config("pg19", hub_name))


@pytest.mark.parametrize("name", NAMES)
def test_no_files(tmp_path, name):
    (tmp_path / "copy").mkdir()
    refused(name, tmp_path, r"has no files .*\*\.(parquet|jsonl.zst): is the copy whole")


def test_package_missing(tmp_path, monkeypatch):
    arxiv_copy(tmp_path / "copy")
    for package in "zstandard", "datasets":
        monkeypatch.setitem(sys.modules, package, None)
        refused("arxiv", tmp_path, f"the package {package} is missing: pip install -r requirements-data.txt")


def test_column_missing(tmp_path):
    for split in "validation", "train":
        parquet(tmp_path / f"copy/data/{split}-0.parquet", [{"short_book_title": "t", "body": "x"}])
        zst(tmp_path / f"copy/arxiv/{split}/a.jsonl.zst", ['{"body": "x"}'])
    refused("pg19", tmp_path, "validation-0.parquet has no column text: is the copy whole")
    refused("arxiv", tmp_path, "validation/a.jsonl.zst has no column text: is the copy whole")


def test_column_missing_in_the_second_file(tmp_path):
    pg19_copy(tmp_path / "copy")
    parquet(tmp_path / "copy/data/train-00001-of-00003-ab12.parquet", [{"short_book_title": "t", "body": "x"}])
    refused("pg19", tmp_path, "train-00001-of-00003-ab12.parquet is damaged, or not what it should be .*text")


def test_column_without_text(tmp_path):
    for split in "validation", "train":
        parquet(tmp_path / f"copy/data/{split}-0.parquet", [{"short_book_title": "t", "text": 3}])
        zst(tmp_path / f"copy/arxiv/{split}/a.jsonl.zst", ['{"text": ["x"]}'])
    refused("pg19", tmp_path, "validation-0.parquet: a row has no text, but int in the column text")
    refused("arxiv", tmp_path, "a.jsonl.zst: a row has no text, but list in the column text")


@pytest.mark.parametrize("part", ["validation-00000-of-00001", "train-00001-of-00003"])
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_parquet_cut_off(tmp_path, part, keep):
    pg19_copy(tmp_path / "copy")
    path = tmp_path / f"copy/data/{part}-ab12.parquet"
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    refused("pg19", tmp_path, f"{part}-ab12.parquet is damaged.*fetch it again")


def test_parquet_spoiled_inside(tmp_path):
    pg19_copy(tmp_path / "copy")
    path = tmp_path / "copy/data/train-00001-of-00003-ab12.parquet"
    raw = bytearray(path.read_bytes())
    raw[4:200] = bytes(196)
    path.write_bytes(raw)
    refused("pg19", tmp_path, "train-00001-of-00003-ab12.parquet is damaged")


def test_room_for_a_copy_is_guessed_by_what_is_in_it(tmp_path, monkeypatch):
    """Not by max_tokens alone, a billion."""

    class Usage:
        free = 100_000

    for name in "pg19", "arxiv", "code":
        copy[name](tmp_path / name)
    bytes_of_books = sum(len(text("train", 10 * i + j)) for i in range(3) for j in range(7)) + sum(
        len(text("validation", j)) for j in range(7)
    )
    total = source(config("pg19", tmp_path / "pg19")).total_bytes
    assert bytes_of_books <= total <= 2 * bytes_of_books  # with lengths, and the first and last of short texts
    assert source(config("pg19", tmp_path / "pg19", max_tokens=50)).total_bytes == 50
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
    for name in "pg19", "arxiv":
        prepare(config(name, tmp_path / name), tmp_path / f"made-{name}")
    prepare(
        config("code", tmp_path / "code", languages="C", max_tokens=0), tmp_path / "made-code"
    )  # who knows how much it is
    with pytest.raises(
        UserError, match="needs about 0.2 MB more, and .* has 0.1 MB free; a smaller --max_tokens needs less"
    ):
        prepare(config("pg19", tmp_path / "pg19", min_doc_tokens=10, max_tokens=100_000), tmp_path / "other")
    Usage.free = 10_000
    for name in "pg19", "arxiv":
        with pytest.raises(UserError, match="needs about 0.[01] MB more"):
            prepare(config(name, tmp_path / name), tmp_path / f"other-{name}")


@pytest.mark.parametrize("part", ["validation/arXiv_000", "train/arXiv_002"])
@pytest.mark.parametrize("keep", [0.01, 0.5, 0.99])
def test_zst_cut_off(tmp_path, part, keep):
    """By default, fsspec takes what is there for the whole file."""
    arxiv_copy(tmp_path / "copy")
    path = tmp_path / f"copy/arxiv/{part}.jsonl.zst"
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    refused("arxiv", tmp_path, f"{part}.jsonl.zst is damaged.*fetch it again")


def test_zst_that_is_none_and_lines_that_are_no_json(tmp_path):
    arxiv_copy(tmp_path / "copy")
    path = tmp_path / "copy/arxiv/train/arXiv_001.jsonl.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd" + b"not zstd " * 9)
    refused("arxiv", tmp_path, "arXiv_001.jsonl.zst is damaged.*Zstd")
    for lines in ['{"text": "cut o'], ["[1]"]:
        zst(path, lines)
        refused("arxiv", tmp_path, "arXiv_001.jsonl.zst is damaged")
