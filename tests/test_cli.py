"""Does `vlm` start light, end with the right exit code, and say one sentence where it fails?"""

import errno
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from vlm import cli
from vlm.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = Path(sys.executable).with_name("vlm")
HEAVY = {"torch", "transformers", "torchvision", "matplotlib", "numpy", "PIL", "pyarrow"}


def run_script(*words: str) -> subprocess.CompletedProcess[str]:
    """Run the installed console script and list every module that it imports on stderr."""
    command = [sys.executable, "-X", "importtime", str(SCRIPT), *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)


def imported(process: subprocess.CompletedProcess[str]) -> set[str]:
    lines = [line for line in process.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip() for line in lines}


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A command `vlm try WORD` whose `run` the test sets."""
    module = ModuleType("try_command", "Tries something.")
    module.add_arguments = lambda parser: parser.add_argument("word")
    monkeypatch.setitem(sys.modules, "try_command", module)
    monkeypatch.setitem(cli.COMMANDS, "try", cli.Command("try_command", "tries", resumes=True))
    return module


def raising(error: BaseException):
    def run(args):
        raise error

    return run


def test_help_lists_every_command_and_imports_nothing_heavy():
    process = run_script("--help")
    assert process.returncode == 0
    listed = {line.split()[0] for line in process.stdout.splitlines() if line.startswith("  ")}
    assert set(cli.COMMANDS) <= listed
    assert "vlm.cli" in imported(process)
    assert not HEAVY & imported(process)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_each_command_is_light(name):
    process = run_script(name, "--help")
    assert process.returncode == 0, process.stderr[-2000:]
    assert process.stdout.startswith(f"usage: vlm {name}")
    assert not HEAVY & imported(process)


def test_python_m_vlm_is_the_same_command():
    command = [sys.executable, "-m", "vlm", "--version"]
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert process.returncode == 0
    assert process.stdout.startswith("vlm ")


def test_import_vlm_registers_the_auto_classes():
    code = "import vlm, transformers; print(transformers.AutoConfig.for_model('vlm').model_type)"
    command = [sys.executable, "-c", code]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert process.stdout.split() == ["vlm"], process.stderr[-2000:]


def test_no_command_shows_the_help(capsys):
    assert cli.main([]) == 2
    assert "commands:" in capsys.readouterr().err


def test_unknown_command_lists_the_commands_and_the_nearest(capsys):
    assert cli.main(["quikstart"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "'quikstart'" in lines[0]
    assert "did you mean 'quickstart'?" in lines[0]
    assert all(name in lines[0] for name in cli.COMMANDS)


@pytest.mark.parametrize("words", [["--loud"], ["try", "word", "--loud"]])
def test_unknown_option_is_named(words, command, capsys):
    command.run = raising(AssertionError("must not run"))
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "--loud" in lines[0]


def test_a_misspelt_option_gets_the_one_meant(command, capsys):
    command.add_arguments = lambda parser: parser.add_argument("--stage")
    command.run = raising(AssertionError("must not run"))
    with pytest.raises(SystemExit):
        cli.main(["try", "--stagge=align"])
    assert "did you mean --stage?" in capsys.readouterr().err


def test_options_are_not_guessed_from_their_beginning(command, capsys):
    command.add_arguments = lambda parser: parser.add_argument("--stage")
    command.run = lambda args: 0
    with pytest.raises(SystemExit):
        cli.main(["try", "--sta", "align"])
    assert "--sta" in capsys.readouterr().err


def test_words_and_exit_code_reach_the_command(command):
    command.run = lambda args: {"seven": 7}[args.word]
    assert cli.main(["try", "seven"]) == 7


def test_unknown_words_are_overrides_where_the_command_takes_them(command):
    command.TAKES_OVERRIDES = True
    seen = []
    command.run = lambda args: seen.append((args.word, args.overrides)) or 0
    assert cli.main(["try", "recipe.yaml", "--training.seed", "1", "--a.b=2"]) == 0
    assert seen == [("recipe.yaml", ["--training.seed", "1", "--a.b=2"])]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (UserError("picture.png: no such file"), "vlm try: picture.png: no such file"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/x"), "runs/x: No space left"),
        (PermissionError(errno.EACCES, "Permission denied", "/runs"), "/runs: Permission denied"),
        (ModuleNotFoundError("no", name="gradio.blocks"), "make extras EXTRAS=demo"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_2(error, expected, command, capsys):
    command.run = raising(error)
    assert cli.main(["try", "word"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert len(output.err.splitlines()) == 1
    assert expected in output.err


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a bug"),
        FileNotFoundError(errno.ENOENT, "gone", "inside"),
        ModuleNotFoundError("no", name="vlm.forgotten"),
    ],
)
def test_a_bug_keeps_its_traceback(error, command):
    command.run = raising(error)
    with pytest.raises(type(error)) as caught:
        cli.main(["try", "word"])
    assert caught.value is error


def test_interruption_is_130_and_says_how_to_go_on(command, capsys):
    command.run = raising(KeyboardInterrupt())
    assert cli.main(["try", "word"]) == 130
    assert "the same command goes on from here" in capsys.readouterr().err


def test_interruption_promises_nothing_where_nothing_is_kept(command, monkeypatch, capsys):
    monkeypatch.setitem(cli.COMMANDS, "try", cli.Command("try_command", "tries"))
    command.run = raising(KeyboardInterrupt())
    assert cli.main(["try", "word"]) == 130
    assert capsys.readouterr().err.strip() == "vlm try: interrupted"


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_that_goes_away_is_no_traceback(lines):
    code = (
        "import sys; sys.argv = ['vlm']\n"
        "from types import ModuleType; from vlm import cli\n"
        "module = ModuleType('talk'); module.add_arguments = lambda parser: None\n"
        f"module.run = lambda args: print('word\\n' * {lines}) or 0\n"
        "sys.modules['talk'] = module; cli.COMMANDS['talk'] = cli.Command('talk', '')\n"
        "sys.exit(cli.main(['talk']))"
    )
    reading, writing = os.pipe()
    os.close(reading)
    process = subprocess.run(
        [sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60
    )
    os.close(writing)
    assert process.returncode == 141
    assert process.stderr == ""


def test_every_optional_package_names_an_extra_that_brings_it():
    with open(ROOT / "pyproject.toml", "rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    for package, extra in cli.EXTRAS.items():
        brought = [requirement.partition("==")[0] for requirement in extras[extra]]
        assert any(name.removesuffix("_torch") == package for name in brought), package
