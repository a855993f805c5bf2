"""How an adapter fits a model: every weight of it in a module of its shape, under its own name or another.

It is found by loading the adapter's names and shapes with peft on the meta device, so before memory is spent. An
adapter whose names begin otherwise than the model's (trained on a wrapper, saved with a prefix too many) is renamed
where one renaming alone gives each of its weights a place.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from es2.core.errors import InputError
from es2.core.files import read_json, write_json
from es2.models.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_adapter
from es2.models.architecture import shared_weights
from es2.models.model_files import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PEFT = "base_model.model."  # what peft puts before a module's name
_SHARED = "base_model.vera_"  # matrices of no module's own
_UNUSED = ".lora_monteclora_sampler."  # of training alone
_TUNED = ("lora_", "ia3_", "hada_", "lokr_", "oft_", "boft_", "vera_", "base_layer", "token_adapter")
_WRAPPERS = frozenset(
    ("base_model", "model", "language_model", "text_model", "module", "_orig_mod", "_fsdp_wrapped_module")
)
"""What names may begin with without being another part of a model, as a vision tower or an encoder is."""

_NUMBER = re.compile(r"\.(\d+)\.")  # of a block, in a weight's name
_SHAPES = re.compile(r"size mismatch for (\S+): .*?Size\(\[(.*?)\]\).*?Size\(\[(.*?)\]\)")


@dataclass(frozen=True)
class Fit:
    """How an adapter fits a model.

    Attributes:
        names: of the adapter's weights, by those they were saved under.
        config: the adapter's configuration under these names.
        missing: the modules that its configuration asks for and that it has no weights for.
    """

    names: Mapping[str, str]
    config: Mapping[str, Any]
    missing: tuple[str, ...]

    @property
    def renamed(self) -> bool:
        """Whether the weights have other names than they were saved under."""
        return any(old != new for old, new in self.names.items())

    def doubts(self, model: str, *names: str) -> list[str]:
        """Sentences on an adapter that fits `model`, or `names`, and may still be another one's or a part of one."""
        found = []
        if self.renamed:
            names = next((old, new) for old, new in self.names.items() if old != new)
            modules = tuple(map(_path, names))
            old, new = modules if modules[0] != modules[1] else names
            found.append(f"The adapter's weights were renamed to fit the model: {old[:200]} is {new[:200]} there.")
        if self.missing:
            own, absent = (
                sorted({int(number) for name in names for number in _NUMBER.findall(f".{name}.")[:1]})
                for names in (map(_path, self.names.values()), self.missing)
            )
            if own and absent and not set(own) & set(absent):
                have, want = (", ".join(map(str, layers)) for layers in (own, sorted({*own, *absent})))
                lack = f"has weights in layers {have} alone, while its configuration asks for {want}"
            else:
                more = f" and {len(self.missing) - 1} more" if len(self.missing) > 1 else ""
                lack = f"has no weights for {self.missing[0]}{more}, which its configuration asks for"
            found.append(f"The adapter {lack}: it may be a part of one.")
        base = str(self.config.get("base_model_name_or_path") or "").rstrip("/")
        if base and Path(base).name.lower() not in (Path(name).name.lower() for name in (model, *names)):
            found.append(f"The adapter names {base[:100]!r} as its base, not {model[:100]!r}.")
        return found


def fit_adapter(folder: Path, make_empty: Callable[[], PreTrainedModel], given: str | None = None) -> Fit:
    """How the adapter in `folder` fits the model that `make_empty` makes without weights; `given` names it in errors.

    Raises:
        InputError: when the folder holds no adapter that is read, some weight of it has no place in the model, a module
            there has another shape, or its change cannot be merged.
    """
    check_adapter(folder)
    given = given or str(folder)
    config = read_json(folder / ADAPTER_CONFIG) or {}
    shapes = _shapes(folder)
    own = {name: name for name in shapes}
    problem, missing = _place(make_empty(), config, shapes)
    fit = Fit(own, config, missing)
    if problem is not None:
        fits: dict[tuple[str, ...], Fit] = {}
        for renaming in _renamings(make_empty(), shapes):
            try:
                names, renamed = _rename(make_empty(), config, shapes, renaming)
            except Exception:  # a configuration that peft cannot read chooses no modules
                continue
            kept = {new == old for old, new in names.items() if _NUMBER.search(old)}
            if names == own or len(kept) > 1 or len(set(names.values())) < len(names):
                continue  # nothing new, blocks that began in two ways, or two weights that become one
            unfit, missing = _place(make_empty(), renamed, {names[name]: shape for name, shape in shapes.items()})
            if unfit is None:
                fits[tuple(names.values())] = Fit(names, renamed, missing)
        if len(fits) != 1:
            base = config.get("base_model_name_or_path")
            made_for = f" It names {str(base)[:100]!r} as its base." if base else ""
            raise InputError(
                f"The adapter {given!r} does not fit the model: {problem}; give the model it was trained on.{made_for}"
            )
        (fit,) = fits.values()
    _check_start(given, fit)
    _check_shared(given, fit, make_empty())
    return fit


