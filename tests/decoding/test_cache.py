"""The reader against the plain, cache-free forward: any order of chunks, roll-backs and finished rows."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from collm.decoding.cache import Reader, StatefulReader, can_roll_back, reader_for
from tests.conftest import ARCHITECTURES, VOCAB_SIZE, tiny_model


@torch.no_grad()
def expected(model, tokens: list[int], keep: int) -> torch.Tensor:
    return model(torch.tensor([tokens]), use_cache=False).logits[0, -keep:]


def check(model, reader, texts: dict[int, list[int]], rows: list[int], chunks: list[list[int]], keep: int) -> None:
    with torch.no_grad():
        reading = reader.read(rows, chunks, keep)
    for i, (row, chunk) in enumerate(zip(rows, chunks, strict=True)):
        texts[row] = texts.get(row, []) + chunk
        known = min(keep, len(chunk))
        torch.testing.assert_close(reading.logits[i, -known:], expected(model, texts[row], known), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_chunks_and_roll_backs_of_ragged_rows_equal_the_plain_forward(architecture):
    model = tiny_model(architecture)
    dice = random.Random(architecture)
    reader = reader_for(model, columns=20)
    texts: dict[int, list[int]] = {}
    alive = list(range(5))
    for turn in range(24):
        rows = sorted(dice.sample(alive, dice.randint(1, len(alive)))) if turn % 3 else alive
        one = turn % 4 == 0  # sometimes one token for every row: the plain loop's pattern
        chunks = [
            dice.choices(range(3, VOCAB_SIZE), k=1 if one and row in texts else dice.randint(1, 12)) for row in rows
        ]
        check(model, reader, texts, rows, chunks, keep=dice.randint(1, 4))
        for row in dice.sample(sorted(texts), len(texts) // 2):
            kept = max(1, len(texts[row]) - dice.randint(0, 3))
            texts[row] = texts[row][:kept]
            reader.roll_back(row, kept)
        if turn in (10, 17):
            gone = alive.pop(dice.randrange(len(alive)))
            texts.pop(gone, None)
            reader.drop(gone)
    assert {row: len(text) for row, text in texts.items()} == reader.length


def test_rows_in_lockstep_are_read_in_place():
    model = tiny_model()
    reader = Reader(model, columns=32)
    reader.read([0, 1, 2], [[5, 6, 7], [8, 9], [10]])
    buffer = reader._cache.layers[0].keys.data_ptr()
    for token in range(3, 20):
        reader.read([0, 1, 2], [[token], [token + 1], [token + 2]])
        assert reader._cache.plan.end == 3 + token - 2
    assert reader._cache.layers[0].keys.data_ptr() == buffer


def test_buffer_grows_beyond_the_expected_length():
    model = tiny_model()
    reader, texts = Reader(model, columns=4), {}
    for _ in range(6):
        check(model, reader, texts, [0, 1], [[5, 6, 7, 8], [9, 10, 11, 12]], keep=2)


def test_the_buffers_go_with_the_last_row():
    model = tiny_model()
    reader, texts = Reader(model, columns=0), {}
    check(model, reader, texts, [0, 1], [[5] * 40, [6] * 35], keep=1)
    reader.drop(0)
    check(model, reader, texts, [1], [[7]], keep=1)
    reader.drop(1)
    assert (reader._cache.layers, reader._cache.columns) == ([], 0)
    check(model, reader, {}, [2], [[8, 9]], keep=1)


def test_a_row_that_is_gone_leaves_no_columns_to_new_ones():
    model = tiny_model()
    reader, texts = Reader(model, columns=0), {}
    check(model, reader, texts, [0], [list(range(3, 60)) * 3], keep=1)
    check(model, reader, texts, [0, 1], [[5], [6, 7, 8]], keep=1)  # row 1 ends where row 0 does
    assert reader._cache.columns >= 172
    reader.drop(0)
    check(model, reader, texts, [2, 1, 3], [[9, 10], [11], [12, 13, 14]], keep=1)
    assert reader._cache.columns < 80
    for token in range(3, 9):
        check(model, reader, texts, [1, 2, 3], [[token], [token + 1], [token + 2]], keep=1)


def test_no_columns_are_reserved_beyond_the_models_length():
    model = tiny_model()  # 256 positions
    reader, texts = Reader(model, columns=0), {}
    for size in (150, 100, 6):
        check(model, reader, texts, [0], [[5] * size], keep=1)
    assert reader._cache.columns == 256


def test_a_row_begins_in_front_of_one_that_fills_its_columns():
    model = tiny_model()
    reader, texts = Reader(model, columns=8), {}
    check(model, reader, texts, [0], [[5] * 8], keep=1)
    check(model, reader, texts, [1, 0], [[6], [7]], keep=1)
    check(model, reader, texts, [1, 0], [[8], [9]], keep=1)


def test_a_prompt_does_not_make_short_chunks_wait():
    model = tiny_model()
    reader, texts = Reader(model, columns=128), {}
    check(model, reader, texts, [0], [[5] * 40], keep=1)
    check(model, reader, texts, [0, 1, 2], [[6], list(range(3, 63)), [7, 8]], keep=2)
    assert reader.calls == 1 + 2
    assert reader.padding == 0 + 1 or reader.padding == 60 - 1 - 2  # never the short chunk padded to the prompt
    assert reader.tokens == 40 + 1 + 60 + 2


STATEFUL = {
    "mamba": {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "expand": 2},
    "qwen3_next": {
        "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "intermediate_size": 32, "moe_intermediate_size": 16, "num_experts": 2, "num_experts_per_tok": 1,
        "shared_expert_intermediate_size": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "decoder_sparse_step": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("architecture", STATEFUL)
@pytest.mark.filterwarnings("ignore")  # these models warn about kernels that are not installed
def test_recurrent_models_are_read_row_by_row_without_roll_back(architecture):
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, vocab_size=VOCAB_SIZE, **STATEFUL[architecture])
    model = AutoModelForCausalLM.from_config(config).eval()
    assert not can_roll_back(model)
    reader, texts = reader_for(model, columns=16), {}
    assert isinstance(reader, StatefulReader)
    check(model, reader, texts, [0, 1], [[5, 6, 7], [8, 9]], keep=1)
    check(model, reader, texts, [1], [[4, 3, 10]], keep=3)
    check(model, reader, texts, [0, 1], [[11], [12, 13]], keep=1)
