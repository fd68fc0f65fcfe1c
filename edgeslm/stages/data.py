"""Text and chat documents out of files, tables, installed packages and hubs, streamed.

A source is a path to text, a table (see edgeslm.stages.tables), pkg://package/path, or
pkg://package/file.py#NAME for a literal of strings that a Python file assigns to NAME; that file is
parsed, never imported.
"""

from __future__ import annotations

import ast
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgeslm.errors import DataError, EdgeslmError
from edgeslm.stages.scrub import Scrubber, read_names
from edgeslm.stages.tables import MOST_BAD_ROWS, Tally, is_table, locate, read, sources_digest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from edgeslm.progress import Progress
    from edgeslm.recipe import Recipe

    Chat = Callable[[Sequence[Mapping[str, str]]], str]

NOT_TEXT = (".json", ".arrow", ".gz", ".zst", ".zip", ".gguf", ".pdf", ".docx", ".xlsx")
ROW_HINT = 'a row is {"text": ...}, {"prompt": ..., "completion": ...} or {"messages": [...]}'


@dataclass(frozen=True, kw_only=True)
class Document:
    """One piece of text, or one conversation to be rendered with a chat template."""

    text: str | None = None
    messages: tuple[dict[str, str], ...] | None = None
    prompt: str | None = None
    """What `text` begins with and is given rather than learned; None: nothing is."""
    given: int = 0
    """So many of the first messages are the prompt."""


def documents(
    sources: Sequence[str],
    *,
    base: Path | None = None,
    progress: Progress | None = None,
    max_bad: float = MOST_BAD_ROWS,
    text: str = "text",
    tally: Tally | None = None,
) -> Iterator[Document]:
    """The documents of all sources in order; a text file is one document, a table's row is one.

    A row is {"text"}, {"prompt", "completion"} or {"messages": [{"role", "content"}]}; other columns do
    not matter.  text: what the text's column is called.  Rows that are none of these are counted (into
    `tally`) and the first is shown.  Raises DataError for a source that is missing, is no text, holds
    nothing, or has a larger share of such rows than `max_bad`.
    """
    for source in sources:
        found: Iterator[Document]
        if is_table(source):
            rows = read(
                source, lambda row: _document(row, text), base=base, progress=progress, max_bad=max_bad,
                tally=tally, hint=ROW_HINT,
            )  # fmt: skip
            found = (document for document, _ in rows)
        else:
            found = _file(source, base)
        empty = True
        for document in found:
            if document.messages or (document.text and document.text.strip()):
                empty = False
                yield document
        if empty:
            raise DataError(f"{source}: holds no text")


def split(found: Iterable[Document], heldout_every: int) -> tuple[list[Document], list[Document]]:
    """(kept, held out): the last of every `heldout_every` documents is held out.

    Raises DataError when there are too few documents for one to be held out.
    """
    kept: list[Document] = []
    heldout: list[Document] = []
    for index, document in enumerate(found):
        (heldout if index % heldout_every == heldout_every - 1 else kept).append(document)
    if not heldout:
        raise _too_few(len(kept), heldout_every)
    return kept, heldout


def split_stream(
    found: Iterable[Document], heldout_every: int, keep: Literal["train", "heldout"]
) -> Iterator[Document]:
    """One side of what `split` divides, streamed.  Raises DataError at the end when there were too few."""
    count = 0
    for document in found:
        heldout = count % heldout_every == heldout_every - 1
        count += 1
        if heldout == (keep == "heldout"):
            yield document
    if count < heldout_every:
        raise _too_few(count, heldout_every)


def _too_few(count: int, heldout_every: int) -> DataError:
    return DataError(
        f"{count} documents are too few to hold out every {heldout_every}th",
        hint="a text file is one document: name several, a table, or [data] heldout",
    )


def render(document: Document, chat: Chat) -> str:
    """The document as text; chat: renders messages with a model's chat template.

    A template that has no place for a system message gets it at the head of the first user message.
    """
    if not document.messages:
        return document.text or ""
    try:
        return chat(document.messages)
    except EdgeslmError:
        merged = without_system(document.messages)
        if merged is None:
            raise
        return chat(merged)


def without_system(messages: Sequence[Mapping[str, str]]) -> tuple[Mapping[str, str], ...] | None:
    """A conversation with its system message at the head of the first user message; None without one."""
    system, *rest = messages
    if system["role"] != "system" or not rest:
        return None
    first = {**rest[0], "content": f"{system['content']}\n\n{rest[0]['content']}"}
    return (first, *rest[1:])


def train_documents(
    recipe: Recipe, progress: Progress, scrubber: Scrubber | None = None
) -> Iterator[Document]:
    """What a recipe trains on: its training sources without what it holds out of them, streamed.

    scrubber: masks the texts and counts what it finds; None: one of the recipe's own.
    """
    found = _recipe_documents(recipe, recipe.data.train, progress, scrubber)
    every = recipe.data.heldout_every
    return split_stream(found, every, "train") if every else found


