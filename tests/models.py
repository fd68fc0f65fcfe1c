"""Tiny Hugging Face models of every supported family: random weights, a tokenizer trained on the spot.

The tokenizers have the structure of the real families' (normalizer, splitting, byte level or
SentencePiece with byte fallback, added tokens), only smaller vocabularies; norms and biases are
random too, so that a tensor that a conversion forgets or mixes up shows in the logits.
"""

# ruff: noqa: RUF001  (the look-alike letters are the point of the texts)
from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3_CHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA_CHAT = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>"
    "{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{{ message['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL_CHAT = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST] "
    "{{ message['content'] }} [/INST]{% else %}{{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
PHI3_CHAT = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")

CORPUS = (
    "The quick brown fox jumps over the lazy dog; isn't it? We'll see, they've said, I'm sure he'd agree.\n"
    "def fibonacci(n: int) -> int:\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n\n"
    "In 2024 there were 12345678 words, 3.14159 constants and 99.9% of <html> tags && || != == {}[]().\n"
    "Übergrößenträger naïve café résumé. Привет, мир! Γειά σου. 你好，世界。こんにちは世界。안녕하세요 "
    "🎉🚀👩‍💻\n"
    "the then there these those this that with without within and an any many man woman inner into line\n"
    "\tTabs\tand   several    spaces     in      a       row\r\n\r\nWindows line ends, too.\n"
) * 20

HOSTILE_TEXTS = (
    "",
    " ",
    "  ",
    "   leading and trailing   ",
    "\n\n\n \n\t\r\n x\r\r\ny \n z",
    "Hello world! It's WE'LL they'VE I'm he'D 's 'S ''",
    "1 12 123 1234 12345678 3.14 1,000,000 ½ ² ٣ ४ 10th 0x1F",
    "你好，世界。日本語のテキスト한국어 ไทย العربية עברית हिन्दी",
    "😀👩‍👩‍👧‍👦🏳️‍🌈 \u00e9 e\u0301 ﬁ \u212b \u200b\u00a0\u3000\u2028x \ufeffy",
    "def f(x):\n    if x != 1 and y >= 2:\n\t\treturn {'a': [x**2, \"b\\n\"]}  # café\n",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "<s> </s> <unk> <bos><eos><pad> <|begin_of_text|>x<|eot_id|> <start_of_turn>a <|user|> b<|end|>\nc",
    "a<0x0A>b ▁▁under ▁ score ĠĊ",
    "snake_case CamelCase HTTPServer2 --long-option=/usr/lib/x86_64 a@b.c https://e.org/?q=1&r=%20#z",
    "_" * 40 + "=" * 33 + "." * 17 + " " * 70 + "x" + "\n" * 9,
    "\x00\x01\x7f\x80 control ÿþ \U0001f9ff\U000e0041 𝔘𝔫𝔦",
)
"""Texts that have broken tokenizers before: every tokenizer of an artifact must agree on them."""


# family: (transformers model class prefix, tokenizer style, config of the family's own)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("Llama", "llama3", {"rope_theta": 500000.0}),
    "mistral": ("Mistral", "mistral", {"sliding_window": None, "rope_theta": 10000.0}),
    "smollm3": (
        "SmolLM3",
        "smollm3",
        {"rope_theta": 5e6, "no_rope_layer_interval": 2, "use_sliding_window": False},
    ),
    "qwen2": ("Qwen2", "qwen2", {"rope_theta": 1000000.0, "use_sliding_window": False}),
    "qwen3": ("Qwen3", "qwen2", {"rope_theta": 1000000.0, "head_dim": 32}),
    "gemma2": ("Gemma2", "gemma", {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64}),
    "gemma3_text": ("Gemma3", "gemma", {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64}),
    "phi3": ("Phi3", "phi3", {"sliding_window": 128, "original_max_position_embeddings": 512}),
    "granite": (
        "Granite",
        "granite",
        {
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.0625,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
        },
    ),
    "olmo2": ("Olmo2", "olmo2", {"rope_theta": 500000.0}),
}  # fmt: skip
CLASS_SUFFIX = {"gemma3_text": ("Gemma3TextConfig", "Gemma3ForCausalLM")}


