"""Docs are tested: everything is named, every Python example runs, every link leads somewhere."""

import re
from pathlib import Path

import pytest

import probe
from probe import errors
from probe.anatomy import ROWS
from studies.cli import app
from studies.study import STUDIES

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXT = {page: page.read_text() for page in PAGES}
EXAMPLES = [
    (page.relative_to(ROOT).as_posix(), code)
    for page, text in TEXT.items()
    for code in re.findall(r"```python\n(.*?)```", text, re.S)
]


def test_every_command_is_in_the_readme():
    commands = [c.name or c.callback.__name__ for c in app.registered_commands]
    assert sorted(commands) == ["compress", "demo", "doctor", "measure", "models", "search", "studies", "study", "trace"]
    for name in commands:
        assert f"sightline {name}" in TEXT[ROOT / "README.md"], name


def test_every_study_has_a_page_that_begins_with_its_question():
    for name, (_, question) in STUDIES.items():
        page = TEXT[ROOT / "docs/studies" / f"{name}.md"]
        assert question in page.split("\n\n")[1]


def test_every_error_has_a_page():
    found = [
        name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, errors.SightlineError)
    ]
    assert len(found) == 15
    for name in found:
        if name != "SightlineError":
            page = TEXT[ROOT / "docs/errors" / f"{name}.md"]
            assert all(part in page for part in ("**Symptom.**", "**Cause.**", "**Fix.**"))
        assert name in (errors.__doc__ or "")


def test_every_family_is_in_the_readme():
    for row in ROWS.values():
        assert row.family in TEXT[ROOT / "README.md"]


def test_public_names_are_importable_and_lazy():
    assert len(probe.__all__) == 26
    for name in probe.__all__:
        assert getattr(probe, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        probe.nothing  # noqa: B018


@pytest.mark.parametrize(("page", "code"), EXAMPLES, ids=[f"{page}-{i}" for i, (page, _) in enumerate(EXAMPLES)])
def test_every_python_example_runs(page, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "example"}
    exec(compile(code, page, "exec"), names)
    assert len(names) > 2  # it defined what it speaks of, beside __name__ and __builtins__


def test_there_are_examples():
    assert {page for page, _ in EXAMPLES} == {
        "README.md", "docs/compress/distillation.md", "docs/compress/measuring.md", "docs/compress/recipes.md",
        "docs/compress/weights.md", "docs/compress/width.md", "docs/studies/backends.md",
        "docs/studies/information-flow.md", "docs/studies/patching.md", "docs/tokens.md", "docs/tracing.md",
    }  # fmt: skip


def test_links_lead_somewhere():
    checked = 0
    for page, text in TEXT.items():
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), (page, target)
                checked += 1
    assert checked >= 10


def test_no_module_outgrows_its_house():
    long = {
        path.relative_to(ROOT).as_posix(): count
        for folder in ("probe", "compress", "studies", "dashboards")
        for path in (ROOT / folder).rglob("*.py")
        if (count := len(path.read_text().splitlines())) > 500
    }
    assert long == {}
