"""Which sharding for the 0.5B setting on eight TPU v5p chips? Every mesh of them, with and without
rematerialisation.

    dnd plan --sweep --config=configs/ablate_sharding.py --workdir=runs/sharding

Change the setting, the topology and the lists below; an empty list takes the setting's own value.
No TPU is needed.
"""

from dnd_jax.configs import qwen2_5_0_5b_commonsense


def get_config():
    """The setting with lists for the sweep: topologies, (data, fsdp, tensor) meshes, remat, global
    batches, methods, steps."""
    config = qwen2_5_0_5b_commonsense.get_config()
    config.sweep.update(
        topologies=("v5p:2x2x2",),
        meshes=((8, 1, 1), (1, 8, 1), (2, 4, 1), (4, 1, 2), (2, 2, 2), (1, 4, 2), (1, 1, 8)),
        remat=("none", "stages"),
        methods=("direct", "auto"),
    )
    return config
