"""A decoder of transformers as an ONNX graph with a KV cache, of operators that ONNX Runtime computes fused.

    input_ids [B, S], attention_mask [B, T] int64, past_key_values.N.key / .value [B, K, P, D] float32,
    first_logit [1] int64 (may be left out: 0)
        -> logits [B, S - first_logit, V], present.N.key / .value [B, K, T, D]

The graph is written node by node from the torch modules, not traced: GroupQueryAttention holds rotary
positions, cache and windows, one product makes queries, keys and values, a sum and the norm behind it are
one node, and a tied embedding is in the file once.  A runner may bind past and present to the same buffers.
Nodes and weights are named as onnxruntime-genai's model builder names them.

B batch, S tokens of this call, P tokens before, T = P + S, K key-value heads, D their width, V vocabulary.
Operators: https://github.com/microsoft/onnxruntime/blob/v1.22.0/docs/ContribOperators.md
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeslm.errors import ModelError
from edgeslm.stages.graph_writer import MICROSOFT, Nodes, save

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from edgeslm.progress import Progress
    from edgeslm.stages.checkpoint import Checkpoint

OPSET, IR_VERSION = 21, 10
"""ONNX Runtime 1.18 and later."""
ROTARY_MULTIPLE = 16
TO_THE_END = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row: what a model type does other than Llama."""

    norms: tuple[str | None, str | None, str | None, str | None] = (
        "input_layernorm", None, "post_attention_layernorm", None,
    )  # fmt: skip
    """Norms before attention, behind it, before the MLP, behind it."""
    norm_offset: float = 0.0
    """Added to the weight of every norm."""
    head_norms: str | None = None
    """Norms of queries and keys: of each head ("each"), or over all heads at once ("all")."""
    softcap: bool = False
    """Whether attn_logit_softcapping is applied."""
    scaled_embedding: bool = False
    """Embeddings times the square root of the width."""


_SANDWICH = (
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
)  # fmt: skip
FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "smollm3": Family(),
    "granite": Family(),
    "qwen2": Family(),
    "qwen3": Family(head_norms="each"),
    "gemma2": Family(norms=_SANDWICH, norm_offset=1.0, softcap=True, scaled_embedding=True),
    "gemma3_text": Family(norms=_SANDWICH, norm_offset=1.0, head_norms="each", scaled_embedding=True),
    "phi3": Family(),
    "olmo2": Family(
        norms=(None, "post_attention_layernorm", None, "post_feedforward_layernorm"), head_norms="all"
    ),
}
"""model_type of transformers' text configuration to its row."""
ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "none", "gelu_new": "tanh", "gelu_fast": "tanh",
    "gelu_pytorch_tanh": "tanh",
}  # fmt: skip
"""hidden_act to silu, or to what Gelu's attribute `approximate` says."""
GROWING_ROTATIONS = ("dynamic", "longrope", "su")
"""Rotary scalings whose frequencies change once a text is longer than the original context."""


@dataclass(frozen=True, kw_only=True)
class Graph:
    """An ONNX model whose weights are still outside of it."""

    model: Any
    """onnx.ModelProto; its initializers are the small constants."""
    weights: dict[str, NDArray[Any]]
    """Name to array, in the order of the file; views of torch's memory where possible."""
    context_length: int
    """Tokens that the rotary tables have rows for."""
    warnings: tuple[str, ...] = ()

    @property
    def trained(self) -> list[NDArray[Any]]:
        """The weights that were learned: all but the rotary tables."""
        return [
            array for name, array in self.weights.items() if not name.startswith(("cos_cache", "sin_cache"))
        ]


def build(checkpoint: Checkpoint, directory: Path, *, progress: Progress | None = None) -> Path:
    """Write a causal language model in float32: DIRECTORY/model.onnx, whose path it returns, and model.onnx.data.

    Raises ModelError for a family, an activation or layers that the graph has no form for.
    """
    graph = make_graph(checkpoint.load(), checkpoint.name)
    path = directory / "model.onnx"
    save(graph.model, graph.weights, path, progress=progress)
    return path


def make_graph(model: Any, name: str) -> Graph:
    """The graph of a causal language model of transformers, in float32.  Raises ModelError, see build."""
    config = model.config.get_text_config()
    if config.model_type not in FAMILIES:
        raise ModelError(
            f"{name}: no ONNX graph for the architecture {config.model_type!r}; there is one for "
            f"{', '.join(FAMILIES)}",
            hint="export it as GGUF, or start from a model of one of these families",
        )
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in ACTIVATIONS:
        raise ModelError(f"{name}: no ONNX graph for the activation {activation!r}")
    writer = _Decoder(config=config, family=FAMILIES[config.model_type], activation=ACTIVATIONS[activation])
    return writer.graph(model)


