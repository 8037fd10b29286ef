"""Checks that an adapter's file has all the tensors that its config promises.

PEFT only warns about some of them. Merging an incomplete adapter would keep Stage 1's weights where Stage 2's belong.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any

from surgvqa.checkpoint.folder import Checkpoint
from surgvqa.checkpoint.names import to_new_name, to_old_name
from surgvqa.errors import UsageError
from surgvqa.merge.adapter import CONFIG_FILE, Adapter
from surgvqa.merge.patterns import matching


def require_promised(adapter: Adapter, base: Checkpoint, also: Collection[str] = ()) -> None:
    """Raises UsageError unless the file, or `also` (base tensors), has everything that the config promises."""
    saved = _check_saved(adapter, base, also)
    _check_targets(adapter, base, saved)
    _check_biases(adapter, base, saved)


def _check_saved(adapter: Adapter, base: Checkpoint, also: Collection[str]) -> set[str]:
    """The base tensors of the modules in modules_to_save. Raises UsageError when one is missing."""
    here = {*adapter.replaced, *also}
    saved: set[str] = set()
    for entry in adapter.config.get("modules_to_save") or []:
        promised = {name for name in base.tensors if _is_within(name, to_old_name(str(entry)))}
        found = {name for name in here if _is_within(name, to_old_name(str(entry)))}
        if not found or promised - here:
            missing = sorted(promised - here) or [str(entry)]
            raise UsageError(
                f"{adapter.folder / CONFIG_FILE}: modules_to_save names {entry}, but {adapter.weights.name} has no "
                f"{missing[0]}; copy the complete adapter, give --projector, or remove {entry} from "
                "modules_to_save if it was not trained"
            )
        saved |= promised | found
    return saved


def _is_within(tensor: str, entry: str) -> bool:
    """Whether a tensor belongs to a module whose path ends with `entry`, as PEFT compares (`key.endswith(entry)`)."""
    parts = tensor.split(".")
    return any(".".join(parts[:count]).endswith(entry) for count in range(1, len(parts)))


def _check_targets(adapter: Adapter, base: Checkpoint, saved: Collection[str]) -> None:
    """Compares the file's LoRA weights with target_modules.

    Raises UsageError when a module has LoRA weights that target_modules does not match (PEFT would ignore them), when a
    kind of module has LoRA weights in only some layers, or when no module of a listed name has any. Warns when a kind
    has none, because the encoders may have been absent in training.
    """
    config, file = adapter.config, adapter.weights
    target = config.get("target_modules")
    linear = [
        name.removesuffix(".weight")
        for name, info in base.tensors.items()
        if name.endswith(".weight") and len(info.shape) == 2 and name not in saved
    ]
    place = str(adapter.folder / CONFIG_FILE)
    modules = dict.fromkeys([*linear, *sorted(adapter.named)])
    left_out = _matching_modules(config.get("exclude_modules"), modules, f"{place}: exclude_modules")
    wanted = (
        set(modules)
        if target in (None, "all-linear")
        else _matching_modules(target, modules, f"{place}: target_modules")
    )
    wanted -= left_out
    layers = config.get("layers_to_transform")
    if layers is not None:
        chosen = {str(n) for n in (layers if isinstance(layers, list) else [layers])}
        wanted = {module for module in wanted if chosen & set(re.findall(r"\.(\d+)\.", module))}
    if stray := sorted(adapter.named - wanted):
        raise UsageError(
            f"{place}: target_modules does not match {stray[0]}"
            + (f" and {len(stray) - 1} more modules" if stray[1:] else "")
            + f", but {file.name} has LoRA weights for it; is this the adapter's own config?"
        )
    promised_modules = [module for module in linear if module in wanted] if target is not None else []
    here = adapter.named | {name.removesuffix(".weight") for name in adapter.modules}
    absent = _absent(adapter, promised_modules, here, "LoRA weights")
    for name in target if isinstance(target, list) else []:
        promised = _matching_modules([name], promised_modules, place)
        if promised and not promised & here:
            raise UsageError(
                f"{file}: target_modules names {name}, but there are no LoRA weights for it; is it complete?"
            )
    if absent and target != "all-linear":  # which modules those were depends on the model as PEFT saw it
        adapter.warnings.append(
            f"{file.name}: no LoRA weights for {len(absent)} modules that target_modules matches, first {absent[0]}"
        )


def _check_biases(adapter: Adapter, base: Checkpoint, saved: Collection[str]) -> None:
    """Warns about biases missing from the file that bias="lora_only" (modules with LoRA) or "all" promises."""
    if adapter.config.get("bias") not in ("lora_only", "all"):
        return
    everywhere = adapter.config["bias"] == "all"
    promised = [
        name
        for name in base.tensors
        if name.endswith(".bias")
        and name not in saved
        and (everywhere or f"{name.removesuffix('.bias')}.weight" in adapter.modules)
    ]
    absent = _absent(adapter, promised, {*adapter.replaced, *adapter.own_base}, "trained biases")
    if absent:
        adapter.warnings.append(
            f"{CONFIG_FILE}: bias={adapter.config['bias']}, but {adapter.weights.name} has no trained bias for "
            f"{len(absent)} modules, first {absent[0]}: the base's are kept"
        )


def _absent(adapter: Adapter, promised: Iterable[str], here: Collection[str], what: str) -> list[str]:
    """The promised names of kinds that are missing in all layers. Raises UsageError for a kind missing in some.

    Modules of one kind have the same name in each layer.
    """
    kinds: dict[str, list[str]] = {}
    for name in promised:
        kinds.setdefault(re.sub(r"\d+", "#", name), []).append(name)
    absent = []
    for names in kinds.values():
        missing = [name for name in names if name not in here]
        if missing and len(missing) < len(names):
            raise UsageError(
                f"{adapter.weights}: no {what} for {len(missing)} of the {len(names)} modules like {missing[0]}; "
                "is the file complete?"
            )
        absent += missing
    return absent


def _matching_modules(target: Any, modules: Collection[str], where: str) -> set[str]:
    """The modules that PEFT matches with `target`: a list of names or of their ends, or a regular expression."""
    if isinstance(target, list):
        ends = [to_old_name(str(name)) for name in target]
        return {module for module in modules if any(f".{module}".endswith(f".{end}") for end in ends)}
    if not isinstance(target, str) or target == "all-linear":
        return set()
    old_names = {to_new_name(module): module for module in modules} | {module: module for module in modules}
    return {old_names[name] for name in matching([target], old_names, where)[0]}
