"""How byte-level tokenizers split text before they merge: llama.cpp's names, and what they stand for.

Reference: regex_exprs and tokenizer_pre of llama.cpp src/llama-vocab.cpp, and the hashes of
get_vocab_base_pre in conversion/base.py, at the sources of llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from edgeslm.errors import ModelError

# Numbers of tokenizer.ggml.token_type.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

_CASELESS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_WORD = r"[^\r\n\p{L}\p{N}]?"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_MARKED_REST = _REST.replace(r"\p{L}\p{N}", r"\p{L}\p{M}\p{N}")
_SLASH_REST = _REST.replace(r"[\r\n]*|", r"[\r\n/]*|")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LOWER_LAST, _UPPER_FIRST = f"{_WORD}{_UPPER}*{_LOWER}+", f"{_WORD}{_UPPER}+{_LOWER}*"

DIGIT = r"\p{N}"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
LLAMA3 = _CONTRACTIONS + rf"|{_WORD}\p{{L}}+|\p{{N}}{{1,3}}" + _REST
QWEN2 = _CONTRACTIONS + rf"|{_WORD}\p{{L}}+|\p{{N}}" + _REST
QWEN35 = _CONTRACTIONS + rf"|{_WORD}[\p{{L}}\p{{M}}]+|\p{{N}}" + _MARKED_REST
TEKKEN = rf"{_LOWER_LAST}|{_UPPER_FIRST}|\p{{N}}" + _SLASH_REST
GPT4O = rf"{_LOWER_LAST}{_CONTRACTIONS}?|{_UPPER_FIRST}{_CONTRACTIONS}?|\p{{N}}{{1,3}}" + _SLASH_REST


@dataclass(frozen=True, kw_only=True)
class Splitting:
    """Expressions that split text one after the other, and the names that llama.cpp has for them."""

    expressions: tuple[str, ...]
    names: tuple[str, ...]
    """Values of tokenizer.ggml.pre; the first is written where a vocabulary is not a published one."""
    whole_words: bool = False
    """Whether a word of the vocabulary is taken without merging (ignore_merges)."""


SPLITTINGS = tuple(
    Splitting(expressions=expressions, names=tuple(names.split()), whole_words=whole_words)
    for expressions, whole_words, names in (
        ((GPT2,), False, "gpt-2 phi-2 olmo mpt jais trillion granite-docling roberta-bpe"),
        ((DIGIT, GPT2), False, "smollm refact starcoder command-r codeshell exaone minerva-7b mellum2"),
        ((LLAMA3,), True, "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 glm4"),
        ((LLAMA3,), False, "dbrx smaug-bpe chatglm-bpe"),
        ((QWEN2,), False, "qwen2 stablelm2 deepseek-r1-qwen megrez hunyuan solar-open grok-2"),
        ((QWEN35,), False, "qwen35"),
        ((TEKKEN,), True, "tekken"),
        ((GPT4O,), False, "gpt-4o llama4 kanana2"),
    )
)
PUTS_BOS = (
    "llama-bpe",
    "llama3",
    "llama-v3",
    "falcon3",
    "falcon-h1",
    "pixtral",
    "midm-2.0",
    "lfm2",
    "tekken",
)
"""Where BOS comes first although tokenizer.ggml.add_bos_token is silent."""


def splitting_named(name: object) -> Splitting | None:
    """What a value of tokenizer.ggml.pre stands for; None where it is not known here."""
    return next((splitting for splitting in SPLITTINGS if name in splitting.names), None)


def pre_tokenizer(tokenizer: Any, document: dict[str, Any], family: str) -> tuple[str, bool]:
    """(llama.cpp's name for how a tokenizer.json splits text, whether it is a published vocabulary).

    A published vocabulary is known by the ids that it gives a probe text; any other, such as a
    pruned or a newly trained one, by the structure of its tokenizer.json.
    tokenizer: the tokenizers.Tokenizer of `document`.  family: llama.cpp's name of the architecture.
    Raises ModelError for a way of splitting that llama.cpp has no name for.
    """
    table = json.loads((files("edgeslm.stages") / "pre_tokenizers.json").read_text(encoding="utf-8"))
    ids = tokenizer.encode(table["probe"]).ids
    name = table["names"].get(hashlib.sha256(str(ids).encode()).hexdigest())
    if name is not None:
        return name, True
    expressions = _expressions(document.get("pre_tokenizer") or {})
    whole_words = bool(document["model"].get("ignore_merges"))
    same = [splitting for splitting in SPLITTINGS if splitting.expressions == expressions]
    if not same:
        raise ModelError(
            "tokenizer.json splits text in a way that llama.cpp has no name for: "
            f"{' then '.join(expressions) or 'none'}",
            hint="convert the model with a llama.cpp that knows it, then `edgeslm quantize file.gguf`",
        )
    splitting = next((one for one in same if one.whole_words == whole_words), same[0])
    if family == "granite" and "refact" in splitting.names:
        return "refact", False
    return splitting.names[0], False


def _expressions(pre_tokenizer: dict[str, Any]) -> tuple[str, ...]:
    """The steps of a pre-tokenizer as the expressions that they amount to; others by their names."""
    parts = []
    for step in pre_tokenizer.get("pretokenizers", [pre_tokenizer]):
        kind = step.get("type")
        if kind == "Digits":
            parts.append(DIGIT if step.get("individual_digits") else "runs of digits")
        elif kind == "Split":
            pattern = step.get("pattern", {}).get("Regex", "")
            plain = step.get("behavior") == "Isolated" and not step.get("invert")
            parts.append(
                pattern.replace(_CASELESS, _CONTRACTIONS) if plain else f"Split, {step.get('behavior')}"
            )
        elif kind == "ByteLevel":
            if step.get("add_prefix_space"):
                parts.append("a leading space")
            if step.get("use_regex", True):
                parts.append(GPT2)
        else:
            parts.append(str(kind))
    return tuple(parts)
