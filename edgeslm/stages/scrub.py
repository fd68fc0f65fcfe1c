"""Masks personal data in texts before training: e-mail addresses, phone and card numbers, IBANs, IP addresses, names.

What has a check digit is checked (ISO 7064 mod 97-10 for an IBAN, Luhn for a card), so that ordinary
numbers stay.  Counts are kept, values never.

A dotted quad such as 1.2.3.4 counts as an IP address, except after a word that makes it a version or a
section ("version 1.2.3.4", "v1.2.3.4", "Chrome/86.0.4240.198", "== 1.2.3.4", "section 1.2.3.4").
A phone number has a plus or a zero in front, the shape 555-123-4567, or a word such as "tel" before it;
dates, times, versions and amounts have none of these.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections import Counter
from dataclasses import replace
from functools import cache, lru_cache
from ipaddress import AddressValueError, IPv4Address, IPv6Address
from pathlib import Path
from typing import TYPE_CHECKING

from edgeslm.errors import DataError
from edgeslm.stages.tables import locate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from edgeslm.specs import ScrubSpec
    from edgeslm.stages.data import Document
    from edgeslm.stages.labelled import Labelled

    Check = Callable[[re.Match[str]], int]

MASKS = {"emails": "[EMAIL]", "ibans": "[IBAN]", "cards": "[CARD]", "addresses": "[IP]", "phones": "[PHONE]",
         "names": "[NAME]"}  # fmt: skip
"""Kind, as ScrubSpec has it, to what stands in its place; in the order in which they are looked for."""

EMAIL = re.compile(
    r"(?<![\w.+%'-])[\w.+%'-]++\\?@(?:[\w-]{1,63}\.){1,8}(?:xn--[\w-]{1,59}|[^\W\d_]{2,63})",
)
IBAN = re.compile(r"(?<![^\W_])[A-Za-z]{2}\d{2}(?:[ -]?[A-Za-z0-9]){11,30}+")
IBAN_LENGTHS = {country: int(length) for country, length in re.findall(
    r"(\w\w)(\d\d)",
    "AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BI27 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DJ27 DK18 DO28 EE20 EG29 "
    "ES24 FI18 FK18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HN28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30 KW30 KZ20 "
    "LB28 LC32 LI21 LT20 LU20 LV21 LY25 MC27 MD24 ME22 MK19 MN20 MR27 MT31 MU30 NI28 NL18 NO15 OM23 PK24 PL28 PS29 "
    "PT25 QA29 RO24 RS22 RU33 SA24 SC31 SD18 SE24 SI19 SK24 SM27 SO23 ST25 SV28 TL23 TN24 TR26 UA29 VA22 VG24 XK20 "
    "YE30",
)}  # fmt: skip
"""Country to the length of its IBANs: SWIFT's IBAN registry."""
CARD = re.compile(r"(?<![\w-])(?<!\d[.,])[2-6]\d{3}(?:[ -]?\d){9,15}+")
CARD_LENGTHS = {"2": (16,), "3": (19, 16, 15, 14), "4": (19, 16, 13), "5": (16,), "6": (19, 18, 17, 16)}
"""First digit of a card number to its lengths, the longest first (ISO/IEC 7812-1)."""
QUAD = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?!\w|\.\d|-[^\W\d_])")
NOT_AN_ADDRESS = re.compile(
    r"(?:\b(?:v|ver|version|versions|release|rel|rev|section|sections|sec|chapter|clause|table|figure)\.?|§+"
    r"|[=<>~!]=|[~^]|[^\W\d_][/@_-])\s*$",
    re.IGNORECASE,
)
COLONS = re.compile(
    r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}(?:[0-9A-Fa-f]{1,4}|(?:\d{1,3}\.){3}\d{1,3})?(?![\w:])"
)

WORD = (
    r"\b(?:tel|telephone|telefon|phone|fax|telefax|mobile|mobil|cell|handy|call|dial|whatsapp|sms)\b"
    r"(?:[.:#]| ?(?:no|nr|number|us|me|at|on|or|is)\b){0,3}[.: ]{0,3}"
)
PHONE = re.compile(
    rf"(?P<word>(?i:{WORD}))(?P<said>\+?\(?\d(?:[ ./()-]{{0,3}}\d){{5,14}})(?![\w-])"
    r"|(?<![\w+.])\+[1-9](?:[ ./()-]{0,3}\d){7,14}(?![\w-])"  # E.164
    r"|(?<![\w.,:/-])(?P<zeros>00[1-9](?:[ ./()-]{0,3}\d){8,14})(?![\w-])"
    r"|(?<![\w.,:/-])\(?0[1-9]\d{0,4}\)?[ /-]{1,3}\d{3,8}(?:[ -]\d{2,5}){0,3}(?![\w-]|[.,:]\d)"  # with area code
    r"|(?<![\w.,:/-])0[1-9](?P<by>[ .-])\d\d(?:(?P=by)\d\d){3}(?![\w-]|(?P=by)\d)"  # five pairs, as in France
    r"|(?<![\w.,:/-])0[1-9]\d{8,9}(?![\w-]|[.,:]\d)"
    r"|(?<![\w.,:/-])(?:1[ .-])?(?:\(\d{3}\) ?\d{3}[ .-]\d{4}|\d{3}(?P<dash>[.-])\d{3}(?P=dash)\d{4})(?![\w-]|[.,]\d)"
)
DATE = re.compile(r"\d{1,4}([./-])\d{1,2}\1\d{1,4}(?!\d)")
ZIP_CODE = re.compile(r"0\d{4}-\d{4}")
PHONE_DIGITS, NATIONAL_DIGITS = range(9, 16), range(9, 13)
"""Digits of a phone number with its area code: at most 15 (ITU-T E.164); with a zero in front at most 12."""
NAME_GAP = re.compile(r"[\s'\u2019.-]{1,3}")


