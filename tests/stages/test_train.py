"""The training loop against torch's own optimizer and schedule, against itself cut up, killed and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from edgeslm.errors import DataError, ModelError, RecipeError
from edgeslm.progress import Quiet
from edgeslm.specs import TrainSpec
from edgeslm.stages import schedule
from edgeslm.stages.train import train

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.workstation

ROOT = Path(__file__).resolve().parents[2]
SPEC = TrainSpec(epochs=3, batch_size=4, learning_rate=1e-2)


class Notes(Quiet):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


class Numbers:
    """Examples of a linear map with noise; each counts another number of times."""

    def __init__(self, count: int = 22) -> None:
        random = np.random.default_rng(0)
        self.x = random.standard_normal((count, 5)).astype(np.float32)
        self.y = (self.x @ random.standard_normal((5, 3)) + 0.1).astype(np.float32)
        self.on_access: Callable[[int], None] = lambda _index: None

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.on_access(index)
        return {"x": self.x[index], "y": self.y[index], "weight": 1 + index % 3}


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    import torch

    return {key: torch.from_numpy(np.stack([item[key] for item in items])) for key in items[0]}


def network(dropout: float = 0.0) -> Any:
    import torch

    torch.manual_seed(3)
    return torch.nn.Sequential(
        torch.nn.Linear(5, 8), torch.nn.LayerNorm(8), torch.nn.Dropout(dropout), torch.nn.Linear(8, 3)
    )


def loss(model: Any, batch: dict[str, Any]) -> Any:
    return ((model(batch["x"]) - batch["y"]).square().sum(-1) * batch["weight"]).sum()


def counted(batch: dict[str, Any]) -> int:
    return int(batch["weight"].sum())


def fit(work: Path, model: Any, spec: TrainSpec = SPEC, **options: Any) -> dict[str, Any]:
    arguments = {"loss": loss, "counted": counted, "seed": 5, **options}
    return train(model, arguments.pop("dataset", None) or Numbers(), collate, spec, work, **arguments)


def losses(training: dict[str, Any]) -> list[float]:
    return [point["loss"] for point in training["curve"]]


def weights(model: Any) -> Any:
    import torch

    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


# --- arithmetic ---


@pytest.mark.parametrize("steps", [1, 2, 7, 20, 100, 110])
def test_the_rate_is_torchs_warm_up_and_cosine(steps: int) -> None:
    import torch
    from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    warm = max(1, round(0.05 * steps))
    rises = LinearLR(optimizer, start_factor=1 / warm, total_iters=max(warm - 1, 1))
    falls = CosineAnnealingLR(optimizer, T_max=max(1, steps - warm), eta_min=0.03)
    scheduler = SequentialLR(optimizer, [rises, falls], milestones=[warm])
    for step in range(steps):
        assert schedule.learning_rate(step, steps, 0.3) == pytest.approx(
            optimizer.param_groups[0]["lr"], rel=1e-9
        )
        optimizer.step()
        scheduler.step()


def test_every_epoch_is_all_examples_in_an_order_of_its_own() -> None:
    examples, batch = 11, 4
    row = [index for step in range(11) for index in schedule.chosen(step, examples, batch, seed=1)]
    epochs = [row[at : at + examples] for at in range(0, 44, examples)]
    assert all(sorted(epoch) == list(range(examples)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert row != [index for step in range(11) for index in schedule.chosen(step, examples, batch, seed=2)]


@pytest.mark.parametrize(
    ("settings", "steps"),
    [({"epochs": 3.0}, 16), ({"epochs": 0.5}, 3), ({"epochs": 0.01}, 1), ({"max_steps": 5}, 5)],
)
def test_steps_follow_from_epochs(settings: dict[str, Any], steps: int) -> None:
    assert schedule.planned_steps(replace(SPEC, **settings), 22) == steps


def test_evaluations_are_spread_from_before_the_first_step_to_the_last() -> None:
    assert schedule.evaluation_steps(100, 4) == {0, 25, 50, 75, 100}
    assert schedule.evaluation_steps(2, 10) == {0, 1, 2}
    assert schedule.evaluation_steps(10, 0) == {0, 10}


def test_only_large_models_on_fitting_hardware_are_mixed() -> None:
    import torch

    small = torch.nn.Linear(3, 3)
    assert schedule.suited_precision(torch.device("cpu"), small) == "float32"
    large = torch.nn.Linear(4000, 4000)
    wanted = "bfloat16" if torch.cpu._is_amx_tile_supported() else "float32"
    assert schedule.suited_precision(torch.device("cpu"), large) == wanted


# --- the loop ---


def test_steps_are_those_of_torchs_adamw(tmp_path: Path) -> None:
    """The reference: plain torch, the mean over what a whole batch counts."""
    import torch

    model, reference = network(), network()
    training = fit(tmp_path, model)
    plain = [one for one in reference.parameters() if one.ndim < 2]
    matrices = [one for one in reference.parameters() if one.ndim >= 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}],
        betas=(0.9, 0.95), foreach=False, fused=False,
    )  # fmt: skip
    data, wanted = Numbers(), []
    for step in range(16):
        batch = collate([data[index] for index in schedule.chosen(step, 22, 4, 5)])
        mean = loss(reference, batch) / counted(batch)
        optimizer.zero_grad()
        mean.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate(step, 16, 1e-2)
        optimizer.step()
        wanted.append(mean.item())
    assert losses(training) == pytest.approx(wanted, rel=1e-5)
    torch.testing.assert_close(weights(model), weights(reference), rtol=1e-5, atol=1e-6)


def test_the_record_tells_what_was_done(tmp_path: Path) -> None:
    model = network()
    training = fit(tmp_path, model, evaluate=lambda m: float(weights(m).norm()), evaluations=2)
    assert training["schema"] == "edgeslm.training/1"
    assert (training["steps"], training["examples"], training["epochs"]) == (16, 64, 64 / 22)
    assert training["tokens"] == 64 * 5
    assert [point["step"] for point in training["evaluations"]] == [0, 8, 16]
    assert [point["step"] for point in training["curve"]] == list(range(1, 17))
    assert training["curve"][0]["learning_rate"] == pytest.approx(1e-2)
    assert (training["resumed_from"], training["processes"], training["stopped_early"]) == (None, 1, False)
    assert not model.training
    json.dumps(training)


def test_a_long_curve_is_thinned_out_and_has_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeslm.stages.train.CURVE_POINTS", 10)
    training = fit(tmp_path, network(), replace(SPEC, max_steps=23))
    assert [point["step"] for point in training["curve"]] == [3, 6, 9, 12, 15, 18, 21, 23]


@pytest.mark.parametrize("size", [1, 3])
def test_micro_batches_add_up_to_the_batch(tmp_path: Path, size: int) -> None:
    import torch

    whole, cut = network(), network()
    first = fit(tmp_path / "whole", whole)
    second = fit(tmp_path / "cut", cut, replace(SPEC, micro_batch=size))
    assert losses(second) == pytest.approx(losses(first), rel=1e-5)
    torch.testing.assert_close(weights(cut), weights(whole), rtol=1e-5, atol=1e-6)


def test_equal_seeds_give_equal_curves_and_leave_the_callers_random_numbers(tmp_path: Path) -> None:
    import torch

    models = [network(0.3) for _ in range(3)]
    torch.manual_seed(9)
    before = torch.get_rng_state()
    curves = [
        losses(fit(tmp_path / str(number), model, seed=min(number, 1))) for number, model in enumerate(models)
    ]
    assert curves[1] == curves[2] != curves[0]
    assert torch.equal(torch.get_rng_state(), before)


def test_examples_without_anything_to_count_change_nothing(tmp_path: Path) -> None:
    import torch

    model = network()
    before = weights(model).clone()
    fit(tmp_path, model, counted=lambda _batch: 0, loss=lambda m, batch: loss(m, batch) * 0)
    assert torch.equal(weights(model), before)


# --- killed and resumed ---


class Killed(Exception):
    pass


def kill_after(data: Numbers, accesses: int) -> Numbers:
    """Fails in the middle of a step."""
    left = [accesses]

    def count(_index: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    data.on_access = count
    return data


def held_out(model: Any) -> float:
    return float(loss(model, collate([Numbers(30)[index] for index in range(22, 30)])).detach())


@pytest.mark.parametrize("accesses", [5, 14, 40, 66])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, accesses: int) -> None:
    import torch

    options = {"evaluate": held_out, "evaluations": 5, "checkpoint_s": 0.0}
    whole, first, second = (network(0.2) for _ in range(3))
    wanted = fit(tmp_path / "whole", whole, **options)
    with pytest.raises(Killed):
        fit(tmp_path / "cut", first, dataset=kill_after(Numbers(), accesses), **options)
    notes = Notes()
    resumed = fit(tmp_path / "cut", second, progress=notes, **options)
    # Three of the accesses are the data set's fingerprint.
    assert resumed["resumed_from"] == (accesses - 4) // 4
    assert losses(resumed) == losses(wanted)
    assert resumed["evaluations"] == wanted["evaluations"]
    assert torch.equal(weights(second), weights(whole))
    assert any("going on after step" in line for line in notes.lines)


def test_ctrl_c_ends_the_step_and_keeps_it(tmp_path: Path) -> None:
    calls = []

    def pressed(model: Any, batch: dict[str, Any]) -> Any:
        calls.append(1)
        if len(calls) == 7:
            signal.raise_signal(signal.SIGINT)
        return loss(model, batch)

    wanted = losses(fit(tmp_path / "whole", network(0.2)))
    notes, before = Notes(), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "cut", network(0.2), loss=pressed, progress=notes)
    assert signal.getsignal(signal.SIGINT) is before
    assert notes.lines[-1] == "train: stopped after step 7; run it again to go on"
    resumed = fit(tmp_path / "cut", network(0.2))
    assert resumed["resumed_from"] == 7
    assert losses(resumed) == wanted


def test_ctrl_c_during_an_evaluation_repeats_it(tmp_path: Path) -> None:
    def pressed(model: Any) -> float:
        if model[0].weight.grad is None and not torch_initial(model):
            signal.raise_signal(signal.SIGINT)
        return held_out(model)

    def torch_initial(model: Any) -> bool:
        return bool((weights(model) == weights(network())).all())

    wanted = fit(tmp_path / "whole", network(), evaluate=held_out, evaluations=2)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "cut", network(), evaluate=pressed, evaluations=2)
    resumed = fit(tmp_path / "cut", network(), evaluate=held_out, evaluations=2)
    assert resumed["resumed_from"] == 8
    assert resumed["evaluations"] == wanted["evaluations"]
    assert losses(resumed) == losses(wanted)


def test_the_checkpoint_of_another_training_is_left_alone(tmp_path: Path) -> None:
    fit(tmp_path, network(), replace(SPEC, max_steps=5), checkpoint_s=0.0)
    notes = Notes()
    training = fit(tmp_path, network(), seed=6, progress=notes)
    assert training["resumed_from"] is None
    assert any("another training" in line for line in notes.lines)


def test_a_full_disk_costs_the_checkpoint_not_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    def full(_value: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    wanted = losses(fit(tmp_path / "whole", network()))
    monkeypatch.setattr(torch, "save", full)
    notes = Notes()
    assert losses(fit(tmp_path / "full", network(), checkpoint_s=0.0, progress=notes)) == wanted
    assert any("no checkpoint of step 0" in line and "No space left" in line for line in notes.lines)
    assert list((tmp_path / "full").iterdir()) == []


# --- early stopping ---


def test_patience_stops_and_restores_the_best_weights(tmp_path: Path) -> None:
    import torch

    seen: list[Any] = []
    told = iter([5.0, 4.0, 3.0, 3.5, 3.2, 1.0])

    def evaluate(model: Any) -> float:
        seen.append(weights(model).clone())
        return next(told)

    model = network()
    training = fit(tmp_path, model, replace(SPEC, patience=2), evaluate=evaluate, evaluations=8)
    assert (training["stopped_early"], training["steps"], training["best_step"]) == (True, 8, 4)
    assert torch.equal(weights(model), seen[2])
    assert not torch.equal(weights(model), seen[4])


def test_without_patience_the_last_weights_stay(tmp_path: Path) -> None:
    import torch

    model, reference = network(), network()
    told = iter(range(99))
    training = fit(tmp_path / "a", model, evaluate=lambda _m: float(next(told)))
    fit(tmp_path / "b", reference)
    assert (training["best_step"], training["steps"]) == (0, 16)
    assert torch.equal(weights(model), weights(reference))


def test_early_stopping_survives_a_kill(tmp_path: Path) -> None:
    import torch

    def evaluate(model: Any) -> float:
        return abs(float(weights(model).sum()) - float(weights(network()).sum()) - 0.05)

    options = {"evaluate": evaluate, "evaluations": 8, "checkpoint_s": 0.0}
    spec = replace(SPEC, patience=3)
    whole, second = network(), network()
    wanted = fit(tmp_path / "whole", whole, spec, **options)
    with pytest.raises(Killed):
        fit(tmp_path / "cut", network(), spec, dataset=kill_after(Numbers(), 21), **options)
    resumed = fit(tmp_path / "cut", second, spec, **options)
    for key in ("steps", "best_step", "stopped_early", "evaluations"):
        assert resumed[key] == wanted[key]
    assert torch.equal(weights(second), weights(whole))


# --- bad input ---


def test_a_loss_that_is_not_finite_names_its_step(tmp_path: Path) -> None:
    calls = []

    def breaks(model: Any, batch: dict[str, Any]) -> Any:
        calls.append(1)
        return loss(model, batch) * (float("nan") if len(calls) == 4 else 1.0)

    model = network()
    with pytest.raises(ModelError, match=r"the loss of step 4 is nan.*lower the learning rate"):
        fit(tmp_path, model, loss=breaks)
    assert bool(weights(model).isfinite().all())


def test_a_gradient_that_is_not_finite_is_no_step(tmp_path: Path) -> None:
    def breaks(model: Any, batch: dict[str, Any]) -> Any:
        return loss(model, batch) + (model[0].weight.sum() * 0).sqrt()

    with pytest.raises(ModelError, match="length of its gradient"):
        fit(tmp_path, network(), loss=breaks)


def test_nothing_to_train_on(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing to train on"):
        train(network(), Numbers(0), collate, SPEC, tmp_path, loss=loss, counted=counted, seed=0)


def test_a_network_without_gradient_checkpointing_says_so(tmp_path: Path) -> None:
    notes = Notes()
    fit(tmp_path, network(), replace(SPEC, gradient_checkpointing=True, max_steps=1), progress=notes)
    assert "Sequential has no gradient checkpointing: activations are kept" in notes.lines


# --- processes ---

LAUNCHED = """
import json, sys
from dataclasses import replace
from pathlib import Path
from edgeslm.errors import RecipeError
from edgeslm.stages.team import close, from_main, is_main, wait_for_all
from tests.stages.test_train import SPEC, fit, held_out, network, weights
out, batch = Path(sys.argv[1]), int(sys.argv[2])
model = network()
try:
    spec = replace(SPEC, batch_size=batch, micro_batch=2, patience=9)
    training = fit(out / "work", model, spec, evaluate=held_out, checkpoint_s=0.0)
