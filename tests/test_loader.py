"""The loader: batches as pure functions of their numbers, fixed validation windows, and every broken corpus refused."""

import hashlib
import json
import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from configurator import UserError
from data import corpus as corpus_module
from data import loader
from data.corpus import Texts, write_corpus
from data.loader import Epoch, TextChanged, load_corpus
from data.tokenizer import tokenizer_from_meta

BYTE = tokenizer_from_meta({"name": "byte"})


def make(folder, train=1000, val=300, dtype="uint16", vocab_size=1000, **changes):
    """A corpus whose n-th token is n (training) or 500 + n (validation), with changes to its meta.json."""
    folder.mkdir(parents=True, exist_ok=True)
    np.arange(train).astype(dtype).tofile(folder / "train.bin")
    np.arange(500, 500 + val).astype(dtype).tofile(folder / "val.bin")
    meta = {
        "vocab_size": vocab_size,
        "dtype": dtype,
        "tokenizer": {"name": "byte"},
        "train_tokens": train,
        "val_tokens": val,
    } | changes
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


# -- batches -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_batch_is_windows_and_the_same_shifted(tmp_path, dtype):
    offset = 0 if dtype == "uint16" else 70_000
    make(tmp_path, dtype=dtype, vocab_size=1000 + offset)
    (np.arange(1000) + offset).astype(dtype).tofile(tmp_path / "train.bin")
    x, y, documents = load_corpus(tmp_path, 16).batch(5, seed=1, first=55)
    assert documents is None
    for tokens in x, y:
        assert tokens.shape == (5, 16) and tokens.dtype == torch.int64 and tokens.is_contiguous()
    assert torch.equal(y, x + 1)
    assert (
        sum(torch.equal(row, row[:1] + torch.arange(16)) for row in x) >= 4
    )  # all but the one that an epoch ends with
    assert len(set(x[:, 0].tolist())) == 5


def test_batch_is_a_pure_function(tmp_path):
    corpus = load_corpus(make(tmp_path), 16)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    first = corpus.batch(4, 7, 48)
    for other in (8, 48), (7, 52), (7, 49), (48, 7):
        assert not torch.equal(corpus.batch(4, *other)[0], first[0])
        corpus.val_batch(corpus.val_windows(3))
    assert torch.equal(load_corpus(tmp_path, 16).batch(4, 7, 48)[0], first[0])
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_batch_is_the_same_on_every_machine_and_version(tmp_path):
    assert load_corpus(make(tmp_path), 16).batch(4, 1337, 0)[0][:, 0].tolist() == [84, 196, 324, 20]


def test_an_epoch_takes_each_token_once(tmp_path):
    """In any order of asking; and other epochs cut elsewhere."""
    corpus = load_corpus(make(tmp_path), 16)
    epochs = []
    for epoch in range(3):
        batches = [corpus.batch(3, 5, first)[0] for first in range(63 * epoch, 63 * epoch + 63, 3)]
        seen = torch.cat(batches).flatten().bincount()  # 63 windows: 62 whole ones, and the rest
        assert len(seen) == 999 and seen.min() == 1 and (seen - 1).sum() == 63 * 16 - 999
        epochs.append(sorted(torch.cat(batches)[:, 0].tolist()))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    straddling = corpus.batch(4, 5, 60)[0]  # windows 60 to 63: the last is of another epoch
    assert torch.equal(straddling[:3], corpus.batch(3, 5, 60)[0])
    assert torch.equal(straddling[3:], corpus.batch(1, 5, 63)[0])


def test_order_does_not_depend_on_the_size_of_batches(tmp_path):
    corpus = load_corpus(make(tmp_path), 16)
    one_by_one = torch.cat([corpus.batch(1, 5, n)[0] for n in range(24)])
    assert torch.equal(torch.cat([corpus.batch(2, 5, n)[0] for n in range(0, 24, 2)]), one_by_one)


