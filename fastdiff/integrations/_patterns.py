"""Forms of expressions that `rewriting` knows."""

from __future__ import annotations

import ast

from fastdiff.integrations._flow import METADATA, assigned_name


def sole_argument(e: ast.AST) -> ast.expr | None:
    """x in f(x) and f(x, inplace=...)."""
    if not isinstance(e, ast.Call) or len(e.args) != 1 or isinstance(e.args[0], ast.Starred):
        return None
    return e.args[0] if all(k.arg == "inplace" for k in e.keywords) else None


def function_name(e: ast.AST) -> str | None:
    """The last name of a call without keywords: "add" of torch.add(...) and h.add(...)."""
    if not isinstance(e, ast.Call) or e.keywords:
        return None
    return getattr(e.func, "attr", getattr(e.func, "id", None))


def is_torch(e: ast.expr) -> bool:
    return isinstance(e, ast.Name) and e.id in ("torch", "th")


def binary(e: ast.AST) -> tuple[str, ast.expr, ast.expr] | None:
    """("add" or "mul", a, b) of a + b, torch.add(a, b), a.add(b), and the same for products."""
    if isinstance(e, ast.BinOp) and isinstance(e.op, (ast.Add, ast.Mult)):
        return ("add" if isinstance(e.op, ast.Add) else "mul"), e.left, e.right
    name = function_name(e)
    if name not in ("add", "mul") or not isinstance(e.func, ast.Attribute):
        return None
    operands = e.args if is_torch(e.func.value) else [e.func.value, *e.args]
    return (name, *operands) if len(operands) == 2 else None


def one_plus(e: ast.expr) -> ast.expr | None:
    """s of 1 + s."""
    kind, a, b = binary(e) or ("", e, e)
    for one, s in ((a, b), (b, a)):
        if kind == "add" and isinstance(one, ast.Constant) and one.value in (1, 1.0):
            return s
    return None


def cast(e: ast.AST) -> ast.expr | None:
    """h of h.float(), h.type(dtype) and h.to(dtype)."""
    if function_name(e) not in ("float", "type", "to") or len(e.args) > 1:
        return None
    return e.func.value if isinstance(e.func, ast.Attribute) else None


def is_name(e: ast.AST, name: str | None = None) -> bool:
    return isinstance(e, ast.Name) and (name is None or e.id == name)


def swish(e: ast.AST) -> tuple[str, ast.expr] | None:
    """(v, f) of v * f(v), with an f called sigmoid."""
    kind, a, b = binary(e) or ("", e, e)
    for v, gate in ((a, b), (b, a)):
        if kind == "mul" and is_name(v) and function_name(gate) == "sigmoid":
            if len(gate.args) == 1 and is_name(gate.args[0], v.id):
                return v.id, gate.func
            if not gate.args and is_name(gate.func.value, v.id):  # v.sigmoid()
                return v.id, ast.Attribute(ast.Name("torch", ast.Load()), "sigmoid", ast.Load())
    return None


def loads(node: ast.AST) -> dict[str, int]:
    """How often each name is read, but for shape and dtype, and pairs that are fused whole."""
    counts: dict[str, int] = {}
    metadata = {
        id(n.value)
        for n in ast.walk(node)
        if isinstance(n, ast.Attribute) and n.attr in (*METADATA, "size", "dim")
    }
    comprehensions = ast.ListComp, ast.SetComp, ast.DictComp
    repeated = [m for n in ast.walk(node) if isinstance(n, comprehensions) for m in ast.walk(n)]
    for n in [*ast.walk(node), *repeated]:
        if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load) and id(n) not in metadata:
            counts[n.id] = counts.get(n.id, 0) + 1
        if found := swish(n):
            counts[found[0]] = counts.get(found[0], 0) - 1
        kind, a, b = binary(n) or ("", n, n)
        for g, product in ((a, b), (b, a)):  # g + g * s
            factor, c, d = binary(product) or ("", n, n)
            if (kind, factor) != ("add", "mul") or not is_name(g):
                continue
            if is_name(c, g.id) or is_name(d, g.id):
                counts[g.id] = counts.get(g.id, 0) - 1
    return counts


def only_metadata(s: ast.stmt, name: str) -> bool:
    """Whether a statement does nothing with a variable but ask for its shape or dtype."""
    asked = {
        id(n.value) for n in ast.walk(s) if isinstance(n, ast.Attribute) and n.attr in METADATA
    }
    return all(id(n) in asked for n in ast.walk(s) if is_name(n, name))


def augmented(definition: ast.FunctionDef) -> ast.FunctionDef:
    """`h.add_(t)` and `h = h.add_(t)` as `h += t`, which says what they do."""

    class Augment(ast.NodeTransformer):
        def _from(self, s: ast.stmt) -> ast.stmt:
            e = s.value
            if function_name(e) == "add_" and len(e.args) == 1 and is_name(e.func.value):
                name = e.func.value.id
                if isinstance(s, ast.Expr) or assigned_name(s) == name:
                    new = ast.AugAssign(ast.Name(name, ast.Store()), ast.Add(), e.args[0])
                    new.is_method = True
                    return ast.copy_location(new, s)
            return s

        visit_Expr = visit_Assign = _from

    return Augment().visit(definition)


def restored(s: ast.AugAssign) -> ast.stmt:
    if not getattr(s, "is_method", False):
        return s
    method = ast.Attribute(ast.Name(s.target.id, ast.Load()), "add_", ast.Load())
    new = ast.Assign([s.target], ast.Call(method, [s.value], []))
    return ast.fix_missing_locations(ast.copy_location(new, s))
