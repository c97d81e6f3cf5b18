"""Small faults for tests/mutants.py: what can be changed in a source file, one place at a time.

A comparison, operator, constant or condition, a removed statement, None returned, two arguments
swapped. Texts of messages, f-strings, annotations and docstrings are left alone: no test reads
them word by word.
"""
import ast
from collections.abc import Iterator

OTHER = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
         ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn,
         ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And, ast.Add: ast.Sub, ast.Sub: ast.Add,
         ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
         ast.Pow: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr}
SPEAKS = {"print", "add_argument", "ArgumentParser", "add_parser", "exit", "flag"}
EITHER = {"max", "min", "maximum", "minimum", "equal", "promote_types", "transpose",
          "addcmul_"}  # no order to mistake


def called(node: ast.Call) -> str:
    return ast.unparse(node.func).split(".")[-1]


def swapped(node: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    """(part of the node, what is put there instead) for one node."""
    def changed(**fields):
        return type(node)(**dict(ast.iter_fields(node)) | fields)

    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            yield node, changed(ops=[*node.ops[:i], OTHER[type(op)](), *node.ops[i + 1:]])
    if isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(node.op) in OTHER:
        yield node, changed(op=OTHER[type(node.op)]())
    if isinstance(node, ast.UnaryOp):
        yield node, node.operand
    if isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float | str):
        value = node.value
        yield node, ast.Constant(not value if isinstance(value, bool) else "XX" + value
                                 if isinstance(value, str) else value + 1)
    for test in [getattr(node, "test", None), *getattr(node, "ifs", ())]:
        if test and not isinstance(test, ast.Compare | ast.BoolOp | ast.UnaryOp | ast.Constant):
            yield test, ast.UnaryOp(ast.Not(), test)
    if isinstance(node, ast.Call) and len(node.args) > 1 and called(node) not in EITHER and not any(
            isinstance(a, ast.Starred) for a in node.args[:2]):
        yield node, changed(args=[node.args[1], node.args[0], *node.args[2:]])
    if isinstance(node, ast.Return) and node.value and ast.unparse(node.value) != "None":
        yield node, ast.Return(ast.Constant(None))
    place = isinstance(node, ast.Assign) and not isinstance(node.targets[0], ast.Name | ast.Tuple)
    if place or isinstance(node, ast.Expr | ast.AugAssign | ast.Raise | ast.Break | ast.Continue):
        yield node, ast.Pass()


def parts(node: ast.AST) -> Iterator[ast.AST]:
    """The node and all below it but annotations, docstrings, messages and the __main__ guard."""
    if isinstance(node, ast.JoinedStr) or (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant | ast.Yield)) or (
            isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)):
        return
    yield node
    speaks = isinstance(node, ast.Call) and called(node) in SPEAKS
    if isinstance(node, ast.Raise) or speaks:
        return
    for name, value in ast.iter_fields(node):
        if name not in ("annotation", "returns", "decorator_list", "msg"):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from parts(child)


def mutations(source: str) -> list[tuple[int, str]]:
    """(line, whole changed source) of every fault."""
    lines, found = source.splitlines(keepends=True), {}
    starts = [sum(map(len, lines[:i])) for i in range(len(lines))]
    for node in parts(ast.parse(source)):
        for part, new in swapped(node):
            a = starts[part.lineno - 1] + part.col_offset
            b = starts[part.end_lineno - 1] + part.end_col_offset
            text = ast.unparse(ast.fix_missing_locations(new))
            text = f"({text})" if isinstance(new, ast.expr) else text
            if ast.dump(new) != ast.dump(part):
                found[source[:a] + text + source[b:]] = part.lineno
    return [(line, text) for text, line in found.items()]
