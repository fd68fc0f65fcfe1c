"""A tiny BERT with a WordPiece tokenizer, and texts of classes that are easy to tell apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

TOPICS = {
    "bread": ("flour", "yeast", "oven", "dough", "bake", "crust"),
    "sea": ("wave", "ship", "sail", "harbour", "tide", "salt"),
    "sky": ("cloud", "wind", "rain", "thunder", "star", "moon"),
}
FILLER = ("the", "a", "and", "with", "of", "in", "to", "some")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def write_encoder(path: Path, *, hidden: int = 32, layers: int = 2, seed: int = 0) -> Path:
    """A model directory as sentence-transformers' encoders are: BertModel, no head, a fast tokenizer."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    words = [*SPECIAL, *FILLER, *(word for topic in TOPICS.values() for word in topic)]
    letters = [letter for code in range(97, 123) for letter in (chr(code), f"##{chr(code)}")]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys([*words, *letters]))}
    raw = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    raw.normalizer = normalizers.BertNormalizer(lowercase=True)
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.decoder = decoders.WordPiece()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = transformers.BertTokenizerFast(tokenizer_object=raw, model_max_length=64)
    fast.save_pretrained(path)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=2 * hidden, max_position_embeddings=64, pad_token_id=0, initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(seed)
    transformers.BertModel(config).eval().save_pretrained(path, safe_serialization=True)
    return path


def topic_texts(
    count: int, *, classes: Sequence[str] = tuple(TOPICS), seed: int = 0
) -> Iterator[tuple[str, str]]:
    """(text, class) pairs: some words of the topic among others."""
    random = np.random.default_rng(seed)
    for index in range(count):
        label = classes[index % len(classes)]
        words = [*random.choice(TOPICS[label], 4), *random.choice(FILLER, random.integers(1, 6))]
        yield " ".join(random.permutation(words)), label


def examples(
    path: Path, tokenizer: Any, count: int, *, classes: Sequence[str] = tuple(TOPICS), seed: int = 0
) -> Any:
    """`topic_texts` as TextExamples in the new directory `path`."""
    from edgeslm.stages.labelled import Labelled, tokenize_examples

    rows = (Labelled(text, label, "") for text, label in topic_texts(count, classes=classes, seed=seed))
    return tokenize_examples(rows, tokenizer, classes, 64, path)
