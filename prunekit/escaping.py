"""Text from files and folder names, made harmless where it is shown as HTML, as Markdown or on a terminal."""

import unicodedata
from html import escape

_NEEDED = "\n\t\u200c\u200d\u00ad"  # joiners of Persian, Indic scripts and emoji, and the soft hyphen


def html_paragraph(value: object) -> str:
    """The repr of a value as a paragraph of HTML."""
    return f"<p>{escape(repr(value))}</p>"


def in_markdown(text: object) -> str:
    """A text on one line of Markdown: no heading, no HTML, no link and no cell of a table begins in it."""
    line = escape(" ".join(printable(str(text)).split()), quote=False)
    return line.replace("|", "\\|").replace("](", "]\\(")


def in_code(text: object) -> str:
    """A text between backticks of Markdown."""
    return f"`{in_markdown(text).replace('`', chr(39))}`"


def in_fence(text: object) -> str:
    """A text of several lines as a block of code in Markdown."""
    return f"```\n{printable(str(text)).replace('```', chr(39) * 3)}\n```"


def printable(text: str) -> str:
    """A text in which characters that control a terminal, or turn the direction of writing, are written as escapes."""
    return "".join(letter if _is_harmless(letter) else ascii(letter)[1:-1] for letter in text)


def _is_harmless(letter: str) -> bool:
    return letter in _NEEDED or unicodedata.category(letter) not in ("Cc", "Cf", "Cs")
