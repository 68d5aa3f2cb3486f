"""Detokenisation, stop strings, the circuit breaker, thresholds in model names: each by itself."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import Metaspace as MetaspaceDecoder
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Metaspace
from transformers import PreTrainedTokenizerFast

from collm.serving.breaker import CircuitBreaker
from collm.serving.text import Detokenizer, StopStrings


class Bytes:
    """A tokenizer of bytes: half a character is no character."""

    def decode(self, ids, **_):
        return bytes(ids).decode("utf-8", errors="replace")


@pytest.mark.parametrize("text", ["plain", "déjà vu", "日本語 🙂 text", ""])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_pieces_of_text_are_the_text_and_never_half_a_character(text, size):
    ids = list(text.encode())
    detokenizer = Detokenizer(Bytes())
    pieces = [detokenizer.add(ids[i : i + size]) for i in range(0, len(ids), size)]
    assert all("\ufffd" not in piece for piece in pieces)
    assert "".join(pieces) + detokenizer.add([], final=True) == text


def test_an_answer_that_ends_within_a_character_says_so():
    detokenizer = Detokenizer(Bytes())
    assert detokenizer.add([0xE6]) == ""
    assert detokenizer.add([], final=True) == "\ufffd"


@pytest.mark.parametrize("empty", [[], [1], [0, 2]])
def test_the_space_in_front_of_a_word_stays(empty):
    """SentencePiece's decoder drops it at the beginning of what it is given."""
    vocabulary = {"<unk>": 0, "▁The": 1, "▁sum": 2, "▁is": 3, "▁four": 4}
    tokenizer = Tokenizer(WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = Metaspace(), MetaspaceDecoder()
    detokenizer = Detokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer), prompt_ids=[1])
    text = ""
    for n, token in enumerate([2, 3, 4]):
        text += detokenizer.add([]) if n in empty else ""  # a piece without a token: the base falls back
        text += detokenizer.add([token])
    assert text + detokenizer.add([], final=True) == " sum is four"


def test_a_prompt_that_is_cut_within_a_character_spoils_nothing():
    """As tokenizers that spell what they do not know as bytes decode them: a broken run of bytes is lost whole."""

    class WholeRuns(Bytes):
        def decode(self, ids, **_):
            try:
                return bytes(ids).decode()
            except UnicodeDecodeError:
                return "\ufffd" * len(ids)

    detokenizer = Detokenizer(WholeRuns(), prompt_ids=list("a🤗🤗".encode()))
    assert "".join(detokenizer.add([byte]) for byte in "你好ab".encode()) == "你好ab"


@pytest.mark.parametrize("stops", [["END"], ["ND", "END"], ["\n\n"], ["a", "END"], ["aab"]])
@pytest.mark.parametrize("text", ["some text END more", "no stop here", "E EN END", "x\n\ny", "aaab", "aaaab"])
@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_stop_strings_cut_at_the_first_one_in_pieces_of_any_size(stops, text, size):
    stopper = StopStrings(stops)
    shown = "".join(stopper.add(text[i : i + size]) for i in range(0, len(text), size)) + stopper.add("", final=True)
    # The first stop string to be complete ends the answer; pieces of one character make that unambiguous.
    found = [text.find(s) for s in stops if s in text]
    if size == 1 and found:
        ends = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
        assert shown == text[: min(at for end, at in ends if end == min(ends)[0])]
    else:
        assert shown == (text[: min(found)] if found else text)
    assert (stopper.stopped is not None) == bool(found)


def test_the_breaker_opens_tries_once_and_closes():
    now = [0.0]
    breaker = CircuitBreaker(failures=2, cooldown=10, longest=30, clock=lambda: now[0])
    breaker.failure()
    assert breaker.allow()
    breaker.failure()
    assert not breaker.allow()
    breaker.failure()  # asked before it opened: no reason to wait longer
    now[0] = 10.0
    assert breaker.allow()
    assert not breaker.allow()  # one trial at a time
    breaker.failure()
    now[0] = 29.0
    assert not breaker.allow()  # twice as long
    now[0] = 30.0
    assert breaker.allow()
    breaker.success()
    assert breaker.allow()
    assert not breaker.is_open


def test_a_trial_whose_client_left_does_not_block_the_next():
    now = [0.0]
    breaker = CircuitBreaker(failures=1, cooldown=1, trial_time=5, clock=lambda: now[0])
    breaker.failure()
    now[0] = 1.0
    assert breaker.allow()
    now[0] = 6.0
    assert breaker.allow()
