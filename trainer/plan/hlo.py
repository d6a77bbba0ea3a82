"""What a lowered and a compiled step compute and communicate, read from the programs themselves.

FLOPs and Pallas kernels are counted in the lowered program (StableHLO), where shapes are whole and
products are products. Collectives and cycles stand in the compiled one (optimized HLO), where they
are what the compiler has made of them. A loop over the layers stands once in both.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.tpu import Slice

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_PRODUCTS = ("stablehlo.dot", "stablehlo.dot_general")
_UNKNOWN_CYCLES = 2**62  # what is more means: not estimated
_MOVES = ("copy", "fusion", "reshape", "sort")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_BYTES |= {"s64": 8, "u64": 8, "f64": 8}


@dataclass(frozen=True)
class Kernel:
    """One Pallas call: what it computes and moves at one execution on one chip, and how often."""

    flops: float
    bytes: float
    times: int
    loop: int  # 0: outside; else the loop over the layers, counted from 1
    attention: bool = False


@dataclass(frozen=True)
class Collective:
    """One collective of one chip: ``bytes`` come in over the network at each of ``times``."""

    kind: str
    moves: str
    bytes: float
    times: int
    group: tuple[int, ...]
    loop: int


# The lowered program ---------------------------------------------------------------------------


def lowered_work(module: str, layers: int, chips: int) -> tuple[list[Kernel], dict[int, float]]:
    """Return the Pallas kernels of the lowered step, and the FLOPs of its other matrix products.

    The FLOPs are those of one chip, by the loop over the layers that they are in; 0 for none.
    Raises ValueError for a kernel of which nobody says what it computes.
    """
    from jax._src.interpreters import mlir
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import stablehlo

    kernels: list[Kernel] = []
    products: dict[int, float] = defaultdict(float)
    loops = 0

    def heavy(operation) -> bool:
        if operation.name in (*_PRODUCTS, "stablehlo.custom_call"):
            return True
        if operation.name == "func.call":
            return heavy(functions[ir.FlatSymbolRefAttr(operation.attributes["callee"]).value])
        blocks = (block for region in operation.regions for block in region)
        return any(heavy(inner.operation) for block in blocks for inner in block)

    def visit(block, manual: set, times: int, loop: int) -> None:
        """``manual`` holds the values of which every chip has its own."""
        nonlocal loops
        for operation in (each.operation for each in block):
            name, attributes = operation.name, operation.attributes
            own = any(operand in manual for operand in operation.operands)
            target = name == "stablehlo.custom_call" and attributes["call_target_name"].value
            if target in ("SPMDFullToShardShape", "SPMDShardToFullShape"):
                own = target == "SPMDFullToShardShape"
            elif target == "tpu_custom_call":
                flops, bytes_, attention = _kernel_cost(operation)
                kernels.append(Kernel(flops, bytes_, times, loop, attention))
            elif name in _PRODUCTS:
                left = ir.RankedTensorType(operation.operands[0].type).shape
                summed = [len(left) - 1]
                if name == "stablehlo.dot_general":
                    numbers = stablehlo.DotDimensionNumbers(attributes["dot_dimension_numbers"])
                    summed = numbers.lhs_contracting_dimensions
                depth = math.prod(left[axis] for axis in summed)
                out = math.prod(ir.RankedTensorType(operation.results[0].type).shape)
                products[loop] += 2 * out * depth * times / (1 if own else chips)
            elif name in ("func.call", "stablehlo.while"):
                if name == "func.call":
                    callee = ir.FlatSymbolRefAttr(attributes["callee"]).value
                    inner, inner_times, inner_loop = functions[callee], times, loop
                    body = inner.regions[0].blocks[0]
                else:
                    body, inner_times, inner_loop = operation.regions[1].blocks[0], times, loop
                    if not loop and heavy(operation):
                        loops += 1
                        inner_times, inner_loop = times * layers, loops
                pairs = zip(body.arguments, operation.operands, strict=True)
                visit(body, {a for a, o in pairs if o in manual}, inner_times, inner_loop)
            if own:
                manual.update(operation.results)

    with mlir.make_ir_context():
        parsed = ir.Module.parse(module)
        functions = {op.name.value: op.operation for op in parsed.body.operations}
        visit(functions["main"].regions[0].blocks[0], set(), 1, 0)
    return kernels, dict(products)


def _kernel_cost(operation) -> tuple[float, float, bool]:
    """Return the FLOPs and bytes of a Pallas call, what it says itself or attention's formula, and
    whether it is attention.

    JAX's attention kernels say nothing. Each of their matrix products takes ``2 B heads T T D``
    FLOPs, half of them for causal masks; forward has two, backward three for the queries' gradient
    and four for that of keys and values.
    """
    from jaxlib.mlir import ir

    config = json.loads(operation.attributes["backend_config"].value)["custom_call_config"]
    if "cost_estimate" in config:
        cost = config["cost_estimate"]
        return float(cost["flops"]), float(cost["bytes_accessed"]), False
    operands = [ir.RankedTensorType(operand.type) for operand in operation.operands]
    results = []
    for result in (result.type for result in operation.results):
        parts = re.findall(r"tensor<((?:\d+x)*)(\w+)>", str(result))
        results += [(tuple(map(int, dims.split("x")[:-1])), element) for dims, element in parts]
    wide = [(tuple(each.shape), str(each.element_type)) for each in operands]

    # [B, heads, T, D]; with one sequence there is no B. What is not floating point is the mask.
    def is_tensor(each) -> bool:
        return len(each[0]) in (3, 4) and each[1] in ("bf16", "f32")

    query = next(filter(is_tensor, wide), None)
    if query is None:
        raise ValueError("a Pallas call has no cost_estimate and is no attention: " + str(wide))

    def is_head(each) -> bool:
        return is_tensor(each) and each[0][-2:] == query[0][-2:] and each[1] == query[1]

    *batch, heads, length, width = query[0]
    forward, both_of_kv = sum(map(is_head, wide)) == 3, sum(map(is_head, results)) == 2
    products = 2 if forward else 4 if both_of_kv else 3
    sizes = {"bf16": 2, "f32": 4, "i32": 4, "i8": 1}
    bytes_ = sum(math.prod(shape) * sizes[element] for shape, element in [*wide, *results])
    return products * math.prod(batch) * heads * length * length * width, float(bytes_), True


def recomputed(kernels: list[Kernel], products: dict[int, float]) -> float:
    """Return the FLOPs of forward that the loops of backward repeat.

    Every second loop is backward's, after its forward. Without repeating anything it takes twice
    the products of forward, and of attention's kernels seven for every two.
    """
    forward: dict[bool, float] = defaultdict(float)
    backward: dict[bool, float] = defaultdict(float)
    work = [(one.loop, one.attention, one.flops * one.times) for one in kernels]
    for loop, attention, flops in [*work, *((loop, False, n) for loop, n in products.items())]:
        if loop:
            (forward if loop % 2 else backward)[attention] += flops
    return sum(
        backward[kind] - factor * forward[kind] for kind, factor in ((False, 2), (True, 3.5))
    )


# The compiled program --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    operation: str
    line: str


class Compiled:
    """The text of a compiled program, by computation, and how often each of them runs."""

    def __init__(self, text: str, layers: int) -> None:
        self.computations: dict[str, list[_Instruction]] = {}
        entry = current = ""
        for line in text.splitlines():
            if header := re.match(r"(ENTRY )?%(\S+) \(.*\{$", line):
                current = header[2]
                entry = current if header[1] else entry
                self.computations[current] = []
            elif found := re.match(r"\s+(?:ROOT )?%(\S+) = (.+?) ([a-z][a-z0-9-]*)\(", line):
                self.computations[current].append(_Instruction(*found.groups(), line))
        self.times: dict[str, int] = defaultdict(int)
        self.loop: dict[str, int] = {}
        self.fused: set[str] = set()
        self._loops = 0
        self._visit(entry, 1, 0, layers, False)

    def _visit(self, name: str, times: int, loop: int, layers: int, fused: bool) -> None:
        self.times[name] += times
        self.loop[name] = loop
        if fused:
            self.fused.add(name)
        for one in self.computations[name]:
            if one.operation == "while":
                body = re.search(r"body=%([^\s,]+)", one.line)[1]
                inner, inner_loop = times, loop
                if not loop and self._heavy(body):
                    self._loops += 1
                    inner, inner_loop = times * layers, self._loops
                self._visit(body, inner, inner_loop, layers, fused)
            else:
                for called in re.findall(r"(?:calls|called_computations)=\{?%([^\s,}]+)", one.line):
                    self._visit(called, times, loop, layers, True)

    def _heavy(self, name: str) -> bool:
        """Whether a loop is one over layers: it holds a kernel or a collective."""
        for one in self.computations[name]:
            if one.operation.removesuffix("-start") in COLLECTIVES or "tpu_custom_call" in one.line:
                return True
            if any(map(self._heavy, re.findall(r"(?:calls|body)=%([^\s,}]+)", one.line))):
                return True
        return False

    def cycles(self) -> dict[int, float]:
        """Return the compiler's own estimates, by the loop over the layers; 0 for none."""
        total: dict[int, float] = defaultdict(float)
        for one, times, loop in self._steps():
            total[loop] += (_estimate(one) or 0) * times
        return dict(total)

    def unestimated_bytes(self) -> dict[int, float]:
        """Return the bytes that are moved where the compiler estimates nothing, as to gather rows.

        By the loop; what is written is taken to have been read once.
        """
        total: dict[int, float] = defaultdict(float)
        for one, times, loop in self._steps():
            moves = one.operation in _MOVES and not one.name.startswith("async-collective")
            if moves and _estimate(one) is None:
                shapes = _shapes(one.shape)
                total[loop] += 2 * times * sum(math.prod(d) * _BYTES[e] for e, d in shapes)
        return dict(total)

    def _steps(self) -> Iterator[tuple[_Instruction, int, int]]:
        """Yield what runs as one instruction, how often, and in which loop."""
        for name, times in self.times.items():
            for one in self.computations[name] if name not in self.fused else ():
                yield one, times, self.loop[name]

    def pallas_calls(self) -> int:
        """Return how many Pallas kernels stand in the program."""
        everything = (one.line for lines in self.computations.values() for one in lines)
        return sum('custom_call_target="tpu_custom_call"' in line for line in everything)

    def rematerialised(self) -> int:
        """Return how many instructions the compiler itself repeats to save memory."""
        everything = (one.name for lines in self.computations.values() for one in lines)
        return sum(".remat" in name for name in everything)

    def collectives(self, module: str, sizes: "Sizes") -> list[Collective]:
        """Return every collective once; ``module`` is the lowered program that it came from."""
        source = module.splitlines()
        seen = set()
        found = []
        for name, times in self.times.items():
            for one in self.computations[name]:
                kind = one.operation.removesuffix("-start")
                if kind not in COLLECTIVES:
                    continue
                # Overlapped with several fusions, one collective stands in each of them.
                chain = re.search(r'chain_id="(\d+)"', one.line)
                channel = re.search(r"channel_id=(\d+)", one.line)
                key = (channel and channel[1], chain[1], one.shape) if chain else one.name
                if key in seen:
                    continue
                seen.add(key)
                group = _first_group(one.line)
                shapes = _shapes(one.shape)
                shapes = shapes[-1:] if one.operation.endswith("-start") else shapes
                size = sum(math.prod(dims) * _BYTES[element] for element, dims in shapes)
                line = re.search(r"source_line=(\d+)", one.line)
                lowered = source[int(line[1]) - 1] if line else ""
                # Gathered over all of a torus at once, a weight is written into zeros and summed.
                gathers = kind == "all-gather" or f"{kind}(%dynamic-update-slice" in one.line
                moves = sizes.moved(gathers, lowered, max(shapes, key=lambda it: math.prod(it[1])))
                if self.loop[name] and not gathers:  # the partitioner adds nothing there
                    moves = "activations" if group == sizes.tensor_group else "gradients"
                incoming = size * _share(kind, len(group))
                found.append(Collective(kind, moves, incoming, times, group, self.loop[name]))
        return found


