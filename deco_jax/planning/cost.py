"""What does one run of a compiled program move? Memory traffic and collectives, added up from its HLO text.

XLA's own `cost_analysis` counts the body of a loop once and there is none for GPUs; here loops count as often as they
turn.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

from deco_jax.planning.hlo import Computation, Instruction, Shape, TextError, parse

# They move nothing: names for values, for parts of them or for places, and what runs other computations.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}
_FREE |= {"opt-barrier", "add-dependency", "domain", "while", "conditional", "call", "call-done", "async-done"}
_FREE_TARGETS = {"AllocateBuffer", "ConcatBitcast", "AsyncCollectiveStart", "AsyncCollectiveDone"}
_FREE_TARGETS |= {"PrepareAsyncCallStart", "PrepareAsyncCallDone", "AssumeGatherIndicesInBound"}
_CALLS = {"while": "body", "call": "to_apply", "call-start": "to_apply", "async-start": "calls"}
_SLICES = {"dynamic-slice", "slice", "gather"}
_NAMES, _FORMS = {"bitcast", "reshape"}, {"copy", "convert", "transpose"}  # in a fusion, of an operand


@dataclasses.dataclass(frozen=True)
class Collective:
    """One communication of a program, together with all of the same form and origin."""

    kind: str  # one of COLLECTIVES
    shape: str  # of the largest of its arrays, and how many more there are
    group: int  # devices that take part together; of a send, slices
    bytes: float  # of all these arrays, once and per device: the results, or the inputs if those are larger
    op_name: str  # where in the Python program it comes from
    times: int = 0  # how often a run of the program does it

    @property
    def wire_bytes(self) -> float:
        """What a device sends, all times together, if the work is shared out evenly (a ring)."""
        others = (self.group - 1) / self.group
        factor = {"all-reduce": 2 * others, "collective-permute": 1.0, "send": 1.0}.get(self.kind, others)
        return self.times * self.bytes * factor


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one run of a program, per device."""

    hbm_bytes: float  # read and written
    collectives: list[Collective]  # most sent first


def read(text: str) -> Cost:
    """Adds up what `compiled.as_text()` does when it runs.

    Raises:
      TextError: something in it is not understood.
    """
    traffic, times = 0.0, collections.Counter()
    try:
        program = _Program(text)
        for instruction, within, turns in program.walk(program.entry, 1):
            traffic += turns * program.traffic(instruction, within)
            for collective in program.collectives(instruction, within):
                times[collective] += turns
    except KeyError as error:
        raise TextError(f"an instruction uses {error}, which its computation does not have.") from error
    found = [dataclasses.replace(collective, times=n) for collective, n in times.items()]
    return Cost(traffic, sorted(found, key=lambda c: -c.wire_bytes))


