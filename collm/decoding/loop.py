"""The decoding loop: a base and its assistants write rows of text together, each reading every token at most once.

There is one loop. With `gate=None` it is the plain loop: a deferred token is asked for at once. With a
[`~collm.decoding.speculation.DraftGate`] the base's own choice stands in for the deferred token and the base drafts on;
when an assistant is asked at last, it verifies everything that waits in one pass. Because every choice is a function of
the distribution, the row and the step (`sampling.py`), both return the same tokens, greedy or sampled.
"""

from __future__ import annotations

import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LogitsProcessorList
from transformers.generation import PrefixConstrainedLogitsProcessor

from collm.errors import AssistantError
from collm.losses import deferral_probabilities

from .cache import Reader
from .combiners import CombiningContext, ResolvedCombiner
from .routers import Router, RoutingContext, route
from .sampling import ROUTER, TOKEN, gumbel, noise_key, uniform
from .speculation import DraftGate, Lookup, ReadAhead

BASE = 0
# Of a batch's rows, how many must be blocked before their assistants are asked: one pass costs hardly more for several.
ASK_SHARE = 0.5


@dataclass
class Waiting:
    """A deferred token whose assistant has not been asked yet.

    step: index among the row's new tokens. writer: the assistant, from 1. base_logits: `(vocabulary,)`.
    deferral_prob: d_t. probability: the base's probability of its stand-in.
    """

    step: int
    writer: int
    base_logits: Tensor
    deferral_prob: float
    probability: float = 0.0


@dataclass
class Row:
    """One text. `tokens` holds what is decided and, behind the first `waiting` step, what is only drafted."""

    index: int
    tokens: list[int] = field(default_factory=list)
    source: list[int] = field(default_factory=list)
    raw: dict[int, Tensor] = field(default_factory=dict)  # step -> scores of whoever writes, if they are asked for
    processed: dict[int, Tensor] = field(default_factory=dict)
    deferral_probs: list[float] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)  # the router's memory after each step
    waiting: list[Waiting] = field(default_factory=list)
    survival: float = 1.0  # probability that all stand-ins are right
    ahead: dict[int, tuple[int, Tensor]] = field(default_factory=dict)  # reader -> (step, its logits there)
    lookup: Lookup | None = None  # where its tokens occurred before
    decided: int = 0
    done: bool = False
    unavailable: set[int] = field(default_factory=set)  # assistants that this row must do without
    fell_back_at: int | None = None

    @property
    def limit(self) -> int:
        """How many tokens nothing waits in front of."""
        return self.waiting[0].step if self.waiting else len(self.tokens)


@dataclass
class Ending:
    """When a row is finished. criteria: those of transformers besides the end of sequence and the length."""

    max_steps: int
    eos: frozenset[int]
    pad: int
    criteria: Any = ()


