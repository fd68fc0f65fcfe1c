"""The records that a report is made of: read as untrusted files, checked, and put together by artifact.

A result may be a bundle directory, a record that `build`, `eval` or `bench` wrote, or an earlier
report's JSON.  Records of one artifact become one entry; a second measurement of the same artifact,
on another machine or another text, becomes an entry beside it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from edgeslm.bench import pareto
from edgeslm.bench.shapes import (
    BENCH,
    BUILD,
    BUNDLE,
    CHECKPOINT,
    DATA,
    ENTRY,
    PRUNE,
    QUALITY,
    SCHEMA,
    SHAPES,
    TASK_QUALITY,
    TRAINING,
    VARIANTS,
)  # fmt: skip
from edgeslm.bundle import Bundle, open_bundle
from edgeslm.errors import DataError
from edgeslm.gguf_file import read_gguf
from edgeslm.onnx_file import read_onnx

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    Record = Mapping[str, Any]

MAX_RECORD_BYTES = 2**26
LARGEST = 1e300
"""No quantity in a record is bigger; NaN and infinity are not below it either."""
FACTS = ("model", "quantization", "recipe", "versions", "kinds")
"""What is known of the artifact itself, however often it is measured."""
MEASURED = ("quality", "bench", "gate", "stages", "warnings", "data", "training", "prune")


def load_results(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """The records at `paths`, in order.  Raises DataError naming the path and what is there instead."""
    records: list[dict[str, Any]] = []
    for path in paths:
        if path.is_dir() and not (path / "manifest.json").exists() and (path / "report.json").is_file():
            records.append(_read(path / "report.json"))  # a folder of variants
        elif path.is_dir():
            bundle = open_bundle(path)
            records.append(bundle_record(bundle))
            if (path / "report.json").is_file():
                records.append(_read(path / "report.json"))
        else:
            record = _read(path)
            records += [bundle_record(open_bundle(built)) for built in _built(record)]
            records.append(record)
    return records


def _built(record: Record) -> list[Path]:
    """The bundles that a record of a build is about, as far as they are there."""
    builds = {BUILD: [record], VARIANTS: record.get("variants") or ()}.get(record.get("schema") or "", ())
    paths = [Path(build["bundle"]) for build in builds if build and build.get("bundle")]
    return [path for path in paths if (path / "manifest.json").is_file()]


def bundle_record(bundle: Bundle) -> dict[str, Any]:
    """What a bundle's manifest and the header of its weights say, checked."""
    reader = read_gguf if bundle.format == "gguf" else read_onnx
    kinds: dict[str, dict[str, Any]] = {}
    for tensor in reader(bundle.weights).tensors.values():
        kind = kinds.setdefault(
            kind_of(tensor.name), {"tensors": 0, "parameters": 0, "bytes": 0, "types": {}}
        )
        of_type = kind["types"].setdefault(tensor.type, {"tensors": 0, "parameters": 0, "bytes": 0})
        for group in (kind, of_type):
            group["tensors"] += 1
            group["parameters"] += tensor.parameters
            group["bytes"] += tensor.nbytes
    record = {
        "schema": BUNDLE,
        "path": str(bundle.path),
        "digest": bundle.digest,
        "bytes": bundle.size_bytes,
        "manifest": bundle.manifest,
        "kinds": [
            {"kind": kind, **sums} for kind, sums in sorted(kinds.items(), key=lambda item: -item[1]["bytes"])
        ],
    }
    check(record, str(bundle.path))
    return record


def kind_of(tensor: str) -> str:
    """The part of every layer that a tensor belongs to: blk.7.attn_q.weight is attn_q.

    An ONNX exporter calls what it turned or joined onnx::MatMul_123.
    """
    aside = ("blk", "layer", "layers", "weight", "inner", "model", "MatMul")
    name = re.sub(r"^(onnx::\w+?)_\d+$", r"\1", tensor)
    return ".".join(part for part in name.split(".") if part not in aside and not part.isdigit())


