"""A regular language of allowed answers, as an expression and as an automaton over UTF-8 bytes.

Every type of answer becomes an expression. So a type's size and its shortest answers are known before decoding starts,
and also whether an answer can end within a number of tokens.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from mtlora.errors import MtLoRAError

# The largest allowed code point, and the range of surrogates, which are not allowed.
LAST = 0x10FFFF
_SURROGATES = (0xD800, 0xDFFF)
_UTF8_ENDS = (0x7F, 0x7FF, 0xFFFF, LAST)

MAX_REPEATS = 10_000
# Most character classes in an expression written as text, as for llguidance.
MAX_WRITTEN = 200_000
# Most states of an automaton; each takes about a kilobyte.
MAX_STATES = 30_000
# Limit on cached steps, counted in target states of 30 to 60 bytes each. One step of a hostile type has hundreds.
_KEPT_STATES = 100_000
# Cached target states that take as much memory as one state of the automaton.
_PER_STATE = 8


class AnswerError(MtLoRAError):
    """A type of answer that cannot be used; the message says why."""


class Expression:
    """A regular expression, as data. One object may occur as a part in many places."""

    def __hash__(self) -> int:
        """Cache the hash: else a shared part is hashed again for each path that leads to it."""
        kept = self.__dict__
        if "hash" not in kept:
            kept["hash"] = hash(tuple(-1 if each is None else each for each in kept.values()))
        return int(kept["hash"])


@dataclass(frozen=True)
class Chars(Expression):
    """One character from sorted, disjoint ranges of code points."""

    ranges: tuple[tuple[int, int], ...]

    __hash__ = Expression.__hash__


@dataclass(frozen=True)
class InOrder(Expression):
    parts: tuple[Expression, ...]

    __hash__ = Expression.__hash__


@dataclass(frozen=True)
class Either(Expression):
    options: tuple[Expression, ...]

    __hash__ = Expression.__hash__


@dataclass(frozen=True)
class Repeat(Expression):
    """`most=None`: no limit."""

    inner: Expression
    least: int
    most: int | None

    __hash__ = Expression.__hash__


NOTHING = InOrder(())


def too_many_states(limit: int) -> AnswerError:
    """The error for an expression that needs more states than a limit."""
    return AnswerError(f"takes more than {limit} states; allowed: fewer repeats or options")


def sequence(*parts: Expression) -> Expression:
    """The parts in sequence. Raises AnswerError for more parts than an automaton may have states."""
    # Count parts, not objects: in a grammar whose rules double each other, few objects make very many parts.
    if sum(len(part.parts) for part in parts if isinstance(part, InOrder)) > MAX_STATES:
        raise too_many_states(MAX_STATES)
    flat = tuple(each for part in parts for each in (part.parts if isinstance(part, InOrder) else (part,)))
    return flat[0] if len(flat) == 1 else InOrder(flat)


def either(options: Iterable[Expression]) -> Expression:
    """One of the options. Raises AnswerError without any."""
    found = tuple(dict.fromkeys(options))
    if not found:
        raise AnswerError("matches no answer")
    return found[0] if len(found) == 1 else Either(found)


def optional(inner: Expression) -> Expression:
    """`inner` or the empty text."""
    return Repeat(inner, 0, 1)


def literal(text: str) -> Expression:
    """Exactly this text. Raises AnswerError for a lone surrogate, which UTF-8 cannot encode."""
    if wrong := next((char for char in text if _SURROGATES[0] <= ord(char) <= _SURROGATES[1]), None):
        raise AnswerError(f"found the lone surrogate {wrong!r}; allowed: characters")
    return sequence(*(Chars(((ord(char), ord(char)),)) for char in text)) if text else NOTHING


def _without(ranges: Iterable[tuple[int, int]], gap: tuple[int, int]) -> Iterable[tuple[int, int]]:
    for low, high in ranges:
        if low < gap[0]:
            yield low, min(high, gap[0] - 1)
        if high > gap[1]:
            yield max(low, gap[1] + 1), high


def chars(ranges: Iterable[tuple[int, int]]) -> Chars:
    """A class of characters, without surrogates. Raises AnswerError if none is left."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(_without(ranges, _SURROGATES)):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    if not merged:
        raise AnswerError("has an empty character class")
    return Chars(tuple(merged))


def anything_but(ranges: Iterable[tuple[int, int]]) -> Chars:
    """Every character outside these ranges."""
    left: list[tuple[int, int]] = [(0, LAST)]
    for each in ranges:
        left = list(_without(left, each))
    return chars(left)


def one_of(text: str) -> Chars:
    """One of the characters of a text."""
    return chars((ord(char), ord(char)) for char in text)


DIGIT = one_of("0123456789")


def choice(texts: Sequence[str]) -> Expression:
    """One of the texts, as a tree that shares common prefixes."""
    return _trie(sorted(set(texts)), 0)


