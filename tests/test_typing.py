"""Every Python function has type annotations. mypy checks that they are right: `make lint`."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _untyped(file: Path) -> list[str]:
    """Functions with parameters or results without a type, Triton kernels aside."""
    found = []

    def visit(node, in_class):
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.FunctionDef):
                visit(child, isinstance(child, ast.ClassDef))
                continue
            decorators = [ast.unparse(decorator) for decorator in child.decorator_list]
            if any(decorator.startswith("triton.jit") for decorator in decorators):
                continue
            a = child.args
            parameters = [*a.posonlyargs, *a.args][int(in_class and "staticmethod" not in decorators) :]
            parameters += [*a.kwonlyargs, *(x for x in (a.vararg, a.kwarg) if x is not None)]
            if child.returns is None or any(parameter.annotation is None for parameter in parameters):
                found.append(f"{file.relative_to(ROOT)}:{child.lineno} {child.name}")
            visit(child, False)

    visit(ast.parse(file.read_text()), False)
    return found


@pytest.mark.parametrize("package", ["qvl_kernels", "qvl_model", "bench"])
def test_functions_are_typed(package):
    wrong = [function for file in (ROOT / package).rglob("*.py") for function in _untyped(file)]
    assert not wrong, f"without types: {wrong}"
