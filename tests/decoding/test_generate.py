"""What users of `generate` expect of `generate(assistant=...)`."""

from __future__ import annotations

import gc
import weakref
from itertools import pairwise

import pytest
import torch
from transformers import GenerationConfig, StoppingCriteria
from transformers.generation import BaseStreamer, MaxLengthCriteria

from collm.decoding.combiners import CombiningContext, proxy_tuning
from collm.decoding.generation import SourceStreamer
from collm.decoding.processor import CollaborativeLogitsProcessor
from collm.errors import (
    AssistantError,
    CalibrationError,
    ConfigurationError,
    TokenizerMismatchError,
    UnsupportedModelError,
)
from tests.conftest import VOCAB_SIZE, tiny_collm, tiny_model
from tests.decoding.test_exactness import PAD, models, ragged_prompts

both_loops = pytest.mark.parametrize("speculate", [False, True])


def generate(base, assistant, inputs=None, **options):
    options = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": PAD, "eos_token_id": None, **options}
    options.setdefault("return_dict_in_generate", True)
    return base.generate(**(inputs or ragged_prompts(3)), assistant=assistant, **options)


def plain(model, inputs, **options):
    options = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": PAD, "eos_token_id": None, **options}
    return model.generate(**inputs, **options)


# -- the two ends ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
        {"min_new_tokens": 5},
        {"encoder_repetition_penalty": 1.5, "encoder_no_repeat_ngram_size": 1},  # these keep the batch's prompts
    ],
)
@both_loops
def test_never_is_the_base_and_always_the_assistant(speculate, options):
    base, assistants = models("llama", 1)
    inputs, options = ragged_prompts(3), {"eos_token_id": [5, 9], **options}
    never = generate(base, assistants, inputs, threshold=1.0, speculate=speculate, **options)
    always = generate(base, assistants, inputs, threshold=-1.0, speculate=speculate, **options)
    assert torch.equal(never.sequences, plain(base, inputs, **options))
    assert torch.equal(always.sequences, plain(assistants[0], inputs, **options))
    assert never.stats["assistant_calls"] == never.stats["assistant_tokens"] == [0]


def test_without_assistant_generate_is_the_bases_own():
    base, _ = models("llama", 1)
    twin = tiny_model("llama", seed=0)
    inputs = ragged_prompts(3)
    assert torch.equal(plain(base, inputs), plain(twin, inputs))
    assert torch.equal(plain(base, inputs, num_beams=3), plain(twin, inputs, num_beams=3))


# -- work --------------------------------------------------------------------------------------------------------------


@both_loops
@pytest.mark.parametrize("rows", [1, 3])
def test_each_model_reads_every_token_at_most_once(rows, speculate):
    base, assistants = models("llama", 1)
    inputs = ragged_prompts(rows)
    out = generate(base, assistants, inputs, speculate=speculate, max_new_tokens=24)
    once = int(inputs["attention_mask"].sum()) + out.stats["new_tokens"] - rows  # nobody needs the last token
    stats = out.stats
    assert stats["base_tokens"] - stats["base_discarded"] <= once + rows * speculate
    assert stats["assistant_tokens"][0] - stats["assistant_discarded"][0] <= once + rows * speculate
    if not speculate:
        assert stats["base_tokens"] == once
        assert stats["base_discarded"] == stats["assistant_discarded"][0] == 0


def test_rows_that_do_not_defer_cost_the_assistant_nothing():
    base, assistants = models("llama", 1)
    inputs = ragged_prompts(3)
    out = generate(base, assistants, inputs, threshold=[1.0, -1.0, 1.0], speculate=False)
    assert out.stats["assistant_tokens"] == [int(inputs["attention_mask"][1].sum()) + 15]


def test_a_prompt_is_read_by_the_assistant_when_it_is_first_asked():
    base, assistants = models("llama", 1)
    inputs = ragged_prompts(1)
    late = generate(base, assistants, inputs, router=lambda c: c.ask_where(c.step == 15), speculate=False)
    assert late.stats["assistant_calls"] == [1]
    assert late.stats["assistant_tokens"] == [inputs["input_ids"].shape[1] + 15]


@both_loops
def test_a_row_does_not_depend_on_its_neighbours(speculate):
    base, assistants = models("llama", 1)
    inputs = ragged_prompts(5)
    together = generate(base, assistants, inputs, speculate=speculate)
    for row in range(5):
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()].unsqueeze(0)
        alone = generate(base, assistants, {"input_ids": ids}, speculate=speculate)
        assert torch.equal(alone.sequences[0, ids.shape[1] :], together.sequences[row, inputs["input_ids"].shape[1] :])
        assert torch.equal(alone.source[0], together.source[row])


