"""``generate`` of accelerated models: one loop (loop.py) over steps that run a token (step_cpu.py, step_gpu.py) and
choose the next.
"""