def _trie(texts: Sequence[str], depth: int) -> Expression:
    """The tree of `texts`, which are sorted and share their first `depth` characters."""
    start = depth
    while len(texts[0]) > depth and all(len(t) > depth and t[depth] == texts[0][depth] for t in (texts[0], texts[-1])):
        depth += 1
    shared = literal(texts[0][start:depth])
    if len(texts) == 1:
        return shared
    by_next: dict[str, list[str]] = {}
    for text in texts:
        by_next.setdefault(text[depth : depth + 1], []).append(text)
    options = [_trie(group, depth) if char else NOTHING for char, group in by_next.items()]
    return sequence(shared, either(options))


def check_written(expression: Expression) -> None:
    """Raise AnswerError if the expression's text would be too long: shared objects are written out each time."""
    sizes: dict[int, int] = {}

    def size(part: Expression) -> int:
        if id(part) not in sizes:
            match part:
                case Chars(ranges=ranges):
                    sizes[id(part)] = len(ranges)
                case InOrder(parts=inner) | Either(options=inner):
                    sizes[id(part)] = sum(map(size, inner))
                case Repeat(inner=one):
                    sizes[id(part)] = size(one)
        return sizes[id(part)]

    if size(expression) > MAX_WRITTEN:
        raise AnswerError(f"takes more than {MAX_WRITTEN} characters or classes when it is written out")


def pattern(expression: Expression) -> str:
    """The expression in the syntax of Rust's regular expressions, as llguidance reads it."""
    match expression:
        case Chars(ranges=((low, high),)) if low == high:
            return _escaped(low)
        case Chars(ranges=ranges):
            return f"[{''.join(_escaped(a) if a == b else f'{_escaped(a)}-{_escaped(b)}' for a, b in ranges)}]"
        case InOrder(parts=parts):
            return "".join(map(pattern, parts))
        case Either(options=options):
            return f"(?:{'|'.join(map(pattern, options))})"
        case Repeat(inner=inner, least=least, most=most):
            counts = {(0, 1): "?", (0, None): "*", (1, None): "+"}.get(
                (least, most), f"{{{least},{'' if most is None else most}}}"
            )
            return f"(?:{pattern(inner)}){counts}"
    raise TypeError(type(expression))


def _escaped(code: int) -> str:
    char = chr(code)
    return char if char.isascii() and char.isalnum() else f"\\x{{{code:X}}}"


# All automaton states that the text so far can lead to.
States = frozenset[int]


