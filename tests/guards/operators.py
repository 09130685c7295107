"""The ways to remove a guard, as operators of the mutation tester cosmic-ray.

An operator is asked for every node of a module's syntax tree (parso's) which guards start there, and removes one of
them. A guard is told by its text, normalised so that neither its line nor its layout matters.
"""

from __future__ import annotations

import ast
import re
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import NamedTuple

from cosmic_ray.operators.operator import Example, Operator
from parso.python.tree import Keyword
from parso.tree import NodeOrLeaf

# Statements that are a call of one of these are there for the error that the call may raise. A class that is called
# and dropped is called for the checks in its constructor.
GUARD_CALL = re.compile(r"_?(check|require|expect|refuse)(_\w+)?|agree|[A-Z]\w*")


# Where a check does not raise but notes what is wrong: the lists for the notes, and the functions that return one.
NOTES = re.compile(r"problems|failed|findings")
PROBLEMS = re.compile(r"_?problems(_\w+)?")


class Removal(NamedTuple):
    """A guard at a node.

    Attributes:
        at: Where it stands.
        text: What it is, normalised.
        remove: Takes it out of the tree and returns what stands there instead of the node.
    """

    at: NodeOrLeaf
    text: str
    remove: Callable[[], NodeOrLeaf]


class GuardRemover(Operator):
    """An operator that removes one kind of guard."""

    @abstractmethod
    def removals(self, node: NodeOrLeaf) -> list[Removal]:
        """The guards that belong to this very node and not to one inside it."""

    def mutation_positions(self, node):
        return [(removal.at.start_pos, removal.at.end_pos) for removal in self.removals(node)]

    def mutate(self, node, index):
        return self.removals(node)[index].remove()


class Refusal(GuardRemover):
    """`raise` does nothing, nor does `return` where an error was caught, nor is a problem noted: all goes on."""

    def removals(self, node):
        return [Removal(node, refusal_text(node), lambda: word("pass", node))] if is_refusal(node) else []

    @classmethod
    def examples(cls):
        return (
            Example("if a:\n    raise X(b) from c\n", "if a:\n    pass\n"),
            Example("if a: raise X\n", "if a: pass\n"),
            Example("def f():\n    x = 1\n    raise X\n", "def f():\n    x = 1\n    pass\n"),
            Example("try:\n    a()\nexcept X:\n    raise\n", "try:\n    a()\nexcept X:\n    pass\n"),
            Example("try:\n    a()\nexcept X:\n    return 0\n", "try:\n    a()\nexcept X:\n    pass\n"),
            Example("def f():\n    return a\n", "def f():\n    return a\n"),
            Example("if a:\n    problems.append(b)\n", "if a:\n    pass\n"),
            Example("if a:\n    b()\nelse:\n    problems += b\n", "if a:\n    b()\nelse:\n    pass\n"),
            Example("def problems():\n    if a:\n        return [b]\n", "def problems():\n    if a:\n        pass\n"),
            Example("def problems():\n    return [b]\n", "def problems():\n    return [b]\n"),
        )


class Reason(GuardRemover):
    """One of several reasons to refuse no longer counts.

    That is an operand of `or`, and under a `not` one of `and` or a bound of `a <= x < b`, also inside `any` and `all`.
    """

    def removals(self, node):
        if node.type != "if_stmt":
            return []
        found = []
        for i, child in enumerate(node.children):
            if child in ("if", "elif") and refuses(node.children[i + 3]):
                test = node.children[i + 1]
                found += [
                    Removal(at, f"{text} in: if {tidy(test)}", lambda change=change: change() or node)
                    for at, text, change in reasons(test, negated=False)
                ]
        return found

    @classmethod
    def examples(cls):
        def condition(before, *after):
            return [
                Example(f"if {before}:\n    raise X\n", f"if {text}:\n    raise X\n", occurrence=i)
                for i, text in enumerate(after)
            ]

        return (
            *condition("a or b < 0 or c", "False or b < 0 or c", "a or False or c", "a or b < 0 or False"),
            *condition("not (a and b)", "not (True and b)", "not (a and True)"),
            *condition("not 0 <= a < b", "not a < b", "not 0 <= a"),
            *condition("any(a or b for a in x)", "any(False or b for a in x)", "any(a or False for a in x)"),
            *condition("a and (b or c)", "a and (False or c)", "a and (b or False)"),
            *condition("a and b < c < d or not e", "False or not e", "a and b < c < d or False"),
            *condition("f(a or b)", "f(a or b)"),
            Example("if a or b:\n    c()\n", "if a or b:\n    c()\n"),
        )


