"""What does this pickle describe? Answered without running any of it.

A pickle is a program: it may name any function on the machine and call it, and `pickle.load` obeys. This module
interprets the program itself, over `pickletools.genops`, the standard library's disassembler, which splits the bytes
into opcodes and does nothing else. Subclassing `pickle.Unpickler` with a `find_class` that checks names would be
shorter, but then safety hangs on one hook while the machine around it goes on calling `__setstate__`, callables and
`append` of whatever is on its stack, sizes its memo by a number in the file, and hashes what it is given. Here a name
is looked up in `admitted.ADMITTED` and becomes a stand-in of ours; nothing is ever imported; nothing but a stand-in can
be called; every opcode spends from a budget, so reading ends.

What comes back is plain: dict, list, tuple, str, bytes, numbers, None and lazy `Tensor`s, with `LeftOut` for all else,
in a tree of bounded depth and bounded unfolded size, so that code that walks it ends as well.
"""

import pickletools
from collections.abc import Callable
from typing import Any, BinaryIO

from deco_jax.errors import UsageError
from deco_jax.weights.admitted import ADMITTED, Admitted, LeftOut
from deco_jax.weights.budget import MAX_STEPS, Budget
from deco_jax.weights.tensors import Storage, Tensor, short

MAX_PICKLE = 64 * 2**20  # bytes; a Lightning checkpoint of 2,000 tensors has 0.3 MB
MAX_BITS = 256  # of an integer; torch's magic number has 77, a NumPy generator's state 128
MAX_DEPTH = 100

_PLAIN = (str, bytes, int, float, bool, type(None), Tensor, LeftOut)


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
        (result,) = self._take(1)
        if self._marked or self._stack:
            raise UsageError("the pickle inside is damaged: it ends with work left over.")
        _measure(result, 0, {})
        return result

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _take(self, count: int | None = None) -> list[Any]:
        """The last `count` values, or those since the last mark, and the mark; they leave the stack."""
        if count is None:
            if not self._marked:
                raise UsageError("the pickle inside is damaged: an opcode finds no mark on the stack.")
            items, self._stack = self._stack, self._marked.pop()
            return items
        if len(self._stack) < count:
            raise UsageError("the pickle inside is damaged: an opcode finds nothing on the stack.")
        items = self._stack[-count:]
        del self._stack[-count:]
        return items

    def _top(self, kind: Any, doing: str) -> Any:
        if not self._stack or not isinstance(self._stack[-1], kind):
            found = short(self._stack[-1]) if self._stack else "nothing"
            raise UsageError(f"the pickle inside {doing} {found}, which is not admitted.")
        return self._stack[-1]

    # The opcodes that are more than a line.

    def _push_int(self, value: int) -> None:
        if value.bit_length() > MAX_BITS:
            raise UsageError(f"the pickle inside holds {short(value)}; at most {MAX_BITS} are read.")
        self._push(value)

    def _push_text(self, value: str) -> None:
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UsageError(f"the pickle inside holds the text {short(value)}, which is not Unicode.") from None
        self._push(value)

    def _mark(self, _: None) -> None:
        self._marked.append(self._stack)
        self._stack = []

    def _append(self, items: list[Any]) -> None:
        self._top(list, "appends to").extend(items)

    def _set_items(self, items: list[Any]) -> None:
        target = self._top(dict, "sets items of")
        if len(items) % 2:
            raise UsageError("the pickle inside is damaged: a key has no value.")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, LeftOut):
                target[self._budget.key(key)] = value

    def _put(self, index: int | None) -> None:
        self._memo[len(self._memo) if index is None else index] = self._top(object, "remembers")

    def _get(self, index: int) -> None:
        if index not in self._memo:
            raise UsageError(f"the pickle inside is damaged: it recalls item {short(index)}, which it never stored.")
        self._push(self._memo[index])

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
        module, name = self._take(2)
        if type(name) is not str or type(module) is not str:
            raise UsageError("the pickle inside is damaged: a name is not text.")
        self._global(f"{module} {name}")

    def _reduce(self, _: None) -> None:
        function, arguments = self._take(2)
        if not isinstance(function, Admitted) or not isinstance(arguments, tuple):
            raise UsageError(f"the pickle inside calls {short(function)}({short(arguments)}), which is not admitted.")
        self._push(function(self._budget, arguments))

    def _build(self, _: None) -> None:
        """Sets an object's attributes, which are left out, but for the byte order of a NumPy type."""
        (state,), target = self._take(1), self._top(dict | LeftOut, "sets attributes of")
        if isinstance(target, LeftOut) and target.number is not None and isinstance(state, tuple) and ">" in state[:2]:
            target.number = target.number.newbyteorder(">")

    def _persistent(self, _: None) -> None:
        (identifier,) = self._take(1)
        if not isinstance(identifier, tuple):
            raise UsageError(f"the pickle inside refers to {short(identifier)} outside it; only storages are admitted.")
        self._push(self._find_storage(identifier))