def _estimate(one: _Instruction) -> int | None:
    """Return the cycles that the compiler estimates for an instruction; None where it does not."""
    found = re.search(r'"estimated_cycles":"(\d+)"', one.line)
    return int(found[1]) if found and int(found[1]) < _UNKNOWN_CYCLES else None


def _share(kind: str, members: int) -> float:
    """Return what comes in over the network at each member, as a multiple of its result."""
    rest = (members - 1) / members
    return {"all-reduce": 2 * rest, "reduce-scatter": members - 1, "collective-permute": 1}.get(
        kind, rest
    )


def _shapes(text: str) -> list[tuple[str, tuple[int, ...]]]:
    found = re.findall(r"\b(pred|[a-z]+\d+)\[([\d,]*)\]", text)
    return [(element, tuple(map(int, dims.split(",") if dims else ()))) for element, dims in found]


def _first_group(line: str) -> tuple[int, ...]:
    """Return the first of a collective's groups of devices."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return tuple(map(int, listed[1].split(",")))
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    if iota:
        shape, dims = ([int(n) for n in iota[i].split(",")] for i in (1, 2))
        order = [int(n) for n in iota[3].split(",")] if iota[3] else range(len(dims))
        ids = np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(shape)
        return tuple(ids.reshape(shape[0], -1)[0].tolist())
    pair = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", line)
    return tuple(map(int, pair.groups())) if pair else (0,)


@dataclass(frozen=True)
class Sizes:
    """What tells tokens from weights in a shape: sequences on a chip, their length, parameters.

    ``tensor`` is over how many chips heads and experts are split.
    """

    sequences: int
    length: int
    weights: frozenset[tuple[int, ...]]
    tensor: int = 1

    @property
    def tensor_group(self) -> tuple[int, ...] | None:
        """The first group of chips that sum up activations; None where each has whole heads."""
        return tuple(range(self.tensor)) if self.tensor > 1 else None

    def moved(self, gathers: bool, lowered: str, shape: tuple[str, tuple[int, ...]]) -> str:
        """Return what a collective moves: weights, gradients, activations or other.

        ``lowered`` is the line of the lowered program that it came from. The model's own
        collectives gather weights and scatter gradients; what the partitioner has added, or the
        compiler has combined, is known by its largest shape.
        """
        element, dims = shape
        if '"stablehlo.all_gather"' in lowered:
            return "weights"
        if '"stablehlo.reduce_scatter"' in lowered:
            return "gradients"
        if any(
            self._is_part(tuple(size for size in dims if size > 1), one) for one in self.weights
        ):
            return "weights" if gathers else "gradients"
        tokens = {self.length, self.length - 1, self.sequences * self.length}
        tokens |= {self.sequences * (self.length - 1)}
        many = math.prod(dims) >= self.sequences * self.length
        floating = element in ("bf16", "f32")
        return "activations" if floating and many and tokens & set(dims) else "other"

    @staticmethod
    def _is_part(dims: tuple[int, ...], weight: tuple[int, ...]) -> bool:
        """Whether ``dims`` is a weight, whole or split along one dimension."""
        if len(dims) != len(weight):
            return False
        split = [(a, b) for a, b in zip(dims, weight, strict=True) if a != b]
        return len(split) <= 1 and not any(b % a for a, b in split)


def summary(collectives: list[Collective]) -> Iterator[dict[str, Any]]:
    """Yield the collectives of the same kind that move the same, those of the layers apart."""
    groups = defaultdict(list)
    for one in collectives:
        groups[one.kind, one.moves, one.loop > 0].append(one)
    for (kind, moves, in_layers), members in sorted(groups.items()):
        yield {
            "kind": kind,
            "moves": moves,
            "in_layers": in_layers,
            "count": sum(one.times for one in members),
            "bytes_per_chip": round(sum(one.bytes * one.times for one in members)),
        }


def seconds(one: Collective, slice_: Slice) -> float:
    """Return how long one execution of a collective takes over the slice's links, if it is alone.

    The members of a group lie along some of the torus' axes. Along each a chip takes in from both
    neighbours at once where the axis is a ring, else from one. Rings are axes of 16 chips in two
    dimensions; in three all, but only of slices that are made of whole cubes of 4 x 4 x 4.
    """
    chip, shape = slice_.chip, slice_.topology
    within = math.prod(shape)
    if len({member // within for member in one.group}) > 1:
        return one.bytes / (chip.dcn_bytes_per_s)
    # Devices count along x first.
    places = np.array(np.unravel_index([m % within for m in one.group], shape[::-1])).T[:, ::-1]
    link = chip.ici_bytes_per_s / (4 * chip.dimensions)  # two links an axis, two directions a link
    cubes = chip.dimensions == 3 and not any(side % 4 for side in shape)
    ways = sum(
        2 if cubes or (chip.dimensions == 2 and side == 16) else 1
        for side, along in zip(shape, places.T, strict=True)
        if len(set(along)) > 1
    )
    return one.bytes / (link * ways) if ways else 0.0