class Call(GuardRemover):
    """A function that only checks is not called, or what it found is left out."""

    def removals(self, node):
        if node.type == "simple_stmt" and GUARD_CALL.fullmatch((called(node.children[0]) or "").split(".")[-1]):
            call = node.children[0]
            return [Removal(call, tidy(call), lambda: replace(call, word("pass", call)) or node)]
        if node.type == "testlist_comp":
            starred = [each for each in node.children if each.type == "star_expr"]
            return [
                Removal(each, tidy(each.children[1]), lambda each=each: take_out(node.children, each) or node)
                for each in starred
                if PROBLEMS.fullmatch(called(each.children[1]) or "")
            ]
        return []

    @classmethod
    def examples(cls):
        return (
            Example("_check_it(a, b)\n", "pass\n"),
            Example("if a:\n    self.ring.check(a)\n", "if a:\n    pass\n"),
            Example("Ring(3)\n", "pass\n"),
            Example("np.add(a, b)\n", "np.add(a, b)\n"),
            Example("a = _check_it(b)\n", "a = _check_it(b)\n"),
            Example("return [*_problems_a(b), *_problems(c), *d]\n", "return [ *_problems(c), *d]\n"),
        )


class Limit(GuardRemover):
    """A limit on a message's field, or the refusal of fields too many, is not declared."""

    def removals(self, node):
        if node.type == "atom_expr" and (called(node) or "").split(".")[-1] == "Meta":
            holder, wanted = node.children[-1], None
        elif node.type == "classdef":
            holder, wanted = node, "forbid_unknown_fields"
        else:
            return []
        arguments = next((c.children for c in holder.children if c.type == "arglist"), holder.children)

        def without(argument):
            take_out(arguments, argument)
            return node

        return [
            Removal(a, tidy(a), lambda a=a: without(a))
            for a in list(arguments)
            if a.type == "argument" and (wanted is None or a.children[0].value == wanted)
        ]

    @classmethod
    def examples(cls):
        return (
            Example("A = Annotated[int, Meta(ge=0, lt=9)]\n", "A = Annotated[int, Meta( lt=9)]\n"),
            Example("A = Annotated[int, Meta(ge=0, lt=9)]\n", "A = Annotated[int, Meta(ge=0)]\n", occurrence=1),
            Example("A = Annotated[int, Meta(ge=0)]\n", "A = Annotated[int, Meta()]\n"),
            Example("class A(B, forbid_unknown_fields=True):\n    a: int\n", "class A(B):\n    a: int\n"),
        )


class Handler(GuardRemover):
    """One of several kinds of error is no longer caught and told as ours."""

    def removals(self, node):
        if node.type != "except_clause" or len(node.children) < 2 or node.children[1].type != "atom":
            return []
        clauses = node.parent.children
        kinds = node.children[1].children[1]
        if not refuses(clauses[clauses.index(node) + 2]) or kinds.type != "testlist_comp":
            return []

        def without(kind):
            take_out(kinds.children, kind)
            return node

        return [
            Removal(kind, f"{tidy(kind)} in: except {tidy(node.children[1])}", lambda kind=kind: without(kind))
            for kind in kinds.children[::2]
        ]

    @classmethod
    def examples(cls):
        before = "try:\n    a()\nexcept (A, b.B, C) as e:\n    raise\n"
        return (
            Example(before, before.replace("A, ", " ")),
            Example(before, before.replace(", b.B", ""), occurrence=1),
            Example(before, before.replace(", C", ""), occurrence=2),
            Example(before.replace("raise", "pass"), before.replace("raise", "pass")),
        )


OPERATORS: dict[str, type[GuardRemover]] = {kind.__name__: kind for kind in (Refusal, Reason, Call, Limit, Handler)}


def reasons(test: NodeOrLeaf, *, negated: bool) -> Iterator[tuple[NodeOrLeaf, str, Callable[[], None]]]:
    """Parts of a condition whose removal makes it hold less often: where it stands, its text, and the change."""
    if test.type in ("or_test", "and_test"):
        for operand in test.children[::2]:
            if (test.type == "and_test") == negated:
                yield operand, tidy(operand), lambda operand=operand: replace(operand, word(str(negated), operand))
            yield from reasons(operand, negated=negated)
    elif test.type == "not_test":
        yield from reasons(test.children[1], negated=not negated)
    elif test.type == "atom" and test.children[0] == "(" and len(test.children) == 3:
        yield from reasons(test.children[1], negated=negated)
    elif test.type == "comparison" and negated and len(test.children) == 5:
        low, high = test.children[:3], test.children[2:]
        for bound, kept in ((low, high), (high, low)):
            text = tidy("".join(part.get_code() for part in bound))
            yield bound[0], text, lambda kept=kept: setattr(test, "children", kept)
    elif test.type == "atom_expr" and called(test) in ("any", "all"):
        argument = test.children[-1].children[1]
        if argument.type == "argument":
            yield from reasons(argument.children[0], negated=negated)