@pytest.mark.parametrize("seed", range(300))
def test_windows_lie_within_documents(seed):
    """Of documents of any lengths: each token is once in an epoch, but for less than one window; a window is of
    stretches of single documents; and a document has as many windows of its own as it has room for.
    """
    draw = np.random.default_rng(seed)
    lengths = draw.integers(0, 60, draw.integers(1, 8))
    T = int(draw.integers(1, 1 + min(40, lengths.sum()))) if lengths.sum() else 1
    documents, owner = np.concatenate([[0], lengths.cumsum()]), np.repeat(np.arange(len(lengths)), lengths)
    epochs = [Epoch(documents, T, seed, number) for number in (0, 1)]
    windows = [[epoch[n] for n in range(len(epoch))] for epoch in epochs]
    assert len(windows[0]) == len(windows[1]) == -(-lengths.sum() // T) if lengths.sum() else not windows[0]
    for epoch in windows:
        seen = np.zeros(lengths.sum(), int)
        for window in epoch:
            assert sum(length for _, length in window) == T
            for start, length in window:
                assert length > 0 and start >= 0 and len(set(owner[start : start + length])) == 1
                seen[start : start + length] += 1
        if len(seen):
            assert seen.min() == 1 and (seen - 1).sum() < T
        whole = [owner[window[0][0]] for window in epoch if len(window) == 1]
        assert all(whole.count(i) >= length // T for i, length in enumerate(lengths))


def test_what_is_left_of_documents_is_shuffled():
    """Else a window of short documents would always have the same neighbours."""
    documents = np.arange(0, 3001, 3)  # none is long enough for a window
    orders = [
        [start for n in range(len(epoch)) for start, _ in epoch[n]]
        for epoch in (Epoch(documents, 100, 1, n) for n in (0, 1))
    ]
    assert sorted(set(orders[0])) != orders[0] != orders[1]
    for epoch in Epoch(documents, 100, 1, 0), Epoch(documents, 100, 1, 1):
        neighbours = [b[0] - a[0] == 3 for n in range(len(epoch)) for a, b in zip(epoch[n], epoch[n][1:])]
        assert len(neighbours) > 900 and sum(neighbours) < 20


def test_two_epochs_are_held_at_most(tmp_path):
    corpus = load_corpus(make(tmp_path), 16)
    for first in (0, 186, 189, 600, 30, 1500):
        corpus.batch(3, 5, first)
        assert 1 <= len(corpus._epochs) <= 2


def documents_of(folder, lengths, val_lengths=(300,)):
    make(folder, sum(lengths), sum(val_lengths), train_documents=len(lengths), val_documents=len(val_lengths))
    for split, of_split in ("train", lengths), ("val", val_lengths):
        np.cumsum(of_split).astype(np.uint64).tofile(folder / f"{split}_ends.bin")
    return folder


def test_batches_within_documents(tmp_path):
    corpus = load_corpus(documents_of(tmp_path, [100, 7, 500, 3, 390]), 64, "document")
    x, y, _ = corpus.batch(16, 1, 0)
    assert torch.equal(y, x + 1)  # the token after, also where a stretch ends
    whole = [row for row in x if torch.equal(row, row[:1] + torch.arange(64))]
    assert len(whole) >= 1 + 7 + 6
    assert not any(row[0] < end <= row[-1] for row in whole for end in (100, 107, 607, 610))


@pytest.mark.parametrize(
    "lengths, starts", [((300,), [0, 64, 192]), ((70, 60, 170), [0, 130, 194]), ((60,) * 5, [0, 117, 235])]
)
def test_validation_within_documents(tmp_path, lengths, starts):
    """Evenly spread over the windows that documents have; over the stream where no document has one."""
    corpus = load_corpus(documents_of(tmp_path, [200], lengths), 64, "document")
    assert corpus.val_windows(3).tolist() == starts
    corpus.val_batch(starts)


@pytest.mark.parametrize("size", [None, 7, 16])
def test_within_documents_needs_their_ends(tmp_path, size):
    documents_of(tmp_path, [100, 200, 300])
    (tmp_path / "train_ends.bin").unlink()
    if size is not None:
        (tmp_path / "train_ends.bin").write_bytes(bytes(size))
    with pytest.raises(UserError, match="no train_ends.bin that fits: run python .*; or set --windows=packed"):
        load_corpus(tmp_path, 64, "document")
    load_corpus(tmp_path, 64)


def test_seeds_up_to_63_bits(tmp_path):
    corpus = load_corpus(make(tmp_path), 16)
    assert not torch.equal(corpus.batch(4, 2**63 - 1, 0)[0], corpus.batch(4, 2**32 - 1, 0)[0])


# -- validation --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "count, starts",
    [(1, [0]), (2, [0, 283]), (5, [0, 70, 141, 212, 283]), (284, list(range(284))), (10**6, list(range(284)))],
)
def test_val_windows_are_spread_evenly(tmp_path, count, starts):
    assert load_corpus(make(tmp_path), 16).val_windows(count).tolist() == starts


def test_val_windows_when_there_is_just_one(tmp_path):
    corpus = load_corpus(make(tmp_path, val=17), 16)
    assert corpus.val_windows(20).tolist() == [0]
    assert corpus.val_batch([0])[1].tolist() == [list(range(501, 517))]


@pytest.mark.parametrize("count", [3, 7, 100, 283])
def test_val_windows_are_distinct(tmp_path, count):
    assert len(set(load_corpus(make(tmp_path), 16).val_windows(count).tolist())) == count


def test_val_batch(tmp_path):
    corpus = load_corpus(make(tmp_path), 16)
    x, y, _ = corpus.val_batch(corpus.val_windows(2))
    assert x[:, 0].tolist() == [500, 783] and y[-1, -1] == 799
    assert x.shape == y.shape == (2, 16) and torch.equal(y, x + 1)


# -- load_corpus -------------------------------------------------------------------------------


def test_load(tmp_path):
    corpus = load_corpus(make(tmp_path), 16)
    assert (corpus.vocab_size, corpus.tokenizer_meta) == (1000, {"name": "byte"})
    assert (corpus.train_tokens, corpus.val_tokens) == (1000, 300)


def test_nanogpt_corpus_without_meta(tmp_path, capsys):
    (make(tmp_path) / "meta.json").unlink()
    corpus = load_corpus(tmp_path, 16)
    assert (corpus.vocab_size, corpus.tokenizer_meta, corpus.train_tokens) == (50304, {"name": "gpt2"}, 1000)
    assert "no meta.json" in capsys.readouterr().out
    assert corpus.batch(2, 0, 0)[0].shape == (2, 16)


def test_odd_nanogpt_corpus(tmp_path):
    (make(tmp_path) / "meta.json").unlink()
    (tmp_path / "val.bin").write_bytes(bytes(301))
    with pytest.raises(UserError, match="val.bin"):
        load_corpus(tmp_path, 16)


def test_pickled_meta_is_refused(tmp_path):
    (make(tmp_path) / "meta.json").rename(tmp_path / "meta.pkl")
    with pytest.raises(UserError, match="a pickle is not read.*run python"):
        load_corpus(tmp_path, 16)


def test_missing_data_set_tells_what_there_is(tmp_path):
    make(tmp_path / "books")
    for name in "stdlib", "text", "pg19":  # stdlib is made when it is wanted; pg19 was never made
        (tmp_path / name).mkdir()
        (tmp_path / name / "prepare.py").touch()
    with pytest.raises(UserError) as error:
        load_corpus(tmp_path / "book", 16)
    assert str(error.value) == (
        f"{tmp_path}/book has no train.bin and no val.bin: run python {tmp_path}/text/prepare.py "
        f"--input=FILE_OR_FOLDER --out=book; or choose another data set of {tmp_path}: books, stdlib"
    )
    with pytest.raises(UserError, match=r"run python \S+/stdlib/prepare.py; or .*: books$"):
        load_corpus(tmp_path / "stdlib", 16)
    with pytest.raises(UserError, match=r"run python \S+/text/prepare.py --input=FILE_OR_FOLDER --out=NAME"):
        load_corpus(tmp_path / "text", 16)


DATA = Path(loader.__file__).parent


def test_a_path_in_place_of_a_name(tmp_path):
    """--dataset=data/stdlib is sought as data/data/stdlib. A command that is told exists."""
    with pytest.raises(UserError, match=r"has no train.bin and no val.bin; did you mean --dataset=stdlib\?$"):
        load_corpus(DATA / "data" / "stdlib", 16)
    long = DATA / ("x" * 300) / "books"
    for folder, name in (tmp_path / "books", "books"), (DATA / "data" / "text", "NAME"), (long, "books"):
        with pytest.raises(UserError) as error:
            load_corpus(folder, 16)
        script = DATA / "text" / "prepare.py"
        assert f"run python {script} --input=FILE_OR_FOLDER --out={name}, and give --dataset={name}" in str(error.value)


@pytest.mark.parametrize("gone", ["train", "val"])
def test_one_file_missing(tmp_path, gone):
    (make(tmp_path) / f"{gone}.bin").unlink()
    with pytest.raises(UserError, match=f"has no {gone}.bin: run python"):
        load_corpus(tmp_path, 16)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("size", [0, 199, 10_000])
def test_size_differs_from_meta(tmp_path, split, size):
    (make(tmp_path) / f"{split}.bin").write_bytes(bytes(size))
    with pytest.raises(UserError, match=f"{split}.bin has {size:,} bytes, but meta.json says"):
        load_corpus(tmp_path, 16)


@pytest.mark.parametrize("train, val, name", [(16, 300, "train"), (1000, 16, "val"), (1000, 3, "val")])
def test_too_short_for_the_block(tmp_path, train, val, name):
    make(tmp_path, train, val)
    with pytest.raises(UserError, match=rf"{name}.bin has \d+ tokens.*block_size=16.*below {min(train, val)}"):
        load_corpus(tmp_path, 16)
    load_corpus(tmp_path, min(train, val) - 1)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", '{"vocab_size": 5}', "\udcff"])
def test_meta_which_is_none(tmp_path, text):
    (make(tmp_path) / "meta.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match="meta.json is no corpus's meta data: run python"):
        load_corpus(tmp_path, 16)


@pytest.mark.parametrize(
    "changes", [{"dtype": "float32"}, {"vocab_size": "many"}, {"tokenizer": "gpt2"}, {"train_tokens": None}]
)
def test_meta_with_a_bad_value(tmp_path, changes):
    with pytest.raises(UserError, match="meta.json is no corpus's meta data"):
        load_corpus(make(tmp_path, **changes), 16)


def with_checksums(folder):
    make(folder)
    sums = {
        f"{split}_sha256": hashlib.sha256((folder / f"{split}.bin").read_bytes()).hexdigest()
        for split in ("train", "val")
    }
    return make(folder, **sums)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_file_that_is_not_what_was_written(tmp_path, split):
    load_corpus(with_checksums(tmp_path), 16)
    load_corpus(tmp_path, 16)
    with open(tmp_path / f"{split}.bin", "r+b") as file:
        file.seek(100)
        file.write(b"\xff")
    for _ in range(2):
        with pytest.raises(UserError, match=rf"{split}.bin is not what was written there.*checksum.*run python"):
            load_corpus(tmp_path, 16)


def test_checksums_are_looked_at_once(tmp_path, monkeypatch):
    looked = []
    checksums = corpus_module._checksums
    monkeypatch.setattr(
        corpus_module, "_checksums", lambda folder, sizes: looked.extend(sizes) or checksums(folder, sizes)
    )
    with_checksums(tmp_path)
    for _ in range(3):
        load_corpus(tmp_path, 16)
    assert looked == ["train.bin", "val.bin"]
    os.utime(tmp_path / "val.bin")
    load_corpus(tmp_path, 16)
    assert looked[2:] == ["train.bin", "val.bin"]
    (tmp_path / "checked.json").write_text("{")
    load_corpus(tmp_path, 16)
    assert len(looked) == 6


# -- while training runs -----------------------------------------------------------------------


def test_id_outside_the_vocabulary(tmp_path):
    load_corpus(make(tmp_path, vocab_size=800), 16).val_batch([283])  # ids up to 799
    corpus = load_corpus(make(tmp_path, vocab_size=799), 16)
    with pytest.raises(UserError, match="val.bin has the token id 799, but its vocabulary is 799"):
        corpus.val_batch([283])
    with pytest.raises(UserError, match=r"train.bin has the token id \d+, but its vocabulary is 799"):
        for n in range(100):
            corpus.batch(8, 0, 8 * n)


@pytest.mark.parametrize("size", [0, 1, 100, 600])
def test_a_file_that_is_written_to_is_refused(tmp_path, size):
    """In place, as cp does: the bytes that were opened are gone."""
    corpus = load_corpus(make(tmp_path), 16)
    (tmp_path / "val.bin").write_bytes(bytes(size))
    with pytest.raises(TextChanged, match="val.bin has changed since training began"):
        corpus.val_batch(corpus.val_windows(3))


@pytest.mark.parametrize("windows", ["packed", "document"])
def test_a_corpus_prepared_anew_does_not_reach_a_run_that_reads_the_old_one(tmp_path, windows):
    def prepare(*texts):
        write_corpus(tmp_path, Texts([(t, t * 300) for t in texts], [("v", texts[0] * 300)], {}), BYTE)

    prepare("ab", "cd")
    corpus, untouched = load_corpus(tmp_path, 16, windows), load_corpus(tmp_path, 16, windows)
    want = [untouched.batch(4, 1, 4 * n)[0] for n in range(40)], untouched.val_batch([0])[0]  # more than an epoch
    corpus.batch(4, 1, 0)
    prepare("xyz")
    assert all(torch.equal(corpus.batch(4, 1, 4 * n)[0], x) for n, x in enumerate(want[0]))
    assert torch.equal(corpus.val_batch([0])[0], want[1]) and corpus.checksums == untouched.checksums
    assert load_corpus(tmp_path, 16, windows).val_batch([0])[0].tolist() != want[1].tolist()


def test_a_corpus_goes_to_another_process(tmp_path):
    corpus = load_corpus(make(tmp_path), 16)
    assert torch.equal(pickle.loads(pickle.dumps(corpus)).batch(2, 0, 6)[0], corpus.batch(2, 0, 6)[0])