def write_hf_model(
    path: Path,
    family: str,
    *,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    intermediate: int = 128,
    context: int = 512,
    tied: bool = True,
    dtype: str = "float32",
    seed: int = 0,
    tokenizer: str | None = None,
    max_shard_size: str = "5GB",
    **config_overrides: Any,
) -> Path:
    """A model directory as from the hub: config, safetensors, tokenizer, chat template.

    tokenizer: another style than the family's ("smollm", "gpt2", ...), see TOKENIZERS.
    """
    import torch
    import transformers

    prefix, style, own = FAMILIES[family]
    path.mkdir(parents=True, exist_ok=True)
    fast = TOKENIZERS[tokenizer or style](path)
    config_class, model_class = CLASS_SUFFIX.get(family, (f"{prefix}Config", f"{prefix}ForCausalLM"))
    settings = {
        "vocab_size": len(fast),
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
        "max_position_embeddings": context,
        "tie_word_embeddings": tied,
        "bos_token_id": fast.bos_token_id,
        "eos_token_id": fast.eos_token_id,
        "pad_token_id": fast.pad_token_id,
        **own,
        **config_overrides,
    }
    config = getattr(transformers, config_class)(**settings)
    torch.manual_seed(seed)
    model = getattr(transformers, model_class)(config).eval()
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            # Large enough that attention and the output are not uniform; norms and biases are random too.
            noise = torch.randn(parameter.shape)
            if parameter.ndim == 1:
                parameter.add_(noise * 0.1)
            else:
                scale = 0.25 if "embed_tokens" in name else parameter.shape[-1] ** -0.5
                parameter.copy_(noise * scale)
    model.tie_weights()
    model.to(getattr(torch, dtype)).save_pretrained(
        path, safe_serialization=True, max_shard_size=max_shard_size
    )
    return path


