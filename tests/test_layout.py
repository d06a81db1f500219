"""The house: imports run one way, by folder, and few files stand at the top level."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
STOREYS = [  # a file may import from the storeys below its own, and from its own folder
    {"support"},
    {"data", "lora"},
    {"engine"},
    {"generate", "judges", "tasks"},
    {"answers"},
    {"train"},
    {"results"},
    {"s3ft", "evaluate"},
    {"examples"},
    {"bench"},
    {"tests"},
]
PLACE = {room: number for number, storey in enumerate(STOREYS) for room in storey}


def room_of(path: Path) -> str:
    """The folder of a file, or the file itself where it stands at the top level."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def own_imports(path: Path) -> set[str]:
    """The rooms that a file imports from."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.partition(".")[0])
    return found & PLACE.keys()


def python_files() -> list[Path]:
    return [path for room in PLACE for path in [ROOT / f"{room}.py", *(ROOT / room).glob("*.py")] if path.exists()]


def test_imports_run_one_way():
    for path in python_files():
        room = room_of(path)
        for other in own_imports(path) - {room}:
            assert PLACE[other] < PLACE[room], f"{path.relative_to(ROOT)} imports {other}, which is not below it"


def test_every_file_has_a_place_and_few_stand_at_the_door():
    assert {path.stem for path in ROOT.glob("*.py")} <= PLACE.keys()
    assert len(list(ROOT.glob("*.py"))) <= 8