def is_raise(node: NodeOrLeaf) -> bool:
    """Whether the node is a whole `raise` statement; a bare one is a leaf."""
    return node.type == "raise_stmt" or (node == "raise" and node.parent.type == "simple_stmt")


def is_refusal(node: NodeOrLeaf) -> bool:
    """Whether the node is a statement that says that something is wrong."""
    if node.type == "return_stmt":
        block = block_of(node)
        return block.startswith("except") or (block.startswith("if") and bool(PROBLEMS.fullmatch(function_name(node))))
    if node.type == "expr_stmt":
        return node.children[1] == "+=" and bool(NOTES.fullmatch(tidy(node.children[0])))
    note = (called(node) or "").rpartition(".") if node.parent and node.parent.type == "simple_stmt" else ("", "", "")
    return is_raise(node) or (note[2] == "append" and bool(NOTES.fullmatch(note[0])))


def refuses(suite: NodeOrLeaf) -> bool:
    """Whether one of a block's own statements says that something is wrong."""
    lines = [suite] if suite.type == "simple_stmt" else suite.children
    return any(is_refusal(line.children[0]) for line in lines if line.type == "simple_stmt")


def function_name(node: NodeOrLeaf) -> str:
    """Name of the function around a node, or nothing."""
    while node is not None and node.type != "funcdef":
        node = node.parent
    return "" if node is None else node.name.value


def block_of(node: NodeOrLeaf) -> str:
    """The head of the block that a statement stands in (`if a < b`), or nothing for a function's own block."""
    suite = node.parent if node.parent.parent.type != "suite" else node.parent.parent
    siblings = suite.parent.children
    heads = siblings[: siblings.index(suite) - 1]
    if heads and heads[-1].type == "except_clause":
        kinds = heads[-1].children[1:2]
        return f"except {tidy(kinds[0])}" if kinds else "except"
    if suite.parent.type in ("if_stmt", "while_stmt") and heads[-1] != "else":
        return f"if {tidy(heads[-1])}"
    if suite.parent.type in ("funcdef", "file_input"):
        return ""
    return "else" if heads[-1] == "else" else str(getattr(heads[0], "value", heads[0].type))


def refusal_text(node: NodeOrLeaf) -> str:
    """`if a < b: raise Error`; the message may change."""
    words = getattr(node, "children", [node])
    if node.type == "return_stmt":
        what = "return [...]" if words[1:] and words[1].get_first_leaf() == "[" else tidy(node)
    elif node.type == "expr_stmt":
        what = f"{tidy(words[0])} += ..."
    elif node.type == "atom_expr":
        what = str(called(node))
    elif len(words) > 1:
        what = f"raise {called(words[1]) or tidy(words[1])}"
    else:
        what = "raise"
    block = block_of(node)
    return f"{block}: {what}" if block else what


def called(node: NodeOrLeaf) -> str | None:
    """The dotted name that a call calls, or None for what is no call."""
    if node.type != "atom_expr" or node.children[-1].children[0] != "(":
        return None
    return "".join(part.get_code() for part in node.children[:-1]).strip()


def tidy(code: NodeOrLeaf | str) -> str:
    """One line, laid out in one way."""
    text = (code if isinstance(code, str) else code.get_code(include_prefix=False)).strip()
    if re.match(r"\w+\s*=[^=]", text):
        name, value = text.split("=", 1)
        return f"{name.strip()}={tidy(value)}"
    if text.startswith("return"):
        return f"return {tidy(text.removeprefix('return'))}".strip()
    return ast.unparse(ast.parse(f"({text}\n)", mode="eval")) if text else ""


def word(text: str, instead_of: NodeOrLeaf) -> Keyword:
    """A keyword in the place of a node."""
    return Keyword(text, instead_of.start_pos, instead_of.get_first_leaf().prefix)


def replace(old: NodeOrLeaf, new: NodeOrLeaf) -> None:
    siblings = old.parent.children
    siblings[next(i for i, sibling in enumerate(siblings) if sibling is old)] = new


def take_out(entries: list[NodeOrLeaf], entry: NodeOrLeaf) -> None:
    """Remove an entry of a list and one comma beside it."""
    at = entries.index(entry)
    if entries[at - 1 : at] == [","]:
        del entries[at - 1 : at + 1]
    else:
        del entries[at : at + (2 if entries[at + 1 : at + 2] == [","] else 1)]
