"""Text or synthetic tokens -> rows of token ids -> loaders. Which rows a step takes depends on the seed alone.

Text is packed into blocks (`wikitext`) or kept a row a text (`netflix`), tokenized once and cached by `datasets`,
memory-mapped. Every rank may call `prepare` at the same time: the cache's lock lets one do the work, no collective.
"""

from __future__ import annotations

import codecs
import csv
import functools
import hashlib
import json
import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from args import ConfigError, TrainArgs

if TYPE_CHECKING:
    import datasets
    from colossalai.booster.plugin.plugin_base import Plugin
    from transformers import PreTrainedTokenizerBase

Item = TypeVar("Item")

FILLER = -1  # index of a row that is not there: it evens out the ranks' batches and counts for nothing
IGNORED = -100  # label of a position without a target, as in torch's cross_entropy

WIKITEXT = ("Salesforce/wikitext", "wikitext-2-raw-v1")
NETFLIX = ("hugginglearners/netflix-shows", None)
TEXT_SUFFIXES = (".txt", ".raw", ".tokens")
TABLE_SUFFIXES = (".csv", ".json", ".jsonl", ".parquet")

CACHE_VERSION = 1  # part of every cache key: raise it when the rows of the same text change
HEAD_BYTES = 1 << 16  # what the early checks read of a file
CHUNK_CHARACTERS = 1 << 20
ROWS_AT_ONCE = 1000
PIECES_AT_ONCE = 256
HUB_TIMEOUT_S = 5.0
HELD_OUT_SEED = 0  # not --seed: another seed must not move evaluation rows into the training data

# A piece of at least 4096 characters that ends in a non-space and is followed by a space or newline, or the rest.
PIECE = re.compile(r".{4095,}?\S(?=[ \n])|.+", re.DOTALL)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataInfo:
    """What a split holds, for result.json.

    Args:
        num_tokens: tokens in the rows, the start token included.
        dropped_tokens: tokens of the text that are in no row: the packing's remainder, or what truncation cut off.
    """

    name: str
    split: str
    num_tokens: int
    dropped_tokens: int
    num_rows: int


class TokenRows(Dataset[torch.Tensor | None]):
    """Rows of token ids; index FILLER gives None.

    Args:
        lengths: (rows,) tokens of each row, or None where all rows are equally long.
    """

    def __init__(self, info: DataInfo, lengths: np.ndarray | None) -> None:
        self.info = info
        self.lengths = lengths

    def __len__(self) -> int:
        return self.info.num_rows

    def __getitem__(self, index: int) -> torch.Tensor | None:
        """Return the row, (T,) int64, or None for FILLER."""
        if index == FILLER:
            return None
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return torch.from_numpy(self._row(index).astype(np.int64))

    def _row(self, index: int) -> np.ndarray:
        raise NotImplementedError


class CachedRows(TokenRows):
    """Some rows of a tokenized data set, read from the memory-mapped cache.

    Args:
        tokenized: columns `input_ids` (list of int32) and `num_dropped` (int64).
        indices: (rows,) which rows of it, in this order.
        packed: all rows are equally long.
    """

    def __init__(
        self, tokenized: datasets.Dataset, indices: np.ndarray, *, name: str, split: str, packed: bool
    ) -> None:
        self._table = tokenized.data
        self._indices = indices
        lengths = _list_lengths(tokenized)[indices]
        dropped = self._table.column("num_dropped").to_numpy()[indices]
        info = DataInfo(name, split, int(lengths.sum()), int(dropped.sum()), len(indices))
        super().__init__(info, None if packed else lengths)

    def _row(self, index: int) -> np.ndarray:
        row: np.ndarray = self._table.column("input_ids")[int(self._indices[index])].values.to_numpy()
        return row


