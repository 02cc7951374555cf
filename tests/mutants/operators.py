"""Mutants of a source file: all the small faults that the check knows how to make in it.

Left out: docstrings, annotations, imports, `__all__`, messages of errors, and moves between devices, which a CPU cannot show.
"""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import singledispatch
from pathlib import Path
from types import CodeType

OPERATORS: dict[type[ast.AST], tuple[type[ast.AST], ...]] = {
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div,),
    ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Mult,),
    ast.Mod: (ast.FloorDiv,),
    ast.Pow: (ast.Mult,),
    ast.LShift: (ast.RShift,),
    ast.RShift: (ast.LShift,),
    ast.BitOr: (ast.BitAnd,),
    ast.BitAnd: (ast.BitOr,),
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.And: (ast.Or,),
    ast.Or: (ast.And,),
}
_PAIRS = (
    "min max",
    "any all",
    "zeros ones",
    "zeros_like ones_like",
    "zeros_ ones_",
    "sin cos",
    "exp expm1",
    "log log1p",
    "sum mean",
    "argsort argmin",
    "float32 float64",
    "int32 int64",
    "float double",
)
OTHER_NAMES = {a: b for pair in map(str.split, _PAIRS) for a, b in (pair, reversed(pair))}
DEVICE_MOVES = {"cpu", "contiguous"}
SYMMETRIC = {"min", "max", "maximum", "promote_types"}
NO_VALUES = {
    "self",
    "cls",
    "torch",
    "functional",
    "nn",
    "np",
    "math",
    "difflib",
    "hashlib",
    "json",
    "os",
    "shutil",
    "contextlib",
}
NOT_FOLLOWED = {"annotation", "returns", "decorator_list", "bases"}
Fault = ast.AST | list[ast.stmt]
TYPE_MAKERS = {"Callable", "Sequence", "TypeVar", "NDArray", "dict"}


@dataclass(frozen=True)
class Mutant:
    """One fault: where it is, what the code says there, what it says instead; `reach` is the line of the statement that must run."""

    path: str
    line: int
    reach: int
    before: str
    after: str
    spot: int
    choice: int | None  # None: the code as it is
    on_import: bool  # a constant, a default, a class's body: read when the module is imported, not when a test runs

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.before}  ->  {self.after}"

    def code(self, root: Path) -> CodeType:
        """The compiled module with the fault in it."""
        tree = ast.parse((root / self.path).read_text())
        if self.choice is not None:
            spot = list(_spots(tree))[self.spot]
            spot.put(list(_faults(spot.node))[self.choice])
        return compile(ast.fix_missing_locations(tree), str(root / self.path), "exec", dont_inherit=True)


@dataclass(frozen=True)
class _Spot:
    node: ast.AST
    parent: ast.AST
    field: str
    position: int | None
    statement: ast.stmt
    on_import: bool

    def put(self, new: ast.AST | list[ast.stmt]) -> None:
        if self.position is None:
            setattr(self.parent, self.field, new)
        else:
            getattr(self.parent, self.field)[self.position : self.position + 1] = (
                new if isinstance(new, list) else [new]
            )


def mutants_of(path: str, root: Path) -> list[Mutant]:
    """All mutants of a file, in the order of its lines."""
    found = []
    for number, spot in enumerate(_spots(ast.parse((root / path).read_text()))):
        line = getattr(spot.node, "lineno", spot.statement.lineno)
        for choice, fault in enumerate(_faults(spot.node)):
            found.append(
                Mutant(
                    path, line, _reach(spot.statement), _short(spot.node), _short(fault), number, choice, spot.on_import
                )
            )
    return found


def _short(code: Fault) -> str:
    """Its first line, without the condition's or the loop's body; all that follows of what has no first line of its own."""
    if isinstance(code, list):
        return " ".join(map(_short, code))[:100]
    lines = ast.unparse(code).splitlines()
    return " ".join(lines if isinstance(code, ast.FunctionDef | ast.ExceptHandler | ast.Try) else lines[:1])[:100]


def _reach(statement: ast.stmt) -> int:
    """The line of the statement; of a function that of its first, since its head runs on import."""
    return (statement.body[0] if isinstance(statement, ast.FunctionDef) else statement).lineno


