"""Losses, labels, features against explicit sums in float64; the loss in chunks against the loss from all logits."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import random_batch, randomise_head, tiny_collm, tiny_model
from torch.nn import functional as F

import collm
from collm import losses, modeling
from collm.errors import ConfigurationError
from collm.losses import (
    TokenStatistics,
    collapse_warning,
    deferral_labels,
    deferral_probabilities,
    log_joint,
    marginal_likelihood_loss,
    uncertainty_features,
    weak_supervision_loss,
)


def reference_loss(base, assistants, z, cost=0.0, items=None):
    """-1/N sum_t log sum_k pi_k P_k + c/N sum_t d_t, by explicit sums of probabilities in float64."""
    total = 0.0
    for t in range(len(base)):
        weights = [torch.ones((), dtype=torch.float64), *(z[t, k].double().exp() for k in range(z.shape[1]))]
        pi = [w / sum(weights) for w in weights]
        probabilities = [base[t].double().exp(), *(assistants[t, k].double().exp() for k in range(z.shape[1]))]
        total = total - torch.log(sum(p * q for p, q in zip(pi, probabilities, strict=True))) + cost * (1 - pi[0])
    return total / (items or len(base))


def random_scores(n=9, K=1, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    base = -torch.rand(n, generator=generator) * 6
    assistants = -torch.rand(n, K, generator=generator) * 6
    z = torch.randn(n, K, generator=generator) * 2
    return [x.to(dtype).requires_grad_() for x in (base, assistants, z)]


@pytest.mark.parametrize("K", [1, 2, 3])
@pytest.mark.parametrize("cost", [0.0, 0.3])
@pytest.mark.parametrize("items", [None, 50])
def test_loss_and_gradients_equal_explicit_sums_in_float64(K, cost, items):
    inputs = random_scores(K=K)
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    loss = marginal_likelihood_loss(*inputs, cost, items)
    reference = reference_loss(*doubles, cost, items)
    torch.testing.assert_close(loss.double(), reference, rtol=1e-5, atol=0)
    assert loss.dtype == torch.float32
    expected = torch.autograd.grad(reference, doubles)
    for gradient, exact in zip(torch.autograd.grad(loss, inputs), expected, strict=True):
        torch.testing.assert_close(gradient.double(), exact, rtol=1e-5, atol=1e-8)


def test_gradients_pass_gradcheck():
    inputs = random_scores(n=4, K=2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *x: marginal_likelihood_loss(*x, deferral_cost=0.2), inputs)


def test_one_assistant_is_the_papers_sigmoid():
    base, assistants, z = random_scores(K=1)
    d = torch.sigmoid(z[:, 0])
    expected = -torch.log((1 - d) * base.exp() + d * assistants[:, 0].exp()).mean()
    torch.testing.assert_close(marginal_likelihood_loss(base, assistants, z), expected)


def test_parts_of_a_batch_add_up_to_the_batch_given_num_items():
    inputs = random_scores(n=10, K=2)
    whole = marginal_likelihood_loss(*inputs)
    parts = [marginal_likelihood_loss(*(x[part] for x in inputs), num_items_in_batch=torch.tensor(10)) for part in
             (slice(0, 1), slice(1, 7), slice(7, 10))]  # fmt: skip
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("items", [None, 0, torch.tensor(0)])
def test_without_targets_the_loss_is_zero_and_gradients_exist(items):
    inputs = [x[:0].detach().requires_grad_() for x in random_scores(K=2)]
    loss = marginal_likelihood_loss(*inputs, deferral_cost=0.1, num_items_in_batch=items)
    loss.backward()
    assert loss.item() == 0
    assert all(x.grad.shape == x.shape for x in inputs)


@pytest.mark.parametrize(
    ("base", "assistant"),
    [(-math.inf, -1.0), (-1.0, -math.inf), (-math.inf, -math.inf), (-1e4, -2e4), (-1e30, -1e30), (0.0, 0.0)],
)
def test_impossible_tokens_give_finite_loss_and_gradients(base, assistant):
    inputs = [torch.tensor([base, -1.0]), torch.tensor([[assistant], [-1.0]]), torch.tensor([[0.5], [80.0]])]
    for x in inputs:
        x.requires_grad_()
    loss = marginal_likelihood_loss(*inputs, deferral_cost=0.1)
    loss.backward()
    assert loss.isfinite()
    assert all(x.grad.isfinite().all() for x in inputs)


def test_a_hopeless_assistant_leaves_the_base_its_own_likelihood():
    base, _, z = random_scores()
    hopeless = torch.full((9, 1), -math.inf)
    expected = (-base - F.logsigmoid(-z[:, 0])).mean()
    torch.testing.assert_close(marginal_likelihood_loss(base, hopeless, z), expected)


def test_bfloat16_inputs_are_computed_in_float32():
    inputs = [x.detach().bfloat16() for x in random_scores(K=2)]
    loss = marginal_likelihood_loss(*inputs)
    torch.testing.assert_close(loss.double(), reference_loss(*inputs), rtol=1e-5, atol=0)


def test_gradient_moves_the_head_towards_the_better_writer():
    base, assistants = torch.tensor([-3.0, -0.1]), torch.tensor([[-0.1], [-3.0]])
    z = torch.zeros(2, 1, requires_grad=True)
    marginal_likelihood_loss(base, assistants, z).backward()
    assert z.grad[0] < 0 < z.grad[1]


def test_posterior_of_the_writer_sums_to_one_and_weighs_by_likelihood():
    base, assistants, z = random_scores(K=3)
    posterior = log_joint(base, assistants, z).softmax(-1)
    torch.testing.assert_close(posterior.sum(-1), torch.ones(9))
    prior = deferral_probabilities(z)
    ratio = (posterior[:, 2] / posterior[:, 0]) / (prior[:, 2] / prior[:, 0])
    torch.testing.assert_close(ratio, (assistants[:, 1] - base).exp())


# ------------------------------------------------------------------------------------------------ weak supervision


@pytest.mark.parametrize("K", [1, 2])
def test_weak_supervision_equals_its_definition(K):
    base, _, z = random_scores(K=K)
    labels = torch.tensor([0, 1, K, -1, 0, 0, 1, 0, -1])
    total = 0.0
    for t, label in enumerate(labels.tolist()):
        total -= 2 / 3 * base[t].double()
        if label >= 0:
            weights = torch.cat([torch.ones(1), z[t].exp()]).double()
            total -= 1 / 3 * (5.0 if label else 1.0) * torch.log(weights[label] / weights.sum())
    torch.testing.assert_close(weak_supervision_loss(base, z, labels).double(), total / 9, rtol=1e-5, atol=0)


def test_weak_supervision_with_one_assistant_is_weighted_binary_cross_entropy():
    base, _, z = random_scores()
    labels = torch.tensor([0, 1, 1, 0, 0, 1, 0, 1, 0])
    classified = F.binary_cross_entropy_with_logits(
        z[:, 0], labels.float(), weight=1 + 2 * labels, reduction="sum"
    )  # fmt: skip
    expected = (2 * -base.sum() + classified) / 3 / 20
    loss = weak_supervision_loss(base, z, labels, positive_weight=3.0, num_items_in_batch=20)
    torch.testing.assert_close(loss, expected)


# ----------------------------------------------------------------------------------------------------------- labels

BASE = torch.tensor([True, True, False, False])
ASSISTANT = torch.tensor([[True], [False], [True], [False]])


@pytest.mark.parametrize(
    ("method", "ignore", "expected"),
    [("a", False, [0, 0, 1, 0]), ("b", False, [0, 0, 1, 1]), ("a", True, [0, 0, 1, -1]), ("b", True, [0, 0, 1, -1])],
)
def test_label_sets(method, ignore, expected):
    assert deferral_labels(BASE, ASSISTANT, None, method, ignore).tolist() == expected


@pytest.mark.parametrize(("method", "when_none_is_right"), [("a", 0), ("b", 2)])
def test_the_right_assistant_with_the_highest_probability_gets_the_label(method, when_none_is_right):
    base = torch.tensor([False, False, False, True])
    assistants = torch.tensor([[True, False], [True, True], [False, False], [True, True]])
    logprobs = torch.tensor([[-2.0, -0.1], [-2.0, -1.0], [-math.inf, -9.0], [-1.0, -1.0]])
    assert deferral_labels(base, assistants, logprobs, method).tolist() == [1, 2, when_none_is_right, 0]


def test_a_right_assistant_of_probability_zero_still_gets_the_label():
    labels = deferral_labels(torch.tensor([False]), torch.tensor([[False, True]]), torch.tensor([[-1.0, -math.inf]]))
    assert labels.tolist() == [2]


def test_labels_need_probabilities_to_choose_and_a_known_method():
    with pytest.raises(ConfigurationError, match="assistant_logprobs is needed"):
        deferral_labels(BASE, ASSISTANT.expand(-1, 2))
    with pytest.raises(ConfigurationError, match='allowed are "a" and "b"'):
        deferral_labels(BASE, ASSISTANT, method="c")


# --------------------------------------------------------------------------------------------------------- features


def naive_features(logits):
    probabilities = logits.double().softmax(-1)
    entropy = -torch.special.xlogy(probabilities, probabilities).sum(-1)
    top = probabilities.amax(-1)
    return torch.stack([entropy, entropy.clamp_min(1e-6).log(), top, (1 - top).clamp_min(1e-6).log()], dim=-1)


@pytest.mark.parametrize("offset", [0.0, 100.0, -3000.0])
def test_uncertainty_features_equal_a_naive_float64_computation(offset):
    # Logits on a grid of 1/64, so that the offset rounds nothing away.
    logits = (torch.randn(3, 5, 40) * 3 * 64).round() / 64 + offset
    features = uncertainty_features(logits)
    assert features.dtype == torch.float32
    assert features.shape == (3, 5, 4)
    torch.testing.assert_close(features.double(), naive_features(logits), rtol=1e-4, atol=1e-5)


def test_uncertainty_features_of_extreme_distributions():
    certain = torch.tensor([1e30, -1e30, 0.0, -math.inf])
    masked = torch.tensor([1.0, -math.inf, 1.0, -math.inf])
    uniform = torch.full((4,), 7.0)
    features = uncertainty_features(torch.stack([certain, masked, uniform]))
    smallest = math.log(1e-6)
    expected = torch.tensor([
        [0.0, smallest, 1.0, smallest],
        [math.log(2), math.log(math.log(2)), 0.5, math.log(0.5)],
        [math.log(4), math.log(math.log(4)), 0.25, math.log(0.75)],
    ])  # fmt: skip
    torch.testing.assert_close(features, expected, atol=1e-6, rtol=1e-6)


def test_uncertainty_features_have_no_gradient_and_take_bfloat16_and_no_rows():
    logits = torch.randn(4, 10, requires_grad=True)
    assert not uncertainty_features(logits).requires_grad
    rounded = logits.detach().bfloat16()
    torch.testing.assert_close(uncertainty_features(rounded), uncertainty_features(rounded.float()))
    assert uncertainty_features(logits[:0]).shape == (0, 4)


def test_uncertainty_features_do_not_depend_on_the_block_size(monkeypatch):
    logits = torch.randn(7, 30)
    whole = uncertainty_features(logits)
    monkeypatch.setattr(losses, "ENTROPY_BLOCK", 65)
    torch.testing.assert_close(uncertainty_features(logits), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_token_statistics_equal_log_softmax(dtype):
    logits = (torch.randn(6, 20) * 3).to(dtype).requires_grad_()
    tokens = torch.tensor([0, 3, 19, 3, 3, 7])
    weights = torch.randn(6).to(torch.float64 if dtype == torch.float64 else torch.float32)
    logprobs, correct, uncertainty = TokenStatistics.apply(logits, tokens)
    (gradient,) = torch.autograd.grad((weights * logprobs).sum(), logits)
    plain = logits.detach().to(logprobs.dtype).requires_grad_()
    expected = plain.log_softmax(-1)[torch.arange(6), tokens]
    torch.testing.assert_close(logprobs, expected)
    (exact,) = torch.autograd.grad((weights * expected).sum(), plain)
    torch.testing.assert_close(gradient, exact.to(dtype))
    assert torch.equal(correct, logits.argmax(-1) == tokens)
    torch.testing.assert_close(uncertainty, uncertainty_features(logits))


def test_token_statistics_of_masked_logits_have_finite_gradients():
    logits = torch.tensor([[0.0, -math.inf, 1.0], [0.0, 2.0, -math.inf]], requires_grad=True)
    logprobs, *_ = TokenStatistics.apply(logits, torch.tensor([2, 2]))  # the second token is impossible
    loss = marginal_likelihood_loss(logprobs, torch.tensor([[-1.0], [-1.0]]), torch.zeros(2, 1))
    loss.backward()
    assert logits.grad.isfinite().all()


def test_collapse_is_warned_of_only_where_nothing_prices_deferral():
    assert "deferral_cost" in collapse_warning(0.99, 0.0)
    assert collapse_warning(0.99, 0.2) is None
    assert collapse_warning(0.5, 0.0) is None
    assert collapse_warning(math.nan, 0.0) is None


# --------------------------------------------------------------------------- the loss in forward, chunk by chunk


def loss_from_all_logits(model, batch, num_items=None):
    """The same loss from the logits of all positions at once, without chunks."""
    out = model(batch["input_ids"], attention_mask=batch["attention_mask"])
    rows = batch["labels"][:, 1:] != -100
    tokens = batch["labels"][:, 1:][rows]
    base = out.logits[:, :-1][rows].log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    z = out.deferral_logits[:, :-1][rows]
    assistants = batch["assistant_logprobs"][:, 1:][rows]
    deferral = model.config.deferral
    if deferral.objective == "weak_supervision":
        right = out.logits[:, :-1][rows].argmax(-1) == tokens
        labels = deferral_labels(right, batch["assistant_correct"][:, 1:][rows], assistants)
        return weak_supervision_loss(base, z, labels, num_items_in_batch=num_items)
    return marginal_likelihood_loss(base, assistants, z, deferral.deferral_cost, num_items)


def gradients_of(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_loss_and_gradients(model, batch, num_items=None):
    expected = loss_from_all_logits(model, batch, num_items)
    wanted = gradients_of(model, expected)
    loss = model(**batch, num_items_in_batch=num_items).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    found = gradients_of(model, loss)
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(params=["one chunk", "chunks of 4", "chunks of 1"])
def chunk(request, monkeypatch):
    positions = {"one chunk": 1000, "chunks of 4": 4, "chunks of 1": 1}[request.param]
    monkeypatch.setattr(modeling, "LOGITS_PER_CHUNK", positions * 64)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "cohere", "granite", "gpt2"])
def test_loss_in_chunks_equals_the_loss_from_all_logits(architecture, chunk):
    model = tiny_collm(architecture, num_assistants=2).eval()
    model.config.deferral.deferral_cost = 0.2
    assert_same_loss_and_gradients(model, random_batch(num_assistants=2), num_items=31)


def test_weak_supervision_in_chunks_equals_its_pure_form(chunk):
    model = tiny_collm(deferral={"objective": "weak_supervision"}).eval()
    assert_same_loss_and_gradients(model, random_batch())


def test_loss_and_gradients_where_parameters_need_their_backward_hooks(chunk, monkeypatch):
    """The path of ZeRO-3 and FSDP, which recomputes chunks in backward instead of taking gradients in forward."""
    monkeypatch.setattr(modeling, "_is_whole", lambda parameter: False)
    model = tiny_collm("qwen2", num_assistants=2).train()
    assert_same_loss_and_gradients(model, random_batch(num_assistants=2))
    taken = model.take_training_statistics()
    assert taken["tokens"] == (random_batch()["labels"][:, 1:] != -100).sum()  # counted once, not again in backward


def test_loss_and_gradients_under_gradient_checkpointing(chunk):
    model = tiny_collm("qwen2").train()
    model.gradient_checkpointing_enable()
    assert_same_loss_and_gradients(model, random_batch())


def test_gradients_scale_with_the_loss():
    model, batch = tiny_collm("qwen2"), random_batch()
    once = gradients_of(model, model(**batch).loss)
    thrice = gradients_of(model, 3 * model(**batch).loss)
    for name in once:
        torch.testing.assert_close(thrice[name], 3 * once[name])


@pytest.mark.parametrize("trained", ["deferral_head", "lm_head", "model"])
def test_frozen_parts_get_no_gradient_and_the_rest_the_same(trained, chunk):
    model = tiny_collm("llama").eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(trained))
    assert_same_loss_and_gradients(model, random_batch())


def test_a_batch_without_targets_has_loss_zero_and_gradients_of_every_parameter():
    model, batch = tiny_collm("qwen2").train(), random_batch()
    batch["labels"][:] = -100
    loss = model(**batch).loss
    gradients = gradients_of(model, loss)
    assert loss == 0
    assert gradients.keys() == {name for name, _ in model.named_parameters()}
    assert all((g == 0).all() for g in gradients.values())


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_without_assistants_the_loss_is_transformers_cross_entropy(architecture):
    batch = random_batch()
    plain = tiny_model(architecture)
    expected = plain(batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).loss
    model = randomise_head(collm.CoLLMForCausalLM.from_base(tiny_model(architecture))).eval()
    out = model(batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"])
    torch.testing.assert_close(out.loss, expected)
    assert (gradients_of(model, out.loss)["deferral_head.weight"] == 0).all()


def test_training_without_scores_warns():
    batch = random_batch()
    with pytest.warns(UserWarning, match="the deferral head learns nothing"):
        tiny_collm().train()(batch["input_ids"], labels=batch["labels"])


def test_micro_batches_add_up_to_the_batch():
    model, batch = tiny_collm("qwen2").eval(), random_batch()
    items = (batch["labels"][:, 1:] != -100).sum()
    whole = gradients_of(model, model(**batch, num_items_in_batch=items).loss)
    loss = sum(model(**{k: v[i : i + 1] for k, v in batch.items()}, num_items_in_batch=items).loss for i in range(3))
    for name, gradient in gradients_of(model, loss).items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-6)


def test_logits_of_all_positions_never_exist_at_once(monkeypatch):
    monkeypatch.setattr(modeling, "LOGITS_PER_CHUNK", 4 * 64)
    model, batch = tiny_collm(), random_batch()
    rows = []
    model.lm_head.register_forward_hook(lambda _, __, logits: rows.append(logits.numel() // 64))
    model(**batch).loss.backward()
    assert max(rows) <= 4
    assert sum(rows) == (batch["labels"][:, 1:] != -100).sum() + len(
        batch["labels"]
    )  # each target once, and a last position


def test_bfloat16_model_under_autocast_and_alone():
    batch = random_batch()
    exact = tiny_collm("qwen2")(**batch).loss
    assert_near = lambda loss: torch.testing.assert_close(loss, exact, rtol=0.03, atol=0.03)  # noqa: E731
    rounded = tiny_collm("qwen2", dtype=torch.bfloat16)
    out = rounded(**batch)
    assert_near(out.loss)
    gradients = gradients_of(rounded, out.loss)
    assert gradients["deferral_head.weight"].dtype == torch.float32
    assert gradients["model.embed_tokens.weight"].dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        model = tiny_collm("qwen2").train()
        loss = model(**batch).loss
    assert_near(loss)
    reference = gradients_of(tiny := tiny_collm("qwen2"), tiny(**batch).loss)
    for name, gradient in gradients_of(model, loss).items():
        assert F.cosine_similarity(gradient.flatten(), reference[name].flatten(), dim=0) > 0.99, name


def test_loss_refuses_scores_of_another_shape_or_without_correctness():
    batch = random_batch(num_assistants=2)
    with pytest.raises(ConfigurationError, match=r"has 2 assistants in its last axis, the head has 1"):
        tiny_collm()(**batch)
    model = tiny_collm(deferral={"objective": "weak_supervision"})
    del (batch := random_batch())["assistant_correct"]
    with pytest.raises(ConfigurationError, match="needs assistant_correct"):
        model(**batch)
