"""Ctrl-C and a full disk in fine-tuning, pruning and distilling: nothing half-written, and the next call goes on."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from edgeslm import learning
from edgeslm.atomic import as_os_error, writing
from edgeslm.errors import EdgeslmError
from edgeslm.recipe import read_recipe

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.workstation

STEPS = 6
TRAIN = {"max_steps": STEPS, "batch_size": 2, "context": 32}
STAGES: dict[str, dict[str, Any]] = {
    "finetune": {"train": TRAIN},
    "prune": {"drop_layers": 1},
    "distill": {"student": {"kind": "smaller", "layers": 2}, "train": TRAIN},
}
TRAINED = ("finetune", "distill")


class OsErrorOfRust(Exception):
    """As safetensors says it."""


def full_disk() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    from tests.models import write_hf_model

    folder = tmp_path_factory.mktemp("source")
    write_hf_model(folder / "model", "llama", tokenizer="smollm", num_hidden_layers=3)
    rows = [
        json.dumps({"text": f"The bread of the sea is baked in oven {number}. " * 8}) for number in range(12)
    ]
    (folder / "train.jsonl").write_text("\n".join(rows))
    return folder


def run(folder: Path, stage: str, out: Path, **changes: Any) -> dict[str, Any]:
    """As `edgeslm finetune`, `prune` or `distill` does it."""
    values = {
        "name": "tiny", "task": "causal-lm", "model": "model", "seed": 3,
        "data": {"train": "train.jsonl", "heldout_every": 4}, stage: STAGES[stage] | changes,
    }  # fmt: skip
    recipe = read_recipe(values, where="test", text=json.dumps(values), base=folder)
    record = learning.make_checkpoint(recipe, out)
    assert record is not None
    return record


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Stage -> the weights that come of it when nothing stops it."""
    folder = tmp_path_factory.mktemp("whole")
    for stage in STAGES:
        run(model, stage, folder / stage)
    return {stage: (folder / stage / "model.safetensors").read_bytes() for stage in STAGES}


def nothing_half_written(out: Path, stage: str) -> None:
    assert not out.exists()
    work = out.with_name(f"{out.name}.work")
    assert not list(out.parent.glob(f".{out.name}.*"))
    assert not list(work.glob(".*.tmp-*"))
    assert not [path for path in work.glob(f"{stage}-*") if path.suffix != ".progress"]
    if work.exists():  # it goes where this was to be its first result
        failed = [json.loads(line) for line in (work / "run.jsonl").read_text().splitlines()][-1]
        assert (failed["event"], failed["stage"]) == ("failed", stage)


def the_next_call_goes_on(
    folder: Path, stage: str, out: Path, wanted: bytes, **changes: Any
) -> dict[str, Any]:
    record = run(folder, stage, out, **changes)
    again = {one["name"]: one["skipped"] for one in record["stages"]}
    assert again.pop(stage) is False
    assert all(again.values())
    assert (out / "model.safetensors").read_bytes() == wanted
    return record


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "error",
    [KeyboardInterrupt, full_disk, lambda: OsErrorOfRust("I/O error: No space left (os error 28)")],
    ids=["ctrl-c", "full disk", "full disk in Rust"],
)
def test_stopped_while_the_model_is_written(
    stage: str,
    error: Callable[[], BaseException],
    model: Path,
    whole: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import transformers.modeling_utils

    write, raised = transformers.modeling_utils.safe_save_file, error()

    def half(tensors: Any, filename: Any, **options: Any) -> None:
        if Path(filename).parent.name == "tiny":  # the proof's own copy, elsewhere
            write(tensors, filename, **options)
            return
        Path(filename).write_bytes(whole[stage][: len(whole[stage]) // 2])
        raise raised

    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", half)
    out = tmp_path / "out"
    with pytest.raises(
        KeyboardInterrupt if isinstance(raised, KeyboardInterrupt) else EdgeslmError
    ) as stopped:
        run(model, stage, out)
    if isinstance(stopped.value, EdgeslmError):
        assert "No space left" in stopped.value.message
        assert "free some space" in stopped.value.hint
    nothing_half_written(out, stage)
    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", write)
    the_next_call_goes_on(model, stage, out, whole[stage])


@pytest.mark.parametrize("stage", TRAINED)
def test_ctrl_c_in_the_middle_of_a_training(
    stage: str, model: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgeslm.stages import train

    step = train._Run._step

    def press(self: Any) -> None:
        if self.state.step == STEPS // 2:
            raise KeyboardInterrupt
        step(self)

    monkeypatch.setattr(train._Run, "_step", press)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(model, stage, out)
    nothing_half_written(out, stage)
    monkeypatch.setattr(train._Run, "_step", step)
    record = the_next_call_goes_on(model, stage, out, whole[stage])
    assert record["training"][0]["resumed_from"] == STEPS // 2


@pytest.mark.parametrize("stage", TRAINED)
def test_a_full_disk_in_the_middle_of_a_training(
    stage: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best weights are what patience ends with: without room for them there is no going on."""
    import torch

    patient = {"train": TRAIN | {"patience": 9}}
    run(model, stage, tmp_path / "whole", **patient)
    save = torch.save

    def half(kept: Any, path: Path) -> None:
        path.write_bytes(b"half of it")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 640 vs 598")

    monkeypatch.setattr(torch, "save", half)
    out = tmp_path / "out"
    with pytest.raises(EdgeslmError, match="No space left") as stopped:
        run(model, stage, out, **patient)
    assert "free some space" in stopped.value.hint
    nothing_half_written(out, stage)
    monkeypatch.setattr(torch, "save", save)
    wanted = (tmp_path / "whole" / "model.safetensors").read_bytes()
    the_next_call_goes_on(model, stage, out, wanted, **patient)


def test_ctrl_c_while_importance_is_measured(
    model: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgeslm.stages import influence

    def press(*_: Any) -> None:
        raise KeyboardInterrupt

    measure = influence.measure_importance
    monkeypatch.setattr(influence, "measure_importance", press)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(model, "prune", out)
    nothing_half_written(out, "prune")
    monkeypatch.setattr(influence, "measure_importance", measure)
    the_next_call_goes_on(model, "prune", out, whole["prune"])


def test_errors_that_are_no_full_disk_stay_what_they_are(tmp_path: Path) -> None:
    assert as_os_error(ValueError("os error 28")) is None
    with pytest.raises(ValueError, match="a bug"), writing(tmp_path):
        raise ValueError("a bug")
    with pytest.raises(EdgeslmError, match="can't write"), writing(tmp_path):
        (tmp_path / "no such directory" / "file").write_text("")
    with pytest.raises(EdgeslmError, match="Permission denied") as refused, writing(tmp_path):
        raise OsErrorOfRust("Error while serializing: I/O error: Permission denied (os error 13)")
    assert "may write to" in refused.value.hint
