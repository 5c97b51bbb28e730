"""The child process of tasks.verifier: one comparison for each line of JSON on standard input.

Runs as a script of its own and imports nothing of the project.
"""

import json
import logging
import resource
import signal
import sys

_MEMORY_BYTES = 4 << 30


def equal(reference: str, answer: str) -> bool:
    r"""Whether math-verify finds both equal; each is read as if it stood in a \boxed{}."""
    from math_verify import parse, verify

    gold, found = (parse(rf"\boxed{{{text}}}", parsing_timeout=None) for text in (reference, answer))
    return bool(gold and found and verify(gold, found, timeout_seconds=None))


def serve() -> None:
    """Answer requests until the input ends.

    SIGPROF comes after the allowed processor time and keeps its default action: it ends the process, whatever it does.
    """
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    equal(r"\frac{1}{2}", "0.5")
    replies = sys.stdout
    replies.write("ready\n")
    replies.flush()
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])
        try:
            same = equal(request["reference"], request["answer"])
        except Exception:
            same = False
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        replies.write(f"{json.dumps(same)}\n")
        replies.flush()


if __name__ == "__main__":
    serve()