@both_loops
def test_a_sampled_row_does_not_depend_on_those_behind_it(speculate):
    base, assistants = models("llama", 1)
    inputs = ragged_prompts(4)
    outputs = []
    for rows in (4, 2):
        torch.manual_seed(11)
        some = {name: value[:rows] for name, value in inputs.items()}
        outputs.append(generate(base, assistants, some, do_sample=True, speculate=speculate).sequences)
    assert torch.equal(outputs[0][:2], outputs[1])


def test_finished_rows_cost_nothing():
    base, assistants = models("llama", 1)
    inputs = ragged_prompts(3)
    free = generate(base, assistants, inputs, speculate=False, threshold=1.0)
    first = int(free.sequences[0, inputs["input_ids"].shape[1]])
    out = generate(base, assistants, inputs, speculate=False, threshold=1.0, eos_token_id=[first])
    lengths = (out.source >= 0).sum(1)
    assert lengths[0] == 1
    assert out.stats["base_tokens"] == int(inputs["attention_mask"].sum()) + int((lengths - 1).sum())


# -- streaming and stopping --------------------------------------------------------------------------------------------


class Collect(BaseStreamer):
    def __init__(self):
        self.columns, self.ended = [], False

    def put(self, value):
        self.columns.append(value)

    def end(self):
        self.ended = True


class CollectSource(SourceStreamer, Collect):
    def __init__(self):
        super().__init__()
        self.sources = []

    def put(self, value, source=None):
        self.columns.append(value)
        self.sources.append(source)

    def end(self):
        self.ended = True


@both_loops
@pytest.mark.parametrize("rows", [1, 3])
def test_streamers_get_every_column_in_order(rows, speculate):
    base, assistants = models("llama", 1)
    inputs = ragged_prompts(rows)
    streamer, with_source = Collect(), CollectSource()
    out = generate(base, assistants, inputs, streamer=streamer, speculate=speculate, eos_token_id=[9, 23])
    generate(base, assistants, inputs, streamer=with_source, speculate=speculate, eos_token_id=[9, 23])
    assert torch.equal(streamer.columns[0], inputs["input_ids"])
    new = out.sequences[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(torch.stack(streamer.columns[1:], dim=1), new)
    assert torch.equal(torch.stack(with_source.sources[1:], dim=1), out.source)
    assert with_source.sources[0] is None
    assert streamer.ended


class StopAt(StoppingCriteria):
    """Row r stops once it has `lengths[r]` tokens, prompt and padding included."""

    def __init__(self, lengths):
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids, scores, **kwargs):
        assert len(input_ids) == len(self.lengths)
        return input_ids.shape[1] >= self.lengths


@both_loops
def test_stopping_criteria_see_every_step(speculate):
    base, assistants = models("llama", 1)
    inputs = ragged_prompts(3)
    width = inputs["input_ids"].shape[1]
    out = generate(
        base, assistants, inputs, speculate=speculate, stopping_criteria=[StopAt([width + 3, width + 9, width + 5])]
    )
    free = generate(base, assistants, inputs, speculate=speculate)
    assert (out.source >= 0).sum(1).tolist() == [3, 9, 5]
    for row, length in enumerate([3, 9, 5]):
        assert torch.equal(out.sequences[row, : width + length], free.sequences[row, : width + length])


@both_loops
@pytest.mark.parametrize("length", [5, 20, 30])  # within the prompts, before the config's 24, behind it
def test_a_maximum_length_of_the_users_stands_for_that_of_the_config(length, speculate):
    base, assistants = models("llama", 1)
    inputs, criteria = ragged_prompts(3), [MaxLengthCriteria(length)]
    out = generate(base, assistants, inputs, threshold=1.0, speculate=speculate, stopping_criteria=criteria)
    assert torch.equal(out.sequences, plain(base, inputs, stopping_criteria=criteria))


def character_tokenizer():
    """One token per character: stop strings need a tokenizer that can spell."""
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    characters = [chr(ord("A") + i) for i in range(VOCAB_SIZE)]
    tokenizer = Tokenizer(BPE({c: i for i, c in enumerate(characters)}, []))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@both_loops