class SyntheticRows(TokenRows):
    """Tokens drawn from Zipf's law, computed when asked for: a model learns their frequencies, so its loss falls.

    Over OPT's 50,272 words the loss starts near ln(50272) = 10.8 and cannot fall below the law's entropy, 7.4.

    Args:
        part: 0 for training, 1 for evaluation: other rows of the same distribution.
    """

    def __init__(self, num_rows: int, *, block_size: int, vocab_size: int, seed: int, part: int) -> None:
        super().__init__(DataInfo("synthetic", ("train", "validation")[part], num_rows * block_size, 0, num_rows), None)
        self._block_size = block_size
        self._seed = (seed, part)
        weights = 1.0 / np.arange(1, vocab_size + 1)
        self._cumulative = np.cumsum(weights / weights.sum())
        self._cumulative[-1] = 1.0

    def _row(self, index: int) -> np.ndarray:
        uniform = np.random.default_rng((*self._seed, index)).random(self._block_size)
        return np.searchsorted(self._cumulative, uniform, side="right")


@dataclass(frozen=True)
class PreparedData:
    """The splits of a run; `protocol` is one sentence that says what the perplexity on `validation` means."""

    train: TokenRows | None
    validation: TokenRows | None
    protocol: str


# ---------------------------------------------------------------------------------------------------------------------
# Preparing: what every rank calls before the process group exists.


def prepare(
    args: TrainArgs,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    vocab_size: int,
    max_positions: int,
    global_batch_size: int,
) -> PreparedData:
    """Return the rows to train and to evaluate on, tokenized now or read from the cache.

    Args:
        tokenizer: None for synthetic tokens.
        vocab_size: entries of the model's embedding.
        max_positions: tokens the model can address; `--block_size` is cut to it.
        global_batch_size: rows a step takes over all ranks and micro-batches; sizes the synthetic data.

    Raises:
        ConfigError: a file that cannot be read as text, a missing column, a hub that cannot be reached, a text
            shorter than one block, too few rows to hold some out, a tokenizer that is larger than the model.
    """
    if found := problems(args):
        raise ConfigError(*found)
    block_size = _fitting_block_size(args.block_size, max_positions)
    if args.dataset == "synthetic":
        return _synthetic(args, block_size, vocab_size, global_batch_size)
    assert tokenizer is not None, "text needs a tokenizer"
    _check_vocabulary(args, tokenizer, vocab_size)
    if not _is_first_rank():
        _disable_progress_bars()
    return _prepare_text(args, Encoder(tokenizer, block_size, packed=args.dataset == "wikitext"))


def _prepare_text(args: TrainArgs, encoder: Encoder) -> PreparedData:
    train_source, validation_source = sources(args)
    if validation_source is None:
        kept, held_out = _split(train_source, encoder, args)
        return PreparedData(None if args.eval_only else kept, held_out, encoder.protocol(train_source))
    train = None if args.eval_only else _all_rows(train_source, encoder, args, limit=args.max_train_samples)
    validation = _all_rows(validation_source, encoder, args, limit=args.max_eval_samples)
    return PreparedData(train, validation, encoder.protocol(validation_source))


def _synthetic(args: TrainArgs, block_size: int, vocab_size: int, global_batch_size: int) -> PreparedData:
    make = functools.partial(SyntheticRows, block_size=block_size, vocab_size=vocab_size, seed=args.seed)
    num_rows = args.max_train_samples or (args.max_train_steps or 100) * global_batch_size
    train = None if args.eval_only else make(num_rows, part=0)
    validation = make(args.max_eval_samples or global_batch_size, part=1)
    return PreparedData(train, validation, f"synthetic tokens (Zipf's law), blocks of {block_size}")


def _fitting_block_size(block_size: int, max_positions: int) -> int:
    if block_size > max_positions and _is_first_rank():
        logger.warning("--block_size %d is cut to %d, the positions the model has", block_size, max_positions)
    return min(block_size, max_positions)


