"""The structure of the repository: import directions, and the files of each op folder."""

import ast
import re
from pathlib import Path

import pytest

import qvl_kernels

ROOT = Path(__file__).resolve().parent.parent
FORBIDDEN = {
    "qvl_kernels": {"transformers", "qvl_model", "bench", "tests"},
    "qvl_model": {"bench", "tests"},
    "bench": {"tests"},
}
OP_FOLDERS = sorted(path for path in (ROOT / "qvl_kernels" / "ops").iterdir() if (path / "__init__.py").is_file())
INTERNAL_OPS = {"gemv"}  # that other ops are composed of


def imported_packages(file: Path) -> set[str]:
    """Top-level packages that ``file`` imports anywhere, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def imported_modules(file: Path) -> set[str]:
    """Modules that ``file`` imports from, anywhere; a module imported from its package counts as itself."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = ROOT.joinpath(*node.module.split("."), alias.name)
                is_module = inner.with_suffix(".py").is_file() or (inner / "__init__.py").is_file()
                names.add(f"{node.module}.{alias.name}" if is_module else node.module)
    return names


@pytest.mark.parametrize("package", FORBIDDEN)
def test_direction_of_imports(package):
    wrong = {
        str(file.relative_to(ROOT)): sorted(found)
        for file in (ROOT / package).rglob("*.py")
        if (found := imported_packages(file) & FORBIDDEN[package])
    }
    assert not wrong, f"{package} must not import {sorted(FORBIDDEN[package])}: {wrong}"


def circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Modules that import each other, over any number of others: Tarjan's strongly connected components."""
    index, low, path, found = {}, {}, [], []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        path.append(module)
        for other in imports[module]:
            if other not in index:
                visit(other)
            if other in path:
                low[module] = min(low[module], low[other])
        if low[module] == index[module]:
            start = path.index(module)
            if len(path) - start > 1:
                found.append(sorted(path[start:]))
            del path[start:]

    for module in imports:
        if module not in index:
            visit(module)
    return found


def test_no_circle_of_files():
    """Neither by imports at the top of files nor by those inside functions."""
    files = {}
    for package in FORBIDDEN:
        for file in (ROOT / package).rglob("*.py"):
            name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
            files[name.removesuffix(".__init__")] = file
    imports = {name: imported_modules(file) & files.keys() - {name} for name, file in files.items()}
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]
    assert not circles(imports)


def test_extension_needs_no_torch_headers():
    wrong = [
        file
        for file in (ROOT / "csrc").rglob("*")
        if file.is_file() and re.search(r"#include\s*[<\"](torch|ATen|c10)/", file.read_text())
    ]
    assert not wrong


PRIVATE_LAYOUT = re.compile(
    r"(->|\.)(ob|f|co|tp)_\w+|\b_?Py\w*(Object|Frame|Code|ThreadState|InterpreterState)\b|\bPy_TYPE\b|\bPyTensor\b"
    r"|\bTHP\w+|\b(TensorImpl|StorageImpl)\b|internal/pycore_|offsetof|reinterpret_cast<[^>]*>\(\w+\.ptr\(\)\)"
)


def test_extension_knows_no_layout_of_python_or_torch_objects():
    """Their sizes and fields change with versions; pybind11 and the pointers that Python passes are enough."""
    examples = ("x->ob_type", "frame->f_code", "(PyObject*)x", "PyTensor", "THPVariable_Check(x)", "c10::TensorImpl")
    assert all(PRIVATE_LAYOUT.search(example) for example in examples)
    wrong = [
        (file.name, found[0])
        for file in (ROOT / "csrc").rglob("*")
        if file.is_file() and (found := PRIVATE_LAYOUT.search(file.read_text()))
    ]
    assert not wrong


@pytest.mark.parametrize("folder", OP_FOLDERS, ids=lambda folder: folder.name)
def test_op_folder_is_complete(folder):
    assert (folder / "reference.py").is_file() and (folder / "cases.py").is_file()
    if folder.name in INTERNAL_OPS:
        return
    module = f"qvl_kernels.ops.{folder.name}.api"
    public = [name for name in qvl_kernels.__all__ if getattr(qvl_kernels, name).__module__ == module]
    assert public, f"{module} gives nothing to qvl_kernels.__all__"
    undocumented = [name for name in public if not (getattr(qvl_kernels, name).__doc__ or "").strip()]
    assert not undocumented, f"without docstring: {undocumented}"


@pytest.mark.parametrize("folder", OP_FOLDERS, ids=lambda folder: folder.name)
def test_layers_of_an_op(folder):
    """`__init__.py` only re-exports; no other file than that imports the public function, nor GPU kernels CPU ones."""
    body = ast.parse((folder / "__init__.py").read_text()).body
    assert not [node for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    package = f"qvl_kernels.ops.{folder.name}"
    inner = [file for file in folder.glob("*.py") if file.stem not in ("__init__", "cases")]
    wrong = [
        (file.name, name) for file in inner for name in imported_modules(file) if name in (package, f"{package}.api")
    ]
    for file in folder.glob("triton_*.py"):
        wrong += [
            (file.name, name) for name in imported_modules(file) if re.fullmatch(r"qvl_kernels\.ops\.\w+\.cpu", name)
        ]
    assert not wrong


@pytest.mark.parametrize("package", ["qvl_kernels", "qvl_model"])
def test_modules_declare_what_is_public(package):
    missing = [
        str(file.relative_to(ROOT))
        for file in (ROOT / package).rglob("*.py")
        if "__all__" not in file.read_text()
        and any(
            isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
            for node in ast.parse(file.read_text()).body
        )
    ]
    assert not missing, f"without __all__: {missing}"


def test_tests_mirror_the_packages():
    """Each test file is in the folder of what it tests; tests of the whole repository are directly in tests/."""
    folders = {file.parent.name for file in (ROOT / "tests").rglob("test_*.py")}
    assert folders == {"tests", "kernels", "model", "qvl", "training", "bench", "gpu"}
    assert {file.name for file in (ROOT / "tests").glob("test_*.py")} == {
        "test_docs.py",
        "test_mutations.py",
        "test_structure.py",
        "test_typing.py",
    }
    names = [file.name for file in (ROOT / "tests").rglob("*.py") if file.name != "conftest.py"]
    twice = sorted({name for name in names if names.count(name) > 1})
    assert not twice, f"pytest imports test files by their names alone, which must differ: {twice}"