@dataclass
class Automaton:
    """A nondeterministic automaton over bytes. State 0 is the end of an answer.

    empty: for each state, the states that it reaches without reading a byte.
    edges: for each state, its transitions (lowest byte, highest byte, next state).
    """

    expression: Expression
    limit: int = MAX_STATES
    empty: list[tuple[int, ...]] = field(default_factory=lambda: [()])
    edges: list[tuple[tuple[int, int, int], ...]] = field(default_factory=lambda: [()])
    start: States = field(init=False)

    def __post_init__(self) -> None:
        """Raises AnswerError for an expression that needs more than `limit` states."""
        self._work = 0
        # States built so far, by the expression's identity and the next state. `expression` keeps the objects alive, so
        # identities stay unique.
        self._built: dict[tuple[int, int], int] = {}
        self._steps: dict[tuple[States, int], States] = {}
        self._kept = 0
        self.start = self._closure((self._build(self.expression, 0),))

    def accepts(self, states: States) -> bool:
        """Whether the text so far is a complete answer."""
        return 0 in states

    def step(self, states: States, byte: int) -> States:
        """The state after one more byte; empty if no answer begins with this text."""
        found = self._steps.get((states, byte))
        if found is None:
            found = self._closure(
                target for state in states for low, high, target in self.edges[state] if low <= byte <= high
            )
            # The cache entry itself takes as much memory as a few states.
            self._kept += 3 + len(found)
            if self._kept > _KEPT_STATES:
                self._steps.clear()
                self._kept = 3 + len(found)
            self._steps[states, byte] = found
        return found

    @property
    def size(self) -> int:
        """Number of states, plus the cached steps converted to states of the same memory."""
        return len(self.edges) + self._kept // _PER_STATE

    def read(self, states: States, text: bytes) -> States:
        """The state after more bytes."""
        for byte in text:
            if not states:
                break
            states = self.step(states, byte)
        return states

    def matches(self, text: str) -> bool:
        """Whether the text is a complete answer."""
        return 0 in self.read(self.start, text.encode(errors="surrogatepass"))

    def may_contain(self, text: str) -> bool:
        """Whether some answer contains the text."""
        return bool(self.read(frozenset(range(len(self.edges))), text.encode()))

    def ways_out(self) -> tuple[list[int], list[tuple[int, int] | None]]:
        """For each state: the fewest bytes to the end, and the first of these bytes with its next state, if any."""
        before: list[list[tuple[int, int | None]]] = [[] for _ in self.edges]
        for state, targets in enumerate(self.empty):
            for target in targets:
                before[target].append((state, None))
        for state, edges in enumerate(self.edges):
            for low, high, target in edges:
                before[target].append((state, _plainest(low, high)))
        bytes_left = [-1] * len(self.edges)
        way: list[tuple[int, int] | None] = [None] * len(self.edges)
        bytes_left[0] = 0
        queue = deque([0])
        done = [False] * len(self.edges)
        while queue:
            state = queue.popleft()
            if done[state]:
                continue
            done[state] = True
            for origin, byte in before[state]:
                cost = bytes_left[state] + (byte is not None)
                if bytes_left[origin] < 0 or cost < bytes_left[origin]:
                    bytes_left[origin] = cost
                    way[origin] = way[state] if byte is None else (byte, state)
                    (queue.appendleft if byte is None else queue.append)(origin)
        return bytes_left, way

    def _closure(self, states: Iterable[int]) -> States:
        seen = set(states)
        stack = list(seen)
        while stack:
            for target in self.empty[stack.pop()]:
                if target not in seen:
                    seen.add(target)
                    stack.append(target)
        # Keep the end and states that read a byte; other states only pass on to them.
        return frozenset(state for state in seen if state == 0 or self.edges[state])

    def _state(self, empty: tuple[int, ...] = (), edges: tuple[tuple[int, int, int], ...] = ()) -> int:
        if len(self.edges) >= self.limit:
            raise too_many_states(self.limit)
        self.empty.append(empty)
        self.edges.append(edges)
        return len(self.edges) - 1

    def _build(self, expression: Expression, end: int) -> int:
        """The start state of the expression, after which the answer continues at state `end`."""
        key = (id(expression), end)
        if key not in self._built:
            self._built[key] = self._build_anew(expression, end)
        return self._built[key]

    def _build_anew(self, expression: Expression, end: int) -> int:
        self._work += 1
        if self._work > 4 * self.limit:
            raise AnswerError("repeats an empty expression too often")
        match expression:
            case Chars(ranges=ranges):
                return self._chars(ranges, end)
            case InOrder(parts=parts):
                for part in reversed(parts):
                    end = self._build(part, end)
                return end
            case Either(options=options):
                return self._state(tuple(self._build(option, end) for option in options))
            case Repeat(inner=inner, least=least, most=most):
                if most is None:
                    loop = self._state()
                    self.empty[loop] = (self._build(inner, loop), end)
                    after = loop
                else:
                    after = end
                    for _ in range(most - least):
                        after = self._state((self._build(inner, after), end))
                for _ in range(least):
                    after = self._build(inner, after)
                return after
        raise TypeError(type(expression))

    def _chars(self, ranges: tuple[tuple[int, int], ...], end: int) -> int:
        made: dict[tuple[tuple[int, int], ...], int] = {(): end}

        def state_of(rests: Iterable[tuple[tuple[int, int], ...]]) -> tuple[tuple[int, int, int], ...]:
            return tuple((*rest[0], after(rest[1:])) for rest in rests)

        def after(rest: tuple[tuple[int, int], ...]) -> int:
            if rest not in made:
                made[rest] = self._state((), state_of([rest]))
            return made[rest]

        return self._state((), state_of(_utf8(ranges)))


def _plainest(low: int, high: int) -> int:
    """A byte of a range: a lower-case letter or a digit if the range has one."""
    return next((byte for byte in b"a0" if low <= byte <= high), low)


@lru_cache(maxsize=1024)
def _utf8(ranges: tuple[tuple[int, int], ...]) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Sequences of byte ranges that match exactly these code points in UTF-8."""
    found: list[tuple[tuple[int, int], ...]] = []
    for low, high in ranges:
        for end in _UTF8_ENDS:
            if low <= min(high, end):
                _split_utf8(low, min(high, end), found.append)
                low = end + 1
    return tuple(found)


def _split_utf8(low: int, high: int, add: Callable[[tuple[tuple[int, int], ...]], None]) -> None:
    first, last = chr(low).encode(), chr(high).encode()
    for size in range(1, len(first)):
        mask = (1 << (6 * size)) - 1
        if low & ~mask != high & ~mask:
            # Cut at code points where the last `size` bytes start again at their lowest values.
            if low & mask:
                _split_utf8(low, low | mask, add)
                return _split_utf8((low | mask) + 1, high, add)
            if high & mask != mask:
                _split_utf8(low, (high & ~mask) - 1, add)
                return _split_utf8(high & ~mask, high, add)
    return add(tuple(zip(first, last, strict=True)))
