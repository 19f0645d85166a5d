"""docs/mathematics.md and the code that cites it stay in step."""

import re
from pathlib import Path

from fastdiff.diffusion.losses import LOSSES
from fastdiff.diffusion.schedules import SCHEDULES
from fastdiff.diffusion.step_tables import VARIANCES
from fastdiff.diffusion.timestep_samplers import TIMESTEP_SAMPLERS
from fastdiff.diffusion.weightings import WEIGHTINGS

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "mathematics.md").read_text()
SECTIONS = dict(re.findall(r"^## (\d+)\. (.+)$", TEXT, re.MULTILINE))


def test_sections_are_numbered_without_gaps():
    assert list(SECTIONS) == [str(i) for i in range(1, 13)]


def test_every_cited_section_exists():
    cited = set()
    for path in (ROOT / "fastdiff").rglob("*.py"):
        for citation in re.findall(r"Math (§\d+(?:(?:, |-)§\d+)*)", path.read_text()):
            cited.update(re.findall(r"\d+", citation))
    assert cited
    assert cited <= set(SECTIONS)


def test_links_point_to_headings():
    links = re.findall(r"\]\(#([^)]+)\)", TEXT)
    slugs = {
        re.sub(r"[^\w\- ]", "", f"{number} {title}".lower()).replace(" ", "-")
        for number, title in SECTIONS.items()
    }
    assert set(links) == slugs


def test_named_files_exist():
    paths = set(re.findall(r"`((?:fastdiff|csrc)/[\w./]+)`", TEXT))
    assert len(paths) > 10
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


def test_named_schedules_and_variances_are_the_implemented_ones():
    rows = re.findall(r"^\| `(\w+)`(?: \(alias `(\w+)`\))? \|", TEXT, re.MULTILINE)
    names = {name for row in rows for name in row if name}
    assert set(SCHEDULES) | set(VARIANCES) <= names


def test_named_losses_weightings_and_timestep_samplers_are_the_implemented_ones():
    section = TEXT.split("## 6. ")[1].split("## 7. ")[0]
    named = set(re.findall(r"`(?:loss=\")?(\w+)\"?`", section))
    assert set(LOSSES) | set(WEIGHTINGS) | set(TIMESTEP_SAMPLERS) <= named
