"""Texts with a class each: from tables to token ids on disk, stratified splits, duplicates, class balance.

n tokens of a text, B texts of a batch, L classes.
"""

from __future__ import annotations

import json
import math
import unicodedata
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from edgeslm.atomic import assembling, way_out
from edgeslm.errors import DataError, EdgeslmError, ModelError
from edgeslm.progress import Progress, Quiet
from edgeslm.stages.arrays import ArrayReader, ArrayWriter, RaggedReader, RaggedWriter
from edgeslm.stages.tables import MOST_BAD_ROWS, Tally, read

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import ArrayLike, NDArray

    from edgeslm.specs import ColumnsSpec

MOST_CLASSES = 1000
BATCH_CHARACTERS = 2**18
"""Text that is tokenized at once."""
CHARACTERS_PER_TOKEN = 64
"""Text beyond so many characters for each token of the context is cut off before it is tokenized."""
FIRST_DUPLICATES = 5
FACTS = "examples.json"


class Labelled(NamedTuple):
    """One text and its class, and its place as FILE:LINE."""

    text: str
    label: str
    where: str


def labelled_rows(
    sources: Sequence[str],
    columns: ColumnsSpec,
    *,
    base: Path | None = None,
    progress: Progress | None = None,
    max_bad: float = MOST_BAD_ROWS,
    tally: Tally | None = None,
) -> Iterator[Labelled]:
    """The labelled texts of all sources, streamed.  A label of any plain kind becomes text: 3 is "3".

    Rows without text or label, or with a label that is not among columns.labels (where these are given),
    are bad rows: see edgeslm.stages.tables.rows.
    """
    allowed = frozenset(columns.labels)

    def convert(row: Mapping[str, Any]) -> tuple[str, str]:
        for column in (columns.text, columns.label):
            if column not in row:
                raise ValueError(f"has no {column!r}, but {sorted(map(str, row))[:6]}")
        text, label = row[columns.text], label_text(row[columns.label])
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"its {columns.text!r} holds no text")
        if not label:
            raise ValueError(f"its {columns.label!r} is empty")
        if allowed and label not in allowed:
            raise ValueError(f"its {columns.label!r} is {label[:40]!r}, none of {list(columns.labels)[:6]}")
        return text, label

    hint = f"a row has {columns.text!r} and {columns.label!r}: name the columns in [columns]"
    for source in sources:
        for (text, label), where in read(
            source, convert, base=base, progress=progress, max_bad=max_bad, tally=tally, hint=hint
        ):
            yield Labelled(text, label, where)