def test_stop_strings(speculate):
    base, assistants = models("llama", 1)
    tokenizer, inputs = character_tokenizer(), ragged_prompts(1)
    free = generate(base, assistants, inputs, speculate=speculate)
    width = inputs["input_ids"].shape[1]
    text = tokenizer.decode(free.sequences[0, width:])
    stop = text[6:8]
    expected = width + text.index(stop) + 2
    out = generate(base, assistants, inputs, speculate=speculate, stop_strings=[stop], tokenizer=tokenizer)
    assert out.sequences.shape[1] == expected
    config = GenerationConfig(max_new_tokens=16, stop_strings=[stop], do_sample=False, pad_token_id=PAD)
    out = base.generate(**inputs, assistant=assistants, generation_config=config, tokenizer=tokenizer)
    assert out.shape[1] == expected
    with pytest.raises(ConfigurationError, match="tokenizer"):
        generate(base, assistants, inputs, stop_strings=[stop])


def test_max_time_ends_generation():
    base, assistants = models("llama", 1)
    out = generate(base, assistants, max_new_tokens=200, max_time=0.0)
    assert out.source.shape[1] == 1


@both_loops
def test_several_sequences_per_prompt(speculate):
    base, assistants = models("llama", 1)
    inputs = ragged_prompts(2)
    torch.manual_seed(5)
    own = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    out = generate(
        base, assistants, inputs, do_sample=True, num_return_sequences=3, speculate=speculate, assistant_inputs=own
    )
    assert out.sequences.shape[0] == 6
    assert not torch.equal(out.sequences[0], out.sequences[1])
    assert torch.equal(out.sequences[:3, :5], out.sequences[:1, :5].expand(3, 5))


@both_loops
def test_a_processor_that_counts_rows_sees_all_of_them(speculate):
    base, assistants = models("llama", 1)
    allowed = {0: list(range(10, 20)), 1: list(range(20, 30)), 2: list(range(30, 40))}
    out = generate(base, assistants, prefix_allowed_tokens_fn=lambda row, _: allowed[row], speculate=speculate)
    for row, tokens in allowed.items():
        assert set(out.sequences[row, -16:].tolist()) <= set(tokens)
    assert (out.source == 1).any()


@both_loops
def test_a_prefix_function_is_asked_about_beginnings_that_occur(speculate):
    base, assistants = models("llama", 1)
    inputs = ragged_prompts(3)
    width = inputs["input_ids"].shape[1]

    def allowed(row, ids):  # row r writes tokens of its own ten, each one to four above the last; else nothing follows
        digits = [token - 10 * (row + 1) for token in ids[width:].tolist()]
        known = all(0 <= digit < 10 for digit in digits)
        known = known and all((b - a) % 10 in range(1, 5) for a, b in pairwise(digits))
        following = [(digits[-1] + more) % 10 for more in range(1, 5)] if digits else range(10)
        return [10 * (row + 1) + digit for digit in following] if known else []

    options = {"speculate": speculate, "prefix_allowed_tokens_fn": allowed}
    mixed = generate(base, assistants, inputs, **options)
    assert all(allowed(row, ids) for row, ids in enumerate(mixed.sequences))
    assert set(mixed.source.flatten().tolist()) == {0, 1}
    for model, threshold in ((base, 1.0), (assistants[0], -1.0)):
        out = generate(base, assistants, inputs, threshold=threshold, **options)
        assert torch.equal(out.sequences, plain(model, inputs, prefix_allowed_tokens_fn=allowed))


# -- assistants --------------------------------------------------------------------------------------------------------


