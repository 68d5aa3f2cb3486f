from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import VOCAB_SIZE, tiny_collm, tiny_model

from collm.decoding.routers import ROUTERS, RoutingContext
from collm.errors import ConfigurationError
from collm.evaluation.likelihood import base_uncertainty, other_choices, perplexity, router_scores, score_texts


def some_texts(count: int = 5, seed: int = 3) -> list[tuple[list[int], list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    texts = []
    for n in range(count):
        ids = torch.randint(3, VOCAB_SIZE, (6 + 3 * n,), generator=generator).tolist()
        texts.append((ids, [-100] * (2 + n) + ids[2 + n :]))
    return texts


def oracle(model, assistants, ids: list[int], t: int) -> tuple[float, list[float], torch.Tensor, torch.Tensor]:
    """log P_0, log P_k and pi at one position, from whole forward passes in float64."""
    prefix = torch.tensor([ids[:t]])
    with torch.no_grad():
        out = model(prefix)
        base = out.logits[0, -1].double().log_softmax(-1)
        others = [a(prefix).logits[0, -1].double().log_softmax(-1) for a in assistants]
    z = out.deferral_logits[0, -1].double()
    pi = torch.cat([z.new_zeros(1), z]).softmax(-1)
    return base, others, pi


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("count", [1, 2])
def test_scores_are_those_of_a_loop_over_positions(architecture, count):
    model = tiny_collm(architecture, num_assistants=count)
    assistants = [tiny_model(architecture, seed=5 + k) for k in range(count)]
    texts = some_texts(3)
    for (ids, labels), scores in zip(texts, score_texts(model, assistants, texts, batch_tokens=40), strict=True):
        targets = [t for t, label in enumerate(labels) if label != -100]
        assert len(scores.base) == len(targets)
        for n, t in enumerate(targets):
            base, others, pi = oracle(model, assistants, ids, t)
            probabilities = torch.stack([base, *others]).exp()[:, ids[t]]
            assert scores.base[n].item() == pytest.approx(base[ids[t]].item(), abs=2e-5)
            assert scores.mixture[n].item() == pytest.approx(math.log(float(pi @ probabilities)), abs=2e-5)
            assert scores.deferral_probs[n].item() == pytest.approx(1 - pi[0].item(), abs=1e-5)
            asked = others[int(pi[1:].argmax())].argmax()
            differs, known = scores.differs
            if known[n]:
                assert bool(differs[n]) == bool(base.argmax() != asked)


def test_perplexity_of_a_mixture_lies_in_its_interval_and_weighs_by_tokens():
    model, assistant = tiny_collm(), tiny_model(seed=5)
    scores = score_texts(model, [assistant], some_texts())
    result = perplexity(scores)
    tokens = torch.cat([s.mixture for s in scores])
    assert result["tokens"] == len(tokens)
    assert result["mixture"]["perplexity"] == pytest.approx(math.exp(-tokens.double().mean()), rel=1e-6)
    for name in ("base", "assistant_1", "mixture"):
        assert result[name]["low"] < result[name]["perplexity"] < result[name]["high"]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("learned", {}),
        ("ema", {"decay": 0.3}),
        ("scheduled", {"shape": "cosine", "steps": 6}),
        ("scheduled", {"shape": "constant", "steps": 4}),
        ("entropy", {}),
        ("top_probability", {}),
        ("margin", {}),
    ],
)
def test_a_router_asks_exactly_where_its_score_exceeds_its_threshold(name, parameters):
    model = tiny_collm()
    [(ids, labels)] = some_texts(1, seed=9)
    ids, labels = ids * 3, [-100] * 4 + (ids * 3)[4:]
    [uncertainty] = base_uncertainty(model, [(ids, labels)])
    with torch.no_grad():
        out = model(torch.tensor([ids]))
    probs = 1 / (1 + out.deferral_logits[0, 3:-1, 0].exp())
    writer_probs = torch.stack([probs, 1 - probs], dim=-1)
    scores = router_scores(name, (1 - probs).numpy().astype(np.float64), uncertainty, **parameters)
    ordered = np.unique(scores[np.isfinite(scores)])
    middle = len(ordered) // 2
    threshold = float(ordered[middle - 1 : middle + 1].mean())
    sign = -1 if name in ("top_probability", "margin") else 1
    given = parameters if name in ("learned", "ema", "scheduled") else {"cut": sign * threshold}
    state, asked = None, []
    for t in range(len(probs)):
        decision = ROUTERS[name](
            RoutingContext(
                writer_probs[t : t + 1], threshold, out.logits[0, 3 + t : 4 + t], torch.tensor([t]), state=state
            ),
            **given,
        )
        decision, state = decision if isinstance(decision, tuple) else (decision, None)
        asked.append(bool(decision))
    assert asked == (scores > threshold).tolist()
    assert 0 < sum(asked) < len(asked)


def test_routers_without_a_threshold_are_refused():
    with pytest.raises(ConfigurationError, match="no threshold"):
        router_scores("random", np.zeros(3))
    with pytest.raises(ConfigurationError, match='Did you mean "entropy"'):
        router_scores("entropi", np.zeros(3))


def test_other_choices_are_those_of_whoever_did_not_write():
    model = tiny_collm(num_assistants=2)
    assistants = [tiny_model(seed=5), tiny_model(seed=6)]
    [(ids, labels)] = some_texts(1)
    source = [0, 1, 2, 0]
    expected = []
    for n, t in enumerate(range(2, 6)):
        base, others, pi = oracle(model, assistants, ids, t)
        expected.append(int((base if source[n] else others[int(pi[1:].argmax())]).argmax()))
    assert other_choices(model, assistants, (ids, labels), source) == expected
    known = other_choices(model, [], (ids, labels), source)
    assert known == [None, expected[1], expected[2], None]
