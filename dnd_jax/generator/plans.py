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
    """The plans of the newest checkpoint of a training in `directory`, where the method and the
    shapes are still its; else those that process 0 chooses, by the rates that its machine has
    learned, or measures. Raises InputError for a record that says something else, and as `choose`
    and `tune`."""
    c = config.train
    problems = device_problems(spec, mesh, c.batch_size, c.micro_batches)
    said = {}
    with hosts.lead_first():  # who may measure for a while
        if hosts.lead():
            plans = _recorded(problems, spec.convolution, directory, c.checkpoint_dir)
            new = {name: problem for name, problem in problems.items() if name not in plans}
            if new and spec.convolution == "tuned":
                tune(new.values())
            rates = learned(mesh.devices.flat[0].platform) if spec.convolution == "auto" else None
            plans |= {name: choose(p, spec.convolution, rates) for name, p in new.items()}
            by = "as before" if not new else "by rates learned here" if rates else ""
            every = {name: to_json(problem, plans[name]) for name, problem in problems.items()}
            said = {"method": spec.convolution, "plans": every, "by": by}
    said = json.loads(hosts.text_of_lead(json.dumps(said)))
    by = said.pop("by")
    plans = {
        name: from_json(problem, said["plans"][name], NOTE) for name, problem in problems.items()
    }
    chosen = tuple(dict((problems[name], plan) for name, plan in plans.items()).items())
    line = f"{describe(plans.values())}{f', {by}' if by else ''}"
    return Planned(dataclasses.replace(spec, chosen=chosen), said, line)


def _recorded(
    problems: Mapping[str, Problem], method: str, directory: pathlib.Path, checkpoint_dir: str
) -> dict[str, ConvPlan]:
    """The plans that the newest checkpoint's record has of these convolutions. Records of earlier
    versions have none."""
    note, where = newest_record(directory, checkpoint_dir).get(NOTE), f"the record of {directory}"
    if note is None:
        return {}
    if not isinstance(note, Mapping) or not isinstance(note.get("plans"), Mapping):
        raise InputError(f"{where}: {NOTE} is not what dnd writes; use another --workdir")
    if note.get("method") != method:
        return {}
    found = {
        name: from_json(problem, note["plans"][name], f"{where}, {NOTE}.{name}")
        for name, problem in problems.items()
        if name in note["plans"]
    }
    return {name: plan for name, plan in found.items() if plan is not None}
