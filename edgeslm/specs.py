"""What each stage of a recipe is told: one frozen dataclass a stage, with the defaults.

The allowed values are in edgeslm.recipe's TABLES; a test holds one against the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field

TASKS = ("causal-lm", "text-classification", "sensor-classification")


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Where examples come from: files relative to the recipe, hub data sets, or pkg://package/path[#name]."""

    train: tuple[str, ...] = ()
    """What the model learns from."""
    calibration: tuple[str, ...] = ()
    """Empty: the training sources."""
    heldout: tuple[str, ...] = ()
    """What quality is measured on, kept out of training."""
    heldout_every: int | None = None
    """Every Nth example of the training sources (or of calibration, without them) is held out instead."""
    completion_only: bool = False
    """Language models: count the loss on completions and assistant turns only."""
    max_bad_rows: float = 0.05
    """Share of a file's rows that may be unusable; beyond it the file is taken for the wrong one."""
    licence: str | None = None
    """The data's licence, as SPDX has it; it travels into the bundle."""


@dataclass(frozen=True, kw_only=True)
class ColumnsSpec:
    """Which columns (or JSON keys) of a table hold what."""

    text: str = "text"
    """Column of the text."""
    label: str = "label"
    """Column of the class."""
    labels: tuple[str, ...] = ()
    """The classes in their order; empty: those of the training rows, sorted."""
    ordinal: bool = False
    """The classes are grades, from the lowest up: adds quadratic weighted kappa and mean absolute error."""
    channels: tuple[str, ...] = ()
    """Sensor columns; empty: all numeric columns but label, time and unit."""
    time: str | None = None
    """Column that orders a unit's rows, in seconds; None: the rows are in order and evenly spaced."""
    unit: str | None = None
    """Column that tells one machine's rows from another's; windows never cross units."""


@dataclass(frozen=True, kw_only=True)
class WindowSpec:
    """How a table of sensor readings becomes examples."""

    rows: int = 64
    """Rows of a window; 1: every row is an example."""
    stride: int | None = None
    """Rows from one window to the next; None: half a window."""
    normalize: str = "standard"
    """standard: mean and deviation; robust: median and quartiles; both of the training rows."""
    max_gap: float = 1.5
    """A step of time longer than so many usual ones is a gap: no window crosses it."""
    max_missing: float = 0.2
    """Share of a window's readings that may be missing (filled with the last one); others are left out."""


@dataclass(frozen=True, kw_only=True)
class SimulateSpec:
    """Bearings that wear out, simulated: see edgeslm.stages.simulate."""

    units: int = 12
    """Bearings; the last quarter is held out."""
    seed: int = 0
    sample_hz: float = 2048.0
    shaft_hz: float = 25.0
    fault_ratio: float = 3.57
    """Impacts per turn of the shaft, as the bearing's geometry gives them (outer race)."""
    life_s: float = 600.0
    """Mean life of a bearing; each one's own is drawn around it and known."""
    noise: float = 1.0
    """Deviation of the background against the healthy signal's."""
    warning_s: float = 60.0
    """Rows so long before the failure are labelled `failure`."""


@dataclass(frozen=True, kw_only=True)
class ScrubSpec:
    """What is masked in texts before training."""

    emails: bool = True
    phones: bool = True
    ibans: bool = True
    cards: bool = True
    addresses: bool = True
    """IP addresses, version 4 and 6."""
    names: tuple[str, ...] = ()
    """Files with one name a line."""


@dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """How any model is trained: AdamW, linear warm-up, cosine to a tenth."""

    epochs: float = 1.0
    """How often every example is seen."""
    max_steps: int | None = None
    """Optimizer steps; left out: as many as the epochs have."""
    learning_rate: float = 1e-4
    """At its peak, after the warm-up."""
    batch_size: int = 8
    """Examples in an optimizer step, over all processes and accumulated micro-batches."""
    micro_batch: int | None = None
    """Examples computed at once in one process; Left out: all of them."""
    context: int = 512
    """Tokens of an example at most."""
    patience: int | None = None
    """Evaluations without improvement after which training stops; left out: it runs to its end."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, a third more time."""


@dataclass(frozen=True, kw_only=True)
class FinetuneSpec:
    """How the model becomes a domain model."""

    method: str = "full"
    """full, lora, dora, or head-only (classification on frozen features)."""
    rank: int = 16
    """Rank of the adapter's update."""
    alpha: float = 32.0
    """Scale of the adapter's update, over the rank."""
    network: str = "gru"
    """Sensor tables without a model: the network that is trained from scratch, gru or lstm."""
    units: int = 64
    """Sensor tables without a model: the network's width."""
    train: TrainSpec = field(default_factory=TrainSpec)


@dataclass(frozen=True, kw_only=True)
class PruneSpec:
    """What is cut out.  A width is what remains; None: untouched."""

    drop_layers: int | None = None
    """Layers that go."""
    layers_by: str = "cosine"
    """Which layers go: those of least cosine influence, or one after the other those that cost the least perplexity
    (minutes; with a target all at once)."""
    mlp_width: int | None = None
    """Channels of each MLP that remain."""
    kv_heads: int | None = None
    """Key-value heads that remain, each with its group of query heads."""
    hidden_size: int | None = None
    """Width of the residual stream that remains."""
    vocabulary: bool = False
    """Drop the tokens that the training text never uses."""
    target: float | None = None
    """Below 1: share of the parameters that remain; above: parameters.  Chooses layers and widths itself."""
    target_bytes: int | None = None
    """The same in bytes of the exported file, as [quantize] has it; of several variants of the largest."""
    multiple: int | None = None
    """Widths are rounded down to it; None: 256 where that costs at most an eighth of the width, else 32."""


