"""Prints the core dependencies at the oldest versions that pyproject.toml admits."""

import pathlib
import tomllib

project = tomllib.loads(pathlib.Path("pyproject.toml").read_text())["project"]
for dependency in project["dependencies"]:
    print(dependency.replace(">=", "=="))
