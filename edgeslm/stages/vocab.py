"""Tokenizer files of a Hugging Face directory as GGUF metadata.

Two kinds: byte-level BPE ("gpt2"), whose way of splitting text llama.cpp knows by a name, and
SentencePiece ("llama").  transformers is not needed: the tokenizers and sentencepiece libraries read the
files, the gguf library finds the special tokens.
Reference: get_vocab_base, _create_vocab_sentencepiece and LlamaHfVocab of llama.cpp at llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import json
import logging
import re
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeslm.errors import ModelError
from edgeslm.stages.splitting import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, pre_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

_ABSENT_SCORE, _ADDED_SCORE = -10000.0, -1000.0


@dataclass(frozen=True, kw_only=True)
class Vocab:
    """A tokenizer as GGUF stores it; tokens as text or, for SentencePiece, as UTF-8."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None = None
    add_bos: bool | None = None
    add_space_prefix: bool | None = None


def read_vocab(directory: Path, config: Mapping[str, Any], style: str) -> Vocab:
    """The vocabulary of a model directory, padded to the configuration's vocab_size.

    style: which files are looked for first: "bpe", "llama", "sentencepiece", "gemma" or "phi3".
    Raises ModelError for missing or unreadable tokenizer files, ids beyond vocab_size and a way of
    splitting text that llama.cpp does not know.
    """
    settings = (
        read_json(directory / "tokenizer_config.json") if _has(directory, "tokenizer_config.json") else {}
    )
    size = int(config["vocab_size"])
    prefix = settings.get("add_prefix_space") if style == "llama" else False if style == "gemma" else None
    byte_level = style == "bpe" or (style == "phi3" and settings.get("tokenizer_class") == "GPT2Tokenizer")
    if _has(directory, "tokenizer.model") and not byte_level:
        tokens, scores, types = _sentencepiece(directory, settings, size, also_json=style == "phi3")
        return Vocab(
            model="llama", pre="default", tokens=tokens, scores=scores, types=types, add_space_prefix=prefix
        )
    document = _tokenizer_json(directory)
    if _falls_back_to_bytes(document):
        found = _prepends_space(document) if prefix is None else prefix
        tokens, scores, types = _sentencepiece_like(directory, document, settings, size)
        return Vocab(
            model="llama", pre="default", tokens=tokens, scores=scores, types=types, add_space_prefix=found
        )
    return _byte_level(directory, document, settings, config, prefix)


def disagreements(directory: Path, vocab: Vocab) -> list[str]:
    """What the directory's own tokenizer files say differently; llama.cpp follows tokenizer.model."""
    if vocab.model != "llama" or not (
        _has(directory, "tokenizer.json") and _has(directory, "tokenizer.model")
    ):
        return []
    in_json = _prepends_space(read_json(directory / "tokenizer.json"))
    written = vocab.add_space_prefix is not False
    if in_json == written:
        return []
    return [
        f"tokenizer.json puts {'a' if in_json else 'no'} space before a text, the GGUF file "
        f"{'does' if written else 'does not'}: state add_prefix_space in tokenizer_config.json"
    ]


def add_vocab(writer: Any, directory: Path, config: Mapping[str, Any], style: str) -> Vocab:
    """Write tokenizer, special tokens and chat template into a gguf.GGUFWriter; returns what was written."""
    import gguf

    vocab = read_vocab(directory, config, style)
    if vocab.add_space_prefix is not None:
        writer.add_add_space_prefix(vocab.add_space_prefix)
    writer.add_tokenizer_model(vocab.model)
    writer.add_tokenizer_pre(vocab.pre)
    writer.add_token_list(vocab.tokens)
    if vocab.scores is not None:
        writer.add_token_scores(vocab.scores)
    writer.add_token_types(vocab.types)
    with _quiet("gguf.vocab"):
        special = gguf.SpecialVocab(directory, load_merges=vocab.scores is None, n_vocab=len(vocab.tokens))
    _follow_post_processor(special, directory)
    if style == "llama" and config["vocab_size"] == 49152:
        # StarCoder's vocabulary (SmolLM, Granite): its tokenizers never put BOS in front.
        special.add_special_token["bos"] = False
    elif vocab.add_bos is not None:
        special.add_special_token.setdefault("bos", vocab.add_bos)
    special.add_to_gguf(writer, quiet=True)
    return vocab


