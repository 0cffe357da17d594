"""Runs Python blocks of a Markdown file by their numbers, each by itself."""

import pathlib
import re
import sys

text = pathlib.Path(sys.argv[1]).read_text()
blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
for number in map(int, sys.argv[2:]):
    exec(compile(blocks[number], f"block {number}", "exec"), {"__name__": "block"})
