"""`generate(assistant=...)` against the oracle: token for token, source for source."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

from tests.conftest import ARCHITECTURES, VOCAB_SIZE, tiny_collm, tiny_model
from tests.decoding import oracle
from tests.decoding.test_cache import STATEFUL

PAD = 0


@functools.cache
def models(architecture: str, num_assistants: int):
    assistants = [tiny_model(architecture, seed=10 + k) for k in range(num_assistants)]
    return tiny_collm(architecture, seed=0, num_assistants=num_assistants), assistants


def ragged_prompts(rows: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """A left-padded batch of prompts of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [3 + (5 * row) % 9 for row in range(rows)]
    input_ids = torch.full((rows, max(lengths)), PAD)
    mask = torch.zeros_like(input_ids)
    for row, length in enumerate(lengths):
        input_ids[row, -length:] = torch.randint(3, VOCAB_SIZE, (length,), generator=generator)
        mask[row, -length:] = 1
    return {"input_ids": input_ids, "attention_mask": mask}


def check(
    base, assistants, inputs, *, steps=16, speculate=True, sample=False, seed=3, processors=(), eos=(), **options
):
    """Generate, and compare every row with the oracle's; returns the output."""
    named = {}
    for name, default in (("router", "learned"), ("combiner", "assistant")):
        spec, parameters = options.get(name, (default, {}))
        named[name] = {"name": spec, **parameters}
    torch.manual_seed(seed)
    # top_k=0: generate's default of 50 would add a warper of its own
    out = base.generate(
        **inputs, assistant=list(assistants), max_new_tokens=steps, do_sample=sample, speculate=speculate, top_k=0,
        threshold=options.get("threshold"), eos_token_id=list(eos) or None, pad_token_id=PAD,
        return_dict_in_generate=True, logits_processor=LogitsProcessorList(processors), output_scores=True,
        output_logits=True, **named,
    )  # fmt: skip
    torch.manual_seed(seed)
    drawn = int(torch.randint(2**62, ()))
    prompts = [
        ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]
    width = inputs["input_ids"].shape[1]
    for row, prompt in enumerate(prompts):
        expected = oracle.write(
            base, assistants, prompt, row=row, steps=steps, sample=sample, eos=eos, processors=processors,
            seed=drawn, shown=inputs["input_ids"][row].tolist(), **{"threshold": 0.5, **_set(options)},
        )  # fmt: skip
        length = len(expected.tokens)
        assert out.sequences[row, width : width + length].tolist() == expected.tokens
        assert out.source[row, :length].tolist() == expected.source
        assert (out.sequences[row, width + length :] == PAD).all()
        assert (out.source[row, length:] == -1).all()
        torch.testing.assert_close(
            out.deferral_probs[row, :length], torch.tensor(expected.deferral_probs), rtol=1e-3, atol=1e-4
        )
        for step in range(length):
            for ours, theirs in ((out.scores, expected.scores), (out.logits, expected.raw)):
                torch.testing.assert_close(ours[step][row], torch.tensor(theirs[step]), rtol=1e-3, atol=1e-3)
    return out


def _set(options):
    return {name: value for name, value in options.items() if value is not None}


