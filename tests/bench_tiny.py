"""Every kind of benchmark case on the tiny setting."""

from dnd_jax.configs import default


def get_config():
    config = default.get_config()
    config.bench.update(
        cases=tuple(
            (what, "tests/tiny.py", what, 2, "float32") for what in ("forward", "train", "generate")
        )
        + (("first stage", "tests/tiny.py", "gradient", 1, "float32", 0, 1),),
        methods=("direct", "auto"),
        torch=("eager",),
        repeats=2,
        rounds=1,
    )
    return config
