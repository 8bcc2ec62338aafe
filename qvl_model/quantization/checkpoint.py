"""Quantised models on disk: the format, what ``save_pretrained`` writes, and what ``qvl_model.pretrained`` reads.

A directory holds ``packed.safetensors`` with all tensors under their names in ``state_dict``, shared ones under the
first of their names, and ``config.json``, whose ``quantization_config`` says how to read them:

    {"quant_method": "qvl", "version": 1, "weights": {"text": "int4", "vision": "int8"}, "group": 64, "id": "5f0c..."}

Version 2 is written where int4 layers have zero-points (``weight_zeros`` beside ``weight_values`` and
``weight_scales``) or fp16 scales, which readers of version 1 do not know; version 1 otherwise. Both are read.

The metadata of the tensors holds the same version and id. Other loaders report that they find no weights.
"""

import copy
import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from qvl_kernels import checks, quantization
from qvl_model.quantization import calibration_set, scaling
from qvl_model.quantization.convert import (
    METHOD,
    base_modules,
    is_quantized,
    part_of,
    quantized_elements,
    tied_pairs,
    without_weights,
)
from qvl_model.quantization.modules import PackedEmbedding, PackedLinear
from qvl_model.quantization.weight import DequantizedWeight

__all__ = ["QuantizedSaving", "copy_files", "fill", "published", "read", "save"]

VERSIONS, FILE = (1, 2), "packed.safetensors"
AGAIN = "quantise it again"
_ABOUT_LAYOUT = (
    "max_shard_size",
    "save_original_format",
    "save_peft_format",
    "safe_serialization",
)  # arguments about the layout of dense checkpoints
# Beside the weights: tokenizer, processor, chat template, licence.
_COPIED = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "additional_chat_templates")
_NOT_COPIED = ("config.json", "generation_config.json")


class QuantizedSaving:
    """Mixin of model classes whose linear layers may be quantised: overrides methods of transformers' models."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """``.to`` and the like, after which tied weights are tied again."""
        tied = tied_pairs(self)
        super()._apply(fn, recurse)
        for embedding, head in tied:
            embedding.weight = head.weight
        return self

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As transformers' own, which makes a new head; it is quantised as the old one was. Remaining rows keep their
        values and scales bit for bit.
        """
        head = self.get_output_embeddings()
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        new = self.get_output_embeddings()
        if isinstance(head, PackedLinear) and new is not head:
            if isinstance(new.weight, DequantizedWeight):  # tied to the embedding
                head.weight = new.weight
            else:
                head.weight.data = new.weight.data
            head.bias, head.out_features = new.bias, new.out_features
            self.set_output_embeddings(head)
        return embeddings

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """As transformers' own, including the elements of quantised weights, which are not trainable."""
        count = super().num_parameters(only_trainable=only_trainable, exclude_embeddings=exclude_embeddings)
        return count if only_trainable else count + quantized_elements(self, exclude_embeddings=exclude_embeddings)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        **kwargs: Any,
    ) -> None:
        """As transformers' own; a quantised model is written in the format of this module, in one file."""
        if getattr(self, "_hf_peft_config_loaded", False) or not is_quantized(self):
            return super().save_pretrained(
                save_directory, is_main_process=is_main_process, state_dict=state_dict, **kwargs
            )
        refused = sorted(name for name, value in kwargs.items() if value and name not in _ABOUT_LAYOUT)
        if refused:
            raise TypeError(
                f"save_pretrained: quantised weights are written as one file in a local directory; it takes no "
                f"{', '.join(refused)}"
            )
        if is_main_process:
            with published(Path(save_directory)) as folder:
                save(self, folder, state_dict=state_dict)


def save(model: PreTrainedModel, folder: Path, *, state_dict: Mapping[str, Tensor] | None = None) -> None:
    """Writes a quantised model into a folder; ``state_dict``: its tensors, if not ``model.state_dict()``.

    Raises: ValueError for a model without quantised layers, and for tensors that are not in a model of this class.
    """
    state_dict = model.state_dict() if state_dict is None else state_dict
    _check_names(model, state_dict)
    tensors, shared = _distinct(state_dict)
    section = {"quant_method": METHOD, "version": _version(model), **_formats(model), "id": secrets.token_hex(8)}
    if calibration_set.recorded(model) is not None:
        section["calibration"] = calibration_set.recorded(model)
    config = copy.deepcopy(model.config)
    config.dtype, config.architectures = str(model.dtype).removeprefix("torch."), [type(model).__name__]
    config.quantization_config = section
    save_file(
        tensors,
        folder / FILE,
        {"format": "pt", "qvl": str(section["version"]), "id": section["id"], "shared": json.dumps(shared)},
    )
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _check_names(model: PreTrainedModel, state: Mapping[str, Tensor]) -> None:
    module_names = {name for name, _ in without_weights(model).named_modules()}
    foreign = sorted(name for name in state if name.rpartition(".")[0] not in module_names)
    if foreign:
        raise ValueError(
            f"save: {foreign[0]} and {len(foreign) - 1} other tensors are no part of a plain "
            f"{type(model).__name__}. Adapters: save them through PEFT, or "
            "merge_and_unload first. Modules of your own: save their state_dict beside the model, and pass a "
            "state_dict without them"
        )


