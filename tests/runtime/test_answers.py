"""Answers in order, for any batches, and with every bad row in its place."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeslm.bundle import open_bundle
from edgeslm.errors import BundleError, DataError
from edgeslm.runtime import answers
from edgeslm.runtime.answers import answered, batches, classify
from edgeslm.runtime.ort import OrtClassifier
from edgeslm.runtime.rows import Row
from edgeslm.runtime.rule import make_rule
from tests import onnx_models

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return onnx_models.write_classifier(tmp_path_factory.mktemp("text") / "b").path


@pytest.fixture(scope="module")
def classifier(path: Path) -> OrtClassifier:
    return OrtClassifier(open_bundle(path), threads=1)


def texts(count: int, seed: int = 0) -> list[str]:
    random = np.random.default_rng(seed)
    words = [*onnx_models.WORDS[3:], "unknown"]
    return [" ".join(random.choice(words, random.integers(1, 9))) for _ in range(count)]


@given(st.lists(st.integers(1, 512), max_size=200))
def test_batches_hold_every_text_once_and_keep_their_bounds(lengths: list[int]) -> None:
    found = list(batches(lengths))
    assert sorted(number for batch in found for number in batch) == list(range(len(lengths)))
    for batch in found:
        assert len(batch) <= answers.BATCH_TEXTS
        widest = max(lengths[number] for number in batch)
        assert len(batch) == 1 or len(batch) * widest <= answers.BATCH_TOKENS


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_answers_are_the_classifier_s_in_order(classifier: OrtClassifier, workers: int) -> None:
    asked = texts(700)
    rows = [Row(number, {"id": number, "text": text}) for number, text in enumerate(asked, 1)]
    lists = [rows[start : start + 97] for start in range(0, len(rows), 97)]
    found = list(answered(classifier, lists, make_rule(classifier.decision), workers=workers))
    assert [len(some) for some in found] == [len(some) for some in lists]
    flat = [answer for some in found for answer in some]
    assert [answer["id"] for answer in flat] == list(range(1, 701))
    expected = classifier.predict_texts(asked)
    np.testing.assert_allclose([list(one["probabilities"].values()) for one in flat], expected, atol=2e-6)
    assert [one["label"] for one in flat] == [classifier.labels[row] for row in expected.argmax(axis=1)]
    assert [one.get("truncated", False) for one in flat] == classifier.is_cut(asked)


def test_nothing_is_held_back_where_no_more_input_waits(classifier: OrtClassifier) -> None:
    """A list is answered while the next is at work, or at once behind an empty one."""
    taken: list[str] = []

    def rows() -> Iterator[list[Row]]:
        for step in ("one", "two", "", "three"):
            taken.append(step)
            yield [Row(1, step)] if step else []

    found = answered(classifier, rows(), make_rule(classifier.decision))
    assert next(found)[0]["text"] == "one"
    assert taken == ["one", "two"]
    assert next(found)[0]["text"] == "two"
    assert taken == ["one", "two", ""]
    assert next(found)[0]["text"] == "three"


def run(path: Path, source: Any, **options: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    lines: list[bytes] = []
    record = classify(path, source, lines.append, threads=1, **options)
    return record, [json.loads(line) for line in b"".join(lines).splitlines()]


def test_bad_rows_are_told_in_their_place(path: Path, tmp_path: Path) -> None:
    table = tmp_path / "mails.csv"
    table.write_bytes(b'id,text\n1,win money\n2\n3,"  "\n4,hello\n5,\xff\n6,now\n')
    record, found = run(path, table)
    assert [answer["line"] for answer in found] == [2, 3, 4, 5, 6, 7]
    assert [answer.get("id") for answer in found] == ["1", None, "3", "4", None, "6"]
    assert ["error" in answer for answer in found] == [False, True, True, False, True, False]
    assert (record["answered"], record["failed"]) == (3, 3)
    assert record["first_failure"] == "line 3: has 1 columns, the header 2"
    assert sum(record["classes"].values()) == 3


def test_keys_that_are_not_there_or_no_text(path: Path, tmp_path: Path) -> None:
    table = tmp_path / "a.jsonl"
    odd = [
        {"body": "x"},
        {"text": 7},
        {"text": None},
        {"text": "now", "id": [1]},
        {"text": "hello", "id": None},
    ]
    table.write_text("".join(json.dumps(one) + "\n" for one in odd) + '{"id": NaN, "text": "now"}\n')
    _, found = run(path, table)
    assert [answer.get("error", "") for answer in found] == [
        "has no 'text', but ['body']", "its 'text' holds no text", "its 'text' holds no text", "", "", "",
    ]  # fmt: skip
    assert [answer.get("text") for answer in found[3:]] == ["now", "hello", "now"]
    assert run(path, table, column="body")[1][0]["text"] == "x"


def test_one_text_and_its_record(path: Path, classifier: OrtClassifier) -> None:
    record, [found] = run(path, "win money now", prior={"spam": 0.9}, costs={"ham": 2.0})
    assert record["answer"] == found
    given = classifier.predict_texts(["win money now"])
    expected = make_rule(classifier.decision, prior={"spam": 0.9}).decision.posterior(given)[0]
    np.testing.assert_allclose(list(found["probabilities"].values()), expected, atol=1e-6)
    assert found["probability"] == found["probabilities"][found["label"]]
    assert record["decision"]["prior"][1] == pytest.approx(0.9)


def test_a_text_far_behind_the_model_s_length_is_cut_before_it_is_tokenized(
    classifier: OrtClassifier,
) -> None:
    [(ids, cut)] = classifier.encode(["hello " * 500_000])
    assert (ids, cut) == (classifier.tokenize(["hello " * 20])[0], True)


def test_a_table_without_the_column(path: Path, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,body\n1,hello\n")
    with pytest.raises(DataError, match="no column 'text'"):
        run(path, tmp_path / "a.csv")


@pytest.mark.parametrize("missing", ["labels", "preprocessing"])
def test_a_manifest_that_lacks_what_is_needed(missing: str, tmp_path: Path) -> None:
    model = onnx_models.manifest("text")["model"]
    model.pop(missing)
    damaged = onnx_models.write_classifier(tmp_path / "b", model=model)
    with pytest.raises(BundleError, match="manifest"):
        run(damaged.path, "hello")
