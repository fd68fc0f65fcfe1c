"""The one training loop: every model, every loss, one process or many, and a kill at any moment.

    step's examples (by seed and step alone) -> micro-batches -> sum of losses / what they count -> AdamW

A step's gradient is that of the summed loss over everything that its examples count, divided by that count,
however they are cut into micro-batches and spread over processes.  A step draws its random numbers from the
seed and its own number, so a resumed run repeats the curve.  AdamW: Loshchilov & Hutter 2019, arXiv:1711.05101.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from edgeslm.errors import DataError, ModelError, RecipeError
from edgeslm.progress import Progress, Quiet
from edgeslm.stages.keeping import Keeper, State, fingerprint
from edgeslm.stages.schedule import (
    BETAS,
    CLIP_NORM,
    chosen,
    evaluation_steps,
    groups,
    learning_rate,
    length,
    planned_steps,
    seed_of_step,
    suited_precision,
    tokens_in,
)
from edgeslm.stages.team import from_main, only_processor, processes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from edgeslm.specs import TrainSpec
    from edgeslm.stages.schedule import Batch, Examples

SCHEMA = "edgeslm.training/1"
CURVE_POINTS = 500

Training = dict[str, Any]


def train(
    model: Any,
    dataset: Examples,
    collate: Callable[[list[dict[str, Any]]], Batch],
    spec: TrainSpec,
    work: Path,
    *,
    loss: Callable[[Any, Batch], Any],
    counted: Callable[[Batch], int],
    evaluate: Callable[[Any], float] | None = None,
    seed: int,
    progress: Progress | None = None,
    name: str = "train",
    evaluations: int = 10,
    precision: str | None = None,
    checkpoint_s: float = 120.0,
    clock: Callable[[], float] = time.monotonic,
) -> Training:
    """Train `model` in place and return the record of it; the model is in evaluation mode then.

    loss: SUM over what a batch counts, in nats.  counted: how much that is (tokens or examples).
    evaluate: the held-out loss of the bare model, called on the main process only, `evaluations` times
    and before the first step.  work: keeps the checkpoints, one every `checkpoint_s` seconds and on
    Ctrl-C; a later call with equal arguments goes on from there.  precision: "float32" or "bfloat16"
    products; None: what the hardware is fast at.  With `spec.patience` the best weights are restored.
    The model stays on the device that it was trained on.
    Raises DataError without examples, RecipeError for what the launched processes can't do,
    ModelError for a loss that is not finite.
    """
    import torch
    from accelerate import Accelerator

    if len(dataset) == 0:
        raise DataError("there is nothing to train on", hint="the training sources hold no examples")
    processes()
    accelerator = Accelerator(mixed_precision="no", cpu=only_processor())
    _check_processes(accelerator, spec)
    precision = precision or suited_precision(accelerator.device, model)
    facts = json.dumps([asdict(spec), seed, len(dataset), evaluations, precision, evaluate is None])
    run = _Run(
        accelerator=accelerator, bare=model, dataset=dataset, collate=collate, spec=spec, loss=loss,
        counted=counted, evaluate=evaluate, seed=seed, name=name, evaluations=evaluations, clock=clock,
        precision=precision, checkpoint_s=checkpoint_s,
        keeper=Keeper(work=work, name=name, fingerprint=fingerprint(model, dataset, facts)),
        progress=progress if progress and accelerator.is_main_process else Quiet(),
    )  # fmt: skip
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(devices), _gradient_checkpointing(model, spec, run.progress):
        run.prepare()
        try:
            run.to_the_end()
        except KeyboardInterrupt:
            if accelerator.num_processes == 1:
                run.save()
                run.progress.note(f"{name}: stopped after step {run.state.step}; run it again to go on")
            raise
        run.restore_best()
    model.eval()
    return run.record()


def _check_processes(accelerator: Any, spec: TrainSpec) -> None:
    kind = accelerator.distributed_type.value
    if kind != "NO" and not kind.startswith("MULTI_"):
        raise RecipeError(
            f"accelerate is set up for {kind}, but training here is data-parallel only",
            hint="accelerate launch --multi_gpu --num_processes N, without FSDP or DeepSpeed",
        )
    if spec.batch_size < accelerator.num_processes:
        raise RecipeError(
            f"batch_size = {spec.batch_size} is smaller than the number of processes, {accelerator.num_processes}"
        )


# --- a run ---


@dataclass(kw_only=True)
class _Run:
    """One training: what it was given, and its state.  bare: the model without accelerate's wrapper."""

    accelerator: Any
    bare: Any
    dataset: Examples
    collate: Callable[[list[dict[str, Any]]], Batch]
    spec: TrainSpec
    loss: Callable[[Any, Batch], Any]
    counted: Callable[[Batch], int]
    evaluate: Callable[[Any], float] | None
    seed: int
    name: str
    evaluations: int
    precision: str
    checkpoint_s: float
    clock: Callable[[], float]
    keeper: Keeper
    progress: Progress
    state: State = field(default_factory=State)
    resumed_from: int | None = None
    model: Any = None
    optimizer: Any = None

    @cached_property
    def steps(self) -> int:
        return planned_steps(self.spec, len(self.dataset))

    def prepare(self) -> None:
        """Device, optimizer, and the state of the last checkpoint."""
        import torch

        fused = self.accelerator.device.type in ("cpu", "cuda")
        optimizer = torch.optim.AdamW(groups(self.bare), lr=self.spec.learning_rate, betas=BETAS, fused=fused)
        self.model, self.optimizer = self.accelerator.prepare(self.bare, optimizer)
        self.accelerator.wait_for_everyone()
        found = self.keeper.load(self.bare, self.optimizer, self.progress)
        if found is not None:
            self.state, self.resumed_from = found, found.step
            self.progress.note(f"{self.name}: going on after step {found.step} of {self.steps}")

    def to_the_end(self) -> None:
        """Evaluate, keep and step until the planned steps are done or patience is at its end."""
        due = evaluation_steps(self.steps, self.evaluations) if self.evaluate else set()
        saved_at, batch = self.clock(), self.spec.batch_size
        with self.progress.task(self.name, self.steps * batch, "examples") as advance:
            advance(self.state.step * batch)
            while True:
                if self.state.step in due - {point["step"] for point in self.state.evaluations}:
                    self._evaluate()
                if self.state.step >= self.steps or self._is_stale():
                    return
                if from_main(self.clock() - saved_at >= self.checkpoint_s):
                    self.save()
                    saved_at = self.clock()
                with _finishing_first():
                    self._step()
                advance(batch)

    def _step(self) -> None:
        """One step of the optimizer over spec.batch_size examples."""
        import torch

        begin, step, spec = self.clock(), self.state.step, self.spec
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        torch.manual_seed(seed_of_step(self.seed, step, rank))
        indices = chosen(step, len(self.dataset), spec.batch_size, self.seed)
        # Neighbours of equal length need little padding; the sum is the same in any order.
        items = sorted((self.dataset[index] for index in indices), key=length)[rank::world]
        size = spec.micro_batch or len(items)
        batches = [self.collate(items[at : at + size]) for at in range(0, len(items), size)]
        total = self._sum(sum(self.counted(batch) for batch in batches))
        rate = learning_rate(step, self.steps, spec.learning_rate)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        loss = self._sum(self._backward(batches, world / max(total, 1))) / max(total, 1)
        trained = [one for one in self.model.parameters() if one.requires_grad]
        norm = float(self.accelerator.clip_grad_norm_(trained, CLIP_NORM))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise ModelError(
                f"{self.name}: the loss of step {step + 1} is {loss}, the length of its gradient {norm}",
                hint="lower the learning rate, or look for damaged weights or data",
            )
        if total:
            self.optimizer.step()
        self.optimizer.zero_grad()
        tokens = int(self._sum(sum(map(tokens_in, batches))))
        self._note(loss, rate, tokens, self.clock() - begin)

    def _backward(self, batches: Sequence[Batch], scale: float) -> float:
        """Add up scaled gradients over the micro-batches; returns the summed loss.

        The processes' gradients are averaged, hence the scale of processes / counted.
        """
        import torch

        device, total = self.accelerator.device, 0.0
        for number, batch in enumerate(batches, 1):
            on_device = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
            last = number == len(batches)
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
                    loss = self.loss(self.model, on_device)
                self.accelerator.backward(loss * scale)
            total += float(loss.detach())
        return total

    def _sum(self, value: float) -> float:
        """The sum over all processes."""
        import torch

        if self.accelerator.num_processes == 1:
            return value
        here = torch.tensor(value, dtype=torch.float64, device=self.accelerator.device)
        return float(self.accelerator.reduce(here, "sum"))

    def _note(self, loss: float, rate: float, tokens: int, seconds: float) -> None:
        state = self.state
        state.step += 1
        state.tokens += tokens
        state.seconds += seconds
        step, steps, speed = state.step, self.steps, tokens / max(seconds, 1e-9)
        if step % -(-steps // CURVE_POINTS) == 0 or step == steps:
            state.curve.append({"step": step, "loss": loss, "learning_rate": rate, "tokens_per_s": speed})
        if step % max(1, steps // 10) == 0 or step == steps:
            left = state.seconds / step * (steps - step)
            self.progress.note(
                f"{self.name}: step {step} of {steps}, loss {loss:.3f}, "
                f"{state.tokens / max(state.seconds, 1e-9):,.0f} tokens/s, {left / 60:.1f} min left"
            )

    def _evaluate(self) -> None:
        """The main process's held-out loss, told to all; the best weights are kept where patience asks."""
        import torch

        assert self.evaluate is not None
        begin, state, held_out = self.clock(), self.state, 0.0
        if self.accelerator.is_main_process:
            self.bare.eval()
            with torch.no_grad():
                held_out = float(self.evaluate(self.bare))
        held_out = from_main(held_out)
        best = held_out < min((point["loss"] for point in state.evaluations), default=math.inf)
        if best and self.spec.patience is not None and self.accelerator.is_main_process:
            self.keeper.save_best(self.bare)
        state.best_step = state.step if best else state.best_step
        state.evaluations.append({"step": state.step, "loss": held_out})
        state.seconds += self.clock() - begin
        self.progress.note(f"{self.name}: held-out loss {held_out:.4f} after step {state.step}")

    def _is_stale(self) -> bool:
        """Whether `patience` evaluations have passed since the best one."""
        best = self.state.best_step
        if self.spec.patience is None or best is None:
            return False
        since = [point for point in self.state.evaluations if point["step"] > best]
        self.state.stopped_early = len(since) >= self.spec.patience
        return self.state.stopped_early

    def save(self) -> None:
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.keeper.save(self.bare, self.optimizer, self.state, self.progress)

    @property
    def weights_of_step(self) -> int:
        """The step whose weights the model ends with: the best one's where patience asks for them."""
        best = None if self.spec.patience is None else self.state.best_step
        return self.state.step if best is None else best

    def restore_best(self) -> None:
        self.accelerator.wait_for_everyone()
        if self.weights_of_step != self.state.step:
            self.keeper.restore_best(self.bare)

    def record(self) -> Training:
        examples = self.state.step * self.spec.batch_size
        return {
            "schema": SCHEMA,
            "steps": self.state.step,
            "epochs": examples / len(self.dataset),
            "examples": examples,
            **{key: value for key, value in asdict(self.state).items() if key != "step"},
            "weights_of_step": self.weights_of_step,
            "resumed_from": self.resumed_from,
            "processes": self.accelerator.num_processes,
            "precision": self.precision,
            "seed": self.seed,
        }


@contextmanager
def _finishing_first() -> Iterator[None]:
    """Ctrl-C lets the step end, since half a step could not be gone on from; a second one does not wait."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed: list[bool] = []

    def press(_signal: int, _frame: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(True)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


@contextmanager
def _gradient_checkpointing(model: Any, spec: TrainSpec, progress: Progress) -> Iterator[None]:
    """Recompute activations in the backward pass instead of keeping them, where the network can."""
    enable = getattr(model, "gradient_checkpointing_enable", None)
    if spec.gradient_checkpointing and enable is None:
        progress.note(f"{type(model).__name__} has no gradient checkpointing: activations are kept")
    if not spec.gradient_checkpointing or enable is None:
        yield
        return
    enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()
