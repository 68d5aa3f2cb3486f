"""`collm eval`: how good, how often deferred, how fast; on a task, or as perplexity."""

from __future__ import annotations

import dataclasses
import json
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from collm.evaluation.options import DataOptions, DecodingOptions, ModelOptions

HELP = "measure quality, deferral rate and cost on a task; a killed run goes on"
EXAMPLE = """
collm eval my-checkpoint --assistant Qwen/Qwen2.5-Coder-1.5B-Instruct --data gsm8k/dev.jsonl --task gsm8k \\
    --deferral-rate 0.2 --output results/rate20
collm eval my-checkpoint --data gsm8k/dev.jsonl --task gsm8k --alone base --output results/base
collm eval my-checkpoint --data mine.jsonl --metric my_module:my_metric --output results/mine
collm eval my-checkpoint --data gsm8k/dev.jsonl --task gsm8k --perplexity --output results/perplexity
collm eval my-checkpoint --data question.jsonl --task mt_bench --max-new-tokens 1024 --output results/mt-bench
"""


@dataclass
class EvalOptions:
    """What is measured and where it goes."""

    output: str = field(metadata={"help": "folder for generations.jsonl, results.json and report.html"})
    metric: str | None = field(
        default=None, metadata={"help": 'gsm8k, math, bioasq, exact_match or "module:function"; default: the task\'s'}
    )
    alone: str | None = field(
        default=None,
        metadata={
            "help": "one model writes everything: the base or the (first) assistant",
            "choices": ["base", "assistant"],
        },
    )
    perplexity: bool = field(
        default=False, metadata={"help": "score the reference answers instead: base, assistants and mixture"}
    )
    server: str | None = field(
        default=None,
        metadata={"help": "URL of a running `collm serve` (or any OpenAI-compatible server) that writes instead"},
    )
    examples: int = field(default=20, metadata={"help": "texts shown in report.html"})


Arguments = (ModelOptions, DataOptions, DecodingOptions, EvalOptions)


def run(models: ModelOptions, data: DataOptions, decoding: DecodingOptions, options: EvalOptions) -> int:
    """Generate what is missing, score, print a table; the last line on standard output is one JSON object."""
    from collm.errors import ConfigurationError

    if options.perplexity:
        results = _perplexity(models, data)
    elif data.task == "mt_bench":
        results = _mt_bench(models, data, decoding, options)
    else:
        metric = options.metric or data.default_metric()
        if metric is None:
            raise ConfigurationError("no metric: pass --metric, or --task gsm8k, math or bioasq, or --perplexity")
        results = _task(models, data, decoding, options, metric)
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in results.items() if key not in ("records", "settings")}))
    return 0


def _task(
    models: ModelOptions, data: DataOptions, decoding: DecodingOptions, options: EvalOptions, metric_name: str
) -> dict[str, Any]:
    from collm.evaluation.generations import GenerationStore
    from collm.evaluation.metrics import get_metric
    from collm.evaluation.runner import check_references, generate_all, summarise

    metric = get_metric(metric_name)
    arguments = decoding.sampling() if options.alone else decoding.arguments()
    with closing(_team(models, data, options, arguments)) as team:
        problems = data.problems(team.tokenizer)
        check_references(problems, metric)
        settings = {"checkpoint": models.checkpoint, "decoding": arguments, "names": team.names, "alone": options.alone}
        settings |= data.settings(problems) | team.identity
        store = GenerationStore(Path(options.output) / "generations.jsonl", settings)
        generations = generate_all(team.writer, problems, store, data.batch_size, f"{metric_name} x {len(problems)}")
        results = summarise(problems, generations, metric, team.parameters)
    _print_table(results)
    if options.examples:
        _write_report(Path(options.output) / "report.html", problems, generations, results, team, options)
    return {**results, "metric": metric_name, "settings": settings}


def _team(models: ModelOptions, data: DataOptions, options: EvalOptions, arguments: dict[str, Any]) -> Any:
    """Whoever writes, its options set. In transformers, a model that writes alone is loaded alone."""
    from collm.data.tokenizers import check_same_tokenizer, load_tokenizer
    from collm.errors import ConfigurationError
    from collm.evaluation.generations import weights_fingerprint
    from collm.evaluation.loading import Team, load_base, load_plain, num_parameters, short_name
    from collm.evaluation.runner import ModelWriter

    if options.server:
        from collm.evaluation.server import ServerWriter

        if options.alone == "assistant":
            raise ConfigurationError(
                "--alone assistant: a server of the pair has no way to ask for it; without --alone, "
                "--server can be the URL of the assistant's own server"
            )
        if options.alone:
            arguments = {**arguments, "threshold": 1.0}  # never defers
        tokenizer = load_tokenizer(models.checkpoint)
        written: Any = ServerWriter(options.server, tokenizer, arguments, data.max_new_tokens, data.seed)
        names = [short_name(name) for name in (models.checkpoint, *([] if options.alone else models.assistant))]
        return Team(None, tokenizer, names, written, [], [], {"server": written.model}, [written])
    if options.alone == "assistant" and not models.assistant:
        raise ConfigurationError("--alone assistant needs --assistant NAME")
    if options.alone and models.engine == "transformers":
        base = options.alone == "base"
        name = models.checkpoint if base else models.assistant[0]
        model = (load_base if base else load_plain)(name, models.dtype, models.device)
        tokenizer = load_tokenizer(models.checkpoint)
        if not base:  # it gets the base's prompts
            check_same_tokenizer(tokenizer, name, base_name=models.checkpoint)
        writer = ModelWriter(model, tokenizer, (), arguments, data.max_new_tokens, data.seed)
        identity = {"weights": [weights_fingerprint(model)], "dtype": str(model.dtype)}
        return Team(model, tokenizer, [short_name(name)], writer, [writer], [num_parameters(model)], identity)
    team = models.team(data)
    if options.alone:
        k = ("base", "assistant").index(options.alone)
        team.writer, team.names, team.parameters = team.alone[k], team.names[k : k + 1], team.parameters[k : k + 1]
    else:
        deferral, rate = team.model.config.deferral, arguments.get("deferral_rate")
        default = deferral.threshold if rate is None else deferral.threshold_for_rate(rate)
        team.identity["threshold"] = arguments.get("threshold", default)
    team.writer = dataclasses.replace(team.writer, options=arguments)
    return team


