"""The teacher's answers on disk: equal to asking it, continued after a kill, refused when damaged."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from edgeslm.errors import DataError, EdgeslmError
from edgeslm.progress import Quiet
from edgeslm.stages import teacher

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

LAYOUT = np.dtype([("square", np.int64), ("row", np.float32, (3,))])


def squares(start: int, stop: int) -> NDArray[Any]:
    rows = np.empty(stop - start, LAYOUT)
    rows["square"] = np.arange(start, stop) ** 2
    rows["row"] = np.arange(start, stop)[:, None]
    return rows


def fill(path: Path, count: int = 10, compute: Any = squares, at_once: int = 4) -> teacher.Records:
    records = teacher.Records(path, LAYOUT)
    teacher.fill(records, count, compute, at_once=at_once, name="t", progress=Quiet())
    return records


def test_records_are_read_as_they_were_computed(tmp_path: Path) -> None:
    records = fill(tmp_path / "deep" / "r.bin")
    assert len(records) == 10
    assert [int(records[index]["square"]) for index in range(10)] == [index**2 for index in range(10)]
    assert records[7]["row"].tolist() == [7, 7, 7]
    assert int(pickle.loads(pickle.dumps(records))[3]["square"]) == 9


@pytest.mark.parametrize("index", [-1, 10])
def test_a_record_that_is_not_there(tmp_path: Path, index: int) -> None:
    with pytest.raises(DataError, match="no record"):
        fill(tmp_path / "r.bin")[index]


@pytest.mark.parametrize("lost", [0, 1, 35, LAYOUT.itemsize * 3, LAYOUT.itemsize * 10])
def test_a_killed_teacher_goes_on_where_it_stopped(tmp_path: Path, lost: int) -> None:
    """Whatever byte the file ends at, only whole batches count, and the result is the same file."""
    path = tmp_path / "r.bin"
    whole = fill(path).path.read_bytes()
    path.write_bytes(whole[: len(whole) - lost])
    asked = []

    def compute(start: int, stop: int) -> NDArray[Any]:
        asked.append(start)
        return squares(start, stop)

    fill(path, compute=compute)
    assert path.read_bytes() == whole
    assert all(start % 4 == 0 for start in asked)
    kept = (len(whole) - lost) // LAYOUT.itemsize
    assert asked == ([] if kept == 10 else list(range(kept // 4 * 4, 10, 4)))


def test_an_interrupted_teacher_keeps_its_answers(tmp_path: Path) -> None:
    def compute(start: int, stop: int) -> NDArray[Any]:
        if start >= 4:
            raise KeyboardInterrupt
        return squares(start, stop)

    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "r.bin", compute=compute)
    assert len(teacher.Records(tmp_path / "r.bin", LAYOUT)) == 4


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.symlink_to("/dev/full")
    with pytest.raises(EdgeslmError, match="No space left") as raised:
        teacher.fill(teacher.Records(full, LAYOUT), 1, squares, at_once=1, name="t", progress=Quiet())
    assert "free some space" in raised.value.hint


def test_keys_tell_everything_apart() -> None:
    keys = {teacher.key(*parts) for parts in [("a", 1), ("a", 2), ("a", 1, 2.0), ("b", 1), ("a1",)]}
    assert len(keys) == 5
    assert teacher.key("a", 1) == teacher.key("a", 1)


def test_the_digest_covers_every_example() -> None:
    data = [{"input_ids": np.arange(4), "label": 0}, {"input_ids": np.arange(3), "label": 1}]
    first = teacher.dataset_digest(data)
    assert first == teacher.dataset_digest([dict(reversed(item.items())) for item in data])
    for index, name, value in ((1, "label", 0), (0, "input_ids", np.array([0, 1, 2, 4]))):
        changed = [dict(item) for item in data]
        changed[index][name] = value
        assert teacher.dataset_digest(changed) != first
    assert teacher.dataset_digest(data[:1]) != first


class Blocks:
    """Three blocks of random tokens."""

    def __init__(self, context: int = 8, vocabulary: int = 20) -> None:
        self.rows = np.random.default_rng(0).integers(0, vocabulary, (3, context))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


@pytest.mark.workstation
@pytest.mark.parametrize("k", [4, 20, 1000])
def test_the_cache_holds_what_the_teacher_says(tmp_path: Path, k: int) -> None:
    torch = pytest.importorskip("torch")
    from edgeslm.stages import losses

    torch.manual_seed(0)
    network = torch.nn.Embedding(20, 24)  # the last four columns pad the vocabulary
    data, asked = Blocks(), []

    def logits(ids: Any) -> Any:
        asked.append(len(ids))
        return network(ids)

    path = tmp_path / "t.bin"
    arguments: Any = {"k": k, "vocabulary": 20, "temperature": 2.0, "progress": Quiet()}
    records = teacher.cache_top_k(logits, data, path, **arguments)
    taught = teacher.Taught(data, records)
    batch = teacher.CollateTaught(lambda items: {"n": torch.tensor(len(items))})([taught[0], taught[2]])
    assert int(batch["n"]) == 2
    found = losses.TopK(*(batch[f"teacher_{name}"] for name in losses.TopK._fields))
    wanted = losses.top_k(network(torch.from_numpy(data.rows[[0, 2]]))[..., :20].detach(), k, 2.0)
    assert torch.equal(found.ids, wanted.ids)
    assert torch.allclose(found.values, wanted.values, atol=2e-3)
    assert torch.allclose(found.tail, wanted.tail)
    asked.clear()
    teacher.cache_top_k(logits, data, path, **arguments)
    assert not asked


@pytest.mark.workstation
def test_logits_of_classes_are_kept_in_order(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    data = [{"label": index % 2, "input_ids": np.array([index])} for index in range(70)]

    def logits(items: Any) -> Any:
        return torch.tensor([[float(item["input_ids"][0]), -1.0] for item in items])

    records = teacher.cache_classes(logits, data, tmp_path / "c.bin", classes=2, progress=Quiet())
    assert [float(records[index]["teacher_logits"][0]) for index in range(70)] == list(range(70))


def test_answers_for_other_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="10 answers for 11"):
        teacher.Taught(range(11), fill(tmp_path / "r.bin"))