@pytest.mark.parametrize("speculate", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_writes_what_the_oracle_writes(architecture, speculate):
    base, assistants = models(architecture, 1)
    out = check(base, assistants, ragged_prompts(3), speculate=speculate)
    assert 0 < (out.source == 1).sum() < (out.source >= 0).sum()
    check(base, assistants, ragged_prompts(3, seed=5), speculate=speculate, sample=True, steps=12)


@pytest.mark.parametrize("speculate", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("num_assistants", [1, 2])
@pytest.mark.parametrize("sample", [False, True])
def test_batches_assistants_and_sampling(rows, num_assistants, sample, speculate):
    base, assistants = models("llama", num_assistants)
    warpers = [TemperatureLogitsWarper(0.8), TopKLogitsWarper(12)] if sample else []
    out = check(
        base, assistants, ragged_prompts(rows), sample=sample, speculate=speculate, eos=(5, 9, 17), steps=24,
        processors=[RepetitionPenaltyLogitsProcessor(1.3), *warpers],
    )  # fmt: skip
    assert rows < 8 or set(range(num_assistants + 1)) <= set(out.source.flatten().tolist())


ROUTERS = [
    ("learned", {}),
    ("ema", {"decay": 0.3}),
    ("scheduled", {"shape": "linear", "steps": 8}),
    ("scheduled", {"shape": "cosine", "steps": 8}),
    ("scheduled", {"shape": "exponential", "steps": 8}),
    ("scheduled", {"shape": "constant", "steps": 8}),
    ("random", {"rate": 0.3}),
    ("entropy", {"cut": 2.2}),
    ("top_probability", {"cut": 0.3}),
    ("margin", {"cut": 0.2}),
    ("always", {}),
    ("never", {}),
    ("sampled", {}),
]


@pytest.mark.parametrize("speculate", [False, True])
@pytest.mark.parametrize("router", ROUTERS, ids=str)
def test_every_router(router, speculate):
    base, assistants = models("llama", 2)
    threshold = 0.85 if router[0] == "ema" else None
    out = check(base, assistants, ragged_prompts(3), router=router, threshold=threshold, speculate=speculate)
    deferred = (out.source > 0).float().mean()
    assert deferred == 1 if router[0] == "always" else deferred == 0 if router[0] == "never" else 0 < deferred < 1


@pytest.mark.parametrize("speculate", [False, True])
@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("combiner", ["assistant", "mixture", "confident", "contrastive", "proxy_tuning"])
def test_every_combiner(combiner, sample, speculate):
    base, assistants = models("llama", 2)
    parameters = {"untuned": tiny_model("llama", seed=30)} if combiner == "proxy_tuning" else {}
    check(base, assistants, ragged_prompts(3), combiner=(combiner, parameters), sample=sample, speculate=speculate)


@pytest.mark.parametrize("speculate", [False, True])
@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.2, 0.5, 0.8, 1.0])
def test_thresholds_from_always_to_never(threshold, speculate):
    base, assistants = models("llama", 1)
    out = check(base, assistants, ragged_prompts(3), threshold=threshold, speculate=speculate)
    assert out.stats["assistant_calls"][0] > 0 or threshold == 1.0
    if threshold in (-1.0, 1.0):
        assert ((out.source > 0) == (threshold < 0)).all()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("architecture", STATEFUL)
def test_recurrent_assistants_are_exact_without_speculation(architecture):
    base, _ = models("llama", 1)
    torch.manual_seed(4)
    config = AutoConfig.for_model(architecture, vocab_size=VOCAB_SIZE, pad_token_id=PAD, **STATEFUL[architecture])
    assistant = AutoModelForCausalLM.from_config(config).eval()
    out = check(base, [assistant], ragged_prompts(2), steps=10)
    assert out.stats["drafted"] == 0
    assert out.stats["assistant_padding"] == [0]
    with pytest.warns(UserWarning, match="cannot be rolled back"):
        base.generate(**ragged_prompts(1), assistant=assistant, speculate=True, max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize("speculate", [False, True])
def test_an_adapter_around_the_assistant(speculate):
    peft = pytest.importorskip("peft")
    base, _ = models("llama", 1)
    adapted = peft.get_peft_model(
        tiny_model("llama", seed=10), peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, r=4)
    )
    check(base, [adapted.eval()], ragged_prompts(3), speculate=speculate)


@pytest.mark.parametrize("speculate", [False, True])
def test_routers_and_combiners_of_the_users_own(speculate):
    base, assistants = models("llama", 2)

    def every_third_after_a_deferral(context):
        """Counts the tokens since the last deferral in a state of its own."""
        before = torch.zeros(len(context.step)) if context.state is None else context.state.nan_to_num(0.0)
        writers = torch.where(before == 2, 1 + context.step % 2, 0)
        return writers, torch.where(writers > 0, 0.0, before + 1)

    def flattened(context):
        return context.assistant_logprobs / 2

    out = base.generate(
        **ragged_prompts(3), assistant=assistants, router=every_third_after_a_deferral, combiner=flattened,
        max_new_tokens=12, do_sample=False, pad_token_id=PAD, eos_token_id=None, speculate=speculate,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert out.source.tolist() == [[0, 0, 1, 0, 0, 2, 0, 0, 1, 0, 0, 2]] * 3
    expected = base.generate(
        **ragged_prompts(3), assistant=assistants, router=lambda c: torch.where(c.step % 3 == 2, 1 + c.step % 2, 0),
        max_new_tokens=12, do_sample=False, pad_token_id=PAD, eos_token_id=None,
    )  # fmt: skip
    assert torch.equal(out.sequences, expected)
