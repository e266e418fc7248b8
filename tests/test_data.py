"""What a user can rely on about the data: which tokens, in which order, and what is said about bad input."""

from __future__ import annotations

import csv
import functools
import itertools
import json
import multiprocessing
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import data
from args import ConfigError, TrainArgs
from data import FILLER, IGNORED, Collator, EpochSampler, PreparedData, TokenRows

REAL_DATA = Path(os.environ.get("CLM_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
WIKITEXT = REAL_DATA / "wikitext-2-raw" / "wiki.valid.raw"
WIKITEXT_TRAIN = REAL_DATA / "wikitext-2" / "wiki.train.tokens"
NETFLIX = REAL_DATA / "netflix" / "netflix_titles.csv"
needs_real_data = pytest.mark.skipif(not WIKITEXT.exists(), reason="needs the real texts (CLM_TEST_DATA)")

START = 2  # </s>
WORDS = ["the", "cat", "and", "a", "dog", "sat", "on", "mats", "in", "rain"]


def make_tokenizer(kind: str = "OPT") -> Any:
    """Return the real OPT tokenizer, or a small one of its kind: byte-level BPE that puts `</s>` in front."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    if kind == "OPT" and (REAL_DATA / "opt-tokenizer").exists():
        return AutoTokenizer.from_pretrained(REAL_DATA / "opt-tokenizer")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        special_tokens=["<s>", "<pad>", "</s>"],
        vocab_size=300,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    # " a" has to become a token of its own, as it is in OPT's.
    tokenizer.train_from_iterator(["the cat and the dog sat on the mat in the rain" + 9 * " a"], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", START)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="</s>", eos_token="</s>", pad_token="<pad>")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture
def prepare(tokenizer: Any, tmp_path: Path) -> Callable[..., PreparedData]:
    """Return `data.prepare` with the settings a test does not care about."""

    def call(*, global_batch_size: int = 4, vocab_size: int = 50272, max_positions: int = 2048, **flags: Any):
        args = TrainArgs(**{"cache_dir": str(tmp_path / "cache"), "block_size": 32, **flags})
        return data.prepare(
            args,
            tokenizer=tokenizer,
            vocab_size=vocab_size,
            max_positions=max_positions,
            global_batch_size=global_batch_size,
        )

    return call


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], str]:
    def call(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return call


def all_rows(rows: TokenRows | None) -> list[list[int]]:
    assert rows is not None
    return [rows[index].tolist() for index in range(len(rows))]


def stream(rows: TokenRows | None) -> list[int]:
    return [token for row in all_rows(rows) for token in row]


def words(count: int, seed: int = 0) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=count))


class FixedRows(TokenRows):
    """Rows that hold their own index, of given lengths."""

    def __init__(self, num_rows: int, lengths: list[int] | None = None) -> None:
        total = sum(lengths) if lengths else 4 * num_rows
        super().__init__(
            data.DataInfo("fixed", "train", total, 0, num_rows), None if lengths is None else np.array(lengths)
        )

    def _row(self, index: int) -> np.ndarray:
        return np.full(4 if self.lengths is None else self.lengths[index], index)


# Packing


@needs_real_data
@pytest.mark.parametrize("path", [WIKITEXT, WIKITEXT_TRAIN], ids=["raw", "unk"])
def test_packed_tokens_are_those_of_the_whole_text_tokenized_in_one_piece(path, prepare, write, tokenizer):
    text = path.read_text(encoding="utf-8")[:1_200_000]
    rows = prepare(train_file=write("text.txt", text), block_size=1024, validation_split_percentage=0).train
    whole = tokenizer(text).input_ids
    assert stream(rows) == whole[: rows.info.num_tokens]
    assert rows.info.num_tokens + rows.info.dropped_tokens == len(whole)
    assert len(list(data.pieces([text], tokenizer))) > 200


@pytest.mark.parametrize("kind", ["OPT", "small"])
def test_text_is_cut_only_where_the_tokens_stay_the_same(kind, monkeypatch):
    tokenizer = make_tokenizer(kind)
    monkeypatch.setattr(data, "PIECE", re.compile(data.PIECE.pattern.replace("4095", "3"), re.DOTALL))
    parts = [
        " ",
        "  ",
        "\n",
        " \n",
        "\r\n",
        "\t",
        "\u00a0",
        "\u2003",
        "\x1c",
        "\x85",
        "a",
        "I'll",
        "'s",
        "9",
        "é",
        "中文",
    ]
    parts += ["🙂", "e\u0301", "</s>", "<pad>", ".", "...", "-", "cat"]
    for seed in range(300):
        chunks = random.Random(seed).choices(parts, k=60)
        cut = list(data.pieces(iter(chunks), tokenizer))
        ids = [token for piece in cut for token in tokenizer(piece, add_special_tokens=False).input_ids]
        assert ids == tokenizer("".join(chunks), add_special_tokens=False).input_ids
        assert len(cut) > 1 and "".join(cut) == "".join(chunks)


def test_a_tokenizer_that_may_join_across_spaces_gets_the_text_in_one_piece():
    from tokenizers import AddedToken, normalizers, pre_tokenizers

    changes: list[Callable[[Any], Any]] = [
        lambda backend: setattr(backend, "normalizer", normalizers.NFC()),
        lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.Metaspace()),
        lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
        lambda backend: backend.add_tokens([AddedToken("<mask>", rstrip=True)]),
        lambda backend: backend.add_tokens([AddedToken("New York")]),
    ]
    text = words(5000)
    assert len(list(data.pieces([text], make_tokenizer("small")))) > 1
    for change in changes:
        tokenizer = make_tokenizer("small")
        change(tokenizer.backend_tokenizer)
        assert list(data.pieces([text[:100], text[100:]], tokenizer)) == [text]


@pytest.mark.parametrize("extra", [0, 1, 31])
def test_the_remainder_is_dropped_and_counted(extra, prepare, write, tokenizer):
    ids = tokenizer(" a" * (4 * 32 - 1 + extra)).input_ids
    rows = prepare(train_file=write("text.txt", " a" * (4 * 32 - 1 + extra)), validation_split_percentage=0).train
    assert len(ids) == 4 * 32 + extra
    assert all_rows(rows) == [ids[start : start + 32] for start in range(0, 4 * 32, 32)]
    assert rows.info == data.DataInfo(rows.info.name, "train", 4 * 32, extra, 4)


def test_a_text_file_is_taken_as_it_stands_without_its_byte_order_mark(prepare, write, tokenizer):
    text = "one\r\n\r\n" + words(100) + "\n \ttwo <unk> </s> three"
    path = write("text.raw", b"\xef\xbb\xbf" + text.encode())
    rows = prepare(train_file=path, block_size=10, validation_split_percentage=0).train
    assert stream(rows) == tokenizer(text).input_ids[: rows.info.num_tokens]


def test_rows_of_a_table_are_joined_by_a_blank_line(prepare, write, tokenizer):
    texts = [words(1 + number % 7, number) for number in range(2500)] + ["", "end"]
    path = write("table.jsonl", "\n".join(json.dumps({"text": text}) for text in texts))
    rows = prepare(train_file=path, validation_split_percentage=0).train
    assert stream(rows) == tokenizer("\n\n".join(texts)).input_ids[: rows.info.num_tokens]


def test_the_end_of_the_stream_is_held_out_where_there_is_no_validation_file(prepare, write):
    path = write("text.txt", words(3000))
    whole = prepare(train_file=path, validation_split_percentage=0).train
    parts = prepare(train_file=path, validation_split_percentage=10)
    assert stream(parts.train) + stream(parts.validation) == stream(whole)
    assert len(parts.validation) == round(len(whole) / 10)
    assert parts.train.info.dropped_tokens == 0
    assert parts.validation.info.dropped_tokens == whole.info.dropped_tokens > 0


def test_zero_percent_holds_nothing_out(prepare, write):
    prepared = prepare(train_file=write("text.txt", words(500)), validation_split_percentage=0)
    assert prepared.validation is None


@pytest.mark.parametrize("percentage", [0.01, 50, 99])
def test_two_blocks_give_one_to_train_on_and_one_to_evaluate_on(percentage, prepare, write):
    path = write("text.txt", " a" * (2 * 32 - 1))
    prepared = prepare(train_file=path, validation_split_percentage=percentage)
    assert (len(prepared.train), len(prepared.validation)) == (1, 1)


def test_a_validation_file_leaves_the_training_file_whole(prepare, write):
    train, other = write("train.txt", words(500)), write("other.txt", words(400, seed=1))
    prepared = prepare(train_file=train, validation_file=other)
    assert stream(prepared.train) == stream(prepare(train_file=train, validation_split_percentage=0).train)
    assert stream(prepared.validation) == stream(prepare(train_file=other, validation_split_percentage=0).train)
    assert prepared.validation.info.split == "validation"


def test_sample_limits_take_the_first_rows(prepare, write):
    path = write("text.txt", words(3000))
    whole = prepare(train_file=path, validation_split_percentage=10)
    prepared = prepare(train_file=path, validation_split_percentage=10, max_train_samples=3, max_eval_samples=2)
    assert all_rows(prepared.train) == all_rows(whole.train)[:3]
    assert all_rows(prepared.validation) == all_rows(whole.validation)[:2]
    assert prepared.train.info.num_tokens == 3 * 32


def test_blocks_are_cut_to_the_positions_of_the_model(prepare, write, caplog):
    rows = prepare(train_file=write("text.txt", words(500)), block_size=4096, max_positions=64).train
    assert len(rows[0]) == 64
    assert caplog.messages == ["--block_size 4096 is cut to 64, the positions the model has"]


def test_the_protocol_says_how_the_perplexity_was_made(prepare, write):
    protocol = prepare(train_file=write("text.txt", words(500))).protocol
    for part in ("the file's text", "one leading </s>", "non-overlapping blocks of 32", "exp of the mean negative"):
        assert part in protocol


# Rows


@needs_real_data
def test_every_netflix_description_becomes_one_row_between_two_end_tokens(prepare, tokenizer):
    rows = prepare(dataset="netflix", train_file=str(NETFLIX), validation_split_percentage=0, block_size=512).train
    with open(NETFLIX, encoding="utf-8", newline="") as file:
        texts = [row["description"] for row in csv.DictReader(file)]
    assert len(rows) == len(texts) == 8807
    assert all_rows(rows) == [[START, *ids, START] for ids in tokenizer(texts, add_special_tokens=False).input_ids]
    assert not any(START in row[1:-1] for row in all_rows(rows))
    assert rows.lengths.tolist() == [len(row) for row in all_rows(rows)]
    assert rows.info.num_tokens == sum(rows.lengths)


def test_long_rows_are_cut_between_their_end_tokens_and_the_cut_is_counted(prepare, write, tokenizer):
    path = write("rows.txt", "a a a a a a a a\na a\n")
    rows = prepare(dataset="netflix", train_file=path, block_size=6, validation_split_percentage=0).train
    long, short = (tokenizer(text, add_special_tokens=False).input_ids for text in ("a a a a a a a a", "a a"))
    assert all_rows(rows) == [[START, *long[:4], START], [START, *short, START]]
    assert rows.info.dropped_tokens == len(long) - 4


def table_writers() -> dict[str, Callable[[Path, list[dict[str, Any]]], Any]]:
    def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["id", "description"])
            writer.writeheader()
            writer.writerows(rows)

    return {
        "csv": write_csv,
        "json": lambda path, rows: path.write_text("\ufeff" + json.dumps(rows, indent=1), encoding="utf-8"),
        "jsonl": lambda path, rows: path.write_text("\n\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8"),
        "JSON": lambda path, rows: path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8"),
        "parquet": lambda path, rows: pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path),
    }


@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl", "JSON", "parquet"])
def test_every_kind_of_table_gives_the_same_rows_and_empty_texts_are_left_out(suffix, prepare, tmp_path, tokenizer):
    texts = ['A cat, a "dog"', None, "two\nlines é", "", " \n", "NA", "last"]
    path = tmp_path / f"table.{suffix}"
    table_writers()[suffix](path, [{"id": 1, "description": text} for text in texts])
    rows = prepare(dataset="netflix", train_file=str(path), validation_split_percentage=0).train
    kept = [text for text in texts if text and text.strip()]
    assert all_rows(rows) == [[*tokenizer(text).input_ids, START] for text in kept]


def test_an_article_of_a_csv_may_be_long(prepare, write):
    path = write("table.csv", "description\n" + "a " * 100_000)
    rows = prepare(dataset="netflix", train_file=path, validation_split_percentage=0).train
    assert len(rows) == 1 and rows.info.dropped_tokens > 60_000


def test_held_out_rows_come_from_all_over_and_do_not_follow_the_seed(prepare, write):
    path = write("rows.txt", "\n".join(f"a {'b ' * number}" for number in range(200)))
    first = prepare(dataset="netflix", train_file=path, block_size=512, seed=1, validation_split_percentage=20)
    second = prepare(dataset="netflix", train_file=path, block_size=512, seed=2, validation_split_percentage=20)
    held_out = all_rows(first.validation)
    assert held_out == all_rows(second.validation) and len(held_out) == 40
    assert min(map(len, held_out)) < 50 < 150 < max(map(len, held_out))
    assert not {tuple(row) for row in held_out} & {tuple(row) for row in all_rows(first.train)}


# Synthetic tokens


def test_synthetic_rows_follow_seed_and_index_and_nothing_else(prepare):
    first, again = prepare(dataset="synthetic", seed=1), prepare(dataset="synthetic", seed=1, max_train_steps=7)
    assert (len(first.train), len(again.train), len(first.validation)) == (400, 28, 4)
    assert torch.equal(first.train[20], again.train[20])
    assert not torch.equal(first.train[20], first.train[21])
    assert not torch.equal(first.train[0], first.validation[0])
    assert not torch.equal(first.train[20], prepare(dataset="synthetic", seed=2).train[20])


def test_synthetic_tokens_follow_zipf_so_that_a_model_can_learn_them(prepare):
    rows = prepare(dataset="synthetic", vocab_size=1000, block_size=1024, max_train_samples=100).train
    counts = np.bincount(stream(rows), minlength=1000)
    assert len(counts) == 1000
    expected = 102_400 / np.arange(1, 1001) / (1 / np.arange(1, 1001)).sum()
    assert np.allclose(counts[:50], expected[:50], rtol=0.2)


def test_synthetic_rows_need_no_tokenizer():
    prepared = data.prepare(
        TrainArgs(dataset="synthetic"), tokenizer=None, vocab_size=100, max_positions=16, global_batch_size=8
    )
    assert prepared.train[0].shape == (16,) and prepared.train[0].dtype == torch.int64


# The cache


def count_tokenizings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    tokenize = data.Encoder.examples

    def counting(self: data.Encoder, source: data.Source) -> Iterator[dict[str, Any]]:
        seen.append(str(source))
        yield from tokenize(self, source)

    monkeypatch.setattr(data.Encoder, "examples", counting)
    return seen


def test_the_second_time_comes_from_the_cache_within_a_second(prepare, write, monkeypatch):
    seen = count_tokenizings(monkeypatch)
    path = write("text.txt", words(20_000))
    first = prepare(train_file=path)
    started = time.perf_counter()
    second = prepare(train_file=path)
    assert time.perf_counter() - started < 1
    assert len(seen) == 1 and stream(first.train) == stream(second.train)


def test_a_changed_text_another_block_or_another_tokenizer_is_tokenized_anew(prepare, write, monkeypatch, tmp_path):
    seen = count_tokenizings(monkeypatch)
    prepare(train_file=write("text.txt", words(500)))
    prepare(train_file=write("text.txt", words(500, seed=1) + " changed"))
    prepare(train_file=str(tmp_path / "text.txt"), block_size=16)
    args = TrainArgs(train_file=str(tmp_path / "text.txt"), cache_dir=str(tmp_path / "cache"), block_size=32)
    other = make_tokenizer("small")
    other.add_tokens(["changed"])
    data.prepare(args, tokenizer=other, vocab_size=50272, max_positions=2048, global_batch_size=1)
    assert len(seen) == 4


def test_an_earlier_call_with_padding_changes_neither_tokens_nor_cache(prepare, write, monkeypatch, tokenizer):
    seen = count_tokenizings(monkeypatch)
    path = write("text.txt", words(20_000))
    first = prepare(train_file=path, max_train_samples=5)
    tokenizer(["a", "a cat and a dog"], padding=True, truncation=True, max_length=3)
    second = prepare(train_file=path, max_train_samples=5)
    assert len(seen) == 1 and stream(first.train) == stream(second.train)


def prepare_in_a_process(rank: int, path: str, cache: str, log: str, barrier: Any) -> None:
    os.environ["RANK"] = str(rank)
    patch = pytest.MonkeyPatch()
    seen = count_tokenizings(patch)
    args = TrainArgs(train_file=path, cache_dir=cache, block_size=32)
    tokenizer = make_tokenizer()
    barrier.wait()
    prepared = data.prepare(args, tokenizer=tokenizer, vocab_size=50272, max_positions=64, global_batch_size=1)
    with open(log, "a") as file:
        file.write(f"{len(seen)} {sum(stream(prepared.train))} {len(prepared.train)}\n")


def test_of_several_ranks_one_tokenizes_and_the_others_read_its_cache(write, tmp_path):
    path, log = write("text.txt", words(200_000)), str(tmp_path / "log")
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(3)
    ranks = [
        context.Process(target=prepare_in_a_process, args=(rank, path, str(tmp_path / "cache"), log, barrier))
        for rank in range(3)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    lines = [line.split() for line in Path(log).read_text().splitlines()]
    assert sorted(count for count, *_ in lines) == ["0", "0", "1"]
    assert len({tuple(rest) for _, *rest in lines}) == 1


@pytest.mark.parametrize(("rank", "shown"), [("0", True), ("1", False)])
def test_only_the_first_rank_shows_progress(rank, shown, prepare, write, monkeypatch, capfd):
    import datasets

    monkeypatch.setenv("RANK", rank)
    prepare(train_file=write("text.txt", words(500)))
    datasets.enable_progress_bars()
    assert ("Generating" in capfd.readouterr().err) is shown


@needs_real_data
@pytest.mark.slow
def test_the_training_text_of_wikitext_takes_ten_seconds_once_and_less_than_one_afterwards(prepare):
    started = time.process_time()  # of all threads: what two idle cores take at most, also where they are not idle
    prepare(train_file=str(WIKITEXT_TRAIN), block_size=1024)
    cold = time.process_time() - started
    prepare(train_file=str(WIKITEXT_TRAIN), block_size=1024)
    warm = time.process_time() - started - cold
    assert cold < 10 and warm < 1


def test_a_start_from_the_cache_asks_no_hub(prepare, hub):
    prepare()
    hub.calls.clear()
    prepare()
    assert hub.calls == []


# The hub


class Hub:
    """Stands where `datasets.load_dataset` meets the hub; answers with small splits that name themselves."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str | None, str]] = []

    def load_dataset(self, name: str, config: str | None, *, split: str, cache_dir: str | None) -> Any:
        import datasets

        self.calls.append((name, config, split))
        column = "description" if "netflix" in name else "text"
        texts = [f" = {split} {number} = \n" if number % 3 else "" for number in range(300)]
        return datasets.Dataset.from_dict({column: texts, "other": [0] * 300})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    fake = Hub()
    monkeypatch.setattr("datasets.load_dataset", fake.load_dataset)
    monkeypatch.setattr(data, "_hub_failure", lambda name: None)
    return fake


def test_wikitext_trains_on_its_training_split_and_evaluates_on_its_validation_split(prepare, hub, tokenizer):
    prepared = prepare()
    name, config = "Salesforce/wikitext", "wikitext-2-raw-v1"
    assert sorted(hub.calls) == [(name, config, "train"), (name, config, "validation")]
    assert prepared.train.info.name == name and prepared.validation.info.split == "validation"
    text = "\n\n".join(f" = validation {number} = \n" if number % 3 else "" for number in range(300))
    assert stream(prepared.validation) == tokenizer(text).input_ids[: prepared.validation.info.num_tokens]


def test_eval_only_takes_the_test_split_and_nothing_else(prepare, hub):
    prepared = prepare(eval_only=True)
    assert hub.calls == [("Salesforce/wikitext", "wikitext-2-raw-v1", "test")]
    assert prepared.train is None and prepared.validation.info.split == "test"


def test_eval_only_on_a_file_takes_the_part_that_training_would_hold_out(prepare, write):
    path = write("text.txt", words(1000))
    prepared = prepare(train_file=path, eval_only=True)
    assert prepared.train is None
    assert stream(prepared.validation) == stream(prepare(train_file=path).validation)


def test_netflix_comes_from_the_hub_with_its_descriptions(prepare, hub):
    prepared = prepare(dataset="netflix")
    assert hub.calls == [("hugginglearners/netflix-shows", None, "train")]
    assert (len(prepared.train), len(prepared.validation)) == (190, 10)


def test_a_column_the_hub_does_not_have_is_named_beside_those_it_has(prepare, hub):
    with pytest.raises(ConfigError, match=r"no column 'body' among text, other; .* --text_column"):
        prepare(text_column="body")


def test_a_hub_that_cannot_be_reached_ends_at_once_and_says_what_to_give_instead(prepare, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    started = time.perf_counter()
    with pytest.raises(ConfigError, match=r"Salesforce/wikitext \(.*name not known.* --train_file FILE"):
        prepare()
    assert time.perf_counter() - started < 5


def test_a_hub_that_never_answers_is_given_up(prepare, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: time.sleep(30))
    monkeypatch.setattr(data, "HUB_TIMEOUT_S", 0.1)
    with pytest.raises(ConfigError, match="no answer in"):
        prepare(dataset="netflix")


def unreachable(*_: Any, **__: Any) -> None:
    raise ConnectionError("name not known")


def test_without_the_hub_a_data_set_in_the_cache_still_loads(monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    offline = []

    def load_dataset(*_: Any, **__: Any) -> str:
        import datasets

        offline.append(datasets.config.HF_HUB_OFFLINE)
        return "from the cache"

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    source, _ = data.sources(TrainArgs())
    assert data._load_from_hub(source) == "from the cache" and offline == [True]


# Bad input

LONG = "x " * data.HEAD_BYTES

BAD_BEGINNINGS: dict[str, tuple[str, bytes, str]] = {
    "unknown suffix": ("t.docx", b"text", "unknown suffix '.docx'.* .txt .raw"),
    "empty": ("t.txt", b"", "is empty"),
    "only white space": ("t.txt", b" \n\n ", "only white space"),
    "binary": ("t.txt", b"\x7fELF\x02\x00\x00", "binary, or UTF-16"),
    "UTF-16": ("t.csv", "text\nwords".encode("utf-16"), "UTF-8"),
    "Latin-1": ("t.txt", "café au lait".encode("latin-1"), "not UTF-8 text .byte 0xe9.*iconv"),
    "CSV without the column": ("t.csv", b"a,b\n1,2\n", "no column 'text' among a, b; .* --text_column"),
    "JSON lines without the column": ("t.jsonl", b'{"a": "b"}\n', "no column 'text' among a; "),
    "malformed JSON line": ("t.jsonl", b'{"text": "a",\n', "line 1 is not JSON.*one object a line"),
    "JSON that is no object": ("t.json", b'"text"\n', "line 1 is str, not an object"),
    "malformed JSON list": ("t.json", b'[{"text": "a"}', "not JSON: .*list of objects"),
    "numbers": ("t.json", b'[{"text": 5}]', "holds int .5., not text; .* --text_column"),
    "half a surrogate pair": ("t.jsonl", b'{"text": "\\ud83d"}\n', "surrogates not allowed"),
    "no parquet": ("t.parquet", b"PAR0 is something else", "expected a Parquet table"),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD_BEGINNINGS.values(), ids=BAD_BEGINNINGS)
@pytest.mark.parametrize("flag", ["train_file", "validation_file"])
def test_a_bad_file_is_found_at_its_beginning(flag, name, content, message, write):
    path = write(name, content)
    (problem,) = data.problems(TrainArgs(**{flag: path}))
    assert problem.startswith(f"--{flag} {path}: ")
    assert re.search(message, problem), problem


def test_a_parquet_file_without_the_column_is_found_at_its_beginning(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"a": ["b"]}), tmp_path / "t.parquet")
    (problem,) = data.problems(TrainArgs(train_file=str(tmp_path / "t.parquet")))
    assert "no column 'text' among a" in problem


def test_all_problems_are_told_at_once(write, tmp_path):
    found = data.problems(TrainArgs(train_file=str(tmp_path), validation_file=str(tmp_path / "missing.txt")))
    assert len(found) == 2
    assert "not a file" in found[0] and "no such file" in found[1]


def test_flags_without_use_are_refused(write):
    text = write("t.txt", "words")
    assert "reads no text" in data.problems(TrainArgs(dataset="synthetic", train_file=text))[0]
    assert "reads no text" in data.problems(TrainArgs(dataset="synthetic", text_column="text"))[0]
    assert "without columns" in data.problems(TrainArgs(train_file=text, text_column="text"))[0]
    nothing_held_out = TrainArgs(train_file=text, eval_only=True, validation_split_percentage=0)
    assert "no evaluation data" in data.problems(nothing_held_out)[0]


@pytest.mark.parametrize("name", ["t.txt", "t.csv", "t.jsonl"])
def test_good_files_have_no_problems_even_cut_in_the_middle_of_a_character(name, write):
    start = {"t.txt": "", "t.csv": "text\n", "t.jsonl": '{"text": "a"}\n{"text": "'}[name]
    content = start + "é" * data.HEAD_BYTES + ('"}' if name == "t.jsonl" else "")
    shifted = {"t.txt": "x", "t.csv": "", "t.jsonl": ""}[name] + content
    assert data.problems(TrainArgs(train_file=write(name, content))) == []
    assert data.problems(TrainArgs(train_file=write(name, shifted))) == []


BAD_LATER: dict[str, tuple[str, bytes, str]] = {
    "Latin-1": ("t.txt", LONG.encode() + "é".encode("latin-1"), "not UTF-8 text"),
    "malformed JSON line": ("t.jsonl", b'{"text": "a"}\n' * 6000 + b"{", "line 6001 is not JSON"),
    "malformed JSON list": ("t.json", b"[" + b'{"text": "a"},' * 6000, "not JSON: .*line 1 column"),
    "deep JSON": ("t.json", b"[" * 100_000, "recursion"),
    "unended quote": ("t.csv", b"text\n" + b"a\n" * 40000 + b'"b\n', "line 4000[12]: unexpected end"),
    "number": ("t.jsonl", b'{"text": "a"}\n' * 6000 + b'{"text": 7}', "holds int .7."),
    "short text": ("t.txt", b" a" * 20, "21 tokens, shorter than one block of 32; .*--block_size 21"),
    "one block": ("t.txt", b" a" * 40, "1 block of 32 tokens, .*--validation_split_percentage 0"),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD_LATER.values(), ids=BAD_LATER)
def test_what_is_wrong_further_on_is_one_clear_error(name, content, message, prepare, write):
    path = write(name, content)
    assert data.problems(TrainArgs(train_file=path)) == []
    with pytest.raises(ConfigError, match=f"^--train_file {re.escape(path)}: .*{message}"):
        prepare(train_file=path)


def test_a_short_validation_file_is_named_by_its_own_flag(prepare, write):
    with pytest.raises(ConfigError, match=r"^--validation_file .*shorter than one block"):
        prepare(train_file=write("train.txt", words(500)), validation_file=write("v.txt", "few words"))


def test_a_table_with_empty_texts_only_is_an_error(prepare, write):
    path = write("t.csv", "description,b\n,1\n ,2\n")
    with pytest.raises(ConfigError, match="no row with text"):
        prepare(dataset="netflix", train_file=path)


def test_bad_arguments_are_refused_before_anything_is_read(prepare, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_tokenized", None)
    with pytest.raises(ConfigError, match="no such file") as caught:
        prepare(train_file=str(tmp_path / "a.txt"), validation_file=str(tmp_path / "b.txt"))
    assert len(caught.value.problems) == 2


def test_a_tokenizer_larger_than_the_model_is_an_error(prepare, write):
    with pytest.raises(ConfigError, match=r"--tokenizer_name .*: \d+ entries, but the model's embedding has 200"):
        prepare(train_file=write("t.txt", words(100)), vocab_size=200)


def test_a_cache_that_cannot_be_written_is_named(prepare, write):
    with pytest.raises(ConfigError, match=r"--cache_dir .*; give a folder that can be written"):
        prepare(train_file=write("t.txt", words(100)), cache_dir=write("file", "in the way"))


# Order


def rank_orders(rows: TokenRows, num_replicas: int, batch_size: int, **options: Any) -> list[list[int]]:
    """Return the indices each rank gets in an epoch."""
    settings: dict[str, Any] = {"shuffle": True, "seed": 1, "group_by_length": rows.lengths is not None, **options}
    epoch, start = settings.pop("epoch", 0), settings.pop("start", 0)
    samplers = [
        EpochSampler(rows, num_replicas, rank, batch_size=batch_size, **settings) for rank in range(num_replicas)
    ]
    for sampler in samplers:
        sampler.set_epoch(epoch, start=start)
    orders = [list(sampler) for sampler in samplers]
    assert [len(sampler) for sampler in samplers] == [len(order) for order in orders]
    return orders


def micro_batches(orders: list[list[int]], batch_size: int) -> list[set[int]]:
    """Return the rows that all ranks together take in each micro-batch."""
    return [
        {index for order in orders for index in order[start : start + batch_size]} - {FILLER}
        for start in range(0, len(orders[0]), batch_size)
    ]


LENGTHS = [3 + (7 * number) % 29 for number in range(101)]


@pytest.mark.parametrize("num_rows", [1, 7, 96, 101])
@pytest.mark.parametrize("num_replicas", [1, 2, 3, 4])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("grouped", [True, False])
def test_the_ranks_together_take_every_row_once_in_equally_many_batches(num_rows, num_replicas, shuffle, grouped):
    rows = FixedRows(num_rows, LENGTHS[:num_rows] if grouped else None)
    orders = rank_orders(rows, num_replicas, 5, shuffle=shuffle)
    interleaved = [index for together in zip(*orders, strict=True) for index in together]
    assert sorted(interleaved[:num_rows]) == list(range(num_rows))
    assert set(interleaved[num_rows:]) <= {FILLER} and len(interleaved) - num_rows < 5 * num_replicas
    assert len(orders[0]) % 5 == 0


@pytest.mark.parametrize("grouped", [True, False])
def test_a_step_takes_the_same_rows_however_ranks_and_accumulation_share_it(grouped):
    rows = FixedRows(101, LENGTHS if grouped else None)
    steps = {}
    for num_replicas, accumulation in [(1, 1), (1, 4), (2, 1), (2, 2), (4, 1), (4, 2)]:
        batch_size = 8 // num_replicas // accumulation
        parts = micro_batches(rank_orders(rows, num_replicas, batch_size, global_batch_size=8), batch_size)
        groups = [parts[start : start + accumulation] for start in range(0, len(parts), accumulation)]
        steps[num_replicas, accumulation] = [set().union(*group) for group in groups]
    assert all(order == steps[1, 1] for order in steps.values())
    assert [len(step) for step in steps[1, 1]] == [8] * 12 + [5]


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["packed", "grouped"])
def test_epochs_and_seeds_differ_and_the_same_ones_repeat(lengths):
    rows = FixedRows(101, lengths)
    orders = {
        (seed, epoch): tuple(rank_orders(rows, 1, 4, seed=seed, epoch=epoch)[0]) for seed in (0, 1) for epoch in (0, 1)
    }
    assert len(set(orders.values())) == 4
    assert tuple(rank_orders(rows, 1, 4, seed=0, epoch=1)[0]) == orders[0, 1]


def test_a_resumed_epoch_takes_exactly_the_rows_that_are_left():
    whole = micro_batches(rank_orders(FixedRows(101), 2, 4, epoch=3), 4)
    rest = micro_batches(rank_orders(FixedRows(101), 2, 4, epoch=3, start=40), 4)
    assert rest == whole[5:]
    assert rank_orders(FixedRows(101), 2, 4, start=101) == [[], []]


def test_grouping_by_length_keeps_most_padding_away():
    rng = np.random.default_rng(0)
    lengths = rng.integers(10, 80, 2000).tolist()

    def padded(**options: Any) -> int:
        steps = micro_batches(rank_orders(FixedRows(2000, lengths), 1, 16, **options), 16)
        return sum(len(step) * max(lengths[index] for index in step) for step in steps)

    assert padded(group_by_length=False) > 1.5 * sum(lengths)
    assert padded() < 1.05 * sum(lengths)
    assert padded(shuffle=False) < 1.02 * sum(lengths)


def test_the_longest_row_comes_first_and_later_steps_do_not_follow_length():
    lengths = np.random.default_rng(0).integers(10, 80, 2000).tolist()
    (order,) = rank_orders(FixedRows(2000, lengths), 1, 16)
    means = [np.mean([lengths[index] for index in order[start : start + 16]]) for start in range(0, 2000, 16)]
    assert lengths[order[0]] == max(lengths)
    assert abs(np.corrcoef(means, range(len(means)))[0, 1]) < 0.3
    falls = sum(second < first for first, second in itertools.pairwise(means))
    assert 0.35 < falls / len(means) < 0.65


def test_every_whole_step_takes_one_group_of_like_lengths_also_where_the_last_group_is_short():
    lengths = np.random.default_rng(0).permutation(np.arange(10, 175)).tolist()
    for seed in range(10):
        (order,) = rank_orders(FixedRows(165, lengths), 1, 8, seed=seed)
        for start in range(0, 160, 8):
            # All but the first row: the longest row of all trades places with the first of its group.
            group = [lengths[index] for index in order[start + 1 : start + 8]]
            assert group == sorted(group, reverse=True)


# Batches


def test_padding_has_no_label_even_where_its_id_is_a_token_of_the_text():
    batch = Collator(pad_token_id=1)([torch.tensor([2, 1, 9, 2]), torch.tensor([2, 2]), None])
    assert batch["input_ids"].tolist() == [[2, 1, 9, 2], [2, 2, 1, 1], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[2, 1, 9, 2], [2, 2, IGNORED, IGNORED], [IGNORED] * 4]
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert set(batch) == {"input_ids", "labels"}


def test_a_pipeline_gets_batches_of_constant_length_and_fillers_alone_make_a_batch():
    assert Collator(1, pad_to=8)([torch.tensor([2, 2])])["labels"].shape == (1, 8)
    alone = Collator(1)([None, None])
    assert alone["input_ids"].shape == (2, 2) and (alone["labels"] == IGNORED).all()


def test_an_index_outside_the_rows_is_refused():
    assert FixedRows(3)[FILLER] is None
    for index in (3, -2):
        with pytest.raises(IndexError):
            FixedRows(3)[index]


class Plugin:
    """What every plugin of ColossalAI does in prepare_dataloader, for a rank of our choice."""

    def __init__(self, rank: int = 0, num_replicas: int = 1) -> None:
        self.rank, self.world_size = rank, num_replicas

    def prepare_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        import colossal_ext  # noqa: F401  # before ColossalAI

        # isort: split
        from colossalai.booster.plugin.dp_plugin_base import DPPluginBase

        return DPPluginBase.prepare_dataloader(self, *args, **kwargs)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_plugins_loader_gives_each_rank_its_share_in_full_batches(num_workers):
    load = functools.partial(data.loader, FixedRows(9), batch_size=2, shuffle=True, seed=1, pad_token_id=0)
    loaders = [load(Plugin(rank, 2), num_workers=num_workers) for rank in (0, 1)]
    batches = [list(loader) for loader in loaders]
    assert [len(loader) for loader in loaders] == [3, 3]
    assert all(batch["labels"].shape == (2, 4) for rank in batches for batch in rank)
    rows = [row[0].item() for rank in batches for batch in rank for row in batch["labels"]]
    assert sorted(rows) == [*[IGNORED] * 3, *range(9)]


def test_the_loaders_sampler_follows_the_epoch():
    loader = data.loader(FixedRows(50), Plugin(), batch_size=10, shuffle=True, seed=1, pad_token_id=0)
    first = [batch["input_ids"].tolist() for batch in loader]
    sampler: Any = loader.sampler
    sampler.set_epoch(1)
    assert [batch["input_ids"].tolist() for batch in loader] != first
    sampler.set_epoch(0, start=20)
    assert [batch["input_ids"].tolist() for batch in loader] == first[2:]


@pytest.mark.parametrize("grouped", [True, False])
def test_an_evaluation_sees_the_same_targets_for_any_batch_and_any_number_of_ranks(grouped):
    rows = FixedRows(101, LENGTHS if grouped else None)

    def targets(batch_size: int, num_replicas: int) -> list[int]:
        load = functools.partial(data.loader, rows, batch_size=batch_size, shuffle=False, seed=0, pad_token_id=0)
        labels = [batch["labels"][:, 1:] for rank in range(num_replicas) for batch in load(Plugin(rank, num_replicas))]
        return sorted(int(token) for label in labels for token in label[label != IGNORED])

    expected = targets(1, 1)
    assert len(expected) == rows.info.num_tokens - 101
    assert all(targets(batch, ranks) == expected for batch in (1, 3, 8) for ranks in (1, 2, 4))


def test_netflix_batches_have_labels_for_real_tokens_only(prepare, write):
    path = write("rows.txt", "\n".join(words(1 + number % 9, number) for number in range(64)))
    rows = prepare(dataset="netflix", train_file=path, validation_split_percentage=0).train
    for batch in data.loader(rows, Plugin(), batch_size=16, shuffle=True, seed=0, pad_token_id=1):
        lengths = (batch["labels"] != IGNORED).sum(1)
        for row, length in zip(batch["input_ids"], lengths, strict=True):
            assert row[0] == row[length - 1] == START and (row[1 : length - 1] != START).all()
            assert (row[length:] == 1).all()
