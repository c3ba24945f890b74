"""BASED in PyTorch: the peers of `python -m eval bench --op based --peer_python PY`.

--form chunks: the fair version a PyTorch user can write from the maths, in linear time: all chunks at once, the sums before
each chunk by one cumulative sum over chunks, 1 + s + s^2/2 within a chunk. Chunk and features are the fastest of those tried
here (32, 64, 128; packed, outer). --form fused_chunk_based, parallel_based: flash-linear-attention's (Triton: a GPU only).

Runs under the peer's own interpreter (torch, no jax), on a GPU where torch sees one; prints one JSON object when ready ({"absent":
why} where the form cannot run), then one per line of standard input: {"length": n, "direction": "forward" | "forward+backward",
"calls": k} -> {"seconds": [...], "processor": [...]}, and {} for any other direction.
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


def wait():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(call, several):
    """Per call, wall and processor, of `several` calls in a row."""
    used, start = time.process_time(), time.perf_counter()
    for _ in range(several):
        call()
    wait()
    return (time.perf_counter() - start) / several, (time.process_time() - used) / several


def pick(form, chunk, features):
    """A function of q, k, v as [b, t, h, width].

    Raises ImportError or RuntimeError where it cannot run.
    """
    if form == "chunks":
        phi = FEATURES[features]
        first = lambda x: x.transpose(1, 2)  # heads before tokens
        return lambda q, k, v: based(first(q), first(k), first(v), chunk, phi)
    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no GPU here, and Triton needs one")
    from fla.ops import based as fla

    return getattr(fla, form)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time BASED in PyTorch.")
    forms = ("chunks", "fused_chunk_based", "parallel_based")
    parser.add_argument("--form", choices=forms, default="chunks")
    parser.add_argument("--chunk", type=int, default=64)
    for name, default in (("batch", 1), ("heads", 4), ("f", 16), ("v", 64), ("window", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--features", choices=sorted(FEATURES), default="outer")
    options = parser.parse_args()
    try:
        call = pick(options.form, options.chunk, options.features)
    except (ImportError, RuntimeError) as error:
        print(json.dumps({"absent": str(error)}), flush=True)
        return
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = {"dtype": getattr(torch, options.dtype), "device": device}
    widths = (options.f, options.f, options.v)
    known = {}

    def prepare(length):
        shapes = [(options.batch, length, options.heads, w) for w in widths]
        q, k, v = (torch.randn(shape, requires_grad=True, **kind) for shape in shapes)

        def forward():
            with torch.no_grad():
                call(q, k, v)

        def backward():
            for x in (q, k, v):
                x.grad = None
            call(q, k, v).sum().backward()

        def measured(step):
            step()
            wait()
            first, _ = seconds_of(step, 1)
            return step, 1 if device == "cpu" else max(1, math.ceil(2e-3 / first))

        return {"forward": measured(forward), "forward+backward": measured(backward)}

    # parity: a few tokens against the definition
    q, k, v = (torch.randn(1, 2, 2 * options.chunk, w, **kind) for w in widths)
    s = (q @ k.transpose(-1, -2) / math.sqrt(options.f)).float()
    a = torch.tril(1 + s + s * s / 2)
    expected = (a @ v.float()) / a.sum(-1, keepdim=True)
    got = call(*(x.transpose(1, 2).contiguous() for x in (q, k, v))).float()
    got = got if got.shape == expected.shape else got.transpose(1, 2)
    ready = {
        "side": "torch",
        "chunk": options.chunk,
        "features": options.features,
        "error": (got - expected).abs().max().item(),
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
        if request["direction"] not in known[length]:
            print("{}", flush=True)
            continue
        pairs = [seconds_of(*known[length][request["direction"]]) for _ in range(request["calls"])]
        seconds, processor = zip(*pairs)
        print(json.dumps({"seconds": seconds, "processor": processor}), flush=True)


if __name__ == "__main__":
    main()
