"""Where the numbers come from, as blocks: the machine, what was built from what, how to do it again."""

from __future__ import annotations

import shlex
import tomllib
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from edgeslm import wording, wording_learning
from edgeslm.bench.blocks import Block, Code, Notes, at, bench_runs, matrix, said_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgeslm.bench.blocks import Entry, Rows


def machine(entries: Sequence[Entry]) -> list[Block]:
    """The facts of each machine that ran a benchmark, before and after, and the engine's settings."""
    timed = [entry for entry in entries if entry.get("bench")]
    return matrix("Where it was measured", MACHINE_ROWS, timed)


def _before_and_after(entry: Entry, key: str, show: Any) -> str:
    before, after = at(entry, "bench", "machine", key), at(entry, "bench", "machine_after", key)
    if before is None and after is None:
        return wording.NOT_AVAILABLE
    return f"{show(before)} before, {show(after)} after"


def _machine_fact(key: str) -> Any:
    return lambda entry: wording.text(at(entry, "bench", "machine", key))


def _settings(entry: Entry) -> str:
    if not bench_runs(entry):
        return wording.NOT_AVAILABLE
    run = bench_runs(entry)[0]
    if run.get("kind") == "predict":
        calls = f"{wording.count(run.get('calls'), 'call')} in each of " if run.get("calls") else ""
        return f"float32, {calls}{wording.count(run.get('repetitions'), 'repetition')}"
    attention = "auto" if run.get("flash_attention") is None else "on" if run["flash_attention"] else "off"
    return (
        f"batch {wording.count(run.get('batch'))}/{wording.count(run.get('ubatch'))}, "
        f"KV cache {run.get('kv_type') or wording.NOT_AVAILABLE}, flash attention {attention}, "
        f"weights {'read' if run.get('mmap') is False else 'mapped'}, {_gpu(run)}"
        f"{wording.count(run.get('repetitions'), 'repetition')}"
    )


def _gpu(run: Mapping[str, Any]) -> str:
    """How many layers a GPU computed; nothing to say where none did."""
    return f"{wording.count(run['gpu_layers'], 'layer')} on the GPU, " if run.get("gpu_layers") else ""


MACHINE_ROWS: Rows = (
    ("processor", _machine_fact("cpu_model")),
    ("cores", lambda e: wording.cores(at(e, "bench", "machine") or {})),
    ("instruction sets", lambda e: " ".join(at(e, "bench", "machine", "instruction_sets") or ())),
    ("memory", lambda e: wording.size(at(e, "bench", "machine", "memory_bytes"))),
    ("memory bandwidth, measured", lambda e: wording.bandwidth(at(e, "bench", "memory_bandwidth_bytes_per_s"))),
    ("clock", lambda e: _before_and_after(e, "frequency_hz", wording.frequency)),
    ("temperature", lambda e: _before_and_after(e, "temperature_c", wording.celsius)),
    ("load average", lambda e: _before_and_after(e, "load_average_1m", wording.significant)),
    ("governor", _machine_fact("governor")),
    ("system", lambda e: " ".join(str(at(e, "bench", "machine", key) or "") for key in ("os", "kernel")).strip()),
    ("emulated", lambda e: "yes" if at(e, "bench", "machine", "emulated") else ""),
    ("engine settings", _settings),
    ("measured at", lambda e: wording.text(at(e, "bench", "created_at"))),
)  # fmt: skip


def origin(entries: Sequence[Entry]) -> list[Block]:
    """Source, scheme, calibration, versions, and the recipes' texts."""
    blocks = matrix("Sources and versions", ORIGIN_ROWS, entries)
    for entry in entries:
        if entry.get("warnings"):
            blocks.append(Notes(title=said_of(entry, entries, "warnings"), lines=entry["warnings"], bad=True))
    recipes: dict[str, str] = {}
    for entry in entries:
        text = at(entry, "recipe", "text")
        if text:
            recipes.setdefault(text, said_of(entry, entries, "recipe"))
    if len(recipes) == 1:
        recipes = dict.fromkeys(recipes, "Recipe")
    return [*blocks, *(Code(title=title, text=text, language="toml") for text, title in recipes.items())]


