"""Runs the machine code of a CUDA kernel (sm_90, as nvdisasm prints it) where there is no GPU, and counts.

`Program(text)` reads one kernel; `Cluster(program, ...)` holds the threads of one thread-block cluster, all registers
as arrays over them, and `run()` executes them. Threads at the lowest address go first, so that the threads of a warp
meet again where a GPU lets them meet; BSYNC, BAR.SYNC and cluster barriers hold them back as there. What is counted is
one for every warp and instruction issued with any thread of it active, whatever its predicate says.

The meaning of the instructions is that of the PTX they come from; NVIDIA documents their names only. It is checked by
what the kernels compute (tests/bench/test_instructions.py): an instruction read wrongly gives wrong masks. Not
modelled: time, caches, the order in which memory becomes visible, denormals flushed by .FTZ, the last bit of MUFU (here
correctly rounded) and of FFMA (rounded twice). An instruction that is not known here is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

WARP = 32
PARAMETERS, SHARED_START, SHARED_SIZE = 0x210, 0x400, 1 << 18  # where sm_90 keeps them
WINDOW, GLOBAL = 0x7F00, 0x1_0000_0000  # high word of generic addresses of shared memory; start of global memory
WORD = np.uint64(0xFFFFFFFF)
RUNNING, FINISHED = 0, 1  # states of a thread; any other names what it waits for

Index = slice | np.ndarray
Reader = Callable[["Cluster", Index], np.ndarray]
Action = Callable[["Cluster", Index], None]

_COMPARE = {
    "EQ": np.equal,
    "NE": np.not_equal,
    "LT": np.less,
    "LE": np.less_equal,
    "GT": np.greater,
    "GE": np.greater_equal,
}
_BOOLEAN = {"AND": np.logical_and, "OR": np.logical_or, "XOR": np.logical_xor}
_NOTHING = {"NOP", "WARPSYNC", "MEMBAR", "ERRBAR", "CGAERRBAR", "CCTL", "DEPBAR", "ENDCOLLECTIVE", "UCGABAR_ARV"}
_NOTHING |= {"YIELD", "FENCE", "LEPC"}
_CONTROL = {"BRA", "EXIT", "CALL", "RET", "BSSY", "BSYNC", "BREAK", "BAR", "UCGABAR_WAIT"}
_BLOCK, _CLUSTER = 100, 101  # what a thread waits for, beside 2 + the number of a BSYNC


class Program:
    """The instructions of one kernel, from `nvdisasm -c --print-line-info-inline`.

    ``text``: (opcode, operands, predicate) of each instruction. ``lines``: its source, [(file, line), ...] from the
    innermost inlined call outwards.
    """

    def __init__(self, listing: str):
        self.text: list[tuple[str, list[str], str | None]] = []
        self.lines: list[tuple[tuple[str, int], ...]] = []
        self.labels: dict[str, int] = {}
        chain: list[tuple[str, int]] = []
        fresh = True
        for raw in listing.splitlines():
            if note := re.match(r'\s*//## File "([^"]*)", line (\d+)(?: inlined at "([^"]*)", line (\d+))?', raw):
                chain = [*([] if fresh else chain[:-1]), (note[1], int(note[2]))]
                if note[3]:
                    chain.append((note[3], int(note[4])))
                fresh = not note[3]
            elif label := re.match(r"([.$\w]+):", raw):
                self.labels[label[1]] = len(self.text)
            elif code := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?(\S+)\s*(.*?)\s*;", raw):
                operands = [part.strip() for part in re.sub(r"\.reuse", "", code[3]).split(",")] if code[3] else []
                self.text.append((code[2], operands, code[1]))
                self.lines.append(tuple(chain))
                fresh = True
        self.actions = [_action(self, *instruction) for instruction in self.text]
        # where a run of threads must look for others: after control, and where one can arrive
        self.stops = np.zeros(len(self.text) + 1, bool)
        self.stops[[*self.labels.values()]] = True
        for at, (opcode, _, _) in enumerate(self.text):
            self.stops[at + 1] |= opcode.split(".")[0] in _CONTROL


class Cluster:
    """One cluster of ``ranks`` CTAs of ``threads`` threads, the ``cluster``-th of its grid.

    ``memory``: global memory, bytes from address GLOBAL on. ``parameters``: the kernel's arguments as laid out in C.
    """

    def __init__(self, program: Program, ranks: int, threads: int, memory: np.ndarray, parameters: bytes, cluster=0):
        count = ranks * threads
        self.program, self.threads, self.count = program, threads, count
        self.registers = np.zeros((256, count), np.uint32)
        self.uniform = np.zeros((64, count), np.uint32)
        self.predicates = np.zeros((16, count), bool)  # P0 ... PT, then UP0 ... UPT
        self.predicates[[7, 15]] = True
        self.joins = np.zeros((16, count), bool)  # whether BSYNC must wait for a thread
        self.at = np.zeros(count, np.int64)
        self.state = np.zeros(count, np.int64)
        self.memory = memory.view(np.uint32)
        self.shared = np.full(ranks * SHARED_SIZE // 4, np.nan, np.float32).view(np.uint32)
        thread = np.arange(count, dtype=np.uint32)
        self.cta, self.warp = thread // threads, thread // WARP
        self.special = {
            "SR_TID.X": thread % threads,
            "SR_LANEID": thread % WARP,
            "SR_CTAID.X": self.cta + cluster * ranks,
            "SR_CgaCtaId": self.cta,
            "SR_SWINHI": np.full(count, WINDOW, np.uint32),
            "SRZ": np.zeros(count, np.uint32),
        }
        bank = bytearray(PARAMETERS + len(parameters) + 8)
        for at, value in ((0x0, threads), (0x4, 1), (0x8, 1), (0x10, 1), (0x14, 1), (0x140, 1)):  # the last: a cluster
            bank[at : at + 4] = int(value).to_bytes(4, "little")
        bank[PARAMETERS : PARAMETERS + len(parameters)] = parameters
        self.constants = np.frombuffer(bytes(bank[: len(bank) // 4 * 4]), np.uint32)
        self.issued = np.zeros(len(program.text), np.int64)  # by instruction, summed over warps

    def run(self) -> np.ndarray:
        """Runs to the end; what was issued.

        Raises:
            RuntimeError: no thread can go on.
        """
        stops, actions = self.program.stops, self.program.actions
        while True:
            running = np.flatnonzero(self.state == RUNNING)
            if not len(running):
                if (self.state == FINISHED).all():
                    return self.issued
                raise RuntimeError(f"deadlock: {np.count_nonzero(self.state != FINISHED)} threads wait")
            here = self.at[running]
            first = here.min()
            group = running[here == first]
            self.group = group
            index: Index = slice(None) if len(group) == self.count else group
            warps = len(np.unique(self.warp[group]))
            at = int(first)
            while True:
                self.issued[at] += warps
                self.next = at + 1
                actions[at](self, index)
                at += 1
                if stops[at]:
                    break
            if self.next is not None:
                self.at[index] = at

    def jump(self, index: Index, taken: np.ndarray, target: np.ndarray | int) -> None:
        """Threads of the group that take a branch; the others go on."""
        group, to = self.group, self.next
        self.at[group] = np.where(taken, target, to)
        self.next = None

    def release(self, barrier: int, members: np.ndarray) -> None:
        """Lets the threads in ``members`` go on if all that have not finished wait at ``barrier``."""
        states = self.state[members]
        if np.all((states == barrier) | (states == FINISHED)):
            self.state[members[states == barrier]] = RUNNING


# Operands


def _number(text: str, single: bool) -> int:
    """The bits of an immediate operand."""
    if single and not re.fullmatch(r"-?0x[0-9a-f]+", text):
        value = {"+INF": np.inf, "INF": np.inf, "-INF": -np.inf, "+QNAN": np.nan, "-QNAN": np.nan}.get(text)
        return int(np.float32(float(text) if value is None else value).view(np.uint32))
    return int(text, 0) & 0xFFFFFFFF


def _register(text: str, high: int = 0) -> tuple[str, int] | None:
    """("registers" or "uniform", number) of a plain register, ("", 0) of one that is always zero."""
    found = re.fullmatch(r"(U?)R(Z|\d+)(?:\.64|\.U32|\.64\.U32|\.H0_H0|\.B0)?", text)
    if not found:
        return None
    if found[2] == "Z":
        return "", 0
    return ("uniform" if found[1] else "registers"), int(found[2]) + high


def _raw(text: str, single: bool, high: int = 0) -> Reader:
    """Bits of a register, constant or immediate; ``high``: of the word after it."""
    if plain := _register(text, high):
        bank, number = plain
        if not bank:
            return lambda c, i: np.zeros(len(c.group), np.uint32)
        return lambda c, i: getattr(c, bank)[number, i]
    if constant := re.fullmatch(r"c\[0x0\]\[(.*)\]", text):
        parts = constant[1].split("+")
        offset = sum(int(part, 16) for part in parts if part.startswith("0x")) + 4 * high
        moving = [part for part in parts if not part.startswith("0x") and part != "RZ"]
        if not moving:
            return lambda c, i: np.full(len(c.group), c.constants[offset // 4], np.uint32)
        index = _raw(moving[0], False)
        return lambda c, i: c.constants[(index(c, i) + np.uint32(offset)) // 4]
    if high:
        sign = 0xFFFFFFFF if text.startswith("-") else 0
        return lambda c, i: np.full(len(c.group), sign, np.uint32)
    bits = _number(text, single)
    return lambda c, i: np.full(len(c.group), bits, np.uint32)


def _integer(text: str) -> tuple[Reader, int]:
    """uint64 with the value of the 32 bits, and what a carry adds: -R is ~R and 1."""
    if text.startswith(("-R", "-UR", "-c", "~")):
        read = _raw(text[1:], False)
        return (lambda c, i: (~read(c, i)).astype(np.uint64)), int(text[0] == "-")
    read = _raw(text, False)
    return (lambda c, i: read(c, i).astype(np.uint64)), 0


def _value(text: str) -> Reader:
    """uint32, negated where it says so."""
    read, extra = _integer(text)
    return lambda c, i: (read(c, i) + np.uint64(extra)).astype(np.uint32)


def _wide(text: str) -> Reader:
    """uint64 of a register and the next."""
    low, high = _raw(text, False), _raw(text, False, 1)
    return lambda c, i: low(c, i).astype(np.uint64) | high(c, i).astype(np.uint64) << np.uint64(32)


def _float(text: str) -> Reader:
    negative = text.startswith("-") and bool(re.match(r"-(\||U?R|c\[)", text))
    rest = text[1:] if negative else text
    absolute = rest.startswith("|")
    read = _raw(rest.strip("|"), True)

    def value(c: Cluster, i: Index) -> np.ndarray:
        x = read(c, i).view(np.float32)
        if absolute:
            x = np.abs(x)
        return -x if negative else x

    return value


def _predicate(text: str) -> Reader:
    found = re.fullmatch(r"(!?)(U?)P(T|\d)", text)
    if not found:
        raise ValueError(f"{text} is no predicate")
    number = (8 if found[2] else 0) + (7 if found[3] == "T" else int(found[3]))
    if found[1]:
        return lambda c, i: ~c.predicates[number, i]
    return lambda c, i: c.predicates[number, i]


def _is_predicate(text: str) -> bool:
    return re.fullmatch(r"!?U?P(T|\d)", text) is not None


def _address(operands: str, extended: bool) -> Reader:
    """int64 of `[R2.64+0x10]`, `[R3+UR4+0x10]`, with or without a descriptor before it.

    ``extended``: without a descriptor, R2 is a pair all the same.
    """
    inside = re.sub(r"^desc\[\w+\]", "", operands).strip("[]")
    terms: list[Reader] = []
    offset = 0
    for part in re.findall(r"[+-]?[^+\-]+", inside):
        part = part.lstrip("+")
        if re.match(r"-?0x", part):
            offset += int(part, 16)
        else:
            pair = part.endswith(".64") or (extended and not operands.startswith("desc") and part.startswith("R"))
            terms.append(_wide(part.removesuffix(".64")) if pair else _raw(part, False))
    return lambda c, i: sum((term(c, i).astype(np.int64) for term in terms), np.int64(offset))


# Memory


def _words(c: Cluster, address: np.ndarray, space: str) -> tuple[np.ndarray, np.ndarray]:
    """Which of the threads address shared memory, and the index of the word of each in its array."""
    if (address & 3).any():
        raise RuntimeError("an address that is not aligned")
    inside = np.full(len(address), True) if space == "S" else address >> 32 == WINDOW
    low = address & 0xFFFFFFFF
    index = np.where(inside, (low >> 24) * SHARED_SIZE + (low & 0xFFFFFF), address - GLOBAL) // 4
    return inside, index


def _memory(opcode: str, operands: list[str], store: bool) -> Action:
    width = 4 if ".128" in opcode else 2 if ".64" in opcode else 1
    space = opcode.split(".")[0][2:]
    address = _address(operands[0] if store else operands[-1], ".E" in opcode)
    parts = [_raw(operands[-1] if store else operands[0], False, n) for n in range(width)]
    target = None if store else _register(operands[0])

    def act(c: Cluster, i: Index) -> None:
        where = address(c, i)
        if (where % (4 * width)).any():
            raise RuntimeError(f"{opcode}: an address that is not aligned")
        inside, index = _words(c, where, space)
        for n in range(width):
            if store:
                value = parts[n](c, i)
                c.shared[index[inside] + n] = value[inside]
                c.memory[index[~inside] + n] = value[~inside]
            elif target and target[0]:
                value = np.empty(len(c.group), np.uint32)
                value[inside] = c.shared[index[inside] + n]
                value[~inside] = c.memory[index[~inside] + n]
                getattr(c, target[0])[target[1] + n, i] = value

    return act


# Instructions


def _round(exact: np.ndarray, mode: str) -> np.ndarray:
    x = exact.astype(np.float32)
    if mode == "RN":
        return x
    up, down = np.nextafter(x, np.float32(np.inf)), np.nextafter(x, np.float32(-np.inf))
    if mode == "RZ":
        return np.where((np.abs(x.astype(np.float64)) > np.abs(exact)), np.nextafter(x, np.float32(0)), x)
    return np.where(x > exact, down, x) if mode == "RM" else np.where(x < exact, up, x)


def _bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x, np.float32).view(np.uint32)


def _arithmetic(name: str, opcode: str, operands: list[str]) -> Reader:
    """float32 of FADD, FMUL, FFMA."""
    readers = [_float(text) for text in operands]
    mode = next((part for part in opcode.split(".") if part in ("RM", "RP", "RZ")), "RN")
    saturate = ".SAT" in opcode

    def value(c: Cluster, i: Index) -> np.ndarray:
        a, b, *rest = (read(c, i).astype(np.float64) for read in readers)
        exact = a + b if name == "FADD" else a * b if name == "FMUL" else a * b + rest[0]
        x = _round(exact, mode)
        return np.where(x > 0, np.minimum(x, np.float32(1)), np.float32(0)) if saturate else x

    return value


def _special_function(opcode: str, text: str) -> Reader:
    read = _float(text)
    function = opcode.split(".")[1]
    evaluate = {
        "RCP": lambda x: 1 / x,
        "EX2": np.exp2,
        "LG2": np.log2,
        "RSQ": lambda x: 1 / np.sqrt(x),
        "SQRT": np.sqrt,
    }[function]
    return lambda c, i: evaluate(read(c, i).astype(np.float64)).astype(np.float32)


def _slow_division(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """FCHK: whether a / b needs the careful way: exponents near the ends of their range."""
    ea, eb = ((_bits(x) >> 23 & 255).astype(np.int64) for x in (a, b))
    far = (ea - eb > 125) | (ea - eb < -125)
    return (ea == 255) | (eb == 255) | (eb == 0) | (eb > 252) | ((ea < 25) & (a != 0)) | (far & (a != 0))


def _compare(opcode: str, operands: list[str]) -> Action:
    """ISETP and FSETP; two predicates from one comparison."""
    name, operator, *rest = opcode.split(".")
    single = name.endswith("FSETP")
    combine = _BOOLEAN[next(part for part in rest if part in _BOOLEAN)]
    unordered = single and operator.endswith("U")
    plain = operator[:-1] if unordered else operator
    first, second, a, b, with_ = operands[:5]
    low = _predicate(operands[5]) if "EX" in rest else None
    kind = np.uint32 if "U32" in rest else np.int32
    reader = _float if single else _value
    x, y, other = reader(a), reader(b), _predicate(with_)
    targets = [_predicate_index(first), _predicate_index(second)]

    def act(c: Cluster, i: Index) -> None:
        left, right = x(c, i), y(c, i)
        if not single:
            left, right = left.view(kind), right.view(kind)
        if single:
            missing = np.isnan(left) | np.isnan(right)
            result = np.where(missing, unordered, _COMPARE[plain](left, right))
        else:
            result = _COMPARE[plain](left, right)
            if low is not None:
                strict = {"GE": np.greater, "GT": np.greater, "LE": np.less, "LT": np.less}.get(plain)
                below = low(c, i)
                if strict is not None:
                    result = strict(left, right) | (left == right) & below
                else:
                    result = result & below if plain == "EQ" else result | below
        joined = other(c, i)
        results = [combine(result, joined), combine(~result, joined)]
        for target, value in zip(targets, results, strict=True):
            if target is not None:
                c.predicates[target, i] = value

    return act


def _predicate_index(text: str) -> int | None:
    found = re.fullmatch(r"(U?)P(T|\d)", text)
    if not found:
        raise ValueError(f"{text} is no predicate")
    return None if found[2] == "T" else (8 if found[1] else 0) + int(found[2])


def _table(lut: int, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    result = np.zeros_like(a)
    for n in range(8):
        if lut >> n & 1:
            result = result | (a if n & 4 else ~a) & (b if n & 2 else ~b) & (c if n & 1 else ~c)
    return result


def _shift(opcode: str, operands: list[str]) -> Reader:
    low, by, high = _value(operands[0]), _value(operands[1]), _value(operands[2])
    left, upper = ".L." in opcode, opcode.endswith(".HI")
    signed, wide = ".S" in opcode, "64" in opcode

    def value(c: Cluster, i: Index) -> np.ndarray:
        both = low(c, i).astype(np.uint64) | high(c, i).astype(np.uint64) << np.uint64(32)
        n = np.minimum(by(c, i), 63 if wide else 32).astype(np.uint64)
        if left:
            both = both << n
        else:
            both = (both.view(np.int64) >> n.astype(np.int64)).view(np.uint64) if signed else both >> n
        return (both >> np.uint64(32) if upper else both & WORD).astype(np.uint32)

    return value


def _sum(opcode: str, operands: list[str]) -> Action:
    """IADD3, LEA and the narrow forms of IMAD: result, (carry, carry)."""
    target = operands[0]
    rest = operands[1:]
    carries = []
    while _is_predicate(rest[0]):
        carries.append(_predicate_index(rest.pop(0)))
    incoming = []
    while _is_predicate(rest[-1]):
        incoming.append(_predicate(rest.pop()))
    name = opcode.split(".")[0].removeprefix("U")
    extra = 0
    product: Callable[[Cluster, Index], np.ndarray]
    if name == "IADD3":
        terms = [_integer(text) for text in rest]
        # with a carry from below, a minus sign would be ~ already
        extra = sum(more for _, more in terms)

        def product(c: Cluster, i: Index) -> np.ndarray:
            return sum((read(c, i) for read, _ in terms), np.uint64(extra))
    elif name == "IMAD":
        a, b = _value(rest[0]), _value(rest[1])
        addend, extra = _integer(rest[2])

        def product(c: Cluster, i: Index) -> np.ndarray:
            full = a(c, i).astype(np.uint64) * b(c, i).astype(np.uint64)
            return (full & WORD) + addend(c, i) + np.uint64(extra)
    else:  # LEA
        a, by = _value(rest[0]), int(rest[-1], 16)
        addend, extra = _integer(rest[1])
        high = _value(rest[2]) if ".HI" in opcode and "SX32" not in opcode else None

        def product(c: Cluster, i: Index) -> np.ndarray:
            x = a(c, i)
            if ".HI" not in opcode:
                return ((x.astype(np.uint64) << np.uint64(by)) & WORD) + addend(c, i) + np.uint64(extra)
            wide = (
                x.view(np.int32).astype(np.int64).view(np.uint64)
                if high is None
                else x.astype(np.uint64) | high(c, i).astype(np.uint64) << np.uint64(32)
            )
            return ((wide << np.uint64(by)) >> np.uint64(32)) + addend(c, i) + np.uint64(extra)

    store = _store(target)

    def act(c: Cluster, i: Index) -> None:
        total = product(c, i)
        for carry in incoming:
            total = total + carry(c, i).astype(np.uint64)
        out = total >> np.uint64(32)
        store(c, i, (total & WORD).astype(np.uint32))
        for n, carry in enumerate(carries):
            if carry is not None:
                c.predicates[carry, i] = out > n

    return act


def _store(text: str) -> Callable[[Cluster, Index, np.ndarray], None]:
    plain = _register(text)
    if plain is None:
        raise ValueError(f"{text} is no register")
    bank, number = plain

    def store(c: Cluster, i: Index, value: np.ndarray) -> None:
        if bank:
            getattr(c, bank)[number, i] = value

    return store


def _store_wide(text: str) -> Callable[[Cluster, Index, np.ndarray], None]:
    plain = _register(text)
    assert plain is not None

    def store(c: Cluster, i: Index, value: np.ndarray) -> None:
        if plain[0]:
            getattr(c, plain[0])[plain[1], i] = (value & WORD).astype(np.uint32)
            getattr(c, plain[0])[plain[1] + 1, i] = (value >> np.uint64(32)).astype(np.uint32)

    return store


def _wide_product(opcode: str, operands: list[str]) -> Action:
    """IMAD.WIDE, and IMAD.HI, whose addend is 64 bits wide too."""
    rest = operands[1:]
    carry = _predicate_index(rest.pop(0)) if _is_predicate(rest[0]) else None
    incoming = _predicate(rest.pop()) if _is_predicate(rest[-1]) else None
    a, b, addend = _value(rest[0]), _value(rest[1]), _wide(rest[2])
    signed, upper = ".U32" not in opcode, ".HI" in opcode
    store = _store(operands[0]) if upper else _store_wide(operands[0])

    def act(c: Cluster, i: Index) -> None:
        x, y = a(c, i), b(c, i)
        if signed:
            product = (x.view(np.int32).astype(np.int64) * y.view(np.int32).astype(np.int64)).view(np.uint64)
        else:
            product = x.astype(np.uint64) * y.astype(np.uint64)
        total = product + addend(c, i)
        if carry is not None:
            c.predicates[carry, i] = total < product
        if incoming is not None:
            total = total + incoming(c, i).astype(np.uint64)
        store(c, i, (total >> np.uint64(32)).astype(np.uint32) if upper else total)

    return act


def _permute(operands: list[str]) -> Reader:
    a, select, b = (_value(text) for text in operands)

    def value(c: Cluster, i: Index) -> np.ndarray:
        both = a(c, i).astype(np.uint64) | b(c, i).astype(np.uint64) << np.uint64(32)
        choice = select(c, i).astype(np.uint64)
        result = np.zeros_like(both)
        for n in range(4):
            nibble = choice >> np.uint64(4 * n) & np.uint64(15)
            byte = both >> (nibble & np.uint64(7)) * np.uint64(8) & np.uint64(255)
            byte = np.where(nibble & np.uint64(8), np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0)), byte)
            result |= byte << np.uint64(8 * n)
        return result.astype(np.uint32)

    return value


def _exchange(opcode: str, operands: list[str]) -> Action:
    """SHFL: predicate, result, value, which lane, clamp."""
    target = _predicate_index(operands[0])
    store, value, by = _store(operands[1]), _value(operands[2]), _value(operands[3])

    def act(c: Cluster, i: Index) -> None:
        group = c.group
        lanes = np.zeros(c.count, np.uint32)
        lanes[group] = value(c, i)
        lane, n = group % WARP, by(c, i).astype(np.int64)
        source = {"BFLY": lane ^ n, "IDX": n & 31, "UP": lane - n, "DOWN": lane + n}[opcode.split(".")[1]]
        inside = (source >= 0) & (source < WARP)
        whole = group - lane + np.where(inside, source, lane)
        store(c, i, lanes[whole])
        if target is not None:
            c.predicates[target, i] = inside

    return act


def _vote(opcode: str, operands: list[str]) -> Action:
    read = _predicate(operands[-1])
    targets = operands[:-1]

    def act(c: Cluster, i: Index) -> None:
        group, votes = c.group, read(c, i)
        ballots = np.zeros(c.count // WARP, np.uint64)
        active = np.zeros(c.count // WARP, np.uint64)
        bits = np.uint64(1) << (group % WARP).astype(np.uint64)
        np.bitwise_or.at(ballots, group[votes] // WARP, bits[votes])
        np.bitwise_or.at(active, group // WARP, bits)
        mine, all_ = ballots[group // WARP], active[group // WARP]
        result = mine == all_ if ".ALL" in opcode else mine != 0
        for text in targets:
            if _is_predicate(text):
                number = _predicate_index(text)
                if number is not None:
                    c.predicates[number, i] = result
            else:
                _store(text)(c, i, mine.astype(np.uint32))

    return act


def _convert(opcode: str, operands: list[str]) -> Action:
    """I2F, I2FP, F2I."""
    wide = "64" in opcode
    if opcode.startswith("F2I"):
        read = _float(operands[1])
        store = _store_wide(operands[0]) if wide else _store(operands[0])
        unsigned = ".U" in opcode

        def to_integer(c: Cluster, i: Index) -> None:
            x = read(c, i).astype(np.float64)
            x = np.floor(x) if "FLOOR" in opcode else np.rint(x) if "TRUNC" not in opcode else np.trunc(x)
            bounds = (0, 2.0**32 - 1) if unsigned else (-(2.0**31), 2.0**31 - 1)
            if wide:
                store(c, i, np.clip(x, 0, 2.0**64 - 2048).astype(np.uint64))
            else:
                store(c, i, np.clip(x, *bounds).astype(np.int64).astype(np.uint32))

        return to_integer
    source = _wide(operands[1]) if wide else _value(operands[1])
    signed, store = ".U" not in opcode, _store(operands[0])
    mode = "RP" if ".RP" in opcode else "RN"

    def to_float(c: Cluster, i: Index) -> None:
        x = source(c, i)
        if signed:
            x = x.view(np.int64 if wide else np.int32)
        # a double holds 53 bits; up from there is up from the integer
        store(c, i, _bits(_round(x.astype(np.float64), mode)))

    return to_float


def _value_instruction(name: str, opcode: str, operands: list[str]) -> Reader | None:
    """What an instruction writes into its first operand, None if it is none of these."""
    rest = operands[1:]
    if name in ("FADD", "FMUL", "FFMA"):
        single = _arithmetic(name, opcode, rest)
        return lambda c, i: _bits(single(c, i))
    if name == "MUFU":
        single = _special_function(opcode, rest[0])
        return lambda c, i: _bits(single(c, i))
    if name == "FMNMX":
        a, b, least = _float(rest[0]), _float(rest[1]), _predicate(rest[2])
        return lambda c, i: _bits(np.where(least(c, i), np.fmin(a(c, i), b(c, i)), np.fmax(a(c, i), b(c, i))))
    if name == "FSEL":
        a, b, choice = _float(rest[0]), _float(rest[1]), _predicate(rest[2])
        return lambda c, i: _bits(np.where(choice(c, i), a(c, i), b(c, i)))
    if name == "SEL":
        x, y, choice = _value(rest[0]), _value(rest[1]), _predicate(rest[2])
        return lambda c, i: np.where(choice(c, i), x(c, i), y(c, i))
    if name == "MOV":
        return _raw(rest[0], False)
    if name == "VIADD":
        x, y = _value(rest[0]), _value(rest[1])
        return lambda c, i: x(c, i) + y(c, i)
    if name in ("VIMNMX", "VIADDMNMX"):
        x, y, least = _value(rest[0]), _value(rest[1]), _predicate(rest[-1])
        z = _value(rest[2]) if name == "VIADDMNMX" else None
        kind = np.uint32 if ".U32" in opcode else np.int32

        def bound(c: Cluster, i: Index) -> np.ndarray:
            p, q = (x(c, i), y(c, i)) if z is None else (x(c, i) + y(c, i), z(c, i))
            p, q = p.view(kind), q.view(kind)
            return np.where(least(c, i), np.minimum(p, q), np.maximum(p, q)).astype(kind).view(np.uint32)

        return bound
    if name == "IABS":
        x = _value(rest[0])
        return lambda c, i: np.abs(x(c, i).view(np.int32)).view(np.uint32)
    if name == "SHF":
        return _shift(opcode, rest)
    if name == "PRMT":
        return _permute(rest)
    if name == "POPC":
        x = _value(rest[0])
        return lambda c, i: np.bitwise_count(x(c, i)).astype(np.uint32)
    if name == "BREV":
        x = _value(rest[0])

        def reverse(c: Cluster, i: Index) -> np.ndarray:
            bits = np.unpackbits(np.ascontiguousarray(x(c, i)).astype(">u4").view(np.uint8).reshape(-1, 4), axis=1)
            return np.packbits(bits[:, ::-1], axis=1).view(">u4").ravel().astype(np.uint32)

        return reverse
    if name == "FLO":
        x = _value(rest[0])

        def leading(c: Cluster, i: Index) -> np.ndarray:
            bits = x(c, i)
            highest = np.floor(np.log2(np.maximum(bits, 1).astype(np.float64))).astype(np.uint32)
            found = np.uint32(31) - highest if ".SH" in opcode else highest
            return np.where(bits == 0, np.uint32(0xFFFFFFFF), found)

        return leading
    if name in ("S2R", "S2UR"):
        return lambda c, i: c.special[rest[0]][i]
    if name == "R2UR":
        return _raw(rest[-1], False)
    if name == "HFMA2" and rest[:2] == ["-RZ", "RZ"]:  # how a constant is made
        halves = np.array([float(rest[3]), float(rest[2])], np.float16).view(np.uint32)[0]
        return lambda c, i: np.full(len(c.group), halves, np.uint32)
    if name in ("P2R", "P2UR"):
        mask, base = int(rest[2], 16), 8 if rest[0] == "UPR" else 0
        return lambda c, i: sum(
            (c.predicates[base + n, i].astype(np.uint32) << n for n in range(7) if mask >> n & 1),
            np.zeros(len(c.group), np.uint32),
        )
    return None


def _other(name: str, opcode: str, operands: list[str], program: Program) -> Action:
    """The instructions that write no or several registers."""
    if name in ("ISETP", "FSETP"):
        return _compare(opcode.removeprefix("U"), operands)
    if name in ("LDG", "LD", "LDS"):
        return _memory(opcode, operands, store=False)
    if name in ("STG", "ST", "STS"):
        return _memory(opcode, operands, store=True)
    if name == "IMAD" and (".WIDE" in opcode or ".HI" in opcode):
        return _wide_product(opcode, operands)
    if name in ("IADD3", "IMAD", "LEA"):
        return _sum(opcode, operands)
    if name == "SHFL":
        return _exchange(opcode, operands)
    if name in ("VOTE", "VOTEU"):
        return _vote(opcode, operands)
    if name in ("I2F", "I2FP", "F2I"):
        return _convert(opcode, operands)
    if name in ("LDC", "MOV64") or (name == "CS2R" and ".32" not in opcode):
        width = 2 if ".64" in opcode or name == "CS2R" else 1
        words = [_raw(operands[1], False, n) for n in range(width)] if name == "LDC" else []
        bank = _register(operands[0])
        assert bank is not None

        def load(c: Cluster, i: Index) -> None:
            for n in range(width):
                if bank[0]:
                    getattr(c, bank[0])[bank[1] + n, i] = words[n](c, i) if words else np.uint32(0)

        return load
    if name == "LOP3":
        predicate = _predicate_index(operands[0]) if _is_predicate(operands[0]) else None
        target, a, b, d, lut = operands[1:6] if _is_predicate(operands[0]) else operands[:5]
        store, x, y, z = _store(target), _value(a), _value(b), _value(d)

        def logic(c: Cluster, i: Index) -> None:
            result = _table(int(lut, 16), x(c, i), y(c, i), z(c, i))
            store(c, i, result)
            if predicate is not None:
                c.predicates[predicate, i] = result != 0

        return logic
    if name == "PLOP3":
        targets = [_predicate_index(text) for text in operands[:2]]
        p, q, r = (_predicate(text) for text in operands[2:5])
        luts = [int(text, 16) for text in operands[5:7]]

        def choose(c: Cluster, i: Index) -> None:
            given = p(c, i), q(c, i), r(c, i)
            for target, lut in zip(targets, luts, strict=True):
                if target is not None:
                    c.predicates[target, i] = _table(lut, *given)

        return choose
    if name == "R2P":
        x, mask = _value(operands[1]), int(operands[2], 16)

        def spread(c: Cluster, i: Index) -> None:
            bits = x(c, i)
            for n in range(7):
                if mask >> n & 1:
                    c.predicates[n, i] = bits >> n & 1

        return spread
    if name == "FCHK":
        a, b, number = _float(operands[1]), _float(operands[2]), _predicate_index(operands[0])
        assert number is not None

        def check(c: Cluster, i: Index) -> None:
            c.predicates[number, i] = _slow_division(a(c, i), b(c, i))

        return check
    raise NotImplementedError(f"{opcode} {', '.join(operands)}")


def _control(name: str, opcode: str, operands: list[str], predicate: Reader | None, program: Program) -> Action:
    """Branches, barriers and the end of a thread. Their predicate says who takes them."""
    label = re.search(r"`\(([^)]*)\)", operands[-1])[1] if operands and "`(" in operands[-1] else ""

    def taken(c: Cluster, i: Index) -> np.ndarray:
        return np.full(len(c.group), True) if predicate is None else predicate(c, i)

    if name == "BRA" and "DIV" in opcode:
        # for warps that are not whole; these kernels have none, and a shuffle says so if one appears

        def whole(c: Cluster, i: Index) -> None:
            if len(c.group) % WARP or (np.bincount(c.group // WARP) % WARP).any():
                raise NotImplementedError("a warp that has diverged before a shuffle")

        return whole
    if name in ("BRA", "CALL"):
        extra = [_predicate(text) for text in operands[:-1] if _is_predicate(text)]

        def branch(c: Cluster, i: Index) -> None:
            take = taken(c, i)
            for more in extra:
                take = take & more(c, i)
            c.jump(i, take, program.labels[label])

        return branch
    if name == "RET":
        read = _raw(operands[0].split()[0], False)
        return lambda c, i: c.jump(i, taken(c, i), read(c, i).astype(np.int64) // 16)
    if name == "EXIT":

        def finish(c: Cluster, i: Index) -> None:
            ending = c.group[taken(c, i)]
            c.jump(i, np.full(len(c.group), False), 0)
            c.state[ending] = FINISHED
            c.joins[:, ending] = False
            for barrier in np.unique(c.state):
                if barrier >= 2:
                    _retry(c, int(barrier))

        return finish
    if name in ("BSSY", "BREAK", "BSYNC"):
        number = int(operands[0][1:])
        barrier = 2 + number

        def join(c: Cluster, i: Index) -> None:
            take = taken(c, i)
            mine = c.group[take]
            if name == "BSSY":
                c.joins[number, mine] = True
                return
            if name == "BREAK":
                c.joins[number, mine] = False
                _retry(c, barrier)
                return
            c.jump(i, np.full(len(c.group), False), 0)
            c.state[mine] = barrier
            _retry(c, barrier)

        return join
    barrier = {"BAR": _BLOCK, "UCGABAR_WAIT": _CLUSTER}.get(name, 0)
    if not barrier or predicate is not None:
        raise NotImplementedError(f"{opcode} {', '.join(operands)}: not known here")

    def wait(c: Cluster, i: Index) -> None:
        c.jump(i, np.full(len(c.group), False), 0)
        c.state[c.group] = barrier
        _retry(c, barrier)

    return wait


def _retry(c: Cluster, barrier: int) -> None:
    """Lets go whoever waits at a barrier that is complete."""
    waiting = np.flatnonzero(c.state == barrier)
    if barrier == _CLUSTER:
        c.release(barrier, np.arange(c.count))
    elif barrier == _BLOCK:
        for cta in np.unique(c.cta[waiting]):
            c.release(barrier, np.arange(cta * c.threads, (cta + 1) * c.threads))
    else:
        joins = c.joins[barrier - 2].reshape(-1, WARP)
        held = (joins & (c.state.reshape(-1, WARP) != barrier)).any(1)
        free = waiting[~held[waiting // WARP]]
        c.state[free] = RUNNING
        c.joins[barrier - 2, free] = False


def _action(program: Program, opcode: str, operands: list[str], predicate: str | None) -> Action:
    """What an instruction does to the threads of a group."""
    name = opcode.split(".")[0]
    uniform = name.startswith("U") and name not in ("UCGABAR_ARV", "UCGABAR_WAIT")
    name = name.removeprefix("U") if uniform else name
    guard = None if predicate is None else _predicate(predicate)
    if name in _NOTHING:
        return lambda c, i: None
    try:
        if name in _CONTROL:
            return _control(name, opcode, operands, guard, program)
        value = _value_instruction(name, opcode, operands)
        if value is None:
            act = _other(name, opcode, operands, program)
        else:
            store = _store(operands[0])
            act = _writes(store, value)
    except (NotImplementedError, ValueError, IndexError, StopIteration) as problem:
        message = f"{opcode} {', '.join(operands)}: not known here ({problem!r})"

        def unknown(c: Cluster, i: Index) -> None:
            raise NotImplementedError(message)

        return unknown
    whole_warps = uniform or name in ("R2UR", "S2UR")
    if guard is None and not whole_warps:
        return act

    def guarded(c: Cluster, i: Index) -> None:
        group = c.group
        some = group if guard is None else group[guard(c, i)]
        if whole_warps and len(some) % WARP:
            some = np.flatnonzero(np.isin(c.warp, c.warp[some]))
        if not len(some):
            return
        c.group = some
        act(c, some)
        c.group = group

    return guarded


def _writes(store: Callable[[Cluster, Index, np.ndarray], None], value: Reader) -> Action:
    def act(c: Cluster, i: Index) -> None:
        store(c, i, value(c, i))

    return act
