"""A model together with what it has read of each row, so that no token is read twice.

A [`Reader`] keeps one buffer per layer, `(slots, columns, heads * dim)`, for all rows. Rows advance and roll back one
by one, so each has a start and an end of its own in its slot:

    slot 0   . . P P P P t t t      P prompt, t later tokens
    slot 1   P P P P P P t          roll-back is moving the end to the left

A forward always sees its rows right-aligned, `[padding | past | chunk]`: only left padding is ever masked, which is
what attention back ends expect, and the past is adjacent to the chunk, which sliding windows need (they count cache
columns). Where all rows of the buffer take part and end in the same column, that is a view of the buffer; else it is
gathered.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

GROWTH = 1.5  # a full buffer grows to this multiple of what is needed
# Tokens of padding of a row that cost about what reading the weights once more does: more on devices that are fast at
# arithmetic.
CHEAP_PADDING = {"cpu": 16, "cuda": 256}


class Reading(NamedTuple):
    """What a model says after a chunk, for the last `keep` positions of each row (right-aligned).

    logits: `(rows, keep, vocabulary)`. deferral_logits: `(rows, keep, K)` float32, `None` without a deferral head.
    """

    logits: Tensor
    deferral_logits: Tensor | None


@dataclass
class _Plan:
    """Where one forward finds the past of its rows and where the new keys and values go."""

    past: int  # columns before the chunk
    total: int  # columns with it
    end: int | None = None  # in place: the column after the chunk, the same in every row of the buffer
    home: Tensor | None = None  # (tokens,) else: flat index in the buffer of each new token
    real: Tensor | None = None  # (tokens,) flat index of each new token in the rectangle of chunks; None: no padding
    source: Tensor | None = None  # (rows, total) flat index in the buffer of what the forward sees


class _Layer(CacheLayerMixin):
    """Keys and values of one layer. All of the bookkeeping is the plan's."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError("the buffers are made by RowCache.update")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        raise NotImplementedError("the plan of RowCache knows")

    get_seq_length = get_max_length = lazy_initialization  # type: ignore[assignment]

    def reserve(self, slots: int, columns: int) -> None:
        self.keys, self.values = (F.pad(b, (0, 0, 0, columns - b.shape[1], 0, slots - b.shape[0])) for b in self.both())

    def both(self) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = self.both()
        return _store(keys, key_states, args[0]), _store(values, value_states, args[0])


def _store(buffer: Tensor, states: Tensor, plan: _Plan) -> Tensor:
    """Write `states` `(rows, heads, chunk, dim)` into the buffer and return what the forward sees, past and chunk."""
    rows, heads, chunk, dim = states.shape
    new = states.transpose(1, 2).reshape(rows, chunk, heads * dim)
    if plan.end is not None:
        buffer[:rows, plan.end - chunk : plan.end] = new
        seen = buffer[:rows, plan.end - plan.total : plan.end]
    else:
        assert plan.home is not None
        assert plan.source is not None
        flat, new = buffer.view(-1, heads * dim), new.flatten(0, 1)
        new = new if plan.real is None else new[plan.real.to(buffer.device)]
        flat.index_copy_(0, plan.home.to(buffer.device), new.to(buffer.dtype))
        seen = flat[plan.source.to(buffer.device)]
    return seen.unflatten(-1, (heads, dim)).transpose(1, 2)


