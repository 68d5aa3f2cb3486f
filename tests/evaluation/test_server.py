from __future__ import annotations

import contextlib
import dataclasses

import pytest

from collm.errors import AssistantError
from collm.evaluation.runner import ModelWriter, generate_all, make_problems
from collm.evaluation.server import ServerWriter
from tests.serving.running import running

ROWS = [{"prompt": f"w{i} " * (1 + i % 3) + "="} for i in range(5)]


@pytest.fixture(scope="module")
def server():
    with running() as one:
        yield one


@pytest.mark.parametrize("options", [{"threshold": 0.5}, {"deferral_rate": 0.5}])
def test_a_server_writes_what_generate_writes(server, tokenizer, options):
    problems = make_problems(ROWS, tokenizer)
    threshold = {"threshold": 0.4} if "deferral_rate" in options else options  # by the server's table
    here = ModelWriter(server.base, tokenizer, server.assistants, threshold, 12)
    there = ServerWriter(server.url, tokenizer, options, 12)
    assert there.model == "tiny"
    for mine, theirs in zip(generate_all(here, problems), generate_all(there, problems, batch_size=3), strict=True):
        assert theirs.deferral_probs == pytest.approx(mine.deferral_probs, abs=1e-4)
        same = {"deferral_probs": [], "seconds": 0.0}
        assert dataclasses.replace(theirs, **same) == dataclasses.replace(mine, **same)
    there.close()


def test_refusals_are_the_servers_own_words(server, tokenizer):
    problems = make_problems(ROWS, tokenizer)
    there = ServerWriter(server.url, tokenizer, {"deferral_rate": 0.9}, 4)
    with contextlib.closing(there), pytest.raises(AssistantError, match="refuses /completions"):
        generate_all(there, problems)
    with pytest.raises(AssistantError, match="does not answer"):
        ServerWriter("http://127.0.0.1:9", tokenizer, {}, 4)
