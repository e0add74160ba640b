"""Where engines may be imported, and that imports run downward only."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "sparkmed"

ENGINES = {
    "pyspark": ["spark/"],
    "horovod": ["training/"],
    "petastorm": ["spark/patches.py"],
    "mlflow": ["tracking.py"],
    "deltalake": ["tables.py"],
}

# a layer imports from those before it; the parts of one layer do not import each other
LAYERS = [
    {"rejection"},
    {"config", "reasons"},
    {"storage"},
    {"cache", "identity", "imaging", "lease", "tables"},
    {"formats", "pictures"},
    {"hcs"},
    {"cohort", "dataset", "drift"},
    {"learning"},
    {"scoring", "tracking", "training"},
    {"spark", "gates", "arrivals"},
    {"report"},
    {"pipeline"},
    {"demo"},
    {"cli"},
]
RANK = {part: rank for rank, layer in enumerate(LAYERS) for part in layer}


def imports(path: pathlib.Path) -> list[tuple[str, int]]:
    """Every module that a file imports, wherever in it, with the line; ``from sparkmed import tables`` is ``sparkmed.tables``."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names = [f"sparkmed.{alias.name}" for alias in node.names] if node.module == "sparkmed" else [node.module]
            found += [(name, node.lineno) for name in names]
    return found


SOURCES = sorted(PACKAGE.rglob("*.py"))
IMPORTS = [(path.relative_to(PACKAGE).as_posix(), name, line) for path in SOURCES for name, line in imports(path)]


ALLOWED = {("training/launch.py", "pyspark.ml.torch.distributor")}
"""Single modules of an engine elsewhere."""


def part_of(path: str) -> str:
    return path.split("/")[0].removesuffix(".py")


@pytest.mark.parametrize("engine", ENGINES)
def test_engine_stays_behind_its_fence(engine):
    allowed = tuple(ENGINES[engine])
    of_engine = [(p, name, n) for p, name, n in IMPORTS if name.split(".")[0] == engine and (p, name) not in ALLOWED]
    strays = [f"sparkmed/{p}:{n}" for p, name, n in of_engine if not p.startswith(allowed)]
    assert not strays, f"{engine} is for {ENGINES[engine]} only"


def test_every_part_has_a_layer():
    parts = {part_of(p.relative_to(PACKAGE).as_posix()) for p in SOURCES} - {"__init__", "__main__"}
    assert parts <= set(RANK), "give the new part a place in LAYERS"


def test_imports_run_downward():
    wrong = []
    for path, name, line in IMPORTS:
        source, target = part_of(path), name.split(".")[1] if name.startswith("sparkmed.") else None
        if target is None or source == target or not {source, target} <= set(RANK):
            continue
        if RANK[target] >= RANK[source]:
            wrong.append(f"sparkmed/{path}:{line}: {source} imports {target}")
    assert not wrong


def test_imaging_is_numpy_and_scipy():
    ours = {"sparkmed.config", "sparkmed.rejection", "sparkmed.imaging"}
    allowed = {"numpy", "scipy", "skimage"} | sys.stdlib_module_names
    of_imaging = [(p, name, n) for p, name, n in IMPORTS if p.startswith("imaging/")]
    strays = [
        f"sparkmed/{p}:{n}: {name}"
        for p, name, n in of_imaging
        if (".".join(name.split(".")[:2]) not in ours if name.startswith("sparkmed.") else name.split(".")[0] not in allowed)
    ]
    assert not strays


def test_formats_know_no_torch():
    assert not [
        f"sparkmed/{p}:{n}" for p, name, n in IMPORTS if p.startswith("formats/") and name.split(".")[0] in ("torch", "monai")
    ]


def test_reading_images_starts_no_engine():
    modules = [p.relative_to(PACKAGE.parent).with_suffix("") for p in SOURCES]
    core = [
        ".".join(m.parts) for m in modules if m.parts[1] in ("config", "storage", "imaging", "formats") and m.name != "__init__"
    ]
    engines = sorted([*ENGINES, "torch", "monai"])
    program = f"import sys, sparkmed, {', '.join(core)}; print([e for e in {engines} if e in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.stdout.strip() == "[]", ended.stderr


def test_jobs_hold_no_logic():
    for job in sorted((PACKAGE.parent / "jobs").glob("*.py")):
        assert {name for name, _ in imports(job)} <= {"sys", "sparkmed.cli"}, job
        assert len(job.read_text().splitlines()) <= 30, job
