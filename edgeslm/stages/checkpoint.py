"""Where a model comes from: a Hugging Face directory or hub id, a GGUF file, a PEFT adapter, a package.

Every file is checked by edgeslm's own readers before a native loader sees it, and weights in
pickle files are refused, since loading one runs the code in it.  torch loads only in `load`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from edgeslm.bundle import file_sha256, open_bundle
from edgeslm.device import probe
from edgeslm.errors import ModelError, first_line
from edgeslm.gguf_file import GgufFile, read_gguf
from edgeslm.progress import Progress, Quiet
from edgeslm.safetensors_file import read_checkpoint
from edgeslm.stages.libraries import need_transformers

if TYPE_CHECKING:
    from collections.abc import Iterator

MODEL_FILES = (
    "*.json",
    "*.safetensors",
    "*.model",
    "*.jinja",
    "*.txt",
    "tokenizer*",
    "LICENSE*",
    "NOTICE*",
)
"""Files of a model directory that edgeslm reads: what is fetched from a hub."""

TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*.model",
    "chat_template.*",
)
CONTENT_FILES = ("config.json", "generation_config.json", "*.safetensors*", *TOKENIZER_FILES)
"""Files whose bytes decide what an export holds: what `Checkpoint.digest` covers."""

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
PICKLE_HINT = (
    "load it once where you trust it and save it with transformers' model.save_pretrained(DIR, "
    "safe_serialization=True)"
)
UNQUANTIZED = {"F64", "F32", "F16", "BF16"}
HUB_ID = re.compile(r"[\w][\w.-]*/[\w.-]+(?:@[\w./-]+)?")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model that passed the structural checks.

    path: a Hugging Face directory ("hf") or a .gguf file ("gguf").  source: as the user wrote it.
    warnings: what the user should know about the source, such as the loss that it already has.
    """

    path: Path
    kind: Literal["hf", "gguf"]
    name: str
    source: str
    warnings: tuple[str, ...] = ()

    @cached_property
    def digest(self) -> str:
        """sha256 over names and bytes of the files that decide what an export holds."""
        if self.kind == "gguf":
            return file_sha256(self.path)
        total = hashlib.sha256()
        for path in sorted(matching(self.path, CONTENT_FILES)):
            total.update(f"{path.name}\0{file_sha256(path)}\n".encode())
        return total.hexdigest()

    @cached_property
    def parameters(self) -> int:
        """Elements of all tensors that the files hold."""
        if self.kind == "gguf":
            return sum(tensor.parameters for tensor in read_gguf(self.path).tensors.values())
        return sum(tensor.parameters for tensor in read_checkpoint(self.path).values())

    def config(self) -> dict[str, Any]:
        """config.json of a Hugging Face directory; a GGUF file has none (read its fields)."""
        if self.kind == "gguf":
            raise ModelError(f"{self.path.name}: a GGUF file has no config.json")
        return read_json(self.path / "config.json")

    def ancestry(self) -> dict[str, Any] | None:
        """How edgeslm made it, stage by stage; None for a model that it did not make."""
        note = self.path / "edgeslm.json"
        return read_json(note) if self.kind == "hf" and note.is_file() else None

    def licence_files(self) -> list[Path]:
        """The model's own licence and notice, to be passed on with it."""
        return sorted(matching(self.path, ("LICENSE*", "NOTICE*"))) if self.kind == "hf" else []

    def load(self, *, memory_bytes: int | None = None) -> Any:
        """The model in torch: float32, in evaluation mode, on the CPU.

        memory_bytes: what may be used; None: what this machine has free.  Raises ModelError before
        loading when the weights do not fit, and when transformers does not know the architecture.
        """
        self._check_memory(memory_bytes or probe()["memory_available_bytes"])
        need_transformers(self.name)
        if self.kind == "gguf":
            from edgeslm.stages.gguf_model import load_gguf_model

            model = load_gguf_model(read_gguf(self.path))
        else:
            model = _load_directory(self.path, self.name)
        if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
            model.set_attn_implementation("eager")  # the fused kernels leave the soft cap out
        return model.float().eval()

    def tokenizer(self) -> Any:
        """A tokenizer of transformers for this model; for a GGUF file, built of the file's own vocabulary."""
        need_transformers(self.name)
        if self.kind == "gguf":
            from edgeslm.stages.gguf_tokenizer import build_tokenizer

            return build_tokenizer(read_gguf(self.path))
        from transformers import AutoTokenizer

        try:
            with silent_transformers():
                return AutoTokenizer.from_pretrained(
                    self.path, local_files_only=True, trust_remote_code=False
                )
        except Exception as error:  # tokenizers raises bare Exception
            raise ModelError(
                f"{self.name}: no usable tokenizer: {first_line(error)}",
                hint="put tokenizer.json (or tokenizer.model) and tokenizer_config.json beside config.json",
            ) from error

    def _check_memory(self, memory_bytes: int | None) -> None:
        needed = self.parameters * 4
        if memory_bytes is not None and needed > memory_bytes:
            raise ModelError(
                f"{self.name}: {self.parameters / 1e6:,.0f} M parameters in float32 need "
                f"{needed / 2**30:.1f} GiB, {memory_bytes / 2**30:.1f} GiB are free",
                hint="quantize without calibration, which streams tensor by tensor, or give an importance "
                "matrix made elsewhere",
            )


