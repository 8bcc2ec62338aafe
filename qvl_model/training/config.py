"""The configuration of a training run: a YAML file of five groups, each key typed, checked and documented here."""

import dataclasses
import math
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qvl_model import digits
from qvl_model.yaml_file import Loader

__all__ = [
    "ConfigError",
    "DataConfig",
    "ModelConfig",
    "OptimizerConfig",
    "OutputConfig",
    "RunConfig",
    "TrainConfig",
    "describe_keys",
]


class ConfigError(ValueError):
    """A configuration (or a directory that it names) that cannot be trained; the message says what to change."""


def _key(
    default: Any,
    doc: str,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    one_of: tuple[str, ...] | None = None,
    path: bool = False,
    names: dict[str, Path] | None = None,
) -> Any:
    meta = dict(doc=doc, low=low, above=above, high=high, one_of=one_of, path=path, names=names or {})
    return dataclasses.field(default=default, metadata=meta)


@dataclass
class ModelConfig:
    path: str | None = _key(
        None,
        "checkpoint directory, as save_pretrained writes it, or a model that ships: digits (default), qvl-tiny",
        path=True,
        names=digits.SHIPPED,
    )
    random_weights: bool = _key(False, "start from random weights; config and processor are still those of `path`")
    accelerate: bool = _key(True, "run on qvl's kernels; false trains the stock model")
    attention_dropout: float | None = _key(
        None, "dropout of attention probabilities (default: as the checkpoint's config says)", low=0, high=0.9
    )
    hidden_dropout: float | None = _key(
        None, "dropout of hidden states, for models that have it (default: as the config says)", low=0, high=0.9
    )


@dataclass
class DataConfig:
    train: str = _key(
        None, "JSONL file, or the directory of a Hugging Face dataset (save_to_disk, Parquet, ...)", path=True
    )
    validation: str | None = _key(None, "the same for validation", path=True)
    images: str | None = _key(
        None, "folder that relative image paths start from (default: the folder of the JSONL file)", path=True
    )
    split: str | None = _key(None, "split to train on, when the directory holds several")
    columns: dict[str, str] | None = _key(None, "our name of a column: its name in the data, such as `question: query`")
    max_length: int = _key(2048, "longest row in tokens, images included; longer rows are skipped and reported", low=2)
    decode: bool = _key(
        True, "decode every image before training starts, to find broken ones; false reads their headers only"
    )


@dataclass
class OptimizerConfig:
    learning_rate: float = _key(1e-5, "peak learning rate of AdamW", above=0)
    schedule: str = _key("cosine", "shape after the warm-up", one_of=("cosine", "linear", "constant_with_warmup"))
    warmup: float = _key(0.03, "warm-up: a share of all steps if below 1, else a number of steps", low=0)
    weight_decay: float = _key(0.01, "decay of weight matrices; norms, biases and gates are never decayed", low=0)
    beta1: float = _key(0.9, "AdamW's first beta", low=0, high=0.999999)
    beta2: float = _key(0.95, "AdamW's second beta", low=0, high=0.999999)
    epsilon: float = _key(1e-8, "AdamW's epsilon", above=0)
    max_grad_norm: float = _key(1.0, "gradients are scaled down to this norm; 0 leaves them alone", low=0)


@dataclass
class RunConfig:
    steps: int | None = _key(None, "optimizer steps (give this or epochs)", low=1)
    epochs: float | None = _key(None, "passes over the data (give this or steps)", above=0)
    batch_size: int = _key(1, "rows per device and forward pass", low=1)
    accumulation: int = _key(8, "forward passes per optimizer step", low=1)
    precision: str = _key(
        "auto",
        "fp16 (loss scaling, GPU only), bf16 (autocast) or fp32; auto: fp16 on a GPU, bf16 on a CPU; "
        "weights and optimizer are fp32 in all",
        one_of=("auto", "fp16", "bf16", "fp32"),
    )
    gradient_checkpointing: bool = _key(False, "recompute activations in the backward pass, for memory")
    sharding: str = _key(
        "ddp",
        "under torchrun: ddp (a copy per rank) or fsdp (FSDP2: parameters, gradients, optimizer sharded)",
        one_of=("ddp", "fsdp"),
    )
    device: str = _key("auto", "auto takes a GPU if there is one", one_of=("auto", "cpu", "cuda"))
    workers: int = _key(0, "processes per device that load and prepare rows", low=0)
    seed: int = _key(0, "seed of data order, dropout and random weights", low=0)


@dataclass
class OutputConfig:
    directory: str = _key(
        None, "checkpoints, log.jsonl, skipped rows; the trained model ends up in `final` below it", path=True
    )
    log_every: int = _key(10, "steps between lines of the log", low=1)
    save_every: int = _key(
        500, "steps between checkpoints; a multiple of log_every, so that a resumed run logs the same curve", low=1
    )
    keep: int | None = _key(2, "checkpoints kept (null: all)", low=1)
    evaluate_every: int | None = _key(None, "steps between validations (default: save_every)", low=1)
    capacity_every: int = _key(
        500, "steps between capacity checks, which also run before the first and after the last step", low=1
    )
    tensorboard: bool = _key(
        False, "write TensorBoard events into `tensorboard` below the directory (pip install tensorboard)"
    )
    progress: bool = _key(True, "show a progress bar")


