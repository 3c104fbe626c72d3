"""Calculator requests: the `tool` rows a model is trained on, and out-of-distribution `tool_ood` rows.

In: a seeded `random.Random` and `RequestOptions`. Out: endless iterators of rows whose target is exactly
`<tool_call>calculator(EXPR)</tool_call>`, EXPR without spaces.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from data.rows import DataError, Row, make_row

CALL_OPEN = "<tool_call>"
CALL_CLOSE = "</tool_call>"

# `{e}` is an expression in symbols; these serve every operator and every length.
SYMBOL_REQUESTS = (
    "What is {e}?",
    "What's {e}?",
    "Calculate {e}.",
    "Please calculate {e}.",
    "Compute {e}.",
    "Can you compute {e} for me?",
    "Work out {e}, please.",
    "Evaluate {e}.",
    "How much is {e}?",
    "Give me the value of {e}.",
    "I need the result of {e}.",
    "Find {e}.",
    "Could you tell me what {e} equals?",
    "My worksheet asks for {e}. What should I write?",
    "Please check my sum: what does {e} come to?",
    "I have to know {e} before noon. Please calculate it.",
)

# `{a}` and `{b}` in the order of the expression a OP b, whatever the order in the sentence.
WORD_REQUESTS = {
    "+": (
        "What is {a} plus {b}?",
        "Add {a} and {b}.",
        "What is the sum of {a} and {b}?",
        "How much do {a} and {b} make together?",
        "I had {a} coins and found {b} more. How many coins do I have now?",
        "A shop sold {a} loaves on Monday and {b} on Tuesday. How many is that in total?",
        "Could you add {b} to {a}?",
    ),
    "-": (
        "What is {a} minus {b}?",
        "Subtract {b} from {a}.",
        "What do I get if I take {b} away from {a}?",
        "How much is {a} less {b}?",
        "I had {a} dollars and spent {b}. How much is left?",
        "There were {a} seats and {b} are taken. How many are free?",
        "What is the difference {a} minus {b}?",
    ),
    "*": (
        "What is {a} times {b}?",
        "Multiply {a} by {b}.",
        "What is the product of {a} and {b}?",
        "How much is {a} multiplied by {b}?",
        "There are {a} boxes with {b} pens in each. How many pens is that?",
        "A ticket costs {b} dollars and we need {a} of them. What will we pay?",
        "Could you multiply {a} and {b} for me?",
    ),
    "/": (
        "What is {a} divided by {b}?",
        "Divide {a} by {b}.",
        "How many times does {b} go into {a}?",
        "How much is {a} over {b}?",
        "We share {a} dollars between {b} people. How much does each one get?",
        "I drove {a} miles in {b} days. How many miles is that per day?",
        "Could you divide {a} by {b} for me?",
    ),
}

CONTEXTS = (
    "I'm checking my homework.",
    "We are planning a school trip.",
    "I need a hand with some numbers.",
    "This is for my budget.",
    "I forgot my calculator today.",
    "My daughter asked me this at breakfast.",
    "Quick question from the workshop.",
    "I'm filling in a form.",
    "We are counting the stock in the shop.",
    "I'd like to be sure about this one.",
    "Here is the next exercise.",
    "My teacher wants an exact answer.",
)
CONTEXT_SHARE = 0.4
SYMBOL_SHARE = 0.5

# Phrasings for evaluation only: no training request or context shares their sentence frames.
OOD_SYMBOL_REQUESTS = (
    "{e}: go on, the figure, if you would.",
    "On the blackboard it says {e} and nobody in class knows where that ends up; do you?",
    "Somebody scribbled {e} on a napkin, kindly resolve it.",
    "Punch {e} into whatever you use and report back.",
    "{e} = ?",
    "Would {e} ring a bell, and if so, at which number?",
    "The display went blank after I typed {e}; what ought it have shown?",
    "Settle a bet between colleagues: {e} lands on which number?",
)
OOD_WORD_REQUESTS = {
    "+": (
        "Put {a} together with {b}: the total, please?",
        "Grandma collected {a} stamps, her neighbour hands over {b} extra ones; tally them up.",
        "{a} increased by {b} leads to which number?",
        "Tot up {a} along with {b}.",
    ),
    "-": (
        "Starting at {a}, step down by {b}; where does one arrive?",
        "{a} reduced by {b} leaves which number?",
        "Of {a} balloons, {b} burst during the fair; tally the survivors.",
        "Knock {b} off {a} and report the remainder.",
    ),
    "*": (
        "{a} lots of {b} amount to which number?",
        "Every one of {a} shelves carries {b} jars; tally the jars.",
        "Scale {a} up by a factor of {b}.",
        "{a} rows, {b} chairs per row: state the seating capacity.",
    ),
    "/": (
        "Split {a} evenly {b} ways and report one portion.",
        "{a} apportioned among {b} heirs leaves every heir with which number?",
        "{b} equal slices out of {a}: state the size of a slice.",
        "Reduce the ratio {a} to {b} into a single number.",
    ),
}


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """Operators and operands of the requests.

    operators: the operators used, any of `+-*/`. operand_min, operand_max: range of operands in training, both ends
    included. ood_operand_min, ood_operand_max: range that appears only in evaluation; it must be above the training
    range. decimals: a third of the operands have one or two decimals. negatives: a quarter are negative. parentheses: a
    third of the symbol requests have three or four operands with parentheses.
    """

    operators: str = "+-*/"
    operand_min: int = 1
    operand_max: int = 999
    ood_operand_min: int = 1000
    ood_operand_max: int = 99999
    decimals: bool = False
    negatives: bool = False
    parentheses: bool = False

    def __post_init__(self) -> None:
        if not self.operators or set(self.operators) - set("+-*/"):
            raise DataError(f"operators is {self.operators!r}; allowed are one or more of + - * /")
        if not 0 <= self.operand_min < self.operand_max:
            raise DataError(
                f"operand_min {self.operand_min} and operand_max {self.operand_max} must satisfy 0 <= min < max"
            )
        if not self.operand_max < self.ood_operand_min < self.ood_operand_max:
            raise DataError(
                f"ood_operand_min {self.ood_operand_min} and ood_operand_max {self.ood_operand_max} must satisfy "
                f"operand_max ({self.operand_max}) < min < max, so that evaluation operands are unseen"
            )


def call_target(expression: str) -> str:
    """The answer to a request: one calculator call, with spaces removed from the expression."""
    return f"{CALL_OPEN}calculator({expression.replace(' ', '')}){CALL_CLOSE}"


def tool_rows(rng: random.Random, options: RequestOptions) -> Iterator[Row]:
    """Endless in-distribution requests, label `tool`; half in symbols, half in words, some after a context."""
    bounds = (options.operand_min, options.operand_max)
    while True:
        text, expression = _request(rng, options, bounds, SYMBOL_REQUESTS, WORD_REQUESTS)
        if rng.random() < CONTEXT_SHARE:
            text = f"{rng.choice(CONTEXTS)} {text}"
        yield make_row(text, call_target(expression), "tool")


def tool_ood_rows(rng: random.Random, options: RequestOptions) -> Iterator[Row]:
    """Endless requests in evaluation-only phrasings, label `tool_ood`, alternating between two families.

    First family: operands from the training range, so that only the phrasing is new. Second family: operands from the
    unseen range, or chains of more operands than any training request has.
    """
    usual = (options.operand_min, options.operand_max)
    unseen = (options.ood_operand_min, options.ood_operand_max)
    while True:
        for bounds in (usual, unseen):
            if bounds is unseen and rng.random() < 0.5:
                length = rng.randint(5, 6) if options.parentheses else 3
                expression = _chain(rng, options, usual, length)
                text = rng.choice(OOD_SYMBOL_REQUESTS).format(e=expression)
            else:
                text, expression = _request(rng, options, bounds, OOD_SYMBOL_REQUESTS, OOD_WORD_REQUESTS)
            yield make_row(text, call_target(expression), "tool_ood")


def _request(
    rng: random.Random,
    options: RequestOptions,
    bounds: tuple[int, int],
    symbol_requests: tuple[str, ...],
    word_requests: Mapping[str, tuple[str, ...]],
) -> tuple[str, str]:
    """One request and its expression."""
    if rng.random() < SYMBOL_SHARE:
        if options.parentheses and rng.random() < 1 / 3:
            expression = _with_parentheses(rng, options, bounds)
        else:
            expression = _chain(rng, options, bounds, 2)
        return rng.choice(symbol_requests).format(e=expression), expression
    operator = rng.choice(options.operators)
    a, b = _operand(rng, options, bounds), _operand(rng, options, bounds, nonzero=operator == "/")
    return rng.choice(word_requests[operator]).format(a=a, b=b), f"{a} {operator} {_enclosed(b)}"


def _chain(rng: random.Random, options: RequestOptions, bounds: tuple[int, int], length: int) -> str:
    """`length` operands joined by operators, spaced: `12 + 7`."""
    parts = [_operand(rng, options, bounds)]
    for _ in range(length - 1):
        operator = rng.choice(options.operators)
        parts += [operator, _enclosed(_operand(rng, options, bounds, nonzero=operator == "/"))]
    return " ".join(parts)


def _with_parentheses(rng: random.Random, options: RequestOptions, bounds: tuple[int, int]) -> str:
    """Three or four operands; never a division by a parenthesis, which could be zero."""
    inner = f"({_chain(rng, options, bounds, 2)})"
    operator = rng.choice(options.operators)
    last = _enclosed(_operand(rng, options, bounds, nonzero=operator == "/"))
    joiner = rng.choice([symbol for symbol in options.operators if symbol != "/"] or ["/"])
    if joiner == "/":
        return f"{inner} / {last if operator == '/' else _enclosed(_operand(rng, options, bounds, nonzero=True))}"
    first = _operand(rng, options, bounds)
    shape = rng.randrange(3)
    if shape == 0:
        return f"{inner} {operator} {last}"
    if shape == 1:
        return f"{first} {joiner} {inner}"
    return f"{inner} {joiner} ({_chain(rng, options, bounds, 2)})"


def _operand(rng: random.Random, options: RequestOptions, bounds: tuple[int, int], nonzero: bool = False) -> str:
    low, high = bounds
    number = rng.randint(max(low, 1) if nonzero else low, high)
    text = str(number)
    if options.decimals and number < high and rng.random() < 1 / 3:
        text += f".{rng.randint(1, 9)}" if rng.random() < 0.5 else f".{rng.randint(0, 9)}{rng.randint(1, 9)}"
    if options.negatives and rng.random() < 1 / 4:
        text = f"-{text}"
    return text


def _enclosed(operand: str) -> str:
    """A negative operand after an operator in parentheses, so that no two signs touch."""
    return f"({operand})" if operand.startswith("-") else operand
