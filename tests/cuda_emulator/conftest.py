"""Builds the CUDA kernels for the CPU once and calls them on tensors in guarded memory."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).parent
MAP_TYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LABEL_TYPES = [torch.uint8, torch.int32, torch.int64]
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]


class KernelError(RuntimeError):
    """What a launch returned, in the emulator's words."""


class Emulator:
    """The operators' launchers on CPU tensors.

    `seed` and `resident` choose a schedule: the order of threads, and how many blocks run at once. Inputs and outputs
    lie right before a page that faults, on addresses that are multiples of `alignment`, or of the element's size.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        library.emulator_allocate.restype = ctypes.c_void_p
        library.emulator_allocate.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
        library.emulator_release.argtypes = [ctypes.c_void_p]
        library.emulator_message.restype = ctypes.c_char_p
        library.emulator_reset.argtypes = [ctypes.c_uint64, ctypes.c_uint, ctypes.c_int64]
        self.most_scratch = 256 << 20
        library.emulator_list.restype = ctypes.c_int64
        library.emulator_sweep.restype = ctypes.c_int64

    @contextmanager
    def scratch(self, most: int) -> Iterator[None]:
        """Let tables take no more than `most` bytes, so that images go one after another."""
        self.most_scratch, before = most, self.most_scratch
        try:
            yield
        finally:
            self.most_scratch = before

    def check(self, error: int) -> None:
        if error:
            raise KernelError(f"{error}: {self.library.emulator_message().decode()}")

    @contextmanager
    def memory(self, seed: int, resident: int, alignment: int | None) -> Iterator[Memory]:
        memory = Memory(self.library, alignment)
        self.library.emulator_reset(seed, resident, self.most_scratch)
        try:
            yield memory
        finally:
            memory.release()

    def refine(
        self,
        maps: Tensor | Sequence[Tensor],
        labels: Tensor,
        alpha: float,
        limit: int,
        counts: Tensor | None = None,
        *,
        weights: Sequence[float] = (),
        means: bool = False,
        seed: int = 0,
        resident: int = 4,
        alignment: int | None = 16,
        processors: int = 1,
        look_ahead: int = 0,
    ) -> tuple[Tensor, ...]:
        """Return the refined maps, or with `means` the means and counts of cluster_mean."""
        scales = [] if isinstance(maps, Tensor) else list(maps)
        first = maps if isinstance(maps, Tensor) else scales[0]
        batch, channels = first.shape[:2]
        height, width = labels.shape[1:]
        kind = torch.float64 if first.dtype == torch.float64 else torch.float32
        with self.memory(seed, resident, alignment) as memory:
            inputs = [memory.put(m) for m in (scales or [first])]
            sizes = [n for m in scales for n in m.shape[2:]]
            outs = (
                [torch.empty(batch, channels, limit, dtype=kind), torch.empty(batch, limit, dtype=torch.int64)]
                if means
                else [torch.empty(batch, channels, height, width, dtype=first.dtype)]
            )
            places = [memory.place(out) for out in outs]
            error = self.library.emulator_refine(
                (ctypes.c_void_p * len(inputs))(*inputs),
                len(scales),
                (ctypes.c_int * len(sizes))(*sizes),
                (ctypes.c_double * len(scales))(*weights),
                memory.put(labels),
                memory.put(counts) if counts is not None else None,
                None if means else places[0],
                places[0] if means else None,
                places[1] if means else None,
                MAP_TYPES.index(first.dtype),
                LABEL_TYPES.index(labels.dtype),
                *map(ctypes.c_int64, (batch, channels)),
                height,
                width,
                ctypes.c_int64(limit),
                ctypes.c_double(alpha),
                processors,
                ctypes.c_int64(look_ahead),
            )
            self.check(error)
            return tuple(memory.take(place, out) for place, out in zip(places, outs, strict=True))

    def vote(
        self,
        labels: Tensor,
        segments: Tensor,
        clusters: int,
        limit: int,
        *,
        seed: int = 0,
        resident: int = 4,
        alignment: int | None = None,
    ) -> Tensor:
        with self.memory(seed, resident, alignment) as memory:
            out = torch.empty_like(labels)
            place = memory.place(out)
            error = self.library.emulator_vote(
                memory.put(labels),
                memory.put(segments),
                place,
                LABEL_TYPES.index(labels.dtype),
                LABEL_TYPES.index(segments.dtype),
                *map(ctypes.c_int64, (len(labels), labels[0].numel(), clusters, limit)),
            )
            self.check(error)
            return memory.take(place, out)

    def largest_box(
        self,
        maps: Tensor,
        threshold: float,
        connectivity: int = 8,
        *,
        seed: int = 0,
        resident: int = 4,
        alignment: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, channels, height, width = maps.shape
        with self.memory(seed, resident, alignment) as memory:
            outs = [
                torch.empty(batch, channels, 4),
                torch.empty(batch, channels, dtype=torch.int64),
                torch.empty(batch, channels),
            ]
            places = [memory.place(out) for out in outs]
            error = self.library.emulator_largest_box(
                memory.put(maps),
                MAP_TYPES.index(maps.dtype),
                *map(ctypes.c_int64, (batch, channels)),
                height,
                width,
                ctypes.c_double(threshold),
                connectivity,
                *places,
            )
            self.check(error)
            boxes, area, mean = (memory.take(place, out) for place, out in zip(places, outs, strict=True))
            return boxes, area, mean

    def components(
        self,
        maps: Tensor,
        threshold: float,
        connectivity: int = 8,
        largest: bool = False,
        *,
        seed: int = 0,
        resident: int = 4,
        alignment: int | None = None,
    ) -> Tensor:
        """Rows of x0, y0, x1, y1, area, mean, image, channel."""
        batch, channels, height, width = maps.shape
        with self.memory(seed, resident, alignment) as memory:
            room = torch.empty(maps.numel(), 7, dtype=torch.float64)
            place = memory.place(room)
            count = self.library.emulator_list(
                memory.put(maps),
                MAP_TYPES.index(maps.dtype),
                *map(ctypes.c_int64, (batch, channels)),
                height,
                width,
                ctypes.c_double(threshold),
                connectivity,
                int(largest),
                place,
                ctypes.c_int64(len(room)),
            )
            self.check(-min(count, 0))
            rows = memory.take(place, room)[:count]
            map_index = rows[:, 6:].long()
            return torch.cat([rows[:, :6], map_index // channels, map_index % channels], 1)

    def sweep(
        self,
        levels: Tensor,
        connectivity: int = 8,
        *,
        seed: int = 0,
        resident: int = 4,
        alignment: int | None = None,
    ) -> Tensor:
        """Rows of x0, y0, x1, y1, area, first, last, image, channel."""
        batch, channels, height, width = levels.shape
        count = 0
        outs: list[Tensor] = []
        for _ in range(2):
            with self.memory(seed, resident, alignment) as memory:
                outs = [torch.empty(count, 4), torch.empty(count, dtype=torch.float64)]
                outs += [torch.empty(count, dtype=torch.int64) for _ in range(4)]
                places = [memory.place(out) for out in outs]
                source = memory.put(levels)
                size = *map(ctypes.c_int64, (batch, channels)), height, width, connectivity
                count = self.library.emulator_sweep(source, *size, ctypes.c_int64(count), *places)
                self.check(-min(count, 0))
                outs = [memory.take(place, out) for place, out in zip(places, outs, strict=True)]
        return torch.cat([outs[0].double(), *(out[:, None].double() for out in outs[1:])], 1)

    def largest_at_cuts(
        self,
        levels: Tensor,
        connectivity: int = 8,
        *,
        seed: int = 0,
        resident: int = 4,
        alignment: int | None = None,
    ) -> Tensor:
        """Rows (B, C, 255, 5) of x0, y0, x1, y1, area."""
        batch, channels, height, width = levels.shape
        with self.memory(seed, resident, alignment) as memory:
            outs = [torch.empty(batch, channels, 255, 4), torch.empty(batch, channels, 255, dtype=torch.float64)]
            places = [memory.place(out) for out in outs]
            error = self.library.emulator_largest_at_cuts(
                memory.put(levels), *map(ctypes.c_int64, (batch, channels)), height, width, connectivity, *places
            )
            self.check(error)
            boxes, area = (memory.take(place, out) for place, out in zip(places, outs, strict=True))
            return torch.cat([boxes.double(), area[..., None]], 3)


class Memory:
    """The arrays of one call."""

    def __init__(self, library: ctypes.CDLL, alignment: int | None) -> None:
        self.library = library
        self.alignment = alignment
        self.held: list[ctypes.c_void_p] = []

    def place(self, like: Tensor) -> ctypes.c_void_p:
        bytes_ = like.numel() * like.element_size()
        held = ctypes.c_void_p(self.library.emulator_allocate(bytes_, self.alignment or like.element_size()))
        self.held.append(held)
        return held

    def put(self, tensor: Tensor) -> ctypes.c_void_p:
        tensor = tensor.contiguous()
        place = self.place(tensor)
        ctypes.memmove(place, tensor.data_ptr(), tensor.numel() * tensor.element_size())
        return place

    def take(self, place: ctypes.c_void_p, out: Tensor) -> Tensor:
        ctypes.memmove(out.data_ptr(), place, out.numel() * out.element_size())
        return out

    def release(self) -> None:
        for held in self.held:
            self.library.emulator_release(held)


def build(folder: Path, sources: Sequence[str], flags: Sequence[str] = ()) -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not there to build the emulated kernels")
    library = folder / f"{sources[0].removesuffix('.cpp')}.so"
    include = ["-DMOLT_EMULATE", f"-I{HERE}", f"-I{HERE.parents[1] / 'csrc' / 'cuda'}"]
    command = [compiler, *FLAGS, "-Werror", *include, *sources, "emulator.cpp", *flags, "-o", str(library)]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return library


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    return Emulator(ctypes.CDLL(str(build(tmp_path_factory.mktemp("emulator"), ["kernels.cpp"]))))


@pytest.fixture(scope="session")
def wrong_kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Kernels with mistakes, that the emulator has to find."""
    return ctypes.CDLL(str(build(tmp_path_factory.mktemp("wrong"), ["wrong_kernels.cpp"])))


