"""The graders that ship, in this process: what scores 1, what scores 0, and which lines of data are refused."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import sys

import pytest

from nemo_fiberpo.graders.builtin import UNSAFE_TASKS, math_verify, reasoning_gym
from nemo_fiberpo.graders.checks import CANARY, complaint

ARABIC_FIVE, WIDE_FIVE, HALF, TIMES = "\u0665", "\uff15", "\u00bd", "\u00d7"
ODD = ["", " ", "\0", "\n\n", ARABIC_FIVE, WIDE_FIVE, HALF, "nan", "inf", "-", TIMES, "1" * 5000, "(" * 300, "[" * 300]
ODD += [f"1 {TIMES} x", f"2 {TIMES} ", f"{TIMES} 3", "2 x 3.5", f"2 {TIMES} three", f"0 {TIMES} 0", "{}", "[]", "None"]
ODD += ["1e400", "$$", "\\boxed{", "\\frac{1}{0}", "\ud800"]


def math(answer: str, prompt: str = "What is it?", response: str | None = None, **fields: str) -> str:
    """What is wrong with such a line."""
    return complaint(math_verify, "math_verify", {"answer": answer} | fields, prompt, response)


def gym(task: str, entry: dict, prompt: str = "What is it?", response: str | None = None, **fields: str) -> str:
    return complaint(reasoning_gym, "reasoning_gym", {"task": task, "entry": entry} | fields, prompt, response)


def generated(task: str, seed: int = 3) -> dict:
    """An entry of the task, as it comes out of a JSONL file."""
    library = importlib.import_module("reasoning_gym")
    return json.loads(json.dumps(library.create_dataset(task, size=1, seed=seed)[0]))


# answers


@pytest.mark.parametrize("text", ODD)
def test_an_answer_that_cannot_be_read_scores_0(text):
    assert math_verify({"answer": "5"}, text) == 0.0
    assert math_verify({"answer": "5", "answer_form": "literal"}, text) == 0.0
    factors = {"answer": f"2 {TIMES} 3", "metadata": {"number": 6, "factors": [2, 3]}}
    assert reasoning_gym({"task": "prime_factorization", "entry": factors}, text) < 1.0


@pytest.mark.parametrize("gold", ["\\$18.90", "$\\$18.90$", "18.90", "$18.9$"])
@pytest.mark.parametrize("response", ["$18.90$", "18.9", "\\$18.90", "It costs $\\$18.90$."])
def test_an_amount_of_dollars_is_a_number(gold, response):
    assert math(gold) == ""
    assert math_verify({"answer": gold}, response) == 1.0
    assert math_verify({"answer": gold}, "$18.80$") == 0.0


@pytest.mark.parametrize(
    ("answer", "response", "score"),
    [
        ("5", "5", 1),
        ("5", " $5$ ", 1),
        ("5", "5.0", 1),
        ("5", "2 + 3, so \\boxed{5}", 1),
        ("5", "\\boxed{2} or \\boxed{5}", 1),
        ("5", "\\boxed{5} or \\boxed{2}", 0),
        ("5", "2-4+7", 0),
        ("5", "2-4+7=", 0),
        ("5", "not 5", 0),
        ("5", "6 or 5", 0),
        ("5", "$6=5$", 0),
        ("5", "500%", 0),
        ("5", "\\boxed{2-4+7}", 0),
        ("5", "5 5", 0),
        ("1234", "1,234", 1),
        ("1234", "12,34", 0),
        ("0.5", "1/2", 1),
        ("\\frac{1}{2}", "$\\dfrac{1}{2}$", 1),
        ("\\frac{1}{2}", "2/4", 1),
        ("\\frac{1}{2}", "1/0", 0),
        ("-\\frac{1}{2}", "-0.5", 1),
        ("x^2-1", "$x^2 - 1$", 1),
        ("x^2-1", "(x-1)(x+1)", 0),
        ("\\$18.90", "18.9", 1),
        ("5", "\\boxed{\\text{5}", 0),
    ],
)
def test_a_literal_answer_is_the_final_form_and_nothing_else(answer, response, score):
    assert math_verify({"answer": answer, "answer_form": "literal"}, response) == score


# lines of data


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("", "math-verify reads no expression"),
        ("$", "math-verify reads no expression"),
        (ARABIC_FIVE, "math-verify cannot read the reference answer"),
        ("about 5", "'about' as a product of letters"),
        ("5 or 6", "'or'"),
        ("2ab", "'ab'"),
        ("yes", "'yes'"),
    ],
)
def test_a_reference_that_math_verify_misreads_is_refused(answer, words):
    assert math(answer).startswith("answer: ") and words in math(answer)


@pytest.mark.parametrize(
    "answer",
    ["5", "-5", "1,234", "\\frac{1}{2}", "$\\frac{1}{2}$", "x^2+2x+1", "2\\sqrt{3}", "\\sin(x)", "sin(x)", "\\{1,2\\}"]
    + ["(1,2)", "x=5", "50\\%", "5 apples", "\\text{yes}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\boxed{7}", "A"],
)
def test_usual_references_are_accepted(answer):
    assert math(answer) == ""


def test_a_prompt_that_is_its_own_answer_is_refused_and_a_literal_form_helps():
    assert "the text of the prompt, '2-4+7', scores 1" in math("5", "2-4+7=")
    assert 'literal" asks for the final form' in math("5", "2-4+7=")
    assert math("5", "2-4+7=", answer_form="literal") == ""
    assert "the text of the prompt" in math("\\frac{1}{2}", "Simplify $\\frac{2}{4}$.")
    assert math("\\frac{1}{2}", "Simplify $\\frac{2}{4}$.", answer_form="literal") == ""
    assert "answer: is empty" in math(" ", answer_form="literal")


def test_a_response_for_the_warm_start_must_score_1_too():
    assert math("5", response="$5$") == ""
    assert math("5", response="six").startswith("response: the reference answer 'six' scores 0; it must score 1")


@pytest.mark.parametrize("task", ["arc_agi", "rearc"])
def test_entries_that_json_changes_are_refused(task):
    entry = {"answer": "1 2", "metadata": {"input": [[1]], "output": [[1, 2]]}}
    assert reasoning_gym({"task": task, "entry": entry}, "1 2") == pytest.approx(0.05)
    assert gym(task, entry).startswith("entry: the reference answer '1 2' scores 0.05; it must score 1")
    assert "Tuples of an entry are lists in JSON" in gym(task, entry)


def test_a_task_that_finds_everything_right_is_refused():
    entry = generated("game_of_life_halting")
    if entry["answer"] == CANARY:
        pytest.fail("the canary is a word that no task has as its answer")
    found = {gym("game_of_life_halting", generated("game_of_life_halting", seed)) for seed in range(4)}
    assert any("scores 1 as an answer" in text for text in found)


@pytest.mark.parametrize(
    "task", ["chain_sum", "spell_backward", "number_sorting", "prime_factorization", "gcd", "base_conversion", "sudoku"]
)
def test_generated_entries_are_accepted(task):
    entry = generated(task)
    assert gym(task, entry, entry["question"]) == ""
    assert gym(task, entry, entry["question"], answer_form="answer_tag") == ""


def test_an_entry_without_an_answer_of_its_own_is_tried_with_the_canary():
    assert gym("graph_color", generated("graph_color")) == ""
    assert "cannot score with it" in gym("rubiks_cube", {"question": "", "answer": None})


def test_digits_are_compared_with_the_entrys_list():
    entry = {"answer": "['1.0', '5.0', '9.0']", "metadata": {"direction": "ascending"}}
    assert gym("number_sorting", entry, "951<", "159", answer_form="digit_list") == ""
    wrong = gym("number_sorting", entry, "951<", "951", answer_form="digit_list")
    assert wrong.startswith("response: the reference answer '951' scores 0")


@pytest.mark.parametrize(
    ("task", "entry", "field"),
    [
        ("number_sorting", {"answer": "[open('/tmp/x', 'w')]", "metadata": {"direction": "ascending"}}, "entry.answer"),
        ("bitwise_arithmetic", {"answer": "0x1", "metadata": {"problem": "exit()"}}, "entry.metadata.problem"),
    ],
)
def test_an_entry_that_its_task_would_run_is_refused(task, entry, field):
    assert gym(task, entry).startswith(f"{field}: ")
    assert gym(task, generated(task)) == ""


def test_a_grader_of_ones_own_is_held_to_the_lines_response():
    def longest(record, response):
        return float(len(response) >= record["length"])

    assert complaint(longest, "mine", {"length": 20}, "prompt", "a" * 20) == ""
    assert complaint(longest, "mine", {"length": 20}, "prompt", "short").startswith("response: the reference answer")
    assert "the text of the prompt, 'prompt', scores 1" in complaint(longest, "mine", {"length": 6}, "prompt", "a" * 20)
    assert "any text, such as 'banana'" in complaint(longest, "mine", {"length": 6}, "p", None)


# reasoning-gym as it is installed

# Modules that evaluate their own problems while they make them, or a part of the entry that is checked.
GENERATORS = {"basic_arithmetic", "bitwise_arithmetic", "codeio", "gsm_symbolic", "number_sorting"}


def evaluates(module) -> bool:
    """Whether a module's text calls what runs text as Python."""
    calls = [node.func for node in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(node, ast.Call)]
    names = {call.id if isinstance(call, ast.Name) else getattr(call, "attr", "") for call in calls}
    own = {node.name for node in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(node, ast.FunctionDef)}
    return bool(names & {"eval", "exec", "parse_expr", "sympify", "literal_eval_unsafe"} - own)


def test_every_task_that_evaluates_is_known():
    importlib.import_module("reasoning_gym")
    factory = importlib.import_module("reasoning_gym.factory")
    found = {task for task, (kind, _) in factory.DATASETS.items() if evaluates(sys.modules[kind.__module__])}
    assert set(UNSAFE_TASKS) <= found
    assert found - set(UNSAFE_TASKS) <= GENERATORS, "look whether score_answer evaluates the answer"
