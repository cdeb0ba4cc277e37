"""Which text encoder? MiniLM against the hidden states of the run's own base LM: its word vectors,
its middle and its last layer.

    dnd ablate --config=configs/ablate_encoder.py --workdir=runs/ablate_encoder [--seeds=0,1,2]

"{base}" is the folder of the run's base. Layer 0 is plain word vectors, as GloVe's; a file of these
(word v1 ... vC a line), a T5 or any other encoder's folder is one more line. The paper: GloVe,
Sentence-BERT and T5 work, a 7B LLM fails.
"""

from dnd_jax.configs import mini


def get_config():
    """mini.py (MiniLM) with other encoders."""
    config = mini.get_config()
    config.ablate.variants = (
        ("MiniLM", {"condition.encoder": config.condition.encoder}),
        ("word_vectors", {"condition.encoder": "{base}", "condition.layer": 0}),
        ("base_middle", {"condition.encoder": "{base}", "condition.layer": 2}),
        ("base_last", {"condition.encoder": "{base}"}),
    )
    return config
