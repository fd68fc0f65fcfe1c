"""Text that a language model writes, to train on: the teacher's (sequence level) or the student's (on policy).

A block of the data begins a text: its prompt is what the data mask, or the first half where they mask
nothing, and the rest of the block is written anew.
Sequence level: Kim & Rush 2016, arXiv:1606.07947.  On policy: Agarwal et al. 2023, arXiv:2306.13649.

B batch, P prompt, S sequence, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeslm.stages.teacher import Records, answering, fill

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from edgeslm.progress import Progress

NOT_COUNTED = -100
"""Label of a token that no loss counts."""
SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
"""The model's own distribution, whole: what a divergence from it is about."""
AT_ONCE = 16


def prompt_length(labels: NDArray[np.int64]) -> int:
    """Tokens of a block that are given: those before the first counted one, or half where all are counted."""
    counted = np.flatnonzero(labels != NOT_COUNTED)
    first = int(counted[0]) if len(counted) else 0
    return first if first > 1 else max(1, len(labels) // 2)


def continue_texts(
    model: Any,
    prompts: Sequence[Sequence[int]],
    longest: int,
    *,
    end: Sequence[int],
    width: int,
    **sampling: Any,
) -> list[list[int]]:
    """What `model` writes behind each prompt, up to and with its end token.

    prompts: token ids, none empty.  longest: tokens of a prompt and its continuation.  end: tokens that
    end a text.  width: ids below it may be written; rows that pad a vocabulary are no tokens.  sampling:
    fields of transformers' GenerationConfig.  Draws from torch's global generator.
    """
    import torch
    from transformers import GenerationConfig

    given = max(map(len, prompts))
    pad = end[0] if end else 0
    ids, mask = torch.full((len(prompts), given), pad), torch.zeros(len(prompts), given, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, given - len(prompt) :] = torch.tensor(prompt)
        mask[row, given - len(prompt) :] = 1
    device = next(model.parameters()).device
    settings = GenerationConfig(
        max_new_tokens=max(1, longest - min(map(len, prompts))),
        eos_token_id=list(end) or None,
        pad_token_id=pad,
        suppress_tokens=list(range(width, model.get_output_embeddings().weight.shape[0])) or None,
        **(sampling or SAMPLING),
    )
    training = model.training
    model.eval()  # dropout belongs to learning; gradient checkpointing would switch the cache off
    try:
        with torch.no_grad():
            written = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=settings,
                use_model_defaults=False,
            )
    finally:
        model.train(training)
        # Until pytorch/pytorch#165068 the casts kept here would let no gradient through in the steps that follow.
        torch.clear_autocast_cache()
    return [
        _until_end(row[given:].tolist(), end)[: longest - len(prompt)]
        for row, prompt in zip(written, prompts, strict=True)
    ]


def _until_end(tokens: list[int], end: Sequence[int]) -> list[int]:
    """The tokens up to the first end token, with it."""
    for place, token in enumerate(tokens):
        if token in end:
            return tokens[: place + 1]
    return tokens


def as_blocks(
    prompts: Sequence[Sequence[int]], written: Sequence[Sequence[int]], context: int, pad: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """[B, S] ids and [B, S] labels: prompts and padding are not counted.  What is longer than S is cut."""
    ids = np.full((len(prompts), context), pad, np.int64)
    labels = np.full((len(prompts), context), NOT_COUNTED, np.int64)
    for row, (prompt, text) in enumerate(zip(prompts, written, strict=True)):
        both = [*prompt, *text][:context]
        ids[row, : len(both)] = both
        labels[row, len(prompt) : len(both)] = both[len(prompt) :]
    return ids, labels


@dataclass(frozen=True, kw_only=True)
class Writer:
    """A teacher that continues the beginnings of a student's blocks.

    teacher: the model.  own: its tokenizer, None when it is the student's.  student: the student's
    tokenizer.  ends: the teacher's end tokens.  width: the teacher's ids that are tokens.  A block's text
    is drawn from `seed` and the block's number.
    """

    teacher: Any
    own: Any | None
    student: Any
    ends: tuple[int, ...]
    width: int
    seed: int

    def blocks(
        self, items: Sequence[dict[str, Any]], number: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Ids and labels, both [B, S], of blocks from the `number`th on."""
        import torch

        context = len(items[0]["input_ids"])
        prompts = [list(item["input_ids"][: prompt_length(item["labels"])]) for item in items]
        asked = [self._to_teacher(prompt) for prompt in prompts]
        grown = max(len(theirs) - len(ours) for theirs, ours in zip(asked, prompts, strict=True))
        with torch.random.fork_rng():
            torch.manual_seed(int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0]))
            with answering(self.teacher):
                written = continue_texts(
                    self.teacher, asked, context + max(0, grown), end=self.ends, width=self.width
                )
        texts = [self._to_student(prompt, text) for prompt, text in zip(asked, written, strict=True)]
        return as_blocks(prompts, texts, context, self._pad)

    @property
    def _pad(self) -> int:
        eos = self.student.eos_token_id
        return 0 if eos is None else int(eos)

    def _to_teacher(self, tokens: Sequence[int]) -> list[int]:
        if self.own is None:
            return [int(token) for token in tokens]
        text = self.student.decode(tokens, skip_special_tokens=True)
        return list(self.own.encode(text, add_special_tokens=True, verbose=False)) or [self.ends[0]]

    def _to_student(self, prompt: list[int], tokens: list[int]) -> list[int]:
        """What the teacher wrote behind a prompt, in the student's tokens."""
        if self.own is None:
            return tokens
        before = self.own.decode(prompt, skip_special_tokens=True)
        whole = self.own.decode([*prompt, *tokens], skip_special_tokens=True)
        alone = self.own.decode(tokens, skip_special_tokens=True)  # some lose their first space
        text = whole.removeprefix(before) if whole.startswith(before) else alone
        found = list(self.student.encode(text, add_special_tokens=False, verbose=False))
        ended = bool(tokens) and tokens[-1] in self.ends and self.student.eos_token_id is not None
        return [*found, self._pad] if ended else found


def generate(writer: Writer, dataset: Any, path: Path, progress: Progress) -> Records:
    """The teacher's version of each block, written once to `path`, which is continued where it stops."""
    context = len(dataset[0]["input_ids"])
    records = Records(path, np.dtype([("input_ids", np.int32, (context,)), ("labels", np.int32, (context,))]))

    def compute(start: int, stop: int) -> NDArray[Any]:
        ids, labels = writer.blocks([dataset[index] for index in range(start, stop)], start)
        rows = np.empty(stop - start, records.dtype)
        rows["input_ids"], rows["labels"] = ids, labels
        return rows

    fill(records, len(dataset), compute, at_once=AT_ONCE, name="teacher writes", progress=progress)
    return records


@dataclass(frozen=True)
class Written:
    """The teacher's blocks, with a share of the true ones in the place of theirs, chosen by the seed."""

    records: Records
    true: Any
    share: float
    seed: int

    def __len__(self) -> int:
        return len(self.true)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if np.random.default_rng([self.seed, index]).random() < self.share:
            return dict(self.true[index])
        return {name: row.astype(np.int64) for name, row in self.records[index].items()}
