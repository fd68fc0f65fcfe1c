"""The teacher's answers on disk, so that it runs once: its likeliest tokens at each position, or its classes.

A file of records grows by appending, so whatever stops the teacher leaves the answers that it had given, and
the next run goes on behind them.  Its name says what it was made of: another teacher, other data, another
temperature are another file.

B batch, S sequence, V vocabulary, K kept tokens, L classes.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from edgeslm.atomic import way_out
from edgeslm.errors import DataError, EdgeslmError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from numpy.typing import NDArray

    from edgeslm.progress import Progress

    Item = dict[str, Any]

PREFIX = "teacher_"
"""Of the keys that an answer adds to an example."""
TOKENS_AT_ONCE = 1024
"""Language models: more would hold gigabytes of logits."""
EXAMPLES_AT_ONCE = 32


@dataclass(frozen=True)
class Records:
    """Rows of one layout in a plain file; a row that was cut off by a kill does not count."""

    path: Path
    dtype: np.dtype[Any]

    def __len__(self) -> int:
        return self.path.stat().st_size // self.dtype.itemsize if self.path.exists() else 0

    def __getitem__(self, index: int) -> Item:
        """Row `index` by field, in fresh memory."""
        size = self.dtype.itemsize
        data = os.pread(self._file.fileno(), size, index * size) if index >= 0 else b""
        if len(data) < size:
            raise DataError(f"{self.path}: no record {index}", hint="remove the file: it is made again")
        row = np.frombuffer(bytearray(data), self.dtype)[0]
        return {name: row[name] for name in self.dtype.names or ()}

    @cached_property
    def _file(self) -> BinaryIO:
        return self.path.open("rb")

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "dtype": self.dtype}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def fill(
    records: Records,
    count: int,
    compute: Callable[[int, int], NDArray[Any]],
    *,
    at_once: int,
    name: str,
    progress: Progress,
) -> None:
    """Bring `records` to `count` rows; compute(start, stop) gives rows start to stop of its layout.

    It goes on at a multiple of `at_once`, so that what is drawn by chance for these rows together is
    drawn again as it was.
    Raises EdgeslmError when the disk is full; the rows written so far stay.
    """
    there = min(len(records), count)
    done = there if there == count else there - there % at_once
    try:
        records.path.parent.mkdir(parents=True, exist_ok=True)
        with records.path.open("ab") as file, progress.task(name, count, "examples") as advance:
            if file.tell() > done * records.dtype.itemsize:
                file.truncate(done * records.dtype.itemsize)
            advance(done)
            while done < count:
                stop = min(done + at_once, count)
                file.write(compute(done, stop).tobytes())
                file.flush()
                os.fsync(file.fileno())
                advance(stop - done)
                done = stop
    except OSError as error:
        raise EdgeslmError(
            f"can't write {records.path}: {error.strerror or error}", hint=way_out(error)
        ) from error


def answering(model: Any) -> AbstractContextManager[None]:
    """Products in bfloat16 inside where training would have them too; the model does not move."""
    import torch

    from edgeslm.stages.schedule import suited_precision

    device = next(model.parameters()).device
    quick = suited_precision(device, model) == "bfloat16"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=quick)


def key(*parts: Any) -> str:
    """16 hexadecimal digits that stand for `parts`, JSON values."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def dataset_digest(dataset: Any) -> str:
    """sha256 over the arrays and numbers of all examples of a map-style dataset, in order."""
    total = hashlib.sha256()
    for index in range(len(dataset)):
        for name, value in sorted(dataset[index].items()):
            array = np.asarray(value)
            total.update(f"{name}\0{array.dtype.str}\0{array.shape}\n".encode())
            total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


def top_k_layout(context: int, k: int) -> np.dtype[Any]:
    """A record for a block of `context` tokens: [S, K] log-probabilities and tokens, [S] log of the tail."""
    return np.dtype(
        [
            (f"{PREFIX}values", np.float16, (context, k)),
            (f"{PREFIX}ids", np.int32, (context, k)),
            (f"{PREFIX}tail", np.float32, (context,)),
        ]
    )


def cache_top_k(
    logits: Callable[[Any], Any],
    dataset: Any,
    path: Path,
    *,
    k: int,
    vocabulary: int,
    temperature: float,
    progress: Progress,
) -> Records:
    """The k likeliest tokens at each position of each block, at a temperature, with the mass of the tail.

    logits: [B, S] token ids to [B, S, V] logits, of which the first `vocabulary` count.  dataset:
    map-style, "input_ids" of [S].  path: the file, which is continued where it stops.  A block takes
    (6 K + 4) S bytes.
    """
    import torch

    from edgeslm.stages import losses

    context = len(dataset[0]["input_ids"])
    k = min(k, vocabulary)
    records = Records(path, top_k_layout(context, k))

    def compute(start: int, stop: int) -> NDArray[Any]:
        ids = np.stack([dataset[index]["input_ids"] for index in range(start, stop)])
        with torch.inference_mode():
            kept = losses.top_k(logits(torch.from_numpy(ids))[..., :vocabulary], k, temperature)
        rows = np.empty(stop - start, records.dtype)
        for field, values in zip(("values", "ids", "tail"), kept, strict=True):
            rows[PREFIX + field] = values.float().cpu().numpy() if field != "ids" else values.cpu().numpy()
        return rows

    at_once = max(1, TOKENS_AT_ONCE // context)
    fill(records, len(dataset), compute, at_once=at_once, name="teacher", progress=progress)
    return records


def cache_classes(
    logits: Callable[[Sequence[Item]], Any], dataset: Any, path: Path, *, classes: int, progress: Progress
) -> Records:
    """The [L] logits of each example.  logits: examples to [B, L] logits."""
    import torch

    records = Records(path, np.dtype([(f"{PREFIX}logits", np.float32, (classes,))]))

    def compute(start: int, stop: int) -> NDArray[Any]:
        with torch.inference_mode():
            found = logits([dataset[index] for index in range(start, stop)])
        rows = np.empty(stop - start, records.dtype)
        rows[f"{PREFIX}logits"] = found.float().cpu().numpy()
        return rows

    fill(records, len(dataset), compute, at_once=EXAMPLES_AT_ONCE, name="teacher", progress=progress)
    return records


@dataclass(frozen=True)
class Taught:
    """A dataset whose examples carry the teacher's answers too."""

    dataset: Any
    answers: Records

    def __post_init__(self) -> None:
        if len(self.answers) < len(self.dataset):
            raise DataError(
                f"{self.answers.path}: {len(self.answers)} answers for {len(self.dataset)} examples",
                hint="remove the file: it is made again",
            )

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Item:
        return {**self.dataset[index], **self.answers[index]}


@dataclass(frozen=True)
class CollateTaught:
    """`collate` for examples that carry answers: these are stacked, tokens as int64 and the rest as float32."""

    collate: Callable[[list[Item]], Mapping[str, Any]]

    def __call__(self, items: list[Item]) -> dict[str, Any]:
        import torch

        plain = [{name: item[name] for name in item if not name.startswith(PREFIX)} for item in items]
        batch = dict(self.collate(plain))
        for name in items[0]:
            if name.startswith(PREFIX):
                stacked = np.stack([item[name] for item in items])
                kind = np.int64 if stacked.dtype.kind == "i" else np.float32
                batch[name] = torch.from_numpy(stacked.astype(kind))
        return batch
