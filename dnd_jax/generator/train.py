"""Stage `train`: the generator, from prompts and LoRA checkpoints (docs/METHOD.md sections 1, 4 and
6), or from prompts and answers through the base (section 9).

    dnd train --config=configs/mini.py --workdir=runs/mini

WORKDIR/generator holds all that generation needs: generator.json (settings, layout, adapter),
model.safetensors (parameters), statistics.safetensors (target statistics, importance weights),
beside checkpoints/ for an exact resume.
"""

import collections
import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from flax import traverse_util

from dnd_jax.base.found import find_base
from dnd_jax.base.hub import keep_revision, kept_revision
from dnd_jax.base.identity import base_digest
from dnd_jax.base.reading import check_given, check_reading
from dnd_jax.config.records import Older
from dnd_jax.config.schema import Config
from dnd_jax.core import workdir as paths
from dnd_jax.core.chips import chip_of
from dnd_jax.core.errors import InputError
from dnd_jax.core.stage import Given
from dnd_jax.data.opened import open_suite
from dnd_jax.data.suite import Suite
from dnd_jax.encoders.cache import PromptEncoder
from dnd_jax.generator.folder import TASK_MEANS, initial_params, write_generator
from dnd_jax.generator.held_in import held_in
from dnd_jax.generator.inputs import kept_checkpoints
from dnd_jax.generator.nearest import trained_tasks
from dnd_jax.generator.objective import Objective, source_of, taught_by
from dnd_jax.generator.pairs import PairedDataset, Pairs, paired_datasets
from dnd_jax.generator.plans import NOTE, Planned, planned
from dnd_jax.generator.record import is_finished, older_values, settings_of
from dnd_jax.generator.regularisers import tuned_sizes
from dnd_jax.generator.sizes import resolve_features
from dnd_jax.generator.spec import DecoderSpec
from dnd_jax.generator.step import (
    ShardedStep,
    check_batch,
    shard_train_step,
    state_of,
)
from dnd_jax.loop.checkpoints import check_newest
from dnd_jax.loop.optimizers import train_optimizer
from dnd_jax.loop.run import run_loop
from dnd_jax.loop.training import ALSO_SETTINGS, Options, Training
from dnd_jax.parallel import hosts, together
from dnd_jax.parallel.mesh import describe_mesh, make_mesh, mesh_record, own_mesh
from dnd_jax.parallel.rules import bytes_per_device, shaped


def first_state(config: Config, sharded: ShardedStep) -> dict:
    """The state that training starts from: new parameters, or those of config.train.init_from with
    a new optimiser.

    Raises InputError as `initial_params`.
    """
    if not config.train.init_from:
        return sharded.init(jax.random.fold_in(jax.random.key(config.seed), 2))
    of = sharded.shapes["params"], sharded.shardings["params"]
    params = initial_params(config.train.init_from, *of, dataclasses.asdict(config.generator))
    if hosts.lead():
        print(f"starting from the parameters of {config.train.init_from}", flush=True)
    optimizer = train_optimizer(config.train)
    state = functools.partial(state_of, optimizer=optimizer, config=config.train)
    return jax.jit(state, out_shardings=sharded.shardings)(params)


