"""Rooms import one way only, and `import torchrecycle` loads nothing heavy but torch and NumPy."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import torchrecycle

ROOT = Path(torchrecycle.__file__).parent

LEVELS = {
    "errors": 0,
    "allocator": 0,
    "frames": 0,
    "keys": 1,
    "codec": 1,
    "absent": 1,
    "trace": 1,
    "progress": 1,
    "augment": 1,
    "fingerprint": 2,
    "bypass": 2,
    "store": 2,
    "data": 3,
    "files": 3,
    "cost": 3,
    "models": 3,
    "fill": 4,
    "recycling": 5,
    "similarity": 6,
    "sentence_transformers": 6,
    "lightning": 6,
    "sweep": 7,
    "report": 8,
    "demo": 9,
    "cli": 10,
    "testing": 11,
}
"""The level of each room. A room may import only from rooms of a lower level."""


def _room_of(parts: tuple[str, ...]) -> str:
    return parts[0].removesuffix(".py")


def _imported_rooms(tree: ast.AST, package: tuple[str, ...]) -> list[tuple[int, str]]:
    found = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = [*base, *([node.module] if node.module else [])]
            names = [".".join([*module, alias.name]) for alias in node.names]
        for name in names:
            steps = name.split(".")
            if steps[0] == "torchrecycle" and len(steps) > 1:
                found.append((node.lineno, steps[1]))
    return found


def test_a_room_imports_only_from_rooms_of_a_lower_level():
    wrong = []
    for path in sorted(ROOT.rglob("*.py")):
        relative = path.relative_to(ROOT)
        if relative.parts == ("__init__.py",):
            continue
        room = _room_of(relative.parts)
        assert room in LEVELS, f"{relative} belongs to no room: add it to LEVELS with a level of its own"
        package = ("torchrecycle", *relative.parts[:-1])
        for line, other in _imported_rooms(ast.parse(path.read_text(encoding="utf-8")), package):
            if other != room and other in LEVELS and LEVELS[other] >= LEVELS[room]:
                wrong.append(f"{relative}:{line}: {room} (level {LEVELS[room]}) imports {other} ({LEVELS[other]})")
    assert not wrong, "\n".join(wrong)


def test_importing_torchrecycle_loads_no_heavy_package_but_torch_and_numpy():
    heavy = "transformers timm torchvision datasets rich typer PIL pandas matplotlib sklearn accelerate lightning"
    code = (
        "import torch, numpy, sys; before = set(sys.modules); import torchrecycle; "
        f"print([m for m in {heavy.split()!r} if m in sys.modules and m not in before])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_similarity_loads_its_packages_when_they_are_asked_for():
    heavy = "pytorch_lightning pytorch_metric_learning torchmetrics qdrant_client transformers timm PIL pyarrow"
    code = (
        "import sys, torchrecycle.similarity, torchrecycle.sweep\n"
        "from torchrecycle.similarity import SimilarityModel, RecycledEncoder, TripletLoss, SkipConnectionHead\n"
        f"print([name for name in {heavy.split()!r} if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_every_name_of_similarity_is_there():
    import torchrecycle.similarity as room

    for name in room.__all__:
        assert getattr(room, name) is not None, name
    assert set(room.__all__) <= set(dir(room))


def test_a_missing_package_names_the_extra(tmp_path):
    code = (
        "import sys; sys.modules['pytorch_lightning'] = None\n"
        "try:\n    from torchrecycle.similarity import fit\nexcept ModuleNotFoundError as error:\n    print(error)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == 'fit needs pytorch_lightning: pip install "torchrecycle[similarity]"'
