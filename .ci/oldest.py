"""Constraints for pip: the oldest version that pyproject.toml allows of each package but torch."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
for wanted in (*project["dependencies"], *project["optional-dependencies"]["test"]):
    floor = re.match(r"([\w-]+)>=([\d.]+)", wanted)
    if floor is not None and floor[1] != "torch":
        print(f"{floor[1]}=={floor[2]}")
