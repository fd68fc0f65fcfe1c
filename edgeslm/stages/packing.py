"""Documents as blocks of tokens for training a language model, on disk: memory stays flat as the text grows.

Documents are laid end to end with EOS between them and cut into blocks of S tokens, so that no
computation goes into padding (Raffel et al. 2020, arXiv:1910.10683, section 3.1.2, "packing").
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeslm.atomic import assembling, writing
from edgeslm.errors import DataError, EdgeslmError, ModelError
from edgeslm.progress import Progress, Quiet
from edgeslm.stages.arrays import ArrayReader, ArrayWriter
from edgeslm.stages.calibrate import begin_token
from edgeslm.stages.chats import Chat, Messages, Render, renderer
from edgeslm.stages.data import render as render_document
from edgeslm.stages.data import without_system

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from edgeslm.stages.data import Document

    Span = tuple[int, int]
    Array = NDArray[Any]

IGNORED = -100
"""The label of a position that the loss does not count, as torch's cross entropy has it."""
BATCH_CHARACTERS = 2**18
"""Text that is tokenized at once, and the longest piece of a document that is tokenized whole."""
TOKENS, COUNTED, FACTS = "tokens.npy", "counted.npy", "blocks.json"


@dataclass(frozen=True)
class TokenBlocks:
    """Blocks of `context` tokens on disk, read one at a time.

    counted_tokens: positions whose token the loss counts; a block's first is none of them, since
    nothing comes before it.
    """

    path: Path
    blocks: int
    context: int
    counted_tokens: int
    documents: int

    @classmethod
    def open(cls, path: Path) -> TokenBlocks:
        """What `pack` wrote to a directory.  Raises DataError when it is not there or damaged."""
        try:
            return cls(path=path, **json.loads((path / FACTS).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"{path}: no packed blocks: {error}") from error

    def __len__(self) -> int:
        return self.blocks

    def __getitem__(self, index: int) -> dict[str, NDArray[np.int64]]:
        """{"input_ids": [S], "labels": [S]}; a label is the token itself, or -100 where it is not counted."""
        tokens = self._tokens[index].astype(np.int64)
        return {"input_ids": tokens, "labels": np.where(self._counted[index], tokens, IGNORED)}

    def summary(self) -> dict[str, int]:
        """{examples, documents, tokens, counted_tokens} for the record of the data."""
        return {
            "examples": self.blocks,
            "documents": self.documents,
            "tokens": self.blocks * self.context,
            "counted_tokens": self.counted_tokens,
        }

    @cached_property
    def _tokens(self) -> ArrayReader:
        return ArrayReader(self.path / TOKENS)

    @cached_property
    def _counted(self) -> ArrayReader:
        return ArrayReader(self.path / COUNTED)


def collate_blocks(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A batch of blocks: {"input_ids", "labels"}, each a [B, S] int64 tensor."""
    import torch

    return {key: torch.from_numpy(np.stack([item[key] for item in items])) for key in ("input_ids", "labels")}


def pack(
    documents: Iterable[Document],
    tokenizer: Any,
    context: int,
    out: Path,
    *,
    completion_only: bool = False,
    chat: Chat | None = None,
    text_bytes: int = 0,
    progress: Progress | None = None,
) -> TokenBlocks:
    """Tokenize documents into blocks in the new directory `out`.

    tokenizer: a fast one of transformers.  completion_only: count the loss on completions and on the
    assistant's turns alone, with the mark that ends them; plain texts count whole.  chat: renders
    (template, messages, BOS, EOS, add_generation_prompt) as text; None: transformers' own way.  text_bytes: of
    all documents, roughly, for the progress; 0: not known.
    The last block is filled with EOS that are not counted.  Raises DataError when nothing is counted.
    """
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer has no tokenizer.json, or no EOS token to put between documents")
    render = renderer(tokenizer, chat)
    pieces = (
        piece
        for document in documents
        for piece in _pieces(document, render, tokenizer.eos_token, completion_only=completion_only)
    )
    progress = progress or Quiet()
    with writing(out), assembling(out) as beside:
        with (
            _Blocks(beside, context, tokenizer.eos_token_id) as blocks,
            progress.task("tokenizing", text_bytes, "bytes") as advance,
        ):
            for ids, counted, ends in _tokenized(pieces, tokenizer, advance):
                blocks.add(ids, counted, ends=ends)
            blocks.finish()
        facts = {
            "blocks": blocks.written,
            "context": context,
            "counted_tokens": blocks.counted,
            "documents": blocks.documents,
        }
        (beside / FACTS).write_text(json.dumps(facts), encoding="utf-8")
    packed = TokenBlocks(path=out, **facts)
    progress.note(
        f"packed {packed.documents} documents into {packed.blocks} blocks of {context} tokens, "
        f"{packed.counted_tokens} of them counted"
    )
    return packed


# --- documents as pieces of text, with the parts that count ---


@dataclass(frozen=True)
class _Piece:
    """Text that is tokenized at once.  counts: character ranges whose tokens count; None: all of it.

    begins, ends: whether BOS goes before it and EOS behind it.
    """

    text: str
    counts: tuple[Span, ...] | None = None
    chat: bool = False
    begins: bool = True
    ends: bool = True


def _pieces(document: Document, render: Render, eos: str, *, completion_only: bool) -> Iterator[_Piece]:
    text = document.text or ""
    if document.messages:
        if completion_only:
            text, spans = assistant_spans(document.messages, render, given=document.given)
        else:
            text = render_document(document, lambda messages: render(messages, False))
        ends = not text.rstrip().endswith(eos)
        yield _Piece(text, tuple(spans) if completion_only else None, chat=True, ends=ends)
    elif completion_only and document.prompt is not None:
        yield _Piece(text, ((len(document.prompt), len(text)),))
    else:
        for start, end in pairwise([0, *_cuts(text), len(text)]):
            yield _Piece(text[start:end], begins=start == 0, ends=end == len(text))


def _cuts(text: str) -> Iterator[int]:
    """Where a long text is cut: between a line's end and what is no space, which leaves most tokens as they are."""
    at = 0
    while len(text) - at > BATCH_CHARACTERS:
        end = cut = at + BATCH_CHARACTERS
        while (cut := text.rfind("\n", at, cut)) >= 0 and text[cut + 1].isspace():
            pass
        at = cut + 1 if cut >= 0 else end
        yield at


def assistant_spans(messages: Messages, render: Render, *, given: int = 0) -> tuple[str, list[Span]]:
    """A conversation as text, and the character ranges of the assistant's turns with the mark that ends them.

    render: (messages, add_generation_prompt) -> text.  given: so many leading messages are the prompt.
    A turn begins where the prompt to generate it ends, and ends where the conversation up to it does.
    Where a template renders a turn otherwise once more follow, as those that drop earlier thoughts, the
    turn's text is looked for.  Raises DataError when it is not found.
    """
    try:
        text = render(messages, False)
    except EdgeslmError:
        merged = without_system(messages)
        if merged is None:
            raise
        messages, given, text = merged, max(0, given - 1), render(merged, False)
    spans: list[Span] = []
    at = 0
    for index, message in enumerate(messages):
        content = message["content"].strip()
        if message["role"] != "assistant" or not content:
            continue
        before = render(messages[:index], True) if index else None
        known = before is not None and text.startswith(before)
        start = len(before or "") if known else text.find(content, at)
        after = render(messages[: index + 1], False)
        if text.startswith(after):
            at = len(after)
        else:
            at = text.find(content, start) + len(content)
            mark = after.rpartition(content)[2]
            at += len(mark) if text.startswith(mark, at) else 0
        if start < 0 or at <= start:
            raise DataError(
                f"the chat template does not show an assistant's turn: {content[:40]!r}",
                hint="set completion_only = false in [data]",
            )
        if index >= given:
            spans.append((start, at))
    return text, spans


# --- pieces as tokens, tokens as blocks ---


def _tokenized(
    pieces: Iterable[_Piece], tokenizer: Any, advance: Callable[[float], None]
) -> Iterator[tuple[Array, Array, bool]]:
    """(ids [n], whether they count [n], whether a document ends) of each piece that has tokens.

    advance: is told the bytes of what was tokenized.
    """
    bos, eos = begin_token(tokenizer), tokenizer.eos_token_id
    for batch in _batches(pieces):
        encoded = tokenizer(
            [piece.text for piece in batch], add_special_tokens=False, split_special_tokens=not batch[0].chat,
            return_attention_mask=False, return_token_type_ids=False, verbose=False,
            return_offsets_mapping=any(piece.counts is not None for piece in batch),
        )  # fmt: skip
        for number, piece in enumerate(batch):
            ids = encoded["input_ids"][number]
            if not ids:
                continue
            counted = np.ones(len(ids), bool)
            if piece.counts is not None:
                counted = _within(np.array(encoded["offset_mapping"][number]), piece.counts)
            head = [bos] if piece.begins and bos is not None and ids[0] != bos else []
            tail = [eos] if piece.ends else []
            yield (
                np.array([*head, *ids, *tail], np.int32),
                np.concatenate([np.zeros(len(head), bool), counted, np.full(len(tail), counted.any())]),
                piece.ends or piece.chat,
            )
        advance(sum(len(piece.text.encode("utf-8", errors="replace")) for piece in batch))


def _within(offsets: NDArray[np.int64], spans: Sequence[Span]) -> NDArray[np.bool_]:
    """offsets: [n, 2] characters of each token.  A token counts when any character of it does: [n]."""
    inside = np.zeros(len(offsets), bool)
    for start, end in spans:
        inside |= (offsets[:, 1] > start) & (offsets[:, 0] < end)
    return inside


def _batches(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """Runs of pieces of one kind, of BATCH_CHARACTERS or little more."""
    batch: list[_Piece] = []
    size = 0
    for piece in pieces:
        if batch and (size >= BATCH_CHARACTERS or piece.chat != batch[0].chat):
            yield batch
            batch, size = [], 0
        batch.append(piece)
        size += len(piece.text)
    if batch:
        yield batch


class _Blocks:
    """Lays tokens end to end and writes each block that is full."""

    def __init__(self, directory: Path, context: int, eos: int) -> None:
        self.written = self.counted = self.documents = 0
        self._context, self._eos = context, eos
        self._tokens, self._counts = np.zeros(0, np.int32), np.zeros(0, bool)
        self._open = ExitStack()
        self._files = [
            self._open.enter_context(ArrayWriter(directory / name, kind, (context,)))
            for name, kind in ((TOKENS, np.int32), (COUNTED, np.bool_))
        ]

    def add(self, tokens: Array, counted: Array, *, ends: bool) -> None:
        self.documents += ends
        self._tokens = np.concatenate([self._tokens, tokens])
        self._counts = np.concatenate([self._counts, counted])
        whole = len(self._tokens) // self._context * self._context
        if whole:
            self._write(self._tokens[:whole], self._counts[:whole])
            self._tokens, self._counts = self._tokens[whole:], self._counts[whole:]

    def finish(self) -> None:
        """Write the rest, filled with EOS.  Raises DataError when nothing is counted."""
        if self._counts[1:].any():
            missing = (0, self._context - len(self._tokens))
            tokens = np.pad(self._tokens, missing, constant_values=self._eos)
            self._write(tokens, np.pad(self._counts, missing))
        if not self.documents:
            raise DataError("the documents hold no tokens")
        if not self.counted:
            raise DataError(
                "the documents hold nothing to learn",
                hint="with completion_only, rows have a completion or an assistant's turn",
            )

    def _write(self, tokens: Array, counted: Array) -> None:
        tokens, counted = (values.reshape(-1, self._context) for values in (tokens, counted))
        counted[:, 0] = False
        for file, values in zip(self._files, (tokens, counted), strict=True):
            file.append(values)
        self.written += len(tokens)
        self.counted += int(counted.sum())

    def __enter__(self) -> _Blocks:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()
