"""Pushing to the Hub and loading from it: the real client, over HTTP, against a stand-in on the loopback interface."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import tiny_collm
from hub_session import READER, WRITER

from collm import DeferralConfig
from collm.errors import CheckpointError, HubError
from collm.hub import model_card, public_name, push_checkpoint, read_json


@pytest.fixture(scope="module")
def session(tmp_path_factory) -> dict:
    """What came of the session in `hub_session.py`, with everything that it said in between."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment |= {
        "HF_HUB_VERBOSITY": "debug", "HF_DEBUG": "1", "TRANSFORMERS_VERBOSITY": "debug", "OMP_NUM_THREADS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip
    script = Path(__file__).with_name("hub_session.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(tmp_path_factory.mktemp("session"))],
        capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return {**json.loads(done.stdout.splitlines()[-1]), "said": done.stdout + done.stderr}


def metadata(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_a_full_checkpoint_comes_back_bit_identical(session):
    assert session["full"]["same"]
    assert session["full"]["config"]["architectures"] == ["CoLLMForCausalLM"]
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(session["full"]["files"])


def test_transformers_alone_loads_the_pushed_checkpoint_as_the_base(session):
    assert session["plain"] == {"unexpected": ["deferral_head.weight"], "class": "Qwen2ForCausalLM"}


def test_the_card_says_what_was_run(session):
    card = session["full"]["card"]
    assert metadata(card) == {
        "base_model": "org/base", "base_model_relation": "finetune", "library_name": "collm", "license": "mit",
        "pipeline_tag": "text-generation", "tags": ["collm", "deferral", "collaborative-decoding", "qwen2"],
    }  # fmt: skip
    assert "| 0.2 | 0.61 | 0.210 | 0.180 to 0.240 |" in card
    assert "`org/big`" in card
    assert "deferral_rate=0.4" in card


@pytest.mark.parametrize("form", ["full", "head"])
def test_the_cards_usage_block_runs(session, form):
    assert session[form]["usage"].strip().endswith("of the tokens are the assistant's")


def test_saving_with_push_to_hub_goes_the_same_way(session):
    assert session["saved"] == {"architectures": ["CoLLMForCausalLM"], "ours": True}


def test_a_card_that_a_person_wrote_stays(session):
    assert "# By hand" in session["by_hand"]
    assert "Written by collm" not in session["by_hand"]


def test_a_head_alone_is_small_and_names_its_base(session):
    head = session["head"]
    assert head["same"]
    assert head["files"] == ["README.md", "config.json", "deferral_head.safetensors"]
    assert head["bytes"] < 20_000
    assert metadata(head["card"])["base_model_relation"] == "adapter"
    assert "holds only what was trained on top of `org/base`" in head["card"]


def test_a_lora_folder_is_pushed_without_what_else_lies_in_it(session):
    lora = session["lora"]
    assert lora["code"] == 0, lora["err"]
    assert lora["difference"] < 1e-4
    assert lora["private"]
    assert set(lora["files"]) == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "config.json", "tokenizer.json",
        "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip
    assert lora["out"].splitlines()[-1].startswith("http://127.0.0.1")


def test_the_card_of_a_run_has_its_settings_and_numbers_but_no_paths(session):
    card = session["lora"]["card"]
    for expected in (
        "| data | scored, 1234 rows |", "| learning_rate | 2e-05 |", "| train_loss | 0.4321 |", "## Results: gsm8k",
        "| exact | 0.625 | 0.55 to 0.7 | 200 |", "share of tokens deferred: 0.31", "| assistants | big |",
    ):  # fmt: skip
        assert expected in card
    assert "hub_token" not in card
    assert "output_dir" not in card


def test_what_was_pushed_last_is_all_that_is_there(session):
    forms = session["forms"]
    assert {form: same for form, (same, _) in forms.items()} == dict.fromkeys(forms, True)
    for name in ("shards", "again"):
        assert forms[name][1].pop() == "model.safetensors.index.json"
        assert all(name.startswith("model-0000") for name in forms.pop(name)[1])
    assert {form: files for form, (_, files) in forms.items()} == {
        "head": ["deferral_head.safetensors"],
        "full": ["model.safetensors"],
        "saved": ["model.safetensors"],
    }


@pytest.mark.parametrize("case", ["head over full", "lora over full", "own base"])
def test_a_head_or_an_adapter_does_not_take_the_place_of_weights(session, case):
    assert session[case]["type"] == "CheckpointError"
    assert re.search(r'"(me/forms|org/base)" holds other weights \(model', session[case]["text"])


def test_a_revision_becomes_a_branch(session):
    assert session["branches"] == ["main", "v2"]


def test_a_head_whose_base_only_this_machine_knows_needs_a_name(session):
    assert session["unnamed_base"]["code"] == 2
    assert "--base-model org/name" in session["unnamed_base"]["err"]
    assert session["head_only"]["code"] == 0, session["head_only"]["err"]
    assert session["head_only"]["same"]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("pickled", "there are no safetensors in .*but pytorch_model.bin: load it and save it again"),
        ("no_deferral", "is no deferral checkpoint: its config.json has no `deferral`"),
        ("nothing", "there is no config.json in it"),
        ("401", r"the Hub does not know who you are: run `hf auth login`.*me/other, HTTP 401"),
        ("no token", "the Hub does not know who you are"),
        ("403", r"your token may not write there.*HTTP 403.*You don't have the rights"),
        ("down", "the Hub cannot be reached .*is the network up"),
    ],
)
def test_failures_on_the_command_line_are_one_line_without_traceback(session, case, message):

    failed = session[case]
    assert failed["code"] == 2
    assert re.search(message, failed["err"], re.DOTALL), failed["err"]
    assert failed["out"] == ""
    lines = [line for line in failed["err"].splitlines() if line.startswith("collm push:")]
    assert len(lines) == 1
    assert "Traceback" not in failed["err"]


