"""BASED in PyTorch, in linear time: the peer of `python -m eval bench --op based --peer_python PY`.

The fair version a PyTorch user can write from the maths: all chunks at once, the sums before each chunk by one cumulative sum
over chunks, 1 + s + s^2/2 within a chunk. Chunk and features are the fastest of those tried here (32, 64, 128; packed, outer). Runs
under the peer's own interpreter (torch, no jax); prints one JSON object when ready, then one per line of standard input:
{"length": n, "backward": true, "calls": k} -> {"seconds": [...], "processor": [...]}.
"""

# pyright: reportMissingImports=false

import argparse
import json
import math
import sys
import time

import torch


def packed_features(x):
    """phi with phi(q) . phi(k) = 1 + s + s^2/2, s = q.k / sqrt(f): [1, x, the products x_i x_j with i <= j]."""
    f = x.shape[-1]
    i, j = torch.triu_indices(f, f)
    weight = torch.where(i == j, (2 * f) ** -0.5, f**-0.5)
    products = x[..., i] * x[..., j] * weight
    return torch.cat([torch.ones_like(x[..., :1]), x * f**-0.25, products], -1)


def outer_features(x):
    """The same with all f^2 products: more of them, but nothing is gathered, so that the gradient scatters nothing."""
    f = x.shape[-1]
    products = (x[..., :, None] * x[..., None, :]).flatten(-2) * (2 * f) ** -0.5
    return torch.cat([torch.ones_like(x[..., :1]), x * f**-0.25, products], -1)


FEATURES = {"packed": packed_features, "outer": outer_features}


def based(q, k, v, chunk: int, features):
    """q, k [b, h, t, f], v [b, h, t, v]; t a multiple of chunk."""
    b, h, t, f = q.shape
    split = lambda x: x.view(b, h, t // chunk, chunk, -1)
    q, k, v = split(q), split(k), split(v)
    v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    s = q @ k.transpose(-1, -2) / math.sqrt(f)
    within = torch.tril(1 + s + s * s / 2) @ v
    sums = features(k).transpose(-1, -2) @ v
    before = torch.cumsum(sums, 2) - sums
    out = within + features(q) @ before
    return (out[..., :-1] / (out[..., -1:] + 1e-12)).reshape(b, h, t, -1)


def seconds_of(call):
    used, start = time.process_time(), time.perf_counter()
    call()
    return time.perf_counter() - start, time.process_time() - used


def main() -> None:
    parser = argparse.ArgumentParser(description="Time BASED in PyTorch.")
    parser.add_argument("--chunk", type=int, default=64)
    for name, default in (("heads", 4), ("f", 16), ("v", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--features", choices=sorted(FEATURES), default="outer")
    options = parser.parse_args()
    phi = FEATURES[options.features]
    torch.manual_seed(0)
    known = {}

    def prepare(length):
        shapes = [(1, options.heads, length, w) for w in (options.f, options.f, options.v)]
        q, k, v = (torch.randn(shape, requires_grad=True) for shape in shapes)

        def forward():
            with torch.no_grad():
                based(q, k, v, options.chunk, phi)

        def backward():
            for x in (q, k, v):
                x.grad = None
            based(q, k, v, options.chunk, phi).sum().backward()

        for _ in range(2):
            forward()
            backward()
        return {False: forward, True: backward}

    # parity: a few tokens against the definition
    q, k, v = (torch.randn(1, 2, 2 * options.chunk, w) for w in (options.f, options.f, options.v))
    s = q @ k.transpose(-1, -2) / math.sqrt(options.f)
    a = torch.tril(1 + s + s * s / 2)
    error = (
        (based(q, k, v, options.chunk, phi) - (a @ v) / a.sum(-1, keepdim=True)).abs().max().item()
    )
    ready = {
        "side": "torch",
        "chunk": options.chunk,
        "features": options.features,
        "error": error,
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
    }
    print(json.dumps(ready), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        length = request["length"]
        if length not in known:
            known.clear()
            known[length] = prepare(length)
        call = known[length][request["backward"]]
        pairs = [seconds_of(call) for _ in range(request["calls"])]
        seconds, processor = zip(*pairs)
        print(json.dumps({"seconds": seconds, "processor": processor}), flush=True)


if __name__ == "__main__":
    main()
