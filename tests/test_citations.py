"""What code and docs point to is there: files, sections of docs/METHOD.md, links, our own names."""

import ast
import pathlib
import re

import pytest

import dnd_jax
from dnd_jax.config.load import shipped
from dnd_jax.main import STAGES

ROOT = pathlib.Path(__file__).parent.parent
FOLDERS = ("dnd_jax", "configs", "tests", "docs", "launch")
KINDS = (".py", ".md", ".sh", ".sbatch", ".yaml", ".cfg", ".toml")
TEXTS = sorted(
    path
    for place in (*(ROOT / folder for folder in FOLDERS), ROOT)
    for path in (place.glob("*") if place == ROOT else place.rglob("*"))
    if path.suffix in KINDS
    and path.name != "test_citations.py"
    and not path.resolve().is_relative_to(ROOT / "dnd_jax" / "configs")
)
PAGES = [path for path in TEXTS if path.suffix == ".md"]
PATH = re.compile(r"(?<![\w/.-])((?:docs|dnd_jax|configs|tests)/[\w./-]*\.(?:py|md|png))")
SECTIONS = re.compile(r"docs/METHOD\.md,? sections? ((?:\d+|, | and | to )+)")


def prose(path: pathlib.Path) -> str:
    """A file's text on one line, without comment signs, so that a citation may be broken."""
    return re.sub(r"\s+(?:# )?", " ", path.read_text(encoding="utf-8"))


def written(text: str) -> set[str]:
    """Files that a walk-through writes itself."""
    return set(re.findall(r"--out=([\w./-]+\.py)", text))


def lacking(text: str) -> list[str]:
    """The cited files that are not there; configs/NAME.py in capitals stands for any."""
    cited = {path for path in PATH.findall(text) if not re.search(r"/[A-Z]+\.py$", path)}
    return sorted(path for path in cited - written(text) if not (ROOT / path).is_file())


def headings(page: pathlib.Path) -> list[str]:
    return re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)


def anchor(heading: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_cited_files_and_sections_are_there(path):
    text = prose(path)
    if path.parent != ROOT / "tests":  # tests of bad input name files on purpose that are not there
        assert not lacking(text)
    assert not re.search(r"(?<![/\w(\[])(?:METHOD|CONFIGS|SETTINGS)\.md", text)  # without docs/
    known = {
        int(number)
        for number in re.findall(
            r"^(\d+)\. ", "\n".join(headings(ROOT / "docs" / "METHOD.md")), re.M
        )
    }
    for cited in SECTIONS.findall(text):
        assert set(map(int, re.findall(r"\d+", cited))) <= known, cited


def test_a_citation_can_fail():
    assert lacking("see docs/NOWHERE.md, dnd_jax/lora/layout.py") == ["docs/NOWHERE.md"]
    assert lacking("dnd init-config --out=configs/mine.py, then configs/mine.py") == []
    assert SECTIONS.findall("(docs/METHOD.md sections 1, 4 and 9)") == ["1, 4 and 9"]


def test_sections_of_the_method_are_numbered_as_they_are_cited():
    numbers = [h.split(".")[0] for h in headings(ROOT / "docs" / "METHOD.md")]
    assert [n for n in numbers if n.isdigit()] == [str(n) for n in range(1, 10)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, wanted = target.partition("#")
        found = (page.parent / name).resolve() if name else page
        assert found.exists(), target
        assert not wanted or wanted in map(anchor, headings(found)), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_names_of_ours_exist(page):
    for name in set(re.findall(r"\bdnd_jax(?:\.\w+)+", page.read_text(encoding="utf-8"))):
        assert exists(name.split(".")), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_name_stages_and_settings_that_there_are(page):
    text = page.read_text(encoding="utf-8")
    settings = set(re.findall(r"--config=([a-z]\w*)(?![\w/.])", text))
    assert settings <= set(shipped())
    stages = set(re.findall(r"^(?:\| .*`)?dnd ([a-z][a-z-]+)", text, re.M))
    assert stages <= STAGES.keys()


def exists(parts: list[str]) -> bool:
    """Whether the parts are a package, a module, or what a module defines at its top."""
    place = ROOT / parts[0]
    for i, part in enumerate(parts[1:], 1):
        if (place / part).is_dir():
            place = place / part
            continue
        module = place / f"{part}.py"
        if module.is_file():
            return i == len(parts) - 1 or parts[i + 1] in defined(module)
        return place == ROOT / "dnd_jax" and part in dnd_jax.__all__
    return True


def defined(module: pathlib.Path) -> set[str]:
    names = set()
    for node in ast.parse(module.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names