def _measure(value: Any, depth: int, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """(height, number of values) of a tree as it would unfold, once all of it is plain and within the limits.

    Args:
      value: that stands `depth` containers deep.
      known: by id, so that a container is looked into once; the tree keeps all of them alive.
    """
    if isinstance(value, _PLAIN):
        return 0, 1
    if not isinstance(value, dict | list | tuple):
        shown = value.name if isinstance(value, Admitted) else f"a {type(value).__name__}"
        raise UsageError(f"it holds {shown} where a value is expected, which is not admitted.")
    if depth <= MAX_DEPTH and id(value) not in known:
        items = value.values() if isinstance(value, dict) else value
        parts = [_measure(item, depth + 1, known) for item in items]
        known[id(value)] = 1 + max((part[0] for part in parts), default=0), 1 + sum(part[1] for part in parts)
    height, size = known.get(id(value), (1, 1))
    if depth + height > MAX_DEPTH:
        raise UsageError(f"its containers are nested more than {MAX_DEPTH} deep, or hold themselves.")
    if size > MAX_STEPS:
        raise UsageError(f"its containers unfold to more than {MAX_STEPS} values, the limit.")
    return height, size


# Those of protocols 1 to 5; what only protocol 0 writes is not admitted, as torch.save cannot write tensors in it.
_ACTS: dict[str, Callable[[Unpickler, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda u, _: None),
    **dict.fromkeys(("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"), Unpickler._push_int),
    **dict.fromkeys(("BINSTRING", "SHORT_BINSTRING"), Unpickler._push_text),  # Python 2's
    **dict.fromkeys(("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"), Unpickler._push_text),
    **dict.fromkeys(("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BINFLOAT"), Unpickler._push),
    "BYTEARRAY8": lambda u, value: u._push(bytes(value)),
    "NONE": lambda u, _: u._push(None),
    "NEWTRUE": lambda u, _: u._push(True),
    "NEWFALSE": lambda u, _: u._push(False),
    "MARK": Unpickler._mark,
    "POP": lambda u, _: u._take(1 if u._stack else None),
    "POP_MARK": lambda u, _: u._take(),
    "EMPTY_TUPLE": lambda u, _: u._push(()),
    "EMPTY_LIST": lambda u, _: u._push([]),
    "EMPTY_DICT": lambda u, _: u._push({}),
    "TUPLE": lambda u, _: u._push(tuple(u._take())),
    "TUPLE1": lambda u, _: u._push(tuple(u._take(1))),
    "TUPLE2": lambda u, _: u._push(tuple(u._take(2))),
    "TUPLE3": lambda u, _: u._push(tuple(u._take(3))),
    "APPEND": lambda u, _: u._append(u._take(1)),
    "APPENDS": lambda u, _: u._append(u._take()),
    "SETITEM": lambda u, _: u._set_items(u._take(2)),
    "SETITEMS": lambda u, _: u._set_items(u._take()),
    "EMPTY_SET": lambda u, _: u._push(LeftOut()),
    "ADDITEMS": lambda u, _: u._take(),
    "FROZENSET": lambda u, _: u._push(LeftOut(*u._take())),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT", "MEMOIZE"), Unpickler._put),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), Unpickler._get),
    "GLOBAL": Unpickler._global,
    "STACK_GLOBAL": Unpickler._stack_global,
    "REDUCE": Unpickler._reduce,
    "NEWOBJ": Unpickler._reduce,
    "BUILD": Unpickler._build,
    "BINPERSID": Unpickler._persistent,
}
