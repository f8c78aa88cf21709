"""Open a model from a folder, the hub, or memory: safetensors only, remote code only when asked for, errors by name."""

import json
import sys
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.utils import cached_file

from probe.errors import LoadError


def load_model(
    source: str, dtype: torch.dtype | str, device_map: Any, trust_remote_code: bool, revision: str | None
) -> nn.Module:
    """The model at a local folder or hub id, in evaluation mode.

    Raises LoadError for a folder with no config.json, with pickled weights only, with an unknown architecture, or
    with weights that are not numbers.
    """
    folder = Path(source)
    if folder.exists():
        _inspect(folder, trust_remote_code)
    elif source.startswith((".", "/", "~")):
        raise LoadError(f"there is no model folder at {source}")
    try:
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, revision=revision)
        architecture = (
            getattr(transformers, (config.architectures or [""])[0], None) or transformers.AutoModelForImageTextToText
        )
        model = architecture.from_pretrained(
            source, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code, revision=revision,
            use_safetensors=True,
        )  # fmt: skip
    except (OSError, ValueError, KeyError) as error:
        raise LoadError(f"{source} cannot be opened: {_first_sentence(error)}") from error
    except Exception as error:  # safetensors raises its own class for a damaged file
        if type(error).__name__ != "SafetensorError":
            raise
        raise LoadError(f"the weights in {source} are damaged: {_first_sentence(error)}") from error
    _refuse_broken_weights(model, source)
    return model.eval()


