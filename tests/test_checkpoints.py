"""All forms of a deferral checkpoint, and what is said about those that cannot be read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import VOCAB_SIZE, random_batch, randomise_head, save_plain, tiny_collm, tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from collm import CoLLMForCausalLM, DeferralConfig
from collm.checkpoints import (
    DEFER_TOKEN,
    HEAD_FILE,
    INDEX_FILE,
    is_head_only,
    link_full_checkpoint,
    save_deferral_config,
    save_head_only,
)
from collm.errors import CheckpointError, ConfigurationError, UnsupportedModelError


def inputs() -> dict[str, torch.Tensor]:
    batch = random_batch()
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def assert_same_outputs(model, other):
    with torch.no_grad():
        expected, out = model.eval()(**inputs()), other.eval()(**inputs())
    assert torch.equal(out.logits, expected.logits)
    assert torch.equal(out.deferral_logits, expected.deferral_logits)


@pytest.fixture
def base(tmp_path) -> str:
    """Folder of a plain causal language model with its tokenizer."""
    return save_plain(tiny_model("qwen2"), tmp_path / "base")


@pytest.fixture
def full(tmp_path) -> Path:
    """Folder of a full deferral checkpoint with K = 1."""
    tiny_collm("qwen2").save_pretrained(tmp_path / "full")
    return tmp_path / "full"


def edit_config(folder, **deferral) -> None:
    path = Path(folder, "config.json")
    config = json.loads(path.read_text())
    config["deferral"].update(deferral)
    path.write_text(json.dumps(config))


# -------------------------------------------------------------------------------------------------------- from a base


def test_any_causal_language_model_gets_a_new_head_and_is_named_as_base(base):
    model, info = CoLLMForCausalLM.from_pretrained(base, num_assistants=2, output_loading_info=True)
    assert model.config.deferral.num_assistants == 2
    assert model.config.deferral.base_model == base
    assert (model.deferral_head.weight == 0).all()
    assert info["missing_keys"] == {"deferral_head.weight"}
    plain = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        assert torch.equal(model(**inputs()).logits, plain(**inputs()).logits)


def test_settings_of_a_new_head(base):
    settings = {"features": ["hidden"], "bias": True, "deferral_cost": 0.2, "num_assistants": 2}
    for deferral in (settings, DeferralConfig(**settings)):
        model = CoLLMForCausalLM.from_pretrained(base, deferral=deferral)
        assert model.deferral_head.weight.shape == (2, 32)
        assert model.config.deferral.deferral_cost == 0.2
    with pytest.raises(ConfigurationError, match="num_assistants=3 but deferral has num_assistants=2"):
        CoLLMForCausalLM.from_pretrained(base, num_assistants=3, deferral=settings)
    with pytest.raises(ConfigurationError, match='Did you mean "features"'):
        CoLLMForCausalLM.from_pretrained(base, deferral={"feature": ["hidden"]})


# ------------------------------------------------------------------------------------------------------------- full


def test_what_travels_with_a_checkpoint(full):
    model = CoLLMForCausalLM.from_pretrained(full)
    model.config.deferral.calibration = [{"rate": 0.1, "threshold": 0.8}, {"rate": 0.4, "threshold": 0.3}]
    model.config.deferral.assistants = ["org/big"]
    model.save_pretrained(full)
    config = json.loads((full / "config.json").read_text())
    assert config["architectures"] == ["CoLLMForCausalLM"]
    assert config["model_type"] == "qwen2"
    assert config["deferral"]["assistants"] == ["org/big"]
    again = CoLLMForCausalLM.from_pretrained(full)
    assert isinstance(again.config.deferral, DeferralConfig)
    assert again.config.deferral == model.config.deferral
    assert again.config.deferral.threshold_for_rate(0.4) == 0.3


def test_settings_that_leave_the_shape_alone_replace_the_saved_ones(full):
    model = CoLLMForCausalLM.from_pretrained(full, deferral={"threshold": 0.7, "deferral_cost": 0.1})
    assert model.config.deferral.threshold == 0.7
    assert model.config.deferral.deferral_cost == 0.1
    model = CoLLMForCausalLM.from_pretrained(full, deferral=DeferralConfig(threshold=0.6))
    assert model.config.deferral.threshold == 0.6


@pytest.mark.parametrize("wanted", [{"num_assistants": 3}, {"deferral": {"features": ["hidden"]}}])
def test_a_trained_head_keeps_its_shape(full, wanted):
    with pytest.raises(CheckpointError, match=r"was trained with (num_assistants=1|features=\['hidden', 'uncert)"):
        CoLLMForCausalLM.from_pretrained(full, **wanted)


def test_weights_without_a_head_are_named(full):
    plain = AutoModelForCausalLM.from_pretrained(full)
    plain.save_pretrained(full)  # config.json keeps `deferral`
    with pytest.raises(
        CheckpointError, match=r"says in config.json that it has a deferral head, but its weights have none"
    ):
        CoLLMForCausalLM.from_pretrained(full)


def test_weights_and_config_that_differ_in_assistants(full):
    edit_config(full, num_assistants=2)
    with pytest.raises(CheckpointError, match=r"other shapes than its config\.json says"):
        CoLLMForCausalLM.from_pretrained(full)


def test_a_truncated_weight_file(full):
    path = full / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="is damaged or cut off"):
        CoLLMForCausalLM.from_pretrained(full)


def test_a_missing_shard(tmp_path):
    tiny_collm("qwen2").save_pretrained(tmp_path, max_shard_size="10KB")
    next(iter(sorted(tmp_path.glob("model-*.safetensors")))).unlink()
    with pytest.raises(CheckpointError, match=r"cannot read a checkpoint from .*model-00001"):
        CoLLMForCausalLM.from_pretrained(tmp_path)


def test_a_folder_without_weights(full):
    (full / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no file named model.safetensors"):
        CoLLMForCausalLM.from_pretrained(full)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "valid JSON"), ("{}", "model_type"), ('{"model_type": "nosuch"}', "nosuch")],
)
def test_a_config_that_says_nothing_useful(full, text, message):
    (full / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        CoLLMForCausalLM.from_pretrained(full)


def test_a_deferral_entry_that_nobody_knows(full):
    edit_config(full, tresholds=[0.5])
    with pytest.raises(ConfigurationError, match='"tresholds" is not a field of DeferralConfig'):
        CoLLMForCausalLM.from_pretrained(full)


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "nothing/here/either"])
def test_a_missing_folder(name):
    with pytest.raises(CheckpointError, match=f'there is no folder "{name}"'):
        CoLLMForCausalLM.from_pretrained(name)


def test_a_name_that_neither_the_disk_nor_the_hub_knows():
    with pytest.raises(CheckpointError, match=r'(?s)cannot read a checkpoint from "me/nothing".*is no local folder'):
        CoLLMForCausalLM.from_pretrained("me/nothing")


def test_a_folder_without_config(tmp_path, adapter):
    with pytest.raises(CheckpointError, match=r"there is no config\.json in .*tmp[^:]*\.$"):
        CoLLMForCausalLM.from_pretrained(tmp_path)
    folder, _ = adapter
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"adapter that PEFT saved alone; add one with .*save_deferral_config"):
        CoLLMForCausalLM.from_pretrained(folder)


# -------------------------------------------------------------------------------------------------------- head only


def test_head_only_is_small_and_comes_back_on_its_base(base, tmp_path, capfd):
    model = randomise_head(CoLLMForCausalLM.from_pretrained(base, num_assistants=2))
    model.config.deferral.assistants = ["org/math", "org/law"]
    save_head_only(model, tmp_path / "head")
    assert sorted(p.name for p in (tmp_path / "head").iterdir()) == ["config.json", HEAD_FILE]
    assert sum(p.stat().st_size for p in (tmp_path / "head").iterdir()) < 10_000
    capfd.readouterr()
    again = CoLLMForCausalLM.from_pretrained(tmp_path / "head")
    assert "MISSING" not in capfd.readouterr().err  # nothing is missing: the head is in a file of its own
    assert_same_outputs(model, again)
    assert again.config.deferral == model.config.deferral
    again.save_pretrained(tmp_path / "full")
    assert_same_outputs(model, CoLLMForCausalLM.from_pretrained(tmp_path / "full"))


def test_head_only_over_a_base_that_is_a_deferral_checkpoint(full, tmp_path):
    model = CoLLMForCausalLM.from_pretrained(full)
    model.config.deferral.base_model = str(full)
    randomise_head(model, seed=11)
    save_head_only(model, tmp_path / "head")
    assert_same_outputs(model, CoLLMForCausalLM.from_pretrained(tmp_path / "head"))


def test_head_only_over_a_base_that_is_head_only_or_itself(base, tmp_path):
    inner = randomise_head(CoLLMForCausalLM.from_pretrained(base))
    save_head_only(inner, tmp_path / "inner")
    save_head_only(randomise_head(inner, seed=11), tmp_path / "outer")
    edit_config(tmp_path / "outer", base_model=str(tmp_path / "inner"))
    assert_same_outputs(inner, CoLLMForCausalLM.from_pretrained(tmp_path / "outer"))
    edit_config(tmp_path / "outer", base_model=str(tmp_path / "outer"))
    with pytest.raises(CheckpointError, match="names itself as its base"):
        CoLLMForCausalLM.from_pretrained(tmp_path / "outer")


def test_head_only_beside_other_weights_is_refused(base, full, adapter, tmp_path):
    tiny_model("qwen2").save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    model = CoLLMForCausalLM.from_pretrained(base)
    for folder in (full, adapter[0], tmp_path / "shards"):
        before = (folder / "config.json").read_text()
        with pytest.raises(CheckpointError, match=r"holds other weights \((model|adapter).*Take another folder"):
            save_head_only(model, folder)
        assert not (folder / HEAD_FILE).exists()
        assert (folder / "config.json").read_text() == before


def test_head_only_of_a_base_that_was_trained_is_refused(base, adapter, tmp_path):
    trained, merged = CoLLMForCausalLM.from_pretrained(base), CoLLMForCausalLM.from_pretrained(adapter[0])
    trained.config.deferral.base_trained = True
    for model in (trained, merged):
        with pytest.raises(CheckpointError, match=r"base of this model was trained too: it differs from .*base"):
            save_head_only(model, tmp_path / "head")
        with pytest.raises(CheckpointError, match="Take all of it"):
            model.push_to_hub("me/head", head_only=True)
    assert not (tmp_path / "head").exists()
    merged.config.deferral.update(base_model=str(adapter[0]), base_trained=False)  # a new head over the adapter
    save_head_only(merged, tmp_path / "head")
    again = CoLLMForCausalLM.from_pretrained(tmp_path / "head")
    assert again.config.deferral == merged.config.deferral
    assert_same_outputs(merged, again)


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_head_only_becomes_a_full_checkpoint_by_links(tmp_path, shard):
    tiny_model("qwen2").save_pretrained(tmp_path / "base", max_shard_size=shard)
    assert (tmp_path / "base" / INDEX_FILE).exists() == (shard == "20KB")
    model = randomise_head(CoLLMForCausalLM.from_pretrained(str(tmp_path / "base"), num_assistants=2))
    save_head_only(model, tmp_path / "head")
    (tmp_path / "links").mkdir()
    assert link_full_checkpoint(str(tmp_path / "head"), tmp_path / "links")
    assert sum(p.stat().st_size for p in (tmp_path / "links").iterdir() if not p.is_symlink()) < 20_000
    again, info = CoLLMForCausalLM.from_pretrained(str(tmp_path / "links"), output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_same_outputs(model, again)


def test_only_head_only_checkpoints_over_plain_bases_are_linked(full, adapter, tmp_path):
    assert not link_full_checkpoint(str(full), tmp_path)
    plain = Path(save_plain(tiny_model("qwen2"), tmp_path / "plain"))
    (plain / "adapter_config.json").write_text("{}")  # left beside whole weights
    assert not link_full_checkpoint(str(plain), tmp_path)
    folder, _ = adapter
    with pytest.raises(CheckpointError, match="collm export"):
        link_full_checkpoint(str(folder), tmp_path)
    model = CoLLMForCausalLM.from_pretrained(full)
    model.config.deferral.base_model = str(full)
    save_head_only(model, tmp_path / "head")
    with pytest.raises(CheckpointError, match="collm export"):
        link_full_checkpoint(str(tmp_path / "head"), tmp_path)
    assert not any(p.is_symlink() for p in tmp_path.iterdir())


def test_head_only_takes_the_options_of_its_base(base, tmp_path):
    save_head_only(randomise_head(CoLLMForCausalLM.from_pretrained(base)), tmp_path / "head")
    again, info = CoLLMForCausalLM.from_pretrained(
        tmp_path / "head", dtype=torch.bfloat16, attn_implementation="eager", output_loading_info=True
    )
    assert again.dtype == torch.bfloat16
    assert again.deferral_head.weight.dtype == torch.float32
    assert again.config._attn_implementation == "eager"
    assert not info["missing_keys"]


def test_head_only_without_a_named_base(tmp_path):
    model = tiny_collm()
    with pytest.raises(CheckpointError, match="does not know the name of its base"):
        save_head_only(model, tmp_path)
    model.config.deferral.base_model = "x"
    save_head_only(model, tmp_path)
    edit_config(tmp_path, base_model=None)
    with pytest.raises(CheckpointError, match=r"its config\.json has no deferral\.base_model"):
        CoLLMForCausalLM.from_pretrained(tmp_path)


def test_head_only_damaged_or_of_another_shape(base, tmp_path):
    save_head_only(CoLLMForCausalLM.from_pretrained(base), tmp_path / "head")
    path = tmp_path / "head" / HEAD_FILE
    whole = path.read_bytes()
    save_file({"weight": torch.zeros(2, 36)}, path)
    with pytest.raises(CheckpointError, match="does not fit"):
        CoLLMForCausalLM.from_pretrained(tmp_path / "head")
    path.write_bytes(whole[:-20])
    with pytest.raises(CheckpointError, match="is damaged or cut off"):
        CoLLMForCausalLM.from_pretrained(tmp_path / "head")


# -------------------------------------------------------------------------------------------------------------- LoRA


@pytest.fixture
def adapter(base, tmp_path):
    """A LoRA checkpoint (with a trained head) and the model in memory that it was saved from."""
    from peft import LoraConfig, get_peft_model

    model = CoLLMForCausalLM.from_pretrained(base)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["deferral_head"], init_lora_weights=False)
    adapted = get_peft_model(model, config)
    randomise_head(model, seed=5)
    adapted.save_pretrained(tmp_path / "adapter")
    save_deferral_config(model, tmp_path / "adapter")
    return tmp_path / "adapter", adapted


def test_lora_checkpoint_loads_merged(adapter):
    folder, adapted = adapter
    again = CoLLMForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        expected, out = adapted.eval()(**inputs()), again.eval()(**inputs())
    torch.testing.assert_close(out.logits, expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.deferral_logits, expected.deferral_logits, rtol=1e-4, atol=1e-4)
    assert (again.deferral_head.weight != 0).all()
    assert not any("lora" in name for name, _ in again.named_modules())


def test_peft_itself_loads_it_too(adapter, base):
    from peft import PeftModel

    folder, adapted = adapter
    again = PeftModel.from_pretrained(CoLLMForCausalLM.from_pretrained(base), folder)
    with torch.no_grad():
        assert torch.equal(again.eval()(**inputs()).deferral_logits, adapted.eval()(**inputs()).deferral_logits)


@pytest.mark.parametrize("form", ["head", "adapter"])
def test_full_weights_saved_over_another_form_are_what_is_loaded(form, base, adapter, tmp_path):
    save_head_only(randomise_head(CoLLMForCausalLM.from_pretrained(base)), tmp_path / "head")
    folder = tmp_path / form
    model = CoLLMForCausalLM.from_pretrained(folder)
    for parameter in model.parameters():
        parameter.data.mul_(1.5)  # trained on
    before = {path.name for path in folder.iterdir()}
    model.save_pretrained(folder, is_main_process=False)
    assert before <= {path.name for path in folder.iterdir()}  # left to the main process
    model.save_pretrained(folder)
    assert_same_outputs(model, CoLLMForCausalLM.from_pretrained(folder))
    assert not is_head_only(str(folder))
    assert not link_full_checkpoint(str(folder), tmp_path)


def test_a_folder_of_two_forms_is_refused(base, adapter, tmp_path):
    model = randomise_head(CoLLMForCausalLM.from_pretrained(base))
    save_head_only(model, tmp_path / "head")
    model.save_pretrained(tmp_path / "full")
    for form in ("head", "adapter"):  # as a download over an older one leaves it
        shutil.copy(tmp_path / "full" / "model.safetensors", tmp_path / form)
        with pytest.raises(CheckpointError, match="remove the one that is not meant"):
            CoLLMForCausalLM.from_pretrained(tmp_path / form)
        with pytest.raises(CheckpointError, match="remove the one that is not meant"):
            link_full_checkpoint(str(tmp_path / form), tmp_path)


def test_adapters_that_a_model_carries_are_kept(base, tmp_path):
    from peft import LoraConfig

    model = CoLLMForCausalLM.from_pretrained(base)
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert files >= {"adapter_config.json", "adapter_model.safetensors"}


# ------------------------------------------------------------------------------------------ checkpoints of the paper


def papers_checkpoint(folder, tied: bool, pad_to_multiple_of: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """What the paper's code saves: a vocabulary grown by `<|defer|>` in tokenizer, embedding and LM head.

    Returns the base's logits and the logit of `<|defer|>` for `inputs()`.
    """
    tokenizer, model = tiny_tokenizer(), tiny_model("llama", tie_word_embeddings=tied)
    tokenizer.add_tokens([DEFER_TOKEN], special_tokens=True)
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of, mean_resizing=False)
    model.get_output_embeddings().weight.data[VOCAB_SIZE] = torch.randn(32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with torch.no_grad():
        logits = model(**inputs()).logits
    return logits[..., :VOCAB_SIZE], logits[..., VOCAB_SIZE : VOCAB_SIZE + 1]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("pad_to_multiple_of", [None, 16])
def test_checkpoint_of_the_papers_code_becomes_a_head(tied, pad_to_multiple_of, tmp_path):
    base_logits, defer_logit = papers_checkpoint(tmp_path / "paper", tied, pad_to_multiple_of)
    model = CoLLMForCausalLM.from_pretrained(tmp_path / "paper").eval()
    with torch.no_grad():
        out = model(**inputs())
    torch.testing.assert_close(out.logits, base_logits)  # P_0 runs over the real vocabulary only
    torch.testing.assert_close(out.deferral_logits, defer_logit)
    assert model.config.vocab_size == VOCAB_SIZE
    assert model.config.deferral.features == ["hidden"]
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.save_pretrained(tmp_path / "ours")
    assert_same_outputs(model, CoLLMForCausalLM.from_pretrained(tmp_path / "ours"))
    assert load_file(tmp_path / "ours" / "model.safetensors")["deferral_head.weight"].shape == (1, 32)


def test_checkpoint_of_the_papers_code_with_the_old_tokenizer_files(tmp_path):
    """transformers 4 wrote added tokens to a file of their own, and Llama's tokenizer had no tokenizer.json."""
    base_logits, defer_logit = papers_checkpoint(tmp_path, tied=False)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).unlink()
    (tmp_path / "added_tokens.json").write_text(json.dumps({DEFER_TOKEN: VOCAB_SIZE}))
    with torch.no_grad():
        out = CoLLMForCausalLM.from_pretrained(tmp_path).eval()(**inputs())
    torch.testing.assert_close(out.logits, base_logits)
    torch.testing.assert_close(out.deferral_logits, defer_logit)


def test_checkpoint_of_the_papers_code_has_one_assistant(tmp_path):
    papers_checkpoint(tmp_path, tied=False)
    with pytest.raises(CheckpointError, match="was trained with num_assistants=1, not 2"):
        CoLLMForCausalLM.from_pretrained(tmp_path, num_assistants=2)


def test_a_tokenizer_that_says_defer_over_weights_without_the_row(tmp_path):
    save_plain(tiny_model(), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_tokens([DEFER_TOKEN])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"gives <\|defer\|> the id 64, but its LM head ends at 63"):
        CoLLMForCausalLM.from_pretrained(tmp_path)


def test_head_only_over_a_base_of_another_kind(tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    BertForMaskedLM(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                               vocab_size=20)).save_pretrained(tmp_path / "bert")  # fmt: skip
    model = tiny_collm()
    model.config.deferral.base_model = str(tmp_path / "bert")
    save_head_only(model, tmp_path / "head")
    with pytest.raises(UnsupportedModelError, match='"bert" is an encoder'):
        CoLLMForCausalLM.from_pretrained(tmp_path / "head")
