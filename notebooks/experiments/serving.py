"""What rsa.py --serve costs: it stands before a server that answers each request after 50 ms, and is asked by crowds.

    python notebooks/experiments/serving.py            # a minute; needs starlette, uvicorn and httpx
"""
import asyncio
import os
import statistics
import sys
import threading
import time

import arms  # noqa: F401
import httpx
import uvicorn

import rsa

DELAY, BUDGET = 0.05, rsa.Budget(4, 2, 1, 256, 64)
MESSAGES = [{"role": "user", "content": "What is 47 + 85?"}]


async def model(scope, receive, send):
    """The server behind: any request is answered, 50 ms later, with a short chain of thought."""
    while (await receive()).get("more_body"):
        pass
    await asyncio.sleep(DELAY)
    content = b'{"choices": [{"message": {"role": "assistant", "content": "<think>7+5=12, 4+8+1=13</think>132"}, ' \
              b'"finish_reason": "stop"}], "usage": {"prompt_tokens": 20, "completion_tokens": 20}}'
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": content})


def start(application, port):
    config = uvicorn.Config(application, "127.0.0.1", port, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    threading.Thread(target=server.run, daemon=True).start()
    while not server.started:
        time.sleep(0.01)
    return f"http://127.0.0.1:{port}/v1"


async def crowd(url, name, clients, each):
    """So many clients, each asking one problem after another -> all seconds waited, seconds in all."""
    async def one(client):
        waited = []
        for _ in range(each):
            begun = time.perf_counter()
            answer = await client.post(url + "/chat/completions", json={"model": name, "messages": MESSAGES})
            answer.raise_for_status()
            waited.append(time.perf_counter() - begun)
        return waited

    begun = time.perf_counter()
    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits()) as client:
        waited = await asyncio.gather(*(one(client) for _ in range(clients)))
    return sorted(sum(waited, [])), time.perf_counter() - begun


def open_files():
    return len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else None


def main():
    behind = start(model, 18431)
    source = rsa.Endpoint(behind, "m", concurrency=16)
    front = start(rsa.Server(source, "m", BUDGET, None, rsa.report_prompt), 18432)
    sys.stdout, said = open(os.devnull, "w"), sys.stdout        # the server's own lines
    asyncio.run(crowd(front, "m-mrsa", 2, 2))
    before = threading.active_count(), open_files()
    rows = []
    for what, url, name in (("the server behind, directly", behind, "m"), ("passed through", front, "m"),
                            (f"Markovian RSA, {BUDGET}", front, "m-mrsa")):
        for clients in (1, 10, 50):
            waited, seconds = asyncio.run(crowd(url, name, clients, 4))
            rate = len(waited) / seconds
            rollouts = rate * (BUDGET.population * (BUDGET.rounds + 1) if "mrsa" in name else 1)
            rows.append(f"| {what} | {clients} | {1000 * statistics.median(waited):.0f} | "
                        f"{1000 * waited[int(0.95 * len(waited))]:.0f} | {rate:.1f} | {rollouts:.0f} |")
    time.sleep(1)
    sys.stdout = said
    print(f"One process for all three sides; the server behind answers after {1000 * DELAY:.0f} ms, so a problem of "
          f"{BUDGET.rounds + 1} rounds takes {1000 * DELAY * (BUDGET.rounds + 1):.0f} ms at least.\n")
    print("| what | clients | median, ms | 95 %, ms | answers/s | requests/s behind |\n|---|---|---|---|---|---|")
    print("\n".join(rows))
    print(f"\nThreads and open files before: {before[0]}, {before[1]}; after {12 * 61} answers: "
          f"{threading.active_count()}, {open_files()}.")


if __name__ == "__main__":
    main()
