"""Text and chat documents out of files and installed packages, streamed.

A source is a path (text, or JSONL by its suffix), pkg://package/path, or pkg://package/file.py#NAME
for a literal of strings that a Python file assigns to NAME; that file is parsed, never imported.
"""

from __future__ import annotations

import ast
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeslm.bundle import file_sha256
from edgeslm.errors import DataError, EdgeslmError
from edgeslm.progress import Progress, Quiet
from edgeslm.stages.checkpoint import package_path

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from edgeslm.recipe import Recipe

    Chat = Callable[[Sequence[Mapping[str, str]]], str]

JSONL = (".jsonl", ".ndjson")
NOT_TEXT = (".json", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".zst", ".zip", ".gguf", ".pdf", ".docx")
MOST_BAD_ROWS = 0.05
"""Share of a JSONL file's rows that may be unusable; beyond it the file is taken for the wrong one."""


@dataclass(frozen=True, kw_only=True)
class Document:
    """One piece of text, or one conversation to be rendered with a chat template."""

    text: str | None = None
    messages: tuple[dict[str, str], ...] | None = None


def documents(
    sources: Sequence[str], *, base: Path | None = None, progress: Progress | None = None
) -> Iterator[Document]:
    """The documents of all sources in order; a text file is one document, a JSONL row is one.

    A row is {"text"}, {"prompt", "completion"} or {"messages": [{"role", "content"}]}.  Rows that are
    none of these are counted and the first is shown.  Raises DataError for a source that is missing,
    is no text, holds nothing, or has more than 5 % of such rows.
    """
    for source in sources:
        path, name = _locate(source, base or Path())
        if name:
            found = _literal(path, name)
        elif path.suffix.lower() in JSONL:
            found = _rows(path, progress or Quiet())
        else:
            found = iter([Document(text=_read_text(path))])
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
        raise DataError(
            f"{len(kept)} documents are too few to hold out every {heldout_every}th",
            hint="a text file is one document: name several, a JSONL file, or [data] heldout",
        )
    return kept, heldout


def render(document: Document, chat: Chat) -> str:
    """The document as text; chat: renders messages with a model's chat template.

    A template that has no place for a system message gets it at the head of the first user message.
    """
    if not document.messages:
        return document.text or ""
    try:
        return chat(document.messages)
    except EdgeslmError:
        system, *rest = document.messages
        if system["role"] != "system" or not rest:
            raise
        first = {**rest[0], "content": f"{system['content']}\n\n{rest[0]['content']}"}
        return chat((first, *rest[1:]))


def sources_digest(sources: Sequence[str], *, base: Path | None = None) -> str:
    """sha256 over the contents of all sources, in order; where they lie does not matter."""
    total = hashlib.sha256()
    for source in sources:
        path, name = _locate(source, base or Path())
        total.update(f"{path.suffix.lower()}\0{name}\0{file_sha256(path)}\n".encode())
    return total.hexdigest()


def calibration_documents(recipe: Recipe, progress: Progress) -> Iterable[Document]:
    """What a recipe calibrates on: its calibration sources without what it holds out of them."""
    found = documents(recipe.data.calibration, base=recipe.base, progress=progress)
    return split(found, recipe.data.heldout_every)[0] if recipe.data.heldout_every else found


def heldout_documents(recipe: Recipe, progress: Progress) -> list[Document]:
    """What a recipe measures quality on."""
    data = recipe.data
    if data.heldout_every:
        return split(documents(data.calibration, base=recipe.base, progress=progress), data.heldout_every)[1]
    return list(documents(data.heldout, base=recipe.base, progress=progress))


def data_digest(recipe: Recipe, sources: Sequence[str]) -> str:
    """What identifies the documents that a recipe takes from `sources`."""
    return f"{sources_digest(sources, base=recipe.base)}/{recipe.data.heldout_every}"


def _locate(source: str, base: Path) -> tuple[Path, str]:
    """The file that a source names, and the name after '#' ("" without one)."""
    if source.startswith("pkg://"):
        where, _, name = source.partition("#")
        path = package_path(where)
    else:
        path, name = base / Path(source).expanduser(), ""
    if not path.exists():
        raise DataError(
            f"no text at {path}",
            hint="a relative path starts from the recipe's folder, or from here without a recipe",
        )
    if not path.is_file():
        raise DataError(f"{path}: not a file", hint="name the files in it")
    if path.suffix.lower() in NOT_TEXT:
        raise DataError(
            f"{path}: {path.suffix} can't be read as text",
            hint='use text, or JSONL: one {"text": ...} or {"messages": [...]} a line',
        )
    if path.suffix == ".py" and source.startswith("pkg://") and not name:
        raise DataError(f"{source}: name the literal to read", hint=f"such as {source}#NAME")
    return path, name


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}", hint="save it as UTF-8 text") from error


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


def _rows(path: Path, progress: Progress) -> Iterator[Document]:
    total, bad, first = 0, 0, ""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            total += 1
            try:
                yield _row(line)
            except ValueError as error:
                bad += 1
                first = first or f"line {number}: {error}"
    if bad > MOST_BAD_ROWS * total:
        raise DataError(
            f"{path}: {bad} of {total} rows can't be used; {first}",
            hint='a row is {"text": ...}, {"prompt": ..., "completion": ...} or {"messages": [...]}',
        )
    if bad:
        progress.note(f"{path.name}: left out {bad} of {total} rows; {first}")


def _row(line: bytes) -> Document:
    """One line of JSONL.  Raises ValueError saying what is wrong with it."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(row, dict):
        raise ValueError(f"holds {type(row).__name__}, not an object")
    if "messages" in row:
        return Document(messages=_messages(row["messages"]))
    if isinstance(row.get("text"), str):
        return Document(text=row["text"])
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return Document(text=prompt + completion)
    if isinstance(prompt, list) and isinstance(completion, list):
        return Document(messages=_messages(prompt + completion))
    raise ValueError(f"has neither text, prompt and completion, nor messages, but {sorted(row)[:5]}")


def _messages(value: Any) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise ValueError("messages is not a list of messages")
    for message in value:
        if not isinstance(message, dict) or not all(
            isinstance(message.get(k), str) for k in ("role", "content")
        ):
            raise ValueError("a message has no role or content that is a string")
    return tuple({"role": message["role"], "content": message["content"]} for message in value)