@dataclass(kw_only=True)
class _Decoder(Nodes):
    """Writes one model: the embedding, block after block, the head."""

    config: Any
    family: Family
    activation: str
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        config = self.config
        self.heads = config.num_attention_heads
        self.kv_heads = getattr(config, "num_key_value_heads", None) or self.heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.epsilon = config.rms_norm_eps
        self.context_length = self._context_length()

    def graph(self, model: Any) -> Graph:
        text = getattr(model.model, "language_model", model.model)
        self._mask()
        residual, branch = self._embedding(text.embed_tokens), None
        for number, layer in enumerate(text.layers):
            residual, branch = self._layer(text, layer, number, residual, branch)
        states, _ = self._norm(
            text.norm, residual, branch, f"/model/layers.{len(text.layers)}/final_norm_layernorm"
        )
        self._head(
            model.lm_head, states, tied=model.lm_head.weight.data_ptr() == text.embed_tokens.weight.data_ptr()
        )
        return Graph(
            model=self._model(len(text.layers)), weights=self.weights, context_length=self.context_length,
            warnings=tuple(self.warnings),
        )  # fmt: skip

    # --- before and behind the blocks ---

    def _mask(self) -> None:
        """What GroupQueryAttention wants to know: tokens of each row less one [B], and of the longest."""
        path = "/model/attn_mask_reformat/attn_mask_subgraph"
        total = self.add("ReduceSum", ["attention_mask", self.constant([1])], f"{path}/ReduceSum", keepdims=0)
        less = self.add("Sub", [total, self.constant([1])], f"{path}/Sub")
        self.seqlens = self.add("Cast", [less], f"{path}/Sub/Cast", to=6)
        shape = self.add("Shape", ["attention_mask"], f"{path}/Shape", start=1, end=2)
        width = self.add("Squeeze", [shape], f"{path}/Squeeze")
        self.total = self.add("Cast", [width], f"{path}/Squeeze/Cast", to=6)

    def _embedding(self, embedding: Any) -> str:
        path = "/model/embed_tokens"
        table = self.weight("model.embed_tokens.weight", _array(embedding.weight))
        states = self.add("Gather", [table, "input_ids"], f"{path}/Gather")
        scale = getattr(self.config, "embedding_multiplier", 1.0)
        if self.family.scaled_embedding:
            scale = float(np.float32(self.config.hidden_size**0.5))
        return self._times(states, scale, f"{path}/Mul")

    def _head(self, head: Any, states: str, *, tied: bool) -> None:
        """Logits of the positions from first_logit on: prefill needs the last one alone.

        A tied head turns the embedding when it is loaded; the other way round both would be copies.
        """
        rows = self.add(
            "Slice",
            [states, "first_logit", self.constant([TO_THE_END]), self.constant([1])],
            "/lm_head/Slice",
        )
        if tied:
            turned = self.add("Transpose", ["model.embed_tokens.weight"], "/lm_head/Transpose", perm=[1, 0])
            logits = self.add("MatMul", [rows, turned], "/lm_head/MatMul")
        else:
            logits = self._linear(rows, head, "/lm_head")
        logits = self._times(logits, 1 / getattr(self.config, "logits_scaling", 1.0), "/lm_head/Mul")
        if cap := getattr(self.config, "final_logit_softcapping", None):
            small = self.add("Div", [logits, self.constant(float(cap))], "/lm_head/softcap/Div")
            bounded = self.add("Tanh", [small], "/lm_head/softcap/Tanh")
            logits = self._times(bounded, cap, "/lm_head/softcap/Mul")
        self.nodes[-1].output[0] = "logits"

    # --- a block ---

    def _layer(
        self, text: Any, layer: Any, number: int, residual: str, branch: str | None
    ) -> tuple[str, str]:
        """(residual stream, branch that is still to be added to it) behind one block."""
        path = f"/model/layers.{number}"
        before_attention, behind_attention, before_mlp, behind_mlp = self.family.norms
        states, residual = self._norm_of(layer, before_attention, residual, branch, f"{path}/attn")
        states = self._attention(text, layer.self_attn, number, states, f"{path}/attn")
        branch = self._leaving(layer, behind_attention, states, f"{path}/attn")
        states, residual = self._norm_of(layer, before_mlp, residual, branch, f"{path}/mlp")
        states = self._mlp(layer.mlp, states, f"{path}/mlp")
        return residual, self._leaving(layer, behind_mlp, states, f"{path}/mlp")

    def _norm_of(
        self, layer: Any, which: str | None, residual: str, branch: str | None, part: str
    ) -> tuple[str, str]:
        """(what attention or MLP reads, residual stream with the branch added)."""
        if which:
            return self._norm(getattr(layer, which), residual, branch, f"{part.rpartition('/')[0]}/{which}")
        total = residual if branch is None else self.add("Add", [residual, branch], f"{part}/residual/Add")
        return total, total

    def _leaving(self, layer: Any, which: str | None, states: str, part: str) -> str:
        """What attention or MLP adds to the residual stream."""
        if which:
            path = f"{part.rpartition('/')[0]}/{which}"
            states = self.rms_norm(states, self._norm_weight(getattr(layer, which), path), self.epsilon, path)
        return self._times(states, getattr(self.config, "residual_multiplier", 1.0), f"{part}/residual/Mul")

    def _attention(self, text: Any, module: Any, number: int, states: str, path: str) -> str:
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        if hasattr(module, "qkv_proj"):
            packed = self._linear(states, module.qkv_proj, f"{path}/qkv_proj")
        else:
            packed = self._together(states, (module.q_proj, module.k_proj, module.v_proj), f"{path}/qkv_proj")
        inputs = [packed, "", ""]
        if self.family.head_norms:
            inputs = [f"{path}/qkv_proj/Split/output_{i}" for i in range(3)]
            self.add("Split", [packed, self.constant([queries, keys, keys])], f"{path}/qkv_proj/Split",
                     outputs=inputs, axis=-1)  # fmt: skip
            inputs[0] = self._head_norm(inputs[0], module.q_norm, queries, f"{path}/q_norm")
            inputs[1] = self._head_norm(inputs[1], module.k_norm, keys, f"{path}/k_norm")
        window = self._window(number)
        tables = self._rotary(text, local=window > 0) if getattr(module, "use_rope", True) else ("", "")
        attended = self.add(
            "GroupQueryAttention",
            [*inputs, f"past_key_values.{number}.key", f"past_key_values.{number}.value", self.seqlens, self.total,
             *tables],
            f"{path}/GroupQueryAttention", domain=MICROSOFT,
            outputs=[f"{path}/GroupQueryAttention/output_0", f"present.{number}.key", f"present.{number}.value"],
            num_heads=self.heads, kv_num_heads=self.kv_heads, scale=float(module.scaling),
            local_window_size=window or -1, do_rotary=int(bool(tables[0])), rotary_interleaved=0,
            softcap=float((self.family.softcap and self.config.attn_logit_softcapping) or 0.0),
        )  # fmt: skip
        return self._linear(attended, module.o_proj, f"{path}/o_proj")

    def _head_norm(self, states: str, norm: Any, width: int, path: str) -> str:
        """Queries or keys [B, S, heads * D], normed over each head's D numbers or over all of them."""
        weight = self._norm_weight(norm, path)
        if self.family.head_norms == "all":
            return self.rms_norm(states, weight, self.epsilon, path)
        apart = self.add("Reshape", [states, self.constant([0, 0, -1, self.head_dim])], f"{path}/Reshape_1")
        normed = self.rms_norm(apart, weight, self.epsilon, path)
        return self.add("Reshape", [normed, self.constant([0, 0, width])], f"{path}/Reshape_2")

    def _mlp(self, module: Any, states: str, path: str) -> str:
        if hasattr(module, "gate_up_proj"):
            both = self._linear(states, module.gate_up_proj, f"{path}/gate_up_proj")
        else:
            both = self._together(states, (module.gate_proj, module.up_proj), f"{path}/gate_up_proj")
        gate, up = (f"{path}/gate_up_proj/Split/output_{i}" for i in range(2))
        self.add("Split", [both], f"{path}/gate_up_proj/Split", outputs=[gate, up], axis=-1, num_outputs=2)
        if self.activation == "silu":
            share = self.add("Sigmoid", [gate], f"{path}/act_fn/Sigmoid")
            active = self.add("Mul", [gate, share], f"{path}/act_fn/Mul")
        else:
            active = self.add("Gelu", [gate], f"{path}/act_fn/Gelu", approximate=self.activation)
        return self._linear(
            self.add("Mul", [active, up], f"{path}/Mul"), module.down_proj, f"{path}/down_proj"
        )

    # --- parts ---

    def _linear(self, x: str, linear: Any, path: str) -> str:
        return self.matmul(
            x, _array(linear.weight).T, None if linear.bias is None else _array(linear.bias), path
        )

    def _together(self, x: str, linears: tuple[Any, ...], path: str) -> str:
        """Several linear layers of one input as one product, their outputs side by side."""
        weight = np.concatenate([_array(linear.weight) for linear in linears])
        biased = linears[0].bias is not None
        bias = np.concatenate([_array(linear.bias) for linear in linears]) if biased else None
        return self.matmul(x, weight.T, bias, path)

    def _times(self, x: str, factor: float, path: str) -> str:
        return x if factor == 1.0 else self.add("Mul", [x, self.constant(float(factor))], path)

    def _norm(self, norm: Any, residual: str, branch: str | None, path: str) -> tuple[str, str]:
        """(normed sum, sum) of the residual stream and the branch that is to be added to it."""
        weight = self._norm_weight(norm, path)
        if branch is None:
            return self.rms_norm(residual, weight, self.epsilon, path), residual
        return self.skip_norm(residual, branch, weight, self.epsilon, path)

    def _norm_weight(self, norm: Any, path: str) -> str:
        name = f"{path.removeprefix('/').replace('/', '.')}.weight"
        return self.weight(name, _array(norm.weight) + np.float32(self.family.norm_offset))

    def _window(self, number: int) -> int:
        """Tokens that a layer looks back, itself included; 0: all."""
        kinds = getattr(self.config, "layer_types", None)
        slides = kinds[number] == "sliding_attention" if kinds else True
        return int(getattr(self.config, "sliding_window", None) or 0) if slides else 0

    def _context_length(self) -> int:
        scaling = getattr(self.config, "rope_scaling", None) or {}
        kind = scaling.get("rope_type", scaling.get("type"))
        longest = int(self.config.max_position_embeddings)
        if kind not in GROWING_ROTATIONS:
            return longest
        own = getattr(self.config, "original_max_position_embeddings", None)
        original = int(scaling.get("original_max_position_embeddings") or own or longest)
        if original < longest:
            self.warnings.append(
                f"rotary scaling {kind!r} changes with the length of the text: the ONNX file has the positions "
                f"of the first {original} tokens, the model {longest}"
            )
        return min(longest, original)

    def _rotary(self, text: Any, *, local: bool) -> tuple[str, str]:
        """Names of the cosine and sine tables [context, rotary dimensions / 2] of a layer."""
        own = local and hasattr(text, "rotary_emb_local")
        names = ("cos_cache_local", "sin_cache_local") if own else ("cos_cache", "sin_cache")
        if names[0] not in self.weights:
            rotary = text.rotary_emb_local if own else text.rotary_emb
            frequencies = getattr(rotary, "original_inv_freq", rotary.inv_freq)
            if 2 * len(frequencies) % ROTARY_MULTIPLE:
                raise ModelError(
                    f"ONNX Runtime rotates multiples of {ROTARY_MULTIPLE} dimensions: this model has "
                    f"{2 * len(frequencies)} rotary dimensions of {self.head_dim}",
                    hint="export it as GGUF",
                )
            angles = np.outer(np.arange(self.context_length, dtype=np.float32), _array(frequencies))
            for name, function in zip(names, (np.cos, np.sin), strict=True):
                self.weight(
                    name, (function(angles) * np.float32(rotary.attention_scaling)).astype(np.float32)
                )
        return names

    def _model(self, layers: int) -> Any:
        import onnx

        def value(name: str, kind: int, shape: list[int | str]) -> Any:
            return onnx.helper.make_tensor_value_info(name, kind, shape)

        integer, real = onnx.TensorProto.INT64, onnx.TensorProto.FLOAT
        past = ["batch_size", self.kv_heads, "past_sequence_length", self.head_dim]
        present = ["batch_size", self.kv_heads, "total_sequence_length", self.head_dim]
        caches = [f"{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
        return self.model(
            inputs=[
                value("input_ids", integer, ["batch_size", "sequence_length"]),
                value("attention_mask", integer, ["batch_size", "total_sequence_length"]),
                *(value(f"past_key_values.{cache}", real, past) for cache in caches),
                value("first_logit", integer, [1]),
            ],
            outputs=[
                value("logits", real, ["batch_size", "logits_length", self.config.vocab_size]),
                *(value(f"present.{cache}", real, present) for cache in caches),
            ],
            initializers={"first_logit": np.zeros(1, np.int64)},
            opset=OPSET, ir_version=IR_VERSION, producer="edgeslm",
        )  # fmt: skip


def _array(tensor: Any) -> NDArray[np.float32]:
    """A parameter as float32, without a copy where it is that already."""
    array: NDArray[np.float32] = tensor.detach().float().numpy()
    return array
