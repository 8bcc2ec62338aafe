"""``generate`` of accelerated models: one loop (loop.py) over decode steps (step_cpu.py, step_gpu.py) and samplers."""
