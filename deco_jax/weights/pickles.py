"""What does this pickle describe? Answered without running any of it.

A pickle is a program: it may name any function on the machine and call it, and `pickle.load` obeys. This module
interprets the program itself, over `pickletools.genops`, the standard library's disassembler, which splits the bytes
into opcodes and does nothing else. Subclassing `pickle.Unpickler` with a `find_class` that checks names would be
shorter, but then safety hangs on one hook while the machine around it goes on calling `__setstate__`, callables and
`append` of whatever is on its stack, sizes its memo by a number in the file, and hashes what it is given. Here a name
is looked up in `admitted.ADMITTED` and becomes a stand-in of ours; nothing is ever imported; nothing but a stand-in can
be called; every opcode spends from a budget, so reading ends.

What comes back is plain: dict, list, tuple, set, str, bytes, numbers, None, NumPy arrays, and lazy `Tensor`s, in a tree
of bounded depth and bounded unfolded size, so that code that walks it ends as well.
"""

import pickletools
from collections.abc import Callable
from typing import Any, BinaryIO

from deco_jax.errors import UsageError
from deco_jax.weights.admitted import ADMITTED, Admitted, Attributes, Buildable
from deco_jax.weights.budget import MAX_STEPS, Budget
from deco_jax.weights.tensors import Storage, Tensor, short

MAX_PICKLE = 64 * 2**20  # bytes; a Lightning checkpoint of 2,000 tensors has 0.3 MB
MAX_BITS = 256  # of an integer; torch's magic number has 77, a NumPy generator's state 128
MAX_DEPTH = 100

_MISSING = object()
_PLAIN = (str, bytes, int, float, complex, bool, type(None), Tensor)


