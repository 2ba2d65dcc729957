"""Runs cases: the gate, the clock, the ratios; and what is asked of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from molt.benchmark import gate, timing
from molt.benchmark.machine import TIME_IS_OVER, about, is_left
from molt.benchmark.registry import Case, Inputs, NotRun, Operation, Provider, first_line
from molt.benchmark.targets import add_missed

SCHEMA = 1
SEED, GATE_SEED = 1, 2
PIECE = 2**31  # bytes that the copy or fill beside an operation works on at once


class _NoTruth(Exception):
    """Nothing to compare with."""


def run_case(
    operation: Operation, case: Case, *, providers: Iterable[str] | None = None, seconds: float = 1.0
) -> list[dict[str, Any]]:
    """Check every provider on a case, then time those that are right, in turns.

    Args:
        operation: what to run.
        case: one of its cases.
        providers: names of those to run; all by default.
        seconds: of timing for each provider.

    Returns:
        One row a provider and one for the limit, see `report`.
    """
    device = torch.device(case.device)
    wanted = None if providers is None else set(providers)
    chosen = [provider for provider in operation.providers if wanted is None or provider.name in wanted]
    rows = {provider.name: _row(operation, case, provider.name, provider.kind) for provider in chosen}
    try:
        calls = _pass_gate(operation, case, chosen, rows)
        timing.release(device)
        _time(operation, case, calls, rows, seconds)
    except torch.OutOfMemoryError as error:
        _say_all(rows, f"out of memory: {first_line(error)}")
    except NotRun as error:
        _say_all(rows, str(error))
    except _NoTruth as error:
        for row in rows.values():
            row["match"], row["note"] = False, str(error)
    timing.release(device)
    add_missed(rows.values())
    return list(rows.values())


def _say_all(rows: dict[str, dict[str, Any]], note: str) -> None:
    for row in rows.values():
        if row["note"] is None and row["median_ms"] is None and row["match"] is not False:
            row["note"] = f"not run: {note}"


def _row(operation: Operation, case: Case, provider: str, kind: str) -> dict[str, Any]:
    return {
        "operation": operation.name,
        "case": case.name,
        "headline": case.headline,
        "provider": provider,
        "kind": kind,
        "match": None,
        "max_error": None,
        "note": None,
        "median_ms": None,
        "p20_ms": None,
        "p80_ms": None,
        "runs": 0,
        "bytes": None,
        "GBps": None,
        "share": None,
        "speedup_reference": None,
        "speedup_peer": None,
        "speedup_compiled": None,
        "images_per_s": None,
        "fill_ms": None,
        "launch_ms": None,
        "launch_ratio": None,
        "extra_bytes": None,
        "targets": dict(case.targets) if kind == "native" else {},
        "missed": [],
    }


def _raises(error: Exception) -> str:
    return f"raises {type(error).__name__}: {first_line(error)}"


def _inputs(operation: Operation, case: Case, seed: int) -> Inputs:
    generator = torch.Generator(case.device).manual_seed(seed)
    return operation.make(case, generator)


def _gradient(operation: Operation, case: Case, inputs: Inputs) -> torch.Tensor:
    assert operation.shape is not None, f"{operation.name} has a case with backward, but no shape"
    generator = torch.Generator(case.device).manual_seed(SEED)
    return torch.randn(operation.shape(inputs), generator=generator, device=case.device)


def find_truth(operation: Operation, case: Case, inputs: Inputs) -> Any:
    """Return what results on these inputs are compared with."""
    (reference,) = (provider for provider in operation.providers if provider.kind == "reference")
    run = operation.truth or reference.load()
    if case.backward:
        run = gate.with_backward(run, _gradient(operation, case, inputs))
    wide = gate.upcast(inputs)
    with torch.no_grad():
        return run(*wide.args, **wide.kwargs)


def _bind(provider: Provider, run: Callable[..., Any], case: Case, gradient: torch.Tensor | None) -> Callable[..., Any]:
    """Return the function as it is timed."""
    if provider.kind == "compiled":
        torch._dynamo.reset()
        run = torch.compile(run, dynamic=False)
    return gate.with_backward(run, gradient) if case.backward and gradient is not None else run


def _arguments(provider: Provider, inputs: Inputs) -> Inputs:
    return gate.changed(inputs, lambda tensor: tensor.numpy()) if provider.numpy else inputs


def _pass_gate(
    operation: Operation, case: Case, chosen: list[Provider], rows: dict[str, dict[str, Any]]
) -> dict[str, tuple[Provider, Callable[..., Any]]]:
    """Compare every provider with the truth; return those that are right, and write into the rows what is not."""
    inputs = _inputs(operation, case, GATE_SEED)
    try:
        truth = find_truth(operation, case, inputs)
    except (NotRun, torch.OutOfMemoryError):
        raise
    except Exception as reason:
        text = f"no truth: the float64 reference raises {type(reason).__name__}: {first_line(reason)}"
        raise _NoTruth(text) from reason
    gradient = _gradient(operation, case, inputs) if case.backward else None
    calls = {}
    for provider in chosen:
        row = rows[provider.name]
        try:
            call = _bind(provider, provider.resolve(case), case, gradient)
            arguments = _arguments(provider, inputs)
            with torch.no_grad():
                result = call(*arguments.args, **arguments.kwargs)
            error = gate.check(operation, result, truth, inputs, backward=case.backward)
        except (NotRun, torch.OutOfMemoryError) as reason:
            row["note"] = f"not run: {first_line(reason)}"
        except Exception as reason:  # whatever a provider raises must not end the others' run
            if provider.kind == "compiled":
                row["note"] = f"not run: torch.compile: {type(reason).__name__}: {first_line(reason)}"
            else:
                row["match"] = False
                row["note"] = _raises(reason)
        else:
            row["match"] = error <= operation.tolerance[case.dtype]
            row["max_error"] = error if math.isfinite(error) else None
            if row["match"]:
                calls[provider.name] = provider, call
            else:
                row["note"] = f"does not match: {error:.3g}"
            del result
    return calls


def _time(
    operation: Operation,
    case: Case,
    calls: dict[str, tuple[Provider, Callable[..., Any]]],
    rows: dict[str, dict[str, Any]],
    seconds: float,
) -> None:
    """Time the calls and the limit, and fill in their rows."""
    device = torch.device(case.device)
    clock = timing.make_clock(device)
    first = _inputs(operation, case, SEED)
    moved = operation.moved(first) * (2 if case.backward else 1)
    # A cache holds small inputs from one run to the next; users' inputs are new.
    copies = clock.copies(moved)
    sets = [first, *(_inputs(operation, case, SEED + 10 * copy) for copy in range(1, copies))]

    def bound(provider: Provider, call: Callable[..., Any]) -> timing.Run:
        arguments = [_arguments(provider, inputs) for inputs in sets]

        def run(turn: int) -> Any:
            mine = arguments[turn % copies]
            return call(*mine.args, **mine.kwargs)

        return run

    runs = {name: bound(provider, call) for name, (provider, call) in calls.items()}
    runs[operation.limit] = _limit(operation.limit, moved, copies, device)
    beside = {"fill_ms": "fill", "launch_ms": "launch"} if "launch_ratio" in case.targets else {}
    if beside:
        runs |= {"fill": _limit("fill", moved, copies, device), "launch": _limit("fill", 1, 1, device)}

    def refuse(name: str, error: Exception) -> None:
        if name not in calls:
            raise error
        del calls[name]
        refused = isinstance(error, NotRun | torch.OutOfMemoryError)
        rows[name]["note"] = f"not run: {first_line(error)}" if refused else _raises(error)
        rows[name]["match"] = rows[name]["match"] if refused else False

    with torch.no_grad():
        taken = timing.measure(runs, clock, seconds, refuse)
    rows[operation.limit] = _row(operation, case, operation.limit, "limit")
    found = {column: timing.quantile(taken[name], 0.5) for column, name in beside.items()}
    for name in (*calls, operation.limit):
        times = taken[name]
        median = timing.quantile(times, 0.5)
        rows[name] |= found | {
            "median_ms": median,
            "images_per_s": 1000 * case.images / median,
            "launch_ratio": median / sum(found.values()) if found else None,
            "p20_ms": timing.quantile(times, 0.2),
            "p80_ms": timing.quantile(times, 0.8),
            "runs": len(times),
            "bytes": moved,
            "GBps": moved / median / 1e6,
        }
    add_ratios(rows, operation.limit)
    with torch.no_grad():
        for name, (provider, _) in calls.items():
            if device.type == "cuda" or provider.kind in ("reference", "native"):
                rows[name]["extra_bytes"] = timing.extra_bytes(lambda run=runs[name]: run(0), device)  # type: ignore[misc]


def _limit(kind: str, moved: int, copies: int, device: torch.device) -> timing.Run:
    """copy_ that reads and writes as many bytes together, or fill_ that writes as many; large numbers in pieces.

    What is read rotates, as the operators' inputs do.
    """
    pieces = max(1, math.ceil(moved / PIECE))
    size = moved // pieces

    def fill(turn: int) -> None:
        for _ in range(pieces):
            target.fill_(turn % 2)

    def copy(turn: int) -> None:
        for _ in range(pieces):
            target.copy_(sources[turn % copies])

    target = torch.zeros(size if kind == "fill" else size // 2, dtype=torch.uint8, device=device)
    sources = [torch.ones_like(target) for _ in range(copies if kind == "copy" else 0)]
    return fill if kind == "fill" else copy


def add_ratios(rows: Mapping[str, dict[str, Any]], limit: str) -> None:
    """Fill in share and speedups: over the reference, the reference compiled, and the fastest peer."""

    def median(kind: str) -> float | None:
        found = [row["median_ms"] for row in rows.values() if row["kind"] == kind and row["median_ms"] is not None]
        return min(found, default=None)

    kinds = {"speedup_reference": "reference", "speedup_peer": "peer", "speedup_compiled": "compiled"}
    others = {column: median(kind) for column, kind in kinds.items()}
    least = rows[limit]["median_ms"]
    for row in rows.values():
        mine = row["median_ms"]
        if mine is None or row["kind"] == "limit":
            continue
        row["share"] = least / mine
        row |= {column: None if other is None else other / mine for column, other in others.items()}


def run_all(
    operations: Iterable[Operation],
    device: str,
    *,
    providers: Iterable[str] | None = None,
    quick: bool = False,
    targets: bool = False,
    rehearse: bool = False,
    minutes: float | None = None,
    seconds: float | None = None,
    earlier: Iterable[dict[str, Any]] = (),
    begin: Callable[[str], None] = lambda text: None,
) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of case after case: those with targets first, then headline cases.

    Args:
        operations: what to run.
        device: ``"cpu"`` or ``"cuda"``.
        providers: names of those to run; all by default.
        quick: headline cases only.
        targets: only cases of which something is asked.
        rehearse: a GPU's cases on the CPU with an image or two, where times mean nothing.
        minutes: after so many no further case is begun; the rest is rows "not run".
        seconds: of timing a provider and case; a fifth to one by default.
        earlier: rows of another run, yielded in place of a case that they have all rows of.
        begin: called with what is run next.
    """
    end = math.inf if minutes is None else time.monotonic() + 60 * minutes
    budget = seconds if seconds is not None else 0.0 if rehearse else 0.2 if quick or device == "cuda" else 1.0
    work = [
        (operation, case)
        for operation in operations
        for case in (
            operation.rehearsed(targets=targets)
            if rehearse
            else operation.cases_on(device, quick=quick, targets=targets)
        )
    ]
    work.sort(key=lambda item: (not item[1].targets, not item[1].headline))
    kept = None if providers is None else set(providers)
    done: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in earlier:
        done.setdefault((row["operation"], row["case"]), []).append(row)
    for number, (operation, case) in enumerate(work, 1):
        before = done.get((operation.name, case.name), [])
        wanted = {p.name for p in operation.providers if not kept or p.name in kept}
        if before and wanted <= {row["provider"] for row in before} and not any(map(is_left, before)):
            yield before
            continue
        begin(f"{number} of {len(work)}: {operation.name}, {case.name}")
        if time.monotonic() < end:
            yield run_case(operation, case, providers=kept, seconds=budget)
            continue
        rows = {p.name: _row(operation, case, p.name, p.kind) for p in operation.providers if p.name in wanted}
        for row in rows.values():
            row["note"] = TIME_IS_OVER.format(minutes)
        add_missed(rows.values())
        yield list(rows.values())


def failed(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the rows whose provider raised or gave a wrong result."""
    return [row for row in rows if row["match"] is False]


def report(
    rows: list[dict[str, Any]], device: str, *, quick: bool, seconds_total: float, rehearsal: bool = False
) -> dict[str, Any]:
    """Return what is written as JSON.

    Each row has operation, case, headline, provider, kind, match (None where nothing was compared), max_error (None
    where not finite), note, median_ms, p20_ms, p80_ms, runs, bytes (that must move at least once), GBps (bytes over
    the median), share (the limit's time over this), speedup_reference, speedup_peer (times faster than the fastest
    peer; below 1 slower), speedup_compiled, images_per_s, extra_bytes (peak memory of a call beyond its result),
    targets (column: what is asked of it) and missed (those not reached). Times are None where nothing ran. Where
    launching is most of the time, launch_ratio is the median over fill_ms (`fill_` of those bytes) and launch_ms
    (`fill_` of one byte, timed the same way) together. rehearsal says that images were fewer and times mean nothing.
    """
    return about(device, SCHEMA) | {
        "rehearsal": rehearsal,
        "quick": quick,
        "seconds_total": round(seconds_total, 1),
        "rows": rows,
    }
