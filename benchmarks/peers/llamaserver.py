"""llama.cpp's own server as a peer of ``mcsd bench``.

    python llamaserver.py LLAMA_SERVER TARGET.gguf [--draft DRAFT.gguf] [--tokens 3]

LLAMA_SERVER is its program ``llama-server``. The protocol is that of ``mcsd.bench.peers``. It runs in the file's own
quantization and samples from all tokens; nothing of a prompt is kept.
"""

import argparse
import json
import socket
import subprocess
import sys
import time
from urllib.error import URLError
from urllib.request import Request, urlopen


def main() -> None:
    """Serve requests until stdin ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program")
    parser.add_argument("target")
    parser.add_argument("--draft")
    parser.add_argument("--tokens", type=int, default=3, help="that the draft proposes, at most")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [args.program, "-m", args.target, "--port", port, "-c", "4096", "-np", "1", "-t", str(args.threads)]
    if args.draft:
        command += ["-md", args.draft, "--spec-type", "draft-simple", "--spec-draft-n-max", str(args.tokens)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            answer_all(f"http://127.0.0.1:{port}", server)
        finally:
            server.terminate()


def answer_all(url: str, server: subprocess.Popen[bytes]) -> None:
    """Answer the requests of stdin."""
    while server.poll() is None:
        try:
            urlopen(f"{url}/health").close()
            break
        except URLError:
            time.sleep(0.2)
    for line in sys.stdin:
        request = json.loads(line)
        body = {
            "prompt": request["prompt_token_ids"],
            "n_predict": request["max_new_tokens"],
            "temperature": request["temperature"],
            "seed": request["seed"],
            **{"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0},
            "return_tokens": True,
            "cache_prompt": False,
        }
        start = time.perf_counter()
        with urlopen(Request(f"{url}/completion", json.dumps(body).encode())) as answer:
            tokens = json.load(answer)["tokens"]
        print(json.dumps({"token_ids": tokens, "seconds": time.perf_counter() - start}), flush=True)


if __name__ == "__main__":
    main()
