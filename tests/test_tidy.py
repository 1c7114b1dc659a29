"""The house rules that a program can check, on every file that is, or would be, committed."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINES_MAX = 600
GENERATED = {".git", "__pycache__", "build", "dist", "data"}
WANTED = (
    "README.md",
    "ARCHITECTURE.md",
    "CHANGELOG.md",
    "Makefile",
    "scripts/setup",
    ".ci/run",
    "src/pybroker/py.typed",
    "src/pybroker/store/FORMAT.md",
)
EXECUTABLE = ("scripts/setup", ".ci/run")

# Each pattern is put together here, so that this file does not hold what it looks for.
_HOSTS = ("pypi org", "pythonhosted org", "pypi python org", "anaconda org", "npmjs org", "npmjs com", "crates io")
_MORE_HOSTS = ("golang org", "rubygems org", "deb debian org", "maven org", "docker io", "ghcr io")
PLACES = re.compile("(?<![A-Za-z0-9_.-])/(wor" + "k|roo" + "t)(?![A-Za-z0-9_.-])")
HOSTS = re.compile("|".join(re.escape(host.replace(" ", ".")) for host in _HOSTS + _MORE_HOSTS))
UNFINISHED = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")


def committed_files() -> list[Path]:
    """Files that git knows or would take; without git (an unpacked archive) all that nothing generated."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout.decode()
    except (OSError, subprocess.CalledProcessError):
        paths = [path for path in ROOT.rglob("*") if not is_generated(path.relative_to(ROOT))]
    else:
        paths = [ROOT / name for name in listed.split("\0") if name]
    return sorted(path for path in paths if path.is_file() and not path.is_symlink())


def is_generated(path: Path) -> bool:
    return any(part in GENERATED or part.startswith(".venv") or part.endswith("_cache") for part in path.parts)


FILES = committed_files()
PYTHON_FILES = [path for path in FILES if path.suffix == ".py"]
SOURCE_FILES = [path for path in PYTHON_FILES if path.is_relative_to(ROOT / "src")]


def text_of(path: Path) -> str:
    return path.read_bytes().decode("utf-8", "replace")


def findings(pattern: re.Pattern[str], text: str) -> list[str]:
    return [
        f"line {number}: {line.strip()}" for number, line in enumerate(text.splitlines(), 1) if pattern.search(line)
    ]


def found_in_files(pattern: re.Pattern[str]) -> list[str]:
    return [f"{path.relative_to(ROOT)} {found}" for path in FILES for found in findings(pattern, text_of(path))]


def test_there_are_files():
    assert len(SOURCE_FILES) > 5


def test_no_file_names_a_place_of_one_machine():
    assert found_in_files(PLACES) == []


def test_no_file_names_the_host_of_a_package_registry():
    assert found_in_files(HOSTS) == []


def test_nothing_is_left_for_later():
    assert found_in_files(UNFINISHED) == []


@pytest.mark.parametrize(
    ("pattern", "planted", "harmless"),
    [
        (PLACES, ["/wor" + "k/main/x", "path=/roo" + "t"], ["a/wor" + "k/b", "/wor" + "kers", "share/wor" + "k"]),
        (HOSTS, ["https://py" + "pi.org/simple", "files.python" + "hosted.org"], ["a package index", "pypi"]),
        (UNFINISHED, ["# TO" + "DO: x", "FIX" + "ME"], ["to do", "TO" + "DOS"]),
    ],
)
def test_the_patterns_find_what_they_are_for(pattern: re.Pattern[str], planted: list[str], harmless: list[str]):
    assert [line for line in planted if not findings(pattern, line)] == []
    assert [line for line in harmless if findings(pattern, line)] == []


def test_every_source_file_begins_with_what_it_owns():
    without = [
        str(path.relative_to(ROOT)) for path in SOURCE_FILES if not ast.get_docstring(ast.parse(path.read_bytes()))
    ]
    assert without == []


def test_no_file_has_grown_too_long():
    lengths = {str(path.relative_to(ROOT)): len(text_of(path).splitlines()) for path in PYTHON_FILES}
    assert {name: length for name, length in lengths.items() if length > LINES_MAX} == {}


def test_the_documents_and_scripts_are_there():
    assert [name for name in WANTED if not (ROOT / name).is_file()] == []
    assert [name for name in EXECUTABLE if not (ROOT / name).stat().st_mode & 0o100] == []
