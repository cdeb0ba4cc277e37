"""What one measurement is: the shapes of a case, from a configuration alone."""

import dataclasses
import pathlib
import re
import resource
import time
from collections.abc import Callable

import jax

from dnd_jax.config import load, schema, studies, validate
from dnd_jax.generator.sizes import spec_of
from dnd_jax.generator.spec import DecoderSpec

# How many times the forward operations each takes, by the direct method.
PASSES = {"forward": 1, "gradient": 3, "train": 3, "generate": 1}
# How a step of "collect" is taken: as `dnd collect` does; a task at a time; without what all rows
# begin with computed once; so, and each row padded to the longest; each layer computed anew.
COLLECTING = ("together", "one by one", "whole rows", "padded", "recomputed")
# How one of "answers" is: as `dnd train` does; a task at a time; without what all rows begin with
# computed once; each layer computed anew.
ANSWERING = ("together", "one by one", "whole rows", "recomputed")
TORCH_ANSWERING = ("together", "one by one", "compiled")
# {what: (our variants, PyTorch's)} of those that are no choice of convolutions.
STEPS_THROUGH_BASE = {
    "collect": (COLLECTING, ("peft",)),
    "answers": (ANSWERING, TORCH_ANSWERING),
}
LONG_ENOUGH = 60.0  # seconds in one process, after which no further repeat is started


@dataclasses.dataclass(frozen=True)
class Case:
    """One row group of a benchmark.

    what: "forward" (decoder), "gradient" (forward and backward of the loss), "train" (the real
    train step, optimiser included), "generate" (prompt ids -> adapter tensors), "collect" (a step
    of the LoRAs of `batch` tasks) or "answers" (the real train step through the base, of `batch`
    generated LoRAs). stages: first and last, None for all. batch 0: the largest that every variant
    fits.
    """

    name: str
    config: str  # a settings file, or the name of a shipped one
    what: str
    batch: int
    dtype: str
    stages: tuple[int, int] | None = None

    def load(self) -> schema.Config:
        """The configuration with this case's batch and dtype."""
        raw = load.load_file(self.config)
        raw.train.update(batch_size=max(self.batch, 1), dtype=self.dtype)
        return validate.freeze(raw)

    def spec(self, config: schema.Config) -> DecoderSpec:
        """The whole generator, or a decoder of the measured stages alone."""
        whole = dataclasses.replace(spec_of(config), remat="none")
        if self.stages is None:
            return whole
        first, last = self.stages
        features = whole.features[first : last + 1]
        return dataclasses.replace(whole, features=features, length_projection="", text_length=0)

    def variants(self, bench: studies.Bench) -> list[tuple[str, str]]:
        """(side, how) of all that is measured of this case."""
        if self.what in STEPS_THROUGH_BASE:
            ours, theirs = STEPS_THROUGH_BASE[self.what]
            theirs = theirs if bench.torch else ()
            return [("jax", how) for how in ours] + [("torch", how) for how in theirs]
        return [("jax", m) for m in bench.methods] + [("torch", v) for v in bench.torch]

    def flop(self, config: schema.Config) -> int | None:
        """Operations by the direct method; None of what is a base's for the most part."""
        if self.what in STEPS_THROUGH_BASE:
            return None
        return 2 * self.spec(config).forward_macs * max(self.batch, 1) * PASSES[self.what]


def peak_of_process() -> int:
    """The most bytes that this process has held, libraries included."""
    # Unlike ru_maxrss, this does not begin with the parent's.
    status = pathlib.Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.is_file() else None
    return (
        int(found[1]) * 1024 if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )


def peak_memory() -> tuple[int, str]:
    """(bytes, whose) held at most so far: on the device where it counts them, else by this process,
    libraries included."""
    counted = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    if counted:
        return counted, "device"
    return peak_of_process(), "process"


def timed(run: Callable[[], object], repeats: int) -> dict:
    """{"seconds" of so many runs, "compile_seconds"} of what `run` does and waits for; the first
    run, which warms up, is not among them."""
    seconds = []
    while len(seconds) <= repeats and (len(seconds) < 2 or sum(seconds) < LONG_ENOUGH):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return {"seconds": seconds[1:], "compile_seconds": max(0.0, seconds[0] - min(seconds[1:]))}