@dataclass(frozen=True, kw_only=True)
class StudentSpec:
    """What is distilled into."""

    kind: str = "pruned"
    """pruned: the model that [prune] leaves; smaller: fewer layers of the teacher; gru, lstm: a recurrent network."""
    layers: int = 1
    """smaller: layers taken evenly from the teacher; gru, lstm: stacked layers."""
    embedding: int = 32
    """gru, lstm: width of a token's vector."""
    units: int = 64
    """gru, lstm: width of each direction's state."""


@dataclass(frozen=True, kw_only=True)
class DistillSpec:
    """How the student learns from the teacher."""

    teacher: str | None = None
    """A model source; None: the model as it was before pruning."""
    mode: str = "logits"
    """logits, sequence (the teacher's own generations), or on-policy (the student's, scored by the teacher)."""
    divergence: str = "forward"
    """forward KL(teacher || student), reverse, or js."""
    temperature: float = 2.0
    """Both models' logits are divided by it before they are compared."""
    hard_weight: float = 0.1
    """Share of the loss on the true labels; the rest is the divergence."""
    hidden_weight: float = 0.0
    """Weight of the distance between hidden states."""
    attention_weight: float = 0.0
    """Weight of the distance between attention maps."""
    cache_top_k: int | None = None
    """Keep the teacher's k likeliest logits of each position on disk, with the mass of the tail."""
    student: StudentSpec = field(default_factory=StudentSpec)
    train: TrainSpec = field(default_factory=TrainSpec)


@dataclass(frozen=True, kw_only=True)
class DecideSpec:
    """How a classifier's scores become decisions on the device."""

    prior: tuple[tuple[str, float], ...] = ()
    """(class, base rate where it is deployed); empty: that of the training data."""
    costs: tuple[tuple[str, float], ...] = ()
    """(class, cost of missing it); with two classes they give the threshold."""


@dataclass(frozen=True, kw_only=True)
class CalibrateSpec:
    """How much text the importance matrix is measured on; it is measured when there is calibration text."""

    tokens: int = 16384
    context: int = 512
    """Tokens in a window."""


@dataclass(frozen=True, kw_only=True)
class OnnxSpec:
    """How the weights of an ONNX model become 8 or 4 bits."""

    block: int = 64
    """Weights that share a scale, along a row: 4 bits and 8 bits weight-only.  Smaller ones are closer and slower."""
    symmetric: bool = False
    """Scales alone; else a zero point for each block too."""
    algorithm: str = "search"
    """How a block's scale is found: search (least weighted error), rtn, hqq, gptq or k-quant."""
    accuracy_level: int = 4
    """What activations may become in products with 4 or 8 bits: 0, 1 float32; 2 float16; 3 bfloat16; 4 int8."""
    target: str | None = None
    """int8-dynamic, int8-static: the instructions it is for; None: safe on all of them."""
    observer: str = "min-max"
    """int8-static: how ranges of activations are measured."""
    sensitive: float = 0.1
    """Share of the weights, the most sensitive first, that stay a precision up: float for int8-dynamic and
    int8-static, 8 bits for int4-int8; of a classifier at most so many, and only while they are needed."""
    mobile: bool = False
    """Also write model.ort and the list of operators that a reduced build of ONNX Runtime needs."""


@dataclass(frozen=True, kw_only=True)
class QuantizeSpec:
    """The weights' format and types."""

    format: str = "gguf"
    scheme: str = "Q4_K_M"
    types: tuple[tuple[str, str], ...] = ()
    """(regular expression, type) for single tensors; the first that matches a name counts."""
    keep_going: bool = False
    """Write what can be written when a tensor has NaN or infinity."""
    onnx: OnnxSpec = field(default_factory=OnnxSpec)


@dataclass(frozen=True, kw_only=True)
class VariantSpec:
    """One of several artifacts that a recipe makes of one learned model."""

    name: str
    """Its bundle's directory, in the one that the build makes."""
    quantize: QuantizeSpec


@dataclass(frozen=True, kw_only=True)
class EvaluateSpec:
    """How quality is measured on held-out text."""

    context: int = 512
    """Tokens in a window; the second half of each is scored."""
    max_tokens: int | None = None
    """Stop after about so many tokens of text; None: all of it."""


@dataclass(frozen=True, kw_only=True)
class GateSpec:
    """Bounds that the artifact is held to; None: no bound."""

    max_kl_nats: float | None = None
    min_top1_agreement: float | None = None
    max_perplexity_ratio: float | None = None
    min_accuracy: float | None = None
    min_macro_f1: float | None = None
    min_level_agreement: float | None = None
    """ONNX with 4 or 8 bit products: how often the likeliest token is that of accuracy level 0; None: 0.9."""
    max_file_bytes: int | None = None
    min_decode_tokens_per_s: float | None = None
    max_peak_rss_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class BenchSpec:
    """What is timed on this machine."""

    prompt_tokens: tuple[int, ...] = (512,)
    decode_tokens: tuple[int, ...] = (128,)
    batch_sizes: tuple[int, ...] = (1,)
    """Classifiers: examples in one call."""
    threads: tuple[int, ...] = ()
    """Empty: the physical cores that the process may use."""
    repetitions: int = 5
    context: int | None = None
    """Tokens that the KV cache holds; None: what the longest run needs."""