def recipe_values(entry: Entry) -> dict[str, Any]:
    """The recipe as it was written; {} where there is none or it can't be read."""
    try:
        return tomllib.loads(at(entry, "recipe", "text") or "")
    except tomllib.TOMLDecodeError:
        return {}


def _calibration(entry: Entry) -> str:
    matrix_digest = at(entry, "quantization", "importance")
    values = recipe_values(entry)
    data, calibrate = values.get("data"), values.get("calibrate")
    sources = data.get("calibration") if isinstance(data, dict) else None
    parts = [sources] if isinstance(sources, str) else list(map(str, sources or ()))
    if isinstance(calibrate, dict) and isinstance(calibrate.get("tokens"), int):
        parts.append(wording.count(calibrate["tokens"], "token"))
    if matrix_digest:
        parts.append(f"importance matrix {matrix_digest[:16]}")
    elif at(entry, "quantization") and at(entry, "quantization", "scheme") != "F32":
        return "none: quantized without an importance matrix"
    return ", ".join(parts) or wording.NOT_AVAILABLE


def _fact(*keys: str) -> Any:
    return lambda entry: wording.text(at(entry, *keys))


ORIGIN_ROWS: Rows = (
    ("source", _fact("model", "source")),
    ("source sha256", _fact("model", "source_sha256")),
    ("licence", _fact("model", "licence")),
    ("architecture", lambda e: wording.text(at(e, "model", "architecture") or at(e, "artifact", "architecture")
                                  )),
    ("parameters", lambda e: wording.count(at(e, "artifact", "parameters"))),
    ("context length", lambda e: wording.count(at(e, "model", "context_length"), "token")),
    ("classes", lambda e: ", ".join(at(e, "model", "labels") or ())),
    ("reads", lambda e: wording_learning.reads(at(e, "model", "preprocessing") or {})),
    ("tokenizer", _fact("model", "tokenizer")),
    ("scheme", _fact("quantization", "scheme")),
    ("calibration", _calibration),
    ("stages", lambda e: wording.stages(e.get("stages") or ())),
    ("artifact", _fact("artifact", "path")),
    ("digest", _fact("artifact", "digest")),
    ("versions", lambda e: ", ".join(f"{name} {version}" for name, version in sorted((e.get("versions") or {}).items())
                                     if version)),
)  # fmt: skip


def reproduce(entries: Sequence[Entry]) -> list[Block]:
    """The commands that make and measure each result."""
    return [
        Code(title=said_of(entry, entries, "commands"), text=text, language="sh")
        for entry in entries
        if (text := commands(entry))
    ]


def commands(entry: Entry) -> str:
    """Shell commands, one a line: build or quantize, check, evaluate, benchmark."""
    path = at(entry, "artifact", "path")
    if not path:
        return ""
    lines = [*_make(entry, path)]
    if at(entry, "artifact", "digest"):
        lines += [f"# digest {entry['artifact']['digest']}", _shell("edgeslm", "inspect", path, "--verify")]
    # A build measures what its recipe holds out; the text that is named may hold more than that.
    evaluate = [] if recipe_values(entry) else _evaluate(entry, path)
    return "\n".join([*lines, *evaluate, *_bench(entry, path)]) + "\n"


def _make(entry: Entry, path: str) -> list[str]:
    recipe, source = recipe_values(entry), at(entry, "model", "source")
    if recipe:
        name = f"{recipe.get('name') or 'recipe'}.toml"
        out = str(PurePath(path).parent) if recipe.get("variants") else path
        return [
            f"# the recipe above, saved as {_one_line(name)}",
            _shell("edgeslm", "build", name, "--out", out),
        ]
    if not source:
        return []
    scheme = at(entry, "quantization", "scheme")
    words = ["edgeslm", "quantize", source, *(("--scheme", scheme) if scheme else ())]
    importance = at(entry, "quantization", "importance")
    if not importance:
        return [_shell(*words, "--out", path)]
    return [f"# TEXT: the calibration text, or importance matrix {_one_line(importance)}",
            _shell(*words, "--calibration", "TEXT", "--out", path)]  # fmt: skip


