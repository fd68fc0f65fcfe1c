"""Which pieces a tokenizer.json needs to split a text as before, and the same file without the others.

Merging takes the merge of the lowest rank that applies.  If a list of merges keeps, in their order, all
that were ever applied to a text, then at every step the one that was taken still applies and nothing of
a lower rank does: the text falls into the same tokens.  So the pieces that the used tokens are made of
have to stay, and nothing else has to.  With Unigram the likeliest path stays the likeliest among fewer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from edgeslm.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterable

BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
PLACEHOLDER = re.compile(r"[<\[]\|?(?:unused|reserved|extra_id|placeholder|control_|dummy)[\w-]*\|?[>\]]")
"""Added tokens that vocabularies keep in reserve."""
_OTHER_SUBWORDS = ("continuing_subword_prefix", "end_of_word_suffix")


@dataclass(frozen=True)
class Subwords:
    """The model of a tokenizer.json: its pieces, and how they come about."""

    document: dict[str, Any]

    def __post_init__(self) -> None:
        model = self.document.get("model") or {}
        kind = model.get("type") or ("BPE" if "merges" in model else None)
        if kind not in ("BPE", "Unigram") or any(model.get(key) for key in _OTHER_SUBWORDS):
            raise ModelError(
                f"no way to drop tokens of a {kind} vocabulary", hint="leave out `vocabulary` in [prune]"
            )

    @cached_property
    def ids(self) -> dict[str, int]:
        """Piece -> id, without added tokens."""
        vocab = self.document["model"]["vocab"]
        if isinstance(vocab, dict):
            return dict(vocab)
        return {piece: number for number, (piece, _score) in enumerate(vocab)}

    @cached_property
    def added(self) -> dict[str, int]:
        """Added token -> id: found in a text before it is split."""
        return {token["content"]: token["id"] for token in self.document.get("added_tokens") or ()}

    @cached_property
    def merges(self) -> list[tuple[str, str]]:
        """The pairs that are merged, by rank; none for Unigram."""
        found = self.document["model"].get("merges") or ()
        pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in found)
        return [(left, right) for left, right in pairs]

    @cached_property
    def _ranks(self) -> dict[tuple[str, str], int]:
        ranks: dict[tuple[str, str], int] = {}
        for rank, pair in enumerate(self.merges):
            ranks.setdefault(pair, rank)
        return ranks

    def always(self) -> set[str]:
        """Pieces with which every text has tokens: single bytes and the unknown token, and ASCII characters."""
        model = self.document["model"]
        unknown = model.get("unk_token")
        if model.get("unk_id") is not None:
            unknown = model["vocab"][model["unk_id"]][0]
        byte_level = "ByteLevel" in str(self.document.get("pre_tokenizer"))
        return {
            piece
            for piece in self.ids
            if piece == unknown
            or BYTE_PIECE.fullmatch(piece)
            or (len(piece) == 1 and (byte_level or piece.isascii() or piece == "▁"))
        }

    def parts(self, piece: str) -> set[str]:
        """All pieces on the way from a piece's characters to itself; itself alone if no merges lead to it."""
        symbols, made = list(piece), set(piece)
        while len(symbols) > 1:
            pairs = [(self._ranks.get(pair, -1), at) for at, pair in enumerate(pairwise(symbols))]
            rank, at = min((pair for pair in pairs if pair[0] >= 0), default=(-1, -1))
            if rank < 0:
                return {piece}
            symbols[at : at + 2] = ["".join(symbols[at : at + 2])]
            made.add(symbols[at])
        return {part for part in made if part in self.ids}

    def closure(self, used: Iterable[str]) -> set[str]:
        """The used pieces, those that they are made of, and those of `always`."""
        kept = self.always()
        for piece in used:
            if piece in self.ids:
                kept |= self.parts(piece) if self.merges else {piece}
        return kept

    def without_others(self, kept: Iterable[int]) -> dict[str, Any]:
        """The tokenizer.json with only the tokens of these ids, numbered anew in their order."""
        numbers = {old: new for new, old in enumerate(sorted(kept))}
        model = dict(self.document["model"])
        pieces = {piece: numbers[old] for piece, old in self.ids.items() if old in numbers}
        if isinstance(model["vocab"], dict):
            model["vocab"] = pieces
            model["merges"] = [
                list(pair) for pair in self.merges if all(part in pieces for part in (*pair, "".join(pair)))
            ]
        else:
            model["vocab"] = [item for item in model["vocab"] if item[0] in pieces]
            if model.get("unk_id") is not None:
                model["unk_id"] = numbers[model["unk_id"]]
        added = [
            {**token, "id": numbers[token["id"]]}
            for token in self.document.get("added_tokens") or ()
            if token["id"] in numbers
        ]
        processor = _renumbered(self.document.get("post_processor"), numbers)
        return {**self.document, "model": model, "added_tokens": added, "post_processor": processor}


def _renumbered(processor: Any, numbers: dict[int, int]) -> Any:
    """A post-processor with its special tokens' new ids."""
    if not isinstance(processor, dict):
        return processor
    new = dict(processor)
    if "processors" in new:
        new["processors"] = [_renumbered(step, numbers) for step in new["processors"]]
    if isinstance(new.get("special_tokens"), dict):
        new["special_tokens"] = {
            name: {**token, "ids": [numbers[number] for number in token["ids"]]}
            for name, token in new["special_tokens"].items()
        }
    for name in ("sep", "cls"):
        if isinstance(new.get(name), list):
            new[name] = [new[name][0], numbers[new[name][1]]]
    return new


def special_ids(document: dict[str, Any]) -> set[int]:
    """Ids that a post-processor puts around a text."""
    found: set[int] = set()

    def look(processor: Any) -> None:
        if isinstance(processor, dict):
            for step in processor.get("processors", ()):
                look(step)
            for token in (processor.get("special_tokens") or {}).values():
                found.update(token["ids"])
            found.update(
                processor[name][1] for name in ("sep", "cls") if isinstance(processor.get(name), list)
            )

    look(document.get("post_processor"))
    return found
