from __future__ import annotations

import pytest

from collm.errors import ConfigurationError, DataFormatError
from collm.evaluation import metrics
from collm.evaluation.metrics import bioasq, boxed, get_metric, gsm8k, items, math, number_answer, same_answer

REFERENCE = "She has 3 * 6 = <<3*6=18>>18.\n#### 18"


def gsm8k_accuracy(text: str, truncated: bool = False) -> float:
    return gsm8k({"answer": REFERENCE}, text, truncated).values["accuracy"]


@pytest.mark.parametrize(
    "text",
    [
        "3 * 6 = 18\n#### 18",
        "#### $18.00",
        "#### 18 dollars.",
        "#### 18<|im_end|>",
        "first #### 17\nno, #### 18",
        "so \\boxed{18} eggs, on 2 days",
        "so \\(\\boxed{\\$18}\\)",
        "\\boxed{\\frac{36}{2}}",
        "so \\fbox{18} eggs, on 2 days",
        "The answer is 18. It took 5 steps",
        "Answer: $18",
        "**Final answer: 18**",
        "**Final answer**: 18",
        "He has 2. Answer: 18",
        "The answer is $\\boxed{18}$ dollars for 2 days.",
        "The final answer is \\boxed{\\frac{36}{2}}.",
        "The answer is 18 dollars for 2 days.",
        "The answer is 3 * 6 = 18 in 2 days.",
        "To find the answer: multiply 3 by 6.\n3 * 6 = 18",
        "The answer is 5 + 13, so 18.",
        "The answer is 20% of 90, which is 18.",
        "The answer is 1 dozen and a half, or 18 eggs.",
        "The answer is 5 + 13 → 18",
        "**Answer**:\nTom has 5 apples and buys 13.\n5 + 13 = 18",
        "**Answer:**\n\n18 eggs\n\nThat took 5 steps",
        "Thus, the answer: 18. It took 5 steps",
        "So the final answer = $18 in 2 days",
        "In total she has 18.",
        "In total she makes $18 every day.",
    ],
)
def test_gsm8k_reads_the_answer(text):
    assert gsm8k_accuracy(text) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "#### 19",
        "# 18 is not it\nthe answer is 7",
        "18\n#### 2. Next step\n7",
        "\\boxed{180}",
        "She has 18 of 20.",
        "The answer is \\boxed{1} after 18",
        "",
        "no number",
        "-18",
        "1,800",
    ],
)
def test_gsm8k_is_not_fooled(text):
    assert gsm8k_accuracy(text) == 0.0


def test_stray_hashes_do_not_count_as_an_answer():
    assert number_answer("####") is None
    assert number_answer("#### Step 18", explicit_only=True) is None
    assert number_answer("# 18", explicit_only=True) is None


def test_truncated_text_has_only_the_answer_that_it_states():
    assert gsm8k_accuracy("6 hens lay 18", truncated=False) == 1.0
    cut = gsm8k({"answer": REFERENCE}, "6 hens lay 18", truncated=True)
    assert cut.values == {"accuracy": 0.0}
    assert cut.answer is None
    assert gsm8k_accuracy("#### 18\nand then she", truncated=True) == 1.0


@pytest.mark.parametrize("row", [{"answer": "none"}, {}])
def test_gsm8k_refuses_a_reference_without_a_number(row):
    with pytest.raises(DataFormatError, match="number"):
        gsm8k(row, "1")


@pytest.mark.parametrize(
    ("gold", "answer", "same"),
    [
        ("1200", "1,200", True),
        ("12", "1,2", False),
        ("0.5", "\\frac{1}{2}", True),
        ("\\frac{14}{3}", "14/3", True),
        ("(3, \\frac{\\pi}{2})", "\\left(3,\\frac{\\pi}{2}\\right)", True),
        ("x^2 - 1", "(x-1)(x+1)", True),
        ("x^2 - 1", "(x-1)(x+2)", False),
        ("\\text{Evelyn}", "Evelyn", True),
        ("50\\%", "50", True),
        ("10{,}000", "10000", True),
        ("\\$1,200.50", "1{,}200.5", True),
        ("12 \\text{ cm}", "12", True),
        ("5 \\text{ or } 6", "56", False),
    ],
)
def test_same_answer(gold, answer, same):
    assert same_answer(gold, answer) is same


def test_math_takes_the_reference_from_the_solution():
    row = {"solution": "so $\\boxed{\\frac{14}{3}}$.", "answer": "mangled"}
    assert math(row, "we get \\boxed{\\dfrac{14}{3}}").values["accuracy"] == 1.0
    assert math(row, "The answer is $\\frac{14}{3}$.").values["accuracy"] == 1.0
    assert math(row, "Hence it is $\\frac{14}{3}$").values["accuracy"] == 1.0
    assert math(row, "**Final Answer: 14/3**").answer == math(row, "Answer: __14/3.__").answer == "14/3"
    assert math({"answer": "0.5"}, "The answer is **.5**.").values["accuracy"] == 1.0
    assert math({"answer": "12"}, "The answer is 12. We used x = 3.").answer == "12"
    assert math({"answer": "12"}, "The answer is $12$, as $x = 3$.").answer == "12"
    assert math({"answer": "12"}, "Answer: \\(12\\) and no more").answer == "12"
    assert math({"answer": "12"}, "**Answer:**\n$$12$$").answer == "12"
    assert math({"answer": "7"}, "The answer is the smallest $n$, namely 7.").answer != "n"
    assert math({"answer": "18"}, "The answer is $18 and not $20.").answer == "$18 and not $20"
    cut = math(row, "Hence $\\frac{14}{3}$ plus", truncated=True)
    assert cut.answer is None
    assert cut.values["accuracy"] == 0.0
    assert math(row, "I do not know").answer is None
    assert math({"answer": "7"}, "\\boxed{7}").values["accuracy"] == 1.0
    with pytest.raises(DataFormatError):
        math({}, "7")