def marked(path: str, root: Path, mark: str) -> CodeType:
    """The compiled module with `mark[line] = True` before each statement of its functions."""

    class Marks(ast.NodeTransformer):
        inside = False

        def generic_visit(self, node: ast.AST) -> ast.AST:
            outer, self.inside = self.inside, self.inside or isinstance(node, ast.FunctionDef)
            super().generic_visit(node)
            for name in ("body", "orelse", "finalbody") if self.inside else ():
                block = getattr(node, name, None)
                if isinstance(block, list):
                    marks = (ast.parse(f"{mark}[{statement.lineno}] = True").body for statement in block)
                    setattr(
                        node, name, [line for pair in zip(marks, block, strict=True) for line in (*pair[0], pair[1])]
                    )
            self.inside = outer
            return node

    tree = Marks().visit(ast.parse((root / path).read_text()))
    return compile(ast.fix_missing_locations(tree), str(root / path), "exec", dont_inherit=True)


def _spots(tree: ast.AST, statement: ast.stmt | None = None, in_function: bool = False) -> Iterator[_Spot]:
    for name, value in ast.iter_fields(tree):
        if name in NOT_FOLLOWED:
            continue
        inside = in_function or (name == "body" and isinstance(tree, ast.FunctionDef | ast.Lambda))
        for position, node in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(node, ast.AST) or _is_left_out(node, tree):
                continue
            within = node if isinstance(node, ast.stmt) else statement
            if within is not None:
                yield _Spot(node, tree, name, position, within, not inside)
            if not isinstance(node, ast.Raise):
                yield from _spots(node, within, inside)


def _is_left_out(node: ast.AST, parent: ast.AST) -> bool:
    match node:
        case ast.Import() | ast.ImportFrom() | ast.JoinedStr() | ast.expr_context() | ast.operator() | ast.cmpop():
            return True
        case ast.Expr(value=ast.Constant()):  # a docstring
            return True
        case ast.Assign(targets=[ast.Name(id="__all__")]):
            return True
        case ast.Assign(value=value) if isinstance(parent, ast.Module):
            return any(getattr(n, "id", getattr(n, "attr", "")) in TYPE_MAKERS for n in ast.walk(value)) or (
                isinstance(value, ast.BinOp) and isinstance(value.op, ast.BitOr)
            )
    return False


def _changed(node: ast.AST, **fields: object) -> ast.AST:
    new = copy.copy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new


def _other(operator: ast.AST) -> Iterator[ast.AST]:
    for kind in OPERATORS.get(type(operator), ()):
        yield kind()


def _without(items: list, i: int) -> list:  # type: ignore[type-arg]
    return items[:i] + items[i + 1 :]


@singledispatch
def _faults(node: ast.AST) -> Iterator[Fault]:
    """What a node may be replaced by; nothing for most kinds."""
    yield from ()


@_faults.register(ast.Expr)
@_faults.register(ast.Raise)
def _left_out(node: ast.stmt) -> Iterator[Fault]:
    yield ast.Pass()


@_faults.register
def _assign(node: ast.Assign) -> Iterator[Fault]:
    if not isinstance(node.targets[0], ast.Name | ast.Tuple):  # without a name the rest would not run at all
        yield ast.Pass()


@_faults.register
def _aug_assign(node: ast.AugAssign) -> Iterator[Fault]:
    yield ast.Pass()
    for op in _other(node.op):
        yield _changed(node, op=op)


@_faults.register
def _return(node: ast.Return) -> Iterator[Fault]:
    if node.value is not None:
        yield ast.Return(ast.Constant(None))


@_faults.register
def _break(node: ast.Break) -> Iterator[Fault]:
    yield ast.Continue()


@_faults.register
def _continue(node: ast.Continue) -> Iterator[Fault]:
    yield ast.Break()


@_faults.register(ast.If)
@_faults.register(ast.While)
def _condition(node: ast.If | ast.While) -> Iterator[Fault]:
    if not isinstance(node.test, ast.Compare):  # a comparison's own faults turn it round
        yield _changed(node, test=ast.UnaryOp(ast.Not(), node.test))


@_faults.register
def _for(node: ast.For) -> Iterator[Fault]:
    yield _changed(node, iter=ast.Tuple([], ast.Load()))


