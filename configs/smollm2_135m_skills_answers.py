"""smollm2_135m_skills.py, trained through the base on the answers of the 60 training tasks.

    dnd quickstart --config=configs/smollm2_135m_skills_answers.py --workdir=runs/answers

No LoRA is needed; `dnd collect` with the same settings and --workdir, before, gives the table the
columns that are made of LoRAs. A step asks 16 generated LoRAs 8 questions each: made for a GPU,
where --config.lora.dtype=bfloat16 --config.lora.remat=True make it faster. docs/REAL_LLM.md has
what came out.
"""

from dnd_jax.configs import smollm2_135m_skills


def get_config():
    """smollm2_135m_skills.py with the objective "answers", and a moving average of parameters."""
    config = smollm2_135m_skills.get_config()
    config.train.update(objective="answers", steps=1200, average_decay=0.99)
    return config