@both_loops
def test_an_assistant_may_pad_its_vocabulary_differently(speculate):
    base, assistants = models("llama", 1)
    expected = generate(base, assistants, speculate=speculate).sequences
    wide = tiny_model("llama", seed=10, vocab_size=VOCAB_SIZE + 1)
    wide.load_state_dict(
        {n: torch.cat([p, p[:1]]) if p.shape[0] == VOCAB_SIZE else p for n, p in assistants[0].state_dict().items()}
    )
    assert torch.equal(generate(base, wide, speculate=speculate).sequences, expected)
    narrow = tiny_model("llama", seed=10, vocab_size=VOCAB_SIZE - 1)
    narrow.load_state_dict(
        {n: p[:-1] if p.shape[0] == VOCAB_SIZE else p for n, p in assistants[0].state_dict().items()}
    )
    inputs = ragged_prompts(3)
    inputs["input_ids"].clamp_(max=VOCAB_SIZE - 2)
    out = generate(base, narrow, inputs, speculate=speculate, output_logits=True, suppress_tokens=[VOCAB_SIZE - 1])
    deferred = (out.source == 1).nonzero()
    assert all(out.logits[step][row, -1] == -torch.inf for row, step in deferred.tolist())


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_proxy_tuning_writes_no_token_that_a_model_lacks(weight):
    logits = torch.randn(3, 1, 5)
    for model in range(3):
        logits[model, 0, model] = -torch.inf
    context = CombiningContext(logits[0], logits[1], torch.ones(1), {"untuned": logits[2]})
    assert proxy_tuning(context, None, weight).isfinite().tolist() == [[False, False, False, True, True]]
    assert not proxy_tuning(context, None, weight).isnan().any()
    assert proxy_tuning(context, None, weight).argmax() > 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_assistant_may_have_another_dtype(dtype):
    base, _ = models("llama", 1)
    out = generate(base, tiny_model("llama", seed=10, dtype=dtype))
    assert out.stats["deferrals"][0] > 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_an_assistant_may_be_quantised():
    base, _ = models("llama", 1)
    linear = {torch.nn.Linear}
    quantised = torch.ao.quantization.quantize_dynamic(tiny_model("llama", seed=10), linear, dtype=torch.qint8)
    outputs = [generate(base, quantised, speculate=speculate) for speculate in (False, True)]
    assert outputs[0].stats["deferrals"][0] > 0
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)


@both_loops
def test_an_assistant_may_read_its_own_prompt(speculate):
    from tests.decoding import oracle

    base, assistants = models("llama", 1)
    inputs, theirs = ragged_prompts(3), ragged_prompts(3, seed=9)
    out = generate(base, assistants, inputs, assistant_inputs=theirs, speculate=speculate)
    for row in range(3):
        prompt, own = (x["input_ids"][row][x["attention_mask"][row].bool()].tolist() for x in (inputs, theirs))
        expected = oracle.write(base, assistants, prompt, own_prompts={1: own})
        assert out.sequences[row, inputs["input_ids"].shape[1] :].tolist() == expected.tokens
        assert out.source[row].tolist() == expected.source


class Failing(torch.nn.Module):
    """Makes a model raise at its n-th forward."""

    def __init__(self, model, at):
        super().__init__()
        self.calls = 0

        def hook(*_):
            self.calls += 1
            if self.calls > at:
                raise torch.OutOfMemoryError("no memory left")

        self.handle = model.register_forward_pre_hook(hook)


@both_loops
def test_a_failing_assistant_raises_or_leaves_the_base_alone(speculate):
    base, _ = models("llama", 1)
    assistant = tiny_model("llama", seed=10)
    inputs = ragged_prompts(3)
    whole = generate(base, assistant, inputs, speculate=speculate)
    failing = Failing(assistant, at=3)
    with pytest.raises(AssistantError, match=r"no memory left.*on_assistant_error"):
        generate(base, assistant, inputs, speculate=speculate)
    failing.calls = 0
    with pytest.warns(UserWarning, match="goes on alone"):
        out = generate(base, assistant, inputs, speculate=speculate, on_assistant_error="base")
    for row, start in enumerate(out.stats["fallback"]):
        assert start is not None
        width = inputs["input_ids"].shape[1] + start
        assert torch.equal(out.sequences[row, :width], whole.sequences[row, :width])
        assert (out.source[row, start:] == 0).all()
    failing.handle.remove()


@both_loops
def test_an_assistant_out_of_positions(speculate):
    base, assistants = models("llama", 1)
    short = tiny_model("llama", seed=10, max_position_embeddings=14)
    inputs = ragged_prompts(1)  # 3 tokens
    whole = generate(base, assistants, inputs, speculate=speculate, router="always")
    with pytest.raises(AssistantError, match="at most 14 tokens"):
        generate(base, short, inputs, speculate=speculate, router="always")
    with pytest.warns(UserWarning, match="at most 14 tokens"):
        out = generate(base, short, inputs, speculate=speculate, router="always", on_assistant_error="base")
    assert out.stats["fallback"] == [12]  # a prompt of 3 and 11 new tokens fill its 14 positions; the 12th is the next
    assert torch.equal(out.sequences[:, : 3 + 12], whole.sequences[:, : 3 + 12])
    assert (out.source[0, 12:] == 0).all()


# -- options that cannot be meant --------------------------------------------------------------------------------------