class RowCache(Cache):
    """The buffers of all layers, as a cache of transformers. Layers of every kind keep the whole past (a sliding window
    is applied by the mask), because a window that has moved on cannot be rolled back."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=_Layer)
        self.plan = _Plan(past=0, total=0)
        self.slots = self.columns = 0

    def reserve(self, slots: int, columns: int) -> None:
        """Make room for `slots` rows of `columns` tokens, and for no more."""
        self.slots, self.columns = slots, columns
        for layer in self.layers:
            layer.reserve(slots, columns)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        while len(self.layers) <= layer_idx:
            self.layers.append(_Layer())
        layer = self.layers[layer_idx]
        if layer.keys is None:  # zeros, not empty: masked columns still meet a weight of zero, which NaN would survive
            layer.keys, layer.values = (
                states.new_zeros(self.slots, self.columns, states.shape[1] * states.shape[3])
                for states in (key_states, value_states)
            )
        return layer.update(key_states, value_states, self.plan)

    def move(self, source: Tensor) -> None:
        """Put `source` `(rows, columns)`, flat indices, at the beginning of the buffers."""
        for layer in self.layers:
            for buffer in layer.both():
                moved = buffer.view(-1, buffer.shape[-1])[source.to(buffer.device)]
                buffer[: source.shape[0], : source.shape[1]] = moved

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.plan.past

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.plan.past + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1


class Reader:
    """A causal language model that reads rows of tokens in chunks, each token once.

    Args:
        model ([`~transformers.PreTrainedModel`]): any decoder-only model whose cache holds keys and values.
        columns (`int`): tokens that a row is expected to have in the end; the buffer grows beyond if need be.

    Attributes:
        length (`dict[int, int]`): tokens read so far of each row.
        calls, tokens, padding, discarded (`int`): forwards, tokens read, padding read along, tokens rolled back.
    """

    can_roll_back = True

    def __init__(self, model: PreTrainedModel, columns: int) -> None:
        self.model, self.columns = model, columns
        self.device = model.get_input_embeddings().weight.device
        self._padding = CHEAP_PADDING.get(self.device.type, CHEAP_PADDING["cuda"])
        self.max_length = maximum_length(model)
        arguments = inspect.signature(architecture_of(model).forward).parameters
        self._takes_positions = "position_ids" in arguments
        self._takes_keep = "logits_to_keep" in arguments
        self.length: dict[int, int] = {}
        self.calls = self.tokens = self.padding = self.discarded = 0
        self._start_cache()

    def _start_cache(self) -> None:
        self._cache = RowCache()
        self._slot: dict[int, int] = {}
        self._end: dict[int, int] = {}

    def read(self, rows: Sequence[int], chunks: Sequence[list[int]], keep: int = 1) -> Reading:
        """Read one chunk of each row.

        Args:
            rows (`list[int]`): names of the rows; a new one begins here, and its chunk with its prompt.
            chunks (`list[list[int]]`): tokens that follow what has been read of each row, at least one.
            keep (`int`, *optional*, defaults to 1): how many of the last positions to return.

        Where a forward fails, its error is raised, and `length` says how far each row was read by then; rows that the
        failure has spoilt are forgotten.
        """
        groups = _groups([len(chunk) for chunk in chunks], self._padding)
        readings = [self._forward([rows[i] for i in g], [chunks[i] for i in g], keep) for g in groups]
        if len(groups) == 1:
            return readings[0]
        order = torch.tensor([i for group in groups for i in group]).argsort()
        return _joined(readings, lambda pieces: _stack(pieces)[order.to(pieces[0].device)])

    def roll_back(self, row: int, length: int) -> None:
        """Forget all but the first `length` tokens of the row."""
        excess = self.length.get(row, 0) - length
        if excess > 0:
            self.length[row] = length
            self._end[row] -= excess
            self.discarded += excess

    def drop(self, row: int) -> None:
        """The row is finished: its slot is free, and behind the last row the buffers are."""
        for table in (self.length, self._slot, self._end):
            table.pop(row, None)
        if not self._slot:
            self._start_cache()

    def _forward(self, rows: list[int], chunks: list[list[int]], keep: int) -> Reading:
        sizes = [len(chunk) for chunk in chunks]
        width = max(sizes)
        for row in rows:
            self.length.setdefault(row, 0)
        try:
            self._cache.plan = plan = self._plan(rows, sizes)
        except Exception:  # out of memory: the layers may differ in size, or in where rows lie
            self._start_cache()
            self.length.clear()
            raise
        ends = [self.length[row] + size for row, size in zip(rows, sizes, strict=True)]
        arguments: dict[str, Any] = {}
        if min(ends) < plan.total:
            padding = torch.tensor([plan.total - end for end in ends], device=self.device)
            arguments["attention_mask"] = (torch.arange(plan.total, device=self.device) >= padding[:, None]).long()
        if self._takes_positions:
            arguments["position_ids"] = torch.tensor(
                [range(end - width, end) for end in ends], device=self.device
            ).clamp_(min=0)
        if self._takes_keep:
            arguments["logits_to_keep"] = min(keep, width)
        ids = torch.tensor([[0] * (width - len(chunk)) + chunk for chunk in chunks], device=self.device)
        output = self.model(input_ids=ids, past_key_values=self._cache, use_cache=True, return_dict=True, **arguments)
        for row, size in zip(rows, sizes, strict=True):
            self.length[row] += size
            self._end[row] += size
        self.calls += 1
        self.tokens += sum(sizes)
        self.padding += width * len(rows) - sum(sizes)
        return _last(output, keep)

    def _plan(self, rows: list[int], sizes: list[int]) -> _Plan:
        width = max(sizes)
        total = max(self.length[row] + size for row, size in zip(rows, sizes, strict=True))
        new = [(row, size) for row, size in zip(rows, sizes, strict=True) if row not in self._slot]
        if len(self._slot) + len(new) > self._cache.slots:
            self._add_slots(len(new), total)
        for row, size in new:  # rows that begin together end in one column
            self._slot[row], self._end[row] = self._free_slot(), total - size
        in_place = len(self._slot) == len(rows) and min(sizes) == width  # nobody else is in the buffer
        if in_place and not self._aligned(rows):
            self._align(rows)
        ends = [self._end[row] + size for row, size in zip(rows, sizes, strict=True)]
        if max(ends) > self._cache.columns:
            self._cache.reserve(self._cache.slots, self._room(max(ends)))
        if in_place:
            return _Plan(past=total - width, total=total, end=ends[0])
        source = self._source(rows, ends, total)
        chunk = torch.arange(width) >= width - torch.tensor(sizes).unsqueeze(1)
        real = None if min(sizes) == width else chunk.flatten().nonzero().squeeze(1)
        home = source[:, total - width :][chunk]
        home, source = home.to(self.device), source.to(self.device)  # once, not in every layer
        real = None if real is None else real.to(self.device)
        return _Plan(total - width, total, home=home, real=real, source=source)

    def _add_slots(self, count: int, total: int) -> None:
        """Room for more rows, with no more columns than are needed now: the longest row may be gone."""
        columns = self._room(max(total, *self.length.values()))
        if columns < self._cache.columns:
            self._align(list(self._slot))
        self._cache.reserve(len(self._slot) + count, min(columns, self._cache.columns))

    def _room(self, columns: int) -> int:
        """What to reserve where so many columns are needed: more, but not more than a row will have."""
        limits = [limit for limit in (self.columns, self.max_length or 0) if limit >= columns]
        return min([int(columns * GROWTH) + 64, *limits])

    def _free_slot(self) -> int:
        taken = set(self._slot.values())
        return next(slot for slot in range(len(taken) + 1) if slot not in taken)

    def _aligned(self, rows: list[int]) -> bool:
        """Whether the rows lie in the first slots, in their order, and end in one column."""
        return all(self._slot[row] == i and self._end[row] == self._end[rows[0]] for i, row in enumerate(rows))

    def _align(self, rows: list[int]) -> None:
        """Move all rows of the buffer into the first slots, so that they end in one column."""
        length = max(self.length[row] for row in rows)
        self._cache.move(self._source(rows, [self._end[row] for row in rows], length).to(self.device))
        self._slot = {row: i for i, row in enumerate(rows)}
        self._end = dict.fromkeys(rows, length)

    def _source(self, rows: list[int], ends: list[int], width: int) -> Tensor:
        """`(rows, width)` flat indices of the columns before `ends`; padding repeats the row's first token."""
        first = torch.tensor([[self._end[row] - self.length[row]] for row in rows])
        offset = torch.tensor([[self._slot[row] * self._cache.columns] for row in rows])
        column = (torch.arange(-width, 0) + torch.tensor(ends).unsqueeze(1)).maximum(first)
        return column.clamp(max=self._cache.columns - 1) + offset  # a row without tokens may begin behind the last one


