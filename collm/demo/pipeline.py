"""The demonstration: the whole method on two models that are trained on the spot, and what came of it."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from collm.modeling import CoLLMForCausalLM
from collm.reporting.view import TokenView

from .models import make_assistant, make_base
from .problems import Problem, make_problem, make_tokenizer

TRAINING_PROBLEMS, UNSEEN_PROBLEMS, SHOWN = 2000, 200, 4
MAX_NEW_TOKENS = 72
# Of the fine-tuned base and of the collaborating base alike.
FINE_TUNING = {"learning_rate": 1e-3, "num_train_epochs": 3.0, "per_device_train_batch_size": 32}


@dataclass
class Row:
    """
    How one way of writing did on the unseen problems.

    Attributes:
        name (`str`): Of the way.
        solved (`list[bool]`): For each problem, whether its answer was right and in the form asked for.
        deferred (`float`): Share of tokens that the assistant wrote.
    """

    name: str
    solved: list[bool]
    deferred: float = 0.0

    @property
    def exact(self) -> float:
        return sum(self.solved) / len(self.solved)


@dataclass
class Result:
    """
    Attributes:
        rows (`list[Row]`): The table.
        views (`list[TokenView]`): The collaboration's first solutions, token by token.
        seconds (`dict[str, float]`): Time of each stage.
        settings (`dict[str, Any]`): What was run.
    """

    rows: list[Row]
    views: list[TokenView]
    seconds: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


def run(output: Path, seed: int = 0, say: Callable[[str], None] = print, progress: bool = True) -> Result:
    """
    Train, score, initialise, fine-tune, generate; every number in the result is measured on unseen problems.

    1. Pretrain the base on problems with random results, and the assistant on worksheets.
    2. Score the training problems with the assistant.
    3. Fine-tune the base alone, and the base together with a deferral head, on the same problems with equal settings.
    4. Let each model, random deferral and the collaboration solve the unseen problems.

    Args:
        output (`Path`): Folder for the models, the scored data and the report.
        seed (`int`, *optional*, defaults to 0): Of the weights, the pretraining text and all problems.
        say (`Callable[[str], None]`, *optional*): Told what happens next.
        progress (`bool`, *optional*, defaults to `True`): Progress bars.
    """
    clock = Clock(say)
    tokenizer = make_tokenizer()
    folders = {name: str(output / name) for name in ("base", "assistant", "fine-tuned base", "collaborating base")}

    # 1. Two models that know different things.
    clock.start("pretrain the base: the language and the form of word problems, with random results")
    base = save(make_base(tokenizer, seed, progress), tokenizer, folders["base"])
    clock.start("pretrain the assistant: equations, among words in no order")
    assistant = save(make_assistant(tokenizer, seed, progress), tokenizer, folders["assistant"])

    # 2. What the assistant says about the training problems.
    rng = random.Random(f"problems {seed}")
    training = [make_problem(rng) for _ in range(TRAINING_PROBLEMS)]
    seen = {problem.prompt for problem in training}
    unseen = [p for p in (make_problem(rng) for _ in range(2 * UNSEEN_PROBLEMS)) if p.prompt not in seen]
    clock.start(f"score {len(training)} solved problems with the assistant")
    write_problems(training, output / "problems.jsonl")
    score(output / "problems.jsonl", tokenizer, folders["assistant"], output / "scored")

    # 3. The same problems, the same settings: without an assistant and with one.
    clock.start("fine-tune the base alone")
    fine_tune("sft", folders["base"], output / "scored", folders["fine-tuned base"], seed, progress)
    clock.start("fine-tune the base and its deferral head on the marginal likelihood")
    fine_tune("marginal_likelihood", folders["base"], output / "scored", folders["collaborating base"], seed, progress)

    # 4. Who solves what.
    clock.start(f"solve {UNSEEN_PROBLEMS} unseen problems in five ways")
    tuned = LlamaForCausalLM.from_pretrained(folders["fine-tuned base"])
    model = CoLLMForCausalLM.from_pretrained(folders["collaborating base"])
    problems = unseen[:UNSEEN_PROBLEMS]
    together, views = solve("collaboration", problems, tokenizer, model, assistant)
    by_chance = {"name": "random", "rate": together.deferred}
    torch.manual_seed(seed)
    rows = [
        solve("base", problems, tokenizer, base)[0],
        solve("fine-tuned base", problems, tokenizer, tuned)[0],
        solve("assistant", problems, tokenizer, assistant)[0],
        solve("random deferral", problems, tokenizer, model, assistant, router=by_chance)[0],
        together,
    ]
    clock.stop()
    settings = {"seed": seed, "training problems": len(training), "threshold": model.config.deferral.threshold}
    return Result(rows, views[:SHOWN], clock.seconds, settings)


def write_problems(problems: list[Problem], path: Path) -> None:
    """One JSON object per line, in the form that `collm score` reads."""
    rows = [{"prompt": problem.prompt, "completion": problem.solution} for problem in problems]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def score(path: Path, tokenizer: PreTrainedTokenizerFast, assistant: str, output: Path) -> None:
    """What `collm score` does."""
    from collm.data.formatting import format_rows
    from collm.data.reading import read_rows
    from collm.data.scoring import score_dataset

    formatted, report = format_rows(read_rows(path), tokenizer)
    score_dataset(formatted, tokenizer, [assistant], output, report=report)


def fine_tune(objective: str, model: str, data: Path, output: str, seed: int, progress: bool) -> None:
    """What `collm train` does with these settings; Z-initialisation comes first where there is a head."""
    from collm.training.arguments import TrainArguments
    from collm.training.train import train

    arguments: dict[str, Any] = {
        **FINE_TUNING,
        "model": model,
        "data": str(data),
        "objective": objective,
        "output_dir": output,
        "seed": seed,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": not progress,
    }
    train(TrainArguments(**arguments))


def solve(
    name: str,
    problems: list[Problem],
    tokenizer: PreTrainedTokenizerFast,
    model: Any,
    assistant: Any = None,
    **options: Any,
) -> tuple[Row, list[TokenView]]:
    """Let a model solve the problems, alone or with an assistant; greedy, all of them in one batch."""
    inputs = tokenizer([p.prompt for p in problems], padding=True, return_tensors="pt", return_token_type_ids=False)
    if assistant is not None:
        options |= {"assistant": assistant}
    output = model.generate(
        **inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, return_dict_in_generate=True, **options
    )
    new = output.sequences[:, inputs["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(new, skip_special_tokens=True)
    row = Row(name, [problem.is_solved_by(text) for problem, text in zip(problems, texts, strict=True)])
    if assistant is None:
        return row, []
    row.deferred = ((output.source > 0).sum() / (output.source >= 0).sum()).item()
    views = [
        TokenView.from_ids(
            tokenizer,
            new[i].tolist(),
            output.source[i].tolist(),
            output.deferral_probs[i].tolist(),
            title=f"Problem {i + 1}",
            prompt=problem.prompt,
            note=f"right answer: {problem.answer}",
        )
        for i, problem in enumerate(problems)
    ]
    return row, views


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: str) -> LlamaForCausalLM:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


class Clock:
    """Says what starts and remembers how long it took."""

    def __init__(self, say: Callable[[str], None]):
        self.say, self.stage, self.began = say, "", 0.0
        self.seconds: dict[str, float] = {}

    def start(self, stage: str) -> None:
        self.stop()
        self.say(f"{len(self.seconds) + 1}. {stage}")
        self.stage, self.began = stage, time.perf_counter()

    def stop(self) -> None:
        if self.stage:
            self.seconds[self.stage] = time.perf_counter() - self.began
