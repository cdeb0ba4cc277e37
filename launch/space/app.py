"""A Hugging Face space: the packaged generator with its page, on the weights that the hub has
(docs/SERVE.md)."""

import sys

from dnd_jax.main import main

sys.exit(
    main(
        [
            "serve",
            "--generator=package:skills",
            "--base=HuggingFaceTB/SmolLM2-135M-Instruct",
            "--host=0.0.0.0",
            "--port=7860",
            "--anyone",
            "--cache=/tmp/served",
            "--cache-gb=1",
        ]
    )
)
