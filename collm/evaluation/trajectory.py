"""Runs for a calibration: texts that the pair writes at a threshold, and the router's score of every token in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from collm.calibration import Run
from collm.evaluation.generations import Generation, GenerationStore
from collm.evaluation.likelihood import base_uncertainty, other_choices, router_scores
from collm.evaluation.loading import Team
from collm.evaluation.runner import ModelWriter, Problem, generate_all
from collm.reporting.view import TokenView

CUT_ROUTERS = {"entropy": 1, "top_probability": -1, "margin": -1}  # name -> sign between its cut and our threshold


@dataclass
class Trajectory:
    """
    `trajectory(threshold)` generates all problems at that threshold and returns the [`Run`] for
    [`~collm.calibration.calibrate_rates`]; texts are kept, by threshold, in `generations`.

    Args:
        team ([`Team`]): base and assistants.
        problems (sequence of [`Problem`]): on which to calibrate.
        router (mapping, *optional*, defaults to `{"name": "learned"}`): the router and its parameters, without a cut.
        batch_size (`int`, *optional*, defaults to 8): texts written at once.
        folder (`Path`, *optional*): where each run is kept as JSON lines, so that a killed calibration goes on.
        settings (mapping, *optional*): what the texts depend on besides the models, for the store.
    """

    team: Team
    problems: Sequence[Problem]
    router: Mapping[str, Any] = field(default_factory=lambda: {"name": "learned"})
    batch_size: int = 8
    folder: Path | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    generations: dict[float, list[Generation]] = field(default_factory=dict, init=False)

    def options(self, threshold: float) -> dict[str, Any]:
        """Arguments of `generate` that ask where this router's score exceeds `threshold`; infinite never asks."""
        if np.isinf(threshold):
            return {"router": "never"} if threshold > 0 else {"router": "always"}
        name = self.router["name"]
        if name in CUT_ROUTERS:
            return {"router": {**self.router, "cut": CUT_ROUTERS[name] * threshold}}
        return {"router": dict(self.router), "threshold": threshold}

    def __call__(self, threshold: float) -> Run:
        options = {**self.team.writer.options, **self.options(threshold)}
        shown = f"{self.router['name']} at {threshold:.4g}"
        writer = replace(self.team.writer, options=options)
        generations = generate_all(writer, self.problems, self._store(threshold), self.batch_size, shown)
        self.generations[threshold] = generations
        scores = self.scores(generations)
        return Run(threshold, scores, asked=[generation.deferred for generation in generations])

    def finished(self) -> list[Run]:
        """The runs in `folder` that are complete, whatever rates they were for: nothing is generated."""
        files = self.folder.glob(f"{self.router['name']}-*.jsonl") if self.folder else ()
        thresholds = sorted(float(path.stem.removeprefix(f"{self.router['name']}-")) for path in files)
        return [self(threshold) for threshold in thresholds if len(self._store(threshold).done) == len(self.problems)]

    def _store(self, threshold: float) -> GenerationStore:
        run = "never" if threshold == np.inf else f"{self.router['name']}-{threshold!r}"  # never: for all routers
        path = self.folder / f"{run}.jsonl" if self.folder else None
        options = {**self.team.writer.options, **self.options(threshold)}
        return GenerationStore(path, {**self.team.identity, **self.settings, "decoding": options})

    def scores(self, generations: Sequence[Generation]) -> list[np.ndarray]:
        """The router's score of every generated token, one array per text."""
        name, parameters = self.router["name"], {k: v for k, v in self.router.items() if k != "name"}
        probabilities = [np.array(g.deferral_probs, dtype=np.float64) for g in generations]
        uncertainties: Sequence[dict[str, np.ndarray] | None] = [None] * len(generations)
        if name in CUT_ROUTERS:
            uncertainties = base_uncertainty(self.team.model, texts_of(self.problems, generations))
        return [
            router_scores(name, d, uncertainty, **parameters)
            for d, uncertainty in zip(probabilities, uncertainties, strict=True)
        ]


def texts_of(problems: Sequence[Problem], generations: Sequence[Generation]) -> list[tuple[list[int], list[int]]]:
    """Prompt and generated tokens as one text each, the generated tokens its targets."""
    return [
        (problem.prompt_ids + g.token_ids, [-100] * len(problem.prompt_ids) + g.token_ids)
        for problem, g in zip(problems, generations, strict=True)
    ]


def views_of(
    team: Team, problems: Sequence[Problem], generations: Sequence[Generation], notes: Sequence[str], examples: int
) -> list[TokenView]:
    """
    Token views of generated texts, for reports. The first `examples` also say what the other model would have written,
    as far as its model is in this process.
    """
    assistants = getattr(team.writer, "assistants", ())
    here = list(assistants) if isinstance(team.writer, ModelWriter) else []
    together = len(team.names) > 1 and team.model is not None
    views = []
    for n, (problem, g, note) in enumerate(zip(problems, generations, notes, strict=True)):
        [text] = texts_of([problem], [g])
        others = other_choices(team.model, here, text, g.source) if together and n < examples and g.token_ids else None
        details = {"names": team.names, "title": f"Problem {problem.id}", "prompt": problem.prompt, "note": note}
        probabilities = g.deferral_probs or None
        views.append(TokenView.from_ids(team.tokenizer, g.token_ids, g.source, probabilities, others, **details))
    return views
