"""Documents are checked: every command, option and file that the README and the help texts name is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from edgeslm.cli import cli
from edgeslm.options import LazyCommand
from edgeslm.recipe import load_recipe

if TYPE_CHECKING:
    from collections.abc import Iterator

    import click

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def command_lines(text: str) -> Iterator[list[str]]:
    for line in text.splitlines():
        match = re.search(r"(?:^|\| |Example: +|`)(edgeslm [a-z]+ [^`]*)", line.strip())
        if match:
            yield shlex.split(match.group(1), comments=True)


def command_of(name: str) -> click.Command:
    command = cli.commands[name]
    return command.load() if isinstance(command, LazyCommand) else command


def help_examples() -> str:
    return "\n".join(command_of(name).help or "" for name in cli.commands)


LINES = [
    *command_lines("\n".join(re.findall(r"```sh\n(.*?)```", README, re.S))),
    *command_lines(help_examples()),
]


@pytest.mark.parametrize("line", LINES, ids=" ".join)
def test_commands_and_options_exist(line: list[str]) -> None:
    command = command_of(line[1])
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    for word in line[2:]:
        if re.match(r"--?[a-z]", word):
            assert word in known, f"{word} is no option of {line[1]}"


def test_every_command_is_shown() -> None:
    assert {line[1] for line in LINES} == set(cli.commands)
    shown = {line[1] for line in command_lines("\n".join(re.findall(r"```sh\n(.*?)```", README, re.S)))}
    assert set(cli.commands) == shown


def test_the_recipe_in_the_readme_loads(tmp_path: Path) -> None:
    recipe = re.search(r"```toml\n(.*?)```", README, re.S)
    assert recipe
    (tmp_path / "chats.jsonl").write_text('{"text": "hello"}\n')
    (tmp_path / "readme.toml").write_text(recipe.group(1))
    assert load_recipe(tmp_path / "readme.toml").quantize.scheme == "IQ4_NL"


def test_the_tree_is_true() -> None:
    tree = re.findall(r"```text\n(edgeslm/.*?)```", README, re.S)[0]
    named = set(re.findall(r"[a-z0-9_]+\.py", tree))
    there = {path.name for path in (ROOT / "edgeslm").rglob("*.py")} - {"__init__.py", "__main__.py"}
    assert named == there


def test_the_first_two_commands_are_makes() -> None:
    assert re.findall(r"^    (make \w+)", README, re.M)[:2] == ["make demo", "make test"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"`make ([a-z-]+)`", README)):
        assert re.search(rf"^(\.PHONY:.* )?{target}[: ]", makefile, re.M), target


def test_benchmarks_that_are_named_exist() -> None:
    for path in re.findall(r"benchmarks/\w+\.py", README):
        assert (ROOT / path).is_file(), path