def check(record: Any, where: str) -> str:
    """The schema of a record whose values have the types that its schema gives them; DataError otherwise."""
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: holds {_what(record)}, not a record", hint=_HINT)
    schema = record.get("schema")
    if not isinstance(schema, str) or schema not in SHAPES:
        named = f"a record of the unknown schema {schema!r}" if schema else "JSON without an edgeslm schema"
        raise DataError(f"{where}: {named}", hint=_HINT)
    _check(record, SHAPES[schema], where, "")
    return str(schema)


_HINT = "give bundles, or files that `edgeslm build`, `eval`, `bench` or `report` wrote with --json or --out"


def _check(value: Any, shape: Any, where: str, key: str) -> None:
    """Walk a value along its shape; its depth bounds the recursion."""
    if value is None:
        return
    if isinstance(shape, dict):
        fits = isinstance(value, Mapping)
        if fits:
            for name, inner in value.items():
                wanted = shape.get(name, shape.get("*"))
                if wanted is not None:
                    _check(inner, wanted, where, f"{key}.{name}" if key else name)
    elif isinstance(shape, list):
        fits = isinstance(value, list | tuple)
        if fits:
            for number, inner in enumerate(value):
                _check({} if inner is None else inner, shape[0], where, f"{key}[{number}]")
    elif shape is float:
        fits = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST
    else:
        fits = isinstance(value, shape)
    if not fits:
        wanted = (
            "an object" if isinstance(shape, dict) else "a list" if isinstance(shape, list) else _NAMES[shape]
        )
        raise DataError(f"{where}: {key} is {_what(value)}, not {wanted}", hint=_HINT)


_NAMES = {float: "a number", str: "text", bool: "true or false"}


def _what(value: Any) -> str:
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list | tuple):
        return "a list"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _read(path: Path) -> dict[str, Any]:
    """A checked record out of a JSON file."""
    try:
        size_bytes = path.stat().st_size
        with path.open("rb") as file:
            data = file.read(MAX_RECORD_BYTES + 1)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}", hint=_HINT) from error
    if data.startswith(b"GGUF"):
        raise DataError(
            f"{path}: a GGUF file, not a record", hint=f"measure it: edgeslm bench {path} --out FILE"
        )
    if len(data) > MAX_RECORD_BYTES:
        raise DataError(f"{path}: {size_bytes} bytes, too big for a record", hint=_HINT)
    try:
        record = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: binary data, not a record", hint=_HINT) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON: {error}", hint=_HINT) from error
    check(record, str(path))
    return dict(record)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number that JSON has")


def report_document(records: Sequence[Record]) -> dict[str, Any]:
    """Records as {schema, results, comparisons}: one entry per artifact and measurement, in order of appearance."""
    entries: list[dict[str, Any]] = []
    for number, record in enumerate(records):
        for entry in _entries(record, check(record, f"record {number}")):
            _merge(entries, entry)
    names = Counter(entry["artifact"].get("name") or "unnamed" for entry in entries)
    seen: Counter[str] = Counter()
    for entry in entries:
        name = entry["artifact"].get("name") or "unnamed"
        seen[name] += 1
        entry["label"] = name if names[name] == 1 else f"{name} #{seen[name]}"
    return {"schema": SCHEMA, "results": entries, "comparisons": pareto.comparisons(entries)}


def _entries(record: Record, schema: str) -> list[dict[str, Any]]:
    """A record as one entry, or a report's several; every key of an entry is there, null where unknown."""
    if schema == SCHEMA:
        return [
            _entry(**{key: entry.get(key) for key in ENTRY if key != "label"})
            for entry in record["results"] or ()
        ]
    if schema in (QUALITY, TASK_QUALITY):
        return [_entry(artifact=record.get("artifact"), quality=record)]
    if schema == BENCH:
        return [_entry(artifact=record.get("artifact"), bench=record, versions=record.get("versions"))]
    if schema in ALONE:
        key = ALONE[schema]
        return [_entry(artifact={"name": key}, **{key: [record] if schema == TRAINING else record})]
    if schema == CHECKPOINT:
        artifact = {"path": record.get("path"), "parameters": record.get("parameters")}
        artifact["name"] = Path(record.get("path") or "unnamed").name
        return [_entry(artifact=artifact, **{key: record.get(key) for key in ("stages", *ALONE.values())})]
    builds = {BUILD: [record], VARIANTS: record.get("variants") or ()}
    return (
        [_build_entry(build) for build in builds[schema] if build]
        if schema in builds
        else [_bundle_entry(record)]
    )


