"""Grammars in EBNF without recursion, as expressions.

    root   ::= amount " " ("EUR" | "USD")
    amount ::= [0-9]{1,6} ("." [0-9] [0-9])?

An answer must match the rule `root`, or the first rule if none has this name. `#` begins a comment.
"""

import re
from collections.abc import Mapping

from mtlora.answer import language
from mtlora.answer import regex as regexes
from mtlora.answer.language import MAX_REPEATS, AnswerError, Expression, Repeat

MAX_CHARACTERS = 20_000
_DEEPEST = 50
_TOKEN = re.compile(
    r"""\s+|\#[^\n]*|(?P<rule>[A-Za-z_][\w-]*)\s*(?:::=|:=|=)|(?P<name>[A-Za-z_][\w-]*)"""
    r"""|(?P<text>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')|(?P<chars>\[(?:[^\]\\\n]|\\.)+\])"""
    r"""|(?P<mark>[|()?*+;]|\{\d+(?:,\d*)?\})"""
)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r"}


def parse(text: str) -> Expression:
    """The expression of a grammar. Raises AnswerError, naming the rule."""
    if len(text) > MAX_CHARACTERS:
        raise AnswerError(f"grammar: found {len(text)} characters; allowed: {MAX_CHARACTERS}")
    rules: dict[str, list[tuple[str, str]]] = {}
    current: list[tuple[str, str]] | None = None
    at = 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise AnswerError(f"grammar: cannot be read from {text[at : at + 32]!r} on, at character {at}")
        at = match.end()
        kind = match.lastgroup
        if kind == "rule":
            if match["rule"] in rules:
                raise AnswerError(f"grammar: rule {match['rule']} is defined twice")
            current = rules[match["rule"]] = []
        elif kind:
            if current is None:
                raise AnswerError('grammar: begins without a rule, such as: root ::= "yes" | "no"')
            if match[kind] != ";":
                current.append((kind, match[kind]))
    if not rules:
        raise AnswerError('grammar: has no rule, such as: root ::= "yes" | "no"')
    return _Reader(rules).rule("root" if "root" in rules else next(iter(rules)))


class _Reader:
    def __init__(self, rules: Mapping[str, list[tuple[str, str]]]) -> None:
        self._rules = rules
        self._read: dict[str, Expression] = {}
        # Rules that are being read, outermost first; finds recursion.
        self._inside: list[str] = []

    def rule(self, name: str) -> Expression:
        if name in self._inside:
            raise AnswerError(f"grammar: recurses: {' -> '.join([*self._inside[self._inside.index(name) :], name])}")
        if name not in self._rules:
            raise AnswerError(f"grammar: has no rule {name}")
        if name not in self._read:
            if len(self._inside) > _DEEPEST:
                raise AnswerError(f"grammar: rules nested deeper than {_DEEPEST}")
            self._inside.append(name)
            tokens = self._rules[name]
            expression, end = self._options(tokens, 0, 0)
            if end != len(tokens):
                raise AnswerError(f"grammar: rule {name}: found {tokens[end][1]!r} out of place")
            self._inside.pop()
            self._read[name] = expression
        return self._read[name]

    def _options(self, tokens: list[tuple[str, str]], at: int, depth: int) -> tuple[Expression, int]:
        if depth > _DEEPEST:
            raise AnswerError(f"grammar: nested deeper than {_DEEPEST}")
        options: list[Expression] = []
        parts: list[Expression] = []
        while at < len(tokens) and tokens[at] != ("mark", ")"):
            kind, token = tokens[at]
            at += 1
            if token == "|" and kind == "mark":
                options.append(language.sequence(*parts))
                parts = []
            elif token == "(" and kind == "mark":
                inner, at = self._options(tokens, at, depth + 1)
                if at == len(tokens):
                    raise AnswerError(f"grammar: rule {self._inside[-1]}: a bracket is not closed")
                at += 1
                parts.append(inner)
            elif kind == "mark":
                if not parts:
                    raise AnswerError(f"grammar: rule {self._inside[-1]}: found nothing before {token!r}")
                parts[-1] = _repeated(parts[-1], token)
            elif kind == "name":
                parts.append(self.rule(token))
            elif kind == "text":
                parts.append(language.literal(re.sub(r"\\(.)", lambda m: _ESCAPES.get(m[1], m[1]), token[1:-1])))
            else:
                parts.append(regexes.parse(token))
        options.append(language.sequence(*parts))
        return language.either(options), at


def _repeated(inner: Expression, mark: str) -> Expression:
    if mark[0] == "{":
        least, comma, most = mark[1:-1].partition(",")
        counts = int(least), (int(most) if most else None) if comma else int(least)
    else:
        counts = {"?": (0, 1), "*": (0, None), "+": (1, None)}[mark]
    if max(counts[0], counts[1] or 0) > MAX_REPEATS or (counts[1] is not None and counts[1] < counts[0]):
        raise AnswerError(f"grammar: found {mark}; allowed: least to most, up to {MAX_REPEATS}")
    return Repeat(inner, *counts)
