"""The source of a function that runs, and the function compiled again from a changed tree.

What cannot be read back for certain is refused: no source, a file that has changed since, a
function made at run time, a decorator that hides the function below it.
"""

from __future__ import annotations
import __future__

import ast
import copy
import functools
import inspect
import linecache
import textwrap
from collections.abc import Iterator
from types import CellType, CodeType, FunctionType

_FUTURES = sum(getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)


def methods_of(cls: type) -> dict[str, FunctionType]:
    """The methods that an instance runs, by name; those of torch's own classes left out."""
    found: dict[str, object] = {}
    for c in cls.__mro__:
        for name, value in vars(c).items():
            found.setdefault(name, None if c.__module__.startswith("torch.") else value)
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, FunctionType) and not name.startswith("__")
    }


def innermost(function: FunctionType) -> FunctionType | None:
    """Below decorators, each of which must keep the function below it in its closure."""
    while (inner := function.__dict__.get("__wrapped__")) is not None:
        cells = function.__closure__ or ()
        if not isinstance(inner, FunctionType) or sum(_holds(c, inner) for c in cells) != 1:
            return None
        if "_torchdynamo_orig_callable" in function.__dict__:  # torch.compile's keeps it elsewhere
            return None
        function = inner
    return function


def names_in_code(function: FunctionType) -> set[str]:
    """All that a function names, below its decorators."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return set() if code is None else {*code.co_names}


def _holds(cell: CellType, value: object) -> bool:
    try:
        return cell.cell_contents is value
    except ValueError:  # an empty cell
        return False


def definition_of(function: FunctionType) -> ast.FunctionDef | str:
    """What the function was made of, or why that is not certain."""
    inner = innermost(function)
    if inner is None:
        return "a decorator hides what it decorates"
    found = _definition(inner)
    return found if isinstance(found, str) else copy.deepcopy(found)


@functools.cache
def _definition(function: FunctionType) -> ast.FunctionDef | str:
    code = function.__code__
    try:
        lines, first = inspect.getsourcelines(code)
        source = "".join(linecache.getlines(code.co_filename))
        if _codes(source, code.co_filename).get((code.co_name, code.co_firstlineno)) != code:
            return "its source is not what runs"
        definition = ast.parse(textwrap.dedent("".join(lines))).body[0]
    except (OSError, TypeError, SyntaxError, ValueError):  # made at run time
        return "it has no source"
    if not isinstance(definition, ast.FunctionDef) or not definition.args.args:
        return "it is no plain method"
    owner, nodes = definition.args.args[0].arg, list(ast.walk(definition))
    stored = (n.id for n in nodes if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load))
    if owner in stored or getattr(definition, "type_params", None):
        return f"it assigns to {owner}"
    if any(_is_mangled(name) for n in nodes for name in _identifiers(n)):
        return "it uses private (mangled) names"  # in a class these have other names
    return ast.increment_lineno(definition, first - 1)


def _identifiers(node: ast.AST) -> Iterator[str]:
    if not isinstance(node, ast.Constant):
        for _, value in ast.iter_fields(node):
            for one in value if isinstance(value, list) else [value]:
                if isinstance(one, str):
                    yield one


def _is_mangled(name: str) -> bool:
    return name.startswith("__") and not name.endswith("__")


@functools.lru_cache(maxsize=8)
def _codes(source: str, filename: str) -> dict[tuple[str, int], CodeType]:
    """Every code object that the source gives, by name and first line.

    Of the whole file: alone a function gets other bytecode, as what the file imports matters.
    """
    found, todo = {}, [compile(source, filename, "exec", dont_inherit=True)]
    while todo:
        code = todo.pop()
        found[code.co_name, code.co_firstlineno] = code
        todo += [c for c in code.co_consts if isinstance(c, CodeType)]
    return found


def recompiled(
    function: FunctionType, body: ast.FunctionDef, helpers: dict[str, object]
) -> FunctionType:
    """`function` with another body, which may name `helpers`.

    Same file, lines, globals, defaults and closure. Under decorators the innermost function is
    replaced, and the decorators are put around it again with the same closures.
    """
    inner = function.__dict__.get("__wrapped__")
    if inner is None:
        return _compiled(function, body, helpers)
    new = recompiled(inner, body, helpers)
    cells = tuple(CellType(new) if _holds(c, inner) else c for c in function.__closure__)
    around = _like(function, function.__code__, cells)
    around.__wrapped__ = new
    return around


def _like(function: FunctionType, code: CodeType, closure: tuple) -> FunctionType:
    made = FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, closure or None
    )
    made.__kwdefaults__ = function.__kwdefaults__
    return functools.update_wrapper(made, function)


def _compiled(
    function: FunctionType, body: ast.FunctionDef, helpers: dict[str, object]
) -> FunctionType:
    # The signature is kept from `function`; what is evaluated where a def stands is left out.
    body.decorator_list, body.returns = [], None
    body.args.defaults = [ast.Constant(None) for _ in body.args.defaults]
    body.args.kw_defaults = [d and ast.Constant(None) for d in body.args.kw_defaults]
    for argument in ast.walk(body.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    # In a factory whose parameters are its closure, `__class__` for super() among them.
    names = sorted({*helpers, *function.__code__.co_freevars})
    parameters = ast.arguments([], [ast.arg(name) for name in names], None, [], [], None, [])
    factory = ast.parse("def factory(): pass").body[0]
    factory.args, factory.body = parameters, [body, ast.Return(ast.Name(body.name, ast.Load()))]
    module = ast.fix_missing_locations(ast.Module([factory], []))
    flags = function.__code__.co_flags & _FUTURES
    namespace: dict = {}
    code = compile(module, function.__code__.co_filename, "exec", flags, dont_inherit=True)
    exec(code, function.__globals__, namespace)
    made = namespace["factory"](**dict.fromkeys(names))
    cells = {name: CellType(helper) for name, helper in helpers.items()}
    cells |= zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return _like(function, made.__code__, tuple(cells[name] for name in made.__code__.co_freevars))
