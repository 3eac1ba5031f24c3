"""What the README shows runs as shown."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readmes_python_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "(16, 64, 64, 3) 8.0 4"  # as its comment says
    assert len(lines) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["fox.mp4"]


def test_the_readmes_commands_parse(monkeypatch, tmp_path):
    import shlex

    from animatelcm import cli, planning

    ran = []
    # Dry runs are costs counted: that they are right is for test_planning.py.
    monkeypatch.setattr(planning, "plan", lambda config: ran.append(config) or SimpleNamespace(text=str))
    for verb in (*cli.VERBS.values(), *cli.PROTOCOLS.values()):
        monkeypatch.setattr(verb, "run", lambda self: ran.append(self))
    lines = [line for line in README.splitlines() if line.startswith("animatelcm ")]
    assert len(lines) >= 5
    for line in lines:
        cli.main(shlex.split(line, comments=True)[1:])
    assert len(ran) == len(lines)


@pytest.mark.parametrize(
    "page", sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").rglob("*.md")), ids=lambda p: p.name
)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_the_make_targets_of_the_readme_exist():
    rules = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"`?make (\w+)", README):
        assert target in rules
