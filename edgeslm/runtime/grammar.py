"""Grammars over bytes, run while text is written: which bytes may come next, and how it can end soonest.

A grammar is a tree of nodes (Byte, Seq, Alt, Rep, Ref); a state is the set of places where a text may be in
it, each a Byte node with what follows.  This is the simulation of a pushdown automaton by sets of stacks, as
llama.cpp's llama-grammar.cpp has it, on bytes instead of characters, with states and their moves remembered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeslm.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

MOST_PLACES = 4096
"""Places of one state; a grammar that is in more at once is refused."""
MOST_FRAMES = 200_000
"""Remembered places, after which a grammar starts anew."""
_PLEASANT = (*b"a0 ",)
"""Bytes that an early end is made of where it may."""


class Node:
    """Part of a grammar.  soonest: the shortest bytes that it matches; None while that is not known."""

    __slots__ = ("soonest",)

    def __init__(self) -> None:
        self.soonest: bytes | None = None


class Byte(Node):
    """One byte out of a set, given as a mask of 256 bits."""

    __slots__ = ("mask",)

    def __init__(self, mask: int) -> None:
        super().__init__()
        self.mask = mask
        self.soonest = bytes([pleasant(mask)]) if mask else None


class Seq(Node):
    """One part after the other."""

    __slots__ = ("parts",)

    def __init__(self, parts: Sequence[Node]) -> None:
        super().__init__()
        self.parts = tuple(parts)


class Alt(Node):
    """One of several."""

    __slots__ = ("options",)

    def __init__(self, options: Sequence[Node]) -> None:
        super().__init__()
        self.options = tuple(options)


class Rep(Node):
    """A part again and again, `low` to `high` times; high None: without end."""

    __slots__ = ("_less", "high", "low", "part")

    def __init__(self, part: Node, low: int = 0, high: int | None = None) -> None:
        super().__init__()
        self.part, self.low, self.high = part, low, high
        self._less: Rep | None = None

    def less(self) -> Rep:
        """What is left of it after one time."""
        if self.low == 0 and self.high is None:
            return self
        if self._less is None:
            self._less = Rep(self.part, max(0, self.low - 1), None if self.high is None else self.high - 1)
            assert self.part.soonest is not None
            self._less.soonest = self.part.soonest * self._less.low
        return self._less


class Ref(Node):
    """A rule by its name; the grammar fills in the target."""

    __slots__ = ("name", "target")

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.target: Node | None = None


class Frame:
    """A node that is to be matched, and what follows it; `soonest`: the shortest end of all that."""

    __slots__ = ("node", "parent", "soonest")

    def __init__(self, node: Node, parent: Frame | None) -> None:
        self.node, self.parent = node, parent
        end: bytes = b"" if parent is None else parent.soonest
        self.soonest: bytes = (node.soonest or b"") + end


class State:
    """Where a text may be: places before a Byte node, and whether the text may end here."""

    __slots__ = ("accepting", "mask", "moves", "places", "soonest")

    def __init__(self, places: Sequence[Frame], accepting: bool) -> None:
        self.places = places
        self.accepting = accepting
        self.moves: dict[int, State | None] = {}
        self.mask = 0
        """The bytes that may come next."""
        for place in places:
            assert isinstance(place.node, Byte)
            self.mask |= place.node.mask
        ends = [b""] if accepting else [place.soonest for place in places]
        self.soonest = min(ends, key=lambda end: (len(end), end))
        """The shortest text that ends it from here."""


class Grammar:
    """Rules, the first state, and the moves from state to state."""

    def __init__(self, root: Node, rules: Mapping[str, Node] | None = None) -> None:
        """Raises DataError for a rule that is missing, calls itself first, or never ends."""
        nodes = _linked(root, rules or {})
        _find_soonest(nodes)
        if root.soonest is None:
            raise DataError("the grammar matches no text at all", hint="every rule needs an end")
        self._root = root
        self._frames: dict[tuple[Node, Frame | None], Frame] = {}
        self._states: dict[tuple[frozenset[Frame], bool], State] = {}
        self.start = self._closure([self._frame(root, None)])

    def advance(self, state: State, data: bytes) -> State | None:
        """The state after `data`; None where the grammar does not allow it."""
        for byte in data:
            try:
                after = state.moves[byte]
            except KeyError:
                after = self._move(state, byte)
            if after is None:
                return None
            state = after
        return state

    def matches(self, data: bytes) -> bool:
        """Whether `data` is a whole text of the grammar."""
        state = self.advance(self.start, data)
        return state is not None and state.accepting

    def fresh(self) -> Grammar:
        """This grammar, without what it remembers if that is much."""
        if len(self._frames) > MOST_FRAMES:
            self._frames, self._states = {}, {}
            self.start = self._closure([self._frame(self._root, None)])
        return self

    def _frame(self, node: Node, parent: Frame | None) -> Frame:
        """The one frame of these two: equal states are then the same object."""
        frame = self._frames.get((node, parent))
        if frame is None:
            frame = self._frames[node, parent] = Frame(node, parent)
        return frame

    def _move(self, state: State, byte: int) -> State | None:
        bit = 1 << byte
        if not state.mask & bit:
            state.moves[byte] = None
            return None
        after = [place.parent for place in state.places if place.node.mask & bit]  # type: ignore[attr-defined]
        found = state.moves[byte] = self._closure(after)
        return found

    def _closure(self, frames: Iterable[Frame | None]) -> State:
        """The state of all places that `frames` lead to without a byte; None: the end of the text."""
        waiting, seen = list(frames), set()
        places: dict[Frame, None] = {}
        while waiting:
            frame = waiting.pop()
            if frame in seen:
                continue
            seen.add(frame)
            if len(seen) > MOST_PLACES:
                raise DataError(
                    "the grammar is too ambiguous, or a rule calls itself before anything else",
                    hint="write lists as  item item*  and nest fewer repetitions",
                )
            if frame is None:
                continue
            if isinstance(frame.node, Byte):
                if frame.node.mask:
                    places[frame] = None
            else:
                waiting += self._opened(frame.node, frame.parent)
        key = frozenset(places), None in seen
        if key not in self._states:
            self._states[key] = State(tuple(places), None in seen)
        return self._states[key]

    def _opened(self, node: Node, parent: Frame | None) -> list[Frame | None]:
        """The frames that may come first of a node that is no byte, with what follows them."""
        if isinstance(node, Seq):
            for part in reversed(node.parts):
                parent = self._frame(part, parent)
            return [parent]
        if isinstance(node, Alt):
            return [self._frame(option, parent) for option in node.options if option.soonest is not None]
        if isinstance(node, Rep):
            found = [parent] if node.low == 0 else []
            if node.high != 0 and node.part.soonest is not None:
                found.append(self._frame(node.part, self._frame(node.less(), parent)))
            return found
        assert isinstance(node, Ref)
        assert node.target is not None
        return [self._frame(node.target, parent)]


# --- pieces of grammars ---


def literal(text: str | bytes) -> Node:
    """Exactly this."""
    data = text.encode() if isinstance(text, str) else text
    return Seq([Byte(1 << byte) for byte in data])


def pleasant(mask: int) -> int:
    """The byte of a set that an early end uses."""
    lowest = (mask & -mask).bit_length() - 1
    return next((byte for byte in _PLEASANT if mask >> byte & 1), lowest)


def mask_of(low: int, high: int) -> int:
    """The bytes from low to high."""
    return (1 << high + 1) - (1 << low)


def characters(ranges: Iterable[tuple[int, int]]) -> Node:
    """One character of these ranges of code points, in UTF-8 (RFC 3629); surrogates are none."""
    single, several = 0, []
    for low, high in ranges:
        for first, last in ((low, min(high, 0xD7FF)), (max(low, 0xE000), high)):
            if first > last:
                continue
            if first < 0x80:
                single |= mask_of(first, min(last, 0x7F))
            for start, end in ((0x80, 0x7FF), (0x800, 0xFFFF), (0x10000, 0x10FFFF)):
                if max(first, start) <= min(last, end):
                    several += _utf8(chr(max(first, start)).encode(), chr(min(last, end)).encode())
    options: list[Node] = [Byte(single)] if single else []
    options += [Seq([Byte(mask_of(*pair)) for pair in pairs]) for pairs in several]
    return options[0] if len(options) == 1 else Alt(options)


def _utf8(low: bytes, high: bytes) -> list[list[tuple[int, int]]]:
    """Ranges of bytes, place by place, that together match the encodings from low to high, of one length."""
    if len(low) == 1:
        return [[(low[0], high[0])]]
    rest = len(low) - 1
    least, most = b"\x80" * rest, b"\xbf" * rest
    if low[0] == high[0]:
        return [[(low[0], low[0]), *tail] for tail in _utf8(low[1:], high[1:])]
    found, start, end = [], low[0], high[0]
    if low[1:] != least:
        found += [[(start, start), *tail] for tail in _utf8(low[1:], most)]
        start += 1
    if high[1:] != most:
        found += [[(end, end), *tail] for tail in _utf8(least, high[1:])]
        end -= 1
    if start <= end:
        found.append([(start, end), *[(0x80, 0xBF)] * rest])
    return found


def _linked(root: Node, rules: Mapping[str, Node]) -> list[Node]:
    """Every node that `root` reaches, rules filled in."""
    nodes: dict[Node, None] = {}
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if node in nodes:
            continue
        nodes[node] = None
        if isinstance(node, Ref):
            if node.name not in rules:
                raise DataError(f"the grammar has no rule {node.name!r}")
            node.target = rules[node.name]
            waiting.append(node.target)
        elif isinstance(node, Seq | Alt):
            waiting += node.parts if isinstance(node, Seq) else node.options
        elif isinstance(node, Rep):
            waiting.append(node.part)
    return list(nodes)


def _find_soonest(nodes: Sequence[Node]) -> None:
    """Fill in the shortest match of every node, to a fixed point; what has none keeps None."""
    changed = True
    while changed:
        changed = False
        for node in reversed(nodes):
            best = _soonest(node)
            if best is not None and (node.soonest is None or len(best) < len(node.soonest)):
                node.soonest, changed = best, True


def _soonest(node: Node) -> bytes | None:
    if isinstance(node, Seq):
        parts = [part.soonest for part in node.parts]
        return None if None in parts else b"".join(part or b"" for part in parts)
    if isinstance(node, Alt):
        known = [option.soonest for option in node.options if option.soonest is not None]
        return min(known, key=len) if known else None
    if isinstance(node, Rep):
        if node.low == 0:
            return b""
        return None if node.part.soonest is None else node.part.soonest * node.low
    return node.target.soonest if isinstance(node, Ref) and node.target is not None else node.soonest
