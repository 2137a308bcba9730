"""Escape untrusted text for Markdown, so that it is shown as text and not as markup."""

import re


def literal(text) -> str:
    """Return Markdown that shows untrusted text in one line: as code, unless it is a number or plain words."""
    is_number = isinstance(text, (int, float))
    text = str(text)
    return text if is_number or re.fullmatch(r"[^\W_]+([ _-][^\W_]+)*", text) else code(text)


def code(text: str) -> str:
    """Return Markdown that shows text as code in a line. White space and control characters become single spaces."""
    text = " ".join("".join(each if each.isprintable() else " " for each in text).split()) or " "
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if "`" in (text[0], text[-1]) else ""
    return f"{ticks}{space}{text}{space}{ticks}"


def code_block(language: str, text: str) -> str:
    """Return Markdown for a block of code, with a fence longer than any in the text."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"
