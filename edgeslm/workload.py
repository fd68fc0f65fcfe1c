"""What a language model asks of a machine: bytes to keep, bytes to read and operations to do for a token.

A GGUF file or a bundle says it itself.  For a scheme that no file has yet, the plan that quantizing would
follow says which type each tensor would get.  Headers only: neither torch nor an engine is needed.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgeslm.bundle import Bundle, open_bundle
from edgeslm.errors import ModelError
from edgeslm.footprint import Shape, number, shape_of_config, shape_of_gguf
from edgeslm.gguf_file import GgufFile, read_gguf
from edgeslm.safetensors_file import read_checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Role = Literal["block", "head", "embedding"]

SCHEMES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "IQ4_NL", "Q3_K_M", "Q2_K")
"""What the table of schemes shows, the most bits first."""
HF_HEADS = ("lm_head.weight",)
HF_EMBEDDINGS = ("embed_tokens.weight",)
ONNX_KV_BYTES = {"float": 4, "float16": 2, "int8": 1}
"""Bytes of an element of the key-value cache by the type of a graph's input."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """The weights of one role and storage type.

    role: "embedding" is looked up, one row for a token; "head" is multiplied once for each token that is
    chosen; "block" is multiplied for every token.  active: the share that one token uses (experts).
    """

    role: Role
    type: str
    parameters: int
    nbytes: int
    active: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model in one scheme.  parts of a tied model have no "head": its embedding is multiplied too."""

    name: str
    format: Literal["gguf", "onnx"]
    scheme: str
    shape: Shape
    file_bytes: int
    parts: tuple[Part, ...]
    kv_element_bytes: int = 2

    @property
    def weight_bytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts)

    @property
    def head(self) -> tuple[Part, ...]:
        """What is multiplied for a chosen token: the head, or the embedding of a tied model."""
        heads = tuple(part for part in self.parts if part.role == "head")
        return heads or tuple(part for part in self.parts if part.role == "embedding")

    @property
    def blocks(self) -> tuple[Part, ...]:
        return tuple(part for part in self.parts if part.role == "block")


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """A tensor before it has a scheme: GGUF's name and a shape with the row length last."""

    name: str
    shape: tuple[int, ...]
    type: str


@dataclass(frozen=True, kw_only=True)
class Model:
    """A source of workloads.  own: as it is on disk, where that runs; tensors: what a scheme is planned on."""

    name: str
    path: Path
    shape: Shape
    architecture: str | None
    own: Workload | None
    tensors: tuple[Tensor, ...]
    active: float = 1.0
    classifier: bool = False


def read_model(source: str | Path) -> Model:
    """A bundle, a .gguf file, a Hugging Face directory or any model source; raises ModelError or BundleError."""
    path = Path(source)
    if not path.exists():
        from edgeslm.stages.checkpoint import resolve

        path = resolve(str(source)).path
    if path.is_dir() and (path / "config.json").is_file() and not (path / "manifest.json").is_file():
        return _read_directory(path)
    bundle = open_bundle(path)
    return _read_onnx(bundle) if bundle.format == "onnx" else _read_gguf(bundle)


