"""Checkpoint forms for other engines."""

import hashlib
import json
from pathlib import Path

from bench.checkpoint_files import write_json
from bench.engines.environment import engines_directory

__all__ = ["models_directory", "old_config", "old_style", "rope_parameters"]


def models_directory(checkpoint: Path) -> Path:
    """Folder of the other engines' forms of a checkpoint. The name depends on its config and the sizes of its files."""
    sizes = [(file.name, file.stat().st_size) for file in sorted(checkpoint.glob("*.safetensors"))]
    key = hashlib.sha256((checkpoint / "config.json").read_bytes() + json.dumps(sizes).encode()).hexdigest()[:8]
    return engines_directory() / "models" / f"{checkpoint.name}-{key}"


def rope_parameters(text: dict) -> dict:
    """Of a text config, as transformers 5 writes it, or as older ones did."""
    return text.get("rope_parameters") or {**text["rope_scaling"], "rope_theta": text["rope_theta"]}


def old_config(config: dict) -> dict:
    """A config.json as transformers 4 reads it: the rotary parameters also under the two keys that they had."""
    text = config["text_config"]
    rope = rope_parameters(text)
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {**config, "text_config": {**text, "rope_theta": rope["rope_theta"], "rope_scaling": scaling}}


def old_style(checkpoint: Path, folder: Path) -> None:
    """Makes ``folder`` a copy of a checkpoint for transformers 4: links, but for config.json."""
    folder.mkdir()
    for file in checkpoint.resolve().iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file)
    write_json(folder / "config.json", old_config(json.loads((checkpoint / "config.json").read_text())))