class StatefulReader(Reader):
    """A model with a recurrent state (Mamba, linear attention, hybrids): it cannot roll back and must not see padding.

    Reads one row at a time with the model's own cache, and after the prompt one token at a time, because most of these
    models can carry their state on by one token only. Exact, and slow: no batching, no speculation.
    """

    can_roll_back = False

    def _start_cache(self) -> None:
        self._caches: dict[int, Any] = {}
        named = inspect.signature(architecture_of(self.model).forward).parameters
        self._cache_name = next(name for name in ("past_key_values", "cache_params", "state") if name in named)

    def read(self, rows: Sequence[int], chunks: Sequence[list[int]], keep: int = 1) -> Reading:
        readings = [self._read_row(row, chunk, keep) for row, chunk in zip(rows, chunks, strict=True)]
        return _joined(readings, _stack)

    def roll_back(self, row: int, length: int) -> None:
        assert self.length.get(row, 0) <= length, "a recurrent state cannot be rolled back"

    def drop(self, row: int) -> None:
        self.length.pop(row, None)
        self._caches.pop(row, None)

    def _read_row(self, row: int, chunk: list[int], keep: int) -> Reading:
        begun = row in self.length
        pieces = [[token] for token in chunk] if begun else [chunk]
        readings = [self._forward([row], [piece], keep) for piece in pieces]
        return _joined(readings, lambda pieces: torch.cat(pieces, dim=1)[:, -keep:])

    def _forward(self, rows: list[int], chunks: list[list[int]], keep: int) -> Reading:
        (row,), (chunk,) = rows, chunks
        # Taken out until the forward has succeeded: one that fails leaves the state half changed.
        before, cache = self.length.pop(row, 0), self._caches.pop(row, None)
        arguments: dict[str, Any] = {self._cache_name: cache, "use_cache": True, "return_dict": True}
        if self._takes_positions:
            arguments["position_ids"] = torch.arange(before, before + len(chunk), device=self.device).unsqueeze(0)
        output = self.model(input_ids=torch.tensor([chunk], device=self.device), **arguments)
        self._caches[row] = output[self._cache_name]
        self.length[row] = before + len(chunk)
        self.calls += 1
        self.tokens += len(chunk)
        return _last(output, keep)


