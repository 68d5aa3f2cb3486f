from __future__ import annotations

import json

import pytest
from conftest import tiny_tokenizer
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from collm.data.tokenizers import check_same_tokenizer, load_tokenizer, tokenizer_fingerprint
from collm.errors import TokenizerMismatchError


def word_tokenizer(*words: str, cls=PreTrainedTokenizerFast, **special):
    vocabulary = {word: i for i, word in enumerate(words)}
    return cls(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")), **special)


def test_the_first_differing_token_is_named():
    base, assistant = word_tokenizer("<unk>", "a", "b", "c"), word_tokenizer("<unk>", "a", "x", "y")
    with pytest.raises(TokenizerMismatchError, match=r"token id 2: 'b' in the base, 'x' in the assistant \(4 and 4"):
        check_same_tokenizer(base, assistant)


def test_a_missing_token_is_named():
    base, assistant = word_tokenizer("<unk>", "a", "b"), word_tokenizer("<unk>", "a", "b", "c")
    with pytest.raises(TokenizerMismatchError, match="token id 3: nothing in the base, 'c' in the assistant"):
        check_same_tokenizer(base, assistant)


def test_classes_and_chat_templates_may_differ():
    class Other(PreTrainedTokenizerFast):
        pass

    base, assistant = word_tokenizer("<unk>", "a"), word_tokenizer("<unk>", "a", cls=Other)
    assistant.chat_template = "{{ messages }}"
    check_same_tokenizer(base, assistant)
    assert tokenizer_fingerprint(base) == tokenizer_fingerprint(assistant)


@pytest.mark.parametrize("extended", ["base", "assistant"])
def test_added_tokens_beyond_the_end_are_fine(extended):
    plain, more = word_tokenizer("<unk>", "a"), word_tokenizer("<unk>", "a")
    more.add_special_tokens({"pad_token": "<pad>"})
    check_same_tokenizer(*((more, plain) if extended == "base" else (plain, more)))
    assert tokenizer_fingerprint(plain) != tokenizer_fingerprint(more)


def test_added_tokens_that_differ_are_refused():
    base, assistant = word_tokenizer("<unk>", "a"), word_tokenizer("<unk>", "a")
    base.add_special_tokens({"pad_token": "<pad>"})
    assistant.add_special_tokens({"pad_token": "<PAD>"})
    with pytest.raises(TokenizerMismatchError, match="token id 2: '<pad>' in the base, '<PAD>' in the assistant"):
        check_same_tokenizer(base, assistant)


def test_names_are_loaded_and_shown(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    word_tokenizer("<unk>", "a").save_pretrained(tmp_path / "other")
    check_same_tokenizer(str(tmp_path / "base"), tiny_tokenizer())
    with pytest.raises(TokenizerMismatchError, match=r"base and .*other have different vocabularies.* token id 0"):
        check_same_tokenizer(str(tmp_path / "base"), str(tmp_path / "other"))


def test_a_folder_without_tokenizer_is_a_clear_error(tmp_path):
    with pytest.raises(TokenizerMismatchError, match="No tokenizer can be loaded from"):
        load_tokenizer(str(tmp_path))


def test_a_head_without_tokenizer_has_its_bases(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "head").mkdir()
    config = {"model_type": "qwen2", "deferral": {"base_model": str(tmp_path / "base")}}
    (tmp_path / "head" / "config.json").write_text(json.dumps(config))
    assert load_tokenizer(str(tmp_path / "head")).get_vocab() == tiny_tokenizer().get_vocab()


def test_a_model_without_tokenizer_has_none(tmp_path):
    """transformers makes one of a single token."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(TokenizerMismatchError, match="it has none"):
        load_tokenizer(str(tmp_path))
