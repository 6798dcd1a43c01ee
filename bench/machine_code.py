"""Count what a compiled Triton kernel does per logit position, in the GPU's own instructions.

The machine code is parsed into a control flow graph. A kernel that loops over a row's tiles is counted in its
hot loop, one without a loop over all its instructions. How many positions a pass through that code handles
follows from the bytes that it loads and from the loads in Triton's own representation (TTIR), so that a loop
that the assembler has unrolled is counted right.
"""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class Limits(NamedTuple):
    """What a streaming multiprocessor or compute unit holds: four partitions, each with its own registers."""

    registers: int  # per partition, of one lane
    warps: int  # per partition
    blocks: int
    shared_bytes: int
    reserved_bytes: int  # of shared memory, per block


LIMITS = {
    "sm_80": Limits(512, 16, 32, 164 << 10, 1024),
    "sm_90": Limits(512, 16, 32, 228 << 10, 1024),
    "sm_100": Limits(512, 16, 32, 228 << 10, 1024),
    "gfx942": Limits(512, 8, 32, 64 << 10, 0),
}

NVIDIA_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
SASS = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?);")
AMDGCN = re.compile(r"^\s+([a-z]\w*)\s*(.*)")
LABEL = re.compile(r"^(\.L\w+):")
LABEL_OPERAND = re.compile(r"(\.L\w+)\)?\s*$")
WIDTHS = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "short": 2, "byte": 1}
SPECIAL = re.compile(r"MUFU|v_(exp|log|rcp|rsq|sqrt|sin|cos)_")
POINTER_OPERATIONS = ("tt.addptr", "tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape")
POINTEE_BYTES = {"f64": 8, "i64": 8, "f32": 4, "i32": 4, "bf16": 2, "f16": 2, "i16": 2, "i8": 1, "i1": 1}


@dataclass(frozen=True)
class Instruction:
    """An instruction with its place in the control flow."""

    opcode: str
    target: str | None  # label that it may jump to
    falls_through: bool  # whether the next instruction may follow

    @property
    def access(self) -> tuple[str, int] | None:
        """Return "load" or "store" and the bytes per thread of an access to global memory, else None."""
        nvidia = re.match(r"(LDG|STG)\b", self.opcode)
        if nvidia:
            wide = re.search(r"\.(?:ENL2\.)?(256|128|64|U16|S16|U8|S8)\b", self.opcode)
            bits = int(wide[1].lstrip("US")) if wide else 32
            return ("load" if nvidia[1] == "LDG" else "store"), bits // 8
        amd = re.match(
            r"(?:global|buffer|flat)_(load|store)_[us]?(dwordx[234]|dword|short|byte)", self.opcode
        )
        return (amd[1], WIDTHS[amd[2]]) if amd else None

    @property
    def is_barrier(self) -> bool:
        """Whether the threads of a block wait for each other."""
        return self.opcode.startswith(("BAR.", "s_barrier"))

    @property
    def is_issued(self) -> bool:
        """Whether the instruction takes an issue slot that counts; waits and padding do not."""
        return not self.opcode.startswith(("NOP", "s_nop", "s_waitcnt"))


class Program:
    """The instructions of one kernel and their control flow."""

    def __init__(self, instructions: list[Instruction], labels: dict[str, int]):
        self.instructions = instructions
        self._successors = [
            [i + 1] * (one.falls_through and i + 1 < len(instructions))
            + [labels[name] for name in [one.target] if name in labels and labels[name] < len(instructions)]
            for i, one in enumerate(instructions)
        ]
        self._predecessors: list[list[int]] = [[] for _ in instructions]
        for i, following in enumerate(self._successors):
            for j in following:
                self._predecessors[j].append(i)
        self.reachable = self._closure(0, self._successors)

    @staticmethod
    def _closure(start: int, edges: list[list[int]], stop: int | None = None) -> set[int]:
        """Return what can be reached from `start` along the edges, going no further than `stop`."""
        seen, open_ends = {start}, [start]
        while open_ends:
            i = open_ends.pop()
            new = [] if i == stop else [j for j in edges[i] if j not in seen]
            seen.update(new)
            open_ends += new
        return seen

    def loops(self) -> list[set[int]]:
        """Return the bodies of all loops in the order of their first instructions."""
        bodies: dict[int, set[int]] = {}
        for i in sorted(self.reachable):
            for header in self._successors[i]:
                if header <= i:
                    body = self._closure(i, self._predecessors, stop=header) & self.reachable
                    if header == 0 or 0 not in body:
                        bodies.setdefault(header, set()).update(body)
        return [bodies[header] for header in sorted(bodies)]

    def loaded_bytes(self, region: set[int]) -> int:
        """Return the bytes of global memory that a thread loads in a region."""
        accesses = [self.instructions[i].access for i in region]
        return sum(access[1] for access in accesses if access and access[0] == "load")

    def tile_loops(self) -> list[set[int]]:
        """Return the innermost loops that load tiles, as opposed to loops over small tables or none."""
        loading = [body for body in self.loops() if self.loaded_bytes(body)]
        innermost = [body for body in loading if not any(other < body for other in loading)]
        most = max(map(self.loaded_bytes, innermost), default=0)
        return [body for body in innermost if 4 * self.loaded_bytes(body) >= most]