def learned_again(context):
    return context.ask_where(context.deferral_probs > context.threshold)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"threshold": 0.5, "deferral_rate": 0.2}, ConfigurationError, "Pass one of them"),
        ({"deferral_rate": 0.2}, CalibrationError, "collm calibrate"),
        ({"deferral_rate": 1.0, "router": "ema"}, CalibrationError, "learned router; pass threshold="),
        ({"deferral_rate": 1.0, "router": "entropy:cut=0.5"}, CalibrationError, "or the router's own cut"),
        ({"deferral_rate": 1.0, "router": "always"}, CalibrationError, "measured with the learned router"),
        ({"deferral_rate": 1.0, "router": learned_again}, CalibrationError, "learned router; pass threshold="),
        ({"router": "lerned"}, ConfigurationError, 'Did you mean "learned"'),
        ({"router": "entropy"}, ConfigurationError, "needs cut"),
        ({"router": "entropy:cutt=1"}, ConfigurationError, 'Did you mean "cut"'),
        ({"combiner": "mixtur"}, ConfigurationError, 'Did you mean "mixture"'),
        ({"num_beams": 4}, ConfigurationError, "CollaborativeLogitsProcessor"),
        ({"cache_implementation": "static"}, ConfigurationError, "leave cache_implementation out"),
        ({"prompt_lookup_num_tokens": 3}, ConfigurationError, "speculate=True"),
        ({"output_attentions": True}, ConfigurationError, "finished text"),
        ({"on_assistant_error": "bass"}, ConfigurationError, 'Did you mean "base"'),
        ({"assistant_model": "x"}, ConfigurationError, "speculative decoding"),
        ({"past_key_values": ()}, ConfigurationError, "whole conversation"),
        ({"custom_generate": print}, ConfigurationError, "one of the two"),
        ({"assistant_inputs": [{}, {}]}, ConfigurationError, "2 entries for 1"),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else None,
)
def test_options_that_cannot_be_meant(options, error, message):
    base, assistants = models("llama", 1)
    with pytest.raises(error, match=message):
        generate(base, assistants, **options)


def test_assistants_that_cannot_be_meant():
    base, assistants = models("llama", 1)
    with pytest.raises(ConfigurationError, match=r"1 assistant.*2 were passed"):
        generate(base, [*assistants, *assistants])
    with pytest.raises(TokenizerMismatchError, match="64 tokens and the assistant one of 128"):
        generate(base, tiny_model("llama", vocab_size=128))
    with pytest.raises(ConfigurationError, match="load it first"):
        generate(base, "org/name")
    with pytest.raises(ConfigurationError, match="threshold= needs an assistant"):
        generate(base, None, threshold=0.5)
    from transformers import T5Config, T5ForConditionalGeneration

    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=VOCAB_SIZE, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        generate(base, t5)


def vocabulary(*words):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({word: i for i, word in enumerate(words)})))


def test_another_tokenizer_is_refused_by_hub_name_and_folder_without_the_network(tmp_path, monkeypatch):
    import httpx
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(httpx.HTTPTransport, "handle_request", lambda *_: pytest.fail("a request in generate"))
    for name, words in (("base", "abc"), ("twin", "abc"), ("other", "acb")):
        folder = tmp_path / f"models--org--{name}"
        vocabulary(*words).save_pretrained(folder / "snapshots/1")
        (folder / "refs").mkdir()
        (folder / "refs/main").write_text("1")
    base, assistant = tiny_collm("llama"), tiny_model("llama", seed=10)

    def write(ours, theirs, **options):
        base.config.name_or_path, assistant.config.name_or_path = ours, theirs
        return generate(base, assistant, max_new_tokens=1, **options)

    other = str(tmp_path / "models--org--other/snapshots/1")
    for theirs in ("org/other", other):
        with pytest.raises(TokenizerMismatchError, match=f"org/base and {theirs} .*token id 1: 'b' in org/base, 'c'"):
            write("org/base", theirs)
        with pytest.raises(TokenizerMismatchError, match="'b' in the base, 'c'"):
            write(theirs, theirs, tokenizer=vocabulary(*"abc"))
    write("org/base", "org/twin")
    write("org/base", "org/not-downloaded")
    write("", "org/other")
    base.config.deferral.base_model = "org/base"
    with pytest.raises(TokenizerMismatchError, match="org/base and org/other"):
        write(str(tmp_path), "org/other")  # a folder of the head alone


