"""What stands in the optimized HLO text of a compiled program? Its computations, instruction by instruction.

A form that this reader does not know is a `TextError`: a guess would look like an answer.
"""

import dataclasses
import functools
import math
import re

COLLECTIVES = {"all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute"}
COLLECTIVES |= {"send"}  # so TPUs write a sum or a gather between slices
_IN_HALVES = COLLECTIVES | {"copy", "slice", "dynamic-slice", "dynamic-update-slice", "call", "async", "recv"}
_UNKNOWN = {"infeed", "outfeed", "collective-broadcast", "async-update"}


class TextError(RuntimeError):
    """The program's text has a form that this reader does not know, or what it found there cannot be all."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array of a program."""

    dtype: str
    dims: tuple[int, ...]
    layout: str  # what stands in braces: minor-to-major order, tiles, memory space

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"

    @functools.cached_property
    def bytes(self) -> float:
        """Size in memory, with the padding of a TPU's tiled layout."""
        dims = list(self.dims)
        order, _, tiles = self.layout.partition(":")
        if dims and (tile := re.match(r"T\(([\d,]+)\)", tiles)):
            dims = [self.dims[int(axis)] for axis in reversed(order.split(","))]
            for i, size in enumerate(reversed([int(n) for n in tile[1].split(",")]), 1):
                if i <= len(dims):
                    dims[-i] = math.ceil(dims[-i] / size) * size
        bits = {"pred": 8, "token": 0, "opaque": 0}.get(self.dtype)
        return math.prod(dims) * (int(re.search(r"\d+", self.dtype)[0]) if bits is None else bits) / 8

    @property
    def hbm(self) -> float:
        """Bytes in the device's main memory; S(1) and others are small memories on the chip."""
        return 0.0 if "S(" in self.layout else self.bytes


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    shapes: tuple[Shape, ...]  # of the result; several for a tuple
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    text: str  # the operand list as it stands, for parameters and constants
    is_root: bool

    @property
    def kind(self) -> str:
        """The opcode of a collective without -start or -done, "" for anything else."""
        kind = self.opcode.removesuffix("-start").removesuffix("-done")
        return kind if kind in COLLECTIVES else ""

    def find(self, pattern: str) -> str:
        """What the pattern's group matches among the attributes, or ""."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else ""

    @functools.cached_property
    def target(self) -> str:
        """What a custom-call calls."""
        return self.find(r'custom_call_target="([^"]*)"')

    @functools.cached_property
    def channel(self) -> str:
        """What the parts of one collective have in common."""
        return self.find(r"channel_id=(\d+)") or self.name


Computation = dict[str, Instruction]


def parse(text: str) -> tuple[Computation, dict[str, Computation]]:
    """What `compiled.as_text()` runs first, and all computations by name.

    Raises:
      TextError: something in it is not understood.
    """
    entry, computations, current = {}, {}, None
    for line in text.splitlines():
        if found := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
            current = computations[found[2]] = {}
            entry = current if found[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None:
            try:
                instruction = _parse_line(line)
            except (TypeError, ValueError) as error:
                raise TextError(f"a program's text is not understood: {line.strip()[:300]}") from error
            current[instruction.name] = instruction
    return entry, computations


def _parse_line(line: str) -> Instruction:
    found = re.match(r"\s+(ROOT )?%?([\w.-]+) = (.*)$", re.sub(r"/\*.*?\*/", "", line))
    shapes, rest = _split(found[3]) if found[3].startswith("(") else found[3].split(" ", 1)
    opcode, _, rest = rest.strip().partition("(")
    inside, attributes = _split("(" + rest)
    arrays = re.findall(r"([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,<=]*)\](?:\{([^}]*)\})?", shapes)
    instruction = Instruction(
        name=found[2],
        shapes=tuple(Shape(kind, tuple(map(int, re.findall(r"\d+", dims))), layout) for kind, dims, layout in arrays),
        opcode=opcode,
        operands=tuple(re.findall(r"%([\w.-]+)", inside)),
        attributes=attributes,
        text=inside[1:-1],
        is_root=bool(found[1]),
    )
    base, _, half = opcode.rpartition("-")
    communicates = re.search(r"\b(replica_groups|source_target_pairs)=", attributes) and not instruction.kind
    if communicates or opcode in _UNKNOWN or (half in ("start", "done") and base not in _IN_HALVES):
        raise ValueError(f"{opcode} is not known")
    return instruction


def _split(text: str) -> tuple[str, str]:
    """(the parenthesis that opens at 0, what stands behind it)."""
    depth = 0
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return text[: found.end()], text[found.end() :]
    raise ValueError("a parenthesis does not close")
