"""The suite of a run: the given one, or the embedded one written into its folder; checked before
hours are spent on it."""

import pathlib
import re

from dnd_jax.config.schema import Config
from dnd_jax.core import workdir as paths
from dnd_jax.core.errors import InputError
from dnd_jax.core.files import check_unused
from dnd_jax.data import report
from dnd_jax.data.composed import suite_name
from dnd_jax.data.condition_text import condition_texts
from dnd_jax.data.embedded import SUITES
from dnd_jax.data.suite import Suite, labels_of, load_suite

_EMBEDDED = re.compile(rf"({'|'.join(SUITES)})-\d+(-\d+)?")  # names that `suite_name` gives


def open_suite(
    config: Config, workdir: pathlib.Path, strict: bool = False, scored: bool = False
) -> Suite:
    """The configured suite, or an embedded one (config.embedded), drawn by the seed and written to
    WORKDIR/suite; its faults are warned of.

    Raises InputError for a folder of another's in the place of the embedded suite, for another
    embedded suite than the configured one, for a suite that cannot be read, one that lacks answers
    or labels which the configuration wants, with strict for faults in its data, and with scored for
    one without an unseen dataset.
    """
    own = workdir / paths.SUITE
    if not config.suite and not (own / "suite.json").is_file():
        check_unused(own, "the embedded suite", "give the file that describes yours by --suite")
        SUITES[config.embedded](own, config.seed, config.embedded_tasks)
    suite = load_suite(config.suite or own, config.condition.num_prompts)
    wanted = suite_name(config.embedded, config.seed, config.embedded_tasks)
    if not config.suite and suite.name != wanted and _EMBEDDED.fullmatch(suite.name):
        raise InputError(
            f"{own / 'suite.json'}: is {suite.name}, and these settings (embedded, seed, "
            f"embedded_tasks) ask for {wanted}; restore them or use another --workdir"
        )
    if scored and not suite.unseen:
        raise InputError(
            f"{config.suite or workdir / 'suite'}: names no unseen dataset, so there is nothing "
            "to score; add one"
        )
    report.check(suite, strict, workdir / paths.SUITE_FAULTS)
    for dataset in suite.train + suite.unseen:  # now, not after hours of training
        condition_texts(dataset.train, config.condition.form)
    if config.evaluate.answers == "likelihood":
        for dataset in suite.unseen:
            labels_of(dataset)
    return suite
