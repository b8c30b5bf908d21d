"""The rules of the house that no linter holds: sizes, and whose private names are whose."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def files(folder, *endings):
    found = sorted(path for path in (ROOT / folder).rglob("*") if path.suffix in endings)
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in found}


PACKAGE = files("lcodec_ext", ".py")
PYTHON = PACKAGE | files("benchmarks", ".py") | files("examples", ".py")
NATIVE = files("csrc", ".cpp", ".hpp", ".cu", ".cuh")
LONGEST_FUNCTION, LONGEST_FILE = 80, 700  # lines of code


def code_lines(source):
    """Numbers of the lines that hold code: no docstrings, comments or blank lines."""
    found = set(range(1, source.count("\n") + 2))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            found -= set(range(node.lineno, node.end_lineno + 1))
    lines = source.splitlines()
    return {
        k
        for k in found
        if k <= len(lines) and lines[k - 1].strip() and lines[k - 1].strip()[0] != "#"
    }


@pytest.mark.parametrize("name", PYTHON)
def test_sizes(name):
    source = PYTHON[name]
    code = code_lines(source)
    assert len(code) <= LONGEST_FILE
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            size = len(code & set(range(node.lineno, node.end_lineno + 1)))
            assert size <= LONGEST_FUNCTION, f"{node.name} has {size} lines of code"


# Comments and literals; what they hold is no brace.
NO_CODE = re.compile(
    r"//[^\n]*|/\*.*?\*/|(?<![\w'])'(?:\\.|[^\\'\n])+'|"  # not the ' in 1'000
    r'"(?:\\.|[^\\"\n])*"',
    re.DOTALL,
)
HOLDS_OTHERS = re.compile(r"\b(namespace|struct|class|union|enum|extern)\b[^()]*$")


def native_code(source):
    """C++ or CUDA without comments, literals and directives, whose lines stay."""
    source = NO_CODE.sub(lambda found: "\n" * found[0].count("\n"), source)
    directive = re.compile(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", re.M)
    return directive.sub(lambda found: "\n" * found[0].count("\n"), source)


def native_functions(code):
    """Heads of the functions, lambdas inside left out, and the lines of code from head to end."""
    head, braces, line = "", [], 1  # braces: of each open one, its head and the line of its start
    for sign in code:
        line += sign == "\n"
        if sign == "{":
            braces.append((head.strip(), line - head.lstrip().count("\n")))
        elif sign == "}":
            start, first = braces.pop()
            outer = all(HOLDS_OTHERS.search(other) for other, _ in braces)
            if outer and "(" in start and not HOLDS_OTHERS.search(start):
                lines = code.splitlines()[first - 1 : line]
                yield start, sum(1 for text in lines if text.strip())
        head = "" if sign in "{};" else head + sign
    assert not braces


@pytest.mark.parametrize("name", NATIVE)
def test_native_sizes(name):
    """Lines of directives count in a file, not in a function."""
    no_comments = NO_CODE.sub(lambda found: "x" if found[0][0] != "/" else "", NATIVE[name])
    assert sum(1 for line in no_comments.splitlines() if line.strip()) <= LONGEST_FILE
    for head, size in native_functions(native_code(NATIVE[name])):
        assert size <= LONGEST_FUNCTION, f"{head} has {size} lines of code"


def test_native_functions_are_found():
    code = native_code(
        "namespace a { // {\n"
        "template <class T> struct B : C<T> {\n"
        "    int f(int x,\n          int y) const {\n"
        "        auto g = [&](int z) { return z; };\n\n"
        "        return g('{') + 1'000; /* } */\n    }\n};\n"
        "#define X {\n"
        'void h() { print("}"); }\n}\n'
    )
    found = [(head.split("(")[0].split()[-1], size) for head, size in native_functions(code)]
    assert found == [("f", 5), ("h", 1)]


@pytest.mark.parametrize("name", PACKAGE)
def test_private_names_stay_in_their_package(name):
    here = ".".join(Path(name).with_suffix("").parts)
    for node in ast.walk(ast.parse(PACKAGE[name])):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith(
            "lcodec_ext."
        ):
            continue
        package = node.module.rpartition(".")[0]
        for alias in node.names:
            private = alias.name.startswith("_") and not alias.name.startswith("__")
            assert not private or here.startswith(package + "."), f"{node.module}.{alias.name}"
