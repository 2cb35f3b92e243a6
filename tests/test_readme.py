"""What the README and the docs tell people to type is typed here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


WITH_CODE = [page for page in PAGES if "```python\n" in page.read_text(encoding="utf-8")]


def test_there_is_python_to_run() -> None:
    assert {"README.md", "anatomy-and-plan.md", "run-time.md"} <= {page.name for page in WITH_CODE}


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.name)
def test_python_on_the_page_runs(page: Path, demo_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    scope: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, page.name, "exec"), scope)
    assert capsys.readouterr().out


def test_every_command_in_the_table_exists() -> None:
    from billhook.cli import app

    found = re.findall(r"^\| `billhook ([a-z-]+)", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(found) >= 7
    for command in found:
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0, command


def test_every_trap_names_tests_that_exist_or_says_that_it_is_not_built() -> None:
    rows = re.findall(r"^\| (\d+) \| (.+) \| (.+) \|$", (ROOT / "docs" / "traps.md").read_text("utf-8"), re.MULTILINE)
    assert [int(number) for number, _, _ in rows] == list(range(1, 63))
    for number, _, tests in rows:
        found = re.findall(r"`([\w/]+\.py)::(\w+)`", tests)
        assert found or tests == "not built" or tests.startswith("not built ("), number
        for file, test in found:
            text = (ROOT / "tests" / file).read_text(encoding="utf-8")
            assert re.search(rf"^def {test}\(", text, re.MULTILINE), f"{number}: {file}::{test}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
