"""Stage `data-report`: what is in a suite's data, what is wrong with it, and which of its prompts
the text encoder cuts.

    dnd data-report --suite=DIR [--strict]
"""

from dnd_jax.config.schema import Config
from dnd_jax.core import workdir as paths
from dnd_jax.core.errors import InputError
from dnd_jax.core.stage import Given
from dnd_jax.data import report
from dnd_jax.data.suite import Suite, load_suite
from dnd_jax.encoders.cut import of_suite
from dnd_jax.encoders.load import load_tokens


def cut_lines(suite: Suite, config: Config) -> tuple[list[str], list[str]]:
    """(a line for each dataset of which the encoder cuts prompts, those of them that training
    refuses); where the encoder is not at hand the line that says so."""
    try:
        found = of_suite(suite, load_tokens(config.condition.encoder), config)
    except InputError as error:
        return [f"prompts were not counted in tokens ({error})"], []
    lines = [f"{name}: {cut}" for name, cut in found.items()]
    refused = [f"{name}: {cut}" for name, cut in found.items() if cut.most]
    allowed = config.condition.too_long == "cut"
    return lines, [] if allowed else refused


def run(given: Given) -> None:
    """Runs the stage."""
    suite = load_suite(given.config.suite or given.workdir / paths.SUITE, 1)
    found = report.findings(suite)
    lines, refused = cut_lines(suite, given.config)
    if lines:
        print("\n  ".join(["text encoder:", *lines]), end="\n\n")
    print(report.report(suite, found), flush=True)
    if given["strict"]:
        report.refuse(suite, [*(str(f) for f in found if f.fault), *refused])