class Unpickler:
    """Reads pickles, one after the other, from `stream`.

    Args:
      stream: the pickles' bytes, in memory.
      find_storage: what a persistent id, already a plain tuple, stands for.
      budget: of all of them together.
    """

    def __init__(self, stream: BinaryIO, find_storage: Callable[[tuple], Storage], budget: Budget):
        self._stream, self._find_storage, self._budget = stream, find_storage, budget
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []  # stacks below the marks
        self._memo: dict[int, Any] = {}
        self._result: Any = None

    def load(self) -> Any:
        """The next pickle's content.

        Raises:
          UsageError: it is damaged, beyond a limit, or names what is not admitted.
        """
        self._stack, self._marked, self._memo = [], [], {}
        try:
            for opcode, argument, position in pickletools.genops(self._stream):
                self._budget.spend(1)
                act = _ACTS.get(opcode.name)
                if act is None:
                    raise UsageError(f"the pickle's opcode {opcode.name} at byte {position} is not admitted.")
                act(self, argument)
        except ValueError as e:  # genops: unknown opcode, or an argument cut short
            if isinstance(e, UsageError):
                raise
            raise UsageError(f"the pickle inside is damaged or truncated ({short(str(e))}).") from None
        if self._marked or self._stack:
            raise UsageError("the pickle inside is damaged: it ends with work left over.")
        return _Plain().convert(self._result, 0)[0]

    # The opcodes.

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _push_int(self, value: int) -> None:
        if value.bit_length() > MAX_BITS:
            raise UsageError(f"the pickle inside holds {short(value)}; at most {MAX_BITS} are read.")
        self._stack.append(value)

    def _push_text(self, value: str) -> None:
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise UsageError(f"the pickle inside holds the text {short(value)}, which is not Unicode.") from None
        self._stack.append(value)

    def _pop(self) -> Any:
        if not self._stack:
            raise UsageError("the pickle inside is damaged: an opcode finds nothing on the stack.")
        return self._stack.pop()

    def _pop_marked(self) -> list[Any]:
        if not self._marked:
            raise UsageError("the pickle inside is damaged: an opcode finds no mark on the stack.")
        items, self._stack = self._stack, self._marked.pop()
        return items

    def _top(self, kind: Any, doing: str) -> Any:
        if not self._stack or not isinstance(self._stack[-1], kind):
            found = short(self._stack[-1]) if self._stack else "nothing"
            raise UsageError(f"the pickle inside {doing} {found}, which is not admitted.")
        return self._stack[-1]

    def _mark(self, _: None) -> None:
        self._marked.append(self._stack)
        self._stack = []

    def _pop_one(self, _: None) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._pop_marked()

    def _duplicate(self, _: None) -> None:
        self._push(self._top(object, "duplicates"))

    def _tuple_of(self, count: int) -> None:
        items = [self._pop() for _ in range(count)]
        self._push(tuple(reversed(items)))

    def _append(self, items: list[Any]) -> None:
        self._top(list, "appends to").extend(items)

    def _set_items(self, items: list[Any]) -> None:
        target = self._top(dict, "sets items of")
        if len(items) % 2:
            raise UsageError("the pickle inside is damaged: a key has no value.")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[self._budget.key(key)] = value

    def _add_items(self, items: list[Any]) -> None:
        self._top(set, "adds members to").update([self._budget.key(item) for item in items])

    def _new_dict(self, items: list[Any]) -> None:
        self._push({})
        self._set_items(items)

    def _set_item(self, _: None) -> None:
        value, key = self._pop(), self._pop()
        self._set_items([key, value])

    def _put(self, index: int | None) -> None:
        self._memo[len(self._memo) if index is None else index] = self._top(object, "remembers")

    def _get(self, index: int) -> None:
        value = self._memo.get(index, _MISSING)
        if value is _MISSING:
            raise UsageError(f"the pickle inside is damaged: it recalls item {short(index)}, which it never stored.")
        self._push(value)

    def _global(self, name: str) -> None:
        """`name` is "module attribute"."""
        found = ADMITTED.get(name)
        if found is None:
            shown = short(name.replace(" ", ".", 1)).strip("'")
            raise UsageError(
                f"{shown} is not admitted. A pickle may name any function on your machine, so only tensors, plain "
                "containers and numbers are read, and nothing was run; docs/security.md says how to keep the weights "
                "of a file that you trust."
            )
        self._push(found)

    def _stack_global(self, _: None) -> None:
        name, module = self._pop(), self._pop()
        if type(name) is not str or type(module) is not str:
            raise UsageError("the pickle inside is damaged: a name is not text.")
        self._global(f"{module} {name}")

    def _reduce(self, _: None) -> None:
        arguments, function = self._pop(), self._pop()
        if not isinstance(function, Admitted) or not isinstance(arguments, tuple):
            raise UsageError(f"the pickle inside calls {short(function)}({short(arguments)}), which is not admitted.")
        self._push(function(self._budget, arguments))

    def _build(self, _: None) -> None:
        """Sets an object's attributes. A dict's (state_dict's `_metadata`) say nothing about the weights: left out."""
        state, target = self._pop(), self._top(dict | Buildable, "sets attributes of")
        if isinstance(target, Buildable):
            target.build(self._budget, state)
        elif isinstance(target, Attributes) and isinstance(state, dict):
            self._budget.spend(len(state))
            target.update({self._budget.key(k): v for k, v in state.items()})

    def _persistent(self, _: None) -> None:
        identifier = self._pop()
        if not isinstance(identifier, tuple):
            raise UsageError(f"the pickle inside refers to {short(identifier)} outside it; only storages are admitted.")
        self._push(self._find_storage(identifier))

    def _stop(self, _: None) -> None:
        self._result = self._pop()


