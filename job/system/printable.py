"""Text of others, made harmless for terminals and for CI systems that read commands from a log.

This module imports nothing from the job.
"""

from __future__ import annotations

import re

CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What a terminal obeys or cannot show: control characters except tab and line feed (an escape sequence begins with
one; a carriage return overwrites the line, and ends the markers of GitLab's sections), line separators, marks that
reverse the order of what follows, and halves of surrogate pairs."""
CI_COMMANDS = re.compile(r"^(\s*):(?=:)|#(?=#\w*\[)", re.MULTILINE)
"""What begins a command: `::error::` of GitHub at the start of a line, and anywhere in it `##[error]`, `##vso[...]` of
Azure Pipelines and `##teamcity[...]`."""


def printable(text: str) -> str:
    r"""Return a text whose control characters and CI commands are written as escapes, such as `\x1b`."""
    text = CONTROLS.sub(_escape, text.replace("\r\n", "\n"))
    return CI_COMMANDS.sub(lambda match: match[0][:-1] + _escape(match[0][-1]), text)


def printable_line(text: str) -> str:
    r"""Return a text as one line: like `printable`, and with line feeds as `\n`."""
    return printable(text.replace("\r\n", "\n").replace("\n", "\\n"))


def _escape(found: re.Match[str] | str) -> str:
    code = ord(found if isinstance(found, str) else found[0])
    return {13: "\\r"}.get(code, f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}")
