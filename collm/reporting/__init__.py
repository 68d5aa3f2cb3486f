"""Reports that people look at: tokens by writer in the terminal and in HTML, kinds of deferred tokens, plots."""

from collm.reporting.html import page, table, token_view, write_page
from collm.reporting.kinds import DeferralStatistics, token_kinds
from collm.reporting.terminal import color_tokens
from collm.reporting.view import Token, TokenView, token_texts

__all__ = [
    "DeferralStatistics",
    "Token",
    "TokenView",
    "color_tokens",
    "page",
    "table",
    "token_kinds",
    "token_texts",
    "token_view",
    "write_page",
]