@_faults.register
def _with(node: ast.With) -> Iterator[Fault]:
    if node.items[0].optional_vars is None:
        yield node.body


@_faults.register
def _try(node: ast.Try) -> Iterator[Fault]:
    if node.finalbody:
        yield _changed(node, finalbody=[ast.Pass()])


@_faults.register
def _handler(node: ast.ExceptHandler) -> Iterator[Fault]:
    yield _changed(node, body=[ast.Raise()])
    if isinstance(node.type, ast.Tuple):
        for i in range(len(node.type.elts)):
            yield _changed(node, type=_changed(node.type, elts=_without(node.type.elts, i)))


@_faults.register
def _function(node: ast.FunctionDef) -> Iterator[Fault]:
    for i, decorator in enumerate(node.decorator_list):
        if "no_grad" in ast.unparse(decorator):
            yield _changed(node, decorator_list=_without(node.decorator_list, i))


@_faults.register
def _binary(node: ast.BinOp) -> Iterator[Fault]:
    for op in _other(node.op):
        yield _changed(node, op=op)
    yield node.left


@_faults.register
def _unary(node: ast.UnaryOp) -> Iterator[Fault]:
    yield node.operand


@_faults.register
def _compare(node: ast.Compare) -> Iterator[Fault]:
    for i, operator in enumerate(node.ops):
        for op in _other(operator):
            yield _changed(node, ops=[*node.ops[:i], op, *node.ops[i + 1 :]])


@_faults.register
def _boolean(node: ast.BoolOp) -> Iterator[Fault]:
    for op in _other(node.op):
        yield _changed(node, op=op)
    for i in range(len(node.values)):
        rest = _without(node.values, i)
        yield rest[0] if len(rest) == 1 else _changed(node, values=rest)


@_faults.register
def _conditional(node: ast.IfExp) -> Iterator[Fault]:
    yield node.body
    yield node.orelse


@_faults.register
def _comprehension(node: ast.comprehension) -> Iterator[Fault]:
    if node.ifs:
        yield _changed(node, ifs=[])


@_faults.register
def _slice(node: ast.Slice) -> Iterator[Fault]:
    if node.lower:
        yield _changed(node, lower=None)
    if node.upper:
        yield _changed(node, upper=None)


@_faults.register
def _attribute(node: ast.Attribute) -> Iterator[Fault]:
    if node.attr in OTHER_NAMES:
        yield _changed(node, attr=OTHER_NAMES[node.attr])


@_faults.register
def _constant(node: ast.Constant) -> Iterator[Fault]:
    match node.value:
        case bool(value):
            yield ast.Constant(not value)
        case int(value):
            yield ast.Constant(value + 1)
            yield ast.Constant(value - 1)
        case float(value):
            yield ast.Constant(2 * value or 1.0)
        case str(value) if re.fullmatch(r"[\w.-]+", value):
            yield ast.Constant(value + "X")


@_faults.register
def _call(node: ast.Call) -> Iterator[Fault]:
    for i, keyword in enumerate(node.keywords):
        if keyword.arg != "device":
            yield _changed(node, keywords=_without(node.keywords, i))
    if len(node.args) >= 2:
        alike = ast.dump(node.args[0]) == ast.dump(node.args[1])
        if not alike and ast.unparse(node.func).rpartition(".")[2] not in SYMMETRIC:
            yield _changed(node, args=[node.args[1], node.args[0], *node.args[2:]])
        yield _changed(node, args=node.args[:-1])
    match node.func:
        case ast.Attribute(value=receiver) if _is_method(node):
            yield receiver
        case ast.Name(id="range"):
            yield _changed(node, args=[*node.args[:-1], ast.BinOp(node.args[-1], ast.Sub(), ast.Constant(1))])
        case ast.Name(id=name) if name in OTHER_NAMES:
            yield _changed(node, func=ast.Name(OTHER_NAMES[name], ast.Load()))


def _is_method(call: ast.Call) -> bool:
    """Whether it is called on a value and not on a module, `self` or a class, and is no move between devices."""
    assert isinstance(call.func, ast.Attribute)
    if isinstance(call.func.value, ast.Name) and call.func.value.id in NO_VALUES:
        return False
    return call.func.attr not in DEVICE_MOVES and not (call.func.attr == "to" and "device" in ast.unparse(call))
