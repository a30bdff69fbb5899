"""The settings of PEFT's ``LoraConfig``: which of them an adapter may have that is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from export.errors import ExportError

READ = frozenset({"peft_type", "lora_alpha", "alpha_pattern", "use_rslora", "init_lora_weights"})
"""Settings that are read."""

IN_TENSORS = frozenset(
    {"r", "rank_pattern", "target_modules", "exclude_modules", "layers_to_transform"}
    | {"layers_pattern"}
)
"""Settings that the names and shapes of the tensors say as well."""

WITHOUT_EFFECT = frozenset(
    {"task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}
    | {"inference_mode", "fan_in_fan_out", "lora_dropout", "runtime_config", "megatron_core"}
    | {"loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"}
    | {"ensure_weight_tying"}
)
"""Settings that do not change what an adapter computes.

Some say how PEFT trains or merges, or belong to another setting that is read or refused.
"""

_PLAIN = "train without it"

REFUSED: Mapping[str, str] = {
    "use_dora": f"it scales the weights of the base by trained magnitudes; {_PLAIN}",
    "lora_bias": f"its adapters have biases; {_PLAIN}",
    "bias": 'biases of the base were trained as well; train with bias = "none"',
    "modules_to_save": f"it holds whole modules that replace those of the base; {_PLAIN}",
    "trainable_token_indices": f"it holds rows that replace those of the token table; {_PLAIN}",
    "target_parameters": "its adapters are on parameters; name modules in target_modules instead",
    "layer_replication": "it repeats layers of the base; save the larger model, and train on that",
    "alora_invocation_tokens": f"its adapters act only behind certain tokens; {_PLAIN}",
    "use_qalora": f"its adapters read pooled inputs; {_PLAIN}",
    "use_bdlora": f"its adapters are block-diagonal; {_PLAIN}",
    "arrow_config": "it mixes several adapters; give one of them",
    "velora_config": f"its adapters hold projections of their own; {_PLAIN}",
    "monteclora_config": f"its adapters are sampled; {_PLAIN}",
    "kasa_config": f"it cuts small singular values off the base, and scales directions; {_PLAIN}",
    "megatron_config": f"its modules are those of Megatron; {_PLAIN}",
}
"""Settings with which an adapter is not ``scale * B @ A`` on the given base: why, and what to do.

They are refused where they are set.
"""

STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Values of ``init_lora_weights`` with which an adapter starts on the unchanged base."""

CHANGED_BASES = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Values of ``init_lora_weights``, or their beginnings, with which PEFT changes the base."""

_UNSET: tuple[object, ...] = (None, False, "none", [], {}, "")


def check_settings(path: Path, config: Mapping[str, Any]) -> None:
    """Raise :class:`ExportError` unless an adapter is ``scale * B @ A`` on the given base.

    Args:
        path: file of the configuration, for messages.
        config: configuration of PEFT, with settings by name.
    """
    if config.get("peft_type") != "LORA":
        raise ExportError(f"{path} is of the type {config.get('peft_type')!r}, must be LORA")
    for name, value in config.items():
        if value in _UNSET:
            continue
        if name in REFUSED:
            raise ExportError(f"{path} has {name}, which is not supported: {REFUSED[name]}")
        if name not in READ | IN_TENSORS | WITHOUT_EFFECT:
            raise ExportError(
                f"{path} has {name}, a setting of PEFT that is not known here; if it does not "
                "change what the adapter computes, remove it from the file"
            )
    start = config.get("init_lora_weights", True)
    if str(start).lower().startswith(CHANGED_BASES):
        raise ExportError(f"{path} has init_lora_weights = {start!r}: {_changed(str(start))}")
    if start not in STARTS:
        raise ExportError(
            f"{path} has init_lora_weights = {start!r}, which is not known here; train with true"
        )


def _changed(start: str) -> str:
    """Why an adapter on a changed base is refused, and what to do."""
    why = "PEFT has changed the weights of the base, and the adapter does not fit the original ones"
    if start.lower() == "loftq":
        return f"{why}; train with init_lora_weights = true"
    return (
        f"{why}; save it with model.save_pretrained(..., path_initial_model_for_weight_conversion="
        "the adapter as it was before training), which converts it"
    )