class _Plain:
    """Turns what the stand-ins left behind into plain values, once each, and measures the tree as it would unfold."""

    def __init__(self):
        self._done: dict[int, tuple[Any, int, int, Any]] = {}  # id → result, height, size, the value (to keep its id)

    def convert(self, value: Any, depth: int) -> tuple[Any, int, int]:
        """(plain value, its height, its nodes)."""
        if isinstance(value, _PLAIN):
            return value, 0, 1
        if depth > MAX_DEPTH:
            raise UsageError(f"its containers are nested more than {MAX_DEPTH} deep, or hold themselves.")
        if id(value) not in self._done:
            self._done[id(value)] = (*self._convert(value, depth), value)
        result, height, size, _ = self._done[id(value)]
        if depth + height > MAX_DEPTH:
            raise UsageError(f"its containers are nested more than {MAX_DEPTH} deep.")
        return result, height, size

    def _convert(self, value: Any, depth: int) -> tuple[Any, int, int]:
        if isinstance(value, Buildable):
            return value.plain, 0, 1
        if isinstance(value, set | frozenset):
            return value, 1, 1 + len(value)
        if not isinstance(value, dict | list | tuple):
            shown = value.name if isinstance(value, Admitted) else f"a {type(value).__name__}"
            raise UsageError(f"it holds {shown} where a value is expected, which is not admitted.")
        items = list(value.values() if isinstance(value, dict) else value)
        parts = [self.convert(item, depth + 1) for item in items]
        height = 1 + max((part[1] for part in parts), default=0)
        size = 1 + sum(part[2] for part in parts)
        if size > MAX_STEPS:
            raise UsageError(f"its containers unfold to more than {MAX_STEPS} values, the limit.")
        plain = [part[0] for part in parts]
        if isinstance(value, dict):
            return dict(zip(value, plain, strict=True)), height, size
        return (tuple(plain) if isinstance(value, tuple) else plain), height, size


_Act = Callable[[Unpickler, Any], None]

_ACTS: dict[str, _Act] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda u, _: None),
    **dict.fromkeys(("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"), Unpickler._push_int),
    **dict.fromkeys(("STRING", "BINSTRING", "SHORT_BINSTRING"), Unpickler._push_text),  # Python 2's
    **dict.fromkeys(("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"), Unpickler._push_text),
    **dict.fromkeys(("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "FLOAT", "BINFLOAT"), Unpickler._push),
    "BYTEARRAY8": lambda u, value: u._push(bytes(value)),
    "NONE": lambda u, _: u._push(None),
    "NEWTRUE": lambda u, _: u._push(True),
    "NEWFALSE": lambda u, _: u._push(False),
    "MARK": Unpickler._mark,
    "POP": Unpickler._pop_one,
    "POP_MARK": lambda u, _: u._pop_marked(),
    "DUP": Unpickler._duplicate,
    "EMPTY_TUPLE": lambda u, _: u._push(()),
    "EMPTY_LIST": lambda u, _: u._push([]),
    "EMPTY_DICT": lambda u, _: u._push({}),
    "EMPTY_SET": lambda u, _: u._push(set()),
    "TUPLE": lambda u, _: u._push(tuple(u._pop_marked())),
    "TUPLE1": lambda u, _: u._tuple_of(1),
    "TUPLE2": lambda u, _: u._tuple_of(2),
    "TUPLE3": lambda u, _: u._tuple_of(3),
    "LIST": lambda u, _: u._push(u._pop_marked()),
    "DICT": lambda u, _: u._new_dict(u._pop_marked()),
    "FROZENSET": lambda u, _: u._push(frozenset([u._budget.key(item) for item in u._pop_marked()])),
    "APPEND": lambda u, _: u._append([u._pop()]),
    "APPENDS": lambda u, _: u._append(u._pop_marked()),
    "SETITEM": Unpickler._set_item,
    "SETITEMS": lambda u, _: u._set_items(u._pop_marked()),
    "ADDITEMS": lambda u, _: u._add_items(u._pop_marked()),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), Unpickler._put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), Unpickler._get),
    "GLOBAL": Unpickler._global,
    "STACK_GLOBAL": Unpickler._stack_global,
    "REDUCE": Unpickler._reduce,
    "NEWOBJ": Unpickler._reduce,
    "BUILD": Unpickler._build,
    "BINPERSID": Unpickler._persistent,
    "STOP": Unpickler._stop,
}
