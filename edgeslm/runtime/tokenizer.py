"""A language model's tokenizer.json: text to tokens, and the bytes of each token.

Text to tokens is Hugging Face's own library.  Tokens to bytes are taken one at a time, since a character
may be spread over several: byte-level BPE through the alphabet of GPT-2 (Radford et al. 2019, encoder.py,
bytes_to_unicode), SentencePiece by the rules of llama.cpp (src/llama-vocab.cpp, token_to_piece).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from edgeslm.errors import BundleError, EngineError, first_line

if TYPE_CHECKING:
    from pathlib import Path

TOKENIZER_NAME = "tokenizer.json"
SPACE = "▁"
"""SentencePiece's mark of a space."""
_BYTE = re.compile("<0x([0-9A-F]{2})>")


class TextTokenizer:
    """One tokenizer.json; V size of the vocabulary that the model knows."""

    def __init__(self, path: Path, vocab_size: int) -> None:
        """Raises BundleError for a file that is no tokenizer, or has tokens that the model lacks."""
        self._tokenizer = load_tokenizer(path)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        known = self._tokenizer.get_vocab_size(with_added_tokens=True)
        if known > vocab_size:
            raise BundleError(
                f"{path}: the tokenizer has {known} tokens, the model {vocab_size}", hint="build it again"
            )
        self._added = {
            token: (added.content, added.special)
            for token, added in self._tokenizer.get_added_tokens_decoder().items()
        }
        decoder = self._tokenizer.decoder
        self._alphabet = byte_alphabet() if _gives(decoder, ["Ġ"], " ") else None
        self._byte_tokens = _gives(decoder, ["<0x41>"], "A")

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of `text`; add_special: BOS/EOS as the model wants; parse_special: read <|...|> forms.

        What no tokenizer can encode (half of a surrogate pair) becomes a question mark.
        """
        self._tokenizer.encode_special_tokens = not parse_special
        clean = text.encode("utf-8", errors="replace").decode()
        ids: list[int] = self._tokenizer.encode(clean, add_special_tokens=add_special).ids
        return ids

    def bytes_of(self, token: int, *, special: bool = False) -> bytes:
        """The bytes of one token: none of an unused one, and of a control token only if `special`."""
        added = self._added.get(token)
        if added is not None:
            content, is_control = added
            return content.encode() if special or not is_control else b""
        piece = self._tokenizer.id_to_token(token)
        if piece is None:
            return b""
        if self._alphabet is not None:
            try:
                return bytes(self._alphabet[character] for character in piece)
            except KeyError:
                return str(piece).encode()
        if self._byte_tokens and (byte := _BYTE.fullmatch(piece)):
            return bytes([int(byte[1], 16)])
        return str(piece).replace(SPACE, " ").encode()


def load_tokenizer(path: Path) -> Any:
    """tokenizers.Tokenizer of a file; BundleError for one that is missing or damaged, EngineError without it."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise EngineError(f"tokenizers does not load: {error}", hint="pip install 'edgeslm[onnx]'") from error
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise BundleError(
            f"{path}: no usable tokenizer: {first_line(error)}", hint="build the bundle again"
        ) from error


def byte_alphabet() -> dict[str, int]:
    """GPT-2's reversible map, from the printable character that stands for a byte to the byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + place): byte for place, byte in enumerate(others)
    }


def _gives(decoder: Any, pieces: list[str], text: str) -> bool:
    """Whether a decoder, where there is one, makes `text` of `pieces`."""
    return decoder is not None and decoder.decode(pieces) == text
