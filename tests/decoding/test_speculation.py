"""Speculation changes how much work is done, never what is written."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from collm.decoding import generation, speculation
from collm.decoding.sampling import gumbel, noise_key, uniform
from collm.decoding.speculation import DraftGate, Lookup, ReadAhead
from tests.conftest import tiny_collm, tiny_model
from tests.decoding.test_exactness import models, ragged_prompts
from tests.decoding.test_generate import generate


@torch.no_grad()
def exact_marginals(base, assistant, prompt: list[int], steps: int, threshold: float) -> torch.Tensor:
    """`(steps, vocabulary)` probability of each token at each step, by going through all texts."""
    vocabulary = base.config.vocab_size
    marginals = torch.zeros(steps, vocabulary, dtype=torch.float64)
    weights = {(): 1.0}
    for step in range(steps):
        texts = list(weights)
        ids = torch.tensor([prompt + list(text) for text in texts])
        ours, theirs = base(input_ids=ids), assistant(input_ids=ids)
        d = torch.sigmoid(ours.deferral_logits[:, -1, 0])
        logits = torch.where((d > threshold)[:, None], theirs.logits[:, -1], ours.logits[:, -1])
        probs = logits.double().softmax(-1)
        following = {}
        for text, p in zip(texts, probs, strict=True):
            marginals[step] += weights[text] * p
            following.update({(*text, v): weights[text] * float(p[v]) for v in range(vocabulary)})
        weights = following
    return marginals


@pytest.mark.parametrize("speculate", [False, True])
def test_sampling_has_the_exact_distribution_at_every_position(speculate):
    base = tiny_collm("llama", vocab_size=5, initializer_range=0.15)
    assistant = tiny_model("llama", seed=10, vocab_size=5, initializer_range=0.15)
    prompt, rows, steps = [3, 4, 3], 4000, 5
    with torch.no_grad():
        texts = torch.tensor([prompt + list(text) for text in itertools.product(range(5), repeat=2)])
        threshold = float(torch.sigmoid(base(input_ids=texts).deferral_logits[:, -1]).median()) + 1e-3
    torch.manual_seed(0)
    out = generate(
        base, assistant, {"input_ids": torch.tensor([prompt] * rows)}, max_new_tokens=steps, do_sample=True, top_k=0,
        speculate=speculate, threshold=threshold,
    )  # fmt: skip
    assert 0.2 < (out.source == 1).float().mean() < 0.8
    assert not speculate or out.stats["drafted"] > out.stats["accepted"] > 0
    expected = exact_marginals(base, assistant, prompt, steps, threshold) * rows
    for step in range(steps):
        observed = torch.bincount(out.sequences[:, 3 + step], minlength=5).double()
        chi_square = float(((observed - expected[step]) ** 2 / expected[step]).sum())
        assert chi_square < 23.5, f"step {step}: p < 0.0001 at 4 degrees of freedom"


def test_the_noise_is_uniform_and_gumbel():
    draws = torch.tensor([uniform(5, row, step) for row in range(50) for step in range(200)])
    assert abs(float(draws.mean()) - 0.5) < 0.01
    assert abs(float(draws.var()) - 1 / 12) < 0.002
    noise = gumbel([noise_key(5, 0, step, 2) for step in range(20)], 1000, torch.device("cpu"))
    assert abs(float(noise.mean()) - 0.5772) < 0.03
    assert abs(float(noise.var()) - 1.6449) < 0.05
    correlation = torch.corrcoef(torch.stack([noise[0], noise[1], noise[:, :1].flatten().repeat(50)]))
    assert float((correlation - torch.eye(3)).abs().max()) < 0.15


def test_a_twin_as_assistant_is_asked_far_less_often_than_it_writes(monkeypatch):
    base, twin = tiny_collm("llama"), tiny_model("llama", seed=0)
    monkeypatch.setattr(generation, "step_cost", lambda model: 4.0 if model is twin else 1.0)
    inputs = ragged_prompts(1)
    plain = generate(base, twin, inputs, max_new_tokens=160, router="random:rate=0.4", speculate=False)
    fast = generate(base, twin, inputs, max_new_tokens=160, router="random:rate=0.4", speculate=True)
    assert plain.stats["assistant_calls"] == plain.stats["deferrals"]
    assert fast.stats["accepted"] == fast.stats["drafted"] == fast.stats["deferrals"][0]
    assert fast.stats["assistant_calls"][0] < 0.4 * fast.stats["deferrals"][0]
    assert fast.stats["base_calls"] < plain.stats["base_calls"]


def test_a_row_that_ends_keeps_no_scores_of_what_was_drafted_behind(monkeypatch):
    base, assistants = models("llama", 1)
    monkeypatch.setattr(DraftGate, "is_open", lambda *_: True)  # to the end of the text
    free = generate(base, assistants).sequences[:, -16:]
    for step in range(2, 8):
        out = generate(base, assistants, eos_token_id=[int(free[0, step])], output_logits=True, output_scores=True)
        finished = (out.source < 0).nonzero().tolist()
        assert finished
        assert not any(scores[step][row].any() for row, step in finished for scores in (out.logits, out.scores))


def test_without_agreement_the_plain_loop_remains(monkeypatch):
    base, assistants = models("llama", 1)  # random models, which agree on nothing
    monkeypatch.setattr(generation, "step_cost", lambda model: 4.0 if model is assistants[0] else 1.0)
    inputs = ragged_prompts(1)
    options = {"max_new_tokens": 120, "router": "random:rate=0.3"}
    torch.manual_seed(2)
    plain = generate(base, assistants, inputs, speculate=False, **options)
    torch.manual_seed(2)
    fast = generate(base, assistants, inputs, speculate=True, **options)
    assert torch.equal(plain.sequences, fast.sequences)
    assert fast.stats["base_calls"] <= 1.05 * plain.stats["base_calls"]
    assert fast.stats["assistant_calls"][0] <= plain.stats["assistant_calls"][0]


def test_the_gate_learns_from_every_deferral():
    gate = DraftGate(cost_ratio=3.0)
    assert gate.is_open(gate.acceptance(0.95))
    assert not gate.is_open(gate.acceptance(0.15))
    before = gate.acceptance(0.95)
    for _ in range(60):
        gate.record(0.95, accepted=False)
    assert gate.acceptance(0.95) < 0.2 < before
    assert not gate.is_open(gate.acceptance(0.95))
    assert not DraftGate(cost_ratio=1.0).is_open(0.999)  # an assistant as cheap as the base is simply asked


def naive_lookup(text: list[int], count: int) -> tuple[int, list[int]]:
    for n in range(min(speculation.LONGEST_MATCH, len(text) - 1), 0, -1):
        for end in range(len(text) - 1, n - 1, -1):
            if text[end - n : end] == text[-n:]:
                return n, text[end : end + count]
    return 0, []


def test_lookup_finds_the_latest_and_longest_match_while_tokens_come_and_go():
    dice = random.Random(3)
    prompt = dice.choices(range(6), k=20)
    lookup, tokens = Lookup(prompt), []
    for _ in range(300):
        if tokens and dice.random() < 0.3:
            step = dice.randrange(len(tokens))
            lookup.cut(step, tokens[step:])
            del tokens[step:]
        tokens += dice.choices(range(6), k=dice.randint(0, 3))
        found, expected = lookup.after(tokens, [], 3), naive_lookup(prompt + tokens, 3)
        assert found[0] <= expected[0]
        if found[0]:  # an index that tokens were cut from may miss a match, but never makes one up
            text, n = prompt + tokens, found[0]
            assert any(
                text[end - n : end] == text[-n:] and text[end : end + 3] == found[1] for end in range(n, len(text))
            )
    fresh = Lookup(prompt)
    assert fresh.after(tokens, [], 3) == naive_lookup(prompt + tokens, 3)


def test_a_source_that_is_never_right_is_given_up():
    ahead, lookup = ReadAhead(), Lookup([1, 2, 3, 1, 2])
    assert ahead.propose(lookup, [], None, 2) == (2, [3, 1])
    assert ahead.propose(lookup, [], 7, 3) == (0, [7])
    for source, _ in itertools.product((0, 2), range(20)):
        ahead.record(source, right=False)
    assert ahead.propose(lookup, [], 7, 3) == (2, [])


def test_a_discarded_draft_is_resumed_behind_the_right_token():
    lookup = Lookup([])
    lookup.cut(2, [20, 21, 22, 23])  # 20 was wrong, the rest was drafted behind it
    replaced, inserted = speculation.REPLACED, speculation.INSERTED
    assert lookup.resumed([10, 11], 2) == []  # the right token is not there yet
    assert lookup.resumed([10, 11, 30], 2) == [(replaced, [21, 22]), (inserted, [20, 21])]
    assert lookup.resumed([10, 11, 30, 21], 2) == [(replaced, [22, 23])]
    assert lookup.resumed([10, 11, 30, 20, 21, 22], 2) == [(inserted, [23])]
    assert lookup.resumed([10, 11, 30, 31], 2) == []  # the text went another way
    assert lookup.resumed([10, 11, 30, 21, 22, 23], 2) == lookup.resumed([10, 11, 30, 20, 21, 22, 23], 2) == []

    ahead = ReadAhead()
    for source in (replaced, replaced, inserted):
        ahead.record(source, right=source == inserted)
    assert ahead.propose(lookup, [10, 11, 30], None, 2) == (inserted, [20, 21])  # right more often
    assert ahead.propose(lookup, [10, 11, 30], 9, 2) == (0, [9])  # what an assistant says is worth more


def test_padding_is_not_read_by_speculation():
    base, assistants = models("llama", 1)
    alone = generate(base, assistants, ragged_prompts(1), speculate=True)
    assert alone.stats["base_padding"] == alone.stats["assistant_padding"][0] == 0
