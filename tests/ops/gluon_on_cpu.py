"""Runs Gluon kernels on a CPU, as Python: Triton's interpreter does not know Gluon.

Each partition of a warp-specialised kernel is a thread. Asynchronous work is done as late as the hardware may do it: a copy into
shared memory when somebody waits for its barrier, a matrix product when `warpgroup_mma_wait` asks for it, a copy out of shared
memory when `store_wait` does. Shared memory starts as NaN. A missing wait, a buffer that is released too early, a wrong phase or
a wrong count thus shows up as a wrong result or as a barrier that never turns. Layouts, proxies and fences are not modelled: they
are the compiler's and the GPU tests' business.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import triton.language as tl
from triton.runtime.jit import JITFunction

PATIENCE = 20.0  # seconds after which a barrier counts as one that never turns
_here = threading.local()


def _raw(x: Any) -> Any:
    return x.data if isinstance(x, Value) else x.value if isinstance(x, tl.constexpr) else x


def _divided(a: Any, b: Any) -> torch.Tensor:
    return torch.div(torch.as_tensor(a), torch.as_tensor(b), rounding_mode="trunc")


class Value:
    """A tensor or scalar of the kernel; integers divide as in C."""

    def __init__(self, data: Any) -> None:
        self.data = torch.as_tensor(data)

    shape = property(lambda self: list(self.data.shape))
    dtype = property(lambda self: self.data.dtype)

    def to(self, dtype: torch.dtype) -> Value:
        return Value(self.data.to(dtype))

    def reshape(self, shape: list[int]) -> Value:
        return Value(self.data.reshape(shape))

    def permute(self, order: tuple[int, ...]) -> Value:
        return Value(self.data.permute(order))

    def split(self) -> tuple[Value, Value]:
        return Value(self.data[..., 0]), Value(self.data[..., 1])

    def __getitem__(self, at: Any) -> Value:
        return Value(self.data[at])

    def __bool__(self) -> bool:
        return bool(self.data)

    def __index__(self) -> int:
        return int(self.data)

    def __neg__(self) -> Value:
        return Value(-self.data)


def _operator(name: str, apply: Callable[[Any, Any], Any]) -> None:
    def left(self: Value, other: Any) -> Any:
        return NotImplemented if isinstance(other, Pointer) else Value(apply(self.data, _raw(other)))

    setattr(Value, f"__{name}__", left)
    setattr(Value, f"__r{name}__", lambda self, other: Value(apply(torch.as_tensor(_raw(other)), self.data)))


for _name, _apply in {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "truediv": lambda a, b: a / b,
    "and": lambda a, b: a & b,
    "xor": lambda a, b: a ^ b,
    "floordiv": _divided,
    "mod": lambda a, b: a - _divided(a, b) * b,
}.items():
    _operator(_name, _apply)
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Value, f"__{_name}__", lambda self, other, name=_name: Value(getattr(self.data, f"__{name}__")(_raw(other))))


class Pointer:
    """Elements of a flat tensor."""

    def __init__(self, memory: torch.Tensor, at: Any = 0) -> None:
        self.memory, self.at = memory, torch.as_tensor(at)

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.memory, self.at + _raw(other))

    def read(self, mask: Any = None, other: Any = 0) -> torch.Tensor:
        at, mask = torch.broadcast_tensors(self.at, torch.as_tensor(True if mask is None else _raw(mask)))
        assert ((at >= 0) & (at < self.memory.numel()) | ~mask).all(), "read outside of the tensor"
        return torch.where(mask, self.memory[torch.where(mask, at, 0)], torch.as_tensor(other, dtype=self.memory.dtype))

    def write(self, value: Any, mask: Any = None) -> None:
        at, mask, value = torch.broadcast_tensors(self.at, torch.as_tensor(True if mask is None else _raw(mask)), _raw(value))
        self.memory[at[mask]] = value[mask].to(self.memory.dtype)


class Descriptor:
    """A matrix that TMA reads and writes in boxes; elements outside read as zero and are not written."""

    def __init__(self, base: torch.Tensor, box: list[int]) -> None:
        self.base, self.box, self.dtype, self.layout = base, box, base.dtype, None
        self.block_type = SimpleNamespace(shape=box, nbytes=box[0] * box[1] * base.element_size())

    @classmethod
    def from_tensor(cls, tensor: torch.Tensor, block_shape: list[int], layout: Any) -> Descriptor:
        assert tensor.stride(-1) == 1 and tensor.dim() == 2
        return cls(tensor, block_shape)

    def window(self, coord: list[Any]) -> tuple[torch.Tensor, tuple[slice, slice]]:
        """The part of the matrix inside the box, and where it lies in the box."""
        starts = [int(_raw(c)) for c in coord]
        low = [max(0, s) for s in starts]
        high = [min(n, s + b) for n, s, b in zip(self.base.shape, starts, self.box, strict=True)]
        inside = tuple(slice(a - s, max(a, b) - s) for a, b, s in zip(low, high, starts, strict=True))
        return self.base[low[0] : max(low[0], high[0]), low[1] : max(low[1], high[1])], inside  # type: ignore[return-value]


class Memory:
    """A piece of shared memory."""

    def __init__(self, data: torch.Tensor) -> None:
        self.data = data
        self.type = SimpleNamespace(shape=list(data.shape))

    shape = property(lambda self: list(self.data.shape))

    def index(self, i: Any) -> Memory:
        i = int(_raw(i))
        assert 0 <= i < self.data.shape[0], "index outside of shared memory"
        return Memory(self.data[i])

    def slice(self, start: int, length: int, dim: int = 0) -> Memory:
        return Memory(self.data.narrow(dim, start, length))

    def permute(self, order: tuple[int, ...]) -> Memory:
        return Memory(self.data.permute(order))

    def load(self, layout: Any) -> Value:
        return Value(self.data.clone())

    def store(self, value: Value) -> None:
        assert value.dtype == self.data.dtype and value.shape == self.shape
        self.data.copy_(value.data)


class Barrier:
    """An mbarrier: it turns when `count` arrivals have come and all expected bytes are there."""

    turned = threading.Condition()

    def __init__(self) -> None:
        self.count = self.pending = self.bytes = self.turns = 0
        self.copies: list[tuple[Callable[[], None], int]] = []

    def init(self, count: int) -> None:
        self.count = self.pending = count

    def arrive(self, count: int = 1, moved: int = 0) -> None:
        with self.turned:
            self.pending -= count
            self.bytes += moved
            assert self.pending >= 0, "more arrivals than the barrier counts"
            if self.pending == 0 and self.bytes == 0:
                self.turns, self.pending = self.turns + 1, self.count
            self.turned.notify_all()

    def wait(self, phase: Any) -> None:
        phase = int(_raw(phase))
        with self.turned:
            arrived = self.turned.wait_for(lambda: self._land() or self.turns % 2 != phase, PATIENCE)
        assert arrived, "a barrier that never turns"

    def order(self, copy: Callable[[], None], size: int) -> None:
        """A copy that this barrier counts, in bytes or by itself."""
        with self.turned:
            self.copies.append((copy, size))
            self.turned.notify_all()

    def _land(self) -> None:
        """Copies whose turn it is arrive now, at the latest."""
        copies, self.copies = self.copies, []
        for copy, size in copies:
            copy()
            if size:
                self.arrive(0, -size)


class Barriers:
    """An array of barriers."""

    def __init__(self, count: int) -> None:
        self.items = [Barrier() for _ in range(count)]

    def index(self, i: Any) -> Barrier:
        return self.items[int(_raw(i))]


class Products:
    """Accumulators with matrix products in flight, each with its place in the warps' order."""

    def __init__(self, acc: torch.Tensor, flying: list[tuple[int, torch.Tensor, torch.Tensor]]) -> None:
        self.acc, self.flying = acc, flying


