"""Tokenizers built of GGUF files, held against llama.cpp's own tokenization."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeslm.errors import ModelError
from edgeslm.gguf_file import read_gguf

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.workstation

FAMILY = {
    "llama3": "llama", "smollm": "llama", "gpt2": "llama", "smollm3": "smollm3", "qwen2": "qwen2",
    "granite": "granite", "olmo2": "olmo2", "mistral": "mistral", "phi3": "phi3", "gemma": "gemma2",
}  # fmt: skip


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A GGUF file of a tiny model with a tokenizer of the given style."""
    pytest.importorskip("transformers")
    pytest.importorskip("llama_cpp")
    from edgeslm.specs import QuantizeSpec
    from edgeslm.stages import export_gguf
    from edgeslm.stages.checkpoint import resolve
    from tests.models import write_hf_model

    made: dict[str, Path] = {}

    def exported(style: str) -> Path:
        if style not in made:
            directory = tmp_path_factory.mktemp(style)
            name = "tiny-phi3" if style == "phi3" else style  # llama.cpp goes by the name there
            source = write_hf_model(directory / name, FAMILY[style], layers=1, tokenizer=style)
            spec = QuantizeSpec(scheme="F32", keep_going=True)
            made[style] = export_gguf.run(resolve(str(source)), spec, directory / "m.gguf").path
        return made[style]

    return exported


def llama(path: Path) -> Any:
    from llama_cpp import Llama

    return Llama(str(path), vocab_only=True, verbose=False)


def assert_same(path: Path, texts: tuple[str, ...]) -> None:
    """Equal ids with and without BOS, with and without special tokens."""
    from edgeslm.stages.gguf_tokenizer import build_tokenizer

    theirs, ours = llama(path), build_tokenizer(read_gguf(path))
    for text in texts:
        for special in (False, True):
            for bos in (False, True):
                wanted = theirs.tokenize(text.encode(), add_bos=bos, special=special)
                got = ours.encode(text, add_special_tokens=bos, split_special_tokens=not special)
                assert got == wanted, (text, special, bos)


@pytest.mark.parametrize("style", FAMILY)
def test_hostile_texts_give_llama_cpps_tokens(export: Callable[[str], Path], style: str) -> None:
    from tests.models import CORPUS, HOSTILE_TEXTS

    assert_same(export(style), (*HOSTILE_TEXTS, CORPUS))


def test_the_real_model_gives_llama_cpps_tokens(smollm2_gguf: Path) -> None:
    pytest.importorskip("llama_cpp")
    pytest.importorskip("transformers")
    from pydoc_data.topics import topics

    from tests.models import CORPUS, HOSTILE_TEXTS

    assert_same(smollm2_gguf, (*HOSTILE_TEXTS, CORPUS, *list(topics.values())[::10]))


@pytest.mark.parametrize("style", ["llama3", "smollm", "qwen2", "mistral", "gemma"])
def test_any_text_gives_llama_cpps_tokens(export: Callable[[str], Path], style: str) -> None:
    from edgeslm.stages.gguf_tokenizer import build_tokenizer

    path = export(style)
    theirs, ours = llama(path), build_tokenizer(read_gguf(path))

    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
    @given(st.text(st.characters(exclude_categories=("Cs", "Cn"), exclude_characters="\0"), max_size=60))
    def check(text: str) -> None:
        wanted = theirs.tokenize(text.encode(), add_bos=False, special=True)
        assert ours.encode(text, add_special_tokens=False) == wanted

    check()


@pytest.mark.parametrize("style", FAMILY)
def test_special_tokens_and_template_come_along(export: Callable[[str], Path], style: str) -> None:
    from transformers import AutoTokenizer

    from edgeslm.stages.gguf_tokenizer import build_tokenizer

    path = export(style)
    file, tokenizer = read_gguf(path), build_tokenizer(read_gguf(path))
    original = AutoTokenizer.from_pretrained(next(p for p in path.parent.iterdir() if p.is_dir()))
    assert len(tokenizer) == len(file.get("tokenizer.ggml.tokens"))
    assert (tokenizer.bos_token, tokenizer.eos_token) == (original.bos_token, original.eos_token)
    assert tokenizer.chat_template == original.chat_template
    messages = [{"role": "user", "content": "Hello there!"}, {"role": "assistant", "content": "Hi 12"}]
    assert tokenizer.apply_chat_template(messages) == original.apply_chat_template(messages)
    text = "def f(x):  return 2 * x  # naïve 你好 🎉"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)).strip() == text


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tokenizer.ggml.model", "rwkv", "kind 'rwkv'"),
        ("tokenizer.ggml.model", None, "kind None"),
        ("tokenizer.ggml.pre", "never-heard-of", "never-heard-of"),
        ("tokenizer.ggml.tokens", None, "holds no tokenizer"),
        ("tokenizer.ggml.tokens", ["a", "b", "a"], "two of its 3 tokens are the same"),
        ("tokenizer.ggml.merges", ["zz qq"], "do not fit"),
    ],
)
def test_a_vocabulary_that_is_not_known_has_a_way_out(
    tiny_gguf: Path, key: str, value: Any, message: str
) -> None:
    pytest.importorskip("transformers")
    from dataclasses import replace

    from edgeslm.gguf_file import Field
    from edgeslm.stages.gguf_tokenizer import build_tokenizer

    file = read_gguf(tiny_gguf)
    fields = {name: field for name, field in file.fields.items() if name != key}
    if value is not None:
        fields[key] = Field(kind="str", item_kind=None, value=value)
    with pytest.raises(ModelError, match=message):
        build_tokenizer(replace(file, fields=fields))


def test_a_sentencepiece_vocabulary_needs_scores(export: Callable[[str], Path]) -> None:
    from dataclasses import replace

    from edgeslm.stages.gguf_tokenizer import build_tokenizer

    file = read_gguf(export("mistral"))
    fields = {name: field for name, field in file.fields.items() if name != "tokenizer.ggml.scores"}
    with pytest.raises(ModelError, match="no scores"):
        build_tokenizer(replace(file, fields=fields))
