"""The house as docs/architecture.md draws it: imports go down, files stay short."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("dgpo_fast", "kernels/dgpo_kernels")


def drawn_floors(page: str) -> list[list[str]]:
    """The rooms of each floor, top floor first: the lines of the drawing in docs/architecture.md, without `.py`."""
    (drawing,) = re.findall(r"```\n(dgpo_fast/\n.*?)```", page, re.DOTALL)
    floors, house = [], ""
    for line in drawing.splitlines():
        if line.startswith("  "):
            rooms = re.match(r"(?:[\w/]+(?:/|\.py)\s+)+", line.strip())
            assert rooms, f"no room in this line of the drawing: {line}"
            floors.append([house + room.removesuffix(".py") for room in rooms[0].split()])
        else:
            house = line
    return floors


PAGE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
FLOORS = drawn_floors(PAGE)


@cache
def python_files(root: Path) -> list[Path]:
    """All files of the packages, relative to `root`."""
    return sorted(path.relative_to(root) for package in PACKAGES for path in (root / package).rglob("*.py"))


def imported_names(root: Path, file: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that `file` imports: in functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse((root / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = file.parts[: len(file.parts) - node.level] if node.level else ()
            start = ".".join([*package, *filter(None, [node.module])])
            yield from ((node.lineno, f"{start}.{alias.name}") for alias in node.names)


def imported_files(root: Path, file: Path) -> Iterator[tuple[int, Path]]:
    """Line and path of every file of the packages that `file` imports."""
    files = {path.with_suffix("").as_posix().removeprefix("kernels/"): path for path in python_files(root)}
    for line, name in imported_names(root, file):
        path = name.replace(".", "/")
        for candidate in (path, f"{path}/__init__", str(Path(path).parent), f"{Path(path).parent}/__init__"):
            if candidate in files:
                yield line, files[candidate]
                break


def floor_and_room(file: Path) -> tuple[int, str] | None:
    """How far down a file lives, 0 being the top, and in which room. A file that is drawn by itself is its own room."""
    path = file.with_suffix("").as_posix()
    drawn = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
    for room in (path, *(f"{parent}/" for parent in Path(path).parents)):
        if room in drawn:
            return drawn[room], room
    return None


def faults(root: Path) -> list[str]:
    """What is against the drawing, a line each: file, line and what runs up."""
    found = []
    for file in python_files(root):
        here = floor_and_room(file)
        if here is None:
            found.append(f"{file} is on no floor of docs/architecture.md")
            continue
        for line, name in imported_names(root, file):
            if name.split(".")[0] in ("benchmarks", "tests"):
                found.append(f"{file}:{line} imports {name}, which is not part of the package")
        for line, other in imported_files(root, file):
            there = floor_and_room(other)
            if there and there[1] != here[1] and there[0] <= here[0]:
                found.append(f"{file}:{line} runs up from {here[1]} to {there[1]}: imports {other}")
    return found


def test_imports_go_down() -> None:
    found = faults(ROOT)
    assert not found, "\n" + "\n".join(found)


def test_no_two_files_import_each_other() -> None:
    graph = {file: {other for _, other in imported_files(ROOT, file)} - {file} for file in python_files(ROOT)}
    assert sum(map(len, graph.values())) > len(graph), "the imports are read"
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(map(str, reversed(error.args[1]))))


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        (
            "prompts/files.py",
            "from dgpo_fast.tiny import data",
            ":1 runs up from dgpo_fast/prompts/ to dgpo_fast/tiny/",
        ),
        ("errors.py", "import dgpo_fast.trainer as t", ":1 runs up from dgpo_fast/errors to dgpo_fast/trainer"),
        ("run/a.py", "def f():\n    from ..rollout import b", ":2 runs up from dgpo_fast/run/ to dgpo_fast/rollout/"),
        (
            "engine/a.py",
            "if TYPE_CHECKING:\n    from dgpo_fast.trainer import Trainer",
            ":2 runs up from dgpo_fast/engine/ to dgpo_fast/trainer",
        ),
        (
            "memory/a.py",
            "import dgpo_fast.memory.__main__",
            ":1 runs up from dgpo_fast/memory/ to dgpo_fast/memory/__main__",
        ),
        ("evaluate.py", "from dgpo_fast import train", ":1 runs up from dgpo_fast/evaluate to dgpo_fast/train"),
        ("trainer.py", "from benchmarks.pages import part", ":1 imports benchmarks.pages.part, which is not part"),
        ("leftover.py", "", " is on no floor of docs/architecture.md"),
        ("trainer.py", "from dgpo_fast.rollout.b import x\nfrom dgpo_kernels import y", ""),
    ],
)
def test_an_import_that_runs_up_is_found(tmp_path: Path, file: str, text: str, expected: str) -> None:
    others = (
        "__init__.py",
        "train.py",
        "trainer.py",
        "tiny/data.py",
        "rollout/__init__.py",
        "rollout/b.py",
        "memory/__main__.py",
    )
    for path in (*others, file):
        (tmp_path / "dgpo_fast" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "dgpo_fast" / path).write_text("")
    (tmp_path / "dgpo_fast" / file).write_text(text)
    found = faults(tmp_path)
    assert len(found) == bool(expected)
    assert not expected or found[0].startswith(f"dgpo_fast/{file}{expected}")


def lines(file: Path) -> int:
    return len((ROOT / file).read_text(encoding="utf-8").splitlines())


def test_what_is_drawn_is_there() -> None:
    for room in (room for floor in FLOORS for room in floor):
        assert (ROOT / room).is_dir() or (ROOT / f"{room}.py").is_file(), room


def test_files_are_short() -> None:
    assert {str(file): lines(file) for file in python_files(ROOT) if lines(file) > 450} == {}
    assert lines(Path("dgpo_fast/trainer.py")) <= 250


def test_the_story_is_short() -> None:
    story = re.findall(r"\]\(\.\./(\S+\.py)\)", PAGE[: PAGE.index("## The house")])
    assert len(story) > 10
    assert {file: lines(Path(file)) for file in story if lines(Path(file)) > 300} == {}


def test_loose_files_are_few() -> None:
    """Beside the thin ones that `python -m dgpo_fast.NAME` needs."""
    loose = [file.name for file in python_files(ROOT) if file.parent == Path("dgpo_fast") and lines(file) > 25]
    assert len(loose) <= 12, loose
