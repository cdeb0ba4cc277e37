"""Every default, once. The meaning of each field stands in dnd_jax/config/schema.py; the numbers
are the paper's where it has them."""

from ml_collections import ConfigDict

KERNEL = r"decoder/stage_\d+/conv(1w|1h|2h|2w|_n)$"


def get_config() -> ConfigDict:
    """The default configuration, locked."""
    config = ConfigDict(
        {
            "seed": 0,
            "suite": "",
            "embedded": "world",
            "embedded_tasks": 0,
            "base": {
                "path": "",
                "max_length": 1024,
                "vocab_size": 4096,
                "hidden_size": 128,
                "intermediate_size": 256,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "tie_word_embeddings": True,
            },
            "pretrain": {
                "loss": "response",
                "steps": 400,
                "batch_size": 128,
                "learning_rate": 4e-3,
                "weight_decay": 0.1,
                "warmup_steps": 20,
                "save_every": 100,
            },
            "lora": {
                "rank": 8,
                "alpha": 16.0,
                "targets": (
                    "q_proj",
                    "k_proj",
                    "v_proj",
                    "o_proj",
                    "up_proj",
                    "gate_proj",
                    "down_proj",
                ),
                "steps": 675,
                "batch_size": 8,
                "learning_rate": 1e-4,
                "weight_decay": 0.0,
                "clip": 1.0,
                "checkpoints": 50,
                "too_long": "skip",
                "save_every": 100,
                "tasks_at_once": 0,
                "dtype": "float32",
                "remat": False,
                "flat_window": 0,
            },
            "condition": {
                "encoder": "sentence-transformers/all-MiniLM-L12-v2",
                "layer": -1,
                "num_prompts": 128,
                "max_text_length": 384,
                "form": "prompt",
                "in_graph": False,
                "too_long": "refuse",
            },
            "generator": {
                "features": ((0, 0, 0), (0, 0, 0)),
                "kernel_size": 9,
                "length_projection": "",
                "convolution": "auto",
                "target": "chunk",
                "chunk_width": 0,
                "importance": True,
                "bfloat16_checkpoints": False,
            },
            "train": {
                "checkpoints": "",
                "init_from": "",
                "datasets": 0,
                "pairing": "random",
                "few_prompts": 0.0,
                "steps": 4000,
                "batch_size": 64,
                "micro_batches": 1,
                "learning_rate": 3e-5,
                "weight_decay": 0.1,
                "clip": 1.0,
                "warmup_steps": 1,
                "condition_noise": 1e-4,
                "target_noise": 1e-5,
                "dtype": "float32",
                "remat": "none",
                "optimizer": "adamw",
                "save_every": 500,
                "keep_last": 2,
                "keep_every": 0,
                "checkpoint_dir": "",
                "trackers": (),
            },
            "controls": {
                "in_context": 3,
                "prompts": True,
                "multi_task": True,
                "learning_rates": (),
                "few_shot": True,
                "folder": "",
            },
            "evaluate": {
                "answers": "greedy",
                "samples": 5,
                "num_prompts": 0,
                "train_adapters": 0,
                "batch_size": 128,
                "max_new_tokens": 32,
                "free_form": False,
                "agreement": True,
                "overhead": True,
            },
            "bench": {
                "cases": (),
                "methods": ("direct", "auto"),
                "torch": ("eager", "channels_last", "compile"),
                "repeats": 3,
                "rounds": 2,
            },
            "mesh": {
                "slices": 0,
                "data": -1,
                "fsdp": 1,
                "tensor": 1,
                # The first rule that fits decides: pattern found in the path, and a multiple of the
                # axes' sizes in each dimension.
                "rules": (
                    # Kernels (k, k, in, out) hold nearly all parameters. Their output channels are
                    # what `tensor` computes in parts.
                    (KERNEL, (None, None, "fsdp", "tensor")),
                    (KERNEL, (None, None, None, ("tensor", "fsdp"))),
                    (KERNEL, (None, None, ("fsdp", "tensor"), None)),
                    (KERNEL, (None, None, "fsdp", None)),
                    (KERNEL, (None, None, None, "fsdp")),
                    (KERNEL, (None, None, None, "tensor")),
                    (KERNEL, (None, None, "tensor", None)),
                    # Norms and biases over (L, C), and everything else where a dimension divides.
                    (r".", (None, "fsdp")),
                    (r".", ("fsdp", None)),
                    (r".", ("fsdp",)),
                    (r".", ()),
                ),
            },
            "sweep": {
                "topologies": (),
                "meshes": (),
                "rules": (),
                "remat": (),
                "batches": (),
                "micro_batches": (),
                "methods": (),
                "steps": ("train",),
            },
            "ablate": {"axes": (), "variants": ()},
        }
    )
    return config.lock()
