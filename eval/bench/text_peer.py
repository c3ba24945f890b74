"""A PyTorch language model of the same shape as ours and its training step: the peer of `python -m eval bench --text_step`.

Runs under the peer's own interpreter (Python with torch and numpy; no jax). Written for this benchmark from the mathematics,
as a PyTorch user would write it: fused kernels where PyTorch has them (scaled_dot_product_attention, cross_entropy, the fused
AdamW), BASED in its quadratic form as its authors train it, no data loading inside the clock.

    python -P eval/bench/text_peer.py --model '{"vocab_size": 257, ...}' --length 256 --batch 16 --steps 5

prints one JSON object. With --serve it prints one when ready, then one per line of standard input: {"steps": n}.
With --weights FILE.npz (names as in our parameter tree) it also prints the loss of a fixed batch, for parity.
"""

# pyright: reportMissingImports=false

import argparse
import json
import math
import sys
import time

import torch
from torch import nn
from torch.nn import functional as F


def rotate(x, base: float = 10_000.0):
    """Rotary positions over the whole head, halves paired: x [b, h, t, d]."""
    t, half = x.shape[-2], x.shape[-1] // 2
    frequency = base ** (-torch.arange(half) / half)
    angle = torch.arange(t)[:, None] * frequency
    cos, sin = angle.cos(), angle.sin()
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class Attention(nn.Module):
    """Causal softmax attention, over the last `window` keys if there is one."""

    def __init__(self, d_model, num_heads=1, rotary_fraction=0.0, window=None):
        super().__init__()
        self.heads, self.rotary, self.window = num_heads, rotary_fraction > 0, window
        self.Wqkv = nn.Linear(d_model, 3 * d_model)
        self.out_proj = nn.Linear(d_model, d_model)

    def forward(self, x):
        b, t, d = x.shape
        qkv = self.Wqkv(x).view(b, t, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.rotary:
            q, k = rotate(q), rotate(k)
        if self.window is None or self.window >= t:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            lag = torch.arange(t)[:, None] - torch.arange(t)
            mask = (lag >= 0) & (lag < self.window)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(y.transpose(1, 2).reshape(b, t, d))


class Based(nn.Module):
    """Linear attention with 1 + s + s^2/2, s = q.k / sqrt(f), as a masked product."""

    def __init__(self, d_model, feature_dim=16, num_heads=1, epsilon=1e-12):
        super().__init__()
        self.heads, self.features, self.epsilon = num_heads, feature_dim, epsilon
        self.proj_q = nn.Linear(d_model, num_heads * feature_dim, bias=False)
        self.proj_k = nn.Linear(d_model, num_heads * feature_dim, bias=False)
        self.proj_v = nn.Linear(d_model, d_model, bias=False)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x):
        b, t, d = x.shape
        split = lambda y: y.view(b, t, self.heads, -1).transpose(1, 2)
        q, k, v = (split(p(x)) for p in (self.proj_q, self.proj_k, self.proj_v))
        s = q @ k.transpose(-1, -2) / math.sqrt(self.features)
        a = torch.tril(1 + s + s * s / 2)
        y = (a @ v) / (a.sum(-1, keepdim=True) + self.epsilon)
        return self.out_proj(y.transpose(1, 2).reshape(b, t, d))


class BaseConv(nn.Module):
    """conv(x) * projection(x) + x with a short causal depthwise filter."""

    def __init__(self, d_model, kernel_size=3):
        super().__init__()
        self.conv = nn.Conv1d(
            d_model, d_model, kernel_size, groups=d_model, padding=kernel_size - 1
        )
        self.projection = nn.Linear(d_model, d_model)

    def forward(self, x):
        mixed = self.conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
        return mixed * self.projection(x) + x