def label_text(value: Any) -> str:
    """A label as text: "" for what is missing or no plain value."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return "" if math.isnan(value) else str(int(value)) if value.is_integer() else str(value)
    return str(value).strip() if isinstance(value, str | int) else ""


def classes(rows: Iterable[Labelled], columns: ColumnsSpec) -> tuple[str, ...]:
    """The classes in their order: columns.labels, or those of the rows, sorted as numbers where all are.

    Raises DataError for fewer than two, for more than 1,000, and for one of columns.labels that no row has.
    """
    found: set[str] = set()
    for row in rows:
        found.add(row.label)
        if len(found) > MOST_CLASSES:
            raise DataError(
                f"more than {MOST_CLASSES:,} different labels in {columns.label!r}, such as {row.label[:40]!r}",
                hint="name the column that holds the class: [columns] label",
            )
    if len(found) < 2:
        only = f"one class only, {min(found)!r}" if found else "no labelled rows"
        raise DataError(f"the training data has {only}", hint="a classifier needs examples of two classes")
    if missing := sorted(set(columns.labels) - found):
        raise DataError(
            f"no training row has the label {missing[0]!r}", hint="correct [columns] labels, or add such rows"
        )
    return columns.labels or tuple(sorted(found, key=_in_order(found)))


def _in_order(labels: Iterable[str]) -> Callable[[str], Any]:
    try:
        return {label: float(label) for label in labels}.__getitem__
    except ValueError:
        return str


# --- examples on disk ---


@dataclass(frozen=True)
class TextExamples:
    """Labelled texts as token ids on disk, read one at a time; `subset` gives a view of some of them.

    labels: [examples] index of each one's class in `classes`.
    """

    path: Path
    classes: tuple[str, ...]
    context: int
    truncated_rows: tuple[int, ...] = field(repr=False)
    """Rows, in the directory's order, whose text is longer than the context and was cut."""
    rows: NDArray[np.int64] = field(repr=False)
    """The rows that this view is of."""

    @classmethod
    def open(cls, path: Path) -> TextExamples:
        """What `tokenize_examples` wrote to a directory.  Raises DataError when it is not there or damaged."""
        try:
            facts = json.loads((path / FACTS).read_text(encoding="utf-8"))
            return cls(
                path=path, classes=tuple(facts["classes"]), context=facts["context"],
                truncated_rows=tuple(facts["truncated_rows"]),
                rows=np.arange(len(ArrayReader(path / "labels.npy"))),
            )  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: no labelled examples: {error}") from error

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"input_ids": [n] int64, "label": int}"""
        row = int(self.rows[index])
        return {"input_ids": self._tokens[row].astype(np.int64), "label": int(self._labels[row])}

    def text(self, index: int) -> str:
        """The whole text of an example, as it was before it was tokenized."""
        return self._texts[int(self.rows[index])].tobytes().decode("utf-8")

    def texts(self) -> Iterator[str]:
        return (self.text(index) for index in range(len(self)))

    @property
    def labels(self) -> NDArray[np.int32]:
        chosen: NDArray[np.int32] = self._labels[self.rows]
        return chosen

    @property
    def truncated(self) -> int:
        """Examples whose text is longer than the context."""
        return int(np.isin(self.rows, self.truncated_rows).sum())

    @property
    def tokens(self) -> int:
        return int(self._tokens.lengths[self.rows].sum())

    def subset(self, indices: ArrayLike) -> TextExamples:
        """A view of some examples, in the order given."""
        return replace(self, rows=self.rows[np.asarray(indices, np.int64)])

    def summary(self) -> dict[str, Any]:
        """{examples, classes: {class: examples}, tokens, truncated} for the record of the data."""
        return {
            "examples": len(self),
            "classes": class_balance(self.labels, self.classes),
            "tokens": self.tokens,
            "truncated": self.truncated,
        }

    @cached_property
    def _tokens(self) -> RaggedReader:
        return RaggedReader(self.path, "tokens")

    @cached_property
    def _texts(self) -> RaggedReader:
        return RaggedReader(self.path, "texts")

    @cached_property
    def _labels(self) -> NDArray[np.int32]:
        return ArrayReader(self.path / "labels.npy").all()


def tokenize_examples(
    rows: Iterable[Labelled],
    tokenizer: Any,
    labels: Sequence[str],
    context: int,
    out: Path,
    *,
    progress: Progress | None = None,
) -> TextExamples:
    """Tokenize labelled texts into the new directory `out`; texts longer than `context` tokens are cut and counted.

    tokenizer: a fast one of transformers; its special tokens ([CLS] and the like) go around each text.
    labels: the classes in their order.  Raises DataError for no rows and for a label that is no class.
    """
    if not tokenizer.is_fast:
        raise ModelError("the tokenizer has no tokenizer.json")
    number = {label: index for index, label in enumerate(labels)}
    truncated: list[int] = []
    count = 0
    try:
        with assembling(out) as beside:
            with ExitStack() as stack:
                tokens = stack.enter_context(closing(RaggedWriter(beside, "tokens", np.int32)))
                texts = stack.enter_context(closing(RaggedWriter(beside, "texts", np.uint8)))
                numbers = stack.enter_context(ArrayWriter(beside / "labels.npy", np.int32))
                for batch in _batches(rows, number):
                    ids, cut = _encode([row.text for row in batch], tokenizer, context)
                    tokens.append(ids)
                    texts.append([np.frombuffer(_utf8(row.text), np.uint8) for row in batch])
                    numbers.append(np.array([number[row.label] for row in batch]))
                    truncated.extend(count + at for at in cut)
                    count += len(batch)
            facts = {"classes": list(labels), "context": context, "truncated_rows": truncated}
            (beside / FACTS).write_text(json.dumps(facts), encoding="utf-8")
            if not count:
                raise DataError("there are no labelled rows")
    except OSError as error:
        raise EdgeslmError(f"can't write {out}: {error.strerror or error}", hint=way_out(error)) from error
    if truncated:
        (progress or Quiet()).note(
            f"{len(truncated)} of {count} texts are longer than {context} tokens and were cut"
        )
    return TextExamples.open(out)


def _batches(rows: Iterable[Labelled], number: Mapping[str, int]) -> Iterator[list[Labelled]]:
    batch: list[Labelled] = []
    size = 0
    for row in rows:
        if row.label not in number:
            raise DataError(
                f"{row.where}: the label {row.label[:40]!r} is not among the classes {list(number)[:6]}",
                hint="train on rows of every class, or name the classes in [columns] labels",
            )
        batch.append(row)
        size += len(row.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(texts: Sequence[str], tokenizer: Any, context: int) -> tuple[list[list[int]], list[int]]:
    """(ids of each text, at most `context` of them; which texts were cut)."""
    most = context * CHARACTERS_PER_TOKEN
    encoded = tokenizer(
        [text[:most] for text in texts], truncation=True, max_length=context, split_special_tokens=True,
        return_attention_mask=False, return_token_type_ids=False, verbose=False,
    )  # fmt: skip
    cut = [at for at, text in enumerate(texts) if len(text) > most or encoded.encodings[at].overflowing]
    filler = tokenizer.pad_token_id or tokenizer.eos_token_id or 0
    return [ids or [filler] for ids in encoded["input_ids"]], cut


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", errors="replace")


def collate_texts(pad_token: int) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]:
    """Makes batches: {"input_ids" [B, S], "attention_mask" [B, S], "labels" [B]}, int64, padded on the right."""

    def collate(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        import torch

        longest = max(len(item["input_ids"]) for item in items)
        ids = np.full((len(items), longest), pad_token, np.int64)
        mask = np.zeros((len(items), longest), np.int64)
        for row, item in enumerate(items):
            ids[row, : len(item["input_ids"])] = item["input_ids"]
            mask[row, : len(item["input_ids"])] = 1
        return {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(mask),
            "labels": torch.tensor([item["label"] for item in items], dtype=torch.int64),
        }

    return collate


# --- splits, balance, duplicates ---


def stratified_split(
    labels: ArrayLike, heldout_every: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(training rows, held-out rows), each in order: one in `heldout_every` of each class, drawn by `seed`.

    A class of two or more gives at least one to either side; a single example is trained on.
    Raises DataError when nothing can be held out.
    """
    labels = np.asarray(labels)
    held: list[NDArray[np.int64]] = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = max(1, round(len(members) / heldout_every))
        chosen = np.random.default_rng([seed, int(label)]).permutation(members)
        held.append(chosen[: min(count, len(members) - 1)])
    heldout = np.sort(np.concatenate(held)) if held else np.zeros(0, np.int64)
    if not len(heldout):
        raise DataError(
            f"{len(labels)} rows are too few to hold out every {heldout_every}th of a class",
            hint="give more rows, or [data] heldout",
        )
    return np.setdiff1d(np.arange(len(labels)), heldout), heldout