def test_a_threshold_that_no_router_reads_is_warned_about():
    base, assistants = models("llama", 1)
    with pytest.warns(UserWarning, match="threshold= has no effect"):
        generate(base, assistants, router="random:rate=0.5", threshold=0.3)


def test_thresholds_come_from_the_call_the_rate_or_the_checkpoint():
    base = tiny_collm("llama", deferral={"threshold": -1.0, "calibration": [
        {"rate": 0.0, "threshold": 1.0}, {"rate": 1.0, "threshold": -1.0}]})  # fmt: skip
    assistant = tiny_model("llama", seed=10)
    shares = [
        (generate(base, assistant, **options).source == 1).float().mean()
        for options in ({}, {"threshold": 1.0}, {"deferral_rate": 0.0}, {"deferral_rate": 1.0})
    ]
    assert shares == [1.0, 0.0, 0.0, 1.0]


# -- the per-step form -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combiner", ["assistant", "mixture"])
def test_the_logits_processor_writes_the_same_text(combiner):
    base, assistants = tiny_collm("llama"), [tiny_model("llama", seed=10)]
    inputs = ragged_prompts(3)
    expected = generate(base, assistants, inputs, combiner=combiner)
    processor = CollaborativeLogitsProcessor(base, assistants, combiner=combiner, pad_token_id=PAD)
    assert torch.equal(plain(base, inputs, logits_processor=[processor]), expected.sequences)
    assert sum(processor.readers[0].length.values()) == processor.readers[0].tokens  # nothing is read twice


@pytest.mark.parametrize("seed", range(4))
def test_the_logits_processor_follows_beams(seed):
    base, assistant = tiny_collm("llama"), tiny_model("llama", seed=10 + seed)
    inputs = ragged_prompts(2, seed=seed)
    options = {"num_beams": 3, "num_return_sequences": 3, "output_scores": True, "return_dict_in_generate": True}
    processor = CollaborativeLogitsProcessor(base, assistant, threshold=-1.0, pad_token_id=PAD)
    beams, expected = plain(base, inputs, logits_processor=[processor], **options), plain(assistant, inputs, **options)
    assert torch.equal(beams.sequences, expected.sequences)
    torch.testing.assert_close(beams.sequences_scores, expected.sequences_scores, rtol=1e-4, atol=1e-4)


def test_warpers_come_behind_the_logits_processor():
    base, assistant = tiny_collm("llama"), tiny_model("llama", seed=10)
    options = {"do_sample": True, "temperature": 0.7, "top_k": 5, "max_new_tokens": 1, "output_scores": True}
    processor = CollaborativeLogitsProcessor(base, assistant, threshold=-1.0, pad_token_id=PAD)
    ours, theirs = (
        plain(model, ragged_prompts(2), logits_processor=processors, return_dict_in_generate=True, **options).scores[0]
        for model, processors in ((base, [processor]), (assistant, []))
    )
    torch.testing.assert_close(ours.softmax(-1), theirs.softmax(-1))


def test_a_router_with_a_memory_is_refused_by_the_logits_processor():
    base, assistant = tiny_collm("llama"), tiny_model("llama", seed=10)
    processor = CollaborativeLogitsProcessor(base, assistant, router="ema", threshold=0.5, pad_token_id=PAD)
    with pytest.raises(ConfigurationError, match="router with a memory"):
        plain(base, ragged_prompts(2), logits_processor=[processor])


def test_a_logits_processor_that_is_gone_leaves_nothing_in_the_model():
    base, assistant = tiny_collm("llama"), tiny_model("llama", seed=10)
    inputs = ragged_prompts(2)
    processor = CollaborativeLogitsProcessor(base, assistant, pad_token_id=PAD)
    plain(base, inputs, logits_processor=[processor])
    assert len(base._forward_hooks) == 1
    gone = weakref.ref(processor)
    del processor
    gc.collect()
    assert gone() is None
    assert not base._forward_hooks
    plain(base, inputs)


def test_random_numbers_of_the_logits_processor_are_where_the_scores_are():
    base, assistant = tiny_collm("llama"), tiny_model("llama", seed=10)
    devices = []

    def router(context):
        devices.append(context.uniform.device.type)
        return torch.zeros_like(context.step)

    processor = CollaborativeLogitsProcessor(base, assistant, router=router)
    ids = ragged_prompts(1)["input_ids"]
    scores = base(ids).logits[:, -1]
    with torch.device("meta"):  # where tensors land that name no device
        processor(ids, scores)
    assert devices == ["cpu"]