def _load_box(desc: Descriptor, coord: list[Any], barrier: Barrier, into: Memory, pred: Any = True) -> None:
    if not pred:
        return
    assert into.shape == desc.box

    def copy() -> None:
        source, inside = desc.window(coord)
        into.data.zero_()
        into.data[inside] = source

    barrier.order(copy, desc.block_type.nbytes)


def _store_box(desc: Descriptor, coord: list[Any], source: Memory) -> None:
    assert source.shape == desc.box

    def copy() -> None:
        target, inside = desc.window(coord)
        target.copy_(source.data[inside])

    _here.stores.append(copy)


def _store_wait(pendings: int) -> None:
    while len(_here.stores) > pendings:
        _here.stores.pop(0)()


def _gather(into: Memory, source: Pointer, mask: Any = None) -> None:
    _here.gathers.append(lambda: into.data.copy_(source.read(mask)))


def _gathers_arrive(barrier: Barrier, increment_count: bool = True) -> None:
    assert not increment_count
    gathers, _here.gathers = _here.gathers, []
    threads = 32 * _here.warps

    def land() -> None:
        for gather in gathers:
            gather()
        barrier.arrive(threads)

    barrier.order(land, 0)


def _mma(a: Memory, b: Memory, acc: Any, is_async: bool) -> Products:
    assert is_async
    before = acc if isinstance(acc, Products) else Products(acc.data, [])
    _here.products += 1
    return Products(before.acc, [*before.flying, (_here.products, a.data, b.data)])


def _mma_wait(outstanding: int, deps: tuple[Any, ...]) -> Any:
    results = []
    for dep in deps:
        flying = dep.flying if isinstance(dep, Products) else []
        acc = dep.acc if isinstance(dep, Products) else dep.data
        done = [product for product in flying if product[0] <= _here.products - outstanding]
        for _, a, b in done:
            acc = acc + a.double() @ b.double()
        left = flying[len(done) :]
        results.append(Products(acc, left) if left else Value(acc))
    return results[0] if len(results) == 1 else tuple(results)


