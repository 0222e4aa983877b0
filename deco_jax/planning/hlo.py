"""What one run of a compiled program costs, read from its optimized HLO text: memory traffic, collectives, buffers.

XLA's own `cost_analysis` counts the body of a loop once; here loops count as often as they run.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

_ITEM_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_COMMENT = re.compile(r"/\*.*?\*/")

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")

# They move nothing: names for values, for parts of them or for places.
_FREE = frozenset(
    {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}
    | {"opt-barrier", "add-dependency", "domain", "while", "conditional", "call"}
)
_FREE_CUSTOM_CALLS = ("AllocateBuffer", "ConcatBitcast", "AsyncCollectiveStart", "AsyncCollectiveDone")


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array of a program."""

    dtype: str
    dims: tuple[int, ...]
    layout: str  # what stands in braces: minor-to-major order, tiles, memory space

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"

    @property
    def in_hbm(self) -> bool:
        """Whether it lies in the device's main memory; S(1) and others are small memories on the chip."""
        return "S(" not in self.layout

    @property
    def bytes(self) -> float:
        """Size in memory, with the padding of a TPU's tiled layout."""
        dims = list(self.dims)
        order, _, tiles = self.layout.partition(":")
        tile = re.match(r"T\(([\d,]+)\)", tiles)
        if tile and dims:
            dims = [self.dims[int(axis)] for axis in reversed(order.split(","))]
            for i, size in enumerate(reversed([int(n) for n in tile[1].split(",")]), 1):
                if i <= len(dims):
                    dims[-i] = math.ceil(dims[-i] / size) * size
        return math.prod(dims) * _item_bits(self.dtype) / 8


@dataclasses.dataclass
class Instruction:
    """One line of a computation."""

    name: str
    shapes: list[Shape]  # of the result; several for a tuple
    opcode: str
    operands: list[str]
    attributes: str
    text: str  # the operand list as it stands, for parameters and constants
    is_root: bool

    @property
    def op_name(self) -> str:
        """Where in the Python program it comes from."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def kind(self) -> str:
        """The opcode of a collective without -start or -done, "" for anything else."""
        kind = self.opcode.removesuffix("-start").removesuffix("-done")
        return kind if kind in COLLECTIVES else ""

    def called(self, attribute: str) -> str:
        """The computation that `attribute` names, or ""."""
        found = re.search(rf"\b{attribute}=%?([\w.-]+)", self.attributes)
        return found[1] if found else ""


@dataclasses.dataclass
class Collective:
    """One communication of a program."""

    kind: str  # one of COLLECTIVES
    name: str
    op_name: str
    shape: str  # of the largest array it returns
    group: int  # devices that take part together
    times: int  # how often a run of the program does it
    bytes: float  # once and a device: of its result, or of its input if that is larger

    @property
    def wire_bytes(self) -> float:
        """What a device sends, all times together, if the work is shared out evenly (a ring)."""
        others = (self.group - 1) / self.group
        factor = {"all-reduce": 2 * others, "collective-permute": 1.0}.get(self.kind, others)
        return self.times * self.bytes * factor


@dataclasses.dataclass
class Buffer:
    """One array in a device's memory."""

    shape: str
    bytes: float
    op_name: str


@dataclasses.dataclass
class Cost:
    """Of one run of a program, a device."""

    hbm_bytes: float  # read and written
    collectives: list[Collective]
    buffers: list[Buffer]  # largest first, shapes distinct
    unknown_loops: int  # loops whose number of turns is not in the text; counted once


def read(text: str) -> Cost:
    """Adds up what `compiled.as_text()` does when it runs."""
    return _Program(text).cost()


def _item_bits(dtype: str) -> int:
    if dtype in _ITEM_BITS:
        return _ITEM_BITS[dtype]
    return int(re.match(r"[a-z]+(\d+)", dtype)[1])


