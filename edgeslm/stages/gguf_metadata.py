"""What a GGUF file says of its model: written for a Hugging Face directory, carried over from another GGUF file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgeslm.errors import ModelError
from edgeslm.stages.architectures import add_metadata, architecture_of
from edgeslm.stages.vocab import add_vocab, disagreements, read_json

if TYPE_CHECKING:
    from edgeslm.gguf_file import GgufFile
    from edgeslm.stages.checkpoint import Checkpoint
    from edgeslm.stages.plan import Plan
    from edgeslm.stages.rope import Config


def write_metadata(
    writer: Any, checkpoint: Checkpoint, config: Config, plan: Plan, warnings: list[str]
) -> dict[str, Any]:
    import gguf

    total, shared, expert, experts = writer.get_total_parameter_count()
    card = gguf.Metadata.load(None, checkpoint.path, None, total)
    if card.name is None or checkpoint.path.name != checkpoint.name:
        card.name = checkpoint.name
    if card.size_label is None:
        card.size_label = gguf.size_label(total, shared, expert, experts)
    if card.sampling_penalty_repeat is None and (checkpoint.path / "generation_config.json").is_file():
        generation = read_json(checkpoint.path / "generation_config.json")
        card.sampling_penalty_repeat = generation.get("repetition_penalty")
    writer.add_type(gguf.GGUFType.MODEL)
    card.set_gguf_meta_model(writer)
    add_metadata(writer, config)
    writer.add_file_type(plan.file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    vocab = add_vocab(writer, checkpoint.path, config, architecture_of(config).vocab)
    warnings += disagreements(checkpoint.path, vocab)
    rows = next(p.weight.shape[0] for p in plan.tensors if p.weight.name == "token_embd.weight")
    if rows != len(vocab.tokens):
        raise ModelError(f"the tokenizer has {len(vocab.tokens)} tokens, the embedding {rows} rows")
    return {
        "architecture": architecture_of(config).gguf,
        "context_length": config["max_position_embeddings"],
        "vocab_size": len(vocab.tokens),
        "tokenizer": f"{vocab.model}/{vocab.pre}",
        "licence": card.license,
    }


def copy_metadata(writer: Any, source: GgufFile, plan: Plan) -> dict[str, Any]:
    """The source's own metadata, tokenizer included, as it is; only what describes the types is new."""
    import gguf

    fresh = {"general.architecture", "general.file_type", "general.quantization_version", "general.alignment"}
    for key, field in source.fields.items():
        if key in fresh or key.startswith("split.") or field.value == []:
            continue
        if field.kind == "array" and field.item_kind == "array":
            raise ModelError(f"{source.path.name}: {key} is an array of arrays, which no GGUF reader expects")
        item = gguf.GGUFValueType[_GGUF_KINDS[field.item_kind]] if field.item_kind else None
        writer.add_key_value(key, field.value, gguf.GGUFValueType[_GGUF_KINDS[field.kind]], item)
    writer.add_file_type(plan.file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    tokens = source.get("tokenizer.ggml.tokens", [])
    return {
        "architecture": source.architecture,
        "context_length": source.get(f"{source.architecture}.context_length"),
        "vocab_size": len(tokens),
        "tokenizer": f"{source.get('tokenizer.ggml.model', 'none')}/{source.get('tokenizer.ggml.pre', 'default')}",
        "licence": source.get("general.license"),
    }


_GGUF_KINDS = {
    "u8": "UINT8", "i8": "INT8", "u16": "UINT16", "i16": "INT16", "u32": "UINT32", "i32": "INT32", "u64": "UINT64",
    "i64": "INT64", "f32": "FLOAT32", "f64": "FLOAT64", "bool": "BOOL", "str": "STRING", "array": "ARRAY",
}  # fmt: skip