def in_scheme(model: Model, scheme: str, *, importance: bool = True) -> Workload:
    """`model` as quantizing it to a GGUF scheme would make it.  Raises RecipeError for an unknown scheme.

    importance: whether an importance matrix is at hand, which changes some schemes' types.
    """
    from edgeslm.stages.plan import Weight, make_plan

    if not model.tensors:
        raise ModelError(
            f"{model.name} holds no tensors to plan a scheme for",
            hint="give the model before its export: a Hugging Face directory or a .gguf file",
        )
    shape = model.shape
    kv_heads = max(shape.kv_heads, default=0) or shape.heads or 1
    plan = make_plan(
        [Weight(name=t.name, shape=t.shape, source_type=t.type) for t in model.tensors],
        scheme,
        layers=shape.layers or 1,
        heads_per_kv_head=max(1, (shape.heads or 1) // kv_heads),
        importance=importance,
    )
    placed = [(p.weight.name, p.type, p.weight.parameters, p.nbytes) for p in plan.tensors]
    parts = _parts(placed, model.active)
    return Workload(
        name=model.name, format="gguf", scheme=plan.scheme, shape=shape, parts=parts,
        file_bytes=sum(part.nbytes for part in parts),
    )  # fmt: skip


def decoder_tensors(shape: Shape, *, tied: bool, type_name: str = "F16") -> tuple[Tensor, ...]:
    """The matrices of a plain decoder of this shape: gated feed-forward, grouped attention, no biases.

    For a model of which only the configuration is at hand.  Raises ModelError where a size is unknown.
    """
    sizes = (
        shape.layers,
        shape.hidden_size,
        shape.heads,
        shape.key_length,
        shape.feed_forward,
        shape.vocab_size,
    )
    if not all(sizes) or not shape.kv_heads:
        raise ModelError("the configuration lacks a size", hint="give a model with its weights")
    layers, hidden, heads, head, wide, vocab = (int(size or 0) for size in sizes)
    queries, keys = heads * head, max(shape.kv_heads) * head
    matrices = {
        "attn_q": (queries, hidden), "attn_k": (keys, hidden), "attn_v": (keys, hidden),
        "attn_output": (hidden, queries), "ffn_gate": (wide, hidden), "ffn_up": (wide, hidden),
        "ffn_down": (hidden, wide),
    }  # fmt: skip
    ends = {"token_embd.weight": (vocab, hidden)} | ({} if tied else {"output.weight": (vocab, hidden)})
    blocks = {
        f"blk.{layer}.{name}.weight": size for layer in range(layers) for name, size in matrices.items()
    }
    return tuple(Tensor(name=name, shape=size, type=type_name) for name, size in (ends | blocks).items())


def _read_gguf(bundle: Bundle) -> Model:
    file = read_gguf(bundle.weights)
    shape, active = shape_of_gguf(file), _active_experts(file)
    found = [(name, tensor.type, tensor.parameters, tensor.nbytes) for name, tensor in file.tensors.items()]
    plan = (bundle.manifest or {}).get("quantization") or {}
    name = bundle.name if bundle.manifest else str(file.get("general.name") or bundle.name)
    own = Workload(
        name=name, format="gguf", scheme=str(plan.get("scheme") or _bulk_type(found)), shape=shape,
        file_bytes=bundle.weights_bytes, parts=_parts(found, active),
    )  # fmt: skip
    tensors = tuple(
        Tensor(name=name, shape=tensor.shape, type=tensor.type) for name, tensor in file.tensors.items()
    )
    return Model(
        name=name, path=bundle.path, shape=shape, architecture=file.architecture or None, own=own,
        tensors=tensors, active=active,
    )  # fmt: skip


def _read_onnx(bundle: Bundle) -> Model:
    """A bundle of the format onnx, by its manifest: the types of the plan, the sizes of the facts."""
    manifest = bundle.manifest or {}
    facts, plan = manifest.get("model") or {}, manifest.get("quantization") or {}
    layers, head = number(facts.get("layers")), number(facts.get("head_dim"))
    kv_heads = number(facts.get("kv_heads"))
    shape = Shape(
        context_length=number(facts.get("context_length")), hidden_size=number(facts.get("hidden_size")),
        layers=layers, heads=number(facts.get("heads")), kv_heads=(kv_heads,) * (layers or 0) if kv_heads else (),
        key_length=head, value_length=head, feed_forward=None, vocab_size=number(facts.get("vocab_size")),
        window=None, windowed=(False,) * (layers or 0),
    )  # fmt: skip
    parts = []
    for kind, sums in (plan.get("types") or {}).items():
        sizes = [number(sums.get(key)) if isinstance(sums, dict) else None for key in ("parameters", "bytes")]
        if sizes[0] and sizes[1]:
            parts.append(Part(role="block", type=str(kind), parameters=sizes[0], nbytes=sizes[1]))
    held = bundle.weights_bytes
    whole = Part(role="block", type="F32", parameters=held // 4, nbytes=held)
    inputs = [each for each in facts.get("inputs") or () if isinstance(each, dict)]
    past = [str(each.get("type")) for each in inputs if "past" in str(each.get("name"))]
    own = Workload(
        name=bundle.name, format="onnx", scheme=str(plan.get("scheme") or "F32"), shape=shape,
        file_bytes=bundle.weights_bytes,
        parts=tuple(parts) or (whole,),
        kv_element_bytes=ONNX_KV_BYTES.get(past[0] if past else "float", 4),
    )  # fmt: skip
    return Model(
        name=bundle.name, path=bundle.path, shape=shape, architecture=facts.get("architecture"), own=own,
        tensors=(), classifier=bundle.is_classifier,
    )  # fmt: skip


def _read_directory(path: Path) -> Model:
    """A Hugging Face directory: the tensors under the names that a GGUF file would give them."""
    from edgeslm.stages.architectures import complete, tensor_names
    from edgeslm.stages.checkpoint import read_json

    config = complete(read_json(path / "config.json"))
    found = read_checkpoint(path)
    try:
        names = tensor_names(found, config)
    except ModuleNotFoundError as error:
        raise ModelError(
            f"planning a scheme for {path.name} needs {error.name}",
            hint='pip install "edgeslm[workstation]", or give a .gguf file',
        ) from error
    tied = config.get("tie_word_embeddings") is True
    tensors = tuple(
        Tensor(name=written, shape=found[name].shape, type="F16")
        for name, written in names.items()
        if not (tied and written == "output.weight")
    )
    shape = shape_of_config(config)
    return Model(
        name=path.resolve().name, path=path, shape=shape, architecture=config.get("model_type"), own=None,
        tensors=tensors,
    )  # fmt: skip


def _parts(found: Iterable[tuple[str, str, int, int]], active: float) -> tuple[Part, ...]:
    """Tensors (name, type, parameters, bytes) added up by role and type."""
    sums: dict[tuple[Role, str, float], list[int]] = defaultdict(lambda: [0, 0])
    for name, kind, parameters, nbytes in found:
        total = sums[_role(name), kind, active if "_exps" in name else 1.0]
        total[0] += parameters
        total[1] += nbytes
    return tuple(
        Part(role=role, type=kind, parameters=count, nbytes=nbytes, active=share)
        for (role, kind, share), (count, nbytes) in sums.items()
    )


def _role(name: str) -> Role:
    if name == "output.weight":
        return "head"
    return "embedding" if name.startswith(("token_embd.", "per_layer_token_embd.")) else "block"


def _bulk_type(found: Sequence[tuple[str, str, int, int]]) -> str:
    """The type that most parameters have."""
    held: dict[str, int] = defaultdict(int)
    for _, kind, parameters, _ in found:
        held[kind] += parameters
    return max(held, key=lambda kind: held[kind], default="F32")


def _active_experts(file: GgufFile) -> float:
    """The share of the experts that one token uses."""
    used, count = (
        number(file.get(f"{file.architecture}.{key}")) for key in ("expert_used_count", "expert_count")
    )
    return min(1.0, used / count) if used and count else 1.0