def _load_directory(path: Path, name: str) -> Any:
    """A Hugging Face directory as transformers loads it, with no weight made up."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with silent_transformers():
            model, info = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise ModelError(
            f"{name}: transformers can't load it: {first_line(error)}",
            hint="check config.json against the weights",
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"{name}: {len(missing)} weights are missing, first {missing[0]}",
            hint="config.json asks for more than the files hold: get the model again",
        )
    return model


def resolve(
    source: str, *, base: Path | None = None, work: Path | None = None, progress: Progress | None = None
) -> Checkpoint:
    """The checkpoint that `source` names.

    source: a Hugging Face directory, hub id[@revision], .gguf file, bundle, PEFT adapter directory
    or pkg://package/path.  base: what relative paths start from.  work: where an adapter is merged.
    Raises ModelError for what is missing, damaged or held in pickle files.
    """
    base, progress = base or Path(), progress or Quiet()
    if source.startswith("pkg://"):
        checkpoint = _local(package_path(source), source, work, progress)
    elif (path := base / Path(source).expanduser()).exists():
        checkpoint = _local(path, source, work, progress)
    elif HUB_ID.fullmatch(source) and not source.endswith((".gguf", *PICKLES)):
        checkpoint = _from_hub(source, work, progress)
    else:
        raise ModelError(
            f"no model at {path}",
            hint="give a Hugging Face directory, a hub id (organization/name), a .gguf file or pkg://package/path",
        )
    for warning in checkpoint.warnings:
        progress.note(f"warning: {warning}")
    return checkpoint


def package_path(source: str) -> Path:
    """The file or directory that pkg://package/path names, found without importing the package."""
    package, _, inside = source.removeprefix("pkg://").partition("/")
    parts = PurePosixPath(inside).parts
    if not package.isidentifier() or ".." in parts or PurePosixPath(inside).is_absolute():
        raise ModelError(f"{source!r} is not pkg://package/path/inside")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"{source}: the package {package} is not installed",
            hint=f"pip install {package.replace('_', '-')}",
        )
    for location in spec.submodule_search_locations:
        if (path := Path(location, *parts)).exists():
            return path
    raise ModelError(f"{source}: the package {package} holds no {inside}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model directory."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path.parent.name}: {path.name} is missing") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ModelError(f"{path}: not JSON: {first_line(error)}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: holds {type(value).__name__}, not an object")
    return value


def _local(path: Path, source: str, work: Path | None, progress: Progress) -> Checkpoint:
    """A file or directory that exists."""
    if path.is_dir():
        if (path / "adapter_config.json").exists():
            from edgeslm.stages.adapter import merge_adapter

            return merge_adapter(path, source, work, progress)
        if (path / "manifest.json").exists() and not (path / "config.json").exists():
            return _gguf(open_bundle(path).weights, source)
        return model_directory(path, source)
    if path.suffix in PICKLES:
        raise ModelError(f"{path.name}: pickle weights run code when they are loaded", hint=PICKLE_HINT)
    if path.suffix == ".safetensors":
        raise ModelError(
            f"{path.name}: weights alone are not a model", hint=f"give the directory, {path.resolve().parent}"
        )
    return _gguf(path, source)