@dataclass
class TrainConfig:
    """A training run.

    Example:
        >>> config = TrainConfig.from_yaml("train.yaml")
        >>> config = TrainConfig.from_dict({"data": {"train": "rows.jsonl"}, "run": {"steps": 100}, "output":
        {"directory": "out"}})
    """

    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    run: RunConfig
    output: OutputConfig

    @classmethod
    def from_yaml(cls, file: str | Path) -> "TrainConfig":
        """Reads a YAML file; relative paths in it start from its own folder.

        Raises: ConfigError for unreadable files, unknown, repeated or missing keys, wrong types and impossible values.
        """
        file = Path(file)
        try:
            values = yaml.load(file.read_text(), Loader)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file} cannot be read: {error}") from error
        except yaml.YAMLError as error:
            raise ConfigError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from error
        try:
            return cls.from_dict(values, file.parent)
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from error

    @classmethod
    def from_dict(cls, values: dict, folder: str | Path = ".") -> "TrainConfig":
        """The same from a dictionary of groups; relative paths start from ``folder``. Raises: ConfigError as above."""
        groups: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(cls)}
        if not isinstance(values, dict):
            raise ConfigError(f"expected the groups {', '.join(groups)}, got {_shown(values)}")
        _refuse_unknown(values, groups, "")
        config = cls(**{name: _group(kind, values.get(name), name, Path(folder)) for name, kind in groups.items()})
        config.check()
        return config

    def check(self) -> None:
        """Raises ConfigError for combinations of values that are not allowed."""
        if (self.run.steps is None) == (self.run.epochs is None):
            raise ConfigError("give exactly one of run.steps and run.epochs")
        if self.output.save_every % self.output.log_every:
            raise ConfigError(
                f"output.save_every ({self.output.save_every}) must be a multiple of output.log_every "
                f"({self.output.log_every}), "
                "or a resumed run would log another curve than an uninterrupted one"
            )
        if self.output.evaluate_every is not None and self.data.validation is None:
            raise ConfigError("output.evaluate_every needs data.validation")

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


def _shown(value: object) -> str:
    return f"{value!r} ({type(value).__name__})"


def _refuse_unknown(values: dict, known: typing.Iterable[str], group: str) -> None:
    for key in values:
        if key not in known:
            raise ConfigError(f"unknown key {group}{key}; known are {', '.join(known)}")


def _group(kind: type, values: object, name: str, folder: Path) -> Any:
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{name} must be a group of keys, got {_shown(values)}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    _refuse_unknown(values, fields, f"{name}.")
    result = {}
    for key, field in fields.items():
        required = field.default is None and field.type is str
        if required and values.get(key) is None:
            raise ConfigError(f"{name}.{key} is missing: {field.metadata['doc']}")
        result[key] = _checked(f"{name}.{key}", values.get(key, field.default), field, folder)
    return kind(**result)


def _checked(name: str, value: Any, field: dataclasses.Field, folder: Path) -> Any:
    options = typing.get_args(field.type) if isinstance(field.type, types.UnionType) else (field.type,)
    if value is None and types.NoneType in options:
        return None
    kind = options[0]
    if typing.get_origin(kind) is dict:
        if not isinstance(value, dict) or not all(isinstance(item, str) for pair in value.items() for item in pair):
            raise ConfigError(f"{name} must map names to names, got {_shown(value)}")
        return dict(value)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise ConfigError(
            f"{name} must be {_NAMES[kind]}{' or null' if types.NoneType in options else ''}, got {_shown(value)}"
        )
    meta = field.metadata
    for wrong, rule in (
        (
            meta["one_of"] is not None and value not in (meta["one_of"] or ()),
            f"one of {', '.join(meta['one_of'] or ())}",
        ),
        (meta["low"] is not None and value < (meta["low"] or 0), f"at least {meta['low']}"),
        (meta["above"] is not None and value <= (meta["above"] or 0), f"above {meta['above']}"),
        (meta["high"] is not None and value > (meta["high"] or 0), f"at most {meta['high']}"),
    ):
        if wrong:
            raise ConfigError(f"{name} must be {rule}, got {value!r}")
    if not meta["path"]:
        return value
    path = folder / Path(value).expanduser()
    return str(path if (path / "config.json").is_file() else meta["names"].get(value, path))


_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def describe_keys() -> str:
    """Every key with its default and meaning, as ``qvl train --keys`` prints them."""
    lines = []
    for group in dataclasses.fields(TrainConfig):
        lines.append(f"{group.name}:")
        kind: Any = group.type
        for field in dataclasses.fields(kind):
            default = (
                "required"
                if field.default is None and field.type is str
                else yaml.safe_dump(field.default).split("\n")[0]
            )
            lines.append(f"  {field.name}: {default}".ljust(36) + f"# {field.metadata['doc']}{_limits(field)}")
    return "\n".join(lines)


def _limits(field: dataclasses.Field) -> str:
    one_of = field.metadata["one_of"]
    return f" ({' | '.join(one_of)})" if one_of else ""
