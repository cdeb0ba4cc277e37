"""How each convolution of a training is computed: the same in all its processes, and after a resume
as before it, on whatever machine."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping

import jax

from dnd_jax.config.schema import Config
from dnd_jax.core.errors import InputError
from dnd_jax.generator.spec import DecoderSpec
from dnd_jax.generator.step import device_problems
from dnd_jax.loop.checkpoints import newest_record
from dnd_jax.ops.choice import choose, describe, from_json, to_json
from dnd_jax.ops.cost_model import ConvPlan, Problem
from dnd_jax.ops.rates import learned
from dnd_jax.ops.tune import tune
from dnd_jax.parallel import hosts

NOTE = "convolutions"  # of a checkpoint's record


@dataclasses.dataclass(frozen=True)
class Planned:
    """A spec with its plans, what a record says of them, and a line about them."""

    spec: DecoderSpec
    note: Mapping
    line: str


def planned(
    spec: DecoderSpec, mesh: jax.sharding.Mesh, config: Config, directory: pathlib.Path
) -> Planned:
    """The plans of the newest readable checkpoint of a training in `directory`, where the method
    and the shapes are still its; else those that process 0 chooses, by the rates that its machine
    has learned, or measures. Other convolutions than a training step's are then chosen by the
    shipped rates, in all processes alike. Raises InputError for a record that says something else,
    and as `choose` and `tune`."""
    c = config.train
    problems = device_problems(spec, mesh, c.batch_size, c.micro_batches)
    of_lead = "{}"
    with hosts.lead_first():  # who may measure for a while
        if hosts.lead():
            old = _recorded(problems, spec.convolution, directory, c.checkpoint_dir)
            new = {name: problem for name, problem in problems.items() if name not in old}
            plans, by = _chosen(new, spec.convolution)
            plans |= old
            note = {name: to_json(problem, plans[name]) for name, problem in problems.items()}
            of_lead = json.dumps([note, by if not old else "as before" if not new else ""])
    note, by = json.loads(hosts.text_of_lead(of_lead))
    plans = {name: from_json(problem, note[name], NOTE) for name, problem in problems.items()}
    return Planned(
        dataclasses.replace(
            spec,
            chosen=tuple({problems[name]: plan for name, plan in plans.items()}.items()),
            convolution="auto" if spec.convolution == "tuned" else spec.convolution,
        ),
        {"method": spec.convolution, "plans": note},
        ", ".join(part for part in (describe(plans.values()), by) if part),
    )


def _chosen(problems: Mapping[str, Problem], method: str) -> tuple[dict[str, ConvPlan], str]:
    """(the plans of these convolutions, by what they were chosen where that is to be said)."""
    if method == "tuned":
        tune(problems.values())
    platforms = {problem.platform for problem in problems.values()}
    rates = learned(*platforms) if len(platforms) == 1 and method in ("auto", "dft") else None
    plans = {name: choose(problem, method, rates) for name, problem in problems.items()}
    return plans, "by rates learned here" if rates else ""


def _recorded(
    problems: Mapping[str, Problem], method: str, directory: pathlib.Path, checkpoint_dir: str
) -> dict[str, ConvPlan]:
    """The plans that the newest checkpoint's record has of these convolutions. Records of earlier
    versions have none."""
    checkpoint, record = newest_record(directory, checkpoint_dir)
    where, note = f"{checkpoint}/record, {NOTE}", record.get(NOTE)
    if note is None:
        return {}
    if not isinstance(note, Mapping) or not isinstance(note.get("plans"), Mapping):
        raise InputError(f"{where}: is not what dnd writes; move that checkpoint away")
    if note.get("method") != method:
        return {}
    found = {
        name: from_json(problem, note["plans"][name], f"{where}.{name}")
        for name, problem in problems.items()
        if name in note["plans"]
    }
    return {name: plan for name, plan in found.items() if plan is not None}