class _Program:
    """The computations of a module, and what the executed ones do."""

    def __init__(self, text: str):
        self.entry, self.computations = parse(text)
        # A TPU spreads a collective over several fusions, maybe of loops within, each of which names it. It counts in
        # the one where it begins.
        whole = self.computations.values()
        self.begun = [c for c in whole if any(i.target == "AsyncCollectiveStart" for i in c.values())]
        self.spread = {part.channel for c in self.begun for part in c.values() if part.kind}

    def called(self, instruction: Instruction, attribute: str) -> Computation:
        """The computation that an attribute names."""
        name = instruction.find(rf"\b{attribute}=%?([\w.-]+)")
        if name not in self.computations:
            raise TextError(
                f"{instruction.opcode} {instruction.name} has no {attribute}: {instruction.attributes[:300]}"
            )
        return self.computations[name]

    def walk(self, within: Computation, times: int) -> Iterator[tuple[Instruction, Computation, int]]:
        """(instruction, its computation, how often it runs) of all that runs; of branches, the costlier one."""
        for instruction in within.values():
            yield instruction, within, times
            if instruction.opcode == "conditional":
                names = instruction.find(r"(branch_computations=\{[^}]*|true_computation=\S+ false_computation=\S+)")
                names = [name for name in re.findall(r"[\w.-]+", names) if name in self.computations]
                if not names:
                    raise TextError(f"the branches of {instruction.name} are not known: {instruction.attributes[:300]}")
                branches = [list(self.walk(self.computations[name], times)) for name in names]
                yield from max(branches, key=lambda b: sum(n * self.traffic(i, c) for i, c, n in b))
            elif attribute := _CALLS.get(instruction.opcode):
                turns = self._turns(instruction, within) if attribute == "body" else 1
                yield from self.walk(self.called(instruction, attribute), times * turns)

    def _turns(self, loop: Instruction, within: Computation) -> int:
        """Turns of a loop: XLA's word for it, or those of `for i in range(start, bound, step)`."""
        if known := loop.find(r'known_trip_count":\{"n":"(\d+)"'):
            return int(known)
        body, condition = self.called(loop, "body"), self.called(loop, "condition")
        test = _root(condition)
        if "direction=LT" in test.attributes and (index := condition[test.operands[0]].find(r"index=(\d+)")):
            start = _constant(within[loop.operands[0]].operands[int(index)], within)
            bound = _constant(test.operands[1], condition)
            increment = _source(body[_root(body).operands[int(index)]], body, {"copy"})
            steps = [_constant(name, body) for name in increment.operands if increment.opcode == "add"]
            steps = [step for step in steps if step]
            if len(steps) == 1 and start is not None and bound is not None:
                return len(range(start, bound, *steps))
        raise TextError(f"the number of turns of the loop {loop.name} is not in the text: {loop.attributes[:300]}")

    def traffic(self, instruction: Instruction, within: Computation) -> float:
        """Bytes of device memory that one instruction reads and writes; loops and calls count where they run."""
        opcode, shapes = instruction.opcode, instruction.shapes
        if opcode in _FREE or _is_first_half(instruction) or instruction.target in _FREE_TARGETS:
            return 0.0
        operands = [within[name] for name in instruction.operands]
        if opcode.endswith("-done"):  # of a copy or slice, maybe between memories, or of a collective
            sources = [shape for name in operands[0].operands for shape in within[name].shapes]
            return _hbm(shapes) + min(_hbm(sources), sum(shape.bytes for shape in shapes))
        moved = sum(min(_hbm(o.shapes), self._read(instruction, i)) for i, o in enumerate(operands) if _hbm(o.shapes))
        return moved + sum(
            min(s.hbm, self._written(instruction, i, within)) for i, s in enumerate(_results(instruction))
        )

    def _read(self, user: Instruction, number: int) -> float:
        """Bytes that an instruction reads of the operand with this number, if that is large enough."""
        if user.opcode in _SLICES and number == 0:
            return user.shapes[0].bytes
        if user.opcode == "dynamic-update-slice" and number == 0:
            return 0.0  # it is updated in place
        if user.opcode != "fusion":
            return math.inf
        inside = self.called(user, "calls")
        names = [i.name for i in inside.values() if i.opcode == "parameter" and i.text == str(number)]
        ends = [_source(result, inside).name for result in _results_of(inside)]
        read = 0.0
        for part in inside.values():  # in their order, so that other forms of the operand precede their users
            for place in [place for place, name in enumerate(part.operands) if name in names]:
                if self._is_form_of(part, place):
                    names.append(part.name)
                    read += math.inf if part.name in ends and part.opcode not in _NAMES else 0.0
                elif part.opcode != "tuple" and not self._is_handed_on(part, inside):
                    read += self._read(part, place)
        return read

    def _is_form_of(self, part: Instruction, number: int) -> bool:
        """Whether a fusion's instruction only renames or converts its operand with this number, element by element."""
        if part.opcode == "fusion":
            inside = self.called(part, "calls")
            source = _source(_root(inside), inside, _NAMES | _FORMS)
            return source.opcode == "parameter" and source.text == str(number)
        return part.opcode in _NAMES | _FORMS

    def _written(self, result: Instruction, number: int, within: Computation) -> float:
        """Bytes that an instruction writes of its result with this number, if that is large enough."""
        if result.opcode == "dynamic-update-slice":
            return within[result.operands[1]].shapes[0].bytes
        if result.opcode != "fusion":
            return math.inf
        inside = self.called(result, "calls")
        results = _results_of(inside)
        source = _source(results[number] if len(results) > 1 else results[0], inside)
        handed_on = source.opcode == "parameter" or self._is_handed_on(source, inside)
        return 0.0 if handed_on else self._written(source, 0, inside)

    def _is_handed_on(self, part: Instruction, inside: Computation) -> bool:
        """Whether a fusion's instruction is only a collective's way from an earlier fusion, or to a later one."""
        if part.kind:
            return part.channel in self.spread and not any(inside is c for c in self.begun)
        return part.target in _FREE_TARGETS and part.target != "AsyncCollectiveDone"

    def collectives(self, instruction: Instruction, within: Computation) -> Iterator[Collective]:
        """Those that an instruction is or, as a fusion, contains; one in two halves is in the second."""
        if instruction.opcode == "fusion":
            inside = self.called(instruction, "calls")
            for part in inside.values():
                if not self._is_handed_on(part, inside):
                    for collective in self.collectives(part, inside):
                        # So TPUs write a reduce-scatter: the sum, of which each device keeps a part.
                        scatters = instruction.find(r"calls=%?(all-reduce-scatter)")
                        yield dataclasses.replace(collective, kind="reduce-scatter") if scatters else collective
        elif instruction.kind and not _is_first_half(instruction):
            start = within[instruction.operands[0]] if instruction.opcode.endswith("-done") else instruction
            sent = [shape for name in start.operands for shape in within[name].shapes]
            arrays = max(instruction.shapes, sent, key=lambda shapes: sum(shape.bytes for shape in shapes))
            largest = max(arrays, key=lambda shape: shape.bytes)
            more = sum(shape.bytes > 0 for shape in arrays) - 1
            yield Collective(
                kind=instruction.kind,
                shape=f"{largest} and {more} more" if more else str(largest),
                group=_group_size(start.attributes),
                bytes=sum(shape.bytes for shape in arrays),
                op_name=start.find(r'op_name="([^"]*)"'),
            )


