"""Options that `collm eval`, `collm calibrate` and `collm sweep` share, and what they load from them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from collm.data.reading import read_rows
from collm.data.tasks import TASKS
from collm.errors import ConfigurationError
from collm.evaluation.loading import Team, load_team
from collm.evaluation.runner import Problem, make_problems, problems_fingerprint


@dataclass
class DataOptions:
    """Which problems, and how they are put to the models."""

    data: str = field(metadata={"help": "problems: JSON lines, JSON or parquet file, folder, or name on the Hub"})
    task: str | None = field(
        default=None,
        metadata={"help": "gsm8k, math, tulu, bioasq or mt_bench; default: rows have prompt or messages"},
    )
    split: str = field(default="train", metadata={"help": "split to read where there are several"})
    dataset_config: str | None = field(default=None, metadata={"help": "configuration of a data set on the Hub"})
    first: int = field(default=0, metadata={"help": "leave out the problems before this one"})
    limit: int | None = field(default=None, metadata={"help": "at most this many problems"})
    instruction: str | None = field(default=None, metadata={"help": "sentence appended to every question"})
    system_prompt: str | None = field(default=None, metadata={"help": "system message of every conversation"})
    chat_template: str | None = field(
        default=None, metadata={"help": 'instead of the tokenizer\'s: "tulu" or a Jinja file'}
    )
    raw: bool = field(
        default=False, metadata={"help": "continue prompt strings themselves, as training reads them; no chat template"}
    )
    max_new_tokens: int = field(default=512, metadata={"help": "length limit of an answer, in tokens"})
    batch_size: int = field(default=8, metadata={"help": "answers written at once"})
    seed: int = field(default=0, metadata={"help": "of sampling and of routers that draw"})

    def rows(self) -> list[dict[str, Any]]:
        """The rows asked for.

        Raises:
            [`ConfigurationError`]: none is left; `raw` with a task.
        """
        if self.raw and self.task is not None:
            raise ConfigurationError("--raw is for rows of prompt strings; a task's questions are put as in training.")
        dataset = read_rows(self.data, self.split, self.dataset_config)
        end = len(dataset) if self.limit is None else min(len(dataset), self.first + self.limit)
        if self.first >= end:
            raise ConfigurationError(f"{self.data} has {len(dataset)} problems; first={self.first} leaves none")
        return [dataset[i] for i in range(self.first, end)]

    def problems(self, tokenizer: Any) -> list[Problem]:
        """The rows as prompts."""
        return make_problems(
            self.rows(), tokenizer, self.task, self.instruction, self.system_prompt, self.chat_template, self.raw
        )

    def settings(self, problems: list[Problem]) -> dict[str, Any]:
        """What the generated texts depend on, for [`GenerationStore`]."""
        options = asdict(self)
        for name in ("data", "split", "dataset_config", "first", "limit", "raw", "batch_size"):
            options.pop(name)  # the fingerprint says more than the name; the batch changes no greedy text
        return {**options, "problems": problems_fingerprint(problems)}

    def default_metric(self) -> str | None:
        """The metric of the task, where the task has one."""
        name = (self.task or "").removesuffix("_snippets")
        return name if name in TASKS and name != "tulu" else None


@dataclass
class ModelOptions:
    """Which models, and how they decode."""

    checkpoint: str = field(metadata={"positional": True, "help": "deferral checkpoint: folder or Hub name"})
    assistant: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Hub name or folder of an assistant, again for each further one; default: as the checkpoint says",
            "action": "extend",
        },
    )
    dtype: str = field(default="auto", metadata={"help": "auto (as saved), float32, bfloat16 or float16"})
    device: str | None = field(default=None, metadata={"help": "default: a GPU where there is one"})
    engine: Literal["transformers", "vllm", "sessions"] = field(
        default="transformers", metadata={"help": "what writes: generate(), or the engines of `collm serve`"}
    )
    engine_args: str = field(default="{}", metadata={"help": "JSON for the base's engine, as in `collm serve`"})
    assistant_engine_args: str = field(default="{}", metadata={"help": "JSON for the assistants' engines"})

    def team(self, data: DataOptions) -> Team:
        """Base and assistants, ready to write."""
        return load_team(
            self.checkpoint,
            self.assistant,
            self.dtype,
            self.device,
            self.engine,
            self.engine_args,
            self.assistant_engine_args,
            data.max_new_tokens,
            data.seed,
            data.batch_size,
        )


@dataclass
class DecodingOptions:
    """Who is asked, and what is written."""

    threshold: float | None = field(
        default=None, metadata={"help": "defer where d exceeds it; default: the checkpoint's"}
    )
    deferral_rate: float | None = field(
        default=None, metadata={"help": "share of tokens to defer, by the calibration table"}
    )
    router: str | None = field(default=None, metadata={"help": 'who is asked: "learned", "entropy:cut=1.2", ...'})
    combiner: str | None = field(default=None, metadata={"help": 'what is written: "assistant", "mixture", ...'})
    speculate: bool = field(
        default=True, metadata={"help": "draft past deferrals where caches can roll back; the text stays the same"}
    )
    temperature: float = field(default=0.0, metadata={"help": "0 is greedy"})
    top_p: float = field(default=1.0, metadata={"help": "nucleus of sampling"})

    def arguments(self) -> dict[str, Any]:
        """
        Arguments of `generate`.

        Raises:
            [`ConfigurationError`]: a threshold and a deferral rate.
        """
        if self.threshold is not None and self.deferral_rate is not None:
            raise ConfigurationError(
                "--threshold and --deferral-rate say two things: the calibration table turns a rate into a threshold. "
                "Pass one of them."
            )
        asked = {
            "threshold": self.threshold,
            "deferral_rate": self.deferral_rate,
            "router": self.router,
            "combiner": self.combiner,
            "speculate": None if self.speculate else False,
        }
        return {name: value for name, value in asked.items() if value is not None} | self.sampling()

    def sampling(self) -> dict[str, Any]:
        """Those of them that are about sampling."""
        if self.temperature == 0.0:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
