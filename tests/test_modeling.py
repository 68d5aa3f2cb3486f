"""`CoLLMForCausalLM` over every architecture that it promises: the base stays what it was, the head comes on top."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from conftest import ARCHITECTURES, random_batch, randomise_head, save_plain, tiny_collm, tiny_config, tiny_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3nForConditionalGeneration, PreTrainedModel

import collm
from collm import CoLLMForCausalLM, modeling
from collm.errors import ConfigurationError, UnsupportedModelError
from collm.losses import uncertainty_features
from collm.modeling import lm_head_logits

pytestmark = pytest.mark.filterwarnings("ignore:The attention mask and the pad token id were not set")
each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
TIED = [name for name in ARCHITECTURES if getattr(tiny_config(name), "tie_word_embeddings", False)]


def inputs(**kwargs) -> dict[str, torch.Tensor]:
    batch = random_batch(**kwargs)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


@pytest.fixture(params=["unsharded", "sharded"])
def saved(request, tmp_path):
    """Returns a function that saves a model, in one file or in many."""
    size = {"unsharded": "5GB", "sharded": "10KB"}[request.param]

    def save(model: PreTrainedModel) -> str:
        model.save_pretrained(tmp_path, max_shard_size=size)
        files = list(tmp_path.glob("model*.safetensors"))
        assert (len(files) > 1) == (request.param == "sharded")
        return str(tmp_path)

    return save


# ------------------------------------------------------------------------------------------- the base stays the base


@each_architecture
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_logits_are_bit_identical_to_the_bases(architecture, dtype):
    expected = tiny_model(architecture, dtype=dtype)(**inputs())
    model = tiny_collm(architecture, dtype=dtype, num_assistants=2)
    out = model(**inputs())
    assert torch.equal(out.logits, expected.logits)
    assert out.deferral_logits.shape == (3, 12, 2)
    assert out.deferral_logits.dtype == model.deferral_head.weight.dtype == torch.float32


@each_architecture
@torch.no_grad()
def test_checkpoint_reloads_bit_identically(architecture, saved):
    model = tiny_collm(architecture, num_assistants=2)
    folder = saved(model)
    again = CoLLMForCausalLM.from_pretrained(folder).eval()
    expected, out = model(**inputs()), again(**inputs())
    assert torch.equal(out.logits, expected.logits)
    assert torch.equal(out.deferral_logits, expected.deferral_logits)
    assert again.config.deferral == model.config.deferral
    assert again.config.architectures == ["CoLLMForCausalLM"]
    assert isinstance(again, type(tiny_model(architecture)))


@each_architecture
@torch.no_grad()
def test_transformers_loads_it_as_the_base_with_one_unexpected_key(architecture, saved):
    model = tiny_collm(architecture)
    plain, info = AutoModelForCausalLM.from_pretrained(saved(model), output_loading_info=True)
    assert info["unexpected_keys"] == {"deferral_head.weight"}
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert torch.equal(plain.eval()(**inputs()).logits, model(**inputs()).logits)


@each_architecture
@torch.no_grad()
def test_files_have_the_names_that_transformers_gives_them_plus_the_head(architecture, tmp_path):
    """Old names (GPT-NeoX) and unfused experts too, in both directions: other tools read and write those."""
    plain = tiny_model(architecture)
    plain.save_pretrained(tmp_path / "plain")
    model = CoLLMForCausalLM.from_pretrained(tmp_path / "plain").eval()
    assert torch.equal(model(**inputs()).logits, plain(**inputs()).logits)
    model.save_pretrained(tmp_path / "ours")
    names = [set(load_file(tmp_path / folder / "model.safetensors")) for folder in ("plain", "ours")]
    assert names[1] == names[0] | {"deferral_head.weight"}


@pytest.mark.parametrize("architecture", TIED)
def test_tied_stays_tied(architecture, saved):
    model = tiny_collm(architecture)
    for tied in (model, CoLLMForCausalLM.from_pretrained(saved(model))):
        assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
        assert len({p.data_ptr() for p in tied.parameters()}) == len(list(tied.parameters()))


def test_some_architectures_here_are_tied():
    assert {"qwen2", "gpt2", "cohere"} <= set(TIED) != set(ARCHITECTURES)


@each_architecture
def test_generate_without_assistant_equals_the_bases(architecture):
    base, model = tiny_model(architecture), tiny_collm(architecture)
    prompt = {"input_ids": torch.tensor([[0, 5, 6, 7], [8, 9, 10, 11]]), "attention_mask": torch.ones(2, 4).long()}
    prompt["attention_mask"][0, 0] = 0
    for options in ({"do_sample": False}, {"do_sample": True, "top_k": 5}, {"num_beams": 2}):
        texts = []
        for writer in (base, model):
            torch.manual_seed(3)
            texts.append(writer.generate(**prompt, max_new_tokens=6, **options))
        assert torch.equal(*texts)


@each_architecture
def test_gradient_checkpointing_changes_nothing(architecture):
    model, batch = tiny_collm(architecture).train(), random_batch()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    losses, gradients = [], []
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        losses.append(model(**batch).loss)
        losses[-1].backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*losses)
    for name in gradients[0]:
        torch.testing.assert_close(gradients[1][name], gradients[0][name], msg=lambda m, n=name: f"{n}: {m}")


@each_architecture
def test_lora_trains_saves_reloads_and_merges(architecture, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = save_plain(tiny_model(architecture), tmp_path / "base", with_tokenizer=False)
    model = CoLLMForCausalLM.from_pretrained(base)
    targets = {"gpt2": ["c_attn"], "gpt_neox": ["query_key_value"], "phi3": ["qkv_proj"]}.get(architecture, ["q_proj"])
    config = LoraConfig(
        r=2, target_modules=targets, modules_to_save=["deferral_head"], fan_in_fan_out=architecture == "gpt2"
    )
    adapted = get_peft_model(model, config).train()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(4):
        loss = adapted(**random_batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]

    adapted.save_pretrained(tmp_path / "adapter")
    collm.checkpoints.save_deferral_config(model, tmp_path / "adapter")
    with torch.no_grad():
        expected = adapted.eval()(**inputs())
        again = CoLLMForCausalLM.from_pretrained(tmp_path / "adapter").eval()
        out = again(**inputs())
        torch.testing.assert_close(out.logits, expected.logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(out.deferral_logits, expected.deferral_logits, rtol=1e-4, atol=1e-4)
        merged = adapted.merge_and_unload()
        assert (merged.deferral_head.weight != 0).any()
        torch.testing.assert_close(merged(**inputs()).logits, out.logits, rtol=1e-4, atol=1e-4)


# -------------------------------------------------------------------------------------------------- what the head says


@each_architecture
@torch.no_grad()
def test_head_is_linear_on_what_the_lm_head_reads_and_on_standardised_uncertainty(architecture):
    model = tiny_collm(architecture)
    mean, std = [1.0, 0.5, 0.1, 0.0], [2.0, 3.0, 0.5, 1.0]
    model.config.deferral.uncertainty_mean, model.config.deferral.uncertainty_std = mean, std
    seen = []
    model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    out = model(**inputs())
    uncertainty = (uncertainty_features(out.logits) - torch.tensor(mean)) / torch.tensor(std)
    features = torch.cat([seen[0], uncertainty], dim=-1)
    torch.testing.assert_close(out.deferral_logits, features @ model.deferral_head.weight.T)


@pytest.mark.parametrize("features", [["hidden"], ["uncertainty"], ["hidden", "uncertainty"]])
@pytest.mark.parametrize("bias", [False, True])
def test_features_and_bias_settle_the_shape_of_the_head(features, bias, tmp_path):
    model = tiny_collm(deferral={"features": features, "bias": bias, "num_assistants": 3})
    assert model.deferral_head.weight.shape == (3, 32 * ("hidden" in features) + 4 * ("uncertainty" in features))
    assert (model.deferral_head.bias is not None) == bias
    model(**random_batch(num_assistants=3)).loss.backward()
    assert model.deferral_head.weight.grad.abs().sum() > 0
    model.save_pretrained(tmp_path)
    again = CoLLMForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.deferral_head.weight, model.deferral_head.weight)


def test_a_new_head_is_undecided():
    model = CoLLMForCausalLM.from_base(tiny_model(), num_assistants=3)
    pi = collm.losses.deferral_probabilities(model(**inputs()).deferral_logits)
    torch.testing.assert_close(pi, torch.full_like(pi, 0.25))


@each_architecture
def test_scores_of_targets_equal_those_from_all_logits(architecture, monkeypatch):
    monkeypatch.setattr(modeling, "LOGITS_PER_CHUNK", 5 * 64)
    model, batch = tiny_collm(architecture, num_assistants=2), random_batch()
    scores = model.score_targets(batch["input_ids"], batch["attention_mask"], batch["labels"])
    with torch.no_grad():
        out = model(batch["input_ids"], batch["attention_mask"])
    rows, positions = scores.index.T
    assert torch.equal(scores.index, (batch["labels"][:, 1:] != -100).nonzero() + torch.tensor([0, 1]))
    tokens, logits = batch["labels"][rows, positions], out.logits[rows, positions - 1]
    expected = logits.log_softmax(-1)[torch.arange(len(tokens)), tokens]
    torch.testing.assert_close(scores.base_logprobs, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(scores.base_correct, logits.argmax(-1) == tokens)
    torch.testing.assert_close(scores.deferral_logits, out.deferral_logits[rows, positions - 1], rtol=1e-4, atol=1e-4)
    head = model.standardise(scores.features) @ model.deferral_head.weight.T
    torch.testing.assert_close(scores.deferral_logits, head)


def test_without_labels_every_kept_token_but_the_first_is_scored():
    model, batch = tiny_collm(), random_batch()
    scores = model.score_targets(batch["input_ids"], batch["attention_mask"])
    assert len(scores.base_logprobs) == batch["attention_mask"][:, 1:].sum()
    left = {name: batch[name].flip(-1) for name in ("input_ids", "attention_mask")}
    assert torch.equal(
        model.score_targets(**left).index, (left["attention_mask"].cumsum(-1) * left["attention_mask"] > 1).nonzero()
    )


def test_a_decoder_within_the_base_model_is_found():
    """OPT's forward calls `model.decoder`; that `model` has run must not make it run again on its own output."""
    config = AutoConfig.for_model(
        "opt", vocab_size=64, hidden_size=32, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2,
        word_embed_proj_dim=32, max_position_embeddings=64, dropout=0.0,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        hidden, logits = base.model(**inputs()).last_hidden_state, base(**inputs()).logits
        torch.testing.assert_close(lm_head_logits(base, hidden), logits)
    model, batch = randomise_head(CoLLMForCausalLM.from_base(base)), random_batch()
    out = model(**inputs())
    rows, tokens = batch["labels"][:, 1:] != -100, batch["labels"][:, 1:]
    logprobs = out.logits[:, :-1][rows].log_softmax(-1).gather(-1, tokens[rows].unsqueeze(-1))[:, 0]
    assistants = batch["assistant_logprobs"][:, 1:][rows]
    expected = collm.marginal_likelihood_loss(logprobs, assistants, out.deferral_logits[:, :-1][rows])
    torch.testing.assert_close(model(**batch).loss, expected)


@each_architecture
@torch.no_grad()
def test_lm_head_logits_are_the_architectures_own(architecture):
    base = tiny_model(architecture)
    hidden = base.base_model(**inputs()).last_hidden_state
    torch.testing.assert_close(lm_head_logits(base, hidden), base(**inputs()).logits)
    model = tiny_collm(architecture)
    torch.testing.assert_close(lm_head_logits(model, hidden), base(**inputs()).logits)


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_load_balancing_loss_is_added_with_the_architectures_weight(architecture):
    batch = random_batch()
    base = tiny_model(architecture, output_router_logits=True)
    plain = base(batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"])
    model = tiny_collm(architecture, output_router_logits=True)
    out = model(batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"])
    assert plain.aux_loss > 0
    torch.testing.assert_close(out.loss, plain.loss)
    torch.testing.assert_close(out.aux_loss, plain.aux_loss)


# ----------------------------------------------------------------------------------------------- shape of the interface


def test_with_labels_logits_come_only_on_request():
    model, batch = tiny_collm(), random_batch()
    out = model(**batch)
    assert out.logits is None
    assert out.deferral_logits is None
    full = model(**batch, output_logits=True)
    torch.testing.assert_close(full.loss, out.loss)
    without = model(**inputs())
    assert torch.equal(full.logits, without.logits)
    assert torch.equal(full.deferral_logits, without.deferral_logits)


def test_logits_to_keep_keeps_as_many_deferral_logits():
    model = tiny_collm()
    out, last = model(**inputs()), model(**inputs(), logits_to_keep=1)
    assert last.deferral_logits.shape == (3, 1, 1)
    torch.testing.assert_close(last.deferral_logits, out.deferral_logits[:, -1:])


def test_return_dict_false_gives_a_tuple():
    loss, *_ = tiny_collm()(**random_batch(), return_dict=False)
    torch.testing.assert_close(loss, tiny_collm()(**random_batch()).loss)


def test_signature_names_ours_and_the_architectures_arguments():
    parameters = inspect.signature(tiny_collm().forward).parameters
    ours = {"input_ids", "attention_mask", "labels", "assistant_logprobs", "assistant_correct", "num_items_in_batch"}
    assert ours | {"position_ids", "past_key_values", "inputs_embeds", "logits_to_keep"} <= set(parameters)
    assert [p.name for p in parameters.values() if p.kind is p.VAR_KEYWORD] == ["kwargs"]  # the Trainer looks for it


def test_generate_refuses_arguments_that_nobody_knows():
    with pytest.raises(ValueError, match="temprature"):
        tiny_collm().generate(torch.tensor([[5, 6]]), max_new_tokens=2, temprature=0.3)


def test_the_trainer_keeps_the_scores_columns(tmp_path):
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    rows = Dataset.from_dict({
        "input_ids": [[1, 2]], "labels": [[1, 2]], "assistant_logprobs": [[[-1.0], [-1.0]]],
        "assistant_correct": [[[True], [False]]], "source": ["x"],
    })  # fmt: skip
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    trainer = Trainer(tiny_collm(), arguments, train_dataset=rows)
    kept = trainer._remove_unused_columns(rows)
    assert set(kept.column_names) == {"input_ids", "labels", "assistant_logprobs", "assistant_correct"}
    assert trainer.model_accepts_loss_kwargs


def test_an_architecture_that_divides_its_own_loss_otherwise_still_gets_the_batchs_targets():
    assert not Gemma3nForConditionalGeneration.accepts_loss_kwargs
    assert modeling.collm_class(Gemma3nForConditionalGeneration).accepts_loss_kwargs


def test_training_statistics_are_sums_over_targets_since_last_taken():
    model, batch = tiny_collm(num_assistants=2).train(), random_batch(num_assistants=2)
    scores = model.eval().score_targets(batch["input_ids"], batch["attention_mask"], batch["labels"])
    model.train()
    for _ in range(2):
        model(**batch)
    taken = model.take_training_statistics()
    rows = batch["labels"][:, 1:] != -100
    assert taken["tokens"] == 2 * rows.sum()
    torch.testing.assert_close(taken["base_nll"], -2 * scores.base_logprobs.sum())
    torch.testing.assert_close(taken["assistant_nll"], -2 * batch["assistant_logprobs"][:, 1:][rows].sum(0))
    d = 1 - collm.losses.deferral_probabilities(scores.deferral_logits)[:, 0]
    torch.testing.assert_close(taken["deferral_probability"], 2 * d.sum())
    assert taken["posterior"].shape == (2,)
    assert model.take_training_statistics() == {}


def test_inputs_embeds_work_as_for_the_base():
    model = tiny_collm()
    embedded = model.get_input_embeddings()(inputs()["input_ids"])
    out = model(inputs_embeds=embedded, attention_mask=inputs()["attention_mask"])
    torch.testing.assert_close(out.deferral_logits, model(**inputs()).deferral_logits)


# ------------------------------------------------------------------------------------------------------ construction


def test_the_mixin_alone_is_no_model():
    with pytest.raises(ConfigurationError, match="call its from_pretrained"):
        CoLLMForCausalLM(tiny_config())


def test_from_config_has_random_weights_and_a_zero_head():
    model = CoLLMForCausalLM.from_config(tiny_config("qwen2"), num_assistants=2, dtype=torch.bfloat16)
    assert isinstance(model, CoLLMForCausalLM)
    assert model.dtype == torch.bfloat16
    assert model.config.deferral.num_assistants == 2
    assert (model.deferral_head.weight == 0).all()
    assert model.model.layers[0].mlp.up_proj.weight.std() > 0


def test_from_base_keeps_the_parameters_and_refuses_to_do_it_twice():
    base = tiny_model()
    weight = base.model.embed_tokens.weight
    model = CoLLMForCausalLM.from_base(base)
    assert model is base
    assert model.model.embed_tokens.weight is weight
    with pytest.raises(ConfigurationError, match="has a deferral head already"):
        CoLLMForCausalLM.from_base(model)


def test_one_class_per_architecture():
    assert type(tiny_collm()) is type(tiny_collm(seed=2))
    assert type(tiny_collm()) is not type(tiny_collm("qwen2"))
    assert type(tiny_collm()).__qualname__ == "CoLLMLlamaForCausalLM"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles(copied):
    model = tiny_collm("qwen2")
    again = copied(model)
    assert type(again) is type(model)
    assert torch.equal(again(**inputs()).deferral_logits, model(**inputs()).deferral_logits)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    again.config.deferral.threshold = 0.9
    assert model.config.deferral.threshold == 0.5


@pytest.mark.parametrize("options", [{"device_map": "cpu"}, {"dtype": "auto"}, {"attn_implementation": "eager"}])
def test_loading_options_of_transformers_work(options, tmp_path):
    model = tiny_collm("qwen2", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    again = CoLLMForCausalLM.from_pretrained(tmp_path, **options).eval()
    assert again.dtype == torch.bfloat16
    assert again.deferral_head.weight.dtype == torch.float32
    torch.testing.assert_close(again(**inputs()).deferral_logits, model(**inputs()).deferral_logits, rtol=0.1, atol=0.1)


def test_dtype_given_wins_over_the_saved_one_but_the_head_stays_float32(tmp_path):
    tiny_collm().save_pretrained(tmp_path)
    model = CoLLMForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)
    assert model.dtype == torch.float16
    assert model.deferral_head.weight.dtype == torch.float32
    assert model(**inputs()).deferral_logits.dtype == torch.float32


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("bert", '"bert" is an encoder: it sees the tokens that it should predict'),
        ("t5", '"t5" is an encoder-decoder'),
        ("vit", '"vit" is not a causal language model'),
    ],
)
def test_what_is_no_decoder_is_refused(architecture, message, tmp_path):
    config = AutoConfig.for_model(architecture)
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=message):
        CoLLMForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=message):
        CoLLMForCausalLM.from_config(config)


