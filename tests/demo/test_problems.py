"""The demonstration's text: right where it should be, random where it should be, and the same after tokenisation."""

from __future__ import annotations

import itertools
import random
import re

import pytest

from collm.demo.problems import LARGEST_RESULT, make_problem, make_tokenizer, make_worksheet


def equations(text: str) -> list[tuple[int, str, int, int]]:
    found = re.findall(r"(\d+) ([+-]) (\d+) = (\d+)", text)
    return [(int(left), sign, int(right), int(result)) for left, sign, right, result in found]


def is_right(left: int, sign: str, right: int, result: int) -> bool:
    return (left + right if sign == "+" else left - right) == result


@pytest.fixture
def rng():
    return random.Random(3)


def test_solutions_calculate_right_and_hang_together(rng):
    for _ in range(200):
        problem = make_problem(rng)
        steps = equations(problem.solution)
        assert len(steps) in (2, 3)
        assert all(is_right(*step) for step in steps)
        assert all(before[3] == after[0] for before, after in itertools.pairwise(steps))
        assert all(0 <= step[3] <= LARGEST_RESULT for step in steps)
        assert problem.is_solved_by(problem.solution)
        assert all(re.search(rf"\b{step[2]}\b", problem.prompt) for step in steps)


def test_without_arithmetic_results_are_random_and_still_used_consistently(rng):
    steps = [equations(make_problem(rng, knows_arithmetic=False).solution) for _ in range(200)]
    assert all(before[3] == after[0] for row in steps for before, after in itertools.pairwise(row))
    right = [is_right(*step) for row in steps for step in row]
    assert sum(right) / len(right) < 0.05


def test_worksheets_are_right_and_contain_no_solution(rng):
    for _ in range(100):
        sheet = make_worksheet(rng)
        assert len(equations(sheet)) == 8
        assert all(is_right(*step) for step in equations(sheet))
        assert "Answer:" not in sheet


def test_only_the_last_number_in_the_form_asked_for_counts(rng):
    problem = make_problem(rng)
    assert problem.is_solved_by(f"something else. Answer: {problem.answer}")
    assert not problem.is_solved_by(f"something else. {problem.answer}")
    assert not problem.is_solved_by(f"Answer: {problem.answer + 1}")
    assert not problem.is_solved_by(f"Answer: {problem.answer} or so")


def test_tokenizer_gives_text_back_and_knows_every_word(rng):
    tokenizer = make_tokenizer()
    for _ in range(100):
        for text in (make_problem(rng).prompt, make_problem(rng).solution, make_worksheet(rng)):
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.decode(ids) == text
            assert tokenizer.unk_token_id not in ids


def test_a_seed_is_a_problem():
    assert make_problem(random.Random(1)) == make_problem(random.Random(1))
    assert make_problem(random.Random(1)) != make_problem(random.Random(2))
