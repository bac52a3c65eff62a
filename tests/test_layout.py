"""The house: who imports whom, where heavy libraries live, and that the README's tree is the disk's."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted(path.relative_to(ROOT) for folder in ("flows", "tasks") for path in (ROOT / folder).rglob("*.py"))

# Which parts a part may import; "verbs" are the modules directly in tasks/.
ALLOWED = {
    "flows": {"flows", "verbs", "serving", "clients", "release", "learning", "data", "errors"},
    "verbs": {"verbs", "serving", "clients", "release", "learning", "data", "errors"},
    "serving": {"serving", "clients", "errors", "tasks.release.manifest", "tasks.release.signing"},
    "release": {"release", "clients", "learning", "data", "errors"},
    "clients": {"clients", "errors"},
    "learning": {"learning", "data", "errors"},
    "data": {"data", "errors"},
    "errors": set(),
}

# Where a heavy library may be imported: paths that a module's path starts with.
HOMES = {
    "great_expectations": ("tasks/data/expectations.py", "tasks/data/duckdb_engine.py"),
    "sqlalchemy": ("tasks/data/expectations.py", "tasks/data/duckdb_engine.py"),
    "duckdb_engine": ("tasks/data/duckdb_engine.py",),
    "duckdb": ("tasks/data/",),
    "onnx": ("tasks/release/",),
    "onnxscript": ("tasks/release/",),
    "onnxruntime": ("tasks/release/", "tasks/serving/"),
    "boto3": ("tasks/clients/",),
    "botocore": ("tasks/clients/",),
    "lightgbm": ("tasks/learning/trees.py",),
    "tensorboard": ("tasks/tensorboard.py",),
    "torch.utils.tensorboard": ("tasks/tensorboard.py",),
    "prometheus_client": ("tasks/serving/metrics.py",),
    "optuna": ("tasks/learning/study.py",),
    "safetensors": ("tasks/learning/", "tasks/release/"),
    "yaml": ("flows/",),
    "rich": ("flows/",),
}


def part_of(module: str) -> str:
    """The part of the house that a dotted module of ours belongs to."""
    first, *rest = module.split(".")
    if first == "flows":
        return "flows"
    if rest and rest[0] in ("data", "learning", "release", "serving", "clients", "errors"):
        return rest[0]
    return "verbs"


def imports_of(path: Path) -> set[str]:
    """Dotted modules that a file imports, anywhere in it; names imported from a package count as its modules."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            assert node.module is not None
            found.add(node.module)
            if (ROOT / node.module.replace(".", "/")).is_dir():
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def dotted(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_point_downwards(path: Path) -> None:
    allowed = ALLOWED[part_of(dotted(path))]
    ours = {module for module in imports_of(path) if module.split(".")[0] in ("flows", "tasks")}
    wrong = sorted(
        module
        for module in ours
        if part_of(module) not in allowed
        and module not in allowed
        and not any(other.startswith(module + ".") for other in ours & allowed)
    )
    assert not wrong, f"{path} may not import {', '.join(wrong)}"


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_heavy_libraries_stay_at_home(path: Path) -> None:
    imported = imports_of(path)
    roots = {module.split(".")[0] for module in imported}
    for library in sorted((roots | imported) & HOMES.keys()):
        assert str(path).startswith(HOMES[library]), f"{path} imports {library}, whose home is {HOMES[library]}"
    if "prefect" in roots:
        assert part_of(dotted(path)) in ("flows", "verbs"), f"{path} has heard of Prefect"
    if "torch" in roots:
        assert part_of(dotted(path)) in ("learning", "release", "verbs"), f"{path} imports torch"


def test_the_manifest_needs_only_the_standard_library() -> None:
    import sys

    roots = {module.split(".")[0] for module in imports_of(Path("tasks/release/manifest.py"))}
    assert roots - {"tasks"} <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", [path for path in MODULES if path.parent == Path("flows")], ids=str)
def test_flow_modules_have_real_annotations(path: Path) -> None:
    """Prefect reads them when it validates parameters."""
    assert "__future__" not in imports_of(path)


@pytest.mark.parametrize("path", [path for path in MODULES if path.name == "__init__.py"], ids=str)
def test_package_files_hold_a_docstring_and_nothing_else(path: Path) -> None:
    body = ast.parse((ROOT / path).read_text(encoding="utf-8")).body
    assert len(body) == 1
    assert isinstance(body[0], ast.Expr)
    assert isinstance(body[0].value, ast.Constant)


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_modules_can_be_read_in_one_sitting(path: Path) -> None:
    assert len((ROOT / path).read_text(encoding="utf-8").splitlines()) <= 400


def tree_of_the_readme() -> set[str]:
    """Paths in the README's tree: the code block whose first entry is README.md, two spaces a level.

    A line may name several entries, parted by one space; two or more spaces part them from their phrase.
    """
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks: list[str] = re.findall(r"^```\w*\n(README\.md .*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1, "README.md must hold one code block that starts with README.md: the tree"
    paths: set[str] = set()
    folders: list[str] = []
    for line in blocks[0].splitlines():
        names, phrase = re.split(r" {2,}", line.strip() + "  ", maxsplit=1)
        depth = (len(line) - len(line.lstrip())) // 2
        assert phrase.strip(), f"{names} has no phrase"
        folders = folders[:depth]
        for name in names.split(" "):
            paths.add("".join(folders) + name)
        if names.endswith("/"):
            folders.append(names)
    return paths


def test_the_tree_in_the_readme_is_the_disk() -> None:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    disk = {path for path in listed if (ROOT / path).exists() and not path.endswith("__init__.py")}
    tree = tree_of_the_readme()
    files = {path for path in tree if not path.endswith("/")}
    # A folder without entries of its own stands for everything in it.
    closed = {path for path in tree - files if not any(other != path and other.startswith(path) for other in tree)}
    assert sorted(files - disk) == [], "the README's tree lists what is not there"
    assert [folder for folder in sorted(closed) if not any(path.startswith(folder) for path in disk)] == []
    unlisted = {path for path in disk - files if not path.startswith(tuple(closed))}
    assert sorted(unlisted) == [], "the README's tree lacks what is there"
