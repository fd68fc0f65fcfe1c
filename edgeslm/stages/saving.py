"""A trained or cut model as an ordinary Hugging Face directory, with a note of where it came from.

    OUT/config.json, generation_config.json, model.safetensors, tokenizer files, LICENSE*, NOTICE*
    OUT/edgeslm.json    the stage that made it, its settings, and its parent's own note

What it was made of decides the tokenizer files: a directory's are copied as they are, a GGUF file's are
built of its vocabulary, so that the text is split as before and llama.cpp can be told how.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from typing import TYPE_CHECKING, Any

from edgeslm.atomic import atomic_write, writing
from edgeslm.errors import ModelError
from edgeslm.gguf_file import read_gguf
from edgeslm.stages.checkpoint import (
    TOKENIZER_FILES,
    Checkpoint,
    matching,
    model_directory,
    read_json,
    silent_transformers,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

ANCESTRY_FILE = "edgeslm.json"
ANCESTRY_SCHEMA = "edgeslm.ancestry/1"
LLAMA3_ORIGINAL_CONTEXTS = (8192, 4096, 2048, 16384, 32768)


def save_model(
    model: Any,
    tokenizer: Any | None,
    out: Path,
    *,
    parent: Checkpoint,
    stage: str,
    spec: Any,
    licence_files: Sequence[Path] | None = None,
    notes: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Write `model` into the directory `out` so that from_pretrained and the exporters take it.

    tokenizer: None for the parent's own; give one where it was changed.  spec: the stage's frozen
    dataclass, or a mapping.  licence_files: None for the parent's.  notes: further keys of edgeslm.json.
    Raises ModelError for rotary scaling that config.json can't express, EdgeslmError for a full disk.
    """
    if parent.kind == "gguf":
        built = tokenizer if tokenizer is not None else parent.tokenizer()
        _take_over_settings(model, built, parent)
    _settle_generation(model)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        with silent_transformers():
            model.save_pretrained(out, safe_serialization=True)
        save_tokenizer(tokenizer, out, parent=parent)
        for file in parent.licence_files() if licence_files is None else licence_files:
            shutil.copyfile(file, out / file.name)
        write_ancestry(out, parent=parent, stage=stage, spec=spec, notes=notes)
    return model_directory(out, parent.source)


def saved(out: Path, parent: Checkpoint, *, here: bool) -> Checkpoint:
    """What was written to `out`; here: by this process, so that it can be read and is checked."""
    if here:
        return model_directory(out, parent.source)
    return Checkpoint(path=out, kind="hf", name=out.name, source=parent.source)


def save_tokenizer(tokenizer: Any | None, out: Path, *, parent: Checkpoint) -> None:
    """Tokenizer files: the parent's as they are, or those of `tokenizer` where one is given."""
    if tokenizer is None and parent.kind == "hf":
        for file in sorted(matching(parent.path, TOKENIZER_FILES)):
            shutil.copyfile(file, out / file.name)
        return
    tokenizer = parent.tokenizer() if tokenizer is None else tokenizer
    with silent_transformers():
        tokenizer.save_pretrained(out)
    if parent.kind == "gguf":
        _say_what_is_added(tokenizer, out / "tokenizer_config.json")


def _say_what_is_added(tokenizer: Any, path: Path) -> None:
    """Whether BOS and EOS are put around a text: llama.cpp has a default of its own where nothing says so."""
    ids = tokenizer.encode("a")
    settings = read_json(path)
    settings["add_bos_token"] = tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
    settings["add_eos_token"] = tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id
    atomic_write(path, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def write_ancestry(
    out: Path, *, parent: Checkpoint, stage: str, spec: Any, notes: Mapping[str, Any] | None = None
) -> None:
    """Write edgeslm.json; the parent's note is kept inside, so that the whole line can be read."""
    before = parent.path / ANCESTRY_FILE if parent.kind == "hf" else None
    licence = read_gguf(parent.path).get("general.license") if parent.kind == "gguf" else None
    record = {
        "schema": ANCESTRY_SCHEMA,
        "stage": stage,
        "parent": {"name": parent.name, "digest": parent.digest, "licence": licence},
        "spec": dataclasses.asdict(spec) if dataclasses.is_dataclass(spec) else dict(spec),  # type: ignore[arg-type]
        "before": read_json(before) if before is not None and before.is_file() else None,
        **(notes or {}),
    }
    atomic_write(out / ANCESTRY_FILE, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def ancestry(directory: Path) -> dict[str, Any]:
    """The note of a directory; empty for one that no stage here wrote."""
    path = directory / ANCESTRY_FILE
    return read_json(path) if path.is_file() else {}


def _settle_generation(model: Any) -> None:
    """transformers reads settings that it then refuses to write: sampling values without do_sample."""
    generation = getattr(model, "generation_config", None)
    if generation is None:
        return
    try:
        generation.validate(strict=True)
    except ValueError:
        generation.do_sample = True


def _take_over_settings(model: Any, tokenizer: Any, parent: Checkpoint) -> None:
    """What a GGUF file keeps outside of its shapes: the special tokens and the rotary scaling."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        number = getattr(tokenizer, name)
        for config in (model.config, getattr(model, "generation_config", None)):
            if config is not None:
                setattr(config, name, number)
    _say_rotary_scaling(model, parent)


def _say_rotary_scaling(model: Any, parent: Checkpoint) -> None:
    """Put into the configuration what a GGUF file says by a tensor of factors (Llama 3's scaling).

    The factors are 1 for short waves and the full factor for long ones; the context that the waves are
    compared with is not in the file, so the known ones are tried.
    """
    import torch

    rotary = getattr(getattr(model, "base_model", model), "rotary_emb", None)
    if rotary is None:
        return

    def as_configured() -> Any:
        return type(rotary)(model.config).inv_freq

    def says_the_same() -> bool:
        return torch.allclose(as_configured(), rotary.inv_freq.cpu(), rtol=1e-4, atol=0)

    if says_the_same():
        return
    factor = round(float((as_configured() / rotary.inv_freq.cpu()).max()), 3)
    for original in LLAMA3_ORIGINAL_CONTEXTS:
        model.config.rope_scaling = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": original,
        }
        if says_the_same():
            return
    raise ModelError(
        f"{parent.name}: its rotary factors are none that config.json can express",
        hint="start from the Hugging Face directory that the GGUF file was made of",
    )
