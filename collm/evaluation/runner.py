"""
Evaluation of one way to write texts: prompts in, generations kept on disk, metrics with intervals out.

1. [`make_problems`]: rows of a data file become token ids of prompts.
2. [`check_references`]: what a metric could not score is refused before anything is written.
3. [`generate_all`]: a [`Writer`] writes what the store does not hold yet.
4. [`summarise`]: every text is scored; truncated and unparsable ones are counted apart.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, Protocol

import torch

from collm.data.chat import Chat, Dropped, bos, encode, message
from collm.data.tasks import get_task
from collm.decoding.cache import maximum_length
from collm.errors import ConfigurationError, DataFormatError
from collm.evaluation.generations import Generation, GenerationStore, data_fingerprint
from collm.evaluation.intervals import bootstrap_interval, wilson_interval
from collm.evaluation.metrics import METRICS, Metric, Score


@dataclass(frozen=True)
class Problem:
    """
    Args:
        id (`int`): number of the row.
        row (mapping): the row as in the data, for the metric.
        prompt (`str`): the question, for reports.
        prompt_ids (`list[int]`): what the models read.
    """

    id: int
    row: Mapping[str, Any]
    prompt: str
    prompt_ids: list[int]


def make_problems(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    task: str | Callable[[dict], dict] | None = None,
    instruction: str | None = None,
    system_prompt: str | None = None,
    chat_template: str | None = None,
    raw: bool = False,
) -> list[Problem]:
    """
    Prompts of a data set.

    A row has `prompt` (a string or a list of messages), or `messages` whose last turn is the reference, or the columns
    of `task`. Strings become one turn of a conversation where there is a chat template; elsewhere a line break follows
    those of a task. Training does the same with a task, and takes `prompt` strings as they are: `raw` does so here.

    Args:
        instruction (`str`, *optional*): appended to the last question after a blank line.
        system_prompt (`str`, *optional*): the conversation's system message.
        raw (`bool`, *optional*, defaults to `False`): continue `prompt` strings themselves, whatever the tokenizer has.

    Raises:
        [`DataFormatError`]: a row has none of these columns, or nothing in them.
        [`ConfigurationError`]: messages or a system prompt, but no chat template.
    """
    convert = get_task(task) if task is not None else dict
    chat = Chat(tokenizer, chat_template)
    problems = []
    for number, row in enumerate(rows):
        try:
            row = json.loads(row["bioasq"]) if "bioasq" in row else dict(row)
            made = convert(row)
            if made.get("messages") is not None:
                made = {"prompt": made["messages"][:-1]}
            asked = put(made, bool(chat.template) and not raw, instruction, system_prompt)["prompt"]
            if isinstance(asked, str):
                prompt, ids = asked, bos(tokenizer) + encode(tokenizer, asked + "\n" * (task is not None))
            else:
                prompt, ids = asked[-1]["content"], encode(tokenizer, chat.render(asked, add_generation_prompt=True))
        except KeyError as error:
            raise DataFormatError(f"Row {number} has no {error}, which its task or a message needs") from error
        except (DataFormatError, Dropped) as error:
            raise DataFormatError(f"Row {number}: {error}") from error
        problems.append(Problem(number, row, prompt, ids))
    return problems


def put(
    row: Mapping[str, Any], as_conversation: bool, instruction: str | None = None, system_prompt: str | None = None
) -> dict[str, Any]:
    """
    A row of `messages` or `prompt`, its question as it is put to the models.

    Args:
        as_conversation (`bool`): a string becomes a message of the user, its `completion` one of the assistant.
        instruction, system_prompt: as for [`make_problems`].

    Raises:
        [`DataFormatError`]: nothing is asked.
        [`ConfigurationError`]: a system prompt for a string.
    """
    name = "prompt" if row.get("messages") is None else "messages"
    asked, rest = row.get(name), dict(row)
    if not asked:
        raise DataFormatError(
            "it asks nothing: it needs a prompt, messages of which the last is the reference, or a task's columns"
        )
    if isinstance(asked, str) and as_conversation:
        asked = [message("user", asked)]
        rest["completion"] = [message("assistant", row["completion"])] if row.get("completion") else []
    if isinstance(asked, str):
        if system_prompt is not None:
            raise ConfigurationError("a system prompt needs a conversation: give a chat template, or rows of messages")
        return {**rest, name: f"{asked}\n\n{instruction}" if instruction else asked}
    if instruction:
        last = max((i for i, said in enumerate(asked) if said["role"] == "user"), default=None)
        if last is None:
            raise DataFormatError("it has no message of the user to append the instruction to")
        question = {**asked[last], "content": f"{asked[last]['content']}\n\n{instruction}"}
        asked = [*asked[:last], question, *asked[last + 1 :]]
    if system_prompt is not None:
        asked = [message("system", system_prompt), *(said for said in asked if said["role"] != "system")]
    return {**rest, name: asked}


def problems_fingerprint(problems: Iterable[Problem]) -> str:
    """Hash of the prompts, in order: which texts a [`GenerationStore`] is for."""
    return data_fingerprint({"prompt": problem.prompt_ids} for problem in problems)


class Writer(Protocol):
    """What writes texts: models in this process, serving engines, or a server. `seconds` of the texts add up to the
    wall-clock time."""

    def write(self, problems: Sequence[Problem], at_once: int) -> Generator[list[Generation], None, None]:
        """All texts, in any order, as they are finished; `at_once` are written at the same time."""
        ...


@dataclass
class ModelWriter:
    """
    Writes with transformers: alone, or collaboratively where there are assistants.

    Args:
        model (`PreTrainedModel`): the base with its head, or any causal language model when alone.
        tokenizer (`PreTrainedTokenizerBase`): the base's.
        assistants (`list[PreTrainedModel]`, *optional*): the models to ask.
        options (`dict`): arguments of `generate`: `threshold`, `deferral_rate`, `router`, `combiner`, `do_sample`, ...
        max_new_tokens (`int`, *optional*, defaults to 512): length limit.
        seed (`int`, *optional*, defaults to 0): of sampling and of routers that draw.
    """

    model: Any
    tokenizer: Any
    assistants: Sequence[Any] = ()
    options: dict[str, Any] = field(default_factory=dict)
    max_new_tokens: int = 512
    seed: int = 0

    def write(self, problems: Sequence[Problem], at_once: int) -> Generator[list[Generation], None, None]:
        """Batches of `at_once`, in order; a prompt that leaves no room for `max_new_tokens` by itself, with what there
        is."""
        everyone = (self.model, *self.assistants)
        longest = min((limit for model in everyone if (limit := maximum_length(model)) is not None), default=None)
        room = {problem.id: answer_limit(problem, self.max_new_tokens, longest) for problem in problems}
        whole = [problem for problem in problems if room[problem.id] == self.max_new_tokens]
        for start in range(0, len(whole), at_once):
            yield self._batch(whole[start : start + at_once], self.max_new_tokens)
        for problem in problems:
            if room[problem.id] < self.max_new_tokens:
                yield self._batch([problem], room[problem.id])

    @torch.inference_mode()
    def _batch(self, problems: Sequence[Problem], max_new_tokens: int) -> list[Generation]:
        started = time.perf_counter()
        inputs = left_padded([problem.prompt_ids for problem in problems], self._pad, self.model.device)
        torch.manual_seed(self.seed + problems[0].id)
        options = {"max_new_tokens": max_new_tokens, "do_sample": False, "pad_token_id": self._pad, **self.options}
        # Distributions as the models have them: many checkpoints bring a penalty of their own, engines apply none.
        options["repetition_penalty"] = 1.0
        if not options["do_sample"]:
            options |= {"temperature": None, "top_p": None, "top_k": None}  # an instruct model's defaults for sampling
        if self.assistants:
            options["assistant"] = list(self.assistants)
        output = self.model.generate(**inputs, **options, return_dict_in_generate=True)
        seconds = (time.perf_counter() - started) / len(problems)
        new = output.sequences[:, inputs["input_ids"].shape[1] :].tolist()
        if self.assistants:
            source, probabilities = output.source.tolist(), output.deferral_probs.tolist()
        else:
            source, probabilities = [[0] * len(row) for row in new], [[] for _ in new]
        return [
            self._generation(problem, *parts, seconds)  # type: ignore[call-arg]
            for problem, *parts in zip(problems, new, source, probabilities, strict=True)
        ]

    def _generation(
        self, problem: Problem, ids: list[int], source: list[int], probabilities: list[float], seconds: float
    ) -> Generation:
        end = next((t + 1 for t, token in enumerate(ids) if token in self._eos), None)
        length = end if end is not None else sum(writer >= 0 for writer in source)
        text = self.tokenizer.decode(ids[:length], skip_special_tokens=True)
        return Generation(
            problem.id, text, ids[:length], source[:length], probabilities[:length], end is None, round(seconds, 4)
        )

    @property
    def _eos(self) -> set[int]:
        eos = self.model.generation_config.eos_token_id
        eos = self.tokenizer.eos_token_id if eos is None else eos
        return set(eos) if isinstance(eos, list) else {eos}

    @property
    def _pad(self) -> int:
        return self.tokenizer.eos_token_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id


def answer_limit(problem: Problem, max_new_tokens: int, longest: int | None) -> int:
    """
    How many tokens an answer may have where models read `longest` tokens; fewer than asked for count as truncated.

    Raises:
        [`ConfigurationError`]: there is no room for any.
    """
    room = max_new_tokens if longest is None else min(max_new_tokens, longest - len(problem.prompt_ids))
    if room < 1:
        raise ConfigurationError(
            f"Row {problem.id}: its prompt has {len(problem.prompt_ids)} tokens, and the models read {longest} at "
            "most: leave it out of the data, or take models that read more."
        )
    return room


def left_padded(rows: Sequence[Sequence[int]], pad: int, device: Any = "cpu") -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` `(rows, longest)`, padded on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask}


def generate_all(
    writer: Writer,
    problems: Sequence[Problem],
    store: GenerationStore | None = None,
    batch_size: int = 8,
    description: str = "generating",
) -> list[Generation]:
    """
    Generations of all problems, in their order; those that the store holds are not generated again.

    Batches join prompts of similar length, or engines batch continuously; a progress bar goes to standard error.
    """
    from tqdm.auto import tqdm

    store = store or GenerationStore(None, {})
    missing = sorted((p for p in problems if p.id not in store.done), key=lambda p: -len(p.prompt_ids))
    with tqdm(
        total=len(problems), initial=len(problems) - len(missing), desc=description, unit="text", disable=None
    ) as bar:
        with closing(writer.write(missing, batch_size)) as written:  # interrupted, nothing goes on writing
            for generations in written:
                store.add(generations)
                bar.update(len(generations))
    return [store.done[problem.id] for problem in problems]


def check_references(problems: Sequence[Problem], metric: Metric) -> None:
    """
    Before anything is written: can the metric score these rows? A metric of the user's is not asked.

    Raises:
        [`DataFormatError`]: a row has no reference that the metric could compare with.
    """
    if metric in METRICS.values():
        for problem in problems:
            _score(metric, problem, "", True)


def summarise(
    problems: Sequence[Problem],
    generations: Sequence[Generation],
    metric: Metric,
    parameters: Sequence[int] = (),
) -> dict[str, Any]:
    """
    Scores with 95% intervals, and what they cost.

    Args:
        metric (`Metric`): from [`get_metric`].
        parameters (sequence of `int`, *optional*): parameters of the base and of each assistant.

    Returns:
        `dict`: "metrics" (name to mean, low, high, n; Wilson's interval where all values are 0 or 1, else a bootstrap),
        "headline" (the first metric's name), "problems", "truncated" and "unparsable" (counts; a text can be both),
        "tokens", "deferral_rate" (assistants' tokens over all tokens), "deferral_rates" (by assistant),
        "seconds_per_token", "active_parameters" (base + sum of rate times assistant, per generated token), and
        "records", one per problem.

    Raises:
        [`DataFormatError`]: as [`check_references`].
    """
    scores = [_score(metric, p, g.text, g.truncated) for p, g in zip(problems, generations, strict=True)]
    names = list(dict.fromkeys(name for score in scores for name in score.values)) or [metric.__name__]
    scores = [score if score.values else replace(score, values=dict.fromkeys(names, 0.0)) for score in scores]
    metrics = {name: _mean([score.values[name] for score in scores if name in score.values]) for name in names}
    tokens = sum(len(g.token_ids) for g in generations) or 1
    count = max([len(parameters) - 1, 0, *(writer for g in generations for writer in g.source)])
    rates = [sum(g.source.count(k) for g in generations) / tokens for k in range(1, count + 1)]
    return {
        "headline": names[0],
        "metrics": metrics,
        "problems": len(problems),
        "truncated": sum(g.truncated for g in generations),
        "unparsable": sum(score.answer is None for score in scores),
        "tokens": sum(len(g.token_ids) for g in generations),
        "deferral_rate": sum(rates),
        "deferral_rates": rates,
        "seconds_per_token": sum(g.seconds for g in generations) / tokens,
        "active_parameters": (
            parameters[0] + sum(r * p for r, p in zip(rates, parameters[1:], strict=False)) if parameters else None
        ),
        "records": [
            {"id": g.id, **_record(score), "truncated": g.truncated, "tokens": len(g.token_ids), "deferred": g.deferred}
            for g, score in zip(generations, scores, strict=True)
        ],
    }


def headline_scores(summary: Mapping[str, Any]) -> list[float | None]:
    """The headline metric per problem (None where its kind has other metrics): what paired comparisons take."""
    return [record["scores"].get(summary["headline"]) for record in summary["records"]]


def _score(metric: Metric, problem: Problem, text: str, truncated: bool) -> Score:
    try:
        return metric(problem.row, text, truncated)
    except DataFormatError as error:
        raise DataFormatError(f"Row {problem.id}: {error}") from error


def _record(score: Score) -> dict[str, Any]:
    return {"scores": score.values, "answer": score.answer}


def _mean(values: list[float]) -> dict[str, Any]:
    binary = all(value in (0.0, 1.0) for value in values)
    low, high = wilson_interval(sum(values), len(values)) if binary else bootstrap_interval(values)
    return {"mean": fmean(values), "low": low, "high": high, "n": len(values)}