def _specialize(parts: list[tuple[Any, tuple[Any, ...]]], worker_warps: list[int], worker_registers: list[int]) -> None:
    errors: list[BaseException] = []

    def run(function: Any, arguments: tuple[Any, ...], warps: int, program: tuple[int, int]) -> None:
        _enter(program, warps)
        try:
            function(*arguments)
            assert not _here.stores, "stores that nobody waited for"
        except BaseException as error:
            errors.append(error)

    threads = [
        threading.Thread(target=run, args=(function, arguments, warps, _here.program))
        for (function, arguments), warps in zip(parts, [_here.warps, *worker_warps], strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def _enter(program: tuple[int, int], warps: int) -> None:
    _here.program, _here.warps, _here.stores, _here.gathers, _here.products = program, warps, [], [], 0


def _allocate(dtype: Any, shape: list[int], layout: Any) -> Any:
    if layout == "barrier":
        return Barriers(shape[0]) if len(shape) > 1 else Barrier()
    return Memory(torch.full(shape, float("nan"), dtype=dtype))


def _range(*bounds: Any) -> Iterator[Value]:
    return map(Value, range(*(int(_raw(b)) for b in bounds)))


class Kernel:
    """A jitted function as plain Python; with a grid, a launch."""

    def __init__(self, function: JITFunction) -> None:
        self.function = function.fn

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*arguments: Any, num_warps: int, maxnreg: int, **constants: Any) -> None:
            passed = [Pointer(x.view(-1)) if isinstance(x, torch.Tensor) else x for x in arguments]
            passed = [Value(x) if isinstance(x, int) else x for x in passed]
            for program in range(grid[0]):
                _enter((program, grid[0]), num_warps)
                self.function(*passed, **constants)

        return launch


class _Layout:
    def __new__(cls, *arguments: Any) -> Any:
        return None

    @staticmethod
    def get_default_for(*arguments: Any) -> Any:
        return None


GL = SimpleNamespace(
    constexpr=tl.constexpr,
    static_range=range,
    float32=torch.float32,
    bfloat16=torch.bfloat16,
    float16=torch.float16,
    int64=torch.int64,
    NVMMASharedLayout=_Layout,
    SliceLayout=_Layout,
    BlockedLayout=_Layout,
    NVMMADistributedLayout=_Layout,
    allocate_shared_memory=_allocate,
    warp_specialize=_specialize,
    thread_barrier=lambda: None,
    convert_layout=lambda x, layout, assert_trivial=False: x,
    program_id=lambda axis: Value(_here.program[0]),
    num_programs=lambda axis: Value(_here.program[1]),
    load=lambda pointer, mask=None, other=0: Value(pointer.read(mask, other)),
    store=lambda pointer, value, mask=None: pointer.write(value, mask),
    arange=lambda start, end, layout=None: Value(torch.arange(start, end)),
    zeros=lambda shape, dtype, layout=None: Value(torch.zeros(shape, dtype=torch.float64)),
    where=lambda condition, a, b: Value(torch.where(*(torch.as_tensor(_raw(x)) for x in (condition, a, b)))),
    minimum=lambda a, b: Value(torch.minimum(*(torch.as_tensor(_raw(x)) for x in (a, b)))),
    maximum=lambda a, b: Value(torch.maximum(*(torch.as_tensor(_raw(x)) for x in (a, b)))),
    cdiv=lambda a, b: Value(-(-torch.as_tensor(_raw(a)) // _raw(b))),
    exp=lambda x: Value(x.data.exp()),
    sum=lambda x, axis: Value(x.data.sum(axis)),
)
REPLACED = {
    "gl": GL,
    "range": _range,
    "TensorDescriptor": Descriptor,
    "mbarrier": SimpleNamespace(
        MBarrierLayout=lambda: "barrier",
        init=lambda barrier, count: barrier.init(count),
        wait=lambda barrier, phase: barrier.wait(phase),
        arrive=lambda barrier, count=1, pred=True: barrier.arrive(count) if pred else None,
        expect=lambda barrier, bytes, pred=True: barrier.arrive(1, bytes) if pred else None,
    ),
    "tma": SimpleNamespace(async_copy_global_to_shared=_load_box, async_copy_shared_to_global=_store_box, store_wait=_store_wait),
    "async_copy": SimpleNamespace(async_copy_global_to_shared=_gather, mbarrier_arrive=_gathers_arrive),
    "fence_async_shared": lambda: None,
    "warpgroup_mma": _mma,
    "warpgroup_mma_wait": _mma_wait,
}


@contextmanager
def gluon_on_cpu(*modules: ModuleType) -> Iterator[None]:
    """Inside, the kernels of these modules run here; products are summed in FP64."""
    before = [dict(vars(module)) for module in modules]
    try:
        for module in modules:
            for name, value in list(vars(module).items()):
                if isinstance(value, JITFunction):
                    setattr(module, name, Kernel(value))
                elif isinstance(value, tl.constexpr):
                    setattr(module, name, value.value)
            vars(module).update({name: new for name, new in REPLACED.items() if name in vars(module) or name == "range"})
        yield
    finally:
        for module, old in zip(modules, before, strict=True):
            vars(module).clear()
            vars(module).update(old)