def train(
    config: Config,
    suite: Suite,
    workdir: pathlib.Path,
    allowed: Sequence[str] | None = (),
    profile: tuple[int, int] | None = None,
    base_name: str = "",
) -> pathlib.Path:
    """Trains the generator on the suite's training datasets and returns WORKDIR/generator; a
    finished one is kept.

    allowed: names of settings that may differ from those of the run that is resumed, None where the
    user cannot give any. profile: steps between which to trace. base_name: what generated adapters
    call their base; empty: as the checkpoints' settings, or the base's hub id or path. Several
    processes share the work; process 0 writes. Raises InputError for checkpoints that do not fit,
    few prompts, or other settings.
    """
    folder, c = workdir / "generator", config.train
    suite = suite.with_training(c.datasets, config.seed)
    if hosts.agreed(is_finished(folder, config, suite, workdir, allowed, base_name)):
        return folder

    # Checks, before anything long begins.
    mesh = make_mesh(config.mesh)
    check_batch(config, mesh)
    source = source_of(config, suite, workdir, base_name)
    older = older_values(config, source)
    taught = taught_by(config, source, workdir)
    record = {**settings_of(config, suite), **taught}
    of_files = {"the LoRA checkpoints": taught["checkpoints"]} if "checkpoints" in taught else {}
    if c.asks_base and hosts.several():
        of_base = taught.get("base") or base_digest(find_base(config, workdir))
        of_files["the base's files"] = of_base
    hosts.check_alike({"the suite's files": suite.fingerprint, **of_files})
    check_newest(folder, c.checkpoint_dir, record, allowed, older)

    # Pairs of prompts with tokens, or with questions for the base.
    if c.asks_base:
        with hosts.lead_first():
            check_reading(config, find_base(config, workdir))
    objective = Objective(config, source, workdir, base_name)
    with hosts.lead_first():  # who finds its files made by process 0 where the workdir is shared
        check_given(config)
        encoder = _open_encoder(config, workdir, mesh)
        target = objective.target()
    hosts.check_alike({"the text encoder's files": encoder.fingerprint})
    datasets, importance = paired_datasets(config, suite, workdir, encoder, objective, target)
    tasks = trained_tasks(config, suite, encoder, workdir / paths.EMBEDDINGS)
    record["encoder"] = encoder.fingerprint
    of_encoder = {"encoder_fingerprint": encoder.fingerprint, "encoder_revision": encoder.revision}
    drawn = config.condition.num_prompts, config.seed, c.pairing, c.few_prompts, c.wordings
    taught_by_step = c.taught_at, c.of_loras
    kept = kept_checkpoints(c, [d.targets for d in datasets], mesh)
    pairs = Pairs(datasets, c.batch_size, *drawn, *objective.asked, *taught_by_step, bool(kept))

    # The step.
    n, length = config.condition.num_prompts, config.condition.max_text_length
    features = resolve_features(config.generator, (n, length, encoder.width), target.shape)
    spec = DecoderSpec.of(
        config.generator, config.condition, c.dtype, c.remat, features, c.precision
    )
    how = planned(spec, mesh, config, folder)
    in_graph = (encoder.module, encoder.params) if config.condition.in_graph else None
    answering = objective.answering(target, check_batch(config, mesh))
    beside = tuned_sizes(target, (d.targets[-1] for d in datasets)) if c.size_weight else {}
    given = in_graph, answering, beside, bool(kept)
    sharded = shard_train_step(config, how.spec, mesh, importance, *given)
    frozen = {**(answering[1] if answering else {}), **beside, **kept}
    if in_graph:
        frozen["encoder"] = encoder.params
    frozen = jax.device_put(frozen, sharded.frozen or {})
    asked = held_in(config, suite.train, datasets, objective, target, sharded, frozen)
    del encoder, in_graph  # its parameters need not stay on the first device

    # Training.
    print(_announcement(mesh, how, sharded, datasets, c.answer_rows), flush=True)
    # Of a step of the decoder alone: twice as many backward as forward.
    flop = 0 if answering else 6 * spec.forward_macs * c.batch_size

    def score_at(done):  # also after the first step, to fail early where there is no room
        due = asked and (done % c.validate_every == 0 or done in (1, c.steps))
        return asked.score if due else None

    training = Training(
        "train",
        folder,
        record,
        shaped(sharded.shapes, sharded.shardings),
        init=lambda: first_state(config, sharded),
        step=lambda state, batch: sharded.step(state, batch, frozen or None),
        batch_at=lambda i: pairs.placed(i, sharded.over_batch),
        steps=c.steps,
        save_every=c.save_every,
        save_every_seconds=c.save_every_seconds,
        score_at=score_at,
        blame=lambda i: f", with pairs of {', '.join(sorted(set(pairs.names(i))))}",
        row_of=lambda done, values, seconds: _row(
            values, pairs.names(done - 1), seconds, flop, mesh
        ),
    )
    state = run_loop(training, _options(config, mesh, allowed, older, profile, {NOTE: how.note}))

    # The folder that generation reads.
    description = {
        "settings": settings_of(config, suite),
        **taught,
        "features": features,
        "layout": source.layout.to_json(),
        "adapter": source.adapter.to_json(),
        **of_encoder,
        "tasks": tasks.to_json(),
    }
    statistics = {"importance": importance, TASK_MEANS: tasks.means, **target.statistics()}
    _write(folder, state.get("average", state["params"]), statistics, description)
    return folder


def _open_encoder(config: Config, workdir: pathlib.Path, mesh: jax.sharding.Mesh) -> PromptEncoder:
    """The text encoder, of the revision that this run took first, on this process' devices."""
    name = config.condition.encoder
    own = None if hosts.several() and config.condition.in_graph else own_mesh(mesh)
    encoder = PromptEncoder(config.condition, own, kept_revision(name, workdir))
    if hosts.lead():
        keep_revision(name, encoder.revision, workdir)
    return encoder