def reader_for(model: PreTrainedModel, columns: int) -> Reader:
    """A [`Reader`] of the kind that the model's cache allows."""
    return (Reader if can_roll_back(model) else StatefulReader)(model, columns)


def can_roll_back(model: PreTrainedModel) -> bool:
    """Whether the model's past is keys and values alone, so that its last tokens can be forgotten."""
    model = architecture_of(model)
    if getattr(model, "_is_stateful", False):
        return False
    return all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in DynamicCache(config=model.config).layers
    )


def maximum_length(model: PreTrainedModel) -> int | None:
    """Tokens that the model can read at most, by its configuration; `None` where it names no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def architecture_of(model: Any) -> PreTrainedModel:
    """The transformers model inside of a PEFT wrapper."""
    return model if isinstance(model, PreTrainedModel) else model.get_base_model()


def _groups(sizes: list[int], padding: int) -> list[list[int]]:
    """Indices of chunks to read in one forward: none is padded by more than `padding` tokens."""
    groups: list[list[int]] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        if groups and sizes[groups[-1][0]] - sizes[i] <= padding:
            groups[-1].append(i)
        else:
            groups.append([i])
    return [sorted(group) for group in groups]


def _last(output: Any, keep: int) -> Reading:
    deferral = output.get("deferral_logits")
    return Reading(output.logits[:, -keep:], None if deferral is None else deferral[:, -keep:])


def _joined(readings: list[Reading], join: Callable[[list[Tensor]], Tensor]) -> Reading:
    deferral = [r.deferral_logits for r in readings if r.deferral_logits is not None]
    return Reading(join([r.logits for r in readings]), join(deferral) if deferral else None)


def _stack(pieces: list[Tensor]) -> Tensor:
    """Concatenate rows of which the shorter ones know fewer positions; those that are missing are never asked for."""
    width = max(piece.shape[1] for piece in pieces)
    return torch.cat([F.pad(piece, (0, 0, width - piece.shape[1], 0)) for piece in pieces])