def parse_sass(text: str) -> Program:
    """Parse the output of nvdisasm."""
    instructions, labels = [], {}
    for line in text.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := SASS.match(line):
            predicate, opcode, operands = found.groups()
            jumps = opcode.split(".")[0] == "BRA"
            target = LABEL_OPERAND.search(operands) if jumps else None
            always = not predicate and not re.match(r"!?U?P\d", operands)
            ends = (jumps or opcode in ("EXIT", "RET", "BRX")) and always
            instructions.append(Instruction(opcode, target[1] if target else None, not ends))
    return Program(instructions, labels)


def parse_amdgcn(text: str) -> Program:
    """Parse the assembly of an AMD kernel."""
    instructions, labels = [], {}
    for line in text.split(".Lfunc_end")[0].splitlines():
        code = line.split(";")[0].rstrip()
        if label := LABEL.match(code):
            labels[label[1]] = len(instructions)
        elif found := AMDGCN.match(code):
            opcode, operands = found.groups()
            target = LABEL_OPERAND.search(operands) if "branch" in opcode else None
            ends = opcode in ("s_branch", "s_endpgm", "s_setpc_b64")
            instructions.append(Instruction(opcode, target[1] if target else None, not ends))
    return Program(instructions, labels)


class Access(NamedTuple):
    """One load or store of a tensor in TTIR."""

    kind: str
    argument: str  # the pointer argument that the addresses come from
    masked: bool
    size: int  # elements
    element_bytes: int


class Tiles(NamedTuple):
    """What one pass through a loop of TTIR, or through a kernel without one, loads and stores."""

    in_loop: bool
    masked: bool
    positions: int  # logit positions
    loaded: float  # bytes per position
    stored: float


def ttir_tiles(ttir: str, logits: set[str]) -> list[Tiles]:
    """Return the passes over tiles of the arguments named `logits`, innermost loops first to last.

    Accesses to other tensors count if they have a tile's number of elements, as a bias has.
    """
    origin: dict[str, str] = {}
    accesses: dict[int, list[Access]] = {}
    open_loops: list[tuple[int, int]] = [(-1, 0)]  # indentation, serial number
    serial = 0
    for line in ttir.splitlines():
        indentation = len(line) - len(line.lstrip())
        while line.strip() and indentation <= open_loops[-1][0]:
            open_loops.pop()
        if defined := re.match(r"\s*(%\w+)(?::\d+)? = (\S+) (%[\w#]+)?", line):
            name, operation, operand = defined.groups()
            origin.pop(name, None)  # each region numbers its values anew
            if operation in POINTER_OPERATIONS:
                origin[name] = operand
        access = re.search(r"tt\.(load|store) (%[\w#]+)(.*?) : tensor<([\dx]+)x!tt\.ptr<(\w+)>>", line)
        if access:
            kind, pointer, others, shape, element = access.groups()
            while pointer in origin:
                pointer = origin[pointer]
            masked = others.count("%") > (kind == "store")
            size = math.prod(map(int, shape.split("x")))
            entry = Access(kind, pointer.removeprefix("%"), masked, size, POINTEE_BYTES[element])
            accesses.setdefault(open_loops[-1][1], []).append(entry)
        if re.search(r"scf\.for\b|\} do \{", line):
            serial += 1
            open_loops.append((indentation, serial))
    return [
        tiles for number, found in sorted(accesses.items()) for tiles in _tiles(number > 0, found, logits)
    ]


def _tiles(in_loop: bool, accesses: list[Access], logits: set[str]) -> Iterator[Tiles]:
    loads = [access for access in accesses if access.kind == "load" and access.argument in logits]
    if not loads:
        return
    largest = max(access.size for access in loads)
    repeats = max(Counter(access.argument for access in loads if access.size == largest).values())
    loaded, stored = (
        sum(a.element_bytes for a in accesses if a.kind == kind and a.size == largest) / repeats
        for kind in ("load", "store")
    )
    yield Tiles(in_loop, loads[0].masked, largest * repeats, loaded, stored)


class Usage(NamedTuple):
    """What a block of threads occupies."""

    registers: int  # per thread
    spilled: int  # bytes of memory per thread
    shared: int  # bytes per block


def disassemble(compiled: Any, target: GPUTarget) -> tuple[Program, Usage]:
    """Return a kernel's instructions and what it occupies, read from the binary."""
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]

        def metadata(key: str) -> int:
            found = re.search(rf"\.{key}:\s+(\d+)", text)
            assert found, f"no {key} in the assembly"
            return int(found[1])

        # Scalar registers that move to lanes of vector registers cost no memory and are not counted.
        spilled = metadata("private_segment_fixed_size")
        return parse_amdgcn(text), Usage(
            metadata("vgpr_count"), spilled, metadata("group_segment_fixed_size")
        )
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])

        def tool(name: str, option: str) -> str:
            command = [NVIDIA_TOOLS / name, option, binary]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        program, usage = parse_sass(tool("nvdisasm", "-c")), tool("cuobjdump", "-res-usage")
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    shared = used["SHARED"] + compiled.metadata.shared
    return program, Usage(used["REG"], used["STACK"] + used["LOCAL"], shared)


def blocks_per_multiprocessor(usage: Usage, num_warps: int, limits: Limits) -> int:
    """Return how many blocks of threads run on one multiprocessor or compute unit at a time."""
    per_partition = min(limits.registers // (math.ceil(max(usage.registers, 1) / 8) * 8), limits.warps)
    by_shared = limits.shared_bytes // max(usage.shared + limits.reserved_bytes, 1)
    return min(4 * per_partition // num_warps, by_shared, limits.blocks)
