"""Small ONNX graphs that look like a decoder's: a tied embedding, two linear layers, a head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

VOCABULARY, WIDTH, HIDDEN = 96, 64, 128


def weights(seed: int = 0, width: int = WIDTH) -> dict[str, NDArray[np.float32]]:
    """lm_head [K, V], up [K, H], down [H, K] and a norm's weight [K], all float32."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> NDArray[np.float32]:
        return (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)

    return {
        "lm_head.MatMul.weight": normal(width, VOCABULARY),
        "model.layers.0.mlp.gate_up_proj.MatMul.weight": normal(width, HIDDEN),
        "model.layers.0.mlp.down_proj.MatMul.weight": normal(HIDDEN, width),
        "model.layers.0.norm.weight": np.ones(width, np.float32),
    }


def write(path: Path, arrays: dict[str, NDArray[np.float32]], *, tied: bool = True) -> Path:
    """logits = (x + relu(norm * x W_up) W_down) W_head for x = embedding of input_ids [B, S]; PATH.data beside it.

    tied: the embedding is the head's transpose; else a matrix [V, K] of its own.
    """
    import onnx
    from onnx import TensorProto, helper

    head, up, down, norm = arrays
    table = "table" if tied else "model.embed_tokens.weight"
    nodes = [helper.make_node("Transpose", [head], [table], "transpose", perm=[1, 0])] if tied else []
    nodes += [
        helper.make_node("Gather", [table, "input_ids"], ["x"], "embed"),
        helper.make_node("Mul", ["x", norm], ["scaled"], "scale"),
        helper.make_node("MatMul", ["scaled", up], ["up"], "/up/MatMul"),
        helper.make_node("Relu", ["up"], ["hidden"], "relu"),
        helper.make_node("MatMul", ["hidden", down], ["down"], "/down/MatMul"),
        helper.make_node("Add", ["x", "down"], ["states"], "add"),
        helper.make_node("MatMul", ["states", head], ["logits"], "/lm_head/MatMul"),
    ]
    if not tied:
        arrays = arrays | {table: np.ascontiguousarray(arrays[head].T[::-1])}
    graph = helper.make_graph(
        nodes, "decoder",
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["B", length])
         for name, length in (("input_ids", "S"), ("attention_mask", "T"))],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", "S", arrays[head].shape[1]])],
        [onnx.numpy_helper.from_array(values, name) for name, values in arrays.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save_model(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=512)
    return path


def trap(path: Path) -> Path:
    """A graph whose first activation is a thousand times the others, and multiplied by zero.

    In float32 it does not matter; rounded to int8 with its neighbours it leaves nothing of them.
    """
    arrays = weights(seed=3, width=32)
    head, up, down, _ = arrays
    arrays[head][0] = 0
    arrays[up][0] = 0
    arrays["model.layers.0.norm.weight"] = np.ones(32, np.float32)
    path = write(path, arrays)
    return _with_large_channel(path, down)


def _with_large_channel(path: Path, down: str) -> Path:
    """Add 1000 to the first channel of what enters the layers: the states that the head sees keep it too."""
    import onnx
    from onnx import helper

    model = onnx.load(path)
    bump = np.zeros(32, np.float32)
    bump[0] = 1000
    model.graph.initializer.append(onnx.numpy_helper.from_array(bump, "bump"))
    nodes = list(model.graph.node)
    del model.graph.node[:]
    for node in nodes:
        for place, name in enumerate(node.input):
            if name == "x":
                node.input[place] = "x_large"
        model.graph.node.append(node)
        if node.output[0] == "x":
            model.graph.node.append(helper.make_node("Add", ["x", "bump"], ["x_large"], "bump"))
    assert any(down in node.input for node in model.graph.node)
    path.with_name(f"{path.name}.data").unlink(missing_ok=True)
    onnx.save_model(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=512)
    return path