def _perplexity(models: ModelOptions, data: DataOptions) -> dict[str, Any]:
    from collm.evaluation.likelihood import perplexity, score_texts
    from collm.evaluation.loading import load_models

    loaded = load_models(models.checkpoint, models.assistant, models.dtype, models.device)
    texts = _references(data, loaded.tokenizer)
    results = perplexity(score_texts(loaded.model, loaded.assistants, texts))
    for name, value in results.items():
        if isinstance(value, dict):
            print(
                f"{name:<12} {value['nats_per_token']:.4f} nats/token, perplexity {value['perplexity']:.3f} "
                f"[{value['low']:.3f}, {value['high']:.3f}]"
            )
    asked = ("data", "task", "instruction", "system_prompt", "chat_template", "raw")
    return {**results, "settings": {**dataclasses.asdict(models), **{name: getattr(data, name) for name in asked}}}


def _references(data: DataOptions, tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """Token ids and labels of the reference answers, as training formats them."""
    from datasets import Dataset

    from collm.data.chat import Chat
    from collm.data.formatting import format_rows
    from collm.data.tasks import get_task
    from collm.evaluation.runner import put

    convert = get_task(data.task) if data.task else dict
    conversations = bool(Chat(tokenizer, data.chat_template).template) and not data.raw

    def asked(row: dict[str, Any]) -> dict[str, Any]:
        made = convert(row)
        return dict(made) if "text" in made else put(made, conversations, data.instruction, data.system_prompt)

    rows, task = data.rows(), data.task
    if conversations or data.instruction or data.system_prompt is not None:
        rows, task = (rows, asked) if task else ([asked(row) for row in rows], None)  # type: ignore[assignment]
    formatted, report = format_rows(Dataset.from_list(rows), tokenizer, task, chat_template=data.chat_template)
    print(report)
    return [(row["input_ids"], row["labels"]) for row in formatted]


def _mt_bench(
    models: ModelOptions, data: DataOptions, decoding: DecodingOptions, options: EvalOptions
) -> dict[str, Any]:
    from collm.evaluation.mt_bench import answer_questions

    arguments = {} if options.alone else decoding.arguments()
    with closing(_team(models, data, options, arguments)) as team:
        settings = {**team.identity, "names": team.names, "decoding": arguments}
        path = answer_questions(data, team.writer, team.tokenizer, Path(options.output), settings)
    print(f"answers for FastChat's judge: {path}")
    return {"answers": str(path), "questions": len(data.rows()), "settings": settings}


def _print_table(results: dict[str, Any]) -> None:
    for name, value in results["metrics"].items():
        print(f"{name:<18} {value['mean']:.1%} [{value['low']:.1%}, {value['high']:.1%}] of {value['n']}")
    print(
        f"{'deferred':<18} {results['deferral_rate']:.1%} of {results['tokens']} tokens\n"
        f"{'truncated':<18} {results['truncated']} of {results['problems']} (no answer unless one is stated)\n"
        f"{'unparsable':<18} {results['unparsable']} of {results['problems']}\n"
        f"{'time':<18} {results['seconds_per_token'] * 1000:.1f} ms per token"
    )


def _write_report(
    path: Path, problems: list, generations: list, results: dict[str, Any], team: Any, options: EvalOptions
) -> None:
    from collm.reporting import DeferralStatistics, TokenView, table, token_view, write_page
    from collm.reporting.html import heading, paragraph

    views = [
        TokenView.from_ids(
            team.tokenizer, g.token_ids, g.source, g.deferral_probs or None, names=team.names, title=f"Problem {p.id}",
            prompt=p.prompt, note=_verdict(record),
        )
        for p, g, record in zip(problems, generations, results["records"], strict=True)
    ]  # fmt: skip
    rows = [
        {
            "metric": name,
            "mean": f"{v['mean']:.1%}",
            "95% interval": f"{v['low']:.1%} – {v['high']:.1%}",
            "problems": v["n"],
        }
        for name, v in results["metrics"].items()
    ]
    counts = {key: results[key] for key in ("problems", "truncated", "unparsable", "tokens")}
    parts = [table(rows), table([{**counts, "deferred": f"{results['deferral_rate']:.1%}"}])]
    if len(team.names) > 1:
        statistics = DeferralStatistics.of(views)
        parts += [heading("Which tokens are deferred"), table(statistics.kind_rows(), "by kind")]
        parts += [
            table(statistics.token_rows(), "deferred most often"),
            table(statistics.position_rows(), "by position"),
        ]
    parts += [heading("Texts"), paragraph(f"The first {min(len(views), options.examples)} of {len(views)}.")]
    write_page(path, " + ".join(team.names), *parts, *(token_view(view) for view in views[: options.examples]))


def _interval(value: dict[str, Any]) -> str:
    return f"{value['low']:.1%} – {value['high']:.1%}"


def _verdict(record: dict[str, Any]) -> str:
    scores = ", ".join(f"{name} {value:.3g}" for name, value in record["scores"].items())
    answer = "no answer could be read" if record["answer"] is None else f"answer read: {record['answer']}"
    return f"{scores}; {answer}" + ("; truncated" if record["truncated"] else "")
