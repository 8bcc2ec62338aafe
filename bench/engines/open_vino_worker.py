"""The worker of OpenVINO. Runs in its own environment; of this project it imports only the worker protocol."""

from pathlib import Path

from optimum.intel import OVModelForVisualCausalLM, OVWeightQuantizationConfig

from bench import inputs, machine
from bench.generation import timed_generate
from bench.protocol import serve

__all__ = ["Handlers"]

FORMATS = {8: {"bits": 8}, 4: {"bits": 4, "sym": True, "group_size": 64, "ratio": 1.0}}


class Handlers:
    def export(self, source: str, destination: str, bits: int) -> None:
        """Converts a checkpoint of transformers 4 to OpenVINO's format, with weights of so many bits."""
        model = OVModelForVisualCausalLM.from_pretrained(
            source,
            export=True,
            compile=False,
            trust_remote_code=False,
            quantization_config=OVWeightQuantizationConfig(**FORMATS[bits]),
        )
        model.save_pretrained(destination)

    def load(self, path: str, prompts: str, threads: int) -> None:
        """``prompts``: a file of bench.inputs.save."""
        self._model = OVModelForVisualCausalLM.from_pretrained(
            path,
            trust_remote_code=False,
            ov_config={"INFERENCE_NUM_THREADS": str(threads), "PERFORMANCE_HINT": "LATENCY"},
        )
        self._prompts = inputs.load(Path(prompts))

    def warm_up(self) -> None:
        """Warm-up as in bench.session."""
        self.generate("image", 3)
        self.generate("text", 1)

    def generate(self, prompt: str, tokens: int) -> dict[str, float | None]:
        return timed_generate(self._model, self._prompts[prompt], tokens)

    def peak_rss(self) -> int:
        return machine.peak_rss_bytes()


if __name__ == "__main__":
    serve(Handlers())