def _check_vocabulary(args: TrainArgs, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    if len(tokenizer) > vocab_size:
        raise ConfigError(
            f"--tokenizer_name {args.tokenizer_name or tokenizer.name_or_path}: {len(tokenizer)} entries, "
            f"but the model's embedding has {vocab_size}; give the tokenizer of the model"
        )


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _disable_progress_bars() -> None:
    import datasets

    datasets.disable_progress_bars()


def _all_rows(source: Source, encoder: Encoder, args: TrainArgs, *, limit: int | None) -> CachedRows:
    tokenized = _tokenized(source, encoder, args.cache_dir)
    indices = np.arange(len(tokenized))[:limit]
    return CachedRows(tokenized, indices, name=source.name, split=source.split, packed=encoder.packed)


def _split(source: Source, encoder: Encoder, args: TrainArgs) -> tuple[CachedRows, CachedRows | None]:
    """Return the training rows and the held-out ones (None with --validation_split_percentage 0)."""
    tokenized = _tokenized(source, encoder, args.cache_dir)
    make = functools.partial(CachedRows, tokenized, name=source.name, packed=encoder.packed)
    percentage = args.validation_split_percentage
    if percentage == 0:
        return make(np.arange(len(tokenized))[: args.max_train_samples], split="train"), None
    if len(tokenized) < 2:
        raise ConfigError(
            f"{source}: 1 {encoder.unit}, so none can be held out for evaluation; give more text, "
            "--validation_file FILE, or --validation_split_percentage 0"
        )
    train, held_out = _hold_out(len(tokenized), percentage, contiguous=encoder.packed)
    return (
        make(train[: args.max_train_samples], split="train"),
        make(held_out[: args.max_eval_samples], split=f"held-out {percentage:g}% of train"),
    )


def _hold_out(num_rows: int, percentage: float, *, contiguous: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices to train on and to hold out, at least one of each.

    Args:
        contiguous: hold out the end (of a token stream), else rows from all over the data.
    """
    count = min(max(round(num_rows * percentage / 100), 1), num_rows - 1)
    order = np.arange(num_rows) if contiguous else np.random.default_rng(HELD_OUT_SEED).permutation(num_rows)
    return np.sort(order[:-count]), np.sort(order[-count:])


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizing and the cache.


@dataclass(frozen=True)
class Encoder:
    """How text becomes rows of token ids.

    Args:
        block_size: tokens a row has (packed) or has at most.
        packed: one stream of tokens cut into blocks; else one row a text.
    """

    tokenizer: PreTrainedTokenizerBase
    block_size: int
    packed: bool

    @property
    def unit(self) -> str:
        return f"block of {self.block_size} tokens" if self.packed else "row with text"

    def key(self) -> str:
        """Return what the rows depend on besides the text."""
        return f"{_tokenizer_hash(self.tokenizer)} {self._start} {self._end} {self.block_size} {self.packed}"

    def protocol(self, source: Source) -> str:
        """Return the sentence that says what a perplexity on these rows means."""
        start, end = self.tokenizer.bos_token or "", self.tokenizer.eos_token or ""
        if self.packed:
            how = (
                f"{source.joined}, tokenized once with one leading {start}, cut into non-overlapping blocks of "
                f"{self.block_size}, remainder dropped"
            )
        else:
            how = f"each text as {start} text {end}, cut to {self.block_size} tokens"
        return f"{how}; exp of the mean negative log-likelihood over predicted tokens"

    def examples(self, source: Source) -> Iterator[dict[str, Any]]:
        """Yield each row: `input_ids` and `num_dropped`, the tokens that belong here but stand in no row."""
        for input_ids, num_dropped in self._blocks(source) if self.packed else self._texts(source):
            yield {"input_ids": np.asarray(input_ids, dtype=np.int32), "num_dropped": num_dropped}

    def _blocks(self, source: Source) -> Iterator[tuple[list[int], int]]:
        stream = chain(self._start, chain.from_iterable(self._ids(pieces(source.text(), self.tokenizer))))
        block: list[int] = []
        remainder = 0
        for part in batches(stream, self.block_size):
            if block and len(part) < self.block_size:
                remainder = len(part)
                break
            if block:
                yield block, 0
            block = part
        if len(block) < self.block_size:
            raise ConfigError(
                f"{source}: {len(block)} tokens, shorter than one block of {self.block_size}; give more text "
                f"or --block_size {max(len(block), 2)}"
            )
        yield block, remainder

    def _texts(self, source: Source) -> Iterator[tuple[list[int], int]]:
        room = max(self.block_size - len(self._start) - len(self._end), 0)
        ids = None
        for ids in self._ids(text for text in source.rows() if text and not text.isspace()):
            yield self._start + ids[:room] + self._end, max(len(ids) - room, 0)
        if ids is None:
            raise ConfigError(f"{source}: no row with text; give other data or name another column by --text_column")

    @property
    def _start(self) -> list[int]:
        return [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]

    @property
    def _end(self) -> list[int]:
        return [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]

    def _ids(self, texts: Iterable[str]) -> Iterator[list[int]]:
        """Yield the ids of each text without start and end; a batch keeps all threads of the tokenizer busy."""
        for batch in batches(texts, PIECES_AT_ONCE):
            encoded = self.tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)
            yield from encoded["input_ids"]


def _tokenized(source: Source, encoder: Encoder, cache_dir: str | None) -> datasets.Dataset:
    """Return the rows of `source`, memory-mapped. Waits while another process tokenizes the same.

    The key of the cache is the file's path, size and time, or the hub's names: a warm start asks no hub.
    """
    import datasets

    key = hashlib.sha256(f"{CACHE_VERSION} {source.key()} {encoder.key()}".encode()).hexdigest()
    columns = {"input_ids": datasets.Sequence(datasets.Value("int32")), "num_dropped": datasets.Value("int64")}
    try:
        return datasets.Dataset.from_generator(
            lambda: encoder.examples(source),
            features=datasets.Features(columns),
            cache_dir=cache_dir,
            fingerprint=key[:32],
        )
    except (datasets.exceptions.DatasetGenerationError, OSError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, ConfigError):
            raise cause from None
        if isinstance(cause, OSError):
            folder = cache_dir or datasets.config.HF_DATASETS_CACHE
            raise ConfigError(f"--cache_dir {folder}: {cause}; give a folder that can be written") from error
        raise


def pieces(chunks: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Yield the joined text in pieces that can be tokenized apart: their ids are those of the whole text.

    A tokenizer that is not known to allow this gets the whole text as one piece.
    """
    if not _splits_before_spaces(tokenizer):
        yield "".join(chunks)
        return
    rest = ""
    for chunk in chunks:
        if chunk:
            *whole, rest = PIECE.findall(rest + chunk)
            yield from whole
    if rest:
        yield rest


def _splits_before_spaces(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a token never spans a non-space followed by a space or newline, nor depends on it.

    True for the GPT-2 rule (OPT, GPT-2, RoBERTa): its expression puts a space at the start of a token or into a run
    of spaces, and looks ahead from spaces only. An added token could swallow the space to its right.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.normalizer is not None or backend.pre_tokenizer is None:
        return False
    rule = json.loads(backend.pre_tokenizer.__getstate__())
    gpt2 = rule["type"] == "ByteLevel" and rule["use_regex"] and not rule["add_prefix_space"]
    added = backend.get_added_tokens_decoder().values()
    return gpt2 and not any(token.rstrip or re.search(r"\s", token.content) for token in added)


def _tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        state = repr((type(tokenizer), tokenizer.name_or_path, sorted(tokenizer.get_vocab().items())))
    else:
        tokenizer("")  # resets the padding and truncation of an earlier call, which would be part of the state
        state = backend.to_str()
    return hashlib.sha256(state.encode()).hexdigest()


def batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yield lists of `size` items, the last one shorter (itertools.batched, which needs Python 3.12)."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _list_lengths(tokenized: datasets.Dataset) -> np.ndarray:
    import pyarrow.compute

    lengths: np.ndarray = pyarrow.compute.list_value_length(tokenized.data.column("input_ids")).to_numpy()
    return lengths


# ---------------------------------------------------------------------------------------------------------------------
# Sources of text.


@dataclass(frozen=True)
class Source:
    """Where a split's text comes from; read only when the cache has not seen it.

    Args:
        name: file or hub name, for reports.
        column: column with the text; files of plain text have none.
    """

    name: str
    split: str
    column: str

    joined = "rows joined by a blank line"

    @property
    def expected(self) -> str:
        """What the data should look like, for error messages."""
        return "a table with text"

    def key(self) -> str:
        """Return what changes when the text changes."""
        raise NotImplementedError

    def rows(self) -> Iterator[str | None]:
        """Yield the texts one by one, None where there is none."""
        raise NotImplementedError

    def text(self) -> Iterator[str]:
        """Yield the whole split as one text, in parts."""
        texts = (text for text in self.rows() if text is not None)
        for number, batch in enumerate(batches(texts, ROWS_AT_ONCE)):
            yield ("\n\n" if number else "") + "\n\n".join(batch)


@dataclass(frozen=True)
class HubSource(Source):
    """A split of a data set on the Hugging Face hub."""

    config: str | None
    cache_dir: str | None

    def __str__(self) -> str:
        return f"{self.name} ({self.split})"

    def key(self) -> str:
        return f"hub {self.name} {self.config} {self.split} {self.column}"

    def rows(self) -> Iterator[str | None]:
        return _readable(self, map(_checked_text, self._values()))

    def _values(self) -> Iterator[Any]:
        table = _load_from_hub(self)
        _require(self.column, table.column_names)
        yield from table[self.column]


@dataclass(frozen=True)
class FileSource(Source):
    """A local file, named by `flag`."""

    flag: str

    def __str__(self) -> str:
        return f"{self.flag} {self.name}"

    @property
    def path(self) -> Path:
        return Path(self.name)

    @property
    def suffix(self) -> str:
        return self.path.suffix.lower()

    @property
    def expected(self) -> str:
        return EXPECTED[self.suffix]

    def key(self) -> str:
        status = self.path.stat()
        return f"file {self.path.resolve()} {status.st_size} {status.st_mtime_ns} {self.column}"

    def rows(self) -> Iterator[str | None]:
        reader = READERS[self.suffix]
        return _readable(self, map(_checked_text, reader(self.path, self.column)))


@dataclass(frozen=True)
class TextFileSource(FileSource):
    """A local file of plain text: one text as it stands, or a row a line."""

    joined = "the file's text"

    def rows(self) -> Iterator[str | None]:
        return _readable(self, self._lines())

    def text(self) -> Iterator[str]:
        return _readable(self, self._chunks())

    def _lines(self) -> Iterator[str]:
        with _open_text(self.path) as file:
            yield from (line.rstrip("\n") for line in file)

    def _chunks(self) -> Iterator[str]:
        with _open_text(self.path, newline="") as file:
            while chunk := file.read(CHUNK_CHARACTERS):
                yield chunk


def sources(args: TrainArgs) -> tuple[Source, Source | None]:
    """Return where training and evaluation text come from; None: hold a part of the training text out."""
    column = _text_column(args)
    name, config = NETFLIX if args.dataset == "netflix" else WIKITEXT
    hub = functools.partial(HubSource, name, column=column, config=config, cache_dir=args.cache_dir)
    train = _file_source("--train_file", args.train_file, "train", column) if args.train_file else hub(split="train")
    if args.validation_file:
        return train, _file_source("--validation_file", args.validation_file, "validation", column)
    if args.train_file or args.dataset == "netflix":
        return train, None
    return train, hub(split="test" if args.eval_only else "validation")


def _text_column(args: TrainArgs) -> str:
    return args.text_column or ("description" if args.dataset == "netflix" else "text")


def _file_source(flag: str, path: str, split: str, column: str) -> FileSource:
    kind = TextFileSource if Path(path).suffix.lower() in TEXT_SUFFIXES else FileSource
    return kind(name=path, split=split, column=column, flag=flag)


def _load_from_hub(source: HubSource) -> datasets.Dataset:
    """Return the split from the hub, or from the `datasets` cache where the hub does not answer.

    Raises:
        ConfigError: neither has it. Takes at most 2 x HUB_TIMEOUT_S, where `datasets` alone retries for 23 s.
    """
    import datasets

    failure = _hub_failure(source.name)
    was_offline = datasets.config.HF_HUB_OFFLINE
    try:
        datasets.config.HF_HUB_OFFLINE = was_offline or failure is not None
        return datasets.load_dataset(source.name, source.config, split=source.split, cache_dir=source.cache_dir)
    except Exception as error:  # the hub's client has a dozen kinds; the user's way out is the same
        raise ConfigError(
            f"data set {source.name} ({source.split}): the hub cannot be reached, or does not have it "
            f"({failure or error}); give local data by --train_file FILE (and --validation_file FILE): "
            f"{' '.join(TEXT_SUFFIXES + TABLE_SUFFIXES)}"
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = was_offline


def _hub_failure(name: str) -> str | None:
    """Ask the hub once; return why it does not know the data set, or None where it does.

    A thread, since the time limit of the hub's client does not cover a name server that is silent.
    """
    from huggingface_hub import HfApi, is_offline_mode

    if is_offline_mode():
        return "offline"
    outcome: list[str | None] = []

    def ask() -> None:
        try:
            HfApi().dataset_info(name, timeout=HUB_TIMEOUT_S)
            outcome.append(None)
        except Exception as error:  # whatever it is, the answer is no
            outcome.append(f"{type(error).__name__}: {error}".partition("\n")[0])

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(2 * HUB_TIMEOUT_S)
    return outcome[0] if outcome else f"no answer in {2 * HUB_TIMEOUT_S:.0f} s"


# ---------------------------------------------------------------------------------------------------------------------
# Reading files.


def _open_text(path: Path, newline: str | None = None) -> TextIO:
    return open(path, encoding="utf-8-sig", newline=newline)


class _ColumnError(ValueError):
    """The file is sound, its column is not."""


def _readable(source: Source, texts: Iterator[Item]) -> Iterator[Item]:
    """Yield `texts`; a reader's error becomes a ConfigError that names the flag and the file."""
    try:
        yield from texts
    except ConfigError:
        raise
    except _ColumnError as error:
        raise ConfigError(f"{source}: {error}; name the column with the text by --text_column") from error
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ConfigError(
            f"{source}: not UTF-8 text (byte 0x{byte:02x}: {error.reason}); convert it, e.g. iconv -f latin1 -t utf-8"
        ) from error
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise ConfigError(f"{source}: {error}; expected {source.expected}") from error


def _checked_text(value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise _ColumnError(f"the text column holds {type(value).__name__} ({value!r:.40}), not text")
    value.encode()  # JSON can spell half a surrogate pair, which no tokenizer takes
    return value


def _csv_rows(path: Path, column: str) -> Iterator[Any]:
    csv.field_size_limit(sys.maxsize)  # the default, 128 KiB, is less than a long article
    with _open_text(path, newline="") as file:
        reader = csv.DictReader(file, strict=True)
        _require(column, reader.fieldnames or [])
        try:
            for row in reader:
                yield row[column]
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num}: {error}") from error


def _json_rows(path: Path, column: str) -> Iterator[Any]:
    """Yield from a list of objects, or from one object a line."""
    with _open_text(path) as file:
        is_list = next((line.lstrip()[0] for line in file if line.strip()), "") == "["
        file.seek(0)
        objects = _json_list(file) if is_list else _json_lines(file)
        for number, value in enumerate(objects):
            if number == 0:
                _require(column, list(value))
            yield value.get(column)


def _json_list(file: TextIO) -> Iterator[dict[str, Any]]:
    try:
        values = json.load(file)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error
    for number, value in enumerate(values, start=1):
        if not isinstance(value, dict):
            raise ValueError(f"item {number} is {type(value).__name__}, not an object")
        yield value


def _json_lines(file: TextIO) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield _json_object(line, number)


def _json_object(line: str, number: int) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number} is not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(value, dict):
        raise ValueError(f"line {number} is {type(value).__name__}, not an object")
    return value


def _parquet_rows(path: Path, column: str) -> Iterator[Any]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        _require(column, file.schema_arrow.names)
        for batch in file.iter_batches(columns=[column]):
            yield from batch.column(0).to_pylist()


READERS: dict[str, Callable[[Path, str], Iterator[Any]]] = {
    ".csv": _csv_rows,
    ".json": _json_rows,
    ".jsonl": _json_rows,
    ".parquet": _parquet_rows,
}
EXPECTED = dict.fromkeys(TEXT_SUFFIXES, "plain text") | {
    ".csv": "a header line, then comma-separated rows",
    ".json": "a list of objects, or one object a line",
    ".jsonl": "one object a line",
    ".parquet": "a Parquet table",
}


def _require(column: str, columns: Iterable[str]) -> None:
    if column not in (columns := list(columns)):
        raise _ColumnError(f"no column {column!r} among {', '.join(columns) or 'none'}")


# ---------------------------------------------------------------------------------------------------------------------
# Early checks.


def problems(args: TrainArgs) -> list[str]:
    """Return what is wrong with the data flags as far as a look at the files' beginnings tells: one sentence each."""
    files = {"--train_file": args.train_file, "--validation_file": args.validation_file}
    given = {flag: value for flag, value in files.items() if value}
    if args.dataset == "synthetic":
        unused = given | ({"--text_column": args.text_column} if args.text_column else {})
        return [f"{flag} {value}: --dataset synthetic reads no text; leave it out" for flag, value in unused.items()]
    found = [
        problem
        for flag, path in given.items()
        for problem in _file_problems(_file_source(flag, path, "", _text_column(args)))
    ]
    if args.text_column and args.train_file and all(_is_plain_text(path) for path in given.values()):
        found.append(f"--text_column {args.text_column}: {args.train_file} is plain text without columns; leave it out")
    if args.eval_only and args.validation_split_percentage == 0 and sources(args)[1] is None:
        found.append("--eval_only: no evaluation data; give --validation_file or --validation_split_percentage above 0")
    return found


def _is_plain_text(path: str) -> bool:
    return Path(path).suffix.lower() in TEXT_SUFFIXES


def _file_problems(source: FileSource) -> list[str]:
    known = TEXT_SUFFIXES + TABLE_SUFFIXES
    if not source.path.exists():
        return [f"{source}: no such file (looked from {Path.cwd()})"]
    if not source.path.is_file():
        return [f"{source}: not a file; give one file: {' '.join(known)}"]
    if source.suffix not in known:
        return [f"{source}: unknown suffix {source.path.suffix!r}; rename or convert it to one of {' '.join(known)}"]
    if source.path.stat().st_size == 0:
        return [f"{source}: is empty; give a file with text"]
    try:
        _check_beginning(source)
    except ConfigError as error:
        return list(error.problems)
    return []


def _check_beginning(source: FileSource) -> None:
    """Look at the first kilobytes, and at the first row of a table.

    Raises:
        ConfigError: binary, not UTF-8, only white space, malformed, without the column.
    """
    is_table = not _is_plain_text(source.name)
    if source.suffix != ".parquet":
        head = "".join(_readable(source, _head(source.path)))
        if "\0" in head:
            raise ConfigError(f"{source}: binary, or UTF-16; give {source.expected} in UTF-8")
        if head.isspace() and source.path.stat().st_size <= HEAD_BYTES:
            raise ConfigError(f"{source}: holds only white space; give a file with text")
        if (
            source.suffix.startswith(".json")
            and head.lstrip().startswith("[")
            and source.path.stat().st_size > HEAD_BYTES
        ):
            return  # a JSON list is read whole or not at all
    if is_table:
        next(source.rows(), None)


def _head(path: Path) -> Iterator[str]:
    with open(path, "rb") as file:
        # An incremental decoder: the last character may be cut in the middle.
        yield codecs.getincrementaldecoder("utf-8-sig")().decode(file.read(HEAD_BYTES))


# ---------------------------------------------------------------------------------------------------------------------
# Order, batches, loaders.


class EpochSampler(Sampler[int]):
    """The rows of one rank in one epoch.

    The global order depends on (seed, epoch) and the global batch alone: step s takes rows [s*G, (s+1)*G) of it,
    however many ranks and micro-batches share G. FILLERs at its end give all ranks the same number of full batches.

    Args:
        num_replicas: ranks that take different rows; `rank` is one of them.
        batch_size: rows a rank takes in one micro-batch.
        group_by_length: put rows of like length into a step (or, unshuffled, longest first).
        global_batch_size: G; by default one micro-batch on each rank.
    """

    def __init__(
        self,
        dataset: TokenRows,
        num_replicas: int,
        rank: int,
        shuffle: bool,
        *,
        seed: int,
        batch_size: int,
        group_by_length: bool,
        global_batch_size: int | None = None,
    ) -> None:
        self._rows = dataset
        self._num_replicas, self._rank = num_replicas, rank
        self._shuffle, self._seed = shuffle, seed
        self._batch_size = batch_size
        self._group_by_length = group_by_length
        self._global_batch_size = global_batch_size or batch_size * num_replicas
        self.set_epoch(0)

    def set_epoch(self, epoch: int, *, start: int = 0) -> None:
        """Choose the epoch's order; the first `start` rows of it, used before an interruption, are left out."""
        self._epoch, self._start = epoch, start

    def __len__(self) -> int:
        """Return the rows of this rank, FILLERs included."""
        num_rows = max(len(self._rows) - self._start, 0)
        return -(-num_rows // (self._batch_size * self._num_replicas)) * self._batch_size

    def __iter__(self) -> Iterator[int]:
        order = self._order()[self._start :]
        order += [FILLER] * (len(self) * self._num_replicas - len(order))
        return iter(order[self._rank :: self._num_replicas])

    def _order(self) -> list[int]:
        lengths = self._rows.lengths if self._group_by_length else None
        if self._shuffle:
            (state,) = np.random.SeedSequence((self._seed, self._epoch)).generate_state(1, np.uint64)
            generator = torch.Generator().manual_seed(int(state))
            return _shuffled(len(self._rows), lengths, self._global_batch_size, generator)
        if lengths is not None:
            return [int(index) for index in np.argsort(-lengths, kind="stable")]
        return list(range(len(self._rows)))


def _shuffled(num_rows: int, lengths: np.ndarray | None, group_size: int, generator: torch.Generator) -> list[int]:
    if lengths is None:
        return torch.randperm(num_rows, generator=generator).tolist()
    from transformers.trainer_pt_utils import get_length_grouped_indices

    order = get_length_grouped_indices(lengths.tolist(), group_size, generator=generator)
    # Each stretch of 50 groups comes sorted: shuffle the groups. The first stays, it has the longest row, so that
    # running out of memory happens at once; a shorter last one stays, so that the others are whole steps.
    groups = list(batches(order, group_size))
    num_movable = max(len(groups) - (len(order) % group_size > 0) - 1, 0)
    moved = torch.randperm(num_movable, generator=generator).tolist()
    middle = [groups[1 + index] for index in moved]
    return list(chain.from_iterable(groups[:1] + middle + groups[1 + num_movable :]))


@dataclass(frozen=True)
class Collator:
    """Rows -> `{"input_ids": (B, T), "labels": (B, T)}`, int64, padded on the right.

    Labels are IGNORED where there is no token, by length: a pad id inside the text keeps its label.

    Args:
        pad_to: T; None: the longest row of the batch.
    """

    pad_token_id: int
    pad_to: int | None = None

    def __call__(self, rows: list[torch.Tensor | None]) -> dict[str, torch.Tensor]:
        # 2 in a batch of FILLERs only: the shortest row that a loss with shifted labels takes.
        length = self.pad_to or max((len(row) for row in rows if row is not None), default=2)
        input_ids = torch.full((len(rows), length), self.pad_token_id, dtype=torch.int64)
        labels = torch.full_like(input_ids, IGNORED)
        for position, row in enumerate(rows):
            if row is not None:
                input_ids[position, : len(row)] = labels[position, : len(row)] = row
        return {"input_ids": input_ids, "labels": labels}


def loader(
    rows: TokenRows,
    plugin: Plugin,
    *,
    batch_size: int,
    shuffle: bool,
    seed: int,
    pad_token_id: int,
    global_batch_size: int | None = None,
    num_workers: int = 0,
) -> DataLoader[Any]:
    """Return the batches of this rank; the plugin says which ranks share data. Set `loader.sampler.set_epoch`.

    Args:
        batch_size: rows of one micro-batch, padded to the longest of them; packed ones have one length.
    """
    pad_to = rows.info.num_tokens // rows.info.num_rows if rows.lengths is None else None
    sampler = functools.partial(
        EpochSampler,
        seed=seed,
        batch_size=batch_size,
        group_by_length=rows.lengths is not None,
        global_batch_size=global_batch_size,
    )
    return plugin.prepare_dataloader(
        rows,
        batch_size,
        shuffle=shuffle,
        seed=seed,
        pin_memory=torch.cuda.is_available(),
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        distributed_sampler_cls=sampler,
        collate_fn=Collator(pad_token_id, pad_to),
        # Its own, or each pass would draw its workers' seed from the generator that dropout draws from.
        generator=torch.Generator().manual_seed(seed),
    )