class Scrubber:
    """Masks what a ScrubSpec names.  counts: kind to how many were masked so far."""

    def __init__(self, spec: ScrubSpec, names: Sequence[str] = ()) -> None:
        self.counts: Counter[str] = Counter()
        self._kinds = [kind for kind in MASKS if kind != "names" and getattr(spec, kind)]
        self._names = _name_table(names)

    def scrub(self, text: str) -> str:
        """The text with a mark such as [EMAIL] in place of each find."""
        for kind in self._kinds:
            for needed, pattern, check in SEARCHES[kind]:
                if needed(text):
                    text = self._replace(kind, text, pattern, check)
        return self._without_names(text) if self._names else text

    def document(self, document: Document) -> Document:
        """A document with its texts scrubbed; the prompt apart, so that it stays what the text begins with."""
        if document.messages:
            messages = tuple({**one, "content": self.scrub(one["content"])} for one in document.messages)
            return replace(document, messages=messages)
        text, prompt = document.text or "", document.prompt
        if prompt is None:
            return replace(document, text=self.scrub(text))
        completion = self.scrub(text[len(prompt) :])
        prompt = self.scrub(prompt)
        return replace(document, text=prompt + completion, prompt=prompt)

    def labelled(self, rows: Iterable[Labelled]) -> Iterator[Labelled]:
        return (row._replace(text=self.scrub(row.text)) for row in rows)

    def _replace(self, kind: str, text: str, pattern: re.Pattern[str], check: Check) -> str:
        """`check` says how many characters of a match are to be masked, from the end of its "word" on."""
        parts: list[str] = []
        done = at = 0
        while match := pattern.search(text, at):
            length = check(match)
            start = match.end("word") if match.groupdict().get("word") else match.start()
            at = max(start + length, match.start() + 1)
            if length:
                parts += (text[done:start], MASKS[kind])
                done = at
                self.counts[kind] += 1
        return "".join(parts) + text[done:] if parts else text

    def _without_names(self, text: str) -> str:
        words = list(_name_word().finditer(text))
        folded = [_fold(word.group()) for word in words]
        parts: list[str] = []
        done = index = 0
        while index < len(words):
            length = next(
                (
                    len(name)
                    for name in self._names.get(folded[index], ())
                    if folded[index : index + len(name)] == list(name)
                    and all(
                        NAME_GAP.fullmatch(text, words[at].end(), words[at + 1].start())
                        for at in range(index, index + len(name) - 1)
                    )
                ),
                0,
            )
            if length:
                parts += (text[done : words[index].start()], MASKS["names"])
                done = words[index + length - 1].end()
                self.counts["names"] += 1
            index += max(length, 1)
        return "".join(parts) + text[done:]


def read_names(files: Iterable[str], base: Path | None = None) -> list[str]:
    """The names in files with one a line.  Raises DataError for a missing, empty or unreadable file."""
    found = []
    for file in files:
        path, _ = locate(file, base or Path())
        try:
            names = [
                line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()
            ]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"{path}: can't be read as UTF-8 text: {error}", hint="one name a line"
            ) from error
        if not names:
            raise DataError(f"{path}: holds no names", hint="one name a line")
        found += names
    return found


def luhn(digits: str) -> bool:
    """Whether a number's last digit is its check digit: ISO/IEC 7812-1, annex B."""
    doubled = (int(digit) * (1 + at % 2) for at, digit in enumerate(reversed(digits)))
    return sum(value - 9 if value > 9 else value for value in doubled) % 10 == 0


def mod_97(iban: str) -> bool:
    """Whether an IBAN (upper case, no spaces) has the right check digits: ISO 13616, ISO 7064 mod 97-10."""
    return int("".join(str(int(char, 36)) for char in iban[4:] + iban[:4])) % 97 == 1


# --- how much of a match is what its pattern looks for: 0 for none of it ---


def _whole(match: re.Match[str]) -> int:
    return len(match.group())


