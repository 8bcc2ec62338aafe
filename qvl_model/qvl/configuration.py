"""QVLConfig: the keys of the model's specification under their names, and a few more."""

import difflib
import functools
from collections.abc import Callable
from os import PathLike
from typing import Any, TypeVar

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.utils import logging

from qvl_model.compat import CACHE_NAMES
from qvl_model.qvl import config_file
from qvl_model.qvl.presets import PRESETS

__all__ = ["QVLConfig"]

T = TypeVar("T")
logger = logging.get_logger(__name__)


def _standard_errors(cls: type[T]) -> type[T]:
    """Makes a strict dataclass raise TypeError or ValueError instead of exceptions of huggingface_hub."""

    def converting(method: Callable) -> Callable:
        @functools.wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return method(self, *args, **kwargs)
            except StrictDataclassError as error:
                kind = TypeError if isinstance(error.__cause__, TypeError) else ValueError
                raise kind(f"{cls.__name__}: {' '.join(str(error).split())}") from error

        return call

    config_class: Any = cls
    assign = config_class.__setattr__
    config_class.__setattr__ = lambda self, name, value: assign(
        self, config_class.attribute_map.get(name, name), value
    )  # values are checked by a field's own name
    for name in ("__init__", "__setattr__", "validate"):
        setattr(cls, name, converting(getattr(cls, name)))
    return cls