@dataclass
class Choice:
    """How a token is chosen from scores. processors: transformers' logits processors and warpers."""

    sample: bool
    seed: int
    processors: Any = ()
    whole_batch: bool = False  # processors that look at the row's index must see all rows

    def __call__(
        self, rows: list[Row], steps: list[int], logits: Tensor, view: Callable[[int], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Tokens `(n,)` and processed scores `(n, vocabulary)` of `n` positions; `view(step)` is `input_ids` then."""
        scores = logits
        if self.processors:
            scores = torch.empty_like(logits, dtype=torch.float32)
            by_step = sorted(range(len(rows)), key=lambda i: steps[i])
            for step, group in groupby(by_step, key=lambda i: steps[i]):
                picked = list(group)
                scores[picked] = self._process([rows[i].index for i in picked], view(step), logits[picked].float())
        if not self.sample:
            return scores.argmax(dim=-1), scores
        keys = [noise_key(self.seed, row.index, step, TOKEN) for row, step in zip(rows, steps, strict=True)]
        return (scores.double() + gumbel(keys, scores.shape[-1], scores.device)).argmax(dim=-1), scores

    def _process(self, indices: list[int], input_ids: Tensor, logits: Tensor) -> Tensor:
        if not self.whole_batch:
            return self.processors(input_ids[indices], logits)
        everything = logits.new_zeros(input_ids.shape[0], logits.shape[-1])
        everything[indices] = logits
        processors = LogitsProcessorList(_asked_about(indices, processor) for processor in self.processors)
        return processors(input_ids, everything)[indices]


class Decoder:
    """Base, assistants and rows of one call of `generate`, and the loop over them.

    Args:
        readers (`list[Reader]`): the base, the K assistants, then the further models of the combiner.
        prompts (`list[list[list[int]]]`): prompt tokens by reader and row.
        input_ids (`torch.Tensor` of shape `(rows, prompt)`): the prompts as the user gave them, for logits processors
            and stopping criteria, which see a rectangle.
        num_assistants (`int`): K.
        router, combiner, threshold: who writes and what is written; see `routers.py` and `combiners.py`.
        choice ([`Choice`]), ending ([`Ending`]): how a token is chosen, when a row is finished.
        gate ([`DraftGate`], *optional*): how far to draft; `None` is the plain loop.
        streamer (*optional*): called with each decided column of tokens and of sources.
        keep_scores (`bool`): whether to keep the scores of whoever writes, for `output_scores` and `output_logits`.
        fall_back (`bool`): go on with the base alone where an assistant fails, instead of raising.
    """

    def __init__(
        self,
        readers: list[Reader],
        prompts: list[list[list[int]]],
        input_ids: Tensor,
        *,
        num_assistants: int,
        router: Router,
        combiner: ResolvedCombiner,
        threshold: float | Sequence[float],
        choice: Choice,
        ending: Ending,
        gate: DraftGate | None = None,
        streamer: Callable[[Tensor, Tensor], None] | None = None,
        keep_scores: bool = False,
        fall_back: bool = False,
    ) -> None:
        self.readers, self.prompts, self.num_assistants = readers, prompts, num_assistants
        self.router, self.combiner, self.threshold = router, combiner, threshold
        self.choice, self.ending, self.gate = choice, ending, gate
        self.read_ahead = None if gate is None else ReadAhead()
        self.streamer, self.keep_scores, self.fall_back = streamer, keep_scores, fall_back
        self.rows = [Row(index) for index in range(len(input_ids))]
        self.extra = dict(zip(combiner.models, range(num_assistants + 1, len(readers)), strict=True))
        self.device, self.prompt_width = input_ids.device, input_ids.shape[1]
        self.input_ids = input_ids  # with the new tokens, as far as anything wants to see them
        self.needs_view = bool(choice.processors or ending.criteria)
        self.counts: Counter[str] = Counter()
        self.deferred, self.streamed = [0] * (num_assistants + 1), 0

    def run(self) -> None:
        """Write all rows to their end.

        1. The base reads what it has not read of every row that may go on, and says what comes next.
        2. The router says who writes it. The base's tokens are written at once; a token of an assistant waits, and with
           a gate the base's own choice stands in for it.
        3. Where half of the rows may not go on, the assistants read what they missed of every row that waits, in one
           chunk each.
        4. The first stand-in that its assistant does not choose is overwritten, what was drafted behind it discarded.
        5. Tokens that nothing waits in front of are decided: checked for an end, streamed. Finished rows leave.
        """
        while live := [row for row in self.rows if not row.done]:
            # 1. and 2.
            if ready := [row for row in live if not self.is_blocked(row)]:
                self.base_step(ready)
            # 3. and 4.
            waiting = [row for row in live if row.waiting]
            blocked = sum(map(self.is_blocked, waiting))
            if blocked and (blocked >= ASK_SHARE * len(live) or all(map(self.is_blocked, live))):
                self.verify(waiting)
            # 5.
            self.decide(live)

    # -- 1. and 2.: the base ---------------------------------------------------------------------------------------

    def base_step(self, rows: list[Row]) -> None:
        """One forward of the base, and the tokens that each row gains by it: one, and more where a guess was right."""
        sources, guesses = self.guess(rows)
        chunks = [self.unread(BASE, row) + guess for row, guess in zip(rows, guesses, strict=True)]
        reading = self.readers[BASE].read([row.index for row in rows], chunks, 1 + max(map(len, guesses)))
        assert reading.deferral_logits is not None
        all_logits, all_deferral = reading.logits.to(self.device), reading.deferral_logits.to(self.device)
        going = list(range(len(rows)))
        for depth in range(1 + max(map(len, guesses))):
            if any(guesses):
                column = [depth - len(guesses[i]) - 1 for i in going]
                logits, deferral = all_logits[going, column], all_deferral[going, column]
            else:
                logits, deferral = all_logits[:, -1], all_deferral[:, -1]
            self.route_and_write([rows[i] for i in going], logits, deferral)
            guessed = [i for i in going if depth < len(guesses[i])]
            right = [i for i in guessed if rows[i].tokens[-1:] == guesses[i][depth : depth + 1]]
            if depth == 0 and self.read_ahead is not None:
                for i in guessed:
                    self.read_ahead.record(sources[i], i in right)
            self.counts["guesses_right"] += len(right)
            if self.gate is not None:
                self.gate.saved += len(right)
            going = [i for i in right if not self.is_blocked(rows[i])]
            if not going:
                break
        self.counts["guesses"] += sum(map(len, guesses))
        if self.gate is not None:
            self.gate.steps += len(rows)
        for row, guess in zip(rows, guesses, strict=True):
            if guess:
                self.forget(BASE, row, len(row.tokens) - 1)

    def guess(self, rows: list[Row]) -> tuple[list[int], list[list[int]]]:
        """For each row, the source of a guess and the tokens for the base to read along."""
        count = 0 if self.read_ahead is None else self.read_ahead.budget(len(rows))
        if self.read_ahead is None or count == 0:
            return [0] * len(rows), [[] for _ in rows]
        heard = {
            row.index: (row, logits)
            for row in rows
            for reader, (step, logits) in row.ahead.items()
            if step == len(row.tokens) and reader <= self.num_assistants
        }
        expected: dict[int, int] = {}
        if heard:
            asked = [row for row, _ in heard.values()]
            logits = torch.stack([logits for _, logits in heard.values()])
            tokens, _ = self.choose(asked, [len(row.tokens) for row in asked], logits)
            expected = {row.index: token for row, token in zip(asked, tokens.tolist(), strict=True)}
        guesses = []
        for row in rows:
            row.lookup = row.lookup or Lookup(self.prompts[BASE][row.index])
            room = min(count, self.ending.max_steps - len(row.tokens) - 1)
            guesses.append(self.read_ahead.propose(row.lookup, row.tokens, expected.get(row.index), room))
        return [source for source, _ in guesses], [guess for _, guess in guesses]

    def route_and_write(self, rows: list[Row], logits: Tensor, deferral_logits: Tensor) -> None:
        """Route the next token of each row and write it, or let it wait.

        logits: `(rows, vocabulary)`. deferral_logits: `(rows, K)`.
        """
        steps = [len(row.tokens) for row in rows]
        threshold: float | Tensor
        if isinstance(self.threshold, Sequence):  # one for each row
            threshold = torch.tensor([self.threshold[row.index] for row in rows], device=logits.device)
        else:
            threshold = self.threshold
        context = RoutingContext(
            writer_probs=deferral_probabilities(deferral_logits),
            threshold=threshold,
            base_logits=logits,
            step=torch.tensor(steps, device=logits.device),
            uniform=torch.tensor(
                [uniform(self.choice.seed, row.index, step, ROUTER) for row, step in zip(rows, steps, strict=True)],
                dtype=torch.float64,
                device=logits.device,
            ),
            state=_previous_states(rows, steps, logits.device),
        )
        routed, state = route(self.router, context)
        writers, deferral_probs = torch.stack([routed.double(), context.deferral_probs.double()]).tolist()
        for i, row in enumerate(rows):
            row.deferral_probs.append(deferral_probs[i])
            if state is not None:
                row.states.append(state[i])
        writer = [self.available(row, step, int(k)) for row, step, k in zip(rows, steps, writers, strict=True)]

        # Without a gate nothing stands in, and processors see each position once.
        chosen = [i for i in range(len(rows)) if self.gate is not None or writer[i] == BASE]
        known: list[tuple[Row, Waiting]] = []
        if chosen:
            picked = logits if len(chosen) == len(rows) else logits[chosen]
            tokens, scores = self.choose([rows[i] for i in chosen], [steps[i] for i in chosen], picked)
            probability = [0.0] * len(chosen) if self.gate is None else _probability(scores, tokens).tolist()
            for i, token, p, raw, processed in zip(chosen, tokens.tolist(), probability, picked, scores, strict=True):
                self.write(rows[i], token, writer[i], raw, processed)
                if writer[i] != BASE:
                    self.wait(rows[i], Waiting(steps[i], writer[i], logits[i], deferral_probs[i], p), known)
        for i in range(len(rows)):
            if self.gate is None and writer[i] != BASE:
                self.wait(rows[i], Waiting(steps[i], writer[i], logits[i], deferral_probs[i]), known)
        if known:
            self.settle(known, {(row.index, w.step, i): row.ahead[i][1] for row, w in known for i in self.asked(w)})

    def wait(self, row: Row, waiting: Waiting, known: list[tuple[Row, Waiting]]) -> None:
        """Let a deferred token wait, unless its assistant has already said what it would write there."""
        self.counts["deferred_drafts"] += 1
        row.waiting.append(waiting)
        if self.gate is not None:
            row.survival *= self.gate.acceptance(waiting.probability)
        if len(row.waiting) == 1 and all(row.ahead.get(i, (None,))[0] == waiting.step for i in self.asked(waiting)):
            known.append((row, waiting))

    # -- 3. and 4.: the assistants ---------------------------------------------------------------------------------

    def verify(self, rows: list[Row]) -> None:
        """Ask every assistant that a row waits for, and settle what waits."""
        logits: dict[tuple[int, int, int], Tensor] = {}
        for reader in range(1, len(self.readers)):
            first = {row.index: self.first_wait(reader, row) for row in rows}
            needing = [row for row in rows if first[row.index] is not None and self.has_room(reader, row)]
            if needing:
                logits.update(self.catch_up(reader, needing))
        self.settle([(row, waiting) for row in rows for waiting in row.waiting], logits)

    def catch_up(self, reader: int, rows: list[Row]) -> dict[tuple[int, int, int], Tensor]:
        """One reader reads all that it missed of the rows; its logits by row, step and reader.

        Known are the steps from the first that waits for it to the one behind the last token that it has read.
        """
        known: dict[tuple[int, int, int], Tensor] = {}
        first = {row.index: self.first_wait(reader, row) or 0 for row in rows}
        for row in rows:  # another assistant's turn may have brought this reader up to the step already
            if reader in row.ahead and row.ahead[reader][0] == first[row.index]:
                known[row.index, first[row.index], reader] = row.ahead[reader][1]
        rows = [row for row in rows if self.unread(reader, row)]
        chunks = [self.unread(reader, row) for row in rows]
        last = [self.seen(reader, row) + len(chunk) for row, chunk in zip(rows, chunks, strict=True)]
        keep = [min(end - first[r.index] + 1, len(chunk)) for r, end, chunk in zip(rows, last, chunks, strict=True)]
        if not rows:
            return known
        try:
            reading = self.readers[reader].read([row.index for row in rows], chunks, max(keep))
        except Exception as error:
            problem = self.failure(reader, rows, f"raised {type(error).__name__}: {error}")
            if not self.fall_back:
                raise problem from error
            warnings.warn(f"{problem} The base goes on alone.", stacklevel=2)
            self.give_up(reader, self.rows)
            return {}
        logits = fit_vocabulary(reading.logits.to(self.device), rows[0].waiting[0].base_logits.shape[-1])
        for i, row in enumerate(rows):
            row.ahead[reader] = (last[i], logits[i, -1])
            known.update({(row.index, last[i] - back, reader): logits[i, -1 - back] for back in range(keep[i])})
        return known

    def settle(self, drafts: list[tuple[Row, Waiting]], logits: dict[tuple[int, int, int], Tensor]) -> None:
        """Choose the tokens that waited; overwrite the first stand-in of each row that was wrong."""
        answered = [all((row.index, w.step, i) in logits for i in self.asked(w)) for row, w in drafts]
        scores = self.combine(drafts, answered, logits)
        tokens, processed = self.choose([row for row, _ in drafts], [w.step for _, w in drafts], scores)
        for row in {row.index: row for row, _ in drafts}.values():
            row.waiting, row.survival = [], 1.0
        wrong: set[int] = set()
        for i, ((row, waiting), token) in enumerate(zip(drafts, tokens.tolist(), strict=True)):
            if row.index in wrong:  # drafted behind a wrong stand-in
                continue
            if row.waiting or not (answered[i] or row.unavailable.intersection(self.asked(waiting))):
                row.waiting.append(waiting)  # its assistant did not get that far: it decides in the next round
                continue
            writer = waiting.writer if answered[i] else self.available(row, waiting.step, waiting.writer)
            drafted = row.tokens[waiting.step] if waiting.step < len(row.tokens) else None
            if drafted is not None and self.gate is not None:
                self.gate.record(waiting.probability, drafted == token)
                self.counts["accepted"] += drafted == token
            if drafted == token:
                row.source[waiting.step] = writer
                self.keep(row, waiting.step, scores[i], processed[i])
            else:
                wrong.add(row.index)
                self.cut(row, waiting.step)
                self.write(row, token, writer, scores[i], processed[i])

    def combine(self, drafts: list[tuple[Row, Waiting]], answered: list[bool], logits: dict[Any, Tensor]) -> Tensor:
        """Scores `(n, vocabulary)` of what is written at `n` deferred positions; the base's where nobody answered."""
        base_logits = torch.stack([w.base_logits for _, w in drafts])
        picked = [draft for draft, answer in zip(drafts, answered, strict=True) if answer]
        if not picked:
            return base_logits
        combined = self.combiner.function(
            CombiningContext(
                base_logits=base_logits[answered],
                assistant_logits=torch.stack([logits[row.index, w.step, w.writer] for row, w in picked]),
                deferral_probs=torch.tensor([w.deferral_prob for _, w in picked], device=base_logits.device),
                others={
                    name: torch.stack([logits[row.index, w.step, reader] for row, w in picked])
                    for name, reader in self.extra.items()
                },
            )
        )
        if all(answered):
            return combined
        scores = base_logits.to(torch.promote_types(base_logits.dtype, combined.dtype))
        scores[answered] = combined.to(scores.dtype)
        return scores

    # -- 5.: decided tokens ----------------------------------------------------------------------------------------

    def decide(self, rows: list[Row]) -> None:
        """Count as decided, in order, the tokens that nothing waits in front of."""
        while undecided := [row for row in rows if not row.done and row.decided < row.limit]:
            step = min(row.decided for row in undecided)
            group = [row for row in undecided if row.decided == step]
            stopped = self.stopped(group, step)
            for row, stop in zip(group, stopped, strict=True):
                row.decided += 1
                self.deferred[row.source[step]] += 1
                if self.gate is not None:
                    self.gate.tokens += 1
                    self.gate.deferrals += row.source[step] != BASE
                if stop:
                    self.finish(row)
        self.stream()

    def stopped(self, rows: list[Row], step: int) -> list[bool]:
        """Whether each row ends with its token at `step`."""
        ends = [row.tokens[step] in self.ending.eos or step + 1 >= self.ending.max_steps for row in rows]
        if self.ending.criteria:
            scores = None
            if self.keep_scores:
                like = rows[0].processed[step]
                scores = (like.new_zeros(len(self.rows), like.shape[-1]),)
                for row in rows:
                    scores[0][row.index] = row.processed[step]
            flags = self.ending.criteria(self.view(step + 1), scores).tolist()
            ends = [end or flags[row.index] for end, row in zip(ends, rows, strict=True)]
        return ends

    def finish(self, row: Row) -> None:
        self.cut(row, row.decided)
        row.done, row.waiting = True, []
        self.input_ids[row.index, self.prompt_width + row.decided :] = self.ending.pad
        for reader in self.readers:
            reader.drop(row.index)

    def stream(self) -> None:
        while self.streamer is not None:
            columns = [row.decided > self.streamed for row in self.rows]
            if not any(columns) or not all(has or row.done for has, row in zip(columns, self.rows, strict=True)):
                return
            column = [(row.tokens[self.streamed], row.source[self.streamed]) if has else (self.ending.pad, -1)
                      for has, row in zip(columns, self.rows, strict=True)]  # fmt: skip
            tokens, source = torch.tensor(column).unbind(1)
            self.streamer(tokens, source)
            self.streamed += 1

    # -- rows ------------------------------------------------------------------------------------------------------

    def is_blocked(self, row: Row) -> bool:
        """Whether a token of the row must be settled before the base may go on."""
        if self.at_end(row):
            return True
        return bool(row.waiting) and (self.gate is None or not self.gate.is_open(row.survival))

    def at_end(self, row: Row) -> bool:
        return len(row.tokens) >= self.ending.max_steps or (bool(row.tokens) and row.tokens[-1] in self.ending.eos)

    def asked(self, waiting: Waiting) -> Iterable[int]:
        """The readers whose logits a deferred token needs."""
        return (waiting.writer, *self.extra.values())

    def available(self, row: Row, step: int, writer: int) -> int:
        """The writer, or the base where the row must do without that assistant."""
        if writer not in row.unavailable:
            return writer
        row.fell_back_at = step if row.fell_back_at is None else row.fell_back_at
        return BASE

    def first_wait(self, reader: int, row: Row) -> int | None:
        """The first step of the row that waits for the reader."""
        return next((w.step for w in row.waiting if reader in self.asked(w)), None)

    def seen(self, reader: int, row: Row) -> int:
        """How many of the row's new tokens the reader has read (negative: not even the prompt)."""
        return self.readers[reader].length.get(row.index, 0) - len(self.prompts[reader][row.index])

    def unread(self, reader: int, row: Row) -> list[int]:
        """What the reader has not read of the row, as far as it can read: the prompt, the first time, and the tokens
        since it was last asked."""
        prompt, seen, longest = self.prompts[reader][row.index], self.seen(reader, row), self.readers[reader].max_length
        tokens = row.tokens if reader == BASE or longest is None else row.tokens[: max(longest - len(prompt), 0)]
        return tokens[seen:] if seen >= 0 else prompt + tokens

    def write(self, row: Row, token: int, writer: int, raw: Tensor, processed: Tensor) -> None:
        step = len(row.tokens)
        row.tokens.append(token)
        row.source.append(writer)
        self.keep(row, step, raw, processed)
        if self.needs_view:
            self.make_room(step + 1)
            self.input_ids[row.index, self.prompt_width + step] = token

    def keep(self, row: Row, step: int, raw: Tensor, processed: Tensor) -> None:
        if self.keep_scores:
            row.raw[step], row.processed[step] = raw.float(), processed.float()

    def cut(self, row: Row, step: int) -> None:
        """Discard the row's tokens from `step` on, in every model."""
        self.counts["discarded"] += len(row.tokens) - step
        discarded = row.tokens[step:]
        del row.tokens[step:], row.source[step:], row.deferral_probs[step + 1 :], row.states[step + 1 :]
        for at in range(step, step + len(discarded)):
            row.raw.pop(at, None)
            row.processed.pop(at, None)
        row.ahead = {}
        if row.lookup is not None:
            row.lookup.cut(step, discarded)
        for reader in range(len(self.readers)):
            self.forget(reader, row, step)

    def forget(self, reader: int, row: Row, step: int) -> None:
        self.readers[reader].roll_back(row.index, len(self.prompts[reader][row.index]) + step)

    def choose(self, rows: list[Row], steps: list[int], logits: Tensor) -> tuple[Tensor, Tensor]:
        return self.choice(rows, steps, logits, self.view)

    def view(self, step: int) -> Tensor:
        """`input_ids` with `step` new tokens, as transformers shows them to processors and criteria."""
        self.make_room(step)
        return self.input_ids[:, : self.prompt_width + step]

    def make_room(self, steps: int) -> None:
        missing = self.prompt_width + steps - self.input_ids.shape[1]
        if missing > 0:
            self.input_ids = F.pad(self.input_ids, (0, missing + 256), value=self.ending.pad)

    # -- assistants that fail --------------------------------------------------------------------------------------

    def has_room(self, reader: int, row: Row) -> bool:
        """Whether the reader can still read what comes before the first step that waits for it."""
        if reader in row.unavailable:
            return False
        step, longest = self.first_wait(reader, row), self.readers[reader].max_length
        length = len(self.prompts[reader][row.index]) + (step or 0)
        if longest is None or length <= longest:
            return True
        problem = self.failure(reader, [row], f"reads at most {longest} tokens and would have to read {length}")
        if not self.fall_back:
            raise problem
        warnings.warn(f"{problem} The base goes on alone.", stacklevel=2)
        self.give_up(reader, [row])
        return False

    def give_up(self, reader: int, rows: Sequence[Row]) -> None:
        """Do without a reader from here on; a model that the combiner needs takes all assistants with it."""
        lost = {reader} if reader <= self.num_assistants else set(range(1, len(self.readers)))
        for row in rows:
            row.unavailable |= lost
            for i in lost:
                self.readers[i].drop(row.index)

    def failure(self, reader: int, rows: list[Row], problem: str) -> AssistantError:
        names = [
            *(f"Assistant {k}" for k in range(1, self.num_assistants + 1)),
            *(f'The "{n}" model' for n in self.extra),
        ]
        where = ", ".join(f"row {row.index} after {row.limit} new tokens" for row in rows[:3])
        where += f" and {len(rows) - 3} more" if len(rows) > 3 else ""
        return AssistantError(
            f"{names[reader - 1]} {problem} ({where}). "
            'Pass on_assistant_error="base" to let the base go on alone from there.'
        )

    # -- results ---------------------------------------------------------------------------------------------------

    def statistics(self, seconds: float) -> dict[str, Any]:
        """Counts of this run; see [`~collm.decoding.generation.CollaborativeOutput`]."""
        base, assistants = self.readers[BASE], self.readers[1:]
        return {
            "base_calls": base.calls,
            "base_tokens": base.tokens,
            "base_padding": base.padding,
            "base_discarded": base.discarded,
            "assistant_calls": [r.calls for r in assistants],
            "assistant_tokens": [r.tokens for r in assistants],
            "assistant_padding": [r.padding for r in assistants],
            "assistant_discarded": [r.discarded for r in assistants],
            "new_tokens": sum(self.deferred),
            "deferrals": self.deferred[1:],
            "drafted": self.counts["deferred_drafts"] if self.gate is not None else 0,
            "accepted": self.counts["accepted"],
            "guesses": self.counts["guesses"],
            "guesses_right": self.counts["guesses_right"],
            "fallback": [row.fell_back_at for row in self.rows],
            "seconds": seconds,
        }


def _asked_about(rows: list[int], processor: Any) -> Any:
    """The processor, whose prefix function, if it has one, is asked about `rows` alone: at this step the others show
    padding or a discarded draft, which may be no beginning that the function knows."""
    if type(processor) is not PrefixConstrainedLogitsProcessor:
        return processor
    function, beams = processor._prefix_allowed_tokens_fn, processor._num_beams
    return PrefixConstrainedLogitsProcessor(lambda row, ids: function(row // beams, ids) if row in rows else [0], 1)


def _previous_states(rows: list[Row], steps: list[int], device: torch.device) -> Tensor | None:
    known = next((row.states[0] for row in rows if row.states), None)
    if known is None:
        return None
    states = [row.states[s - 1] if s else torch.full_like(known, math.nan) for row, s in zip(rows, steps, strict=True)]
    return torch.stack(states)


def _probability(scores: Tensor, tokens: Tensor) -> Tensor:
    """Probability of each row's token under softmax(scores), `(rows,)` float32."""
    scores = scores.float()
    return (scores.gather(1, tokens.unsqueeze(1)).squeeze(1) - scores.logsumexp(dim=-1)).exp()


def fit_vocabulary(logits: Tensor, vocabulary: int) -> Tensor:
    """Give an assistant's logits the base's number of columns: embeddings are padded differently."""
    if logits.shape[-1] > vocabulary:
        return logits[..., :vocabulary]
    missing = vocabulary - logits.shape[-1]
    return F.pad(logits, (0, missing), value=-torch.inf) if missing else logits


def decode(decoder: Decoder) -> dict[str, Any]:
    """Run a decoder and return its statistics."""
    start = time.perf_counter()
    decoder.run()
    return decoder.statistics(time.perf_counter() - start)
