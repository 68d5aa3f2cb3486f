"""The head as a vocabulary row, and back through the reader of the paper's checkpoints."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from collm import CoLLMForCausalLM
from collm.cli import main
from collm.errors import ConfigurationError, UnsupportedModelError
from collm.merging import merge_into_vocabulary
from tests.conftest import save_plain, tiny_collm, tiny_model, tiny_tokenizer

HIDDEN = {"num_assistants": 1, "features": ["hidden"]}
BATCH = torch.tensor([[5, 9, 23, 41, 17, 8]])


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "mixtral"])
def test_a_merged_checkpoint_is_plain_and_its_round_trip_is_the_model(tmp_path, architecture):
    model = tiny_collm(architecture, deferral=HIDDEN)
    before = model(BATCH)
    save_plain(model, tmp_path / "own")
    assert main(["export", str(tmp_path / "own"), str(tmp_path / "merged"), "--merged"]) == 0

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    logits = plain(BATCH).logits
    assert logits.shape[-1] == 65
    assert torch.allclose(logits[..., :64], before.logits, atol=1e-5)
    assert torch.allclose(logits[..., 64:], before.deferral_logits, atol=1e-5)

    again = CoLLMForCausalLM.from_pretrained(str(tmp_path / "merged"))
    after = again(BATCH)
    assert again.config.vocab_size == 64
    assert torch.allclose(after.logits, before.logits, atol=1e-5)
    assert torch.allclose(after.deferral_logits, before.deferral_logits, atol=1e-5)


def test_a_head_that_no_row_can_express_is_refused():
    for deferral in ({"num_assistants": 2, "features": ["hidden"]}, {"num_assistants": 1}):
        with pytest.raises(ConfigurationError, match="plugin"):
            merge_into_vocabulary(tiny_collm(deferral=deferral), tiny_tokenizer())


@pytest.mark.parametrize("architecture", ["gemma2", "granite"])
def test_an_architecture_that_changes_logits_afterwards_is_refused(architecture):
    with pytest.raises(UnsupportedModelError, match="behind its LM head"):
        merge_into_vocabulary(tiny_collm(architecture, deferral=HIDDEN), tiny_tokenizer())


def test_full_and_head_only_exports_load(tmp_path):
    model = tiny_collm()
    model.config.deferral.base_model = str(tmp_path / "base")
    save_plain(model, tmp_path / "own")
    save_plain(tiny_model(), tmp_path / "base")
    for form in (["--head-only"], []):
        assert main(["export", str(tmp_path / "own"), str(tmp_path / "out"), *form]) == 0
        again = CoLLMForCausalLM.from_pretrained(str(tmp_path / "out"))
        assert torch.equal(again.deferral_head.weight, model.deferral_head.weight)
    assert main(["export", str(tmp_path / "own"), str(tmp_path / "out"), "--head-only"]) == 2  # over full weights
    assert main(["export", str(tmp_path / "own"), str(tmp_path / "out"), "--merged", "--head-only"]) == 2


def test_the_head_alone_is_not_exported_where_the_base_was_trained(tmp_path, capsys):
    model = tiny_collm()
    model.config.deferral.base_model = "org/base"
    save_plain(model, tmp_path / "own")
    assert main(["export", str(tmp_path / "own"), str(tmp_path / "out"), "--head-only"]) == 0
    model.config.deferral.base_trained = True
    save_plain(model, tmp_path / "own")
    assert main(["export", str(tmp_path / "own"), str(tmp_path / "copy")]) == 0  # a copy says so too
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter" / "config.json").write_text('{"model_type": "llama", "deferral": {"base_model": "org/base"}}')
    capsys.readouterr()
    for name in ("own", "copy", "adapter"):
        assert main(["export", str(tmp_path / name), str(tmp_path / "out"), "--head-only"]) == 2
        assert "trained too: it differs from org/base" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "nothing"), str(tmp_path / "out"), "--head-only"]) == 2
