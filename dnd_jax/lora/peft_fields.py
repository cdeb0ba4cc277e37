"""Every field of PEFT's LoraConfig: what it does to an adapter's numbers, and whether it is read,
does nothing to them, or is refused."""

import numbers
import pathlib
import re
import sys
from collections.abc import Mapping

from dnd_jax.core.errors import InputError
from dnd_jax.parallel import hosts

# Read by peft_settings.py.
READ = (
    "peft_type",
    "base_model_name_or_path",
    "revision",
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "init_lora_weights",
    "bias",
)
# They change how an adapter was trained, or who wrote it, but not what its matrices mean.
NO_NUMBER = (
    "task_type",
    "auto_mapping",
    "peft_version",
    "inference_mode",
    "lora_dropout",
    "runtime_config",
    "megatron_core",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "qalora_group_size",
    "ensure_weight_tying",
    "merge_weights",  # of the first versions
)
LARGEST = sys.float_info.max  # of a number
_PLAIN = "train a plain LoRA"
# {field: what to do}. With a value, an adapter is not W + scale * B A alone, or not on the modules
# that it names.
REFUSED = {
    "use_dora": "train with use_dora=False",
    "modules_to_save": "train without it",
    "fan_in_fan_out": "only weights of nn.Linear are known",
    "lora_bias": "train with lora_bias=False",
    "trainable_token_indices": "train without it",
    "target_parameters": "adapt modules by target_modules alone",
    "layer_replication": "its base is another one",
    "megatron_config": "save it as PEFT's on an ordinary base",
    "use_qalora": _PLAIN,
    "alora_invocation_tokens": _PLAIN,
    "arrow_config": _PLAIN,
    "kasa_config": _PLAIN,
    "velora_config": _PLAIN,
    "monteclora_config": _PLAIN,
    "use_bdlora": _PLAIN,
    "enable_lora": _PLAIN,  # of the first versions
}
# Ways to begin that leave the base as it is; any other changes it.
INITS = (True, False, None, "true", "gaussian", "eva", "orthogonal", "mica")


def check_fields(raw: Mapping, file: pathlib.Path) -> None:
    """Raises InputError for a field that makes an adapter more than W + scale * B A. Of fields that
    PEFT has not either there is a note, as PEFT's; one that turns something on is refused."""
    for key, mend in REFUSED.items():
        if raw.get(key):
            raise InputError(f"{file}: {key} = {raw[key]!r} is not supported; {mend}")
    init = raw.get("init_lora_weights", True)
    if (init.lower() if isinstance(init, str) else init) not in INITS:
        raise InputError(
            f"{file}: init_lora_weights = {init!r}: the matrices belong to a base that PEFT "
            "changes when it loads them; convert it by save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...)"
        )
    if raw.get("bias", "none") != "none":
        raise InputError(f"{file}: bias = {raw['bias']!r} is not supported; train with bias='none'")
    for key in sorted(raw.keys() - {*READ, *NO_NUMBER, *REFUSED}):
        value = raw[key]
        if value and (value is True or isinstance(value, dict)) and _turns_on(key):
            raise InputError(
                f"{file}: {key} = {value!r} is unknown, and would make it another method; {_PLAIN}"
            )
        if value and hosts.lead():
            _note(key, str(file))
    task = raw.get("task_type")
    if task and task not in TASKS:
        raise InputError(f"{file}: task_type = {task!r} is none of PEFT's: {', '.join(TASKS)}")
    _check_numbers(raw, file)


def _turns_on(key: str) -> bool:
    return key.startswith(("use_", "enable_")) or key.endswith("_config")


TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
_noted: set[str] = set()


def _note(key: str, file: str) -> None:
    """Once a process for each field."""
    if key not in _noted:
        _noted.add(key)
        print(f"note: {file}: {key} is no field of a LoRA; it is ignored, as by PEFT", flush=True)


def _check_numbers(raw: Mapping, file: pathlib.Path) -> None:
    """Raises InputError for a rank or alpha that is none, of all or of a pattern, and for a pattern
    that is none."""
    for name, least in (("r", 1), ("lora_alpha", None)):
        pattern = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}[name]
        own = raw.get(pattern) or {}
        if not isinstance(own, Mapping):
            raise InputError(f"{file}: {pattern} = {own!r} should be an object {{pattern: number}}")
        for key in own:
            _check_pattern(key, f"{file}: {pattern}")
        for key, value in {name: raw.get(name), **own}.items():
            number = isinstance(value, numbers.Real) and not isinstance(value, bool)
            if not number or not abs(value) <= LARGEST or (least and value < least):
                raise InputError(
                    f"{file}: {f'{pattern} of ' if key != name else ''}{key} = {value!r} should "
                    f"be {'a whole number of at least 1' if least else 'a number'}"
                )
    if not raw["lora_alpha"]:
        raise InputError(f"{file}: lora_alpha = 0: such an adapter changes nothing")


def _check_pattern(key: str, where: str) -> None:
    try:
        re.compile(_ends_in(key))
    except (re.error, RecursionError, OverflowError) as error:
        raise InputError(f"{where} of {key!r} is no regular expression ({error})") from None


def _ends_in(pattern: str) -> str:
    """PEFT's expression for the paths that a pattern is of."""
    return rf"(.*\.)?({pattern})$"


def own_value(raw: Mapping, pattern: str, default: str, module: str, headless: bool = False):
    """A module's own rank or alpha, by PEFT's rule: the first pattern that ends its path, else the
    common value. headless: as `is_targeted`."""
    module = module.removeprefix("model.") if headless else module
    found = (
        value for key, value in (raw.get(pattern) or {}).items() if re.match(_ends_in(key), module)
    )
    return next(found, raw[default])


def is_targeted(raw: Mapping, module: str, headless: bool = False) -> bool:
    """Whether PEFT puts a LoRA on a module, by the settings' target_modules, exclude_modules,
    layers_to_transform and layers_pattern. headless: of a base that was loaded without its head,
    whose modules have no "model." in front."""
    module = module.removeprefix("model.") if headless else module
    if raw.get("exclude_modules") and _matches(raw["exclude_modules"], module):
        return False
    targets = raw["target_modules"]
    if isinstance(targets, str):
        linear = targets.lower() == "all-linear" and module not in ("lm_head", "embed_out")
        return linear or bool(re.fullmatch(targets, module))
    if module in targets:
        return True
    return _matches(targets, module) and _in_layers(raw, module)


def _matches(names: str | list, module: str) -> bool:
    """Whether a pattern, or the end of a path, is a module's."""
    if isinstance(names, str):
        return bool(re.fullmatch(names, module))
    return any(module == name or module.endswith(f".{name}") for name in names)


def _in_layers(raw: Mapping, module: str) -> bool:
    layers, patterns = raw.get("layers_to_transform"), raw.get("layers_pattern") or []
    if layers is None or layers == []:
        return True
    expressions = [
        rf"(?:^|.*?\.){p}\.(\d+)\." for p in ([patterns] if isinstance(patterns, str) else patterns)
    ] or [r".*?\.[^.]*\.(\d+)\."]
    found = next((m for e in expressions if (m := re.match(e, module))), None)
    return found is not None and int(found[1]) in ([layers] if isinstance(layers, int) else layers)
