"""Write tests/golden/zoology_mixers.npz: what the mixers of HazyResearch/zoology compute, at tiny sizes.

    python make_zoology_golden.py --zoology CHECKOUT      (commit d88d6f5; Python 3.11, torch 2.13 CPU, numpy, einops, pydantic)

Runs the original's classes unchanged. Per case: input x, every array of the state dict (random, seeded, large enough to move
every gate), output y, a fixed cotangent dy, and the gradients of sum(y * dy) for x and for the parameters. Per class, at width
64: mean, standard deviation, smallest and largest value of every parameter after the original's `_init_weights` for 2 layers.

The mixers are imported one by one; packages that they import and do not use here get empty stand-ins (ABSENT).
"""

# pyright: reportMissingImports=false
# (torch and zoology live in the interpreter that runs this file, not in ours)

import argparse
import functools
import importlib
import json
import sys
import types
from pathlib import Path

import numpy as np

BATCH, LENGTH, WIDTH, MAX_LEN = 2, 12, 8, 20
# case -> (module.Class under zoology.mixers, arguments besides d_model)
CASES = {
    "attention": ("attention.MHA", dict(num_heads=1)),
    "attention_heads": ("attention.MHA", dict(num_heads=2)),
    "sliding_window": ("slide_attn.SlidingAttn", dict(block_size=4)),
    "based": (
        "based.Based",
        dict(feature_dim=4, num_heads=2, num_key_value_heads=2, train_view="quadratic"),
    ),
    "base_conv": ("base_conv.BaseConv", dict(l_max=MAX_LEN, kernel_size=3)),
    "base_conv_act": ("base_conv.BaseConv", dict(l_max=MAX_LEN, kernel_size=4, use_act=True)),
    "base_conv_long": ("base_conv.BaseConv", dict(l_max=MAX_LEN, kernel_size=-1)),
    # As long as the input: with a longer free filter the original's FFT of twice the input's length wraps round, and early
    # tokens see later ones. That is not reproduced.
    "base_conv_explicit": (
        "base_conv.BaseConv",
        dict(l_max=LENGTH, kernel_size=-1, implicit_long_conv=False),
    ),
    "hyena": ("hyena.Hyena", dict(l_max=MAX_LEN, filter_order=16)),
}
INIT_WIDTH, INIT_MAX_LEN, INIT_LAYERS = 64, 1024, 2
INITIALISED = {
    "attention": ("attention.MHA", {}),
    "sliding_window": ("slide_attn.SlidingAttn", {}),
    "based": ("based.Based", dict(num_heads=1, num_key_value_heads=1)),
    "base_conv": ("base_conv.BaseConv", dict(l_max=INIT_MAX_LEN)),
    "base_conv_long": ("base_conv.BaseConv", dict(l_max=INIT_MAX_LEN, kernel_size=-1)),
    "base_conv_explicit": (
        "base_conv.BaseConv",
        dict(l_max=INIT_MAX_LEN, kernel_size=-1, implicit_long_conv=False),
    ),
    "hyena": ("hyena.Hyena", dict(l_max=INIT_MAX_LEN)),
}
# imported on the way, never called by these cases: module -> attributes it must have
ABSENT = {
    "opt_einsum": {},
    "wandb": {},
    "torchvision": {},
    "torchvision.ops": {"StochasticDepth": None},
}


def stand_in():
    """Empty modules for what is not installed (after torch, which looks for opt_einsum itself)."""
    for name, attributes in ABSENT.items():
        try:
            importlib.import_module(name)
        except ImportError:
            sys.modules[name] = types.ModuleType(name)
            vars(sys.modules[name]).update(attributes)


def build(name, width, arguments):
    module, cls = name.rsplit(".", 1)
    return getattr(importlib.import_module(f"zoology.mixers.{module}"), cls)(width, **arguments)


def run(case, seed):
    """Arrays of one case under `case/`."""
    import torch

    name, arguments = CASES[case]
    mixer = build(name, WIDTH, arguments)
    generator = torch.Generator().manual_seed(seed)

    def normal(shape, scale=1.0):
        return torch.randn(shape, generator=generator) * scale

    with torch.no_grad():
        for key, parameter in mixer.named_parameters():
            if parameter.requires_grad and not key.endswith(("pos_emb.z", "freq")):
                parameter.copy_(normal(parameter.shape, 0.4))
            elif key.endswith("freq"):
                parameter.copy_(1 + normal(parameter.shape, 0.2))
    x = normal((BATCH, LENGTH, WIDTH)).requires_grad_()
    dy = normal((BATCH, LENGTH, WIDTH))
    y = mixer(x)
    (y * dy).sum().backward()
    arrays = {"x": x, "y": y, "dy": dy, "dx": x.grad}
    arrays |= {f"state/{key}": value for key, value in mixer.state_dict().items()}
    arrays |= {f"grad/{key}": p.grad for key, p in mixer.named_parameters() if p.grad is not None}
    return {f"{case}/{key}": value.detach().numpy() for key, value in arrays.items()}


def initial_statistics():
    """case -> parameter -> [mean, standard deviation, smallest, largest] after the original's initialisation."""
    import torch
    from zoology.model import _init_weights

    torch.manual_seed(0)
    init = functools.partial(_init_weights, n_layers=INIT_LAYERS, block_type="TransformerBlock")
    found = {}
    for case, (name, arguments) in INITIALISED.items():
        mixer = build(name, INIT_WIDTH, arguments).apply(init)
        found[case] = {
            key: [f(p.detach().double().numpy()).item() for f in (np.mean, np.std, np.min, np.max)]
            for key, p in mixer.named_parameters()
        }
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--zoology", required=True, help="a checkout of HazyResearch/zoology")
    parser.add_argument("--out", default=Path(__file__).with_name("zoology_mixers.npz"), type=Path)
    args = parser.parse_args()
    sys.path.insert(0, args.zoology)

    import torch

    torch.set_num_threads(1)
    stand_in()
    arrays = {}
    for seed, case in enumerate(CASES):
        arrays |= run(case, seed)
    about = {
        "cases": CASES,
        "initial": initial_statistics(),
        "initial_width": INIT_WIDTH,
        "initial_max_len": INIT_MAX_LEN,
        "initial_layers": INIT_LAYERS,
        "torch": torch.__version__,
    }
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    np.savez_compressed(args.out, about=np.array(json.dumps(about)), **arrays)
    print(f"{args.out}: {len(arrays)} arrays, {args.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
