"""What the tables of a recipe may hold: every key with its kind, its range and its choices.

The defaults live in edgeslm.specs; a test holds one against the other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from edgeslm.schema import Key
from edgeslm.specs import (
    TASKS,
    BenchSpec,
    CalibrateSpec,
    ColumnsSpec,
    DataSpec,
    DecideSpec,
    DistillSpec,
    EvaluateSpec,
    FinetuneSpec,
    GateSpec,
    OnnxSpec,
    PruneSpec,
    QuantizeSpec,
    ScrubSpec,
    SimulateSpec,
    StudentSpec,
    TrainSpec,
    WindowSpec,
)

TENSOR_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "Q5_0", "Q5_1", "Q4_0",
                "Q4_1", "IQ4_NL", "IQ4_XS")  # fmt: skip
"""Types that a tensor of an export can have."""

SCHEMES = ("Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q4_0", "IQ4_NL", "IQ4_XS", "F16", "BF16", "F32",
           "Q5_0", "Q5_1", "Q4_1", "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K", "Q5_K", "Q4_K", "Q3_K")  # fmt: skip
"""Presets that a scheme may name, as edgeslm.stages.plan has them (a test compares the two)."""

ONNX_SCHEMES = ("F32", "int8-dynamic", "int8-static", "int8", "int4", "int4-int8")
"""Schemes of an ONNX model: int8 and int4 are of the weights alone, int4-int8 is a mixture of both."""

VARIANTS = "variants"
"""The list of tables that each have a name and the keys of [quantize]."""

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"


class Table(NamedTuple):
    """A table of a recipe: the dataclass that it becomes and what its keys may hold.

    A key may be a table itself, or Pairs: a table whose keys are the user's own.
    """

    make: Any
    keys: dict[str, Key | Table | Pairs]
    optional: bool = False
    """Whether a missing table is None, rather than its defaults."""


class Pairs(NamedTuple):
    """A table of the user's own keys, each with a value of this kind; patterns: the keys are regular expressions."""

    value: Key
    patterns: bool = False


TOP = {
    "name": Key(kind="string", required=True, pattern=NAME),
    "task": Key(kind="string", required=True, choices=TASKS),
    "model": Key(kind="string"),
    "device": Key(kind="string"),
    "seed": Key(kind="integer", low=0, high=2**32 - 1),
    "licence": Key(kind="string"),
}

POSITIVE = 1e-12
TRAIN = Table(TrainSpec, {
    "epochs": Key(kind="number", low=POSITIVE, high=10_000),
    "max_steps": Key(kind="integer", low=1, high=10**9),
    "learning_rate": Key(kind="number", low=POSITIVE, high=10),
    "batch_size": Key(kind="integer", low=1, high=2**20),
    "micro_batch": Key(kind="integer", low=1, high=2**20),
    "context": Key(kind="integer", low=8, high=2**20),
    "patience": Key(kind="integer", low=1, high=10_000),
    "gradient_checkpointing": Key(kind="boolean"),
})  # fmt: skip

ONNX = Table(OnnxSpec, {
    "block": Key(kind="integer", choices=(16, 32, 64, 128)),
    "symmetric": Key(kind="boolean"),
    "algorithm": Key(kind="string", choices=("search", "rtn", "hqq", "gptq", "k-quant")),
    "accuracy_level": Key(kind="integer", low=0, high=4),
    "target": Key(kind="string", choices=("avx2", "avx512-vnni", "arm64")),
    "observer": Key(kind="string", choices=("min-max", "entropy", "percentile")),
    "sensitive": Key(kind="number", low=0, high=1),
    "mobile": Key(kind="boolean"),
})  # fmt: skip

