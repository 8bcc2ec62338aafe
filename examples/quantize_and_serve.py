"""Quantises a checkpoint, serves it, and asks with OpenAI's client: python examples/quantize_and_serve.py [MODEL]

Needs: pip install 'qvl[serve]' openai. Without an argument it takes the small model that ships, which reads digits.
"""

import base64
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import openai

from qvl_model import digits

QVL = [sys.executable, "-m", "qvl_model.cli"]  # or "qvl"


def main(model: str = "digits", image: str = str(digits.SAMPLE), question: str = "Read the digits.") -> str:
    """Prints the answer, and returns it."""
    with tempfile.TemporaryDirectory() as folder:
        quantised = Path(folder, "int8")
        subprocess.run([*QVL, "quantize", "--model", model, "--weights", "int8", "--out", str(quantised)], check=True)
        server = subprocess.Popen(
            [*QVL, "serve", "--model", str(quantised), "--port", "0"], stderr=subprocess.PIPE, text=True
        )
        try:
            assert server.stderr is not None
            url = re.search(r"http://\S+/v1", server.stderr.readline())  # it prints its address when it is ready
            assert url is not None
            data = base64.b64encode(Path(image).read_bytes()).decode()
            content = [
                {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
                {"type": "text", "text": question},
            ]
            with openai.OpenAI(base_url=url[0], api_key="none") as client:
                stream = client.chat.completions.create(
                    model="int8", messages=[{"role": "user", "content": content}], max_tokens=64, stream=True
                )
                answer = ""
                for chunk in stream:
                    piece = chunk.choices[0].delta.content or ""
                    print(piece, end="", flush=True)
                    answer += piece
            print()
            return answer
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