def _byte_level(split: str | None, special: tuple[str, ...], *, digits: bool = False, nfc: bool = False,
                ignore_merges: bool = False, template: str | None = None) -> Any:  # fmt: skip
    """A byte-level BPE tokenizer (Radford et al. 2019) with the given splitting."""
    from tokenizers import (
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    parts: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    if split:
        parts.append(pre_tokenizers.Split(Regex(split), behavior="isolated", invert=False))
    parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=split is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=True, trim_offsets=True, use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=list(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{template} $A", pair=f"{template} $A {template} $B",
            special_tokens=[(template, tokenizer.token_to_id(template))],
        )  # fmt: skip
    else:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def _save(tokenizer: Any, path: Path, class_name: str, chat: str, **arguments: Any) -> Any:
    import transformers

    fast = getattr(transformers, class_name)(tokenizer_object=tokenizer, **arguments)
    fast.chat_template = chat
    fast.model_max_length = 512
    fast.save_pretrained(path)
    return transformers.AutoTokenizer.from_pretrained(path)


def _llama3(path: Path) -> Any:
    special = (
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    )
    raw = _byte_level(LLAMA3_SPLIT, special, ignore_merges=True, template="<|begin_of_text|>")
    return _save(
        raw, path, "PreTrainedTokenizerFast", LLAMA3_CHAT, bos_token=special[0], eos_token=special[4]
    )


def _smollm3(path: Path) -> Any:
    special = ("<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>")
    raw = _byte_level(LLAMA3_SPLIT, special, ignore_merges=True)
    return _save(raw, path, "PreTrainedTokenizerFast", CHATML, eos_token=special[3], pad_token=special[3])


def _smollm(path: Path) -> Any:
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    raw = _byte_level(None, special, digits=True)
    return _save(raw, path, "GPT2TokenizerFast", CHATML, bos_token=special[1], eos_token=special[2],
                 unk_token=special[0], pad_token=special[2])  # fmt: skip


def _gpt2(path: Path) -> Any:
    raw = _byte_level(None, ("<|endoftext|>",))
    return _save(raw, path, "GPT2TokenizerFast", CHATML, bos_token="<|endoftext|>", eos_token="<|endoftext|>",
                 unk_token="<|endoftext|>")  # fmt: skip


def _qwen2(path: Path) -> Any:
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    raw = _byte_level(QWEN2_SPLIT, (), nfc=True)
    from tokenizers import AddedToken

    raw.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    return _save(raw, path, "Qwen2TokenizerFast", CHATML, eos_token=special[2], pad_token=special[0],
                 bos_token=None, unk_token=None)  # fmt: skip


def _granite(path: Path) -> Any:
    special = (
        "<|end_of_text|>",
        "<fim_prefix>",
        "<fim_middle>",
        "<fim_suffix>",
        "<|im_start|>",
        "<|im_end|>",
    )
    raw = _byte_level(None, special, digits=True)
    return _save(raw, path, "GPT2TokenizerFast", CHATML, bos_token=special[0], eos_token=special[0],
                 unk_token=special[0], pad_token=special[0])  # fmt: skip


def _olmo2(path: Path) -> Any:
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
    raw = _byte_level(LLAMA3_SPLIT, special)
    return _save(raw, path, "GPT2TokenizerFast", CHATML, bos_token=special[0], eos_token=special[0],
                 unk_token=special[0], pad_token=special[3])  # fmt: skip


def _sentencepiece(path: Path, **arguments: Any) -> None:
    """Writes tokenizer.model: SentencePiece BPE with byte fallback and split digits, as in Llama 2."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=700,
        hard_vocab_limit=False,
        byte_fallback=True,
        split_digits=True,
        character_coverage=0.99,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
        num_threads=1,
        **arguments,
    )
    (path / "tokenizer.model").write_bytes(model.getvalue())


def _convert(path: Path, class_name: str, chat: str, **arguments: Any) -> Any:
    """The fast tokenizer that transformers converts tokenizer.model into, saved beside it."""
    import transformers

    fast = getattr(transformers, class_name)(str(path / "tokenizer.model"), **arguments)
    fast.chat_template = chat
    fast.model_max_length = 512
    fast.save_pretrained(path)
    return transformers.AutoTokenizer.from_pretrained(path)


def _mistral(path: Path) -> Any:
    _sentencepiece(path, unk_id=0, bos_id=1, eos_id=2, pad_id=-1)
    return _convert(path, "LlamaTokenizerFast", MISTRAL_CHAT, legacy=True, add_prefix_space=True)


def _phi3(path: Path) -> Any:
    from tokenizers import AddedToken

    _sentencepiece(path, unk_id=0, bos_id=1, eos_id=2, pad_id=-1)
    fast = _convert(
        path, "LlamaTokenizerFast", PHI3_CHAT, legacy=True, add_bos_token=False, add_prefix_space=True
    )
    names = ("<|endoftext|>", "<|assistant|>", "<|user|>", "<|system|>", "<|end|>")
    fast.add_tokens(
        [AddedToken(name, special=True, normalized=False, rstrip=name != "<|endoftext|>") for name in names],
        special_tokens=True,
    )
    fast.eos_token = fast.pad_token = "<|endoftext|>"
    fast.save_pretrained(path)
    return type(fast).from_pretrained(path)


def _gemma(path: Path) -> Any:
    _sentencepiece(path, pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>",
                   bos_piece="<bos>", add_dummy_prefix=False,
                   user_defined_symbols=["<mask>", "<start_of_turn>", "<end_of_turn>", "\n"])  # fmt: skip
    return _convert(path, "GemmaTokenizerFast", GEMMA_CHAT)


TOKENIZERS = {
    "llama3": _llama3,
    "smollm3": _smollm3,
    "smollm": _smollm,
    "gpt2": _gpt2,
    "qwen2": _qwen2,
    "granite": _granite,
    "olmo2": _olmo2,
    "mistral": _mistral,
    "phi3": _phi3,
    "gemma": _gemma,
}