def _is_first_half(instruction: Instruction) -> bool:
    """Whether what it starts is counted where it is done."""
    return instruction.opcode.endswith("-start") or instruction.opcode in ("send", "recv")


def _root(computation: Computation) -> Instruction:
    return next(instruction for instruction in computation.values() if instruction.is_root)


def _results_of(inside: Computation) -> list[Instruction]:
    """What a fusion returns."""
    root = _root(inside)
    return [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]


def _source(value: Instruction, within: Computation, through: set[str] = _NAMES) -> Instruction:
    """What a value is another name of, a part of or, by `through`, another form of."""
    while value.opcode in through | {"get-tuple-element"}:
        value = within[value.operands[0]]
    return value


def _constant(name: str, within: Computation) -> int | None:
    """The integer that a value is known to be."""
    value = _source(within[name], within, {"copy"})
    return int(value.text) if value.opcode == "constant" and value.text.lstrip("-").isdigit() else None


def _hbm(shapes: Sequence[Shape]) -> float:
    return sum(shape.hbm for shape in shapes)


def _results(instruction: Instruction) -> Sequence[Shape]:
    """What it writes: of cuBLAS the product, without the workspace behind it, which it is free to use or not."""
    shapes = instruction.shapes
    scratch = instruction.target.startswith("__cublas") and len(shapes) > 1 and shapes[-1].dtype == "s8"
    return shapes[:-1] if scratch else shapes


def _group_size(attributes: str) -> int:
    """Devices in a collective's group; the text has several ways of writing groups."""
    # One by one, as `send` names slices as well.
    if found := re.search(r'(?:replica_groups=\{|_xla_megascale_target=")\{([\d,]+)\}', attributes):
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=", attributes):
        return int(found[1].split(",")[-1])
    # A mesh, in an order of devices that does not matter here, and its axes or parts of them (size after the bracket).
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^{}]*\))? ?\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        axes = [re.fullmatch(r"'(\w+)'(?::\(\d+\)(\d+))?", axis) for axis in found[2].split(",")]
        if all(axes):
            return math.prod(int(axis[2] or sizes[axis[1]]) for axis in axes)
    if found := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)+)\}", attributes):
        return len(set(re.findall(r"\d+", found[1])))
    raise TextError(f"groups of an unknown form: {attributes.strip(', ')[:300]}")
