"""Code in which any one event can be lost: each expression that gives events may give None instead.

The functions of some modules are compiled anew with every name, attribute, item and call wrapped, and run so; which of
them ever give an event, a run tells. Calls that order without an event, such as a device's `synchronize`, can be left
out in the same way.
"""

import ast
import contextlib
import inspect
import types
from pathlib import Path
from typing import NamedTuple

# Answers to these decide nothing about order.
_QUESTIONS = {"done", "copy_s", "__del__"}
_COLLECTIONS = (dict, list, tuple, set, type({}.values()))


class Site(NamedTuple):
    """One expression of the code."""

    file: str
    line: int
    text: str

    def __str__(self):
        return f"{self.file}:{self.line}: {self.text}"


class LostEvents:
    """The code of some modules.

    Args:
        modules: of moeflow.
        events: classes of events.
        orders: functions, as methods of classes, that may be left out of the code.

    Attributes:
        lost: the expression that gives None, or the method that is not called; None while nothing is lost.
        seen: those that gave an event, or a method of `orders`.
        reached: all that were evaluated.
    """

    def __init__(self, modules, events, orders):
        self.lost: int | None = None
        self.seen: set[int] = set()
        self.reached: set[int] = set()
        self.sites: list[Site] = []
        self._events, self._orders = tuple(events), set(orders)
        self._codes = []  # (function, its code, its wrapped code)
        self._modules = modules
        for module in modules:
            path = Path(module.__file__)
            source = path.read_text()
            tree = _Wrapper(self, path.name, source).visit(ast.parse(source))
            codes = _codes_in(compile(ast.fix_missing_locations(tree), str(path), "exec"))
            for function in _functions_in(module):
                code = function.__code__
                self._codes.append((function, code, codes[code.co_name, code.co_firstlineno]))

    @contextlib.contextmanager
    def installed(self):
        """Run the wrapped code meanwhile."""
        for module in self._modules:
            module._evaluate = self._evaluate
        for function, _, wrapped in self._codes:
            function.__code__ = wrapped
        try:
            yield
        finally:
            for function, code, _ in self._codes:
                function.__code__ = code
            for module in self._modules:
                del module._evaluate

    def unreached(self, text) -> list[Site]:
        """Return the expressions with a text in them that no run has evaluated."""
        return [site for number, site in enumerate(self.sites) if text in site.text and number not in self.reached]

    def _evaluate(self, number, value):
        self.reached.add(number)
        if isinstance(value, self._events):
            self.seen.add(number)
            return None if number == self.lost else value
        if isinstance(value, _COLLECTIONS) and self._is_of_events(value):
            self.seen.add(number)
            if number == self.lost:
                return {} if isinstance(value, dict) else [None] * len(value)
            return value
        if isinstance(value, types.MethodType) and value.__func__ in self._orders:
            self.seen.add(number)
            return (lambda *args: None) if number == self.lost else value
        return value

    def _is_of_events(self, values):
        """Whether these are events, and None where there is none yet."""
        found = list(values.values() if isinstance(values, dict) else values)
        return any(isinstance(value, self._events) for value in found) and all(
            value is None or isinstance(value, self._events) for value in found
        )


class _Wrapper(ast.NodeTransformer):
    """Turns `x` into `_evaluate(number, x)`, in functions."""

    def __init__(self, lost, file, source):
        self._lost, self._file, self._lines = lost, file, source.splitlines()

    def visit_FunctionDef(self, node):
        if node.name not in _QUESTIONS:
            node.body = [self.visit(line) for line in node.body]
        return node

    def visit_AnnAssign(self, node):
        if node.value is not None:
            node.value = self.visit(node.value)
        return node

    def visit_Name(self, node):
        return self._wrapped(self._inside(node))

    visit_Attribute = visit_Subscript = visit_Call = visit_Name

    def _inside(self, node):
        """Wrap what is in an expression, and not the whole: a method of an event is left out together with it."""
        if isinstance(node, ast.Attribute):
            node.value = self._inside(node.value)
        elif isinstance(node, ast.Call):
            question = isinstance(node.func, ast.Attribute) and node.func.attr in _QUESTIONS
            node.func = self.visit(node.func)
            if not question:
                node.args = [self.visit(argument) for argument in node.args]
                node.keywords = [self.visit(keyword) for keyword in node.keywords]
        elif not isinstance(node, ast.Name):
            node = self.generic_visit(node)
        return node

    def _wrapped(self, node):
        if not isinstance(getattr(node, "ctx", ast.Load()), ast.Load):
            return node
        number = len(self._lost.sites)
        end = node.end_col_offset if node.end_lineno == node.lineno else None
        self._lost.sites.append(Site(self._file, node.lineno, self._lines[node.lineno - 1][node.col_offset : end]))
        call = ast.Call(ast.Name("_evaluate", ast.Load()), [ast.Constant(number), node], [])
        return ast.copy_location(call, node)


def _codes_in(code) -> dict:
    found = {}
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            found[inner.co_name, inner.co_firstlineno] = inner
            found |= _codes_in(inner)
    return found


def _functions_in(module):
    """Yield the functions of a module and of its classes."""
    for value in vars(module).values():
        for member in vars(value).values() if inspect.isclass(value) else [value]:
            function = getattr(member, "__func__", None) or getattr(member, "fget", None) or inspect.unwrap(member)
            if inspect.isfunction(function) and function.__code__.co_filename == module.__file__:
                yield function