def model_directory(path: Path, source: str) -> Checkpoint:
    """The checkpoint in a directory with config.json and safetensors, both checked."""
    if not (path / "config.json").exists():
        found = sorted(file.name for file in path.glob("*.gguf"))
        raise ModelError(
            f"{path}: no config.json, so this is no model directory",
            hint=f"name the file: {path / found[0]}"
            if found
            else "give the directory that save_pretrained wrote",
        )
    read_json(path / "config.json")
    read_checkpoint(path)
    return Checkpoint(path=path, kind="hf", name=path.resolve().name, source=source)


def _gguf(path: Path, source: str) -> Checkpoint:
    file = read_gguf(path)
    kind = file.get("general.type", "model")
    if kind != "model":
        raise ModelError(f"{path.name}: a GGUF file of the type {kind!r}, not a model")
    if not file.tensors:
        raise ModelError(f"{path.name}: holds no tensors", hint="a vocabulary-only file can't be quantized")
    loss = _loss(file)
    return Checkpoint(
        path=path,
        kind="gguf",
        name=path.stem,
        source=source,
        warnings=(f"{path.name}: {loss}",) if loss else (),
    )


def _loss(file: GgufFile) -> str:
    """What an already quantized file has lost, or ""."""
    sizes: dict[str, int] = {}
    for tensor in file.tensors.values():
        sizes[tensor.type] = sizes.get(tensor.type, 0) + tensor.parameters
    if set(sizes) <= UNQUANTIZED:
        return ""
    main = max((name for name in sizes if name not in UNQUANTIZED), key=lambda name: sizes[name])
    bits = 8 * sum(tensor.nbytes for tensor in file.tensors.values()) / sum(sizes.values())
    return (
        f"its weights are already quantized to {main} ({bits:.2f} bits per weight): every figure is "
        "relative to these weights"
    )


def _from_hub(source: str, work: Path | None, progress: Progress) -> Checkpoint:
    """Fetch organization/name[@revision] into the hub's cache, or take it from there."""
    repository, _, revision = source.partition("@")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    except ImportError as error:
        raise ModelError(
            f"{source}: no such directory, and fetching from a hub needs huggingface_hub",
            hint="pip install 'edgeslm[workstation]'",
        ) from error
    try:
        path = snapshot_download(
            repository,
            revision=revision or None,
            allow_patterns=list(MODEL_FILES),
            ignore_patterns=["*/*", "consolidated*"],
        )
    except GatedRepoError as error:
        hint = f"accept its terms at https://huggingface.co/{repository}, then run: hf auth login"
        raise ModelError(f"{source}: the hub gives access on request only", hint=hint) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{source}: the hub has no revision {revision!r}") from error
    except LocalEntryNotFoundError as error:
        hint = "go online once, or copy the model here and give its directory"
        raise ModelError(
            f"{source}: no such directory, not in the cache, and no hub in reach", hint=hint
        ) from error
    except RepositoryNotFoundError as error:
        hint = "check the spelling; for a private model run: hf auth login"
        raise ModelError(f"{source}: no such directory, and the hub has no such model", hint=hint) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ModelError(f"{source}: fetching it failed: {first_line(error)}") from error
    found = Path(path)
    if not any(found.glob("*.safetensors")):
        raise ModelError(f"{source}: the repository holds no safetensors weights", hint=PICKLE_HINT)
    return replace(_local(found, source, work, progress), name=repository.rpartition("/")[2])


def tokenizer_digest(checkpoint: Checkpoint) -> str:
    """sha256 of what decides how a text is split: the tokenizer's files, or the whole of a GGUF file."""
    if checkpoint.kind == "gguf":
        return checkpoint.digest
    total = hashlib.sha256()
    for path in sorted(matching(checkpoint.path, TOKENIZER_FILES)):
        total.update(f"{path.name}\0{file_sha256(path)}\n".encode())
    return total.hexdigest()


def matching(directory: Path, patterns: tuple[str, ...]) -> set[Path]:
    """The files directly in `directory` whose names match one of the patterns."""
    return {path for pattern in patterns for path in directory.glob(pattern) if path.is_file()}


@contextmanager
def silent_transformers() -> Iterator[None]:
    """No progress bars and no advice from transformers while it loads; errors still raise."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