except RecipeError as error:
    training = {"error": error.message}
assert from_main({"rank": is_main()}) == {"rank": True}
wait_for_all()
if is_main():
    training["weights"] = weights(model).tolist()
    (out / "training.json").write_text(json.dumps(training))
close()
"""


def launch(tmp_path: Path, processes: int, batch: int) -> dict[str, Any]:
    script = tmp_path / "launched.py"
    script.write_text(LAUNCHED)
    out = tmp_path / f"{processes}-{batch}"
    out.mkdir()
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes),
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
        str(script), str(out), str(batch),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads((out / "training.json").read_text())


@pytest.mark.parametrize("batch", [4, 7])
def test_two_processes_train_as_one_does(tmp_path: Path, batch: int) -> None:
    """Equal global batches, also such that the processes have unequal shares of it."""
    model = network()
    one = fit(tmp_path / "one", model, replace(SPEC, batch_size=batch, patience=9), evaluate=held_out)
    two = launch(tmp_path, 2, batch)
    assert (two["processes"], two["steps"], two["tokens"]) == (2, one["steps"], one["tokens"])
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    assert [point["loss"] for point in two["evaluations"]] == pytest.approx(
        [point["loss"] for point in one["evaluations"]], rel=1e-5
    )
    assert two["weights"] == pytest.approx(weights(model).tolist(), rel=1e-4, abs=1e-6)
    assert sorted(path.name for path in (tmp_path / f"2-{batch}" / "work").iterdir()) == [
        "train-best.pt", "train-checkpoint.pt",
    ]  # fmt: skip


def test_a_batch_smaller_than_the_processes_is_refused(tmp_path: Path) -> None:
    assert "smaller than the number of processes, 2" in launch(tmp_path, 2, 1)["error"]


KILLED = """
import sys, time
from pathlib import Path
from tests.stages.test_train import fit, loss, network
def slow(model, batch):
    time.sleep(0.05)
    return loss(model, batch)
fit(Path(sys.argv[1]), network(0.2), loss=slow, checkpoint_s=0.1)
"""


def test_a_process_killed_at_any_moment_leaves_a_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    work = tmp_path / "work"
    child = subprocess.Popen(
        [sys.executable, str(script), str(work)], env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    try:
        deadline = time.monotonic() + 120
        while not (work / "train-checkpoint.pt").exists() and time.monotonic() < deadline:
            assert child.poll() is None
            time.sleep(0.01)
        time.sleep(0.2)
    finally:
        child.kill()
        child.wait()
    resumed = fit(work, network(0.2))
    assert 0 < resumed["resumed_from"] <= 16
    assert losses(resumed) == losses(fit(tmp_path / "whole", network(0.2)))


def test_other_ways_to_spread_a_model_are_refused() -> None:
    from types import SimpleNamespace

    from edgeslm.stages.train import _check_processes

    accelerator = SimpleNamespace(distributed_type=SimpleNamespace(value="FSDP"), num_processes=2)
    with pytest.raises(RecipeError, match=r"FSDP.*data-parallel only"):
        _check_processes(accelerator, SPEC)
