"""Read from its program what a training step computes and communicates.

FLOPs and Pallas kernels are counted in the lowered program (StableHLO), which still has global
shapes and explicit matrix products. Collectives and estimated cycles are read from the compiled
program (optimized HLO), as the compiler has scheduled them. Both programs contain the body of a
loop over the layers once, so its work counts once for every layer.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_PRODUCTS = ("stablehlo.dot", "stablehlo.dot_general")
_UNKNOWN_CYCLES = 2**62  # from here on, a number of cycles means: not estimated
_DATA_MOVEMENT = ("copy", "fusion", "reshape", "sort")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_BYTES |= {"s64": 8, "u64": 8, "f64": 8}


@dataclass(frozen=True)
class Kernel:
    """One Pallas call, as one chip executes it ``times`` times in a step."""

    flops: float  # of one execution
    bytes: float  # read and written by one execution
    times: int
    loop: int  # the loop over the layers that contains it, counted from 1; 0: outside of them
    attention: bool = False


@dataclass(frozen=True)
class Collective:
    """One collective, as one chip executes it ``times`` times in a step."""

    kind: str  # one of COLLECTIVES
    moves: str  # weights, gradients, activations or other
    bytes: float  # received over the network by one execution
    times: int
    group: tuple[int, ...]  # the chips of the first group that communicates
    loop: int  # as in Kernel


# The lowered program ---------------------------------------------------------------------------


def lowered_work(module: str, layers: int, chips: int) -> tuple[list[Kernel], dict[int, float]]:
    """Return the Pallas kernels of the lowered step, and the FLOPs of its other matrix products.

    The FLOPs are those of one chip, by the loop over the layers that contains the products; 0 is
    outside of these loops. Raises ValueError for a kernel whose FLOPs are unknown.
    """
    from jax._src.interpreters import mlir
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import stablehlo

    kernels: list[Kernel] = []
    products: dict[int, float] = defaultdict(float)
    loops = 0

    def is_heavy(operation) -> bool:
        """Whether an operation contains products or kernels, as only loops over layers do."""
        if operation.name in (*_PRODUCTS, "stablehlo.custom_call"):
            return True
        if operation.name == "func.call":
            return is_heavy(functions[ir.FlatSymbolRefAttr(operation.attributes["callee"]).value])
        blocks = (block for region in operation.regions for block in region)
        return any(is_heavy(inner.operation) for block in blocks for inner in block)

    def visit(block, manual: set, times: int, loop: int) -> None:
        """Add a block's work; ``manual`` are the values of the manual region, one for each chip."""
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
                    if not loop and is_heavy(operation):
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
    """Return the FLOPs and bytes of a Pallas call, and whether it is attention.

    They are the call's own ``cost_estimate``. JAX's attention kernels have none: each of their
    matrix products counts ``2 B heads T T D`` FLOPs, halved for the causal mask. The forward kernel
    has two products, the backward kernels three (gradient of the queries) and four (of keys and
    values).
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

    # Shaped [B, heads, T, D], or without B for one sequence; the mask is not floating point.
    def is_tensor(each) -> bool:
        return len(each[0]) in (3, 4) and each[1] in ("bf16", "f32")

    query = next(filter(is_tensor, wide), None)
    if query is None:
        raise ValueError(f"a Pallas call has no cost_estimate and is not attention: {wide}")

    def is_head(each) -> bool:
        return is_tensor(each) and each[0][-2:] == query[0][-2:] and each[1] == query[1]

    *batch, heads, length, width = query[0]
    forward, both_of_kv = sum(map(is_head, wide)) == 3, sum(map(is_head, results)) == 2
    products = 2 if forward else 4 if both_of_kv else 3
    sizes = {"bf16": 2, "f32": 4, "i32": 4, "i8": 1}
    bytes_ = sum(math.prod(shape) * sizes[element] for shape, element in [*wide, *results])
    return products * math.prod(batch) * heads * length * length * width, float(bytes_), True


def recomputed(kernels: list[Kernel], products: dict[int, float]) -> float:
    """Return the FLOPs of the forward pass that the backward loops compute again.

    Loops alternate: forward, then its backward. Without recomputation, backward takes twice the
    FLOPs of forward, and in attention's kernels 3.5 times (seven products to two).
    """
    forward: dict[bool, float] = defaultdict(float)
    backward: dict[bool, float] = defaultdict(float)
    work = [(kernel.loop, kernel.attention, kernel.flops * kernel.times) for kernel in kernels]
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
    """A compiled program, parsed from its text: its computations, and how often each one runs."""

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
        for instruction in self.computations[name]:
            if instruction.operation == "while":
                body = re.search(r"body=%([^\s,]+)", instruction.line)[1]
                inner, inner_loop = times, loop
                if not loop and self._heavy(body):
                    self._loops += 1
                    inner, inner_loop = times * layers, self._loops
                self._visit(body, inner, inner_loop, layers, fused)
            else:
                for called in re.findall(
                    r"(?:calls|called_computations)=\{?%([^\s,}]+)", instruction.line
                ):
                    self._visit(called, times, loop, layers, True)

    def _heavy(self, name: str) -> bool:
        """Whether a computation has a kernel or a collective, as only loops over layers do."""
        for instruction in self.computations[name]:
            if (
                instruction.operation.removesuffix("-start") in COLLECTIVES
                or "tpu_custom_call" in instruction.line
            ):
                return True
            if any(map(self._heavy, re.findall(r"(?:calls|body)=%([^\s,}]+)", instruction.line))):
                return True
        return False

    def cycles(self) -> dict[int, float]:
        """Return the cycles that the compiler estimates, by loop over the layers; 0: outside."""
        total: dict[int, float] = defaultdict(float)
        for instruction, times, loop in self._steps():
            total[loop] += (_estimate(instruction) or 0) * times
        return dict(total)

    def unestimated_bytes(self) -> dict[int, float]:
        """Return the bytes that instructions without an estimate move, such as gathers of rows.

        They are by the loop, as in :meth:`cycles`, and count twice, as read and as written.
        """
        total: dict[int, float] = defaultdict(float)
        for instruction, times, loop in self._steps():
            moves = instruction.operation in _DATA_MOVEMENT and not instruction.name.startswith(
                "async-collective"
            )
            if moves and _estimate(instruction) is None:
                shapes = _shapes(instruction.shape)
                total[loop] += 2 * times * sum(math.prod(d) * _BYTES[e] for e, d in shapes)
        return dict(total)

    def _steps(self) -> Iterator[tuple[_Instruction, int, int]]:
        """Yield each scheduled instruction (a fusion is one), how often it runs, and its loop."""
        for name, times in self.times.items():
            for instruction in self.computations[name] if name not in self.fused else ():
                yield instruction, times, self.loop[name]

    def pallas_calls(self) -> int:
        """Return how many Pallas calls the program's text has; one in a loop counts once."""
        lines = (each.line for each in chain.from_iterable(self.computations.values()))
        return sum('custom_call_target="tpu_custom_call"' in line for line in lines)

    def rematerialised(self) -> int:
        """Return how many instructions the compiler recomputes on its own to save memory."""
        names = (each.name for each in chain.from_iterable(self.computations.values()))
        return sum(".remat" in name for name in names)

    def collectives(self, module: str, sizes: "Sizes") -> list[Collective]:
        """Return every collective once; ``module`` is the lowered program it was compiled from."""
        source = module.splitlines()
        seen = set()
        found = []
        for name, times in self.times.items():
            for instruction in self.computations[name]:
                kind = instruction.operation.removesuffix("-start")
                if kind not in COLLECTIVES:
                    continue
                # A collective that overlaps with several fusions is in the text of each of them.
                overlapped = re.search(r'chain_id="(\d+)"', instruction.line)
                channel = re.search(r"channel_id=(\d+)", instruction.line)
                key = instruction.name
                if overlapped:
                    key = (channel and channel[1], overlapped[1], instruction.shape)
                if key in seen:
                    continue
                seen.add(key)
                group = _first_group(instruction.line)
                shapes = _shapes(instruction.shape)
                shapes = shapes[-1:] if instruction.operation.endswith("-start") else shapes
                size = sum(math.prod(dims) * _BYTES[element] for element, dims in shapes)
                line = re.search(r"source_line=(\d+)", instruction.line)
                lowered = source[int(line[1]) - 1] if line else ""
                # Over all of a torus at once, the compiler turns an all-gather into an all-reduce
                # of shards written into zeros.
                gathers = (
                    kind == "all-gather" or f"{kind}(%dynamic-update-slice" in instruction.line
                )
                moves = sizes.moved(
                    gathers, lowered, max(shapes, key=lambda shape: math.prod(shape[1]))
                )
                if self.loop[name] and not gathers:  # in the layers, all collectives are explicit
                    moves = "activations" if group == sizes.tensor_group else "gradients"
                incoming = size * _share(kind, len(group))
                found.append(Collective(kind, moves, incoming, times, group, self.loop[name]))
        return found


