r"""
Task metrics: what a generated text is worth, and which answer was read out of it.

A metric is `metric(row, text, truncated) -> Score`: `row` the problem as in the data file, `text` what was generated,
`truncated` whether generation stopped at its length limit. The first value of a score is the metric's headline.

A truncated text has no final answer unless it says so explicitly (`#### 18`, `\boxed{18}`, "the answer is 18"): the
last number of a text cut off in the middle is not an answer that happens to be right or wrong.
"""

from __future__ import annotations

import importlib
import re
import string
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from itertools import takewhile
from pathlib import Path
from typing import Any

from collm.errors import ConfigurationError, DataFormatError, did_you_mean, require

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Score:
    """
    Args:
        values (`dict[str, float]`): metric names to values in [0, 1]; the first is the headline. Empty: a user's metric
            could read no answer, which counts as 0 under every name.
        answer (`str`, *optional*): the answer as read from the text; None where none could be read ("unparsable").
    """

    values: dict[str, float]
    answer: str | None = None


Metric = Callable[[Row, str, bool], Score]


def gsm8k(row: Row, text: str, truncated: bool = False) -> Score:
    """
    GSM8K: 1 if the final number equals the reference's (`#### 18` in `row["answer"]`).

    The answer is the last of `#### number`, `\\boxed{...}` and "answer is ..."; else, in a text that is complete, its
    last number. A `#` elsewhere (a heading, "#### Step 2") is no answer.
    """
    gold = number_answer(str(row.get("answer")))
    if gold is None:
        raise DataFormatError(f"GSM8K needs a number in `answer`; got {row.get('answer')!r}")
    answer = number_answer(text, explicit_only=truncated)
    return Score({"accuracy": float(answer is not None and same_answer(gold, answer))}, answer)


def math(row: Row, text: str, truncated: bool = False) -> Score:
    """
    MATH: 1 if the final answer is mathematically the reference's, by math-verify (exact algebra on parsed LaTeX).

    The reference is the last `\\boxed{}` of `row["solution"]` (of `row["answer"]` where there is no solution). The
    answer is the text's last `\\boxed{}` or "answer is ..."; else, in a complete text, the last formula that
    math-verify reads.
    """
    gold = boxed(str(row.get("solution", ""))) or row.get("answer")
    if gold is None:
        raise DataFormatError("MATH needs `solution` with a \\boxed{} answer, or `answer`")
    answer = boxed(text) or stated(text)
    if answer is not None or truncated:
        return Score({"accuracy": float(answer is not None and same_answer(str(gold), answer))}, answer)
    formulas = _parse(text)  # the last formula, as an expression and as a string
    if not formulas:
        return Score({"accuracy": 0.0}, None)
    return Score({"accuracy": float(_verified(str(gold), formulas))}, str(formulas[-1]))


