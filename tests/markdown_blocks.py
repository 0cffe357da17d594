"""Code blocks and links of Markdown files."""

import re
from typing import NamedTuple

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


class Block(NamedTuple):
    """A Python block, and the output that is shown below it."""

    code: str
    shown: str | None


def fences(text):
    """All fenced blocks: language, content, and what lies between it and the block before."""
    parts = re.split(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return list(zip(parts[1::3], parts[2::3], parts[0::3], strict=False))


def python(text):
    """The Python blocks; a block without a language right below one is its output."""
    found = []
    for language, content, before in fences(text):
        if language == "python":
            found.append(Block(content, None))
        elif not language and found and before == "\n\n" and found[-1].shown is None:
            found[-1] = found[-1]._replace(shown=content)
    return found


def shell(text):
    """The commands of the shell blocks, continued lines joined."""
    joined = [c.replace("\\\n", "") for language, c, _ in fences(text) if language == "sh"]
    return [line for content in joined for line in content.splitlines() if line]


def links(text):
    """Where links and images lead, code left out."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"`[^`\n]*`", "", text)
    return re.findall(r"\]\(([^()\s]+)\)", text)


def assert_close(printed, shown, rtol=0.1):
    """Equal texts, up to the rounding of numbers on another machine."""

    def words(text):
        return re.sub(r"\s+", " ", NUMBER.sub("#", text)).strip()

    assert words(printed) == words(shown)
    pairs = zip(NUMBER.findall(printed), NUMBER.findall(shown), strict=True)
    assert [pair for pair in pairs if not near(*map(float, pair), rtol)] == []


def near(a, b, rtol):
    """Whether two numbers differ by no more than a share, or a unit in the second decimal."""
    return abs(a - b) <= max(rtol * abs(b), 0.015)
