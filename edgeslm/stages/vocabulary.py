"""Tokens that a domain never uses, dropped from tokenizer, embedding and configuration.

A text of the domain falls into the same token strings as before, under new ids; any other text still has
tokens, since those of single bytes stay.

V tokens of the whole vocabulary, V' of them kept, W windows of C tokens.
"""

from __future__ import annotations

import json
import re
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from edgeslm.errors import DataError, EdgeslmError, ModelError, first_line
from edgeslm.progress import Progress, Quiet
from edgeslm.stages.chats import Chat, renderer
from edgeslm.stages.checkpoint import silent_transformers
from edgeslm.stages.data import render
from edgeslm.stages.subwords import PLACEHOLDER, Subwords, special_ids

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from edgeslm.stages.data import Document


KEPT_FILE = "kept_tokens.npy"
"""[V'] int64 in a pruned model's directory: the id that each of its tokens had before."""
MULTIPLE = 64
"""Rows of an embedding are rounded up to it, with more tokens: kernels take several rows at a time."""
UNEXPECTED_SHARE = 0.0035
"""Probability that all dropped tokens may have together at a place in the domain's text."""
FEWEST_DOCUMENTS = 8
"""Below, documents say little of what another one would hold."""
CHECKED_CHARACTERS = 1_000_000
_SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model")
_ID_KEY = re.compile(r".*_token_ids?|(?:begin_)?suppress_tokens|(?:bad|force)_words_ids")
_STALE_FILES = ("vocab.json", "merges.txt", "added_tokens.json")


class Choice(NamedTuple):
    """[V'] ids that stay, the tokenizer that has only them, and how many tokens the text uses; None: all stay."""

    kept: NDArray[np.int64] | None
    tokenizer: Any | None
    used: int | None


class Used(NamedTuple):
    """[V] how often each token occurs, and the share of a document's tokens that no other document has.

    novelty: None for too few documents.
    """

    counts: NDArray[np.int64]
    novelty: float | None


def choose(
    tokenizer: Any,
    model: Any,
    windows: NDArray[np.int64],
    *,
    configs: Sequence[Mapping[str, Any]],
    documents: Callable[[], Iterable[Document]],
    chat: Chat,
    progress: Progress,
) -> Choice:
    """Tokens for the domain of the documents, and the tokenizer of them, tried out on the documents.

    windows: [W, C] token ids of the text.  configs: config.json and generation_config.json.
    """
    used = used_tokens(documents(), tokenizer, model.get_input_embeddings().weight.shape[0], chat, progress)
    expected = not_by_heart(expected_tokens(model, windows, progress), used)
    kept = kept_ids(tokenizer, used.counts, expected, configs)
    pruned = rebuilt(tokenizer, kept)
    check_same_tokens(tokenizer, pruned, documents(), chat)
    return Choice(kept, pruned, int((used.counts > 0).sum()))


def texts_of(documents: Iterable[Document], tokenizer: Any, chat: Chat) -> Iterator[tuple[str, bool]]:
    """(text, whether it is plain) of the documents; conversations go through the model's template."""
    as_text = renderer(tokenizer, chat)
    for document in documents:
        yield render(document, lambda turns: as_text(turns, False)), document.messages is None


def used_tokens(
    documents: Iterable[Document], tokenizer: Any, size: int, chat: Chat, progress: Progress | None = None
) -> Used:
    """The tokens of the documents and of what the chat template itself says.

    size: V, the model's, which may be more than the tokenizer has.  Raises DataError without text.
    """
    counts, several = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=bool)

    def add(text: str, plain: bool) -> None:
        ids = tokenizer.encode(text, add_special_tokens=plain, split_special_tokens=plain, verbose=False)
        here, times = np.unique(np.asarray(ids, dtype=np.int64), return_counts=True)
        several[here] |= counts[here] > 0
        counts[here] += times

    found = 0
    with (progress or Quiet()).task("counting tokens", 0, "documents") as advance:
        for text, plain in texts_of(documents, tokenizer, chat):
            add(text, plain)
            found += 1
            advance(1)
    if not counts.any():
        raise DataError("there is no text to count tokens in", hint="give [data] train or calibration")
    novelty = float(counts[~several].sum() / counts.sum()) if found >= FEWEST_DOCUMENTS else None
    for text in _template_texts(tokenizer, chat):
        add(text, False)
    return Used(counts, novelty)


