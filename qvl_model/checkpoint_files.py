"""Reading the files of a checkpoint directory as data, never as code, and without requests to a server.

transformers runs Python files that a checkpoint names (``auto_map``) if the user agrees, and prompts on the terminal.
Besides, the tokenizer's config may name any class of transformers to load the directory, and some classes prompt again.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file

from qvl_model.config_check import check_config, check_parts

__all__ = ["check_attention", "check_attention_names", "load_config", "load_tokenizer", "one_line", "read_mapping"]

MODEL_TYPES = ("qwen3_vl", "qvl")
_ATTENTION = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
_ELSEWHERE = (
    " asks for attention code from elsewhere ({name}), and qvl runs no code that a checkpoint names; take "
    "attn_implementation out of it"
)
_OF_THE_HUB = ("cache_dir", "local_files_only", "revision", "subfolder", "token")
_OF_THE_BASE = ("cache_dir", "local_files_only", "token")
_ANY = (
    AttributeError,
    IndexError,
    KeyError,
    TypeError,
    StrictDataclassError,
)  # transformers checks little of what it reads


def load_config(path: str | os.PathLike) -> PreTrainedConfig:
    """The config of a checkpoint directory.

    Raises: OSError without config.json; ValueError for another model, for settings that are none of the model, and if
        code from elsewhere would have to run.
    Example:
        >>> load_config(path).model_type
        'qwen3_vl'
    """
    file = Path(path) / "config.json"
    values = read_mapping(file)
    model_type = values.get("model_type")
    if model_type not in MODEL_TYPES:
        needs = (
            " Its own Python code (auto_map) would build it, and qvl runs no code from checkpoints: load it with "
            "transformers if you trust it"
            if "auto_map" in values
            else ""
        )
        raise ValueError(f"{path} is a {model_type} model; qvl runs {' and '.join(MODEL_TYPES)}.{needs}")
    _check_attention(file, values)
    try:
        check_parts(values)
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        check_config(config)
    except (*_ANY, ValueError, OverflowError) as error:
        raise ValueError(f"{file} does not fit a {model_type} model: {one_line(error)}") from error
    return config


def check_attention(path: str | os.PathLike, **options: Any) -> None:
    """Refuses a checkpoint whose config.json names attention code of the Hugging Face hub, which transformers would
    fetch and run, or whose adapter is for such a checkpoint.

    Args:
        path, options: as ``from_pretrained`` takes them.
    Raises: ValueError, also for GGUF files.
    """
    if options.get("gguf_file") is not None or str(path).endswith(".gguf"):
        raise ValueError(f"{path}: qvl does not load GGUF files; give the safetensors that they were made from")
    if isinstance(options.get("attn_implementation"), str) or options.get("config") is not None:
        return  # the caller's own choice
    try:
        values, _ = PreTrainedConfig.get_config_dict(path, **{k: v for k, v in options.items() if k in _OF_THE_HUB})
    except OSError:
        values = {}  # there is no config.json
    _check_attention(Path(path) / "config.json", values)
    base = _base_of_adapter(path, options)
    if base is not None and base != str(path):
        check_attention(base, **{name: value for name, value in options.items() if name in _OF_THE_BASE})


def check_attention_names(config: PreTrainedConfig) -> None:
    """The same of a config that was read, once the caller's choice is in it. Raises: ValueError."""
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        name = getattr(part, "_attn_implementation", None)
        if isinstance(name, str) and "/" in name:
            raise ValueError(f"{config.name_or_path}/config.json{_ELSEWHERE.format(name=name)}")


def _base_of_adapter(path: str | os.PathLike, options: Mapping) -> str | None:
    """The checkpoint that transformers loads below the adapter at ``path``, or None if there is no adapter."""
    try:
        file = find_adapter_config_file(str(path), **{k: v for k, v in options.items() if k in _OF_THE_HUB})
        base = None if file is None else read_mapping(Path(file)).get("base_model_name_or_path")
    except (OSError, ValueError):
        return None
    return base if isinstance(base, str) else None


def _check_attention(file: Path, values: Mapping) -> None:
    for key, value in values.items():
        if key in _ATTENTION:
            for name in value.values() if isinstance(value, dict) else [value]:
                if name is not None and not isinstance(name, str):
                    raise ValueError(f"{file}: {key} must be a text, got {name!r}")
                if name is not None and "/" in name:
                    raise ValueError(f"{file}{_ELSEWHERE.format(name=name)}")
        elif isinstance(value, dict):
            _check_attention(file, value)


def load_tokenizer(path: str | os.PathLike) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint directory, as AutoTokenizer finds it.

    Raises: OSError for missing files; ValueError for files of the wrong shape, and if code from the checkpoint would
    have to run.
    """
    for file in (Path(path) / "tokenizer_config.json", Path(path) / "config.json"):
        name = read_mapping(file).get("tokenizer_class") if file.is_file() else None
        if isinstance(name, str):
            _check_tokenizer_class(file, name)
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except _ANY as error:
        raise ValueError(f"the tokenizer of {path} cannot be read: {one_line(error)}") from error
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"the tokenizer of {path} is Python code in the checkpoint (auto_map in tokenizer_config.json), and qvl "
            f"runs no code from "
            "checkpoints; put a tokenizer.json there, and a tokenizer_class of transformers"
        ) from error


def _check_tokenizer_class(file: Path, name: str) -> None:
    """Raises ValueError for a class of transformers that is no tokenizer, since it would load other files of the
    directory.
    """
    for candidate in (name, name.removesuffix("Fast")):
        found = getattr(transformers, candidate, None)
        if found is not None and not (isinstance(found, type) and issubclass(found, PreTrainedTokenizerBase)):
            raise ValueError(f"{file} names the tokenizer_class {name}, which is no tokenizer that can be loaded here")


def read_mapping(file: Path) -> dict:
    """A JSON file that holds a mapping. Raises: OSError for no file, ValueError for another one."""
    try:
        values = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} must hold a mapping, got a {type(values).__name__}")
    return values


def one_line(error: Exception) -> str:
    """The message of an error on one line, without advice to look on a server or to run code from a pickle."""
    if isinstance(error, UnpicklingError):
        return (
            "its weights are pickled with more than tensors, and qvl runs no code from checkpoints; save them as "
            "safetensors"
        )
    sentences = re.split(r"(?<=[.!?])\s+", " ".join(str(error).split()))
    return " ".join(sentence for sentence in sentences if not re.search(r"huggingface\.co|hf\.co", sentence))
