"""A recipe's data as data sets on disk: packed blocks for language models, labelled texts for classifiers.

OUT/train, OUT/heldout   what packing.pack or labelled.tokenize_examples wrote
OUT/data.json            the record edgeslm.data/1
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeslm.progress import Quiet
from edgeslm.stages import labelled
from edgeslm.stages.data import heldout_documents, scrubber_of, train_documents
from edgeslm.stages.packing import TokenBlocks, pack
from edgeslm.stages.tables import Tally, is_hub, locate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from edgeslm.progress import Progress
    from edgeslm.recipe import Recipe
    from edgeslm.stages.data import Document
    from edgeslm.stages.scrub import Scrubber

RECORD = "data.json"


@dataclass(frozen=True, kw_only=True)
class DataSets:
    """What a model is trained and measured on.  heldout is None where a recipe holds nothing out."""

    train: Any
    heldout: Any
    record: dict[str, Any]

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes of labelled examples."""
        names: tuple[str, ...] = self.train.classes
        return names


@dataclass(frozen=True, kw_only=True)
class _Job:
    recipe: Recipe
    tokenizer: Any
    context: int
    out: Path
    scrubber: Scrubber | None
    chat: Callable[..., str]
    progress: Progress


def prepare(
    recipe: Recipe, tokenizer: Any, context: int, out: Path, *, chat: Callable[..., str], progress: Progress
) -> None:
    """Fill the directory `out` for `open_sets`.

    tokenizer: a fast one of transformers.  context: tokens of an example at most.  chat: renders
    conversations, see packing.pack.  Raises DataError for sources that give nothing to learn from.
    """
    scrubber = scrubber_of(recipe)
    job = _Job(
        recipe=recipe, tokenizer=tokenizer, context=context, out=out, scrubber=scrubber, chat=chat,
        progress=progress,
    )  # fmt: skip
    record = _fill_blocks(job) if recipe.task == "causal-lm" else _fill_labelled(job)
    if scrubber is not None:
        record["scrubbed"] = dict(sorted(scrubber.counts.items()))
    record["licence"] = recipe.data.licence
    (out / RECORD).write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")


def open_sets(task: str, directory: Path) -> DataSets:
    """What `prepare` wrote.  Raises DataError when it is not there."""
    heldout = directory / "heldout"
    record = json.loads((directory / RECORD).read_text(encoding="utf-8"))
    if task == "causal-lm":
        return DataSets(
            train=TokenBlocks.open(directory / "train"),
            heldout=TokenBlocks.open(heldout) if heldout.exists() else None,
            record=record,
        )
    examples = labelled.TextExamples.open(directory / "train")
    if heldout.exists():
        return DataSets(train=examples, heldout=labelled.TextExamples.open(heldout), record=record)
    if (directory / "kept.npy").exists():
        kept, held = (np.load(directory / name, allow_pickle=False) for name in ("kept.npy", "held.npy"))
        return DataSets(train=examples.subset(kept), heldout=examples.subset(held), record=record)
    return DataSets(train=examples, heldout=None, record=record)


def _fill_blocks(job: _Job) -> dict[str, Any]:
    recipe, data, progress = job.recipe, job.recipe.data, job.progress

    def packed(found: Iterable[Document], name: str, size: float) -> TokenBlocks:
        return pack(
            found, job.tokenizer, job.context, job.out / name, completion_only=data.completion_only,
            chat=job.chat, text_bytes=int(size), progress=progress,
        )  # fmt: skip

    size, held_size = (sources_bytes(sources, recipe.base) for sources in (data.train, data.heldout))
    if data.heldout_every:
        held_size = size / data.heldout_every
        size -= held_size
    train = packed(train_documents(recipe, progress, job.scrubber), "train", size)
    if not (data.heldout or data.heldout_every):
        return labelled.data_record(train.summary(), None)
    held = packed(heldout_documents(recipe, progress, job.scrubber), "heldout", held_size)
    again = Quiet()  # the sources are read once more; what is wrong with them has been said
    found = labelled.duplicates(
        map(_plain, train_documents(recipe, again)), map(_plain, heldout_documents(recipe, again))
    )
    _say_duplicates(found, progress)
    return labelled.data_record(train.summary(), held.summary(), found=found)


def sources_bytes(sources: Sequence[str], base: Path) -> float:
    """Bytes of all sources as they lie on the disk; 0 where that says little: a hub's, packed or in columns."""
    total = 0
    for source in sources:
        if is_hub(source):
            return 0.0
        path, _ = locate(source, base)
        if path.suffix.lower() in (".gz", ".parquet"):
            return 0.0
        total += path.stat().st_size
    return float(total)


def _plain(document: Document) -> str:
    """A document's own words, to be compared with others'."""
    return document.text or "\n".join(message["content"] for message in document.messages or ())


def _fill_labelled(job: _Job) -> dict[str, Any]:
    recipe, data, tally = job.recipe, job.recipe.data, Tally()

    def rows(sources: tuple[str, ...], tally: Tally | None = None) -> Iterator[labelled.Labelled]:
        found = labelled.labelled_rows(
            sources, recipe.columns, base=recipe.base, max_bad=data.max_bad_rows, tally=tally,
            progress=None if tally is None else job.progress,
        )  # fmt: skip
        return found if job.scrubber is None or tally is None else job.scrubber.labelled(found)

    classes = labelled.classes(rows(data.train), recipe.columns)

    def tokenized(sources: tuple[str, ...], name: str) -> labelled.TextExamples:
        return labelled.tokenize_examples(
            rows(sources, tally), job.tokenizer, classes, job.context, job.out / name, progress=job.progress
        )

    examples = tokenized(data.train, "train")
    held: labelled.TextExamples | None = None
    if data.heldout:
        held = tokenized(data.heldout, "heldout")
    elif data.heldout_every:
        kept, chosen = labelled.stratified_split(examples.labels, data.heldout_every, recipe.seed)
        np.save(job.out / "kept.npy", kept)
        np.save(job.out / "held.npy", chosen)
        examples, held = examples.subset(kept), examples.subset(chosen)
    if held is None:
        return labelled.data_record(examples.summary(), None, tally=tally)
    found = labelled.duplicates(examples.texts(), held.texts())
    _say_duplicates(found, job.progress)
    return labelled.data_record(examples.summary(), held.summary(), found=found, tally=tally)


def _say_duplicates(found: labelled.Duplicates, progress: Progress) -> None:
    if found.count:
        train, held = found.first[0]
        progress.note(
            f"warning: {found.count} held-out examples are training examples too (the first: held-out {held} is "
            f"training {train}): quality measured on them is too good"
        )
