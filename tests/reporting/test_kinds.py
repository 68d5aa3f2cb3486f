from __future__ import annotations

from collm.reporting import DeferralStatistics, Token, TokenView, token_kinds


def test_kinds_of_a_solution():
    texts = [
        "Janet",
        " sold",
        " 1",
        "2",
        " *",
        " 3",
        " =",
        " ",
        "36",
        ".",
        "\n",
        "So",
        " Mar",
        "k",
        " has",
        " 5",
        ",0",
        " eggs",
    ]
    assert token_kinds(texts) == [
        "word",  # begins the text: a capital says nothing
        "word",
        "digit",
        "digit",
        "operator",
        "digit",
        "operator",
        "space",
        "digit",
        "punctuation",
        "space",
        "connective",
        "name",
        "word part",
        "function word",
        "digit",
        "digit",
        "word",
    ]
    assert token_kinds(["<|im_end|>", "\\times", "</s>", "$"]) == ["special", "operator", "special", "punctuation"]


def test_statistics_count_deferrals_by_kind_position_and_token():
    views = [TokenView([Token("So", 0), Token(" 4", 1), Token(" 4", 1), Token(" x", 0)]), TokenView([Token(" 4", 0)])]
    statistics = DeferralStatistics.of(views)
    assert statistics.kinds == {"digit": (2, 3), "connective": (0, 1), "word": (0, 1)}
    assert statistics.tokens == {" 4": (2, 3), "So": (0, 1), " x": (0, 1)}
    assert sum(count for _, count in statistics.positions) == 5
    assert statistics.positions[2] == (1, 1)
    assert statistics.positions[0] == (0, 2)
    assert statistics.kind_rows()[0] == {
        "kind": "digit",
        "tokens": 3,
        "of all tokens": "60.0%",
        "of deferred tokens": "100.0%",
        "deferred": "66.7%",
    }
    assert statistics.token_rows() == [{"token": "“␣4”", "tokens": 3, "times deferred": 2, "deferred": "66.7%"}]
    assert len(statistics.position_rows()) == 10


def test_no_views():
    assert DeferralStatistics.of([]).kind_rows() == []