def _end_of_group(text: str) -> int:
    """Where the parenthesis that opens at 0 has closed."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return i + 1
    return len(text)


def _parse_shapes(text: str) -> list[Shape]:
    return [
        Shape(dtype, tuple(int(n.strip("<=")) for n in dims.split(",") if n), layout or "")
        for dtype, dims, layout in _ARRAY.findall(text)
    ]


def _parse_instruction(line: str) -> Instruction | None:
    found = _INSTRUCTION.match(line)
    if not found:
        return None
    rest = _COMMENT.sub("", found[3])
    end = _end_of_group(rest) if rest.startswith("(") else rest.index(" ")
    shapes, rest = _parse_shapes(rest[:end]), rest[end:].lstrip()
    start = rest.index("(")
    stop = start + _end_of_group(rest[start:])
    inside = rest[start + 1 : stop - 1]
    return Instruction(
        name=found[2],
        shapes=shapes,
        opcode=rest[:start],
        operands=re.findall(r"%([\w.-]+)", inside),
        attributes=rest[stop:],
        text=inside,
        is_root=bool(found[1]),
    )


def _root(computation: dict[str, Instruction]) -> Instruction:
    return next(instruction for instruction in computation.values() if instruction.is_root)


def _channel(collective: Instruction) -> str:
    """What tells it from others."""
    found = re.search(r"channel_id=(\d+)", collective.attributes)
    return found[1] if found else collective.name


def _starts(computation: dict[str, Instruction]) -> bool:
    """Whether a collective that goes on in other fusions, maybe of loops within, begins here."""
    return any('"AsyncCollectiveStart"' in instruction.attributes for instruction in computation.values())


def _constant(name: str, within: dict[str, Instruction]) -> int | None:
    """The integer that a value is known to be."""
    value = within.get(name)
    while value is not None and value.opcode == "copy":
        value = within.get(value.operands[0])
    is_number = value is not None and value.opcode == "constant" and value.text.lstrip("-").isdigit()
    return int(value.text) if is_number else None


def _hbm(shapes: list[Shape]) -> float:
    return sum(shape.bytes for shape in shapes if shape.in_hbm)


class _Program:
    """The computations of a module, and how much the executed ones move."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if found := _COMPUTATION.match(line):
                current = self.computations[found[2]] = {}
                self.entry = found[2] if found[1] else self.entry
            elif instruction := _parse_instruction(line):
                current[instruction.name] = instruction
        self.unknown_loops = 0

    def cost(self) -> Cost:
        """Of the entry computation and all that it runs."""
        traffic, collectives, buffers = 0.0, {}, {}
        started = {_channel(part) for c in self.computations.values() if _starts(c) for part in c.values() if part.kind}
        for computation, times in self._executed(self.entry, 1):
            within = self.computations[computation]
            for instruction in within.values():
                traffic += times * self._traffic(instruction, within)
                for part, where in self._collectives_of(instruction, within):
                    # A TPU spreads a collective over several fusions, each of which names it. The first one counts.
                    if _starts(where) or _channel(part) not in started:
                        collectives[computation, _channel(part)] = self._collective(part, where, times)
                if instruction.opcode not in _FREE or (instruction.opcode == "parameter" and computation == self.entry):
                    for shape in instruction.shapes:
                        if shape.in_hbm and not (str(shape) in buffers and not instruction.op_name):
                            buffers[str(shape)] = Buffer(str(shape), shape.bytes, instruction.op_name)
        return Cost(
            hbm_bytes=traffic,
            collectives=sorted(collectives.values(), key=lambda c: -c.wire_bytes),
            buffers=sorted(buffers.values(), key=lambda b: -b.bytes),
            unknown_loops=self.unknown_loops,
        )

    def _executed(self, name: str, times: int) -> Iterator[tuple[str, int]]:
        """(computation, how often it runs) for all that `name` runs `times` times; of branches, the costlier one."""
        yield name, times
        for instruction in list(self.computations[name].values()):
            if instruction.opcode == "while":
                turns = times * self._trip_count(instruction, self.computations[name])
                yield from self._executed(instruction.called("body"), turns)
            elif instruction.opcode == "call":
                yield from self._executed(instruction.called("to_apply"), times)
            elif instruction.opcode == "conditional":
                listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
                names = re.findall(r"%([\w.-]+)", listed[1]) if listed else []
                names = names or [instruction.called("true_computation"), instruction.called("false_computation")]
                yield from max((list(self._executed(branch, times)) for branch in names), key=self._traffic_of)

    def _traffic_of(self, executed: list[tuple[str, int]]) -> float:
        """Bytes moved by these computations."""
        return sum(
            times * self._traffic(instruction, self.computations[name])
            for name, times in executed
            for instruction in self.computations[name].values()
        )

    def _trip_count(self, loop: Instruction, within: dict[str, Instruction]) -> int:
        """Turns of a loop: XLA's word for it, or those of `for i in range(start, bound, step)`; 1 if it is neither."""
        known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known[1])
        condition, body = self.computations[loop.called("condition")], self.computations[loop.called("body")]
        root = _root(condition)
        counter, bound = (condition[name] for name in root.operands) if len(root.operands) == 2 else (root, root)
        index = re.search(r"index=(\d+)", counter.attributes)
        if index and "direction=LT" in root.attributes:
            start = _constant(within[loop.operands[0]].operands[int(index[1])], within)
            increment = body.get(_root(body).operands[int(index[1])])
            steps = [_constant(name, body) for name in increment.operands] if increment.opcode == "add" else []
            numbers = [start, _constant(bound.name, condition), *(step for step in steps if step)]
            if len(numbers) == 3 and None not in numbers:
                return len(range(*numbers))
        self.unknown_loops += 1
        return 1

    def _traffic(self, instruction: Instruction, within: dict[str, Instruction]) -> float:
        """Bytes of device memory that one instruction reads and writes; loops and calls count where they run."""
        opcode = instruction.opcode
        if opcode in _FREE or opcode.endswith("-start"):
            return 0.0
        operands = [within[name] for name in instruction.operands if name in within]
        written = _hbm(instruction.shapes)
        if opcode.endswith("-done"):  # of a copy or slice, maybe between memories, or of a collective
            start = operands[0]
            sources = [shape for name in start.operands if name in within for shape in within[name].shapes]
            return written + min(_hbm(sources), sum(shape.bytes for shape in instruction.shapes))
        if opcode == "custom-call" and any(f'"{name}"' in instruction.attributes for name in _FREE_CUSTOM_CALLS):
            return 0.0
        if opcode == "fusion":
            return self._fusion_traffic(instruction, operands)
        if opcode in ("dynamic-slice", "slice", "gather"):
            return written + (_hbm(operands[0].shapes) and min(_hbm(operands[0].shapes), instruction.shapes[0].bytes))
        if opcode == "dynamic-update-slice":
            return _hbm(operands[1].shapes) + (written and operands[1].shapes[0].bytes)
        return written + sum(_hbm(operand.shapes) for operand in operands)

    def _fusion_traffic(self, fusion: Instruction, operands: list[Instruction]) -> float:
        inside = self.computations[fusion.called("calls")]
        parameters = {int(i.text): i for i in inside.values() if i.opcode == "parameter"}
        read = 0.0
        for number, operand in enumerate(operands):
            if (available := _hbm(operand.shapes)) and number in parameters:
                read += min(available, self._read_of(parameters[number], inside))
        root = _root(inside)
        results = [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]
        written = 0.0
        for result, shape in zip(results, fusion.shapes, strict=False):
            if shape.in_hbm:
                written += min(shape.bytes, self._written_of(result, inside))
        return read + written

    def _read_of(self, value: Instruction, inside: dict[str, Instruction]) -> float:
        """Bytes of `value`, a parameter of a fusion or another name of one, that the fusion reads."""
        whole = sum(shape.bytes for shape in value.shapes)
        read = 0.0
        for user in inside.values():
            if value.name not in user.operands or user.kind or user.opcode in ("tuple", "custom-call"):
                continue  # handed through; collectives are counted as such
            if user.opcode in ("bitcast", "reshape"):
                read += self._read_of(user, inside)
            elif user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == value.name:
                read += user.shapes[0].bytes
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == value.name:
                continue  # updated in place
            else:
                return whole
        return min(read, whole)

    def _written_of(self, result: Instruction, inside: dict[str, Instruction]) -> float:
        """Bytes a fusion writes for one of its results."""
        while result.opcode in ("bitcast", "reshape", "get-tuple-element"):
            result = inside[result.operands[0]]
        if result.opcode == "dynamic-update-slice":
            return sum(shape.bytes for shape in inside[result.operands[1]].shapes)
        if result.opcode in ("parameter", "custom-call") or result.kind:
            return 0.0  # handed through; collectives are counted as such
        return math.inf

    def _collectives_of(
        self, instruction: Instruction, within: dict[str, Instruction]
    ) -> Iterator[tuple[Instruction, dict[str, Instruction]]]:
        """The collectives an instruction is or, as a fusion or an async wrapper, contains."""
        if instruction.kind and not instruction.opcode.endswith("-done"):
            yield instruction, within
        elif instruction.opcode in ("fusion", "async-start"):
            inside = self.computations[instruction.called("calls")]
            for part in inside.values():
                yield from self._collectives_of(part, inside)

    def _collective(self, part: Instruction, within: dict[str, Instruction], times: int) -> Collective:
        sent = sum(shape.bytes for name in part.operands if name in within for shape in within[name].shapes)
        received = part.shapes
        if part.opcode.endswith("-start"):  # (operands, results, …); an all-reduce has the results alone
            received = part.shapes[len(part.operands) : 2 * len(part.operands)] or part.shapes
        largest = max(received, key=lambda shape: shape.bytes)
        return Collective(
            kind=part.kind,
            name=part.name,
            op_name=part.op_name,
            shape=str(largest),
            group=_group_size(part.attributes),
            times=times,
            bytes=max(sent, sum(shape.bytes for shape in received)),
        )


def _group_size(attributes: str) -> int:
    """Devices in a collective's group; the text has four ways of writing groups."""
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=", attributes):
        return int(found[1].split(",")[-1])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(part or sizes[axis]) for axis, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2]))
    return 2  # pairs of a collective-permute
