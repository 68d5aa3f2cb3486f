"""The writer over serving engines."""

from __future__ import annotations

import pytest
from conftest import tiny_collm, tiny_model

from collm.engines.transformers import TransformersEngine
from collm.evaluation.engines import EngineWriter
from collm.evaluation.generations import GenerationStore
from collm.evaluation.runner import generate_all, make_problems

ROWS = [{"prompt": "w1 " * length + "="} for length in (9, 7, 5, 3, 1)]
LENGTHS = {0: 40, 1: 2, 2: 2, 3: 2, 4: 2}  # problem -> new tokens: one is far longer than the others


@pytest.fixture
def writer(tokenizer):
    class Writer(EngineWriter):
        begun: list[int]
        lengths: dict[int, int]

        async def _write(self, problem, longest):
            self.begun.append(problem.id)
            self.max_new_tokens = self.lengths[problem.id]
            return await super()._write(problem, longest)

    model = tiny_collm()
    base, assistant = TransformersEngine(model, "base"), TransformersEngine(tiny_model(seed=5), "assistant")
    made = Writer(base, [assistant], tokenizer, frozenset(), model.config.deferral)
    made.begun, made.lengths = [], LENGTHS
    yield made
    made.close()


def test_the_next_problem_begins_where_one_ends(tokenizer, writer):
    problems = make_problems(ROWS, tokenizer)
    written = [g.id for generations in writer.write(problems, 2) for g in generations]
    assert written == [1, 2, 3, 4, 0]  # the long one ends last, and held nobody up
    assert writer.begun == [0, 1, 2, 3, 4]


def test_what_was_finished_before_an_interruption_is_kept(tokenizer, writer, tmp_path):
    problems = make_problems(ROWS, tokenizer)
    store = GenerationStore(tmp_path / "g.jsonl", {})
    add = store.add

    def interrupted(generations):
        add(generations)
        if len(store.done) == 2:
            raise KeyboardInterrupt

    store.add = interrupted
    with pytest.raises(KeyboardInterrupt):
        generate_all(writer, problems, store, batch_size=2)
    writer.begun.clear()
    again = GenerationStore(tmp_path / "g.jsonl", {})
    assert set(again.done) == {1, 2}
    generations = generate_all(writer, problems, again, batch_size=2)
    assert sorted(writer.begun) == [0, 3, 4]
    assert [len(g.token_ids) for g in generations] == [LENGTHS[p.id] for p in problems]


def test_a_router_that_draws_draws_for_each_problem_anew(tokenizer, writer):
    problems = make_problems([ROWS[0]] * 4, tokenizer)
    writer.options = {"router": {"name": "random", "rate": 0.5}}
    writer.lengths = dict.fromkeys(range(4), 20)
    generations = generate_all(writer, problems, batch_size=4)
    assert len({tuple(g.source) for g in generations}) == 4
