"""A teacher seen through its student's tokens: which of its ids is which of the student's, and which layer.

Two vocabularies may differ by rows that pad them, or by tokens that pruning dropped.  Models with different
tokenizers cut the same text at different places, so their distributions are about different things.

B batch, S sequence, V shared vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeslm.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

MOST_OTHER_CUTS = 0.02
"""Share by which the numbers of tokens of a text may differ where the student lost tokens."""


def shared_tokens(student: Any, teacher: Any, examples: Iterable[Sequence[int]]) -> NDArray[np.int64] | None:
    """[V] the teacher's id of each of the student's ids; None where they are the same.

    student, teacher: tokenizers.  examples: the student's ids of some texts.  Raises ModelError for
    different tokenizers.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours == theirs:
        return None
    hint = 'distil at the level of texts: mode = "sequence"'
    unknown = sum(token not in theirs for token in ours)
    if unknown or sorted(ours.values()) != list(range(len(ours))):
        raise ModelError(
            f"the student's tokenizer is another than the teacher's: {unknown} of its {len(ours)} tokens "
            "are not the teacher's",
            hint=hint,
        )
    if not _cut_alike(student, teacher, examples):
        raise ModelError("the student's tokenizer cuts texts at other places than the teacher's", hint=hint)
    ids = np.array([theirs[token] for token in sorted(ours, key=lambda token: ours[token])], np.int64)
    return None if np.array_equal(ids, np.arange(len(ids))) else ids


def _cut_alike(student: Any, teacher: Any, examples: Iterable[Sequence[int]]) -> bool:
    """Whether both make about as many tokens of the same texts."""
    ours = theirs = 0
    for ids in examples:
        text = student.decode(ids, skip_special_tokens=True)
        ours += len(student.encode(text, add_special_tokens=False, verbose=False))
        theirs += len(teacher.encode(text, add_special_tokens=False, verbose=False))
    return abs(ours - theirs) <= MOST_OTHER_CUTS * max(ours, theirs)


@dataclass(frozen=True)
class Teacher:
    """A causal language model that is asked in the student's token ids and answers over them.

    model: of transformers.  columns: [V] its id of each of the student's ids, None where they are the
    same.  width: V, the student's ids that are compared.
    """

    model: Any
    columns: Any | None
    width: int

    def __call__(self, input_ids: Any, *, use_cache: bool = False, **asked: Any) -> Any:
        """transformers' output for [B, S] ids with logits of [B, S, V]; no gradient."""
        import torch

        device = input_ids.device
        if next(self.model.parameters()).device != device:
            self.model.to(device)
        columns = None if self.columns is None else self.columns.to(device)
        ids = input_ids if columns is None else columns[input_ids]
        with torch.no_grad():
            found = self.model(input_ids=ids, use_cache=use_cache, **asked)
        logits = found.logits if columns is None else found.logits[..., columns]
        found.logits = logits[..., : self.width]
        return found


def layer_pairs(kept: Sequence[int], teacher_layers: int) -> list[tuple[int, int]]:
    """(student's, teacher's) indices of hidden states to be matched, the embedding's being 0.

    kept: the teacher's layer that each of the student's layers comes from.  What enters a layer should
    be what entered it in the teacher, so that a layer does the work of those that were cut out behind
    it; what leaves the last should be what leaves the teacher's last.
    """
    inputs = [(place, layer) for place, layer in enumerate(kept) if place > 0]
    return [*inputs, (len(kept), teacher_layers)]
