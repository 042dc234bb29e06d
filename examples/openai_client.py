"""Serve a model and call it with the openai client: one client alone, then four at once.

python examples/openai_client.py  # needs pip install "mcsd[server]" openai
"""

import argparse
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from openai import OpenAI

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="smollm2-135m")
parser.add_argument("--tokens", type=int, default=64)
args = parser.parse_args()

QUESTIONS = ("Why is the sky blue?", "What is a lake?", "How is bread baked?", "Name three rivers.")


def answer(question: str, speculative: bool) -> int:
    """Generate an answer; returns its tokens."""
    done = client.chat.completions.create(
        model=args.model,
        messages=[{"role": "user", "content": question}],
        max_tokens=args.tokens,
        temperature=0,
        extra_body={"speculative": {"enabled": speculative}, "ignore_eos": True},  # fields of mcsd, not of OpenAI
    )
    assert done.usage is not None
    return done.usage.completion_tokens


with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
command = [sys.executable, "-m", "mcsd", "serve", "-m", args.model, "--port", str(port)]
with subprocess.Popen(command, stderr=subprocess.DEVNULL) as server:
    try:
        ready = False
        while not ready:
            if server.poll() is not None:
                sys.exit(f"the server has ended; see what it says: {' '.join(command)}")
            with suppress(OSError):  # not listening yet, or 503 while the model is loaded
                ready = urllib.request.urlopen(f"http://127.0.0.1:{port}/ready").status == 200
            time.sleep(0.2)
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        with client, ThreadPoolExecutor(len(QUESTIONS)) as pool:
            list(pool.map(answer, QUESTIONS, [True] * 4))  # not timed: tree "auto" measures, and prompts are read once
            for clients in (1, len(QUESTIONS)):
                for speculative in (False, True):
                    start = time.perf_counter()
                    tokens = sum(pool.map(answer, QUESTIONS[:clients], [speculative] * clients))
                    rate = tokens / (time.perf_counter() - start)
                    decoding = "speculative" if speculative else "plain"
                    print(f"{clients} at once, {decoding:11} {tokens:4} tokens {rate:6.1f} tokens/s")
        print("Texts that run at once share each read of the weights, so speculation can save less of it for each.")
        print(
            "Tree auto decodes plainly where that is faster. Other programs on these cores change all of the numbers."
        )
    finally:
        server.terminate()  # accepted requests end first