def bioasq(row: Row, text: str, truncated: bool = False) -> Score:
    """
    BioASQ (task B), by `row["type"]`; the values that a question type does not have are absent from its score.

    - yesno: `yesno_accuracy`.
    - factoid: candidates in order, up to five; `factoid_mrr`, `factoid_lenient` (any of them), `factoid_strict` (the
      first).
    - list: `list_f1`, with `list_precision` and `list_recall`; each reference item counts once, under any of its
      synonyms.
    - summary: `rouge2` and `rougeL` (F measure, the best of the references).

    An answer stands at the beginning of the text: "yes" or "no", or one item per line, as bullets or numbers where
    there are several (a list may do without); what follows after them is explanation.
    """
    kind = row.get("type")
    if kind not in BIOASQ_REFERENCES:
        raise DataFormatError(f'BioASQ has no question type "{kind}"; it has {", ".join(BIOASQ_REFERENCES)}')
    column = BIOASQ_REFERENCES[kind]
    references = row.get(column) or []
    if not any(_flat(references)):
        raise DataFormatError(f"BioASQ needs `{column}` for a {kind} question; got {row.get(column)!r}")
    if kind == "yesno":
        gold = _flat(references)[0].lower()
        found = re.match(r"\W*(yes|no)\b", text, re.IGNORECASE)
        answer = found.group(1).lower() if found else None
        return Score({"yesno_accuracy": float(answer == gold)}, answer)
    if kind == "factoid":
        synonyms = {normalised(name) for name in _flat(references)}
        candidates = items(text)[:5]
        ranks = [rank for rank, candidate in enumerate(candidates, 1) if normalised(candidate) in synonyms]
        values = {
            "factoid_mrr": 1 / ranks[0] if ranks else 0.0,
            "factoid_lenient": float(bool(ranks)),
            "factoid_strict": float(ranks[:1] == [1]),
        }
        return Score(values, "; ".join(candidates) or None)
    if kind == "list":
        wanted = [{normalised(name) for name in _flat(item)} for item in references]
        found_items = items(text, several=True)
        unmatched = list(wanted)
        for item in found_items:
            match = next((r for r in unmatched if normalised(item) in r), None)
            if match is not None:
                unmatched.remove(match)
        hits = len(wanted) - len(unmatched)
        precision = hits / len(found_items) if found_items else 0.0
        recall = hits / len(wanted)
        f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
        values = {"list_f1": f1, "list_precision": precision, "list_recall": recall}
        return Score(values, "; ".join(found_items) or None)
    return Score(rouge(_flat(references), text), text.strip() or None)


def exact_match(row: Row, text: str, truncated: bool = False) -> Score:
    """1 if the text is the reference (`row["answer"]`, else `row["completion"]`) but for case, articles and
    punctuation."""
    gold = row.get("answer", row.get("completion"))
    if gold is None:
        raise DataFormatError("exact_match needs a column `answer` or `completion`")
    answer = text.strip()
    return Score({"exact_match": float(normalised(answer) == normalised(str(gold)))}, answer or None)


BIOASQ_REFERENCES = {
    "yesno": "exact_answer",
    "factoid": "exact_answer",
    "list": "exact_answer",
    "summary": "ideal_answer",
}

METRICS: dict[str, Metric] = {"gsm8k": gsm8k, "math": math, "bioasq": bioasq, "exact_match": exact_match}
METRICS_NEED = {"gsm8k": ["math_verify"], "math": ["math_verify"], "bioasq": ["rouge_score"]}


def get_metric(name: str | Metric) -> Metric:
    """
    The metric of that name, or a user's own as `"module:function"` (the current folder is searched too).

    A user's function takes `(row, text)` and returns a bool, a number, a dict of numbers or a [`Score`]; returning None
    says that no answer could be read.

    Raises:
        [`ConfigurationError`]: no such name, module or function; a package that the metric needs is not installed.
    """
    if callable(name):
        return name
    if name in METRICS:
        for package in METRICS_NEED.get(name, ()):
            require(package, "eval")
        return METRICS[name]
    if ":" not in name:
        allowed = ", ".join(METRICS)
        raise ConfigurationError(
            f'There is no metric "{name}"; there are {allowed}, or your own as "module:function".'
            f"{did_you_mean(name, METRICS)}"
        )
    module_name, function_name = name.split(":", 1)
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(f'the metric "{name}" cannot be imported: {error}') from error
    finally:
        sys.path.remove(folder)
    return _user_metric(function, function_name)


def _user_metric(function: Callable[[Row, str], Any], name: str) -> Metric:
    def metric(row: Row, text: str, truncated: bool = False) -> Score:
        result = function(row, text)
        if isinstance(result, Score):
            return result
        if result is None:
            return Score({}, None)
        if isinstance(result, Mapping):
            return Score({str(key): float(value) for key, value in result.items()}, text)
        return Score({name: float(result)}, text)

    metric.__name__ = name
    return metric


# --- reading answers -------------------------------------------------------------------------------------------------

