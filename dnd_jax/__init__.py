"""Drag-and-Drop LLMs in JAX: task prompts in, LoRA adapters out (arXiv 2506.16406).

The public API, with an example of each name in docs/API.md. A name is imported when it is first
used: `import dnd_jax` alone imports neither JAX nor any other package.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.3.0"

if TYPE_CHECKING:
    from dnd_jax.base.folder import load_base as load_base
    from dnd_jax.config.load import load_file as load_config  # noqa: F401
    from dnd_jax.config.schema import Config as Config
    from dnd_jax.config.validate import freeze as freeze
    from dnd_jax.core.errors import CheckFailed as CheckFailed
    from dnd_jax.core.errors import InputError as InputError
    from dnd_jax.data.suite import load_suite as load_suite
    from dnd_jax.encoders.cache import PromptEncoder as PromptEncoder
    from dnd_jax.generator.decoder import weighted_loss as weighted_loss
    from dnd_jax.generator.generate import generate_adapter as generate_adapter
    from dnd_jax.generator.model import Generator as Generator
    from dnd_jax.generator.released import load_reference_generator as load_reference_generator
    from dnd_jax.generator.released import save_reference_generator as save_reference_generator
    from dnd_jax.generator.sizes import layout_of as layout_of
    from dnd_jax.generator.spec import DecoderSpec as DecoderSpec
    from dnd_jax.generator.trained import TrainedGenerator as TrainedGenerator
    from dnd_jax.generator.trained import load_generator as load_generator
    from dnd_jax.lora.adapter import load_adapter as load_adapter
    from dnd_jax.lora.adapter import save_adapter as save_adapter
    from dnd_jax.lora.export_gguf import export_gguf as export_gguf
    from dnd_jax.lora.layout import LoraLayout as LoraLayout
    from dnd_jax.lora.merge import merge_adapter as merge_adapter
    from dnd_jax.lora.peft_settings import AdapterConfig as AdapterConfig
    from dnd_jax.lora.peft_settings import load_adapter_config as load_adapter_config
    from dnd_jax.lora.targets import ChunkTarget as ChunkTarget
    from dnd_jax.lora.targets import ElementTarget as ElementTarget
    from dnd_jax.lora.verify import verify_on_base as verify_on_base
    from dnd_jax.ops.convolution import convolve as convolve

# Name -> the module that defines it, and what it is called there if not the same.
_HOME = {
    "AdapterConfig": "lora.peft_settings",
    "CheckFailed": "core.errors",
    "ChunkTarget": "lora.targets",
    "Config": "config.schema",
    "DecoderSpec": "generator.spec",
    "ElementTarget": "lora.targets",
    "Generator": "generator.model",
    "InputError": "core.errors",
    "LoraLayout": "lora.layout",
    "PromptEncoder": "encoders.cache",
    "TrainedGenerator": "generator.trained",
    "convolve": "ops.convolution",
    "export_gguf": "lora.export_gguf",
    "freeze": "config.validate",
    "generate_adapter": "generator.generate",
    "layout_of": "generator.sizes",
    "load_adapter": "lora.adapter",
    "load_adapter_config": "lora.peft_settings",
    "load_base": "base.folder",
    "load_config": "config.load:load_file",
    "load_generator": "generator.trained",
    "load_reference_generator": "generator.released",
    "load_suite": "data.suite",
    "merge_adapter": "lora.merge",
    "save_adapter": "lora.adapter",
    "save_reference_generator": "generator.released",
    "verify_on_base": "lora.verify",
    "weighted_loss": "generator.decoder",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """A name of the public API, kept here once it is imported (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, there = _HOME[name].partition(":")
    value = getattr(importlib.import_module(f"{__name__}.{module}"), there or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