def _version(model: nn.Module) -> int:
    """The lowest version of the format that describes the model."""
    weights = [module.quantized for _, module in base_modules(model) if isinstance(module, PackedLinear)]
    return 2 if any(weight.zeros is not None or weight.scales.dtype == torch.float16 for weight in weights) else 1


def _formats(model: nn.Module) -> dict:
    """The entries "weights", a format per part with quantised layers, and "group", inputs per int4 scale."""
    formats, groups = {}, set()
    for name, module in base_modules(model):
        if isinstance(module, PackedLinear):
            quantized = module.quantized
            formats.setdefault(part_of(model, name), set()).add(f"int{quantized.bits}")
            groups |= {quantized.group} if quantized.bits == 4 else set()
    if not formats:
        raise ValueError("save: the model has no quantised layers; save_pretrained writes it")
    return {
        "weights": {part: "/".join(sorted(found)) for part, found in formats.items()},
        "group": min(groups, default=None),
    }


def _distinct(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors on the CPU, each once; the other names of those that have several -> the first)."""
    tensors, shared, first = {}, {}, {}
    for name, tensor in state.items():
        tensor = (
            tensor.clone() if isinstance(tensor, DequantizedWeight) else tensor
        )  # a dense layer that was tied to a quantised one
        known = first.setdefault(
            (tensor.device, tensor.data_ptr(), tensor.shape, tensor.dtype) if tensor.numel() else name, name
        )
        if known == name:
            tensors[name] = tensor.detach().cpu().contiguous()
        else:
            shared[name] = known
    return tensors, shared


def copy_files(source: Path, target: Path) -> None:
    """Copies what a checkpoint has beside its weights: tokenizer, processor, chat template, licence."""
    for pattern in _COPIED:
        for path in source.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, target / path.name)
            elif path.name not in _NOT_COPIED and not path.name.endswith(".index.json"):
                shutil.copy(path, target)


@contextmanager
def published(directory: Path) -> Iterator[Path]:
    """A temporary directory whose files appear in ``directory`` when the block ends, and vanish if it fails.

    A directory that did not exist appears complete or not at all. In one that did, files are replaced one by one,
    config.json last; if that is interrupted, the old config does not match the new tensors, and ``read`` refuses them.
    Raises: ValueError if ``directory`` is a file, or if another process is writing there.
    """
    directory = directory.absolute()
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file; give a directory")
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.parent / f".{directory.name}.tmp"
    handle = _claimed(temporary, directory)
    try:
        for path in temporary.iterdir():  # of a process that was killed
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield temporary
        for path in temporary.rglob("*"):
            path.chmod((0o777 if path.is_dir() else 0o666) & ~_umask())  # some writers give access to the owner only
            _to_disk(path)
        if directory.exists() and any(directory.iterdir()):
            for path in sorted(temporary.iterdir(), key=lambda path: path.name == "config.json"):
                if path.is_dir():
                    shutil.rmtree(directory / path.name, ignore_errors=True)
                path.replace(directory / path.name)
        else:
            temporary.replace(directory)
        _to_disk(directory.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(handle)


def _claimed(temporary: Path, directory: Path) -> int:
    """A handle of the temporary directory, locked as long as it is open; it is the only one.

    Raises: ValueError if another process has it.
    """
    while True:
        temporary.mkdir(exist_ok=True)
        handle = os.open(temporary, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle), os.stat(temporary)):
                return handle
        except FileNotFoundError:  # the other one has just ended
            pass
        except BlockingIOError as error:
            os.close(handle)
            raise ValueError(f"another process is writing to {directory}; give another directory") from error
        os.close(handle)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read(path: Path, section: dict) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, mapped; other names -> the name of their tensor) of a directory whose config has ``section``.

    Raises: ValueError for files that are damaged, missing, of another version, or do not belong together.
    """
    file = path / FILE
    version = section.get("version")
    if version not in VERSIONS:
        raise ValueError(
            f"{path} was quantised in version {version} of the format, this qvl reads versions "
            f"{' and '.join(map(str, VERSIONS))}; quantise it again, or update qvl"
        )
    if not file.is_file():
        raise ValueError(f"{path} has no {FILE}; quantise it again")
    try:
        with safe_open(file, "pt") as stream:
            metadata = stream.metadata() or {}
            if metadata.get("qvl") != str(version) or metadata.get("id") != section.get("id"):
                raise ValueError(
                    f"{file} is not the one that {path}/config.json was written with (a save that was cut short?); "
                    f"quantise it again"
                )
            return {name: stream.get_tensor(name) for name in stream.keys()}, json.loads(metadata["shared"])
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}); quantise it again") from error


