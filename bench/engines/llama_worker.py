"""The worker of llama.cpp and its forks: one run of ``llama-bench`` per request. Standard library only."""

import json
import resource
import subprocess

from bench.protocol import serve

__all__ = ["Handlers", "seconds"]


def seconds(output: str, tokens: int) -> dict[str, float | None]:
    """From what ``llama-bench -o json`` printed to {"first": seconds of the prompt, "per_token": of each of ``tokens``
    - 1 further ones}.
    """
    tests = json.loads(output)
    (first,) = [test["avg_ns"] for test in tests if test["n_gen"] == 0]
    further = [test["avg_ns"] / test["n_gen"] for test in tests if test["n_prompt"] == 0]
    if len(further) != (tokens > 1):
        raise ValueError(
            f"llama-bench was asked for {tokens - 1} tokens after the prompt and reports {len(further)} such tests"
        )
    return {"first": first / 1e9, "per_token": further[0] / 1e9 if further else None}


class Handlers:
    """Takes the place of a loaded model: ``llama-bench`` maps the file, and warms up, in each run."""

    def load(self, command: list[str], prompt_tokens: int) -> None:
        """``command``: llama-bench with its model, threads and options."""
        self._command, self._prompt_tokens = command, prompt_tokens

    def warm_up(self) -> None:
        self.generate("text", 2)  # brings the file into memory

    def generate(self, prompt: str, tokens: int) -> dict[str, float | None]:
        if prompt != "text":
            raise ValueError(f"llama-bench measures text only, not the {prompt} prompt")
        command = [*self._command, "-p", str(self._prompt_tokens), "-n", str(tokens - 1), "-r", "1", "-o", "json"]
        run = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with exit code {run.returncode}:\n{run.stderr[-2000:]}")
        return seconds(run.stdout, tokens)

    def peak_rss(self) -> int:
        """Of the largest run so far; mapped weights count, as they do for the other models."""
        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


if __name__ == "__main__":
    serve(Handlers())