def not_by_heart(expected: NDArray[np.float64], used: Used) -> NDArray[np.float64]:
    """[V] expected probabilities, with the unused tokens' raised to what the documents say of the next one.

    A model that was trained on these very documents knows what they hold, and expects too little else.
    Each document taken as the next one of all the others shows how many new tokens it would bring.
    expected: [V] mean probabilities at the places of the documents.
    """
    unused = used.counts == 0
    mass = float(expected[unused].sum())
    if used.novelty is None or not 0 < mass < used.novelty:
        return expected
    return np.where(unused, expected * (used.novelty / mass), expected)


def _template_texts(tokenizer: Any, chat: Chat) -> list[str]:
    """A conversation as the chat template renders it, with and without a system message where it takes one."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
    found, as_text = [], renderer(tokenizer, chat)
    for messages in ([{"role": "system", "content": "a"}, *turns], turns):
        for asks in (False, True):
            with suppress(EdgeslmError):  # no template, or one that refuses a role
                found.append(as_text(messages, asks))
    return found


def expected_tokens(
    model: Any, windows: NDArray[np.int64], progress: Progress | None = None
) -> NDArray[np.float64]:
    """[V] mean probability that the model gives each token at the places of [W, C] token ids.

    The domain's next texts hold tokens that its first ones do not; the model knows which are likely.
    """
    import torch

    mass = None
    with (
        torch.inference_mode(),
        (progress or Quiet()).task("expected tokens", windows.size, "tokens") as advance,
    ):
        for window in torch.from_numpy(windows):
            logits = model(input_ids=window[None], use_cache=False).logits[0]
            shares = logits.float().softmax(-1).sum(0).double()
            mass = shares if mass is None else mass + shares
            advance(len(window))
    if mass is None or not bool(torch.isfinite(mass).all()):
        raise ModelError("the model's logits are not finite", hint="check its weights")
    found: NDArray[np.float64] = (mass / windows.size).numpy()
    return found


def kept_ids(
    tokenizer: Any,
    counts: NDArray[np.int64],
    expected: NDArray[np.float64],
    configs: Sequence[Mapping[str, Any]] = (),
    *,
    unexpected: float = UNEXPECTED_SHARE,
) -> NDArray[np.int64]:
    """[V'] ids that stay, ascending: used and special tokens, single bytes, what is expected, and all their parts.

    counts: [V] occurrences.  expected: [V] mean probabilities.  configs: config.json and
    generation_config.json, whose token ids stay.  unexpected: probability that is left to the dropped ones.
    """
    subwords = Subwords(tokenizer_document(tokenizer))
    pieces = {number: piece for piece, number in subwords.ids.items()}
    known = set(pieces) | set(subwords.added.values())
    kept = _special(tokenizer, subwords, counts, configs) & known
    kept |= {int(number) for number in np.flatnonzero(counts)} & known
    kept |= {subwords.ids[piece] for piece in subwords.closure(pieces[n] for n in kept if n in pieces)}
    left = float(sum(expected[number] for number in known - kept))
    for number in np.argsort(-expected, kind="stable").tolist():
        missing = -len(kept) % MULTIPLE
        if left <= unexpected and missing == 0:
            break
        if number in pieces and number not in kept:
            more = {subwords.ids[part] for part in subwords.parts(pieces[number])} - kept
            if left > unexpected or len(more) <= missing:
                kept |= more
                left -= float(sum(expected[one] for one in more))
    return np.array(sorted(kept), dtype=np.int64)


def _special(
    tokenizer: Any, subwords: Subwords, counts: NDArray[np.int64], configs: Sequence[Mapping[str, Any]]
) -> set[int]:
    """Ids that have a meaning of their own, whether the text has them or not."""
    names, template = set(tokenizer.all_special_tokens), str(tokenizer.chat_template or "")
    found = special_ids(subwords.document) | {number for config in configs for number in _config_ids(config)}
    return found | {
        number
        for token, number in subwords.added.items()
        if counts[number] or token in names or token in template or not PLACEHOLDER.fullmatch(token)
    }


def tokenizer_document(tokenizer: Any) -> dict[str, Any]:
    """tokenizer.json of a fast tokenizer of transformers.  Raises ModelError for a slow one."""
    raw = getattr(tokenizer, "backend_tokenizer", None)
    if raw is None:
        raise ModelError("the tokenizer has no tokenizer.json", hint="save it once as a fast tokenizer")
    document: dict[str, Any] = json.loads(raw.to_str())
    return document


def rebuilt(tokenizer: Any, kept: NDArray[np.int64]) -> Any:
    """The tokenizer with only these tokens, by way of its files: settings and template stay as they are."""
    from transformers import AutoTokenizer

    document = Subwords(tokenizer_document(tokenizer)).without_others(kept.tolist())
    numbers = {str(old): str(new) for new, old in enumerate(kept.tolist())}
    with tempfile.TemporaryDirectory(prefix="edgeslm-") as folder, silent_transformers():
        directory = Path(folder)
        tokenizer.save_pretrained(directory)
        settings = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
        if any((directory / name).exists() for name in _SENTENCEPIECE_FILES):
            # With this setting transformers wants the SentencePiece file; tokenizer.json says the same.
            settings.pop("add_prefix_space", None)
        for name in (*_SENTENCEPIECE_FILES, *_STALE_FILES):
            (directory / name).unlink(missing_ok=True)
        decoder = settings.get("added_tokens_decoder", {})
        settings["added_tokens_decoder"] = {
            numbers[old]: token for old, token in decoder.items() if old in numbers
        }
        _write_json(directory / "tokenizer_config.json", settings)
        _write_json(directory / "tokenizer.json", document)
        try:
            return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # tokenizers raises bare Exception
            raise ModelError(f"the pruned tokenizer does not load: {first_line(error)}") from error


def check_same_tokens(
    before: Any, after: Any, documents: Iterable[Document], chat: Chat, characters: int = CHECKED_CHARACTERS
) -> None:
    """Raise ModelError unless the first documents fall into the same token strings as before."""
    for text, plain in texts_of(documents, before, chat):
        options = {"add_special_tokens": plain, "split_special_tokens": plain, "verbose": False}
        wanted, got = (one.convert_ids_to_tokens(one.encode(text, **options)) for one in (before, after))
        if wanted != got:
            place = next((i for i, (a, b) in enumerate(zip(wanted, got, strict=False)) if a != b), len(got))
            raise ModelError(
                f"the pruned tokenizer splits a text of the domain differently, at token {place}: "
                f"{got[place : place + 3]}, not {wanted[place : place + 3]}",
                hint="leave out `vocabulary` in [prune]; this tokenizer has rules beyond its merges",
            )
        characters -= len(text)
        if characters <= 0:
            return


def renumber(config: Mapping[str, Any], kept: NDArray[np.int64]) -> dict[str, Any]:
    """A configuration with its token ids renumbered; those of dropped tokens become None or leave their list."""
    numbers = {old: new for new, old in enumerate(kept.tolist())}

    def renumbered(value: Any) -> Any:
        if isinstance(value, list):
            found = [renumbered(item) for item in value]
            return [item for item in found if item is not None and item != []]
        return numbers.get(value) if isinstance(value, int) else value

    return {
        key: renumbered(value) if _ID_KEY.fullmatch(key) and not isinstance(value, bool) else value
        for key, value in config.items()
    }


def _config_ids(config: Mapping[str, Any]) -> set[int]:
    found: set[int] = set()
    for key, value in config.items():
        if key.endswith("_token_id"):
            values = value if isinstance(value, list) else [value]
            found.update(number for number in values if isinstance(number, int) and number >= 0)
    return found


def kept_tokens(directory: Path) -> NDArray[np.int64] | None:
    """[V'] the ids that a pruned model's tokens had in its parent; None where all tokens are the parent's."""
    path = directory / KEPT_FILE
    return np.load(path, allow_pickle=False) if path.is_file() else None


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