TABLES: dict[str, Table] = {
    "data": Table(DataSpec, {
        "train": Key(kind="strings"),
        "calibration": Key(kind="strings"),
        "heldout": Key(kind="strings"),
        "heldout_every": Key(kind="integer", low=2, high=10_000),
        "completion_only": Key(kind="boolean"),
        "max_bad_rows": Key(kind="number", low=0, high=1),
        "licence": Key(kind="string"),
    }),
    "columns": Table(ColumnsSpec, {
        "text": Key(kind="string"),
        "label": Key(kind="string"),
        "labels": Key(kind="strings"),
        "ordinal": Key(kind="boolean"),
        "channels": Key(kind="strings"),
        "time": Key(kind="string"),
        "unit": Key(kind="string"),
    }),
    "windows": Table(WindowSpec, {
        "rows": Key(kind="integer", low=1, high=2**20),
        "stride": Key(kind="integer", low=1, high=2**20),
        "normalize": Key(kind="string", choices=("standard", "robust")),
        "max_gap": Key(kind="number", low=1),
        "max_missing": Key(kind="number", low=0, high=1),
    }),
    "simulate": Table(SimulateSpec, {
        "units": Key(kind="integer", low=4, high=10_000),
        "seed": Key(kind="integer", low=0, high=2**32 - 1),
        "sample_hz": Key(kind="number", low=64, high=10**6),
        "shaft_hz": Key(kind="number", low=0.1, high=10**4),
        "fault_ratio": Key(kind="number", low=0.1, high=100),
        "life_s": Key(kind="number", low=10, high=10**7),
        "noise": Key(kind="number", low=0, high=1000),
        "warning_s": Key(kind="number", low=1, high=10**7),
    }, optional=True),
    "scrub": Table(ScrubSpec, {
        "emails": Key(kind="boolean"),
        "phones": Key(kind="boolean"),
        "ibans": Key(kind="boolean"),
        "cards": Key(kind="boolean"),
        "addresses": Key(kind="boolean"),
        "names": Key(kind="strings"),
    }, optional=True),
    "finetune": Table(FinetuneSpec, {
        "method": Key(kind="string", choices=("full", "lora", "dora", "head-only")),
        "rank": Key(kind="integer", low=1, high=4096),
        "alpha": Key(kind="number", low=POSITIVE, high=4096),
        "network": Key(kind="string", choices=("gru", "lstm")),
        "units": Key(kind="integer", low=1, high=4096),
        "train": TRAIN,
    }, optional=True),
    "prune": Table(PruneSpec, {
        "drop_layers": Key(kind="integer", low=1, high=1000),
        "layers_by": Key(kind="string", choices=("cosine", "perplexity")),
        "mlp_width": Key(kind="integer", low=32, high=2**20),
        "kv_heads": Key(kind="integer", low=1, high=1024),
        "hidden_size": Key(kind="integer", low=32, high=2**20),
        "vocabulary": Key(kind="boolean"),
        "target": Key(kind="number", low=POSITIVE, high=1e13),
        "target_bytes": Key(kind="integer", low=1, high=10**14),
        "multiple": Key(kind="integer", low=1, high=4096),
    }, optional=True),
    "distill": Table(DistillSpec, {
        "teacher": Key(kind="string"),
        "mode": Key(kind="string", choices=("logits", "sequence", "on-policy")),
        "divergence": Key(kind="string", choices=("forward", "reverse", "js")),
        "temperature": Key(kind="number", low=POSITIVE, high=1000),
        "hard_weight": Key(kind="number", low=0, high=1),
        "hidden_weight": Key(kind="number", low=0, high=10**6),
        "attention_weight": Key(kind="number", low=0, high=10**6),
        "cache_top_k": Key(kind="integer", low=1, high=2**20),
        "student": Table(StudentSpec, {
            "kind": Key(kind="string", choices=("pruned", "smaller", "gru", "lstm")),
            "layers": Key(kind="integer", low=1, high=1000),
            "embedding": Key(kind="integer", low=1, high=2**16),
            "units": Key(kind="integer", low=1, high=2**16),
        }),
        "train": TRAIN,
    }, optional=True),
    "calibrate": Table(CalibrateSpec, {
        "tokens": Key(kind="integer", low=32, high=10**9),
        "context": Key(kind="integer", low=16, high=2**20),
    }),
    "quantize": Table(QuantizeSpec, {
        "format": Key(kind="string", choices=("gguf", "onnx")),
        "scheme": Key(kind="string", choices=tuple(dict.fromkeys((*SCHEMES, *ONNX_SCHEMES)))),
        "keep_going": Key(kind="boolean"),
        "types": Pairs(Key(kind="string", choices=TENSOR_TYPES), patterns=True),
        "onnx": ONNX,
    }),
    "decide": Table(DecideSpec, {
        "prior": Pairs(Key(kind="number", low=POSITIVE, high=1)),
        "costs": Pairs(Key(kind="number", low=POSITIVE)),
    }),
    "evaluate": Table(EvaluateSpec, {
        "context": Key(kind="integer", low=16, high=2**20),
        "max_tokens": Key(kind="integer", low=16, high=10**9),
    }),
    "gate": Table(GateSpec, {
        "max_kl_nats": Key(kind="number", low=0),
        "min_top1_agreement": Key(kind="number", low=0, high=1),
        "max_perplexity_ratio": Key(kind="number", low=0),
        "min_accuracy": Key(kind="number", low=0, high=1),
        "min_macro_f1": Key(kind="number", low=0, high=1),
        "min_level_agreement": Key(kind="number", low=0, high=1),
        "max_file_bytes": Key(kind="integer", low=1),
        "min_decode_tokens_per_s": Key(kind="number", low=0),
        "max_peak_rss_bytes": Key(kind="integer", low=1),
    }),
    "bench": Table(BenchSpec, {
        "prompt_tokens": Key(kind="integers", low=1, high=2**20),
        "decode_tokens": Key(kind="integers", low=1, high=2**20),
        "batch_sizes": Key(kind="integers", low=1, high=2**16),
        "threads": Key(kind="integers", low=1, high=4096),
        "repetitions": Key(kind="integer", low=1, high=10_000),
        "context": Key(kind="integer", low=8, high=2**20),
    }),
}  # fmt: skip
"""Every table of a recipe."""