def calibration_documents(
    recipe: Recipe, progress: Progress, scrubber: Scrubber | None = None
) -> Iterator[Document]:
    """What a recipe calibrates on: its calibration or else its training sources, without what it holds out."""
    data = recipe.data
    sources = data.calibration or data.train
    found = _recipe_documents(recipe, sources, progress, scrubber)
    divided = data.heldout_every and sources == (data.train or data.calibration)
    return split_stream(found, data.heldout_every or 0, "train") if divided else found


def heldout_documents(
    recipe: Recipe, progress: Progress, scrubber: Scrubber | None = None
) -> Iterator[Document]:
    """What a recipe measures quality on, streamed."""
    data = recipe.data
    if data.heldout_every:
        found = _recipe_documents(recipe, data.train or data.calibration, progress, scrubber)
        return split_stream(found, data.heldout_every, "heldout")
    return _recipe_documents(recipe, data.heldout, progress, scrubber)


def scrubber_of(recipe: Recipe) -> Scrubber | None:
    """What masks a recipe's texts; None without [scrub]."""
    if recipe.scrub is None:
        return None
    return Scrubber(recipe.scrub, read_names(recipe.scrub.names, recipe.base))


def data_digest(recipe: Recipe, sources: Sequence[str]) -> str:
    """What identifies the documents that a recipe takes from `sources`, and what is masked in them."""
    read: list[Any] = [recipe.columns.text, recipe.data.max_bad_rows]
    if recipe.scrub is not None:
        read += [asdict(recipe.scrub), sources_digest(recipe.scrub.names, base=recipe.base)]
    return f"{sources_digest(sources, base=recipe.base)}/{recipe.data.heldout_every}/{json.dumps(read)}"


def _recipe_documents(
    recipe: Recipe, sources: Sequence[str], progress: Progress, scrubber: Scrubber | None
) -> Iterator[Document]:
    found = documents(
        sources,
        base=recipe.base,
        progress=progress,
        max_bad=recipe.data.max_bad_rows,
        text=recipe.columns.text,
    )
    scrubber = scrubber or scrubber_of(recipe)
    return map(scrubber.document, found) if scrubber else found


def _file(source: str, base: Path | None) -> Iterator[Document]:
    path, name = locate(source, base or Path())
    if name:
        return _literal(path, name)
    if path.suffix.lower() in NOT_TEXT:
        raise DataError(
            f"{path}: {path.suffix} can't be read as text",
            hint='use text, a table, or JSONL: one {"text": ...} or {"messages": [...]} a line',
        )
    if path.suffix == ".py" and source.startswith("pkg://"):
        raise DataError(f"{source}: name the literal to read", hint=f"such as {source}#NAME")
    return iter([Document(text=_read_text(path))])


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}", hint="save it as UTF-8 text") from error
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror or error}") from error


def _literal(path: Path, name: str) -> Iterator[Document]:
    """The strings of a dict's values or of a list that a Python file assigns to `name`."""
    try:
        tree = ast.parse(_read_text(path))
        value = next(
            ast.literal_eval(node.value)
            for node in reversed(tree.body)
            if isinstance(node, ast.Assign | ast.AnnAssign)
            and node.value is not None
            and name in _targets(node)
        )
    except StopIteration:
        raise DataError(f"{path.name}: assigns nothing to {name}") from None
    except (SyntaxError, ValueError, RecursionError) as error:
        raise DataError(f"{path.name}: {name} is not a plain literal: {error}") from error
    items = list(value.values()) if isinstance(value, dict) else value
    if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
        raise DataError(f"{path.name}: {name} is not a dict or list of strings")
    return (Document(text=item) for item in items)


def _targets(node: ast.Assign | ast.AnnAssign) -> set[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _document(row: Mapping[str, Any], text: str) -> Document:
    """One row of a table.  Raises ValueError saying what is wrong with it."""
    if row.get("messages") is not None:
        return Document(messages=_messages(row["messages"]))
    if isinstance(row.get(text), str):
        return Document(text=row[text])
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return Document(text=prompt + completion, prompt=prompt)
    if isinstance(prompt, list) and isinstance(completion, list):
        return Document(messages=_messages(prompt + completion), given=len(prompt))
    raise ValueError(f"has neither {text}, prompt and completion, nor messages, but {sorted(row)[:5]}")


def _messages(value: Any) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise ValueError("messages is not a list of messages")
    for message in value:
        if not isinstance(message, dict) or not all(
            isinstance(message.get(k), str) for k in ("role", "content")
        ):
            raise ValueError("a message has no role or content that is a string")
    return tuple({"role": message["role"], "content": message["content"]} for message in value)