def test_boxed_balances_braces():
    assert boxed("\\boxed{1} then \\boxed{\\frac{1}{2}} end") == "\\frac{1}{2}"
    assert boxed("\\boxed{3} and \\boxed{\\frac{1}{2") == "3"
    assert boxed("none") is None


def test_bioasq_yes_no():
    row = {"type": "yesno", "exact_answer": "Yes"}
    assert bioasq(row, "yes\nBecause no enzyme ...").values == {"yesno_accuracy": 1.0}
    assert bioasq(row, "**No**, it is not").values == {"yesno_accuracy": 0.0}
    assert bioasq(row, "Nobody knows").answer is None


def test_bioasq_factoid_rank():
    row = {"type": "factoid", "exact_answer": [["The BRCA1 gene", "BRCA1"]]}
    first = bioasq(row, "BRCA1\nIt is a gene.").values
    assert first == {"factoid_mrr": 1.0, "factoid_lenient": 1.0, "factoid_strict": 1.0}
    third = bioasq(row, "1. TP53\n2. MYC\n3. brca1 gene\nExplanation").values
    assert third == {"factoid_mrr": pytest.approx(1 / 3), "factoid_lenient": 1.0, "factoid_strict": 0.0}
    sixth = bioasq(row, "\n".join(f"- x{i}" for i in range(5)) + "\n- BRCA1").values
    assert sixth == {"factoid_mrr": 0.0, "factoid_lenient": 0.0, "factoid_strict": 0.0}


def test_bioasq_list_counts_each_reference_once():
    row = {"type": "list", "exact_answer": [["aspirin", "ASA"], ["ibuprofen"], "naproxen"]}
    values = bioasq(row, "- ASA\n- Aspirin\n- ibuprofen\nThese are drugs.").values
    assert values["list_precision"] == pytest.approx(2 / 3)
    assert values["list_recall"] == pytest.approx(2 / 3)
    assert values["list_f1"] == pytest.approx(2 / 3)
    assert bioasq(row, "aspirin, ibuprofen and naproxen").values["list_f1"] == 1.0
    empty = bioasq(row, "")
    assert empty.answer is None
    assert empty.values["list_f1"] == 0.0


def test_bioasq_summary_takes_the_best_reference():
    pytest.importorskip("rouge_score")
    row = {"type": "summary", "ideal_answer": ["unrelated words", "the heart pumps blood"]}
    assert bioasq(row, "The heart pumps blood.").values == {"rouge2": 1.0, "rougeL": 1.0}


@pytest.mark.parametrize("row", [{"type": "multi"}, {}])
def test_bioasq_refuses_unknown_types(row):
    with pytest.raises(DataFormatError, match="yesno"):
        bioasq(row, "")


@pytest.mark.parametrize("kind", ["yesno", "factoid", "list", "summary"])
def test_bioasq_refuses_questions_without_an_answer(kind):
    for answers in ({}, {"exact_answer": [[]], "ideal_answer": []}, {"exact_answer": None, "ideal_answer": ""}):
        with pytest.raises(DataFormatError, match=f"_answer` for a {kind} question"):
            bioasq({"type": kind, **answers}, "yes")


def test_items():
    assert items("1) a b.\n2) c\n\nrest") == ["a b", "c"]
    assert items("one line, with commas") == ["one line, with commas"]
    assert items("") == []
    assert items("- a\n\n- b\nrest") == ["a", "b"]
    assert items("These are:\n\n* a\n* b\n\nrest", several=True) == ["a", "b"]
    assert items("a b\nc.\nd\n\nrest of it", several=True) == ["a b", "c", "d"]
    explained = "\nThese are all that anybody has found so far in any of the studies."
    assert items("a, b and c" + explained, several=True) == ["a", "b", "c"]
    assert items("a\nb" + explained, several=True) == ["a", "b"]
    assert items("a, b and c\nThese are short.", several=True) == ["a", "b", "c"]


def test_unknown_metric_names_the_closest():
    with pytest.raises(ConfigurationError, match='Did you mean "gsm8k"'):
        get_metric("gsm8")
    with pytest.raises(ConfigurationError, match="cannot be imported"):
        get_metric("no_such_module_here:f")


def test_a_metric_says_at_once_what_is_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name, package in (("gsm8k", "math-verify"), ("math", "math-verify"), ("bioasq", "rouge-score")):
        with pytest.raises(ConfigurationError, match=rf"{package} is not installed: pip install 'collm\[eval\]'"):
            get_metric(name)


def test_user_metric(tmp_path, monkeypatch):
    (tmp_path / "my_metric_module.py").write_text(
        "def length(row, text):\n    return len(text) == row['n']\n"
        "def parts(row, text):\n    return {'a': 1, 'b': 0.5} if text else None\n"
    )
    monkeypatch.chdir(tmp_path)
    assert get_metric("my_metric_module:length")({"n": 2}, "ab", False).values == {"length": 1.0}
    parts = get_metric("my_metric_module:parts")
    assert parts({}, "x", False).values == {"a": 1.0, "b": 0.5}
    assert parts({}, "", False) == metrics.Score({}, None)
    with pytest.raises(ConfigurationError, match="missing"):
        get_metric("my_metric_module:missing")
