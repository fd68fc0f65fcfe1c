"""A PEFT adapter merged into its base, so that every later stage sees an ordinary checkpoint."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

from edgeslm.bundle import file_sha256
from edgeslm.errors import ModelError, first_line
from edgeslm.safetensors_file import read_safetensors
from edgeslm.stages.checkpoint import (
    TOKENIZER_FILES,
    Checkpoint,
    matching,
    model_directory,
    read_json,
    resolve,
    silent_transformers,
)

if TYPE_CHECKING:
    from pathlib import Path

    from edgeslm.progress import Progress


def merge_adapter(path: Path, source: str, work: Path | None, progress: Progress) -> Checkpoint:
    """The base model with the PEFT adapter's weights added, as float32 safetensors in `work`."""
    base = _adapter_base(path, work, progress)
    if work is None:
        raise ModelError(f"{source}: merging an adapter needs a working directory")
    key = hashlib.sha256(base.digest.encode())
    for file in sorted(
        matching(path, ("adapter_config.json", "adapter_model.safetensors", *TOKENIZER_FILES))
    ):
        key.update(f"{file.name}\0{file_sha256(file)}\n".encode())
    out = work / f"merged-{key.hexdigest()[:16]}"
    if not out.exists():
        progress.note(f"merging the adapter {path.name} into {base.name}")
        beside = out.with_name(out.name + ".part")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        _write_merged(path, base, beside)
        beside.rename(out)
    return replace(model_directory(out, source), name=path.resolve().name, warnings=base.warnings)


def _adapter_base(path: Path, work: Path | None, progress: Progress) -> Checkpoint:
    """The checkpoint that the adapter's configuration names, searched beside the adapter first."""
    name = read_json(path / "adapter_config.json").get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ModelError(f"{path / 'adapter_config.json'}: base_model_name_or_path is missing")
    weights = path / "adapter_model.safetensors"
    if not weights.exists():
        raise ModelError(
            f"{path}: no adapter_model.safetensors",
            hint="save the adapter again with peft's save_pretrained(DIR, safe_serialization=True)",
        )
    read_safetensors(weights)
    if (path / name).resolve() == path.resolve():
        raise ModelError(f"{path}: the adapter names itself as its base")
    beside = path if (path / name).exists() else None
    base = resolve(name, base=beside, work=work, progress=progress)
    if base.kind != "hf":
        raise ModelError(
            f"{path}: the adapter's base {name} is a GGUF file", hint="merge it into a Hugging Face directory"
        )
    return base


def _write_merged(path: Path, base: Checkpoint, out: Path) -> None:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ModelError(
            f"{path}: merging an adapter needs peft", hint="pip install 'edgeslm[workstation]'"
        ) from error
    model = base.load()
    try:
        with silent_transformers():
            merged = PeftModel.from_pretrained(model, str(path), torch_device="cpu").merge_and_unload(
                safe_merge=True
            )
            merged.save_pretrained(out, safe_serialization=True)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: peft can't merge it into {base.name}: {first_line(error)}") from error
    for directory in (base.path, path):
        for file in matching(directory, (*TOKENIZER_FILES, "LICENSE*", "NOTICE*")):
            shutil.copyfile(file, out / file.name)
