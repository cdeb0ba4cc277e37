"""python -m dnd_jax STAGE ...: the same as `dnd`."""

import sys

from dnd_jax.main import main

sys.exit(main())