def test_a_multimodal_config_gives_a_model_that_defers_on_text(tmp_path):
    text = tiny_config("gemma3_text").to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    base = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        expected = base(**inputs()).logits
    model = randomise_head(CoLLMForCausalLM.from_base(base))
    model(**random_batch()).loss.backward()
    assert model.deferral_head.weight.grad.abs().sum() > 0
    model.save_pretrained(tmp_path)
    again = CoLLMForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**inputs()).logits, expected)
        assert torch.equal(again(**inputs()).deferral_logits, model(**inputs()).deferral_logits)


def test_a_loaded_encoder_is_refused_too():
    config = AutoConfig.for_model("bert", vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(UnsupportedModelError, match='"bert" is an encoder'):
        CoLLMForCausalLM.from_base(AutoModelForCausalLM.from_config(config))


def test_quantisation_leaves_the_head_alone(tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    model = tiny_collm("llama", dtype=torch.bfloat16, hidden_size=64, intermediate_size=64)
    model.save_pretrained(tmp_path)
    for skip in (None, ["lm_head"]):
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, llm_int8_skip_modules=skip)
        quantised = CoLLMForCausalLM.from_pretrained(tmp_path, quantization_config=config)
        assert "4bit" in type(quantised.model.layers[0].mlp.up_proj).__name__
        assert type(quantised.deferral_head) is nn.Linear
        assert torch.equal(quantised.deferral_head.weight, model.deferral_head.weight)
    assert quantised(**inputs()).deferral_logits.isfinite().all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_torch_compile_gives_the_same_loss_and_logits():
    model, batch = tiny_collm("qwen2").eval(), random_batch()
    expected, loss = model(**inputs()), model(**batch).loss
    compiled = torch.compile(model)
    out = compiled(**inputs())
    torch.testing.assert_close(out.logits, expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.deferral_logits, expected.deferral_logits, rtol=1e-4, atol=1e-4)
    compiled_loss = compiled(**batch).loss
    torch.testing.assert_close(compiled_loss, loss)
    compiled_loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-5)


def test_models_with_a_random_head_differ_from_an_undecided_one():
    """Guards the tests above: a zero head would pass many of them."""
    assert (randomise_head(tiny_collm())(**inputs()).deferral_logits != 0).all()