def class_balance(labels: ArrayLike, names: Sequence[str]) -> dict[str, int]:
    """Class to its number of examples, in the classes' order, those without any included."""
    counts = np.bincount(np.asarray(labels, np.int64), minlength=len(names))
    return {name: int(count) for name, count in zip(names, counts, strict=True)}


@dataclass(frozen=True)
class Duplicates:
    """Held-out texts that are training texts, too.  first: (training, held-out) positions of a few."""

    count: int
    first: tuple[tuple[int, int], ...]


def duplicates(train_texts: Iterable[str], heldout_texts: Iterable[str]) -> Duplicates:
    """How many held-out texts occur in the training texts, but for case, spacing and Unicode's forms.

    Memory holds a hash of each held-out text; the training texts are streamed.
    """
    places: dict[bytes, list[int]] = {}
    for position, text in enumerate(heldout_texts):
        places.setdefault(text_hash(text), []).append(position)
    seen: set[bytes] = set()
    first: list[tuple[int, int]] = []
    for position, text in enumerate(train_texts):
        key = text_hash(text)
        if key in places and key not in seen:
            seen.add(key)
            if len(first) < FIRST_DUPLICATES:
                first.append((position, places[key][0]))
    return Duplicates(sum(len(places[key]) for key in seen), tuple(first))


def text_hash(text: str) -> bytes:
    """16 bytes that are equal for texts that differ only in case, spacing or Unicode's compatibility forms."""
    normal = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return blake2b(_utf8(normal), digest_size=16).digest()


def data_record(
    train: Mapping[str, Any],
    heldout: Mapping[str, Any] | None,
    *,
    found: Duplicates | None = None,
    tally: Tally | None = None,
    scrubbed: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """The record edgeslm.data/1: what was trained and measured on, without any of its content.

    train, heldout: the `summary()` of each.  found: duplicates between them; None: not looked for.
    tally: rows that could not be used.  scrubbed: what was masked, kind to count; None: nothing was.
    """
    sides = [side for side in (train, heldout) if side is not None]
    return {
        "schema": "edgeslm.data/1",
        "train": dict(train),
        "heldout": None if heldout is None else dict(heldout),
        "duplicates": None if found is None else found.count,
        "truncated": sum(side.get("truncated", 0) for side in sides),
        "bad_rows": 0 if tally is None else tally.bad,
        "scrubbed": None if scrubbed is None else dict(sorted(scrubbed.items())),
    }