def _announcement(
    mesh: jax.sharding.Mesh,
    how: Planned,
    sharded: ShardedStep,
    datasets: Sequence[PairedDataset],
    answer_rows: int,
) -> str:
    """What is trained, where and how it is computed; of the other processes only where."""
    if not hosts.lead():
        me, count = jax.process_index(), jax.process_count()
        return f"process {me} of {count}: mesh {describe_mesh(mesh)}"
    count = sum(x.size for x in jax.tree.leaves(sharded.shapes["params"]))
    total, held = bytes_per_device(sharded.shapes, sharded.shardings)
    spec = how.spec
    targets, asked = datasets[0].targets, datasets[0].questions
    of_each = "" if targets is None else f" x {len(targets)} checkpoints"
    of_each += "" if asked is None else f", {answer_rows} questions of each asked"
    return (
        f"generator: {count / 1e6:.1f}M parameters, {2 * spec.forward_macs / 1e9:.2f} GFLOP a "
        f"sample forward, {spec.token_grid} tokens, {len(datasets)} datasets{of_each}\n"
        f"mesh: {describe_mesh(mesh)}; state {total / 1e9:.3g} GB, {held / 1e9:.3g} GB a device\n"
        f"convolutions (output / gradients): {how.line}"
    )


def _options(
    config: Config,
    mesh: jax.sharding.Mesh,
    allowed: Sequence[str] | None,
    older: Older,
    profile: tuple[int, int] | None,
    notes: Mapping,
) -> Options:
    c = config.train
    return Options(
        **{name: getattr(c, name) for name in ALSO_SETTINGS},
        allowed=allowed if allowed is None else tuple(allowed),
        older=older,
        profile=profile,
        notes={"config": config.to_json(), "mesh": mesh_record(mesh), **notes},
    )


def _write(
    folder: pathlib.Path, params: Mapping, statistics: Mapping, description: Mapping
) -> None:
    """Writes the generator's folder by process 0. All take part in gathering each parameter, and
    none is done before the files are there."""
    flat = {"/".join(path): x for path, x in traverse_util.flatten_dict(params).items()}
    on_host = ((path, hosts.to_host(x)) for path, x in flat.items())
    if hosts.lead():
        shapes = {path: (x.shape, x.dtype) for path, x in flat.items()}
        write_generator(folder, shapes, on_host, statistics, description)
    else:
        collections.deque(on_host, maxlen=0)
    with hosts.lead_first():
        pass


def _row(
    values: Mapping, names: Sequence[str], seconds: float, flop: int, mesh: jax.sharding.Mesh
) -> dict:
    """The numbers of a step that are written: the metrics, the loss of each dataset, and speed.

    flop: operations of the step by the direct method, so that methods compare; a faster one may
    exceed the peak; 0 where they are not counted.
    """
    row = {key: value for key, value in values.items() if key != "sample_loss"}
    by_name: dict[str, list[float]] = {}
    for name, loss in zip(names, values["sample_loss"], strict=True):
        by_name.setdefault(name, []).append(loss)
    row |= {f"loss/{name}": float(np.mean(losses)) for name, losses in sorted(by_name.items())}
    row["samples_per_second"] = len(names) / seconds
    if flop:
        row["tflop_per_second"] = flop / seconds / 1e12
    chip = chip_of(mesh.devices.flat[0].device_kind)
    if flop and chip is not None:
        row["share_of_peak"] = flop / seconds / (chip.peak * mesh.size)
    memory = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in memory:
        row["peak_memory_gb"] = memory["peak_bytes_in_use"] / 1e9
    return row


def run(given: Given) -> None:
    """Runs the stage."""
    config, workdir = given.config, given.workdir
    profile, checkpoints = _window(given["profile"]), config.train.checkpoint_dir
    here = bool(checkpoints) and "://" not in checkpoints
    folders = [(checkpoints, "config.train.checkpoint_dir")] * here
    with together.together(given, "train", given["profile"], folders):
        with hosts.lead_first():
            suite = open_suite(config, workdir, given["strict"])
            if config.train.asks_base:  # of a hub id one process takes the commit
                find_base(config, workdir)
        folder = train(config, suite, workdir, given["allow"], profile, given["base-name"])
        if hosts.lead():
            print(f"generator: {folder}")


def _window(words: Sequence[str]) -> tuple[int, int] | None:
    """--profile: two steps, or None. Raises InputError for anything else."""
    steps = [int(step) for step in words if step.isdecimal()]
    if words and (len(words) != 2 or len(steps) != 2 or steps[0] >= steps[1]):
        raise InputError(
            f"--profile={','.join(words)}: expected two steps, the first below the second, such "
            "as 100,110"
        )
    return (steps[0], steps[1]) if steps else None
