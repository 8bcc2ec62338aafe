"""The worker's side of the protocol: one JSON request per line on standard input, one JSON answer per line on standard
output.

Standard library only: other engines' workers run it in their own environments; bench/client.py is the driver's side.
"""

import json
import os
import sys
import traceback
import warnings

__all__ = ["serve"]


def serve(handlers: object) -> None:
    """Answers requests, which name methods of ``handlers``, until standard input ends."""
    # Output of libraries goes to standard error, so that it does not mix with the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.simplefilter("ignore")
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"value": getattr(handlers, request["operation"])(**request["arguments"])}
        except Exception:  # reported to the driver, which stops the run
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)