def _evaluate(entry: Entry, path: str) -> list[str]:
    quality = entry.get("quality")
    sources = at(quality, "text", "sources")
    if not sources:
        return []
    words = ["edgeslm", "eval", path]
    reference = at(quality, "reference", "name")
    digest = at(quality, "reference", "digest")
    if digest is not None and digest == at(entry, "model", "source_sha256"):
        reference = at(entry, "model", "source")
    if reference:
        words += ["--reference", reference]
    for source in sources:
        words += ["--text", source]
    if at(quality, "classes"):
        return [_shell(*words, *_rates(at(quality, "decision") or {}))]
    context, windows, tokens = (
        at(quality, *keys) for keys in (("protocol", "context"), ("protocol", "windows"), ("text", "tokens"))
    )
    if context:
        words += ["--context", f"{context:.0f}"]
        if windows and tokens and tokens >= context * (windows + 1):  # the text went on
            words += ["--max-tokens", f"{context * windows:.0f}"]
    return [_shell(*words)]


def _rates(decision: Mapping[str, Any]) -> list[str]:
    """The options that give a classifier its base rates and costs."""
    labels, prior, costs = (decision.get(key) or () for key in ("labels", "prior", "costs"))
    given = () if list(prior) == list(decision.get("training_prior") or ()) else prior
    return [
        word
        for option, values in (("--prior", given), ("--cost", costs))
        for label, value in zip(labels, values, strict=False)
        if value is not None
        for word in (option, f"{label}={value:g}")
    ]


def _bench(entry: Entry, path: str) -> list[str]:
    if not bench_runs(entry):
        return []
    words = ["edgeslm", "bench", path]
    first = bench_runs(entry)[0]
    if first.get("kind") == "predict":
        for option, key in (("-p", "tokens"), ("--batch-sizes", "batch"), ("-t", "threads")):
            given = dict.fromkeys(run[key] for run in bench_runs(entry) if run.get(key))
            words += [option, ",".join(f"{number:.0f}" for number in given)] if given else []
        return [_shell(*words, *(("-r", f"{first['repetitions']:.0f}") if first.get("repetitions") else ()))]
    for option, key, kind in (
        ("-p", "tokens", "prefill"),
        ("-n", "tokens", "decode"),
        ("-t", "threads", None),
    ):
        asked = [run[key] for run in bench_runs(entry) if run.get(key) and kind in (None, run.get("kind"))]
        if asked:
            words += [option, ",".join(f"{number:.0f}" for number in dict.fromkeys(asked))]
    for option, key in (("-r", "repetitions"), ("-b", "batch"), ("-ub", "ubatch")):
        if first.get(key):
            words += [option, f"{first[key]:.0f}"]
    if first.get("kv_type"):
        words += ["--kv-type", first["kv_type"]]
    if first.get("flash_attention") is not None:
        words += ["-fa", "on" if first["flash_attention"] else "off"]
    # on a Mac all layers are on the GPU unasked, so that none of them is an option too
    on_mac = str(at(entry, "bench", "machine", "os")).startswith("macOS")
    if first.get("gpu_layers") or (on_mac and first.get("gpu_layers") == 0):
        words += ["-ngl", f"{first['gpu_layers']:.0f}"]
    return [_shell(*words, *(["--no-mmap"] if first.get("mmap") is False else []))]


def _shell(*words: str) -> str:
    return " ".join(shlex.quote(_one_line(word)) for word in words)


def _one_line(text: str) -> str:
    """A command stays one command, whatever an untrusted record holds."""
    return "".join(character if character.isprintable() else "?" for character in text)
