"""Ways of splitting text that are recognized; the tokens are held against tokenizers in test_export_gguf."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from edgeslm.errors import ModelError
from edgeslm.stages.splitting import CONTROL, UNUSED, USER_DEFINED
from edgeslm.stages.vocab import read_vocab
from tests.models import TOKENIZERS

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.workstation

LLAMA = {"architectures": ["LlamaForCausalLM"]}


@pytest.mark.parametrize(
    ("style", "family", "pre"),
    [
        ("llama3", "Llama", "llama-bpe"),
        ("smollm", "Llama", "smollm"),
        ("gpt2", "Llama", "gpt-2"),
        ("qwen2", "Qwen2", "qwen2"),
        ("granite", "Granite", "refact"),
        ("olmo2", "Olmo2", "dbrx"),
    ],
)
def test_a_trained_tokenizer_is_known_by_its_structure(
    style: str, family: str, pre: str, tmp_path: Path
) -> None:
    size = len(TOKENIZERS[style](tmp_path))
    vocab = read_vocab(tmp_path, {"architectures": [f"{family}ForCausalLM"], "vocab_size": size}, "bpe")
    assert (vocab.model, vocab.pre) == ("gpt2", pre)


def test_the_real_smollm2_tokenizer_is_known_by_its_vocabulary(smollm2_gguf: Path, tmp_path: Path) -> None:
    from edgeslm.gguf_file import read_gguf
    from edgeslm.stages.gguf_tokenizer import build_tokenizer

    build_tokenizer(read_gguf(smollm2_gguf)).save_pretrained(tmp_path)
    vocab = read_vocab(tmp_path, LLAMA | {"vocab_size": 49152}, "llama")
    assert vocab.pre == "smollm"
    assert vocab.add_bos is None
    assert vocab.tokens == read_gguf(smollm2_gguf).get("tokenizer.ggml.tokens")
    assert vocab.types == read_gguf(smollm2_gguf).get("tokenizer.ggml.token_type")


def test_ids_without_a_token_are_padded_and_marked(tmp_path: Path) -> None:
    size = len(TOKENIZERS["gpt2"](tmp_path))
    vocab = read_vocab(tmp_path, LLAMA | {"vocab_size": size + 5}, "bpe")
    assert vocab.tokens[size:] == [f"[PAD{number}]" for number in range(size, size + 5)]
    assert vocab.types[size:] == [UNUSED] * 5


def test_added_tokens_of_the_settings_count(tmp_path: Path) -> None:
    size = len(TOKENIZERS["gpt2"](tmp_path))
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["added_tokens_decoder"] |= {
        str(size): {"content": "<|tool|>", "special": False, "normalized": False},
        str(size + 1): {"content": "two words", "special": False, "normalized": True},
    }
    path.write_text(json.dumps(settings))
    vocab = read_vocab(tmp_path, LLAMA | {"vocab_size": size + 2}, "bpe")
    assert vocab.tokens[size:] == ["<|tool|>", "two words"]
    # <|...|> is taken for a control token though it is not marked so, as llama.cpp's converter does.
    assert vocab.types[size:] == [CONTROL, USER_DEFINED]


def edited(path: Path, **changes: Any) -> None:
    document = json.loads((path / "tokenizer.json").read_text())
    (path / "tokenizer.json").write_text(json.dumps(document | changes))


def test_an_unknown_way_of_splitting_is_refused(tmp_path: Path) -> None:
    size = len(TOKENIZERS["gpt2"](tmp_path))
    edited(tmp_path, pre_tokenizer={"type": "Whitespace"})
    with pytest.raises(ModelError, match="no name for: Whitespace"):
        read_vocab(tmp_path, LLAMA | {"vocab_size": size}, "bpe")


def test_a_unigram_model_is_refused(tmp_path: Path) -> None:
    TOKENIZERS["gpt2"](tmp_path)
    edited(tmp_path, model={"type": "Unigram", "vocab": []})
    with pytest.raises(ModelError, match="Unigram"):
        read_vocab(tmp_path, LLAMA | {"vocab_size": 700}, "bpe")


def test_a_token_beyond_the_embeddings_is_refused(tmp_path: Path) -> None:
    size = len(TOKENIZERS["gpt2"](tmp_path))
    with pytest.raises(ModelError, match=f"id {size - 1}, the model has {size - 1}"):
        read_vocab(tmp_path, LLAMA | {"vocab_size": size - 1}, "bpe")