@_standard_errors
@strict
class QVLConfig(PreTrainedConfig):
    """Sizes and settings of a QVL model. The defaults are those of the preset ``qvl-2b``.

    Transformer:
        num_hidden_layers, num_attention_heads: of the language decoder.
        hidden_size: width; head_dim is hidden_size / num_attention_heads.
        intermediate_size: width of the SwiGLU MLP.
        hidden_act: its activation ("swish" is x sigmoid(x)).
        hidden_dropout_prob: in training, of embeddings and of the outputs of attention, cross-attention and MLP before
            the residual.
        attention_probs_dropout_prob: in training, of attention weights in the language decoder.
        max_position_embeddings: longest intended text, in tokens.
        type_vocab_size: token types: 0 text, 1 image.
        initializer_range: standard deviation of initial weights.
        layer_norm_eps: of every norm.
        vocab_size, num_key_value_heads, rope_theta, attention_bias, tie_word_embeddings: not in the specification; as
            in Qwen3-VL.
    Vision encoder:
        vision_model_type: "vit". vision_num_hidden_layers, vision_num_attention_heads, vision_hidden_size,
        vision_intermediate_size: sizes of the vision transformer.
        vision_patch_size: pixels of a patch's side.
        vision_image_size: pixels of an image side with one learned position per patch; other sizes interpolate.
        vision_num_channels, vision_hidden_act, vision_rope_theta: not in the specification.
    Multimodal:
        multimodal_fusion_type: "cross_attention".
        num_query_tokens: learned queries per image; 0 for the MLP connector, which keeps every patch.
        vision_projection_dim: width of visual tokens, the output of the connector and input of keys and values.
        language_projection_dim: width of the text's queries in cross-attention, split over num_attention_heads.
        connector_type: "attention" (num_query_tokens > 0) or "mlp" (num_query_tokens = 0).
        connector_num_layers: of the attention connector.
        cross_attention_layers: decoder layers that begin with cross-attention; None for every fourth (3, 7, ...).
        cross_attention_gate_init: initial value of the gates; a layer adds tanh(gate) * cross-attention.
        max_num_images: most images per sample, each with a learned embedding of its index.
        image_token_id: image token in the text, one per image.

    Raises: ValueError for keys that it does not have (those that transformers keeps in a config.json are no such keys),
        and for settings that contradict each other or cannot be built; TypeError for values of the wrong type. A key in
        a config.json that resembles none of these is kept as an attribute, with a warning.
    Example:
        >>> config = QVLConfig.from_preset("qvl-2b", hidden_dropout_prob=0.0)
        >>> config.to_yaml("model.yaml")
        >>> QVLConfig.from_yaml("model.yaml").num_hidden_layers
        32
    """

    model_type = "qvl"
    keys_to_ignore_at_inference = list(CACHE_NAMES)
    attribute_map = {
        "attention_dropout": "attention_probs_dropout_prob",
        "rms_norm_eps": "layer_norm_eps",
    }  # as stock modules call them

    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    hidden_size: int = 2048
    intermediate_size: int = 5632
    hidden_act: str = "swish"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    max_position_embeddings: int = 32768
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    vocab_size: int = 151936
    num_key_value_heads: int = 8
    rope_theta: float | int = 5000000.0
    attention_bias: bool = False
    tie_word_embeddings: bool = True

    vision_model_type: str = "vit"
    vision_num_hidden_layers: int = 24
    vision_num_attention_heads: int = 16
    vision_hidden_size: int = 1024
    vision_patch_size: int = 16
    vision_image_size: int = 448
    vision_intermediate_size: int = 4096
    vision_num_channels: int = 3
    vision_hidden_act: str = "gelu_pytorch_tanh"
    vision_rope_theta: float | int = 10000.0

    multimodal_fusion_type: str = "cross_attention"
    num_query_tokens: int = 256
    vision_projection_dim: int = 1024
    language_projection_dim: int = 2048
    connector_type: str = "attention"
    connector_num_layers: int = 2
    cross_attention_layers: list[int] | None = None
    cross_attention_gate_init: float | int = 0.5
    max_num_images: int = 16
    image_token_id: int | None = 151655

    use_cache: bool = True
    pad_token_id: int | None = 151643
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 151645

    def __post_init__(self, **kwargs: Any) -> None:
        if self.cross_attention_layers is None:
            self.cross_attention_layers = list(range(3, self.num_hidden_layers, 4)) or [
                max(0, self.num_hidden_layers - 1)
            ]
        for key in kwargs:
            if not self._is_known(key):
                nearest = self._nearest(key)
                hint = f"did you mean {nearest}?" if nearest else f"known are {', '.join(self._own_keys())}"
                raise ValueError(f"QVLConfig: unknown key {key}; {hint}")
        for alias, name in self.attribute_map.items():
            value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
            if alias in kwargs and value not in (default, kwargs[alias]):
                raise ValueError(f"QVLConfig: {alias} and {name} are one setting, got {kwargs[alias]} and {value}")
        super().__post_init__(**kwargs)
        self.check()

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs: Any) -> Any:
        """As PreTrainedConfig's; unknown keys are kept unless they resemble a known one. Raises: as the class."""
        return_unused = kwargs.pop("return_unused_kwargs", False)
        extra = {key: value for key, value in config_dict.items() if not cls._is_known(key)}
        for key in (*extra, *kwargs):
            if not cls._is_known(key) and cls._nearest(key):
                raise ValueError(f"QVLConfig: unknown key {key}; did you mean {cls._nearest(key)}?")
        known = {key: value for key, value in config_dict.items() if key not in extra}
        config, unused = super().from_dict(known, return_unused_kwargs=True, **kwargs)
        for key, value in extra.items():
            if key == "head_dim" and value == config.head_dim:
                continue
            if key in ("head_dim", "text_config", "vision_config"):
                raise ValueError(f"QVLConfig: {key} is no setting of QVL, got {value!r:.80}; take it out")
            logger.warning_once(f"QVLConfig: {key} is none of its keys, and changes nothing")
            setattr(config, key, value)
        return (config, unused) if return_unused else config

    @classmethod
    def from_json_file(cls, json_file: str | PathLike) -> "QVLConfig":
        return cls.from_dict(cls._dict_from_json_file(json_file))

    @classmethod
    def _own_keys(cls) -> list[str]:
        return [name for name in cls.__dataclass_fields__ if name not in PreTrainedConfig.__dataclass_fields__]

    @classmethod
    def _is_known(cls, key: str) -> bool:
        return (
            key in cls.__dataclass_fields__
            or key in cls.attribute_map
            or key in _STORED
            or key in _generation_keys()
            or key.startswith("_")
        )

    @classmethod
    def _nearest(cls, key: str) -> str | None:
        return next(iter(difflib.get_close_matches(key, cls._own_keys(), n=1, cutoff=0.8)), None)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def check(self) -> None:
        """Raises ValueError, naming the keys, if no model can be built from these settings. Models check again when
        they are built.
        """
        self._check_ranges()
        self._check_multiples()
        self._check_choices()

    def _check_ranges(self) -> None:
        for name in _SIZES:
            if getattr(self, name) < 1:
                raise ValueError(f"QVLConfig: {name} must be at least 1, got {getattr(self, name)}")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"QVLConfig: {name} must be in [0, 1), got {getattr(self, name)}")
        for name in ("initializer_range", "layer_norm_eps", "rope_theta", "vision_rope_theta"):
            if not 0 < getattr(self, name) <= 1e30:
                raise ValueError(f"QVLConfig: {name} must be positive and at most 1e30, got {getattr(self, name)}")
        if not abs(self.cross_attention_gate_init) <= 1e30:
            raise ValueError(
                f"QVLConfig: cross_attention_gate_init must be a finite number, got {self.cross_attention_gate_init}"
            )
        if self.type_vocab_size < 2:
            raise ValueError(
                f"QVLConfig: type_vocab_size must be at least 2 (text and image positions), got {self.type_vocab_size}"
            )
        layers = self.cross_attention_layers
        if not layers or layers != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= self.num_hidden_layers:
            raise ValueError(
                f"QVLConfig: cross_attention_layers must name some of the layers 0 to {self.num_hidden_layers - 1}, "
                f"each once and in order, "
                f"since multimodal_fusion_type is cross_attention; got {layers}"
            )
        eos = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
        for name, ids in (
            ("image_token_id", [self.image_token_id]),
            ("pad_token_id", [self.pad_token_id]),
            ("bos_token_id", [self.bos_token_id]),
            ("eos_token_id", eos),
        ):
            if any(value is not None and not 0 <= value < self.vocab_size for value in ids):
                raise ValueError(
                    f"QVLConfig: {name} {ids[0]} is not in the vocabulary of {self.vocab_size} tokens (vocab_size)"
                )

    def _check_multiples(self) -> None:
        for whole, part, factor in (
            ("hidden_size", "num_attention_heads", 2),
            ("num_attention_heads", "num_key_value_heads", 1),
            ("vision_hidden_size", "vision_num_attention_heads", 4),
            ("vision_image_size", "vision_patch_size", 1),
            ("language_projection_dim", "num_attention_heads", 1),
        ):
            size, count = getattr(self, whole), getattr(self, part)
            if size % (count * factor):
                times = f"{factor} x {part}" if factor > 1 else part
                why = {
                    1: "",
                    2: " (positions rotate pairs within a head)",
                    4: " (rows and columns rotate half a head each)",
                }[factor]
                raise ValueError(f"QVLConfig: {whole} must be a multiple of {times}{why}, got {size} and {count}")
        if self.connector_type == "attention" and self.vision_projection_dim % self.vision_num_attention_heads:
            raise ValueError(
                "QVLConfig: vision_projection_dim must be a multiple of vision_num_attention_heads, the heads of "
                "the attention connector, "
                f"got {self.vision_projection_dim} and {self.vision_num_attention_heads}"
            )

    def _check_choices(self) -> None:
        for name, choices in (
            ("vision_model_type", ("vit",)),
            ("multimodal_fusion_type", ("cross_attention",)),
            ("connector_type", ("attention", "mlp")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"QVLConfig: {name} must be {' or '.join(choices)}, got {getattr(self, name)!r}")
        for name in ("hidden_act", "vision_hidden_act"):
            if getattr(self, name) not in ACT2FN:
                raise ValueError(
                    f"QVLConfig: {name} {getattr(self, name)!r} is not an activation that transformers knows"
                )
        if (self.connector_type == "attention") != (self.num_query_tokens > 0):
            raise ValueError(
                "QVLConfig: connector_type attention reads an image with num_query_tokens > 0 learned queries, "
                "connector_type mlp keeps every "
                f"patch (num_query_tokens 0); got {self.connector_type} with {self.num_query_tokens}"
            )

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> "QVLConfig":
        """The settings of a named preset, with ``changes``.

        Args:
            name: "qvl-2b" (2.16 B parameters, the specification with every blank filled) or "qvl-tiny" (for tests and
                demos).
        Raises: ValueError for an unknown name or contradictory settings.
        Example:
            >>> QVLConfig.from_preset("qvl-tiny", vocab_size=512).hidden_size
            192
        """
        if name not in PRESETS:
            raise ValueError(f"QVLConfig: unknown preset {name!r}; known are {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})

    @classmethod
    def from_yaml(cls, source: str | PathLike, *, fill: str | None = None) -> "QVLConfig":
        """Reads the YAML of the specification.

        Args:
            source: a file: YAML, flat or with its keys in groups, or a page of text with YAML blocks such as the
                specification itself.
            fill: preset that gives the value of every key that is '[to be specified]' or missing. Without it such a
                mark is refused, and missing keys are those of "qvl-2b".
        Raises: ValueError for unknown or contradictory keys and for values left open; OSError if the file cannot be
        read.
        Example:
            >>> config = QVLConfig.from_yaml("qwen3-vl-2b-instruct-spec.md", fill="qvl-2b")
        """
        if fill is not None and fill not in PRESETS:
            raise ValueError(f"QVLConfig: unknown preset {fill!r} to fill from; known are {', '.join(PRESETS)}")
        keys, open_keys = config_file.read(source)
        if open_keys and fill is None:
            raise ValueError(
                f"QVLConfig: {source} leaves open {', '.join(open_keys)}; give fill='qvl-2b' to take them from that "
                f"preset"
            )
        return cls(**{**(PRESETS[fill] if fill is not None else {}), **keys})

    def to_yaml(self, path: str | PathLike | None = None) -> str:
        """The settings as YAML in the groups of the specification; written to ``path`` if there is one.

        Example:
            >>> print(config.to_yaml())
        """
        return config_file.write(self, path)


# Keys that any version of transformers writes to config.json beside the fields of its base class, and bench to those
# of checkpoints with random weights.
_STORED = {
    "attn_implementation",
    "auto_map",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "per_layer_config",
    "quantization_config",
    "qvl_random_weights",
    "tie_last_hidden_states",
    "torch_dtype",
    "use_return_dict",
}


@functools.cache
def _generation_keys() -> frozenset[str]:
    return frozenset(vars(GenerationConfig()))  # older configs hold these; PreTrainedConfig removes them


_SIZES = (
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "vocab_size",
    "num_key_value_heads",
    "vision_num_hidden_layers",
    "vision_num_attention_heads",
    "vision_hidden_size",
    "vision_patch_size",
    "vision_image_size",
    "vision_intermediate_size",
    "vision_num_channels",
    "vision_projection_dim",
    "language_projection_dim",
    "connector_num_layers",
    "max_num_images",
)
