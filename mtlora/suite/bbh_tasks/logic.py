"""Truth values, liars, brackets."""

import random

from mtlora.suite.bbh_tasks.task import BBHTask, Solution, UnsolvedError, matched
from mtlora.suite.bbh_tasks.words import LIARS
from mtlora.suite.derivations import CLOSER, closed, draw_brackets, or_of_ands

_OPERATORS = ("and", "or")


class _Reader:
    """Recursive descent over an expression: `or` of `and` of `not` of brackets and constants."""

    def __init__(self, text: str) -> None:
        self._tokens = text.split()
        self._place = 0

    def _peek(self) -> str:
        return self._tokens[self._place] if self._place < len(self._tokens) else ""

    def _take(self) -> str:
        self._place += 1
        return self._tokens[self._place - 1]

    def operands(self) -> tuple[list[bool], list[str]]:
        """Values of the outermost operands, and the operators between them."""
        values, operators = [self._operand()], []
        while self._peek() in _OPERATORS:
            operators.append(self._take())
            values.append(self._operand())
        return values, operators

    def at_end(self) -> bool:
        return self._place == len(self._tokens)

    def _operand(self) -> bool:
        match self._peek():
            case "not":
                self._take()
                return not self._operand()
            case "True" | "False":
                return self._take() == "True"
            case "(":
                self._take()
                value = or_of_ands(*self.operands())
                if self._peek() != ")":
                    raise UnsolvedError("a bracket is not closed")
                self._take()
                return value
        raise UnsolvedError(f"{self._peek()!r} where an operand should be")


def solve_boolean(text: str) -> Solution:
    """Works it out by reducing the outermost operands to constants: `False or ( not True ) is` -> `False or False`."""
    reader = _Reader(matched(r"^(.*) is$", text)[1])
    values, operators = reader.operands()
    if not reader.at_end():
        raise UnsolvedError("more than one expression")
    working = str(values[0]) + "".join(f" {op} {value}" for op, value in zip(operators, values[1:], strict=True))
    return Solution(working, str(or_of_ands(values, operators)))


def _expression(rng: random.Random, length: int) -> str:
    """A random expression of `length` words."""
    if length == 1:
        return rng.choice(("True", "False"))
    kinds = ["not"] * 3
    if length >= 3:
        kinds += ["brackets"] * 2 + ["operator"] * 6
    match rng.choice(kinds):
        case "not":
            return f"not {_expression(rng, length - 1)}"
        case "brackets":
            return f"( {_expression(rng, length - 2)} )"
    left = rng.randint(1, length - 2)
    return f"{_expression(rng, left)} {rng.choice(_OPERATORS)} {_expression(rng, length - 1 - left)}"


def generate_boolean(rng: random.Random) -> str:
    """Eight words, as in the benchmark; half of them True."""
    wanted = str(rng.random() < 0.5)
    while True:
        text = f"{_expression(rng, 8)} is"
        if solve_boolean(text).answer == wanted:
            return text


def solve_web_of_lies(text: str) -> Solution:
    """Works through the chain of who tells the truth."""
    body = matched(r"^Question: (.*) Does (\w+) tell the truth\?$", text)
    honest: dict[str, bool] = {}
    for sentence in body[1].rstrip(".").split(". "):
        statement = matched(r"^(\w+) (?:says (\w+) )?(lies|tells the truth)$", sentence)
        speaker, about, claim = statement[1], statement[2], statement[3] == "tells the truth"
        if about is None:
            honest[speaker] = claim
        elif about not in honest:
            raise UnsolvedError(f"nothing is known of {about}")
        else:
            honest[speaker] = honest[about] == claim
    if body[2] not in honest:
        raise UnsolvedError(f"nothing is known of {body[2]}")
    working = " ".join(f"{name} {'yes' if value else 'no'}" for name, value in honest.items())
    return Solution(working, "Yes" if honest[body[2]] else "No")


def generate_web_of_lies(rng: random.Random) -> str:
    """Five people; each speaks of the one before."""
    people = rng.sample(LIARS, 5)
    verbs = [rng.choice(("lies", "tells the truth")) for _ in people]
    sentences = [f"{people[0]} {verbs[0]}."]
    sentences += [f"{people[i]} says {people[i - 1]} {verbs[i]}." for i in range(1, 5)]
    return f"Question: {' '.join(sentences)} Does {people[-1]} tell the truth?"


_DYCK = "Complete the rest of the sequence, making sure that the parentheses are closed properly. Input: "


def solve_dyck(text: str) -> Solution:
    """Works through the brackets that are still open, outermost first."""
    stack: list[str] = []
    for symbol in matched(r" Input: (.*)$", text)[1].split():
        if symbol in CLOSER:
            stack.append(symbol)
        elif not stack or CLOSER[stack.pop()] != symbol:
            raise UnsolvedError(f"{symbol!r} closes nothing")
    if not stack:
        raise UnsolvedError("nothing is open")
    return Solution(" ".join(stack), closed(stack))


def generate_dyck(rng: random.Random) -> str:
    """Leaves one to three brackets open after 2 to about 40 symbols, mostly few."""
    wanted = rng.choice((1, 1, 2, 2, 2, 3))
    while True:
        length = min(int(2 + rng.expovariate(1 / 14)), 40)
        symbols, stack = draw_brackets(rng, length, 0.5)
        if len(stack) == wanted:
            return _DYCK + " ".join(symbols)


TASKS = (
    BBHTask(
        "boolean_expressions", "Evaluates a boolean expression.", solve_boolean, 24, generate_boolean,
    ),
    BBHTask(
        "web_of_lies", "Says whether the last of five people, who vouch for or accuse one another, tells the truth.",
        solve_web_of_lies, 48, generate_web_of_lies,
    ),
    BBHTask(
        "dyck_languages", "Closes the open brackets of a sequence in the right order.", solve_dyck, 24, generate_dyck,
    ),
)  # fmt: skip