def _estimate(instruction: _Instruction) -> int | None:
    """Return the cycles that the compiler estimates for an instruction; None: no estimate."""
    found = re.search(r'"estimated_cycles":"(\d+)"', instruction.line)
    return int(found[1]) if found and int(found[1]) < _UNKNOWN_CYCLES else None


def _share(kind: str, members: int) -> float:
    """Return the bytes that each member receives over the network, relative to its result's."""
    rest = (members - 1) / members
    return {"all-reduce": 2 * rest, "reduce-scatter": members - 1, "collective-permute": 1}.get(
        kind, rest
    )


def _shapes(text: str) -> list[tuple[str, tuple[int, ...]]]:
    found = re.findall(r"\b(pred|[a-z]+\d+)\[([\d,]*)\]", text)
    return [(element, tuple(map(int, dims.split(",") if dims else ()))) for element, dims in found]


def _first_group(line: str) -> tuple[int, ...]:
    """Return the devices of a collective's first group."""
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
    """The sizes that distinguish activations from weights in a collective's shape."""

    sequences: int  # on one chip
    length: int  # tokens in a sequence
    weights: frozenset[tuple[int, ...]]  # shapes of the parameters after the all-gather over fsdp
    tensor: int = 1  # size of the tensor-parallel axis

    @property
    def tensor_group(self) -> tuple[int, ...] | None:
        """The first chips along the tensor-parallel axis; None where the axis has one chip."""
        return tuple(range(self.tensor)) if self.tensor > 1 else None

    def moved(self, gathers: bool, lowered: str, shape: tuple[str, tuple[int, ...]]) -> str:
        """Return what a collective moves: weights, gradients, activations or other.

        ``lowered`` is the line of the lowered program that the collective was compiled from. The
        model's own collectives gather weights and scatter gradients. A collective that the
        partitioner added, or the compiler combined, is classified by its largest ``shape``.
        """
        element, dims = shape
        if '"stablehlo.all_gather"' in lowered:
            return "weights"
        if '"stablehlo.reduce_scatter"' in lowered:
            return "gradients"
        if any(
            self._is_part(tuple(size for size in dims if size > 1), weight)
            for weight in self.weights
        ):
            return "weights" if gathers else "gradients"
        tokens = {self.length, self.length - 1, self.sequences * self.length}
        tokens |= {self.sequences * (self.length - 1)}
        many = math.prod(dims) >= self.sequences * self.length
        floating = element in ("bf16", "f32")
        return "activations" if floating and many and tokens & set(dims) else "other"

    @staticmethod
    def _is_part(dims: tuple[int, ...], weight: tuple[int, ...]) -> bool:
        """Whether ``dims`` is the shape of ``weight``, whole or split along one dimension."""
        if len(dims) != len(weight):
            return False
        split = [(a, b) for a, b in zip(dims, weight, strict=True) if a != b]
        return len(split) <= 1 and not any(b % a for a, b in split)


def summary(collectives: list[Collective]) -> Iterator[dict[str, Any]]:
    """Yield the sums over the collectives of each kind, of what they move, in and out of layers."""
    groups = defaultdict(list)
    for collective in collectives:
        groups[collective.kind, collective.moves, collective.loop > 0].append(collective)
    for (kind, moves, in_layers), members in sorted(groups.items()):
        yield {
            "kind": kind,
            "moves": moves,
            "in_layers": in_layers,
            "count": sum(member.times for member in members),
            "bytes_per_chip": round(sum(member.bytes * member.times for member in members)),
        }
