"""`dnd bench --rates`: learns how fast this machine's processor computes convolutions, by which
training and generation choose their methods from then on."""

import jax

from dnd_jax.config.schema import Config
from dnd_jax.core.errors import InputError
from dnd_jax.generator.sizes import spec_of
from dnd_jax.ops.choice import choose, describe
from dnd_jax.ops.learn import fit, off, samples
from dnd_jax.ops.rates import LEARNED, RATES, learned, processor, rates_file, remember


def learn_rates(config: Config) -> str:
    """Measures, keeps what it learned, and returns a Markdown table: shipped and learned rates, how
    far off times by them are, and what they choose for the configuration's training on one device.
    Raises InputError where JAX computes on something else than a CPU."""
    if jax.default_backend() != "cpu":
        raise InputError(
            f"dnd bench --rates learns a CPU's rates, and JAX computes on {jax.default_backend()} "
            "here; run it with JAX_PLATFORMS=cpu"
        )
    batch = config.train.batch_size // config.train.micro_batches
    problems = spec_of(config).convolutions(batch, "cpu").values()
    learned("cpu")  # says what is wrong with a damaged file before it measures
    measured = samples()
    columns = {"shipped": RATES["cpu"], "learned": fit(measured)}
    remember(columns["learned"])
    lines = [f"| of {processor()} | {' | '.join(columns)} |", "|---" * 3 + "|"]
    for name in LEARNED:
        values = " | ".join(f"{getattr(rates, name):.3g}" for rates in columns.values())
        lines.append(f"| {name} | {values} |")
    wrong = " | ".join(f"{off(measured, rates):.2f}" for rates in columns.values())
    lines.append(f"| times off by a factor of (median of {len(measured)}) | {wrong} |")
    chosen = " | ".join(
        describe(choose(problem, "auto", rates) for problem in problems)
        for rates in columns.values()
    )
    lines.append(f"| a train step's convolutions, output / gradients | {chosen} |")
    return (
        "\n".join(lines)
        + f"\n\nkept in {rates_file()}: training and generation on this machine's CPU go by them "
        "from now on, and a training that has begun by others goes on by those; without the file "
        "by the shipped ones again"
    )
