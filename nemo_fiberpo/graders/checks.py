"""The check of every line of a data file against its grader, before training.

Grading processes import this file; of this package it imports only `builtin.py`.
"""

from __future__ import annotations

import ast
import re
from typing import Any

from .builtin import Grader, as_formulas, gold_answer, literal, math_verify, reasoning_gym, score_answer

CANARY = "banana"  # a response that no grader may accept

_WORD = re.compile(r"(?<![A-Za-z\\])[A-Za-z]{2,}")
_COMMANDS = re.compile(r"\\(?:text|mathrm|mbox|operatorname|mathbf|textbf)\s*\{[^{}]*\}|\\[A-Za-z]+(?:\{[a-z]+\*?\})?")
_FUNCTIONS = {"sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "exp", "sqrt", "pi", "min", "max", "gcd", "lcm"}
_QUANTITY = re.compile(r"\$?-?[\d,]*\.?\d+\s+[A-Za-z][A-Za-z ]*\.?", re.ASCII)


def complaint(grader: Grader, name: str, fields: dict[str, Any], prompt: str, response: str | None) -> str:
    """What is wrong with a line of data, or "": its reference answer must score 1, its prompt and a canary less. For a
    custom grader the line's `response`, if any, is the reference."""
    if name == "reasoning_gym" and grader is reasoning_gym:
        problem, references = _gym_references(fields, response)
    elif name == "math_verify" and grader is math_verify:
        problem, references = _math_references(fields, response)
    else:
        problem, references = "", {"response": response} if response is not None else {}
    if problem:
        return problem
    for field, reference in references.items():
        score = _score(grader, fields, reference)
        if not isinstance(score, float) or score < 1.0:
            found = f"scores {score:g}" if isinstance(score, float) else f"cannot be graded ({score})"
            return f"{field}: the reference answer {reference[:200]!r} {found}; it must score 1{_hint_for(fields)}"
    return _wrongly_right(grader, fields, prompt, {text.strip() for text in references.values()})


def _wrongly_right(grader: Grader, fields: dict[str, Any], prompt: str, references: set[str]) -> str:
    remedy = '; "answer_form": "literal" asks for the final form of the answer' if grader is math_verify else ""
    for text in dict.fromkeys((prompt, prompt.rstrip(" \n=?:."), CANARY)):
        if text.strip() in references:
            continue
        score = _score(grader, fields, text)
        if isinstance(score, float) and score >= 1.0:
            what = "any text, such as" if text == CANARY else "the text of the prompt,"
            return f"prompt: {what} {text[-200:]!r}, scores {score:g} as an answer{'' if text == CANARY else remedy}"
    return ""


def _score(grader: Grader, fields: dict[str, Any], response: str) -> float | str:
    """The score, or why there is none."""
    try:
        return float(grader(fields, response))
    except MemoryError:
        raise
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _gym_references(fields: dict[str, Any], response: str | None) -> tuple[str, dict[str, str]]:
    """What is wrong with the entry, and the line's reference answers: its `response`, and the entry's own answer where
    the task's entries have one."""
    task, entry, form = fields["task"], fields["entry"], fields.get("answer_form", "text")
    references = {} if response is None else {"response": response}
    own = entry.get("answer")

    def by_task(record: dict[str, Any], answer: str) -> float:
        return score_answer(task)(answer, entry)

    if problem := _evaluated_entry(task, entry):
        return problem, references
    if form == "digit_list" and isinstance(own, str):
        score = _score(by_task, fields, own)
        if score != 1.0:
            return f"entry: its own answer {own[:200]!r} scores {score}; it must score 1{_hint_for(fields)}", references
    elif isinstance(own, str):
        references["entry"] = f"<answer>{own}</answer>" if form == "answer_tag" else own
    elif not references:
        score = _score(by_task, fields, CANARY)
        if isinstance(score, str):
            return f"entry: the task {task!r} cannot score with it ({score})", references
    return "", references


def _hint_for(fields: dict[str, Any]) -> str:
    return ". Tuples of an entry are lists in JSON, which some tasks take for wrong" if "entry" in fields else ""


def _evaluated_entry(task: str, entry: dict[str, Any]) -> str:
    """What is wrong with the parts of an entry that a task evaluates as Python though it does not evaluate answers."""
    if task == "number_sorting" and isinstance(entry.get("answer"), str):
        try:
            ast.literal_eval(entry["answer"])
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return f"entry.answer: {entry['answer'][:200]!r} is not a list of numbers, and the task would evaluate it"
    if task == "bitwise_arithmetic":
        problem = (entry.get("metadata") or {}).get("problem", "")
        if not re.fullmatch(r"[0-9a-fA-Fx()+\-*/&|^~<>\s]*", str(problem)):
            return f"entry.metadata.problem: {problem[:200]!r} is not arithmetic, and the task would evaluate it"
    return ""


def _math_references(fields: dict[str, Any], response: str | None) -> tuple[str, dict[str, str]]:
    answer = fields["answer"]
    if fields.get("answer_form", "expression") == "literal":
        if literal(answer) is None:
            return "answer: is empty", {}
        return "", {"answer": answer} | ({} if response is None else {"response": response})
    try:
        gold_answer(answer)
    except MemoryError:
        raise
    except Exception as error:
        reason = str(error) if isinstance(error, ValueError) and str(error).startswith("answer: ") else ""
        return reason or f"answer: math-verify cannot read the reference answer {answer[:200]!r} ({error})"[:500], {}
    words = [word for word in _WORD.findall(_COMMANDS.sub(" ", answer)) if word.lower() not in _FUNCTIONS]
    if words and not _QUANTITY.fullmatch(answer.strip()):
        return (
            f"answer: {answer[:200]!r}: math-verify would read {words[0]!r} as a product of letters, or as a unit; "
            "write the bare formula, words as \\text{...}",
            {},
        )
    return "", {"answer": as_formulas(answer)[0]} | ({} if response is None else {"response": response})
