"""Each package that the code imports is declared in pyproject.toml."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_imported_packages_are_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    declared = {_normal(re.match(r"[\w.-]+", requirement)[0]) for requirement in requirements}
    imported = set()
    for path in (ROOT / "minigpt_pl").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {name.name.split(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.split(".")[0])
    distributions = packages_distributions()
    missing = [
        name
        for name in imported - sys.stdlib_module_names - {"minigpt_pl"}
        if not declared & {_normal(distribution) for distribution in distributions.get(name, [name])}
    ]
    assert {"torch", "yaml", "filelock", "tqdm"} <= imported and not missing


def _normal(name: str) -> str:
    return re.sub("[-_.]+", "-", name).lower()
