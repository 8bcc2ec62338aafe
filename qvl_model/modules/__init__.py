"""Subclasses of the stock Qwen3-VL layers and leaf modules. They keep the stock class names, so that everything that
goes by name (FSDP wrapping, device maps, ``repr``) goes on working; only their ``forward`` differs."""
