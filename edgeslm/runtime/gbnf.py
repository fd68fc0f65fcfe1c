"""GBNF, llama.cpp's notation of grammars (grammars/README.md there), and regular expressions, as grammars.

GBNF: rules `name ::= ...` with literals, character classes, `.`, groups, alternatives, and the repetitions
* + ? {m} {m,} {m,n}; the text is a `root`.
"""

from __future__ import annotations

import re
from importlib import import_module
from typing import TYPE_CHECKING, Any

from edgeslm.errors import DataError
from edgeslm.runtime.grammar import Alt, Grammar, Node, Ref, Rep, Seq, characters, literal

if TYPE_CHECKING:
    from collections.abc import Callable

LONGEST = 65536
"""Characters of a grammar."""
DEEPEST = 64
"""Groups within groups."""
MOST_TIMES = 10_000
LAST = 0x10FFFF
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_TIMES = re.compile(r"\{\s*(\d{1,6})\s*(,)?\s*(\d{1,6})?\s*\}")
_ESCAPES = {
    "n": "\n",
    "r": "\r",
    "t": "\t",
    "\\": "\\",
    '"': '"',
    "[": "[",
    "]": "]",
    "-": "-",
    "^": "^",
    "/": "/",
}
_CODES = {"x": 2, "u": 4, "U": 8}
_SIMPLE_TIMES = {"*": (0, None), "+": (1, None), "?": (0, 1)}

Ranges = list[tuple[int, int]]


def read_gbnf(text: str) -> Grammar:
    """The grammar of a GBNF text.  Raises DataError, with the line, for one that is none."""
    if len(text) > LONGEST:
        raise DataError(f"the grammar has {len(text)} characters", hint=f"use at most {LONGEST}")
    reader = _Reader(text)
    rules = reader.rules()
    if "root" not in rules:
        raise DataError("the grammar has no rule root", hint="it begins with  root ::= ...")
    return Grammar(rules["root"], rules)


class _Reader:
    def __init__(self, text: str) -> None:
        self._text = text
        self._place = 0
        self._depth = 0

    def rules(self) -> dict[str, Node]:
        found: dict[str, Node] = {}
        self._space(lines=True)
        while self._place < len(self._text):
            name = self._name()
            self._space()
            if not self._take("::="):
                raise self._wrong("expected ::=")
            self._space(lines=True)
            found[name] = self._alternatives(lines=False)
            self._space()
            if self._place < len(self._text) and self._text[self._place] not in "\r\n":
                raise self._wrong("expected the end of the rule")
            self._space(lines=True)
        return found

    def _alternatives(self, lines: bool) -> Node:
        options = [self._sequence(lines)]
        while self._take("|"):
            self._space(lines=True)
            options.append(self._sequence(lines))
        return options[0] if len(options) == 1 else Alt(options)

    def _sequence(self, lines: bool) -> Node:
        parts: list[Node] = []
        while (item := self._item()) is not None:
            self._space(lines)
            parts.append(self._repeated(item, lines))
        return parts[0] if len(parts) == 1 else Seq(parts)

    def _item(self) -> Node | None:
        text, place = self._text, self._place
        character = text[place : place + 1]
        if character == '"':
            self._place += 1
            return literal("".join(map(chr, self._until('"'))))
        if character == "[":
            self._place += 1
            return self._class()
        if character == ".":
            self._place += 1
            return characters([(0, LAST)])
        if character == "(":
            self._place += 1
            self._depth += 1
            if self._depth > DEEPEST:
                raise self._wrong(f"more than {DEEPEST} groups within each other")
            self._space(lines=True)
            inside = self._alternatives(lines=True)
            if not self._take(")"):
                raise self._wrong("expected )")
            self._depth -= 1
            return inside
        if _NAME.match(text, place) and not re.compile(r"[A-Za-z0-9_-]+[ \t]*::=").match(text, place):
            return Ref(self._name())
        return None

    def _repeated(self, item: Node, lines: bool) -> Node:
        while True:
            character = self._text[self._place : self._place + 1]
            if character and character in _SIMPLE_TIMES:
                self._place += 1
                item = Rep(item, *_SIMPLE_TIMES[character])
            elif match := _TIMES.match(self._text, self._place):
                self._place = match.end()
                low = int(match[1])
                high = int(match[3]) if match[3] else (None if match[2] else low)
                if max(low, high or 0) > MOST_TIMES or (high is not None and high < low):
                    raise self._wrong(f"repeats {match[0]}; at most {MOST_TIMES} times")
                item = Rep(item, low, high)
            else:
                return item
            self._space(lines)

    def _class(self) -> Node:
        negated = self._take("^")
        ranges: Ranges = []
        while not self._take("]"):
            low = self._character("]")
            high = low
            text, place = self._text, self._place
            if text[place : place + 1] == "-" and text[place + 1 : place + 2] not in ("]", ""):
                self._place += 1
                high = self._character("]")
            if high < low:
                raise self._wrong("a range of characters runs backwards")
            ranges.append((low, high))
        return characters(others(ranges) if negated else ranges)

    def _until(self, end: str) -> list[int]:
        found = []
        while not self._take(end):
            found.append(self._character(end))
        return found

    def _character(self, end: str) -> int:
        text = self._text
        if self._place >= len(text) or text[self._place] in "\r\n":
            raise self._wrong(f"expected {end}")
        character = text[self._place]
        self._place += 1
        if character != "\\":
            return ord(character)
        kind = text[self._place : self._place + 1]
        self._place += 1
        if kind in _CODES:
            digits = text[self._place : self._place + _CODES[kind]]
            self._place += len(digits)
            if re.fullmatch(f"[0-9a-fA-F]{{{_CODES[kind]}}}", digits) and int(digits, 16) <= LAST:
                return int(digits, 16)
        elif kind in _ESCAPES:
            return ord(_ESCAPES[kind])
        raise self._wrong(f"unknown escape \\{kind}")

    def _name(self) -> str:
        match = _NAME.match(self._text, self._place)
        if match is None:
            raise self._wrong("expected the name of a rule")
        self._place = match.end()
        return match[0]

    def _space(self, lines: bool = False) -> None:
        """Skip blanks and comments, and line ends where a rule may go on."""
        pattern = r"(?:[ \t]|#[^\n]*|[\r\n])*" if lines else r"(?:[ \t]|#[^\n]*)*"
        match = re.compile(pattern).match(self._text, self._place)
        assert match is not None
        self._place = match.end()

    def _take(self, text: str) -> bool:
        if not self._text.startswith(text, self._place):
            return False
        self._place += len(text)
        return True

    def _wrong(self, what: str) -> DataError:
        line = self._text.count("\n", 0, self._place) + 1
        return DataError(f"the grammar's line {line} can't be read: {what}")


