"""Timing that is not fooled: warm-up by time, variants interleaved, medians with their spread.

A *sampler* is a function that runs its work once and returns the milliseconds one run took: ``events`` makes one
for kernels, ``wall`` one for calls that wait for the GPU themselves. ``interleaved`` runs a set of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

Sampler = Callable[[], float]
NOT_READY = 600  # cudaErrorNotReady


@dataclass(frozen=True)
class Timing:
    """The times of one variant: median, spread and how many samples they come from."""

    ms: float
    spread_percent: float  # half the interquartile range, in per cent of the median
    num_samples: int


def summary(samples_ms: list[float]) -> Timing:
    """Return the median of ``samples_ms`` and half their interquartile range in per cent of it.

    >>> summary([1.0, 1.0, 1.2, 1.4, 9.0])
    Timing(ms=1.2, spread_percent=16.7, num_samples=5)
    """
    if len(samples_ms) < 2:
        raise ValueError(f"a spread needs at least 2 samples, got {len(samples_ms)}")
    low, median, high = statistics.quantiles(samples_ms, n=4, method="inclusive")
    return Timing(median, round(50 * (high - low) / median, 1), len(samples_ms))


def interleaved(
    samplers: dict[str, Sampler], seconds: float, *, warmup_seconds: float = 0.1, clock=time.perf_counter
) -> dict[str, Timing]:
    """Run the samplers in turns and return a Timing for each.

    Turns, because clocks and neighbours drift: a variant timed later must not look better for it.

    Args:
        seconds: how long the measured turns go on, all samplers together; at least 5 turns are taken.
        warmup_seconds: how long turns go on before that, uncounted; at least one.
    """
    _turns(samplers, warmup_seconds, 1, clock)
    return {name: summary(times) for name, times in _turns(samplers, seconds, 5, clock).items()}


def _turns(samplers, seconds, num_turns, clock) -> dict[str, list[float]]:
    times = {name: [] for name in samplers}
    end = clock() + seconds
    while num_turns > 0 or clock() < end:
        for name, sampler in samplers.items():
            times[name].append(sampler())
        num_turns -= 1
    return times


def reached(event) -> bool:
    """Return whether the GPU has come to ``event``; waits for nothing.

    Raises:
        CUDARuntimeError: the device failed. Who only asked whether it is done would wait for ever.
    """
    from cupy.cuda import runtime

    status = runtime.eventQuery(event.ptr)
    if status not in (0, NOT_READY):
        raise runtime.CUDARuntimeError(status)
    return status == 0


def wall(run: Callable[[], object]) -> Sampler:
    """Return a sampler of the wall-clock time of ``run()`` and of what it left on the device: the whole call."""
    import cupy

    def sample() -> float:
        cupy.cuda.Device().synchronize()
        start = time.perf_counter()
        run()
        cupy.cuda.Device().synchronize()
        return 1e3 * (time.perf_counter() - start)

    return sample


def events(run: Callable[[int], object], num_runs: int) -> Sampler:
    """Return a sampler of the GPU time of one of ``run(0)`` ... ``run(num_runs - 1)``, their mean.

    The runs are captured in one CUDA graph, so the host's launch time does not count, and each sample replays
    it twice and times the second replay: the first keeps the GPU busy until the second is queued.

    Args:
        run: enqueues its work on the current stream; neither allocates nor waits. It is called once
            uncaptured (kernels are compiled then). Give each i its own buffers if one set would fit in
            the L2 cache: data is cold when the sets together are much larger than it.
    """
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    cupy.cuda.Device().synchronize()  # what prepared the buffers ran on another stream
    with stream:
        run(0)
        stream.synchronize()
        stream.begin_capture()
        try:
            for i in range(num_runs):
                run(i)
        finally:
            graph = stream.end_capture()

    def sample() -> float:
        graph.launch(stream)
        start.record(stream)
        graph.launch(stream)
        end.record(stream)
        end.synchronize()
        return cupy.cuda.get_elapsed_time(start, end) / num_runs

    sample.run = run  # keeps its buffers alive: the graph knows only their addresses
    return sample