class SwiGLU(nn.Module):
    def __init__(self, d_model, multiplier):
        super().__init__()
        width = round(multiplier * d_model)
        self.up = nn.Linear(d_model, width, bias=False)
        self.gate = nn.Linear(d_model, width, bias=False)
        self.fc2 = nn.Linear(width, d_model, bias=False)

    def forward(self, x):
        return self.fc2(self.up(x) * F.silu(self.gate(x)))


MIXERS = {
    "attention": Attention,
    "sliding_window": Attention,
    "based": Based,
    "base_conv": BaseConv,
}


class Block(nn.Module):
    def __init__(self, mixer, d_model, channel_multiplier):
        super().__init__()
        mixer = dict(mixer)
        self.norm1, self.norm2 = nn.RMSNorm(d_model, eps=1e-5), nn.RMSNorm(d_model, eps=1e-5)
        self.mixer = MIXERS[mixer.pop("name")](d_model, **mixer)
        self.channel = SwiGLU(d_model, channel_multiplier)

    def forward(self, x):
        x = x + self.mixer(self.norm1(x))
        return x + self.channel(self.norm2(x))


class LanguageModel(nn.Module):
    """The loss of our `LanguageModel` with RMSNorm, SwiGLU and a tied head."""

    def __init__(self, vocab_size, d_model, num_layers, mixers, channel_multiplier):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, d_model)
        self.layers = nn.ModuleList(
            Block(mixers[i % len(mixers)], d_model, channel_multiplier) for i in range(num_layers)
        )
        self.final_norm = nn.RMSNorm(d_model, eps=1e-5)
        for p in self.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, tokens, labels):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        logits = F.linear(self.final_norm(x), self.embed.weight)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def load(model, path):
    """Our parameters, by name: kernels are transposed, depthwise filters run from the newest tap back."""
    import numpy as np

    arrays = np.load(path)

    def ours(name):
        stem, end = name.replace("layers.", "layers_").replace(".", "/").rsplit("/", 1)
        if f"{stem}/kernel" in arrays and end == "weight":
            kernel = arrays[f"{stem}/kernel"]
            return kernel[::-1].T[:, None] if stem.endswith("/conv") else kernel.T
        ends = ("embedding", "scale") if end == "weight" else ("bias",)
        return next(arrays[f"{stem}/{e}"] for e in ends if f"{stem}/{e}" in arrays)

    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.from_numpy(ours(name).copy()))


def timed_steps(model, optimizer, data, count: int) -> dict:
    """Seconds of each of `count` steps, and of processor time; the batch is made before the clocks start."""
    seconds, processor = [], []
    for _ in range(count):
        tokens = next(data)
        start, used = time.perf_counter(), time.process_time()
        optimizer.zero_grad(set_to_none=True)
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()
        seconds.append(time.perf_counter() - start)
        processor.append(time.process_time() - used)
    return {"seconds": seconds, "processor": processor}


def batches(vocab_size, length, batch):
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.randint(vocab_size, (batch, length + 1), generator=generator)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time a PyTorch language model's training step.")
    parser.add_argument("--model", type=json.loads, required=True, help="its fields, as JSON")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--weights", help="an .npz of our parameters")
    parser.add_argument("--serve", action="store_true", help="measure on request")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = LanguageModel(**options.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
    data = batches(options.model["vocab_size"], options.length, options.batch)
    ready = {
        "side": "torch",
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
    }
    if options.weights:
        load(model, options.weights)
        tokens = torch.arange(options.batch * (options.length + 1)).view(options.batch, -1)
        tokens = tokens * 7919 % options.model["vocab_size"]
        with torch.no_grad():
            ready["loss"] = model(tokens[:, :-1], tokens[:, 1:]).item()
    timed_steps(model, optimizer, data, 1)
    if not options.serve:
        print(json.dumps(ready | timed_steps(model, optimizer, data, options.steps)), flush=True)
        return
    print(json.dumps(ready), flush=True)
    for line in sys.stdin:
        result = timed_steps(model, optimizer, data, json.loads(line)["steps"])
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
