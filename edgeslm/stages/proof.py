"""Proof that a shape survives the trip: a tiny random model of the same structure, exported and run in llama.cpp.

It has the pruned model's layers, heads, lists and tokenizer, with narrower heads and channels.  What a
converter or llama.cpp would refuse or compute differently shows here in seconds, not after training.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeslm.atomic import writing
from edgeslm.errors import ModelError, first_line
from edgeslm.gguf_file import read_gguf
from edgeslm.progress import Progress, Quiet
from edgeslm.specs import QuantizeSpec
from edgeslm.stages import export_gguf
from edgeslm.stages.architectures import architecture_of
from edgeslm.stages.checkpoint import model_directory, silent_transformers
from edgeslm.stages.rope import Config, head_dim
from edgeslm.stages.saving import save_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from edgeslm.stages.checkpoint import Checkpoint

SMALLEST_HEAD = 8
TOKENS = 48
TOLERANCE = 0.02
"""Largest difference of logits, of the largest logit; a structure that is read differently gives about 1."""
WINDOW = 16
"""Sliding window of a Gemma in small: shorter than the tokens that are tried."""

_RUN = """
import sys
import numpy as np
from llama_cpp import Llama
tokens = np.load(sys.argv[2])
llama = Llama(sys.argv[1], n_ctx=len(tokens), n_batch=len(tokens), logits_all=True, verbose=False, n_gpu_layers=0)
llama.eval(tokens.tolist())
np.save(sys.argv[3], llama.scores[: len(tokens)])
"""


def prove_export(
    config: Config,
    checkpoint: Checkpoint,
    tokenizer: Any | None = None,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> None:
    """Raise ModelError unless llama.cpp computes for this configuration what torch does.

    config: of the pruned model, with `architectures`.  tokenizer: None for the checkpoint's own.
    Without llama-cpp-python only the conversion is proven, which is noted.
    """
    progress = progress or Quiet()
    with (
        progress.task("proving the conversion on a tiny copy", 2, "steps") as advance,
        _tiny_file(config, checkpoint, tokenizer, seed) as (model, file),
    ):
        advance(1)
        if find_spec("llama_cpp") is None:
            progress.note("llama-cpp-python is not installed: the tiny copy was converted, but not run")
            return
        _compare(model, file, seed)
        advance(1)


def metadata_bytes(config: Config, checkpoint: Checkpoint, tokenizer: Any | None = None) -> int:
    """Bytes in front of the tensors of a GGUF file of this configuration: tokenizer, names, settings."""
    with _tiny_file(config, checkpoint, tokenizer, 0) as (_model, file):
        return min(info.offset for info in read_gguf(file).tensors.values())


@contextmanager
def _tiny_file(
    config: Config, checkpoint: Checkpoint, tokenizer: Any | None, seed: int
) -> Iterator[tuple[Any, Path]]:
    """(a tiny random model, its GGUF file), for the time of the block."""
    with (
        writing(Path(tempfile.gettempdir())),
        tempfile.TemporaryDirectory(prefix="edgeslm-") as folder,
    ):
        directory, file = Path(folder, "tiny"), Path(folder, "tiny.gguf")
        directory.mkdir()
        model = tiny_model(config, seed)
        with silent_transformers():
            model.save_pretrained(directory, safe_serialization=True)
        save_tokenizer(tokenizer, directory, parent=checkpoint)
        export_gguf.run(model_directory(directory, checkpoint.source), QuantizeSpec(scheme="F32"), file)
        yield model, file


def build_model(config: Config) -> Any:
    """A decoder of transformers of this configuration, float32, with its weights not yet set."""
    import torch
    import transformers
    from transformers.modeling_utils import no_init_weights

    name = config["architectures"][0].replace("ForConditionalGeneration", "ForCausalLM")
    kind = getattr(transformers, name)
    with no_init_weights():
        settings = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
        model = kind(kind.config_class.from_dict(settings | {"architectures": [name]}))
    model.tie_weights()
    if getattr(model.config, "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")  # the fused kernels leave the soft cap out
    return model.to(torch.float32).eval()


def tiny_config(config: Config) -> Config:
    """The same structure with narrower heads and hidden states, in proportion, and few MLP channels."""
    head, hidden, shrink = head_dim(config), config["hidden_size"], 1
    while head % (4 * shrink) == 0 and hidden % (2 * shrink) == 0 and head // (2 * shrink) >= SMALLEST_HEAD:
        shrink *= 2
    tiny = {
        **config,
        "hidden_size": hidden // shrink,
        "intermediate_size": min(64, config["intermediate_size"]),
    }
    if config.get("head_dim"):
        tiny["head_dim"] = head // shrink
    if config.get("query_pre_attn_scalar"):
        tiny["query_pre_attn_scalar"] = config["query_pre_attn_scalar"] // shrink
    if architecture_of(config).gguf.startswith("gemma") and config.get("sliding_window"):
        tiny["sliding_window"] = WINDOW
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(config.get(key), dict):
            tiny[key] = {
                name: value[: len(value) // shrink] if isinstance(value, list) else value
                for name, value in config[key].items()
            }
    return tiny


def tiny_model(config: Config, seed: int) -> Any:
    """Random weights, large enough that attention and output are not uniform."""
    import torch

    model = build_model(tiny_config(config))
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=random)
            if parameter.ndim == 1:
                centre = 0.0 if name.endswith("bias") or architecture_of(config).norm_offset else 1.0
                parameter.copy_(centre + 0.1 * noise)
            else:
                parameter.copy_(noise * (0.25 if "embed_tokens" in name else parameter.shape[-1] ** -0.5))
    return model


def _compare(model: Any, file: Path, seed: int) -> None:
    import torch

    tokens = np.random.default_rng(seed).integers(0, model.config.vocab_size, TOKENS)
    with torch.inference_mode():
        wanted = model(torch.from_numpy(tokens)[None]).logits[0].numpy()
    got = _llama_logits(file, tokens)
    difference = float(np.abs(got - wanted).max() / np.abs(wanted).max())
    if not difference < TOLERANCE:
        raise ModelError(
            f"llama.cpp computes something else than torch for this shape: logits of a tiny copy differ by "
            f"{difference:.0%}",
            hint="prune less of it: layers and MLP channels are the safest",
        )


def _llama_logits(file: Path, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    """[S, V] logits, computed in a process of its own: llama.cpp ends its process at what it did not expect."""
    inputs, outputs = file.with_name("tokens.npy"), file.with_name("logits.npy")
    np.save(inputs, tokens)
    done = subprocess.run(
        [sys.executable, "-c", _RUN, str(file), str(inputs), str(outputs)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0 or not outputs.exists():
        lines = [line for line in done.stderr.splitlines() if "error" in line.lower()] or [done.stderr[-300:]]
        raise ModelError(
            f"llama.cpp does not take a model of this shape: {first_line(ValueError(lines[-1]))}",
            hint="prune less of it: layers and MLP channels are the safest",
        )
    logits: NDArray[np.float32] = np.load(outputs)
    return logits
