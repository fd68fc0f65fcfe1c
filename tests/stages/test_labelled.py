"""Labelled texts: columns, classes, token ids on disk, stratified splits, duplicates."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeslm.errors import DataError, ModelError
from edgeslm.progress import Quiet
from edgeslm.specs import ColumnsSpec
from edgeslm.stages import labelled
from edgeslm.stages.labelled import (
    Labelled,
    TextExamples,
    class_balance,
    classes,
    collate_texts,
    data_record,
    duplicates,
    label_text,
    labelled_rows,
    stratified_split,
    tokenize_examples,
)
from edgeslm.stages.tables import Tally

if TYPE_CHECKING:
    from pathlib import Path

TEXTS = ["Buy now", "See you at noon", "", "Grüße 😀", "x" * 50, "now now now"]
COLUMNS = ColumnsSpec()


class Notes(Quiet):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def write_rows(path: Path, *rows: Any) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def labels_only(*labels: str) -> list[Labelled]:
    return [Labelled("x", label, f"a:{at}") for at, label in enumerate(labels)]


# --- rows and classes ---


def test_columns_have_the_names_that_the_recipe_says(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("id\tbody\tkind\n1\tHello\tham\n2\tWin\tspam\n")
    columns = ColumnsSpec(text="body", label="kind")
    assert list(labelled_rows(["a.tsv"], columns, base=tmp_path)) == [
        Labelled("Hello", "ham", "a.tsv:2"),
        Labelled("Win", "spam", "a.tsv:3"),
    ]
    with pytest.raises(DataError, match=r"line 2: has no 'text', but \['body', 'id', 'kind'\].*\[columns\]"):
        list(labelled_rows(["a.tsv"], COLUMNS, base=tmp_path))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "x"}, "has no 'label'"),
        ({"label": "a"}, "has no 'text'"),
        ({"text": "x", "label": None}, "its 'label' is empty"),
        ({"text": "x", "label": " "}, "its 'label' is empty"),
        ({"text": "x", "label": ["a"]}, "its 'label' is empty"),
        ({"text": "x", "label": float("nan")}, "its 'label' is empty"),
        ({"text": " \n", "label": "a"}, "its 'text' holds no text"),
        ({"text": None, "label": "a"}, "its 'text' holds no text"),
        ({"text": 5, "label": "a"}, "its 'text' holds no text"),
    ],
)
def test_rows_without_text_or_label_are_counted(tmp_path: Path, row: Any, reason: str) -> None:
    source = write_rows(tmp_path / "a.jsonl", *[{"text": "x", "label": "a"}] * 3, row)
    notes, tally = Notes(), Tally()
    assert len(list(labelled_rows([source], COLUMNS, progress=notes, max_bad=0.25, tally=tally))) == 3
    assert notes.lines[0].startswith(f"a.jsonl: left out 1 of 4 rows; line 4: {reason}")
    assert tally.bad == 1
    with pytest.raises(DataError, match="1 of 4 rows can't be used"):
        list(labelled_rows([source], COLUMNS, max_bad=0.2))


def test_labels_that_the_recipe_does_not_know(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "a.jsonl", *({"text": "x", "label": label} for label in ("a", "b", "c")))
    columns = ColumnsSpec(labels=("b", "a"))
    assert [row.label for row in labelled_rows([source], columns, max_bad=0.5)] == ["a", "b"]
    with pytest.raises(DataError, match=r"its 'label' is 'c', none of \['b', 'a'\]"):
        list(labelled_rows([source], columns))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a ", "a"),
        (3, "3"),
        (3.0, "3"),
        (2.5, "2.5"),
        (True, "true"),
        (None, ""),
        (float("nan"), ""),
        ({}, ""),
    ],
)
def test_labels_become_text(value: Any, text: str) -> None:
    assert label_text(value) == text


@pytest.mark.parametrize(
    ("labels", "order"),
    [
        (("spam", "ham", "spam"), ("ham", "spam")),
        (("10", "9", "2"), ("2", "9", "10")),
        (("10", "9", "b"), ("10", "9", "b")),
    ],
)
def test_classes_are_sorted(labels: tuple[str, ...], order: tuple[str, ...]) -> None:
    assert classes(labels_only(*labels), COLUMNS) == order


def test_classes_in_the_recipe_s_order() -> None:
    columns = ColumnsSpec(labels=("low", "high"))
    assert classes(labels_only("high", "low"), columns) == ("low", "high")
    with pytest.raises(DataError, match="no training row has the label 'high'"):
        classes(labels_only("low", "mid"), columns)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no labelled rows"),
        (labels_only("a", "a"), "one class only, 'a'"),
        (labels_only(*map(str, range(1001))), "more than 1,000 different labels in 'label'"),
    ],
)
def test_no_table_of_classes(rows: list[Labelled], message: str) -> None:
    with pytest.raises(DataError, match=message):
        classes(rows, COLUMNS)


# --- examples ---


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Bytes as tokens with [CLS] and [SEP] around them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[CLS]", "[SEP]"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({text: at for at, text in enumerate([*special, *alphabet])}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )


def make(tmp_path: Path, tokenizer: Any, context: int = 16, **options: Any) -> TextExamples:
    rows = [Labelled(text, "ab"[at % 2], f"x:{at}") for at, text in enumerate(TEXTS)]
    return tokenize_examples(rows, tokenizer, ("a", "b"), context, tmp_path / "out", **options)


@pytest.mark.workstation
def test_examples_are_what_the_tokenizer_gives(tmp_path: Path, tokenizer: Any) -> None:
    notes = Notes()
    examples = make(tmp_path, tokenizer, progress=notes)
    assert len(examples) == 6
    for at, text in enumerate(TEXTS):
        wanted = tokenizer(text, truncation=True, max_length=16)["input_ids"]
        assert examples[at]["input_ids"].tolist() == wanted
        assert examples[at]["input_ids"].dtype == np.int64
        assert examples[at]["label"] == at % 2
        assert examples.text(at) == text
    assert list(examples.texts()) == TEXTS
    assert examples.labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert examples.truncated == 2
    assert notes.lines == ["2 of 6 texts are longer than 16 tokens and were cut"]
    assert examples.tokens == sum(len(examples[at]["input_ids"]) for at in range(6))
    assert examples.summary() == {
        "examples": 6,
        "classes": {"a": 3, "b": 3},
        "tokens": examples.tokens,
        "truncated": 2,
    }


@pytest.mark.workstation
def test_batches_change_nothing(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one = make(tmp_path, tokenizer)
    wanted = [one[at]["input_ids"].tolist() for at in range(6)]
    monkeypatch.setattr(labelled, "BATCH_CHARACTERS", 10)
    many = make(tmp_path, tokenizer)
    assert [many[at]["input_ids"].tolist() for at in range(6)] == wanted
    assert many.truncated_rows == one.truncated_rows == (1, 4)


@pytest.mark.workstation
def test_a_view_of_some_examples(tmp_path: Path, tokenizer: Any) -> None:
    examples = make(tmp_path, tokenizer)
    some = examples.subset([4, 1, 0]).subset([0, 2])
    assert list(some.texts()) == [TEXTS[4], TEXTS[0]]
    assert some.labels.tolist() == [0, 0]
    assert some[0]["input_ids"].tolist() == examples[4]["input_ids"].tolist()
    assert (len(some), some.truncated) == (2, 1)
    assert some.tokens == 16 + 9


@pytest.mark.workstation
def test_examples_are_found_again(tmp_path: Path, tokenizer: Any) -> None:
    examples = make(tmp_path, tokenizer)
    again = TextExamples.open(tmp_path / "out")
    assert again.summary() == examples.summary()
    assert again.classes == ("a", "b")
    with pytest.raises(DataError, match="no labelled examples"):
        TextExamples.open(tmp_path)


@pytest.mark.workstation
def test_a_text_without_tokens_gets_one(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE({"[PAD]": 0, "a": 1}, []))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bare = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]")
    rows = [Labelled("a", "a", "x:1"), Labelled("?", "b", "x:2")]
    examples = tokenize_examples(rows, bare, ("a", "b"), 8, tmp_path / "out")
    assert [examples[at]["input_ids"].tolist() for at in range(2)] == [[1], [0]]


@pytest.mark.workstation
def test_special_tokens_in_a_text_are_text(tmp_path: Path, tokenizer: Any) -> None:
    rows = [Labelled("[SEP]", "a", "x:1")]
    examples = tokenize_examples(rows, tokenizer, ("a",), 16, tmp_path / "out")
    assert examples[0]["input_ids"].tolist().count(2) == 1


@pytest.mark.workstation
def test_very_long_texts_count_as_cut(tmp_path: Path, tokenizer: Any) -> None:
    rows = [Labelled("y" * 5000, "a", "x:1"), Labelled("y", "b", "x:2")]
    examples = tokenize_examples(rows, tokenizer, ("a", "b"), 16, tmp_path / "out")
    assert examples.truncated_rows == (0,)
    assert len(examples[0]["input_ids"]) == 16
    assert len(examples.text(0)) == 5000


@pytest.mark.workstation
def test_examples_that_can_t_be(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"x:7: the label 'c' is not among the classes \['a', 'b'\]"):
        tokenize_examples([Labelled("x", "c", "x:7")], tokenizer, ("a", "b"), 8, tmp_path / "out")
    with pytest.raises(DataError, match="no labelled rows"):
        tokenize_examples([], tokenizer, ("a", "b"), 8, tmp_path / "out")
    assert not list(tmp_path.iterdir())

    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        tokenize_examples([], Slow(), ("a", "b"), 8, tmp_path / "out")


@pytest.mark.workstation
def test_batches_are_padded_on_the_right(tmp_path: Path, tokenizer: Any) -> None:
    import torch

    examples = make(tmp_path, tokenizer)
    batch = collate_texts(7)([examples[0], examples[1]])
    assert {value.dtype for value in batch.values()} == {torch.int64}
    first, second = examples[0]["input_ids"].tolist(), examples[1]["input_ids"].tolist()
    padding = len(second) - len(first)
    assert padding > 0
    assert batch["input_ids"].tolist() == [first + [7] * padding, second]
    assert batch["attention_mask"].tolist() == [[1] * len(first) + [0] * padding, [1] * len(second)]
    assert batch["labels"].tolist() == [0, 1]


# --- splits, duplicates, the record ---


@given(st.lists(st.integers(0, 4), min_size=2, max_size=200), st.integers(2, 12), st.integers(0, 9))
def test_a_split_has_its_share_of_every_class(labels: list[int], every: int, seed: int) -> None:
    counts = Counter(labels)
    if max(counts.values()) < 2:
        with pytest.raises(DataError, match="too few"):
            stratified_split(labels, every, seed)
        return
    train, heldout = stratified_split(labels, every, seed)
    assert sorted([*train.tolist(), *heldout.tolist()]) == list(range(len(labels)))
    for side in (train.tolist(), heldout.tolist()):
        assert all(one < other for one, other in pairwise(side))
    held = Counter(labels[at] for at in heldout)
    for label, count in counts.items():
        assert abs(held[label] - count / every) <= 1
        assert (held[label] >= 1) == (count >= 2)
        assert held[label] < count


def test_a_split_is_the_seed_s() -> None:
    labels = np.arange(600) % 3
    first = stratified_split(labels, 5, 1)[1]
    assert (first == stratified_split(labels, 5, 1)[1]).all()
    assert (first != stratified_split(labels, 5, 2)[1]).any()
    assert len(first) == 120


def test_the_balance_has_every_class() -> None:
    assert class_balance([2, 0, 2], ("a", "b", "c")) == {"a": 1, "b": 0, "c": 2}


def normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


SHORT = st.lists(st.text("aA \u00e9e\u0301", max_size=3), max_size=12)


@given(SHORT, SHORT)
def test_duplicates_are_those_of_brute_force(train: list[str], heldout: list[str]) -> None:
    found = duplicates(iter(train), iter(heldout))
    assert found.count == sum(normal(text) in {normal(one) for one in train} for text in heldout)
    for here, there in found.first:
        assert normal(train[here]) == normal(heldout[there])
    assert (len(found.first) > 0) == (found.count > 0)
    assert len(found.first) <= 5


def test_the_record_of_the_data() -> None:
    side = {"examples": 4, "classes": {"a": 2, "b": 2}, "tokens": 40, "truncated": 1}
    tally = Tally(rows=9, bad=2, first="x")
    found = duplicates(["A  b", "c"], ["a B", "d"])
    record = data_record(side, side, found=found, tally=tally, scrubbed={"phones": 1, "emails": 2})
    assert record == {
        "schema": "edgeslm.data/1",
        "train": side,
        "heldout": side,
        "duplicates": 1,
        "truncated": 2,
        "bad_rows": 2,
        "scrubbed": {"emails": 2, "phones": 1},
    }
    empty = data_record({"examples": 3}, None)
    assert (empty["heldout"], empty["duplicates"], empty["bad_rows"], empty["scrubbed"]) == (
        None,
        None,
        0,
        None,
    )