def write_renamed(source: Path, fit: Fit, folder: Path) -> None:
    """Write the adapter of `source` under the names that fit, into a new folder."""
    folder.mkdir(parents=True)
    with (source / ADAPTER_WEIGHTS).open("rb") as file, (folder / ADAPTER_WEIGHTS).open("wb") as renamed:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        text = json.dumps({fit.names.get(name, name): entry for name, entry in header.items()}).encode()
        text += b" " * (-len(text) % 8)
        renamed.write(len(text).to_bytes(8, "little") + text)
        shutil.copyfileobj(file, renamed)
    write_json(folder / ADAPTER_CONFIG, fit.config)


def _shapes(folder: Path) -> dict[str, list[int]]:
    """The shapes of an adapter's weights by their names, blocks in their order."""
    from safetensors import safe_open

    with safe_open(folder / ADAPTER_WEIGHTS, framework="numpy") as weights:
        shapes = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
    order = sorted(shapes, key=lambda name: (int(found[1]) if (found := _NUMBER.search(name)) else -1, name))
    return {name: shapes[name] for name in order}


def _place(
    empty: PreTrainedModel, config: Mapping[str, Any], shapes: Mapping[str, list[int]]
) -> tuple[str | None, tuple[str, ...]]:
    """What keeps these weights from their places in the model, if anything, and which modules get none."""
    import torch
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict

    settings = dict(config)
    if "init_lora_weights" in settings:  # which costs time, and decides nothing here
        settings |= {"init_lora_weights": True, "loftq_config": {}}
    weights = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    modules = {name for name, _ in empty.named_modules()}
    try:
        boft = settings["peft_type"] == "BOFT"  # which reads numbers of what it makes
        with torch.device("cpu" if boft else "meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted: Any = get_peft_model(empty, PeftConfig.from_peft_type(**settings), low_cpu_mem_usage=not boft)
            loaded: Any = set_peft_model_state_dict(adapted, weights)
    except KeyError as error:
        return f"it has no {str(error.args[0])[:200]}, which its configuration names as saved", ()
    except Exception as error:  # peft has no exceptions of its own
        if (found := _SHAPES.search(str(error))) is not None:
            name, own, wanted = found.groups()
            return f"{name.replace('.default', '')} has the shape ({own}), where the model takes ({wanted})", ()
        if "arget modules" not in str(error):
            return f"{first_line(error)}", ()
        homeless = list(shapes)
    else:
        unexpected = set(loaded.unexpected_keys)
        homeless = [name for name in shapes if name in unexpected] or sorted(unexpected)
        homeless = [name for name in homeless if not name.startswith(_SHARED) and _UNUSED not in name]
    if homeless:
        lack = (
            "are for modules that its configuration leaves out"
            if _path(homeless[0]) in modules
            else "have no module there"
        )
        return f"{len(homeless)} of its {len(shapes)} weights {lack} (the first: {homeless[0]})", ()
    own_kind = adapted.base_model.prefix
    missing = dict.fromkeys(_path(name) for name in loaded.missing_keys if own_kind in name)
    return None, tuple(missing)


def _split(name: str) -> tuple[list[str], list[str]]:
    """The module of a weight's name and the rest: `….q_proj` and `lora_A.weight`, whatever the adapter is called."""
    parts = name.removeprefix(_PEFT).split(".")
    cut = next((i for i, part in enumerate(parts) if part.startswith(_TUNED)), len(parts) - 1)
    path, rest = parts[:cut], parts[cut:]
    if rest[-1].startswith("lora_magnitude_vector") or "lora_magnitude_vector" in rest:
        return path, ["lora_magnitude_vector"]
    kept = ("weight", "bias", "trainable_tokens_delta")
    return path, rest[:1] + [part for part in rest[1:] if part in kept or part.startswith(_TUNED)]


def _path(name: str) -> str:
    return ".".join(_split(name)[0])


def _renamings(empty: PreTrainedModel, names: Iterable[str]) -> list[tuple[str, str]]:
    """How the modules' names may begin in an adapter and in the model, where they go on alike."""
    modules = dict(empty.named_modules())
    own = (name for name in names if not name.startswith(_SHARED))
    path = next((path for path, _ in map(_split, own) if ".".join(path) not in modules), None)
    if path is None:  # the modules are there, and what follows them differs
        return [("", "")]
    allowed = _WRAPPERS | set(empty.base_model_prefix.split("."))
    found: dict[tuple[str, str], None] = {}
    for module in (name.split(".") for name in modules):
        alike = 0
        while alike < min(len(path), len(module)) and path[-1 - alike] == module[-1 - alike]:
            alike += 1
        before, after = path[: len(path) - alike], module[: len(module) - alike]
        if alike and allowed.issuperset((*before, *after)):
            found[".".join(before), ".".join(after)] = None
    return list(found)


def _rename(
    empty: PreTrainedModel, config: Mapping[str, Any], names: Iterable[str], renaming: tuple[str, str]
) -> tuple[dict[str, str], dict[str, Any]]:
    """The names of weights and the configuration, under the model's beginning instead of the adapter's."""
    from peft import PeftConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    modules = dict(empty.named_modules())
    before, after = (f"{part}." if part else "" for part in renaming)

    def moved(path: str) -> str:
        new = after + path.removeprefix(before) if path.startswith(before) else path
        return new if new in modules else path

    renamed, tuned = {}, {}
    for name in names:
        if name.startswith(_SHARED):
            renamed[name] = name
            continue
        path, rest = _split(name)
        old = ".".join(path)
        renamed[name] = _PEFT + ".".join((moved(old), *rest))
        if rest[0].startswith(_TUNED):
            tuned[old] = moved(old)
    if config.get("target_modules") not in (None, "all-linear"):
        settings = PeftConfig.from_peft_type(**config)
        asked = (before + name.removeprefix(after) for name in modules if name.startswith(after))
        tuned |= {old: moved(old) for old in asked if check_target_module_exists(settings, old)}
    return renamed, dict(config) | _renamed_settings(config, tuned, modules, moved)


def _renamed_settings(
    config: Mapping[str, Any], tuned: Mapping[str, str], modules: Mapping[str, Any], moved: Callable[[str], str]
) -> dict[str, Any]:
    """The settings that name modules, with the tuned modules' names instead of patterns for those that they had."""
    from peft.utils.other import get_pattern_key

    def matches(path: str, asked: Any) -> bool:
        if isinstance(asked, str):
            return re.fullmatch(asked, path) is not None
        return any(path == name or path.endswith(f".{name}") for name in asked)

    plain = {old: new for old, new in tuned.items() if hasattr(modules.get(new), "weight")}  # fused experts have none
    settings: dict[str, Any] = {"target_modules": sorted(plain.values())}
    settings |= dict.fromkeys(("layers_to_transform", "layers_pattern", "exclude_modules"))
    if asked := config.get("feedforward_modules"):
        settings["feedforward_modules"] = sorted(new for old, new in plain.items() if matches(old, asked))
    for name in ("rank_pattern", "alpha_pattern"):
        if pattern := config.get(name):
            keys = {old: get_pattern_key(list(pattern), old) for old in tuned}
            settings[name] = {tuned[old]: pattern[key] for old, key in keys.items() if key in pattern}
    for name in ("modules_to_save", "target_parameters"):
        if isinstance(listed := config.get(name), list):
            settings[name] = [moved(str(one)) for one in listed]
    if isinstance(tokens := config.get("trainable_token_indices"), dict):
        settings["trainable_token_indices"] = {moved(name): indices for name, indices in tokens.items()}
    return {name: value for name, value in settings.items() if name in config}


def _check_start(given: str, fit: Fit) -> None:
    """Refuse an adapter without weights for modules that would then keep random ones."""
    starts = ("init_lora_weights", "init_weights", "init_ia3_weights")
    if fit.missing and any(fit.config.get(start) is False for start in starts):
        raise InputError(
            f"The adapter {given!r} has no weights for {fit.missing[0]}, which its configuration asks for and "
            "begins with random ones; save it again whole."
        )


def _check_shared(given: str, fit: Fit, empty: PreTrainedModel) -> None:
    """Refuse an adapter of weights that two modules share, as tied ends do: merging it would change both."""
    shared = shared_weights(empty)
    tuned = (_path(name) for name in fit.names.values() if _split(name)[1][0].startswith("lora_"))
    tied = next((path for path in tuned if path in shared), None)
    if tied is not None:
        raise InputError(
            f"The adapter {given!r} changes {tied}, whose weights are also those of {shared[tied]}, so merging it "
            "would change both; train it without, or untie the two first."
        )
