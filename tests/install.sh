#!/usr/bin/env bash
# `pip install .` into an empty environment that has PyTorch, then README's first commands, away from the checkout.
set -euo pipefail
checkout="$(cd "$(dirname "$0")/.." && pwd)"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/environment"
python="$work/environment/bin/python"
"$python" -m pip install -q "torch==${TORCH:?version of PyTorch}"
# A copy, as of a fresh checkout: pip would find objects that were built here.
git -C "$checkout" ls-files -z --cached --others --exclude-standard | (cd "$checkout" && tar --null -T - -cf -) | (mkdir "$work/source" && tar -xf - -C "$work/source")
env -u QVL_TEST_TARGETS "$python" -m pip install -q "$work/source"
cp "$checkout/qvl_model/digits/sample.png" "$work"
cd "$work"
"$python" -m pip check
"$python" - <<'PROGRAM'
import torch, transformers
import qvl_kernels
import qvl_model
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

assert "amx_emulated" not in qvl_kernels.cpu_info()["supported"], "the wheel holds a target that is only for tests"
print("torch", torch.__version__, "transformers", transformers.__version__)
text = dict(vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 4, 4], "mrope_interleaved": True})
model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=dict(depth=2, hidden_size=32, num_heads=2, intermediate_size=64, out_hidden_size=64, deepstack_visual_indexes=[0]))).eval()
ids = torch.arange(1, 8)[None]
expected = model(input_ids=ids).logits
model = qvl_model.accelerate(model)
assert qvl_model.is_accelerated(model) and torch.allclose(model(input_ids=ids).logits, expected, atol=1e-4)
PROGRAM
"$work/environment/bin/qvl" generate --image sample.png --prompt "Read the digits from left to right."
"$work/environment/bin/qvl" generate --model qvl-tiny --image sample.png --prompt "Read the digits from left to right."
echo "pip install: passed"