def _follow_post_processor(special: Any, directory: Path) -> None:
    """Whether BOS and EOS are added is what tokenizer.json does, not what tokenizer_config.json says of it.

    gguf-py after 0.19 goes by the same rules (SpecialVocab._try_load_from_tokenizer_json).
    """
    if not _has(directory, "tokenizer.json"):
        return
    document = read_json(directory / "tokenizer.json")
    settings = (
        read_json(directory / "tokenizer_config.json") if _has(directory, "tokenizer_config.json") else {}
    )
    known = {_text(settings.get(name)) for name in ("bos_token", "cls_token")} - {None}
    post_processor = document.get("post_processor") or {}
    adds: dict[str, bool] = {}
    for processor in post_processor.get("processors", [post_processor]):
        if processor.get("type") == "ByteLevel":
            adds.setdefault("bos", False)
            adds.setdefault("eos", False)
        elif processor.get("type") == "TemplateProcessing" and len(single := processor.get("single", [])) > 1:
            first, last = (part.get("SpecialToken", {}).get("id") for part in (single[0], single[-1]))
            if first and not known:
                number = next(
                    (t["id"] for t in document.get("added_tokens", []) if t["content"] == first), None
                )
                special.special_token_ids |= {} if number is None else {"bos": number, "cls": number}
            if first:
                adds["bos"] = first in known or not known
            if last:
                adds["eos"] = True
    special.add_special_token |= adds


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keep a library's remarks on templates for pairs of texts, which a decoder never sees, from the user."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.  Raises ModelError."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path.name} is not valid JSON: {error}", hint="copy the file again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path.name} does not hold a JSON object")
    return value


def _has(directory: Path, name: str) -> bool:
    return (directory / name).is_file()


def _tokenizer_json(directory: Path) -> dict[str, Any]:
    if not _has(directory, "tokenizer.json"):
        raise ModelError(
            f"no tokenizer in {directory.name}: neither tokenizer.json nor tokenizer.model",
            hint="copy them from the base model, or write tokenizer.json with "
            "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)",
        )
    document = read_json(directory / "tokenizer.json")
    if not isinstance(document.get("model"), dict) or document["model"].get("type", "BPE") != "BPE":
        kind = document["model"].get("type") if isinstance(document.get("model"), dict) else None
        raise ModelError(f"tokenizer.json holds a {kind} model; BPE and SentencePiece BPE are supported")
    return document


# --- byte-level BPE ---


def _byte_level(
    directory: Path,
    document: dict[str, Any],
    settings: dict[str, Any],
    config: Mapping[str, Any],
    prefix: bool | None,
) -> Vocab:
    tokenizer = _load_tokenizer(directory, settings)
    size = int(config["vocab_size"])
    by_id = {number: token for token, number in tokenizer.get_vocab(with_added_tokens=True).items()}
    if max(by_id) >= size:
        raise ModelError(
            f"the tokenizer has a token with id {max(by_id)}, the model has {size} embeddings",
            hint="the tokenizer belongs to another model, or the embeddings were not resized to it",
        )
    added = tokenizer.get_added_tokens_decoder()
    tokens, types = [], []
    for number in range(size):
        token = by_id.get(number, f"[PAD{number}]")
        kind = UNUSED if number not in by_id else NORMAL
        if number in added:
            token, kind = _added_token(tokenizer, added[number], settings)
        tokens.append(token)
        types.append(kind)
    granite = config["architectures"][0].startswith("Granite")
    pre, known = pre_tokenizer(tokenizer, document, "granite" if granite else "")
    bos = _text(settings.get("bos_token"))
    ids = tokenizer.encode("a").ids
    puts_bos = bool(ids) and bos is not None and ids[0] == tokenizer.token_to_id(bos)
    return Vocab(
        model="gpt2", pre=pre, tokens=tokens, types=types, add_space_prefix=prefix,
        add_bos=None if known else puts_bos,
    )  # fmt: skip


def _load_tokenizer(directory: Path, settings: dict[str, Any]) -> Any:
    """tokenizer.json with the tokens that tokenizer_config.json adds, as transformers loads it."""
    from tokenizers import AddedToken, Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    except Exception as error:  # the library raises bare Exception
        raise ModelError(f"tokenizer.json can't be read: {error}", hint="copy the file again") from error
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    decoder = settings.get("added_tokens_decoder", {})
    for _, data in sorted(decoder.items(), key=lambda item: int(item[0])):
        if data["content"] not in known:
            flags = {
                key: bool(data.get(key))
                for key in ("single_word", "lstrip", "rstrip", "normalized", "special")
            }
            tokenizer.add_tokens([AddedToken(data["content"], **flags)])
            known.add(data["content"])
    names = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
    wanted = [_text(settings.get(name)) for name in names]
    wanted += [_text(token) for token in settings.get("additional_special_tokens") or ()]
    for content in wanted:
        if content and content not in known:
            tokenizer.add_special_tokens([AddedToken(content, special=True, normalized=False)])
            known.add(content)
    return tokenizer


