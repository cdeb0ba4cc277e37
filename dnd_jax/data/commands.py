"""The commands of this room."""

from dnd_jax.config.schema import EMBEDDED
from dnd_jax.core.stage import DEFAULT, OUT, Flag, Stage

NAME = Flag("name", str, "", f"{', '.join(EMBEDDED)} (default: config.embedded)")

COMMANDS = {"suite": Stage("data.embedded", (OUT, NAME), settings=DEFAULT)}