LONGEST_ITEM = 10  # words of an item that stands on a line of its own, without a bullet
NUMBER = r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|-?\.\d+"
# `#### 18`, `#### $1,200.50`, `#### 18 eggs` on a line of its own; `#### 2. Next step` is a heading.
HASHES = re.compile(rf"^.*?####\s*[$€£]?\s*({NUMBER})\s*%?\s*(?:[A-Za-z]+)?\s*\.?\s*(?:<\|.*)?$", re.MULTILINE)
# "the answer is" anywhere, "Answer:" where a line or a sentence begins ("to find the answer: multiply" is none).
STATED = re.compile(
    r"\banswer\s+is\b(?:\s*:)?"
    r"|(?:^|(?<=[.!?]\s))[^\w\n]*(?:(?:so|thus|hence|therefore)\b[, ]*)?(?:(?:the|my|final)\s+)*answer[ \t*_]*[:=]",
    re.IGNORECASE | re.MULTILINE,
)
# What makes a number in a statement no result yet: "5 + 13, so 18", "20% of 90, which is 18", "3 dozen, or 36".
CALCULATES = re.compile(
    r"(?<=[\s\d])[-+*/×÷→](?=[\s\d$])|[:%]|\b(?:of|times|dozen|hundred|thousand|million|plus|minus|so|which|or)\b"
)
SENTENCE_END = re.compile(r"(?<=\S)\.(?:\s|$)")


def number_answer(text: str, explicit_only: bool = False) -> str | None:
    """The final number of a solution, without thousands separators; an expression where `\\boxed{}` holds one."""
    explicit = [(match.end(), match.group(1)) for match in HASHES.finditer(text)]
    if (box := _last_box(text)) is not None:
        explicit.append(box)
    for end, said in _statements(text):
        if boxed(said) is None and (number := _stated_number(said)) is not None:
            explicit.append((end, number))
    if explicit:
        return _plain(max(explicit)[1])
    numbers = [] if explicit_only else re.findall(NUMBER, text)
    return _plain(numbers[-1]) if numbers else None


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """Where each "answer is" or "Answer:" ends, and what it says, without emphasis: the rest of its line, or the next
    line where that is an answer and not the beginning of a solution."""
    for match in STATED.finditer(text):
        line, _, below = text[match.end() :].partition("\n")
        said = line.strip(" \t*_")
        if not said:
            said = below.strip().partition("\n")[0].strip(" \t*_")
            if not re.match(r"[$\\]", said) and re.search(r"[A-Za-z]{2}.*\s[A-Za-z]{2}", said):
                continue
        yield match.end(), said


def _stated_number(said: str) -> str | None:
    """Of "5 + 3 = 8 eggs" and "8 eggs in 2 days" it is 8, the result or what comes first; else the sentence's last
    number."""
    sentence = SENTENCE_END.split(said)[0]
    before, _, result = sentence.rpartition("=")
    first = re.match(rf"[\s$€£*_\\(]*({NUMBER})", result)
    if first and not CALCULATES.search(result, first.end()):
        return first.group(1)
    numbers = re.findall(NUMBER, result) or re.findall(NUMBER, before)
    return numbers[-1] if numbers else None


def boxed(text: str) -> str | None:
    """Content of the last complete `\\boxed{...}` (braces balanced) or `\\fbox{...}`; None where there is none."""
    box = _last_box(text)
    return box and box[1]


def _last_box(text: str) -> tuple[int, str] | None:
    """Where it begins, and its content."""
    for match in reversed(list(re.finditer(r"\\f?boxed\s*\{|\\fbox\s*\{", text))):
        depth = 1
        for position in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                content = text[match.end() : position].strip()
                return (match.start(), content) if content else None
    return None


