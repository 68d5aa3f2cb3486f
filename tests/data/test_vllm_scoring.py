from __future__ import annotations

import pytest
import torch
from conftest import save_plain, tiny_model, tiny_tokenizer
from datasets import Dataset
from transformers import AutoModelForCausalLM

from collm.data.formatting import format_rows
from collm.data.scoring import AssistantSettings, TransformersScorer, score_dataset
from collm.errors import AssistantError, ConfigurationError

OPTIONS = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}


def rows(count: int) -> Dataset:
    talk = [
        [
            {"role": "user", "content": " ".join(f"w{i * j % 30}" for j in range(i % 11 + 1))},
            {"role": "assistant", "content": " ".join(f"w{i * j * 3 % 30}" for j in range(i % 7 + 1))},
        ]
        for i in range(count)
    ]
    return format_rows(Dataset.from_list([{"messages": messages} for messages in talk]), tiny_tokenizer())[0]


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")  # vLLM's own
def test_vllm_gives_the_numbers_of_transformers(tmp_path, monkeypatch):
    pytest.importorskip("vllm")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    checkpoint = save_plain(tiny_model("llama", 5, **OPTIONS), tmp_path / "assistant")
    data = rows(24)
    settings = AssistantSettings(checkpoint, dtype="float32", engine="vllm")
    scored = score_dataset(data, tiny_tokenizer(), [settings], tmp_path / "out", batch_tokens=128)
    scorer = TransformersScorer(AutoModelForCausalLM.from_pretrained(checkpoint))
    for row in scored:
        logprobs, correct = scorer([row["input_ids"]], [row["labels"]])
        targets = [t for t, label in enumerate(row["labels"]) if label != -100]
        found = torch.tensor([row["assistant_logprobs"][t][0] for t in targets])
        torch.testing.assert_close(found, logprobs, atol=1e-4, rtol=1e-4)
        assert [row["assistant_correct"][t][0] for t in targets] == correct.tolist()


def test_vllm_that_is_not_there_says_what_to_install(tmp_path):
    try:
        import vllm  # noqa: F401
    except ImportError:
        checkpoint = save_plain(tiny_model("llama", 5), tmp_path / "assistant")
        with pytest.raises(AssistantError, match=r'engine="vllm" needs vLLM .* pip install "collm\[vllm\]"'):
            score_dataset(rows(2), tiny_tokenizer(), [AssistantSettings(checkpoint, engine="vllm")], tmp_path / "out")
    else:
        pytest.skip("vLLM is installed")


def test_options_of_one_engine_are_refused_by_the_other():
    with pytest.raises(ConfigurationError, match=r'engine is "vlm"; it can be transformers, vllm. Did you mean "vllm"'):
        AssistantSettings("x", engine="vlm")
    with pytest.raises(ConfigurationError, match='engine="vllm" has no'):
        AssistantSettings("x", engine="vllm", device_map="auto")
    with pytest.raises(ConfigurationError, match='tensor_parallel_size is for engine="vllm"'):
        AssistantSettings("x", tensor_parallel_size=2)