@pytest.fixture(scope="session")
def wrong_sweep(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The threshold sweep, with a barrier left out at a line of choice."""
    return ctypes.CDLL(str(build(tmp_path_factory.mktemp("wrong_sweep"), ["wrong_sweep.cpp"])))


@pytest.fixture(scope="session")
def wrong_refine(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Refinement with a barrier left out or an order lost, at a line of choice."""
    return ctypes.CDLL(str(build(tmp_path_factory.mktemp("wrong_refine"), ["wrong_refine.cpp"])))


@pytest.fixture(scope="session")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The operators' stable-ABI functions over the emulated kernels."""
    torch_folder = Path(torch.__file__).parent
    headers = [torch_folder / "include", sysconfig.get_path("include")]
    flags = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY", "-DUSE_CUDA"]
    flags += [f"-isystem{folder}" for folder in headers]
    flags += [f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch", "-ltorch_cpu"]
    return build(tmp_path_factory.mktemp("glue"), ["glue.cpp"], flags)


@pytest.fixture(scope="session")
def emulated_ops(glue: Path) -> object:
    """The same, for CPU tensors."""
    torch.ops.load_library(glue)
    return torch.ops.molt_emulated


@pytest.fixture
def pretend(glue: Path) -> Iterator[Callable[[int, bool], None]]:
    """Let the device refuse every launch with an error, or say that a CUDA graph is captured."""
    call = ctypes.CDLL(str(glue)).pretend
    call.argtypes = [ctypes.c_int, ctypes.c_bool]
    yield call
    call(0, False)
