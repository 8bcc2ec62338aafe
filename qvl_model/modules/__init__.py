"""Subclasses of the stock Qwen3-VL layers and leaf modules, with another ``forward``. They keep the stock class names,
since FSDP wrapping, device maps and ``repr`` go by name."""