def _iban(match: re.Match[str]) -> int:
    """A match may run on into the next words: the country's length says where the number ends."""
    text = match.group()
    end = _end_of(text, IBAN_LENGTHS.get(text[:2].upper(), 0))
    iban = re.sub(r"[ -]", "", text[:end]).upper()
    whole = end and _in_groups(text[:end], ()) and not match.string[match.start() + end :][:1].isalnum()
    return end if whole and len(_digits(iban)) >= 8 and mod_97(iban) else 0


def _card(match: re.Match[str]) -> int:
    """The longest of the issuer's lengths that has a right check digit and ends where a group does."""
    text = match.group()
    for length in CARD_LENGTHS[text[0]]:
        end = _end_of(text, length)
        after = match.string[match.start() + end :][:2]
        ends = not (after[:1].isalnum() or (after[:1] in ("-", "_", ".", ",") and after[1:].isalnum()))
        if (
            end
            and ends
            and _in_groups(text[:end], ((4, 6, 5), (4, 6, 4), (6, 13)))
            and luhn(_digits(text[:end]))
        ):
            return end
    return 0


def _end_of(text: str, count: int) -> int:
    """Where the first `count` letters and digits of a text end; 0 when it has fewer."""
    places = [at for at, char in enumerate(text) if char.isalnum()]
    return places[count - 1] + 1 if 0 < count <= len(places) else 0


def _in_groups(text: str, others: Sequence[tuple[int, ...]]) -> bool:
    """Whether a number is written in one piece, in fours, or as one of `others`."""
    *groups, last = (len(group) for group in re.split(r"[ -]", text))
    return (all(size == 4 for size in groups) and (last <= 4 or not groups)) or (*groups, last) in others


def _quad(match: re.Match[str]) -> int:
    before = match.string[max(0, match.start() - 20) : match.start()]
    try:
        IPv4Address(match.group())
    except AddressValueError:
        return 0
    return 0 if NOT_AN_ADDRESS.search(before) else _whole(match)


def _colons(match: re.Match[str]) -> int:
    """IPv6; a slice such as [::2] or a name such as a::b is none: three groups, or a whole one with a digit."""
    text = match.group()
    groups = [group for group in text.split(":") if group]
    try:
        IPv6Address(text)
    except AddressValueError:
        return 0
    whole = any(len(group) == 4 and any(char.isdigit() for char in group) for group in groups)
    return len(text) if len(groups) >= 3 or whole else 0


def _phone(match: re.Match[str]) -> int:
    """After a word such as "tel", six digits are enough (seven after "call"); elsewhere nine."""
    if said := match["said"]:
        fewest = 7 if re.match(r"call|dial", match["word"], re.IGNORECASE) else 6
        return 0 if len(_digits(said)) < fewest or DATE.match(said) else len(said)
    text = match.group()
    if match["by"] and re.search(rf"\d{re.escape(match['by'])}$", match.string[: match.start()][-2:]):
        return 0  # in the middle of a row of pairs
    if match["zeros"]:
        return len(text)
    if text.lstrip("(").startswith("0"):  # the next number of a list may follow: so many groups as fit
        ends = (group.end() for group in re.finditer(r"\d+", text))
        fits = [end for end in ends if len(_digits(text[:end])) in NATIONAL_DIGITS]
        return 0 if not fits or ZIP_CODE.fullmatch(text[: fits[-1]]) else fits[-1]
    return len(text) if len(_digits(text)) in PHONE_DIGITS else 0


def _digits(text: str) -> str:
    return "".join(char for char in text if char.isdigit())


def _has_digits(text: str) -> bool:
    return re.search(r"\d", text) is not None


SEARCHES: dict[str, list[tuple[Callable[[str], bool], re.Pattern[str], Check]]] = {
    "emails": [(lambda text: "@" in text, EMAIL, _whole)],
    "ibans": [(_has_digits, IBAN, _iban)],
    "cards": [(_has_digits, CARD, _card)],
    "addresses": [(_has_digits, QUAD, _quad), (lambda text: ":" in text, COLONS, _colons)],
    "phones": [(_has_digits, PHONE, _phone)],
}


# --- names ---


@cache
def _name_word() -> re.Pattern[str]:
    """A word: letters and digits with the marks that combine with them, which \\w leaves out."""
    marks = "".join(char for char in map(chr, range(sys.maxunicode)) if unicodedata.category(char)[0] == "M")
    return re.compile(rf"[^\W_](?:[^\W_]|[{marks}])*")


@lru_cache(maxsize=2**16)
def _fold(word: str) -> str:
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", word).casefold())


def _name_table(names: Iterable[str]) -> dict[str, list[tuple[str, ...]]]:
    """First word of a name to the names that begin with it, the longest first."""
    table: dict[str, set[tuple[str, ...]]] = {}
    for name in names:
        if words := tuple(_fold(word) for word in _name_word().findall(name)):
            table.setdefault(words[0], set()).add(words)
    return {first: sorted(found, key=lambda words: (-len(words), words)) for first, found in table.items()}
