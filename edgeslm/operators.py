"""What an ONNX Runtime of a given version can run: known before a model travels to a device that can't.

RELEASES was read from the engine's own refusals ("max supported IR version", "official support ... is till
opset") with the wheels from 1.19 on, and from https://onnxruntime.ai/docs/reference/compatibility.html
before.  SINCE is the first wheel of PyPI whose CPU provider ran a one-node model of the operator; where
1.19 ran it already, the version of its release notes.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from edgeslm.errors import EngineError
from edgeslm.onnx_file import DEFAULT_DOMAIN

if TYPE_CHECKING:
    from edgeslm.onnx_file import OnnxFile

    Version = tuple[int, int]

# ONNX Runtime to (highest opset of ai.onnx, highest IR version); versions between go by the one below.
RELEASES: dict[Version, tuple[int, int]] = {
    (1, 13): (17, 8), (1, 14): (18, 8), (1, 15): (19, 8), (1, 16): (19, 9), (1, 17): (20, 9), (1, 18): (21, 10),
    (1, 21): (22, 10), (1, 23): (23, 11), (1, 24): (25, 13), (1, 26): (26, 13),
}  # fmt: skip
CONTRIB = "com.microsoft"
OLDEST = min(RELEASES)
# Operator, or operator with its bits, to the first version that runs it on the CPU.
SINCE: dict[str, Version] = {
    **dict.fromkeys(
        """Attention BiasGelu DynamicQuantizeLSTM DynamicQuantizeMatMul EmbedLayerNormalization FastGelu FusedConv
        FusedGemm FusedMatMul Gelu MatMulIntegerToFloat QAttention QLinearAdd QLinearConcat QLinearMul
        QLinearSigmoid QLinearSoftmax QuickGelu SkipLayerNormalization""".split(),  # noqa: SIM905
        OLDEST,
    ),
    "DequantizeLinear": OLDEST, "QuantizeLinear": OLDEST, "MultiHeadAttention": (1, 14),
    "SkipSimplifiedLayerNormalization": (1, 15), "RotaryEmbedding": (1, 17), "GroupQueryAttention": (1, 18),
    "MatMulNBits": (1, 17), "MatMulNBits 8 bits": (1, 22), "GatherBlockQuantized": (1, 20),
    "GatherBlockQuantized with bits": (1, 23),
}  # fmt: skip


def check(file: OnnxFile, version: str) -> None:
    """Raise EngineError for what ONNX Runtime `version` can't run: operator, opset or IR version of a file."""
    release = parse(version)
    known = [each for each in RELEASES if each <= release]
    if not known:
        raise EngineError(
            f"{file.path.name}: ONNX Runtime {version} is older than {_text(OLDEST)}",
            hint=f"install {_text(OLDEST)} or newer on the device",
        )
    needs = _needs(file)
    if foreign := unknown(file):
        raise EngineError(
            f"{file.path.name}: it uses the operator {foreign[0]}, which no ONNX Runtime has by itself",
            hint="export the model without custom operators",
        )
    needed, what = max(((since, what) for since, what in needs if since), default=(OLDEST, ""))
    if needed > release:
        raise EngineError(
            f"{file.path.name}: it uses {what}, which ONNX Runtime has from {_text(needed)} on; "
            f"the device has {version}",
            hint=f"install onnxruntime {_text(needed)} there, or quantize with another scheme",
        )
    opset, ir_version = RELEASES[max(known)]
    for value, most, what in ((file.opset, opset, "opset"), (file.ir_version, ir_version, "IR version")):
        if value is not None and value > most:
            newer = [each for each, limits in RELEASES.items() if limits[what != "opset"] >= value]
            raise EngineError(
                f"{file.path.name}: its {what} is {value}, ONNX Runtime {version} knows {most} at most",
                hint=f"install onnxruntime {_text(min(newer))} there"
                if newer
                else "export it with an older onnx",
            )


def minimum(file: OnnxFile) -> str | None:
    """The oldest version that runs a file; None where no version does."""
    needed = [since for since, _ in _needs(file)]
    for release, (opset, ir_version) in RELEASES.items():
        if (file.opset or 0) <= opset and (file.ir_version or 0) <= ir_version:
            versions = [release, *(since for since in needed if since is not None)]
            return None if None in needed else _text(max(versions))
    return None


def unknown(file: OnnxFile) -> list[str]:
    """Operators of a file that ONNX Runtime does not bring along."""
    return [what for since, what in _needs(file) if since is None]


def parse(version: str) -> Version:
    """(1, 23) of "1.23.2"; EngineError for what is no version."""
    found = re.match(r"(\d+)\.(\d+)(\.|$)", version)
    if found is None:
        raise EngineError(f"{version!r} is no version of ONNX Runtime", hint='write it like "1.23"')
    return int(found[1]), int(found[2])


def _needs(file: OnnxFile) -> list[tuple[Version | None, str]]:
    """(first version that runs it, name) of everything that a file uses; None: no version does."""
    needs: list[tuple[Version | None, str]] = []
    for operator in file.operators:
        domain, _, name = operator.partition(":")
        if operator in file.functions or domain in ("ai.onnx.ml", "ai.onnx.preview"):
            continue
        if domain == CONTRIB:
            needs.append((SINCE.get(name), operator))
        elif domain != DEFAULT_DOMAIN:
            needs.append((None, operator))
    for node in file.nodes:
        bits = node.attributes.get("bits")
        if node.operator == f"{CONTRIB}:MatMulNBits" and bits == 8:
            needs.append((SINCE["MatMulNBits 8 bits"], "MatMulNBits of 8 bits"))
        elif node.operator == f"{CONTRIB}:GatherBlockQuantized" and bits is not None:
            needs.append((SINCE["GatherBlockQuantized with bits"], "GatherBlockQuantized of packed bytes"))
    return needs


def _text(version: Version) -> str:
    return ".".join(map(str, version))