def convert_layers(model: PreTrainedModel, tensors: dict[str, Tensor], path: Path, advice: str = AGAIN) -> None:
    """Makes the linear layers and embeddings of a model quantised whose quantised weights are in ``tensors``.

    Raises: ValueError for tensors that do not fit the model; it ends with ``advice``.
    """
    modules = dict(model.named_modules())
    for name in [name.removesuffix(".weight_values") for name in tensors if name.endswith(".weight_values")]:
        module, scales = modules.get(name), tensors.get(f"{name}.weight_scales")
        kind = PackedLinear if isinstance(module, nn.Linear) else PackedEmbedding
        if scales is None or not isinstance(module, nn.Linear | nn.Embedding):
            raise ValueError(
                f"{path}: {name} is quantised, and "
                f"{'its scales are missing' if scales is None else 'config.json has no such layer'}; {advice}"
            )
        quantized = quantization.QuantizedWeight(
            tensors[f"{name}.weight_values"], scales, module.weight.shape[1], tensors.get(f"{name}.weight_zeros")
        )
        try:
            quantization.check_weight(name, quantized, torch.device("cpu"))
            checks.check_shape(name, "weight", quantized.values, (module.weight.shape[0], quantized.values.shape[1]))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} does not fit its config.json: {error}; {advice}") from error
        kind.convert(module, quantized)
        if isinstance(module, nn.Linear):
            found = {own: tensors[f"{name}.{own}"] for own in scaling.BUFFERS if f"{name}.{own}" in tensors}
            try:
                scaling.load(module, found)
            except ValueError as error:
                raise ValueError(f"{path} does not fit its config.json: {name}.{error}; {advice}") from error
    scaling.attach(modules)


def check_names(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor], path: Path, advice: str = AGAIN) -> None:
    """Raises: ValueError unless the tensors have the names and shapes of ``wanted``, the ``state_dict`` of a model."""
    for what, names in (
        ("lacks", wanted.keys() - tensors.keys()),
        ("has, without a place for it in the model,", tensors.keys() - wanted.keys()),
        (
            "has in another size than config.json says",
            {name for name in wanted.keys() & tensors.keys() if wanted[name].shape != tensors[name].shape},
        ),
    ):
        if names:
            raise ValueError(f"{path} {what} {len(names)} tensors, such as {min(names)}; {advice}")


def fill(
    model: PreTrainedModel,
    tensors: dict[str, Tensor],
    shared: dict[str, str],
    dtype: torch.dtype,
    path: Path,
    advice: str = AGAIN,
) -> None:
    """Puts tensors into a model on the meta device; layers become quantised where their tensors are.

    Raises: ValueError, which ends with ``advice``, for tensors that do not fit the model.
    """
    tensors |= {name: tensors[first] for name, first in shared.items() if first in tensors}
    convert_layers(model, tensors, path, advice)
    for embedding, head in tied_pairs(model):
        embedding.weight = head.weight
    wanted = model.state_dict()
    check_names(wanted, tensors, path, advice)
    placed = {}
    for name in wanted:
        owner, _, own = name.rpartition(".")
        module, tensor = model.get_submodule(owner), tensors[name]
        if own in module._parameters:  # one Parameter for all names of a tensor
            first = shared.get(name, name)
            if first not in placed:
                placed[first] = nn.Parameter(tensor.to(dtype))
            module._parameters[own] = placed[first]
    for module in model.modules():  # small tables that no checkpoint holds
        if any(buffer is not None and buffer.is_meta for buffer in module._buffers.values()):
            for own, buffer in module._buffers.items():
                module._buffers[own] = torch.empty_like(buffer, device="cpu")
            model._init_weights(module)
