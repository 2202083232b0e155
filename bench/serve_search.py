"""Requests to a running `stepladder serve`: one after another, then all at once. Prints seconds and what was searched together.

stepladder serve --policy lab --port 8000 &
python bench/serve_search.py --port 8000 --requests 32
"""

from __future__ import annotations

import argparse
import http.client
import json
import threading
import time
from collections import Counter

PROBLEM = "Start 3 ; + 5 ; * 2 ; - 4 ; + 6 ; * 3"


def ask(port: int, model: str, seed: int) -> int:
    """How many problems were searched together with this one."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    body = {"model": model, "messages": [{"role": "user", "content": PROBLEM}], "seed": seed}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    reply = connection.getresponse()
    answer = json.loads(reply.read())
    connection.close()
    if reply.status != 200:
        raise SystemExit(answer["error"]["message"])
    return answer["usage"]["search"]["batch"]["problems"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--model", default="lab")
    parser.add_argument("--requests", type=int, default=32)
    given = parser.parse_args()
    ask(given.port, given.model, 0)  # the first request warms everything up
    begin = time.perf_counter()
    for seed in range(given.requests):
        ask(given.port, given.model, seed)
    print(f"one after another: {time.perf_counter() - begin:.2f} s")
    sizes: list[int] = []
    threads = [
        threading.Thread(target=lambda seed=seed: sizes.append(ask(given.port, given.model, seed)))
        for seed in range(given.requests)
    ]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(
        f"all at once: {time.perf_counter() - begin:.2f} s; searched together: {dict(sorted(Counter(sizes).items()))}"
    )


if __name__ == "__main__":
    main()
