"""Data, training, pruning and decisions in words, the same on the terminal and in a report; see wording."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from edgeslm.wording import NOT_AVAILABLE, count, duration, parameters, percent, significant, text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    Record = Mapping[str, Any]

STAGES = {"finetune": "fine-tuning", "distill": "distilling"}
"""Stages that train, as a reader would call them."""
MANY_CLASSES = 4
"""More than so many are counted instead of named."""
RARE = 0.02
"""Share of the training examples below which a class is called rare."""
WIDTHS = {
    "layers": "layers", "mlp_width": "MLP width", "kv_heads": "KV heads", "hidden_size": "hidden size",
    "intermediate_size": "MLP width", "heads": "heads",
}  # fmt: skip
FIGURES = {
    "perplexity": "perplexity", "accuracy": "accuracy", "f1": "F1", "macro_f1": "macro F1", "log_loss": "log-loss",
}  # fmt: skip
"""Held-out figures of a training record that are told, and their names."""


# --- data ---


def data_side(side: Record) -> str:
    """'1,200 examples of 3 classes, 88,000 tokens' of one side of a split."""
    if not side:
        return NOT_AVAILABLE
    kind = "window" if side.get("rows_per_window") else "example"
    examples = count(side.get("examples"), kind)
    classes = side.get("classes") or {}
    if classes:
        named = ", ".join(f"{n or 0:,.0f} {name}" for name, n in classes.items())
        examples += f" ({named})" if len(classes) <= MANY_CLASSES else f" of {len(classes)} classes"
    parts = [examples]
    for key, noun in (("rows_per_window", "row each"), ("units", "unit"), ("documents", "document")):
        if side.get(key):
            number = count(side[key], noun)
            parts.append(number.replace("row eachs", "rows each"))
    if side.get("tokens"):
        parts.append(count(side["tokens"], "token"))
        counted = side.get("counted_tokens")
        if counted is not None and counted < side["tokens"]:
            parts.append(f"{percent(counted / side['tokens'], 0)} of them counted")
    return ", ".join(parts)


def masked(scrubbed: Record | None) -> str:
    """'12 emails, 3 phones' of what a scrubber found; never what it was."""
    if scrubbed is None:
        return NOT_AVAILABLE
    found = [f"{number:,.0f} {kind}" for kind, number in scrubbed.items() if number]
    return ", ".join(found) or "nothing found"


def data_warnings(data: Record) -> list[str]:
    """What a reader should know of the data before the figures are believed."""
    found = []
    train, heldout = data.get("train") or {}, data.get("heldout") or {}
    if data.get("duplicates"):
        found.append(
            f"{_being(data['duplicates'], 'held-out example')} among the training examples too: the figures "
            "are too good by what was learned by heart"
        )
    classes = train.get("classes") or {}
    total = sum(number or 0 for number in classes.values())
    rare = [name for name, number in classes.items() if total and (number or 0) < RARE * total]
    if rare:
        found.append(
            f"fewer than {percent(RARE, 0)} of the training examples are {_listed(rare)}: accuracy alone says little"
        )
    unseen = [name for name, number in (heldout.get("classes") or {}).items() if not number]
    if unseen:
        found.append(f"no held-out example is {_listed(unseen)}")
    if data.get("truncated") and total:
        found.append(f"{_being(data['truncated'], 'text', 'was', 'were')} longer than the context and cut")
    for key, said in (("empty_channels", "has no reading"), ("constant_channels", "never changes")):
        found += [f"the channel {name} {said}: it tells the network nothing" for name in data.get(key) or ()]
    lost = (data.get("windows_left_out") or {}).get("missing_readings")
    if lost:
        found.append(f"{_being(lost, 'window', 'was', 'were')} left out, with too many readings missing")
    return found


def _being(number: float, noun: str, one: str = "is", several: str = "are") -> str:
    return f"{count(number, noun)} {one if number == 1 else several}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# --- training ---


def training_length(record: Record) -> str:
    """'110 steps, 1.00 epochs, stopped early'."""
    parts = [count(record.get("steps"), "step")]
    if record.get("epochs") is not None:
        parts.append(f"{significant(record['epochs'])} epochs")
    if record.get("stopped_early"):
        parts.append("stopped early")
    best = record.get("weights_of_step")
    if best is not None and best != record.get("steps"):
        parts.append(f"weights of step {best:,.0f}")
    return ", ".join(parts)


def training_amount(record: Record) -> str:
    """'12,288 examples, 1.2 M tokens'."""
    parts = [count(record.get("examples"), "example")]
    if record.get("tokens"):
        parts.append(f"{parameters(record['tokens'])} tokens")
    return ", ".join(parts)


def training_time(record: Record) -> str:
    """'9 min 40 s, 312 tokens/s'."""
    seconds, tokens = record.get("seconds"), record.get("tokens")
    if not seconds:
        return duration(seconds) if seconds is not None else NOT_AVAILABLE
    return duration(seconds) + (f", {significant(tokens / seconds)} tokens/s" if tokens else "")


def heldout_loss(record: Record) -> str:
    """'2.71 before, 2.29 after, at best 2.28 (step 90)'."""
    points = [each for each in record.get("evaluations") or () if each and each.get("loss") is not None]
    points = sorted((each for each in points if each.get("step") is not None), key=lambda each: each["step"])
    if not points:
        return NOT_AVAILABLE
    wanted = record.get("weights_of_step")
    end = next((each for each in points if each["step"] == wanted), points[-1])
    parts = [f"{points[0]['loss']:.4f} before"] if points[0]["step"] == 0 and len(points) > 1 else []
    parts.append(f"{end['loss']:.4f} after")
    best = min(points, key=lambda each: each["loss"])
    if best["loss"] < end["loss"]:
        parts.append(f"at best {best['loss']:.4f} (step {best['step']:,.0f})")
    return ", ".join(parts)


def heldout_figures(record: Record) -> str:
    """'perplexity 15.0 -> 9.91', 'accuracy 98.20 %, log-loss 0.0612'."""
    held = record.get("heldout") or {}
    known = {key: value for key, value in held.items() if _is_number(value)}
    parts = []
    for key, name in FIGURES.items():
        if key not in known:
            continue
        said = percent(known[key], 2) if key == "accuracy" else significant(known[key], 4)
        before = known.get(f"{key}_before")
        parts.append(f"{name} {significant(before, 4)} -> {said}" if before is not None else f"{name} {said}")
    return ", ".join(parts) or NOT_AVAILABLE


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# --- pruning ---


def pruned_rows(record: Record) -> list[tuple[str, str, str, str]]:
    """(what, before, after, share kept) of all that changed, parameters first."""
    sizes = [("parameters", record.get("parameters") or {}, parameters)]
    widths = record.get("widths") or {}
    before, after = widths.get("before") or {}, widths.get("after") or {}
    sizes += [
        (WIDTHS.get(key, key.replace("_", " ")), {"before": value, "after": after.get(key)}, count)
        for key, value in before.items()
    ]
    sizes.append(("tokens of the vocabulary", record.get("tokens") or {}, count))
    rows = []
    for name, size, show in sizes:
        old, new = size.get("before"), size.get("after")
        if old is None or new is None or (old == new and name != "parameters"):
            continue
        rows.append((name, show(old), show(new), percent(new / old) if old else NOT_AVAILABLE))
    return rows


def pruned(record: Record) -> str:
    """'134.5 M -> 113.3 M parameters (84.2 % kept); layers 30 -> 24'."""
    rows = pruned_rows(record)
    said = [
        f"{old} -> {new} parameters ({kept} kept)" for name, old, new, kept in rows if name == "parameters"
    ]
    said += [f"{name} {old} -> {new}" for name, old, new, _ in rows if name != "parameters"]
    return "; ".join(said) or NOT_AVAILABLE


# --- decisions ---


def reads(preprocessing: Record) -> str:
    """'texts up to 256 tokens', 'windows of 64 rows, 9 channels': what a classifier is given."""
    if preprocessing.get("kind") == "sensors":
        channels = count(len(preprocessing.get("channels") or ()), "channel")
        return f"windows of {count(preprocessing.get('rows'), 'row')}, {channels}"
    limit = preprocessing.get("max_tokens")
    return NOT_AVAILABLE if limit is None else f"texts up to {count(limit, 'token')}"


def base_rates(decision: Record) -> str:
    """'failure 1.0 %, normal 99.0 % (in training 20.0 %, 80.0 %)'; n/a where they are those of training."""
    labels, prior, trained = (decision.get(key) or () for key in ("labels", "prior", "training_prior"))
    if (
        len(labels) != len(prior)
        or len(prior) != len(trained)
        or None in prior
        or list(prior) == list(trained)
    ):
        return NOT_AVAILABLE
    if len(labels) > MANY_CLASSES:
        return "as given, not those of training"
    now = ", ".join(f"{label} {percent(rate)}" for label, rate in zip(labels, prior, strict=True))
    return f"{now} (in training {', '.join(map(percent, trained))})"


def alarms(record: Record | None) -> str:
    """'announced 58 s before failure against 31 s of a tuned threshold on rms at 0.4 % false alarms'."""
    record = record or {}
    score, baseline = record.get("score") or {}, record.get("baseline") or {}
    lead, other = score.get("mean_lead_s"), baseline.get("mean_lead_s")
    if lead is None or other is None:
        return NOT_AVAILABLE
    return (
        f"announced {_lead(lead)} before {text(record.get('positive'))} against {_lead(other)} of a "
        f"tuned threshold on {text(baseline.get('name'))}, at {percent(record.get('false_alarm_rate'))} false alarms; "
        f"{count(score.get('announced'))} against {count(baseline.get('announced'))} of "
        f"{count(record.get('machines'), 'machine')}"
    )


def _lead(seconds: float) -> str:
    return duration(seconds) if seconds >= 1 else f"{significant(seconds)} s"


def decision_rule(decision: Record) -> str:
    """'failure from a probability of 4.8 % on'; 'least expected cost'; n/a for the likeliest class."""
    threshold = decision.get("threshold")
    if threshold is not None and threshold != 0.5:
        return f"{text(decision.get('positive'))} from a probability of {percent(threshold)} on"
    return "the least expected cost" if decision.get("costs") and threshold is None else NOT_AVAILABLE
