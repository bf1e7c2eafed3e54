"""Does the tree keep the house rules that no linter checks: names, sizes, imports, defaults?"""

import ast
import itertools
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("vlm", "connectors", "data_recipes", "train", "eval", "demo")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80

# Top-level names of packages that an extra, or a user's environment, may bring.
NOT_INSTALLED = {
    *(
        "av",
        "bitsandbytes",
        "cv2",
        "datasets",
        "decord",
        "deepspeed",
        "evaluate",
        "gradio",
        "llava",
    ),
    *("lmms_eval", "mamba_ssm", "open_clip", "peft", "trl", "wandb", "vllm"),
}

SOURCES = sorted(path for name in (*PACKAGES, "tests") for path in (ROOT / name).rglob("*.py"))
TREES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in SOURCES}
OURS = {name: tree for name, tree in TREES.items() if not name.startswith("tests/")}

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


# The rules: each takes a syntax tree and yields (line, what is wrong).


def functions_too_long(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, FunctionNode) and node.name != "forward":
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                yield node.lineno, f"{node.name} has {lines} lines"


def guessed_config_values(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """getattr(config, "name", default) hides a misspelt or missing field."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id="getattr"), args=[target, _, _]):
                last = target.attr if isinstance(target, ast.Attribute) else ast.unparse(target)
                if re.search(r"(^|_)(config|cfg)$", last):
                    yield node.lineno, f"getattr on {ast.unparse(target)} with a default"


def swallowed_errors(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        match node:
            case ast.ExceptHandler(type=None):
                yield node.lineno, "bare except"
            case ast.ExceptHandler(
                type=ast.Name(id="Exception" | "BaseException"),
                body=[ast.Pass() | ast.Continue() | ast.Expr(value=ast.Constant())],
            ):
                yield node.lineno, "every exception is swallowed"


def star_imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
            yield node.lineno, f"from {node.module} import *"


def trainer_imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module=str(module), names=names) if module.startswith(
                "transformers"
            ):
                for alias in names:
                    if "Trainer" in alias.name or alias.name == "TrainingArguments":
                        yield node.lineno, f"from {module} import {alias.name}"


def findings(rule, trees: dict[str, ast.Module]) -> list[str]:
    return [f"{name}:{line}: {what}" for name, tree in trees.items() for line, what in rule(tree)]


EVERYWHERE = [functions_too_long, guessed_config_values, swallowed_errors, star_imports]


@pytest.mark.parametrize("rule", EVERYWHERE)
def test_rule_holds_everywhere(rule):
    assert findings(rule, TREES) == []


def test_the_model_does_not_know_the_trainer():
    below = {name: tree for name, tree in OURS.items() if name.startswith(("vlm/", "connectors/"))}
    assert findings(trainer_imports, below) == []


BROKEN = {
    functions_too_long: ["def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES],
    guessed_config_values: [
        'getattr(self.config, "depth", 2)',
        'getattr(text_config, "depth", None)',
        'getattr(cfg, name, "mlp")',
    ],
    swallowed_errors: [
        "try:\n    f()\nexcept:\n    raise",
        "try:\n    f()\nexcept Exception:\n    pass",
        "for x in y:\n    try:\n        f()\n    except BaseException:\n        continue",
    ],
    star_imports: ["from torch.nn import *"],
    trainer_imports: [
        "from transformers import Trainer",
        "def f():\n    from transformers.training_args import TrainingArguments",
    ],
}
HONEST = {
    functions_too_long: [
        "def f():\n" + "    x = 1\n" * (MAX_FUNCTION_LINES - 1),
        "class M:\n    def forward(self):\n" + "        x = 1\n" * 100,
    ],
    guessed_config_values: [
        'getattr(config, "depth")',
        'getattr(module, "depth", None)',
        'getattr(self.config.text_config.rope, "theta", 1.0)',
        'config.get("depth", 2)',
    ],
    swallowed_errors: [
        "try:\n    f()\nexcept KeyError:\n    pass",
        "try:\n    f()\nexcept Exception as error:\n    raise UserError('no') from error",
    ],
    star_imports: ["from torch.nn import Linear", "print(*names)"],
    trainer_imports: ["from transformers import AutoConfig", "from train.trainer import Trainer"],
}


@pytest.mark.parametrize("rule", [*EVERYWHERE, trainer_imports])
def test_rules_hit_what_they_mean_and_nothing_else(rule):
    assert all(len(list(rule(ast.parse(code)))) == 1 for code in BROKEN[rule])
    assert all(list(rule(ast.parse(code))) == [] for code in HONEST[rule])


def test_every_file_begins_with_a_docstring():
    def begins(tree: ast.Module) -> bool:
        return bool(ast.get_docstring(tree)) and tree.body[0].lineno == 1

    assert [name for name, tree in TREES.items() if not begins(tree)] == []


def test_no_file_is_too_long():
    lines = {name: (ROOT / name).read_text().count("\n") for name in TREES}
    assert {name: count for name, count in lines.items() if count > MAX_FILE_LINES} == {}


def test_no_module_is_named_like_the_standard_library_or_a_dependency():
    """`python eval/cli.py` puts eval/ first on the path: its datasets.py would be `datasets`."""
    installed = {
        name
        for name, distributions in packages_distributions().items()
        if set(distributions) != {"vlm-suite"}
    }
    taken = (sys.stdlib_module_names | installed | NOT_INSTALLED) - {"__main__"}
    # A folder below a package is a module too; the package itself is a name that we chose.
    named = {name: Path(name).stem for name in OURS if not name.endswith("__init__.py")}
    named |= {
        name: Path(name).parent.name for name in OURS if re.search(r"/.*/__init__\.py$", name)
    }
    assert {name for name, stem in named.items() if stem in taken} == set()


def test_no_installed_package_owns_one_of_our_top_level_names():
    owners = packages_distributions()
    foreign = {name: set(owners.get(name, ())) - {"vlm-suite"} for name in PACKAGES}
    assert {name: dists for name, dists in foreign.items() if dists} == {}


def test_the_six_packages_are_the_ones_that_are_installed_and_checked():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    tools = project["tool"]
    found = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert found == set(PACKAGES)
    assert set(tools["hatch"]["build"]["targets"]["wheel"]["packages"]) == found
    assert set(tools["importlinter"]["root_packages"]) == found
    assert set(tools["pyright"]["include"]) == found


def test_import_contracts_hold():
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stdout[-3000:]
    assert "0 broken" in process.stdout


def test_pins_agree():
    """constraints.txt pins every package that pyproject.toml names, and to the same version."""

    def normal(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pins = {normal(name): version for name, version in pins.items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    for requirement in itertools.chain(*groups):
        name, _, version = requirement.partition("==")
        assert normal(name) in pins, requirement
        assert not version or pins[normal(name)] == version, requirement


def test_readme_lists_every_file():
    """`- path: five words` between the markers, as long as the README has such a list."""
    text = (ROOT / "README.md").read_text()
    listing = re.search(r"<!-- files -->(.*)<!-- /files -->", text, flags=re.DOTALL)
    if listing is None:
        pytest.skip("README.md has no list of files")
    listed = set(re.findall(r"([\w./-]+\.py)\b", listing[1]))
    files = {name for name in OURS if (ROOT / name).read_text().count("\n") > 1}
    assert sorted(files - listed) == [], "not in the README"
    assert sorted(listed - set(OURS)) == [], "in the README, but not there"
