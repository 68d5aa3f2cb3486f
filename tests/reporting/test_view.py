from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from collm.reporting import TokenView, token_texts


@pytest.fixture(scope="module")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte: every character beyond ASCII is cut into pieces."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("text", ["plain words", "naïve – “quotes” 🦆🦆 end", "日本語のテキスト", "", "x\n\n\ty  z"])
def test_pieces_join_to_the_text(byte_tokenizer, text):
    ids = byte_tokenizer.encode(text)
    pieces = token_texts(byte_tokenizer, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text


def test_an_incomplete_character_at_the_end_is_shown(byte_tokenizer):
    pieces = token_texts(byte_tokenizer, byte_tokenizer.encode("a🦆")[:-1])
    assert pieces[0] == "a"
    assert "�" in "".join(pieces)


def test_leading_spaces_of_sentencepiece_style_tokens_are_kept():
    tokenizer = Tokenizer(models.BPE({"▁a": 0, "▁b": 1, "c": 2, "<unk>": 3}, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert token_texts(fast, [0, 1, 2, 1]) == ["a", " b", "c", " b"]
    view = TokenView.from_ids(fast, [0, 1, 2, 1], [0] * 4, None, [1, 1, 0, 0])
    assert [token.alternative for token in view.tokens] == ["b", " b", " a", " a"]


def test_from_ids_leaves_padding_out(byte_tokenizer):
    ids = torch.tensor(byte_tokenizer.encode("abcd"))
    view = TokenView.from_ids(
        byte_tokenizer,
        ids,
        torch.tensor([0, 1, 1, -1]),
        torch.tensor([0.25, 0.75, 0.5, 0.0]),
        [None, int(ids[1]), int(ids[0]), None],
        names=["s", "b"],
    )
    assert view.text == "abc"
    assert view.deferred() == 2
    assert view.deferred(0) == 1
    assert [t.deferral for t in view.tokens] == [0.25, 0.75, 0.5]
    assert [t.alternative for t in view.tokens] == [None, "b", "a"]


def test_the_same_token_is_no_other_token_inside_of_a_character(byte_tokenizer):
    ids = byte_tokenizer.encode("aaaaaaaaaaaa🦆")
    view = TokenView.from_ids(byte_tokenizer, ids, [1] * len(ids), None, ids)
    assert [token.alternative for token in view.tokens] == [token.text for token in view.tokens]