ALONE = {DATA: "data", TRAINING: "training", PRUNE: "prune"}
"""Records of a stage, which may come without any artifact, to their place in an entry."""


def _build_entry(record: Record) -> dict[str, Any]:
    bench, quality = record.get("bench") or {}, record.get("quality") or {}
    artifact = {**(quality.get("artifact") or {}), **(bench.get("artifact") or {})}
    artifact |= {"path": record.get("bundle") or artifact.get("path")}
    artifact.setdefault("name", Path(artifact["path"]).name if artifact["path"] else None)
    artifact["file_bytes"] = record.get("bytes") or artifact.get("file_bytes")
    artifact["bits_per_weight"] = record.get("bits_per_weight") or artifact.get("bits_per_weight")
    return _entry(
        artifact=artifact, versions=bench.get("versions"), **{key: record.get(key) for key in MEASURED}
    )


def _bundle_entry(record: Record) -> dict[str, Any]:
    manifest = record.get("manifest") or {}
    model, quantization = manifest.get("model") or {}, manifest.get("quantization") or {}
    types = (quantization.get("types") or {}).values()
    artifact = {
        "name": manifest.get("name") or Path(record.get("path") or "unnamed").stem,
        "path": record.get("path"),
        "format": manifest.get("format"),
        "digest": record.get("digest"),
        "file_bytes": record.get("bytes"),
        "weight_bytes": sum((of or {}).get("bytes") or 0 for of in types) or None,
        "parameters": model.get("parameters"),
        "bits_per_weight": quantization.get("bits_per_weight"),
        "architecture": model.get("architecture"),
    }
    hashes = [
        file.get("sha256")
        for file in manifest.get("files") or ()
        if file.get("path") == manifest.get("weights")
    ]
    return _entry(
        artifact=artifact, digests=hashes, kinds=record.get("kinds"),
        **{key: manifest.get(key) for key in ("model", "quantization", "recipe", "versions", "quality")},
    )  # fmt: skip


def _entry(**known: Any) -> dict[str, Any]:
    artifact = dict(known.get("artifact") or {})
    measured = [known.get(section) or {} for section in ("quality", "bench")]
    about = [artifact, *((record.get("artifact") or {}) for record in measured)]
    digests = {*(known.get("digests") or ()), *(each.get("digest") for each in about)}
    return {
        "label": None,
        "artifact": artifact,
        "digests": sorted(digest for digest in digests if digest),
        **{key: known.get(key) or None for key in (*FACTS, *MEASURED)},
    }


def _merge(entries: list[dict[str, Any]], new: dict[str, Any]) -> None:
    """Add an entry, or fill the gaps of one that is about the same artifact and agrees in what both have."""
    same = [entry for entry in entries if _same_artifact(entry, new)]
    for entry in same:
        _fill(entry, new, FACTS)
        _fill(new, entry, FACTS)
    for entry in same:
        if all(_agree(entry[key], new[key]) for key in MEASURED):
            _fill(entry, new, MEASURED)
            return
    entries.append(new)


def _agree(one: Any, other: Any) -> bool:
    """Whether two sections are one measurement; what each says of the artifact's name and place may differ."""
    if one is None or other is None or one == other:
        return True
    aside = ("artifact", "reference", "schema")
    return (
        isinstance(one, Mapping)
        and isinstance(other, Mapping)
        and all(one.get(key) == other.get(key) for key in {*one, *other}.difference(aside))
    )


def _fill(entry: dict[str, Any], source: dict[str, Any], keys: Iterable[str]) -> None:
    for key in keys:
        if entry[key] is None:
            entry[key] = source[key]
    entry["artifact"] |= {
        key: value for key, value in source["artifact"].items() if entry["artifact"].get(key) is None
    }
    entry["digests"] = sorted({*entry["digests"], *source["digests"]})


def _same_artifact(one: Record, other: Record) -> bool:
    """By digest where both have one, else by path."""
    if one["digests"] and other["digests"]:
        return not set(one["digests"]).isdisjoint(other["digests"])
    path = one["artifact"].get("path")
    return path is not None and path == other["artifact"].get("path")