def _inspect(folder: Path, trust_remote_code: bool) -> None:
    if not (folder / "config.json").is_file():
        raise LoadError(f"{folder} has no config.json: a folder written by save_pretrained was expected")
    try:
        config = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise LoadError(f"{folder / 'config.json'} is not valid JSON: {error}") from error
    model_type = config.get("model_type", "")
    if config.get("auto_map") and not trust_remote_code:
        raise LoadError(
            f"{folder} needs code that it brings along: read that code, then pass trust_remote_code=True (--trust-remote-code)"
        )
    if model_type not in transformers.CONFIG_MAPPING:
        raise LoadError(
            f"transformers {transformers.__version__} does not know the architecture {model_type!r} of {folder}: "
            f"a newer transformers or a model of a known architecture is needed"
        )
    if not list(folder.glob("*.safetensors")):
        pickled = [path.name for path in (*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth"))]
        found = f"only pickled weights ({', '.join(pickled)})" if pickled else "no weights"
        raise LoadError(f"{folder} has {found}: weights are read from safetensors only (save_pretrained writes them)")


def _refuse_broken_weights(model: nn.Module, source: str) -> None:
    for name, weight in model.named_parameters():
        if not weight.is_meta and not torch.isfinite(weight).all():
            raise LoadError(f"the weight {name} of {source} holds values that are not numbers: the file is damaged")


def _first_sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text.split(". ")[0][:300]


def load_processor(source: str, trust_remote_code: bool, revision: str | None, words_only: bool = False) -> Any:
    """The processor at a folder or hub id; its tokenizer alone where the model is text-only, or with `words_only`.

    transformers' video processors need torchvision. Where it is not installed, the processor is built from its picture
    and text parts, and refuses videos.
    """
    options = {"trust_remote_code": trust_remote_code, "revision": revision}
    try:
        if words_only:
            return transformers.AutoTokenizer.from_pretrained(source, **options)
        return transformers.AutoProcessor.from_pretrained(source, **options)
    except (ImportError, TypeError, ValueError, OSError, AttributeError, RecursionError) as error:
        found = None if words_only else _without_video(source, options)
        if found is None:
            raise LoadError(f"the processor in {source} cannot be opened: {_first_sentence(error)}") from error
        return found


def _without_video(source: str, options: dict[str, Any]) -> Any:
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
        name = tokenizer.init_kwargs.get("processor_class") or _processor_class(source)
        if not name or not hasattr(transformers, name):
            return None
        wanted = processor_class(name)
        images = transformers.AutoImageProcessor.from_pretrained(source, backend="pil", **options)
    except (ImportError, TypeError, ValueError, OSError):
        return None
    template = getattr(tokenizer, "chat_template", None) or _chat_template(source)
    known = set(signature(wanted.__init__).parameters) - {
        "chat_template", "image_processor", "tokenizer", "video_processor", "feature_extractor",
    }  # fmt: skip
    settings = {key: value for key, value in _settings(source).items() if key in known}
    parts: dict[str, Any] = {"image_processor": images, "tokenizer": tokenizer}
    if "feature_extractor" in wanted.get_attributes():
        parts["feature_extractor"] = transformers.AutoFeatureExtractor.from_pretrained(source, **options)
    if "video_processor" in wanted.get_attributes():
        wanted, parts["video_processor"] = picture_only(wanted), None
    return wanted(**parts, chat_template=template, **settings)


def processor_class(name: str) -> Any:
    """A processor class of transformers by its name, Pixtral's too where torchvision is not installed.

    Pixtral's processor imports one size computation from a module that needs torchvision; the same function stands in
    the Pillow module beside it, which takes that module's place during the import.
    """
    if name != "PixtralProcessor" or find_spec("torchvision"):
        return getattr(transformers, name)
    package = "transformers.models.pixtral"
    hidden = f"{package}.image_processing_pixtral"
    before = sys.modules.get(hidden)
    sys.modules[hidden] = import_module(f"{package}.image_processing_pil_pixtral")
    try:
        return import_module(f"{package}.processing_pixtral").PixtralProcessor
    finally:
        del sys.modules[hidden]
        if before is not None:
            sys.modules[hidden] = before


def picture_only(processor_class: Any) -> Any:
    """The same processor class, content to have no video processor."""

    def check(self: Any, argument: str, value: Any) -> Any:
        if "video" in argument and value is None:
            return type(None)
        return processor_class.check_argument_for_proper_class(self, argument, value)

    made = type(processor_class.__name__, (processor_class,), {"check_argument_for_proper_class": check})
    made.__module__ = processor_class.__module__
    return made


def _processor_class(source: str) -> str | None:
    return _settings(source).get("processor_class")


def _settings(source: str) -> dict[str, Any]:
    """What the folder's own files say of its processor; the hub's cache is asked where the source is no folder."""
    found: dict[str, Any] = {}
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
        if path:
            found |= json.loads(Path(path).read_text())
    return found


def _chat_template(source: str) -> str | None:
    path = cached_file(source, "chat_template.jinja", _raise_exceptions_for_missing_entries=False)
    return Path(path).read_text() if path else None


# --- the bundled models ---


def _demo_models() -> Path | None:
    spec = find_spec("studies.demo")
    return Path(spec.submodule_search_locations[0]) / "checkpoints" if spec and spec.submodule_search_locations else None


def _demo_names(folder: Path) -> list[str]:
    known = sorted(path.parent.name for path in folder.glob("*/config.json"))
    return [f"demo:{item}" if item != "joint" else "demo" for item in known]


def demo_folder(name: str) -> str:
    """The folder of `demo` or `demo:NAME`. Raises LoadError with what there is where there is no such model."""
    folder = _demo_models()
    if folder is None:
        raise LoadError("the demo models are part of the sightline distribution, which is not installed here")
    model = name.partition(":")[2] or "joint"
    if not (folder / model / "config.json").is_file():
        raise LoadError(f"there is no demo model {name!r} (there is {', '.join(_demo_names(folder))})")
    return str(folder / model)


def refuse_near_demo(name: str) -> None:
    """Raises LoadError for a slip of the keyboard in a demo model's name, before a hub is asked for it."""
    folder = _demo_models()
    if "/" in name or Path(name).exists() or folder is None:
        return
    if near := get_close_matches(name, ["demo", *_demo_names(folder)], 1, 0.7):
        raise LoadError(f"there is no model {name!r} (did you mean {near[0]!r}?)")
