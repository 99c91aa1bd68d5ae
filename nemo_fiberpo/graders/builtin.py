"""The built-in graders.

A grader is a function `(record, response) -> score`: `record` is the prompt's grader fields (a dict from the JSONL
line), `response` the policy's text. A wrong or unreadable response scores 0; an exception means that the grader is
defective. Custom graders are named "package.module:function" in the config.

Grading processes import this file by its path (see `process.py`), with only the standard library and the grading
libraries that the data need: they hold no torch, no CUDA context and no process group.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

Grader = Callable[[dict[str, Any], str], float]

# name -> (fields that a record must have, fields that it may have), each with the type it has in JSON
GRADER_FIELDS: dict[str, tuple[dict[str, type], dict[str, type]]] = {
    "reasoning_gym": ({"task": str, "entry": dict}, {"answer_form": str}),
    "math_verify": ({"answer": str}, {"answer_form": str}),
}
ANSWER_FORMS = {
    "reasoning_gym": ("text", "digit_list", "answer_tag"),
    "math_verify": ("expression", "literal"),
}
# Tasks of reasoning-gym that evaluate the answer as Python, by `eval` or by sympy's `parse_expr`.
UNSAFE_TASKS = (
    "binary_matrix",
    "countdown",
    "intermediate_integration",
    "n_queens",
    "polynomial_multiplication",
    "puzzle24",
    "simple_integration",
    "spiral_matrix",
    "string_insertion",
)

_NUMBER = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?", re.ASCII)
_FRACTION = re.compile(r"([+-]?)(?:\\[dt]?frac\{(\d+)\}\{(\d+)\}|(\d+)/(\d+))", re.ASCII)


def reasoning_gym(record: dict[str, Any], response: str) -> float:
    """reasoning-gym's `score_answer(answer, entry)` of the task, in [0, 1].

    `answer_form` tells how the answer is read from the response: "text" (default): unchanged; "answer_tag": between the
    last <answer> and </answer>; "digit_list": `1579` as the list `[1,5,7,9]`, for tasks whose answer is a list of
    digits.

    An answer on which the scorer raises scores 0; the entry was checked before training.
    """
    form = record.get("answer_form", "text")
    answer: str | None = response
    if form == "digit_list":
        answer = "[" + ",".join(response) + "]"
    elif form == "answer_tag":
        answer = importlib.import_module("reasoning_gym.utils").extract_answer(response)
    elif form != "text":
        raise ValueError(f"answer_form is {form!r}; valid are {', '.join(ANSWER_FORMS['reasoning_gym'])}")
    return _or_unreadable(lambda: score_answer(record["task"])(answer, record["entry"]))


def _or_unreadable(score: Callable[[], float]) -> float:
    """The score, or 0 if the library fails on the answer."""
    try:
        return float(score())
    except MemoryError:  # the process's limit, not the answer's fault
        raise
    except Exception:
        return 0.0


@functools.cache
def score_answer(task: str) -> Callable[[str | None, dict[str, Any]], float]:
    """The scorer of a reasoning-gym task. ValueError with the nearest valid name if there is no such task."""
    factory = importlib.import_module("reasoning_gym.factory")
    importlib.import_module("reasoning_gym")  # registers the tasks
    if task not in factory.DATASETS:
        close = difflib.get_close_matches(task, factory.DATASETS, n=1)  # this file imports nothing of the package
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"task: {task!r} is not a task of reasoning-gym{hint}")
    return factory.get_score_answer_fn(task)


def math_verify(record: dict[str, Any], response: str) -> float:
    """1.0 if the response equals the reference `record["answer"]`, else 0.0, also if it cannot be read.

    `answer_form` "expression" (default): math-verify finds a formula in the response that equals the reference; `2-4+7`
    then equals 5, and "not 5" contains 5. "literal": the response, or its last \\boxed{}, is the final form of the
    answer: the same number or fraction, or the same formula character by character.

    The library's own time limits are off: the pool has one.
    """
    if record.get("answer_form", "expression") == "literal":
        return float(literal(response) == literal(record["answer"]))
    library = importlib.import_module("math_verify")
    gold = gold_answer(record["answer"])

    def verified() -> float:
        found = library.parse(_without_dollars(response), parsing_timeout=None, raise_on_error=True)
        return library.verify(gold, found, timeout_seconds=None, raise_on_error=True)

    return _or_unreadable(verified)


def _without_dollars(text: str) -> str:
    return text.replace("\\$", "")  # LaTeX's dollar sign, which math-verify takes for the end of a formula


@functools.lru_cache(maxsize=4096)
def gold_answer(answer: str) -> list[Any]:
    """The reference answer as math-verify's expressions; it may be bare LaTeX (`\\frac{1}{2}`) or have its own $."""
    library = importlib.import_module("math_verify")
    for candidate in as_formulas(answer):
        if gold := library.parse(candidate, parsing_timeout=None, raise_on_error=True):
            return gold
    raise ValueError(f"answer: math-verify reads no expression in the reference answer {answer!r}")


def as_formulas(answer: str) -> list[str]:
    """The texts to parse the reference answer from, the likeliest first."""
    bare = _without_dollars(answer).strip()
    return [bare] if "$" in bare or "\\boxed" in bare else [f"${bare}$", bare]


def literal(text: str) -> Fraction | str | None:
    """The final form in a text: its last \\boxed{}, else all of it; None for an empty one."""
    start = text.rfind("\\boxed{")
    text = _in_braces(text[start + len("\\boxed") :]) if start >= 0 else text
    text = _without_dollars(text).strip()
    if len(text) > 1 and text[0] == text[-1] == "$":
        text = text.strip("$")
    text = re.sub(r"\\left|\\right|\\[!,;]|\s", "", text).replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    if len(text) > 1000:  # Python reads no integer of more than 4300 digits
        return text
    if text and _NUMBER.fullmatch(text) and text[-1].isdigit():
        return Fraction(text.replace(",", ""))
    if (match := _FRACTION.fullmatch(text)) and int(match[3] or match[5]):
        return Fraction(int(match[1] + (match[2] or match[4])), int(match[3] or match[5]))
    return text or None


def _in_braces(text: str) -> str:
    """The content of the braces that the text begins with."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return text[1:place]
    return ""


# what grading processes do with graders


def prepare(grader: Grader, record: dict[str, Any]) -> None:
    """Warm up before the first response: imports, tables, compiled regexes."""
    if grader is reasoning_gym:
        score_answer(record["task"])
    elif grader is math_verify:
        math_verify({"answer": "1"}, "$1$")


def load_grader(target: str) -> Grader:
    """The function named by "package.module:function", or a built-in grader by its name."""
    if ":" not in target:
        return {"reasoning_gym": reasoning_gym, "math_verify": math_verify}[target]
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(module), function)


def runs_answers(grader: Grader, record: dict[str, Any]) -> bool:
    """Whether responses may run as code: with custom graders, and with the tasks that evaluate them."""
    return grader is not math_verify and (grader is not reasoning_gym or record.get("task") in UNSAFE_TASKS)