def test_what_is_no_checkpoint_or_holds_a_token_is_refused_before_any_request(session):
    assert session["requests_for_refused"] == []


@pytest.mark.parametrize(
    ("case", "kind", "message"),
    [
        ("403 python", "HubError", "your token may not write there"),
        ("404", "CheckpointError", "me/nothing"),
        ("private", "CheckpointError", "me/lora"),
        ("revision", "CheckpointError", "v9"),
        ("secret", "HubError", "tokenizer_config.json holds an access token. Nothing was uploaded"),
    ],
)
def test_failures_in_python_are_errors_of_ours(session, case, kind, message):
    assert session[case]["type"] == kind
    assert message in session[case]["text"]


def test_no_token_and_no_local_path_is_ever_said_or_stored(session):
    said = session["said"]
    assert WRITER not in said
    assert READER not in said
    assert session["stored_tokens"] == []
    assert not session["stored_paths"]


def test_weights_are_safetensors_only(session):
    assert set(session["kinds"]) <= {".safetensors", ".json", ".md", ".jinja"}


# ------------------------------------------------------------------------------------------------------ without a Hub


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "llama", "deferral": dict(DeferralConfig(num_assistants=2))}))
    return path


def test_a_card_without_any_record_says_only_what_is_known(config):
    card = model_card({"config.json": config, "model.safetensors": config}, "me/x")
    assert "base_model" not in metadata(card)
    assert "license" not in metadata(card)
    assert "It is not calibrated" in card
    assert 'from_pretrained("ASSISTANT-2"' in card
    assert "2, not named" in card


def test_names_of_local_folders_lose_their_path():
    assert public_name("/home/someone/models/big-7b") == "big-7b"
    assert public_name("org/big-7b") == "org/big-7b"


def test_a_record_that_is_no_json_is_named(tmp_path):
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"results\.json is no JSON"):
        read_json(tmp_path / "results.json")


def test_the_head_alone_is_refused_where_the_base_was_trained(tmp_path):
    model = tiny_collm()
    model.config.deferral.update(base_model="org/base", base_trained=True)
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"trained too: it differs from org/base"):
        push_checkpoint(tmp_path, "me/x", head_only=True)


def test_results_and_names_that_are_none_are_named(tmp_path):
    (tmp_path / "config.json").write_text('{"deferral": {}, "model_type": "llama"}')
    (tmp_path / "deferral_head.safetensors").write_bytes(b"")
    given = {"base_model": "me/base"}
    with pytest.raises(CheckpointError, match="no results in"):
        push_checkpoint(tmp_path, "me/name", results=[tmp_path / "typo.json"], **given)
    with pytest.raises(HubError, match="cannot be the name of a repository"):
        push_checkpoint(tmp_path, "my repo/na me", **given)