def _text(token: Any) -> str | None:
    """A special token of tokenizer_config.json: a string, or an object with its content."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _added_token(tokenizer: Any, token: Any, settings: dict[str, Any]) -> tuple[str, int]:
    text = token.content
    if not token.normalized:
        text = tokenizer.decode(
            tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False
        )
        if settings.get("clean_up_tokenization_spaces", False):
            text = _clean_up(text)
    if token.special or _looks_special(text):
        return text, CONTROL
    return text.replace("▁", " "), USER_DEFINED


def _clean_up(text: str) -> str:
    """transformers' clean_up_tokenization, which decoding applies where the tokenizer's settings say so."""
    for before, after in ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"),
                          (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re")):  # fmt: skip
        text = text.replace(before, after)
    return text


def _looks_special(text: str) -> bool:
    """Added tokens that ought to be control tokens though they are not marked so (does_token_look_special)."""
    return (
        text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        or (text.startswith(("<|", "<｜")) and text.endswith(("|>", "｜>")))  # noqa: RUF001
        or (text.startswith("<unused") and text.endswith(">"))
    )


# --- SentencePiece ---


def _sentencepiece(
    directory: Path, settings: dict[str, Any], size: int, *, also_json: bool
) -> tuple[list[str], list[float], list[int]]:
    """tokenizer.model, then added_tokens.json and the added tokens of the tokenizer's settings on top."""
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor()
    try:
        model.LoadFromFile(str(directory / "tokenizer.model"))
    except (OSError, RuntimeError) as error:
        raise ModelError(f"tokenizer.model can't be read: {error}", hint="copy the file again") from error
    tokens = [f"[PAD{number}]" for number in range(size)]
    scores, types = [_ABSENT_SCORE] * size, [UNUSED] * size
    for number in range(min(model.vocab_size(), size)):
        tokens[number], scores[number] = model.IdToPiece(number), model.GetScore(number)
        types[number] = _piece_type(model, number)

    def put(number: int, text: str, kind: int) -> None:
        if 0 <= number < size:
            tokens[number], scores[number], types[number] = text, _ADDED_SCORE, kind

    if _has(directory, "added_tokens.json"):
        for text, number in read_json(directory / "added_tokens.json").items():
            put(int(number), text, USER_DEFINED)
    added = [(int(number), data) for number, data in settings.get("added_tokens_decoder", {}).items()]
    if also_json and _has(directory, "tokenizer.json"):
        added += [
            (int(data["id"]), data)
            for data in read_json(directory / "tokenizer.json").get("added_tokens", [])
        ]
    for number, data in added:
        text = data["content"]
        if data.get("special") or (not also_json and _looks_special(text)):
            put(number, text, CONTROL)
        else:
            put(number, text if also_json else text.replace("▁", " "), USER_DEFINED)
    return tokens, scores, types


def _piece_type(model: Any, number: int) -> int:
    checks = (
        (model.IsUnknown, UNKNOWN),
        (model.IsControl, CONTROL),
        (model.IsUnused, UNUSED),
        (model.IsByte, BYTE),
    )
    return next((kind for check, kind in checks if check(number)), NORMAL)


def _falls_back_to_bytes(document: dict[str, Any]) -> bool:
    decoder = document.get("decoder") or {}
    return bool(document["model"].get("byte_fallback")) and decoder.get("type") == "Sequence"


def _prepends_space(document: dict[str, Any]) -> bool:
    """Whether a SentencePiece-like tokenizer.json puts a space before the text."""
    normalizer, splitter = document.get("normalizer") or {}, document.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    scheme = splitter.get("prepend_scheme", "never") if splitter.get("type") == "Metaspace" else "never"
    return any(step.get("type") == "Prepend" for step in steps) or scheme in ("first", "always")


def _sentencepiece_like(
    directory: Path, document: dict[str, Any], settings: dict[str, Any], size: int
) -> tuple[list[str], list[float], list[int]]:
    """A SentencePiece vocabulary out of tokenizer.json alone.

    SentencePiece merges the pair of the highest score first, BPE the pair of the lowest rank: so a
    piece's score is minus the rank of the merge that makes it.
    """
    tokenizer = _load_tokenizer(directory, settings)
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    if max(vocab.values()) >= size:
        raise ModelError(
            f"the tokenizer has a token with id {max(vocab.values())}, the model has {size} embeddings"
        )
    tokens = [f"[PAD{number}]" for number in range(size)]
    scores, types = [_ABSENT_SCORE] * size, [UNUSED] * size
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(document["model"].get("merges", [])):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault("".join(pair), rank)
    unknown = document["model"].get("unk_token")
    for text, number in vocab.items():
        tokens[number], scores[number] = text, -float(ranks.get(text, len(ranks)))
        types[number] = (
            BYTE if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", text) else UNKNOWN if text == unknown else NORMAL
        )
    for number, token in tokenizer.get_added_tokens_decoder().items():
        if types[number] not in (BYTE, UNKNOWN):
            special = token.special or _looks_special(token.content)
            tokens[number] = token.content if special else token.content.replace("▁", " ")
            scores[number], types[number] = _ADDED_SCORE, CONTROL if special else USER_DEFINED
    return tokens, scores, types