def stated(text: str) -> str | None:
    """What follows the last "answer is" or "Answer:" in its sentence; its formula where it begins with one."""
    said = [said for _, said in _statements(text)]
    if not said:
        return None
    sentence = SENTENCE_END.split(said[-1])[0]
    formula = re.match(r"\$+([^$\s](?:[^$]*[^$\s])?)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", sentence)
    answer = next(filter(None, formula.groups())) if formula else sentence
    return answer.strip().lstrip(" *_").rstrip(" *_.") or None


def items(text: str, several: bool = False) -> list[str]:
    """
    The items at the beginning of a text: its bulleted or numbered lines, a line that ends in a colon before them and
    blank lines between them left out. Where there are none, its first line; and where `several` are expected, that
    line cut at commas, semicolons and "and", or, where it has none of these, the first lines as long as they are short.
    """
    lines = [line.strip() for line in text.strip().splitlines()]
    if lines and lines[0].endswith(":"):
        lines = lines[1 + (lines[1:2] == [""]) :]
    bullets = (re.match(r"(?:[-*•]|\d+[.)])\s+(.*\S)", line) for line in lines if line)
    if found := [bullet.group(1).rstrip(".") for bullet in takewhile(bool, bullets) if bullet]:
        return found
    if not several:
        return [line.rstrip(".") for line in lines[:1]]
    found = re.split(r"\s*[;,]\s*(?:and\s+)?|\s+and\s+", lines[0].rstrip(".")) if lines else []
    if len(found) == 1:
        found = list(takewhile(lambda line: 0 < len(line.split()) <= LONGEST_ITEM, lines)) or found
    return [item for line in found if (item := line.rstrip(".,;"))]


def normalised(text: str) -> str:
    """Lower case, without punctuation and articles, single spaces (SQuAD's normalisation)."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def same_answer(gold: str, answer: str) -> bool:
    """Whether two answers are the same: as decimal numbers, as strings, else by math-verify."""
    first, second = _decimal(gold), _decimal(answer)
    if first is not None and second is not None:
        return first == second
    if re.sub(r"\s", "", gold) == re.sub(r"\s", "", answer):
        return True
    return _verified(gold, _parse(f"\\boxed{{{answer}}}"))


def rouge(references: Sequence[str], text: str) -> dict[str, float]:
    """ROUGE-2 and ROUGE-L (F measure, stemmed) against the best reference."""
    from rouge_score.rouge_scorer import RougeScorer

    names = ("rouge2", "rougeL")
    scores = [RougeScorer(names, use_stemmer=True).score(reference, text) for reference in references]
    return {name: max((score[name].fmeasure for score in scores), default=0.0) for name in names}


def _verified(gold: str, answer: list[Any]) -> bool:
    from math_verify import verify

    return bool(answer) and verify(_parse(f"\\boxed{{{gold}}}"), answer, timeout_seconds=_time_limit())


def _parse(text: str) -> list[Any]:
    from math_verify import parse

    return parse(text, parsing_timeout=_time_limit())


def _time_limit() -> int | None:
    # math-verify's time limit is a signal, which only the main thread can have.
    return 5 if threading.current_thread() is threading.main_thread() else None


def _plain(number: str) -> str:
    return number.replace(",", "") if re.fullmatch(NUMBER, number) else number


def _decimal(text: str) -> Decimal | None:
    # Thousands: "1,2" is a list, "1,200" and "1{,}200" are numbers. Units stand behind; between numbers they join none.
    text = re.sub(r"(?<=\d)(?:,(?:\\!)?|\{,\})(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"\\[$%!,;]|[$€£%]", "", re.sub(r"(?:\\text\{[^}]*\}\s*)$", "", text.strip()))
    text = re.sub(r"^([-+])\s+", r"\1", text.strip()).rstrip(".")
    try:
        return Decimal(text) if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)", text) else None
    except InvalidOperation:
        return None


def _flat(answer: Any) -> list[str]:
    """All phrasings of an answer, however deeply a release of the challenge nests them."""
    if isinstance(answer, str):
        return [answer.strip()]
    return [name for part in answer for name in _flat(part)]
