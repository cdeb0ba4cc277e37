"""The commands of this room."""

from dnd_jax.core.stage import ALLOW, ON_SUITE, Stage

COMMANDS = {"pretrain": Stage("base.pretrain", (*ON_SUITE, ALLOW), writes=True)}
