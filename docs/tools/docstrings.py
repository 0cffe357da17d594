"""Reads the docstrings as mkdocstrings expects them: examples as code, references as a list."""

import re

import griffe


def tidy(text: str) -> str:
    """A docstring whose examples are a section of griffe's, and whose references are a list.

    A reference ends with a line that ends with its address.
    """
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
    match = re.search(r"^References:\n((?:    .*\n?)+)", text, re.MULTILINE)
    if match is None:
        return text
    items, lines = [], []
    for line in match[1].splitlines():
        lines.append(line.strip())
        if re.search(r"https?://\S+$", line):
            items.append(" ".join(lines))
            lines = []
    items += [" ".join(lines)] if lines else []
    listed = "**References**\n\n" + "\n".join(f"- {item}" for item in items) + "\n"
    return text[: match.start()] + listed + text[match.end() :]


class Docstrings(griffe.Extension):
    """Applies `tidy` to every docstring."""

    def on_object(self, *, obj, **kwargs):
        if obj.docstring is not None:
            obj.docstring.value = tidy(obj.docstring.value)
