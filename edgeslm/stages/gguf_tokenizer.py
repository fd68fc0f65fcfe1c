"""A Hugging Face tokenizer out of a GGUF file's own vocabulary, splitting text as llama.cpp does.

transformers' own GGUF loader rebuilds every llama-architecture tokenizer as SentencePiece and so
loses, among other things, how digits are split.  Reference: llama.cpp, src/llama-vocab.cpp.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from edgeslm.errors import ModelError
from edgeslm.stages.splitting import CONTROL, PUTS_BOS, UNKNOWN, USER_DEFINED, splitting_named

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from edgeslm.gguf_file import GgufFile


def build_tokenizer(file: GgufFile) -> Any:
    """A transformers PreTrainedTokenizerFast with the file's tokens, ids, special tokens and chat template.

    Raises ModelError when the file has no vocabulary or one of a kind that is not known here.
    """
    from transformers import PreTrainedTokenizerFast

    tokens = _tokens(file)
    kind = file.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise ModelError(
            f"{file.path.name}: no way to tokenize with a vocabulary of the kind {kind!r}", hint=_WAY_OUT
        )
    raw = _byte_level(file, tokens) if kind == "gpt2" else _sentencepiece(file, tokens)
    _add_special(raw, file, tokens)
    _add_template(raw, file, tokens, by_default=kind == "llama")
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    special = {name: _special(file, tokens, key) for name, key in names.items()}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, clean_up_tokenization_spaces=False, **special)
    tokenizer.chat_template = file.get("tokenizer.chat_template")
    return tokenizer


_WAY_OUT = "calibrate from the Hugging Face directory, or give an importance matrix made with llama-imatrix"


def _tokens(file: GgufFile) -> dict[str, int]:
    """Token -> id, in the order of ids."""
    tokens = file.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):
        raise ModelError(
            f"{file.path.name}: holds no tokenizer", hint="convert the model again, with its tokenizer"
        )
    ids = {token or f"[EMPTY_{number}]": number for number, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        raise ModelError(f"{file.path.name}: two of its {len(tokens)} tokens are the same")
    return ids


def _byte_level(file: GgufFile, tokens: dict[str, int]) -> Any:
    """Byte-level BPE: split one expression after the other, then merge bytes (Radford et al. 2019)."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    name = file.get("tokenizer.ggml.pre")
    splitting = splitting_named(name)
    if splitting is None:
        raise ModelError(f"{file.path.name}: no way to split text as {name!r} does", hint=_WAY_OUT)
    merges = []
    for merge in file.get("tokenizer.ggml.merges") or ():
        left, _, right = merge[1:].partition(" ")
        merges.append((merge[:1] + left, right))
    try:
        raw = Tokenizer(models.BPE(vocab=tokens, merges=merges, ignore_merges=splitting.whole_words))
    except Exception as error:  # tokenizers raises bare Exception
        raise ModelError(f"{file.path.name}: its merges do not fit its vocabulary: {error}") from error
    splits: list[Any] = [
        pre_tokenizers.Split(Regex(regex), behavior="isolated") for regex in splitting.expressions
    ]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    raw.decoder = decoders.ByteLevel()
    return raw


def _sentencepiece(file: GgufFile, tokens: dict[str, int]) -> Any:
    """SentencePiece BPE: the piece of the highest score first, bytes in place of unknown characters."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = file.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) < len(tokens):
        raise ModelError(f"{file.path.name}: its SentencePiece vocabulary has no scores")
    unknown = _special(file, tokens, "unknown")
    raw = Tokenizer(
        models.BPE(
            vocab=tokens,
            merges=list(_merges(tokens, scores)),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    steps: list[Any] = [normalizers.Replace(" ", "▁")]
    if file.get("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, normalizers.Prepend("▁"))
    raw.normalizer = normalizers.Sequence(steps)
    strip: list[Any] = [decoders.Strip(" ", 1, 0)] if len(steps) == 2 else []
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return raw


def _merges(tokens: dict[str, int], scores: Sequence[float]) -> Iterator[tuple[str, str]]:
    """Every way to make a piece of two others, pieces of a high score first."""
    for piece in sorted(tokens, key=lambda piece: -scores[tokens[piece]]):
        pairs = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        known = [(left, right) for left, right in pairs if left in tokens and right in tokens]
        yield from sorted(known, key=lambda pair: (tokens[pair[0]], tokens[pair[1]]))


def _add_special(raw: Any, file: GgufFile, tokens: dict[str, int]) -> None:
    """Control tokens are found in chats only, user-defined ones in any text; both before text is split."""
    from tokenizers import AddedToken

    types = file.get("tokenizer.ggml.token_type") or []
    # Attributes are not in the file: llama.cpp goes by the model's name here, too.
    strips = re.search("phi-?3", str(file.get("general.name", "")).lower()) is not None
    plain = ("<unk>", "<s>", "<|endoftext|>")
    for (text, _number), kind in zip(tokens.items(), types, strict=False):
        if kind not in (UNKNOWN, CONTROL, USER_DEFINED):
            continue
        special = kind != USER_DEFINED
        token = AddedToken(text, special=special, normalized=False, rstrip=strips and text not in plain)
        (raw.add_special_tokens if special else raw.add_tokens)([token])


def _add_template(raw: Any, file: GgufFile, tokens: dict[str, int], *, by_default: bool) -> None:
    """BOS before and EOS after a text, where the file or its kind of vocabulary says so."""
    from tokenizers import processors

    by_default = by_default or file.get("tokenizer.ggml.pre") in PUTS_BOS
    bos, eos = _special(file, tokens, "bos"), _special(file, tokens, "eos")
    parts = ["$A"]
    if bos and file.get("tokenizer.ggml.add_bos_token", by_default):
        parts.insert(0, bos)
    if eos and file.get("tokenizer.ggml.add_eos_token", False):
        parts.append(eos)
    if len(parts) > 1:
        names = [(part, tokens[part]) for part in parts if part != "$A"]
        second = [part.replace("$A", "$B:1") for part in parts]
        raw.post_processor = processors.TemplateProcessing(
            single=parts, pair=[*parts, *second], special_tokens=names
        )


def _special(file: GgufFile, tokens: dict[str, int], key: str) -> str | None:
    number = file.get(f"tokenizer.ggml.{key}_token_id")
    names = list(tokens)
    return names[number] if isinstance(number, int) and 0 <= number < len(names) else None
