"""
Quality against deferral rate and cost, for the learned head and every control that needs no training of its own.

Thresholds and cuts are found on calibration problems and used on others; every method's rate is the realised one.

| method | who is asked | what is written |
|---|---|---|
| base, assistant | nobody | one model writes everything |
| learned | the head, d > threshold | the assistant's token |
| random | any token with the asked rate | the assistant's token |
| entropy, top_probability, margin | the base is unsure | the assistant's token |
| ema, scheduled | the smoothed head; the head under a schedule | the assistant's token |
| mixture, contrastive, proxy_tuning | at every token | the combined distribution |
| oracle | exactly where the first choices of the models differ | the assistant's token |

The oracle writes the assistant's own greedy text at the smallest rate that can: it needs no generation, only the base's
first choices along that text, and no router could know them without asking.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from collm.calibration import calibrate_rates
from collm.configuration import DeferralConfig
from collm.errors import CalibrationError, ConfigurationError, did_you_mean
from collm.evaluation.generations import Generation, GenerationStore
from collm.evaluation.intervals import paired_bootstrap
from collm.evaluation.loading import Team, num_parameters
from collm.evaluation.metrics import Metric
from collm.evaluation.runner import Problem, Writer, generate_all, headline_scores, problems_fingerprint, summarise
from collm.evaluation.trajectory import Trajectory, texts_of
from collm.files import write_json

AT_A_RATE = ("learned", "random", "entropy", "top_probability", "margin", "ema", "scheduled")
EVERYWHERE = ("mixture", "contrastive", "proxy_tuning")
METHODS = ("base", "assistant", *AT_A_RATE, *EVERYWHERE, "oracle")


def lacks(method: str, untuned: bool, calibration: bool, engine: str = "transformers") -> str | None:
    """
    What a method needs and does not have, known before any model is loaded; None where it can be measured.

    Args:
        untuned (`bool`): whether there is the base before tuning.
        calibration (`bool`): whether there are problems to set thresholds on.
        engine (`str`, *optional*): as for [`~collm.evaluation.loading.load_team`].

    Raises:
        [`ConfigurationError`]: an unknown method.
    """
    if method not in METHODS:
        raise ConfigurationError(
            f'There is no method "{method}"; there are {", ".join(METHODS)}.{did_you_mean(method, METHODS)}'
        )
    if method in (*EVERYWHERE, "margin") and engine != "transformers":
        return "whole distributions, which engines keep: --engine transformers"
    if method == "proxy_tuning" and not untuned:
        return "the base before tuning: --untuned NAME"
    if method in AT_A_RATE and method not in ("learned", "random") and not calibration:
        return "problems to set its threshold on that are not reported: --calibration-problems"
    return None


@dataclass
class Sweep:
    """
    Measures points of one deferral checkpoint; everything that was generated is kept in `folder` and used again.

    Args:
        team ([`Team`]): base with head, assistants, tokenizer.
        problems (sequence of [`Problem`]): those that are reported.
        calibration (sequence of [`Problem`]): others, on which thresholds are found.
        metric (`Metric`): its headline is the quality.
        folder (`Path`): for the texts.
        settings (mapping): what the texts depend on.
        batch_size: as in `collm eval`.
        untuned (`PreTrainedModel`, *optional*): the base before tuning, for proxy tuning.
        tolerance (`float`, *optional*, defaults to 0.01): of the thresholds' rates, as in `collm calibrate`.
    """

    team: Team
    problems: Sequence[Problem]
    calibration: Sequence[Problem]
    metric: Metric
    folder: Path
    settings: Mapping[str, Any]
    batch_size: int = 8
    untuned: Any = None
    tolerance: float = 0.01
    prefix: str = ""  # of file names and method names, for a second checkpoint
    texts: dict[str, list[Generation]] = field(default_factory=dict, init=False)

    def points(self, method: str, rates: Sequence[float]) -> list[dict[str, Any]]:
        """
        The points of one method: one per rate, or one where a method has no rate.

        Raises:
            [`ConfigurationError`]: an unknown method, or one that lacks something.
        """
        if missing := lacks(method, self.untuned is not None, bool(self.calibration)):
            raise ConfigurationError(f"{method} needs {missing}")
        if method == "base":
            return [self.alone("base", self.team.alone[0], self.team.parameters[0])]
        if method == "assistant":
            return [
                self.alone(name, writer, parameters, rate=1.0)
                for name, writer, parameters in zip(
                    self._assistants(), self.team.alone[1:], self.team.parameters[1:], strict=True
                )
            ]
        if method == "oracle":
            return [self.oracle()]
        if method in EVERYWHERE:
            combiner: dict[str, Any] = {"name": method}
            if method == "proxy_tuning":
                combiner["untuned"] = self.untuned
            point = self.point(method, {"router": "always", "combiner": combiner})
            if method == "proxy_tuning":
                point["active_parameters"] += num_parameters(self.untuned)  # runs at every token, too
            return [point]
        if method == "random":
            return [self.point(method, {"router": {"name": "random", "rate": rate}}, rate) for rate in rates]
        trajectory = self.trajectory(method)
        return [
            self.point(method, trajectory.options(threshold), rate)
            for rate, threshold in self.thresholds(trajectory, rates).items()
        ]

    def point(self, method: str, options: dict[str, Any], asked: float | None = None) -> dict[str, Any]:
        """One collaborative run over the reported problems."""
        writer = replace(self.team.writer, options={**self.team.writer.options, **options})
        return self._measure(method, writer, options, self.team.parameters, asked)

    def alone(self, method: str, writer: Writer, parameters: int, rate: float | None = None) -> dict[str, Any]:
        """One model by itself; `rate` is where it stands on the axis of deferral rates."""
        point = self._measure(method, writer, {"alone": method}, [parameters], None)
        return point if rate is None else {**point, "rate": rate}

    def oracle(self) -> dict[str, Any]:
        """The assistant's text, and the share of its tokens that the base would not have chosen; see the module."""
        name = self._assistants()[0]
        whole = self.alone(name, self.team.alone[1], self.team.parameters[1])
        differ = total = 0
        model = self.team.model
        with torch.inference_mode():
            for ids, labels in texts_of(self.problems, self.texts[self.prefix + name]):
                correct = model.score_targets(
                    torch.tensor([ids], device=model.device), labels=torch.tensor([labels], device=model.device)
                ).base_correct
                differ += int((~correct).sum())
                total += len(correct)
        rate = differ / total
        active = self.team.parameters[0] + rate * self.team.parameters[1]
        return {**whole, "method": "oracle", "rate": rate, "active_parameters": active, "seconds_per_token": None}

    def trajectory(self, router: str) -> Trajectory:
        """Runs of a router on the calibration problems."""
        settings = {**self.settings, "problems": problems_fingerprint(self.calibration)}
        folder = self._calibration_folder
        return Trajectory(self.team, self.calibration, {"name": router}, self.batch_size, folder, settings)

    @property
    def _calibration_folder(self) -> Path:
        return self.folder / f"{self.prefix}calibration".replace(" ", "-")

    def thresholds(self, trajectory: Trajectory, rates: Sequence[float]) -> dict[float, float]:
        """Asked rate to threshold: from the checkpoint's table where it covers the rate, else measured, once: neither
        runs for other rates nor a later table change one that texts were written with.

        Raises:
            [`ConfigurationError`]: there are no calibration problems to measure on.
        """
        deferral: DeferralConfig = self.team.model.config.deferral
        name, found = trajectory.router["name"], {}
        for rate in rates if name == "learned" else ():
            with suppress(CalibrationError):  # no table, or not for this rate
                found[rate] = deferral.threshold_for_rate(rate)
        path = self._calibration_folder / f"{name}.json"
        settings = json.loads(json.dumps({**self.team.identity, **trajectory.settings, "tolerance": self.tolerance}))
        kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        measured = dict(kept["thresholds"]) if kept.get("settings") == settings else {}
        if missing := [rate for rate in rates if rate not in found.keys() | measured.keys()]:
            if not self.calibration:
                raise ConfigurationError(
                    f"the thresholds of {name} have to be measured on problems that are not reported: set "
                    "--calibration-problems"
                )
            known = trajectory.finished()
            rows, _ = calibrate_rates(trajectory, missing, tolerance=self.tolerance, report=print, known=known)
            for rate in missing:
                measured[rate] = min(rows, key=lambda row: abs(row["rate"] - rate))["threshold"]
            write_json(path, {"settings": settings, "thresholds": list(measured.items())})
        return {rate: {**found, **measured}[rate] for rate in rates}

    def _assistants(self) -> list[str]:
        count = len(self.team.alone) - 1
        return [f"assistant {k + 1}" if count > 1 else "assistant" for k in range(count)]

    def _measure(
        self, method: str, writer: Writer, options: dict[str, Any], parameters: Sequence[int], asked: float | None
    ) -> dict[str, Any]:
        name = self.prefix + method + (f" {asked:.3g}" if asked is not None else "")
        told = {key: value if isinstance(value, str | float) else _plain(value) for key, value in options.items()}
        path = self.folder / f"{name.replace(' ', '-')}.jsonl"
        store = GenerationStore(path, {**self.team.identity, **self.settings, "decoding": told})
        generations = generate_all(writer, self.problems, store, self.batch_size, name)
        self.texts[name] = generations
        summary = summarise(self.problems, generations, self.metric, parameters)
        value = summary["metrics"][summary["headline"]]
        return {
            "method": self.prefix + method,
            "asked_rate": asked,
            "rate": summary["deferral_rate"],
            "quality": value["mean"],
            "low": value["low"],
            "high": value["high"],
            "problems": summary["problems"],
            "truncated": summary["truncated"],
            "unparsable": summary["unparsable"],
            "tokens": summary["tokens"],
            "seconds_per_token": summary["seconds_per_token"],
            "active_parameters": summary["active_parameters"],
            "metrics": summary["metrics"],
            "texts": name,
            "scores": headline_scores(summary),
        }


def add_comparisons(points: list[dict[str, Any]], against: Sequence[str] = ("random", "entropy")) -> None:
    """
    Adds to each point "recovered", its share of the distance from base to assistant, and to points at a rate
    "over_random" and "over_entropy": paired bootstraps against the control at the same asked rate.
    """
    base = next((p for p in points if p["method"] == "base"), None)
    assistant = next((p for p in points if p["method"].startswith("assistant")), None)
    for point in points:
        if base and assistant and assistant["quality"] != base["quality"]:
            point["recovered"] = (point["quality"] - base["quality"]) / (assistant["quality"] - base["quality"])
        for name in against:
            control = next(
                (p for p in points if p["method"] == name and p["asked_rate"] == point["asked_rate"] is not None), None
            )
            if control is not None and control is not point:
                point[f"over_{name}"] = paired_bootstrap(point["scores"], control["scores"])


def _plain(value: Any) -> Any:
    """Options as JSON: a model stands by its name."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return getattr(value, "name_or_path", str(type(value)))