def others(ranges: Ranges) -> Ranges:
    """The code points outside of `ranges`."""
    found, start = [], 0
    for low, high in sorted(ranges):
        if start < low:
            found.append((start, low - 1))
        start = max(start, high + 1)
    return [*found, (start, LAST)] if start <= LAST else found


# --- regular expressions ---

_CATEGORIES: dict[str, Ranges] = {
    "CATEGORY_DIGIT": [(48, 57)],
    "CATEGORY_SPACE": [(9, 13), (32, 32)],
    "CATEGORY_WORD": [(48, 57), (65, 90), (95, 95), (97, 122)],
}


def read_regex(pattern: str, write: Callable[[Ranges], Node] = characters) -> Node:
    """A regular expression of Python's syntax as a node, taken from the text's first to its last character.

    write: the node of one character out of ranges.  Only what a grammar can say: no look-around, no
    back references, \\d \\w \\s in ASCII.  Raises DataError for the rest.
    """
    parser: Any = import_module("re._parser")
    try:
        parsed = parser.parse(pattern[:LONGEST])
    except (re.error, RecursionError, OverflowError) as error:
        raise DataError(f"the pattern {pattern[:80]!r} is no regular expression: {error}") from None
    return _Regex(pattern, write).sequence(parsed)


class _Regex:
    def __init__(self, pattern: str, write: Callable[[Ranges], Node]) -> None:
        self._pattern = pattern
        self._write = write

    def sequence(self, parsed: Any, *, starts: bool = True, ends: bool = True) -> Node:
        """Items one after the other.  starts, ends: the text does with them, so that anchors change nothing."""
        items = [(str(kind), value) for kind, value in parsed]
        while starts and items and items[0][0] == "AT" and str(items[0][1]).startswith("AT_BEGINNING"):
            items = items[1:]
        while ends and items and items[-1][0] == "AT" and str(items[-1][1]).startswith("AT_END"):
            items = items[:-1]
        last = len(items) - 1
        return Seq([
            self._node(kind, value, starts=starts and place == 0, ends=ends and place == last)
            for place, (kind, value) in enumerate(items)
        ])  # fmt: skip

    def _node(self, kind: str, value: Any, *, starts: bool, ends: bool) -> Node:
        if kind in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            return self._write(self._ranges_of(kind, value))
        if kind == "BRANCH":
            return Alt([self.sequence(option, starts=starts, ends=ends) for option in value[1]])
        if kind == "SUBPATTERN" and not value[1] and not value[2]:
            return self.sequence(value[3], starts=starts, ends=ends)
        if kind in ("MAX_REPEAT", "MIN_REPEAT"):
            low, high, inner = value
            if low > MOST_TIMES or MOST_TIMES < high < 2**31:
                raise self._unusable("repeats too often")
            inside = self.sequence(inner, starts=False, ends=False)
            return Rep(inside, low, high if high <= MOST_TIMES else None)
        raise self._unusable(f"holds what no grammar can say ({kind.lower().replace('_', ' ')})")

    def _ranges_of(self, kind: str, value: Any) -> Ranges:
        """The characters that one item stands for."""
        if kind == "IN":
            return self._ranges(value)
        if kind == "ANY":
            return others([(10, 10)])
        return [(value, value)] if kind == "LITERAL" else others([(value, value)])

    def _ranges(self, members: Any) -> Ranges:
        ranges: Ranges = []
        negated = False
        for kind, value in members:
            if str(kind) == "NEGATE":
                negated = True
            elif str(kind) == "LITERAL":
                ranges.append((value, value))
            elif str(kind) == "RANGE":
                ranges.append(tuple(value))
            else:
                name = str(value)
                inverse = name.replace("CATEGORY_NOT_", "CATEGORY_")
                if inverse not in _CATEGORIES:
                    raise self._unusable(f"holds an unknown class ({name.lower()})")
                ranges += others(_CATEGORIES[inverse]) if inverse != name else _CATEGORIES[name]
        return others(ranges) if negated else ranges

    def _unusable(self, why: str) -> DataError:
        return DataError(f"the pattern {self._pattern[:80]!r} {why}")
