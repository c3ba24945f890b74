"""The PyTorch original's training step on a CPU: the peer of `python -m eval bench`.

Runs under the peer's own interpreter (Python 3.11, torch 2.13, numpy, einops, pydantic, tqdm, pandas; no jax) against a
checkout of HazyResearch/zoology that the user names. None of its code is kept here: its classes build the model, its
`Trainer` computes the loss, and one step is the body of its `train_epoch`: clear gradients, loss over every position,
backward, AdamW, `loss.item()`.

What its CPU path needs at the commit measured (d88d6f5), done on the live classes and never in its files:
- `TokenEmbeddings` creates its table on "cuda" unless told otherwise, and nobody tells it: the default becomes "cpu".
- `LanguageModel.forward` returns embeddings unless told otherwise, so that its own cross-entropy receives 64 "logits":
  the default becomes the logits.
- `torchvision` (for a drop path of rate 0), `opt_einsum` and `wandb` are imported and not used here: empty modules stand
  in where they are not installed.

    python -P eval/bench/zoology_peer.py --zoology PATH --mixer based --length 64 --batch 256 --steps 5

prints one JSON object. With --serve it prints one when ready, then one per line of standard input: {"steps": n}.
"""

# pyright: reportMissingImports=false

import argparse
import importlib.util
import json
import pathlib
import sys
import time
import types

MIXERS = {
    "attention": ("zoology.mixers.attention.MHA", {"num_heads": 1, "dropout": 0.0}),
    "based": (
        "zoology.mixers.based.Based",
        {
            "feature_dim": 16,
            "feature_name": "taylor_exp",
            "num_heads": 1,
            "num_key_value_heads": 1,
            "train_view": "quadratic",
        },
    ),
}


def stand_in(name: str, **attributes):
    """An empty module under `name`, when the real one is not installed."""
    if importlib.util.find_spec(name.split(".")[0]) is not None:
        return
    parent = None
    for depth in range(1, name.count(".") + 2):
        path = ".".join(name.split(".")[:depth])
        module = sys.modules.setdefault(path, types.ModuleType(path))
        if parent is not None:
            setattr(parent, path.rsplit(".", 1)[1], module)
        parent = module
    vars(parent).update(attributes)


def import_zoology(checkout: pathlib.Path):
    """zoology.model, .config and .train from the checkout, able to run on a CPU."""
    import torch

    class NoDropPath(torch.nn.Module):
        """Stochastic depth of rate 0 is the identity."""

        def __init__(self, p, mode):
            super().__init__()
            if p:
                raise ValueError("the stand-in for StochasticDepth only covers rate 0")

        def forward(self, x):
            return x

    # after `import torch`, which looks for opt_einsum itself
    stand_in("torchvision.ops", StochasticDepth=NoDropPath)
    stand_in("opt_einsum")
    stand_in("wandb")
    sys.path.insert(0, str(checkout))
    import zoology.config
    import zoology.model
    import zoology.train

    embeddings = zoology.model.TokenEmbeddings.__init__
    embeddings.__defaults__ = tuple("cpu" if x == "cuda" else x for x in embeddings.__defaults__)
    # (position_ids, state, return_embeddings)
    zoology.model.LanguageModel.forward.__defaults__ = (None, None, False)
    return zoology


def build_trainer(zoology, mixer: str, length: int, learning_rate: float):
    """Its Trainer around its two-layer model, ready to step (what `Trainer.fit` sets up before the first epoch)."""
    import torch

    config = zoology.config
    name, kwargs = MIXERS[mixer]
    layers = [
        {
            "name": "zoology.mixers.base_conv.BaseConv",
            "kwargs": {"l_max": length, "kernel_size": 3, "implicit_long_conv": True},
        },
        {"name": name, "kwargs": kwargs | ({"l_max": length} if mixer == "based" else {})},
    ]
    model = zoology.model.LanguageModel(
        config.ModelConfig(
            sequence_mixer=config.ModuleConfig(
                name="zoology.mixers.hybrid.Hybrid", kwargs={"configs": layers}
            ),
            state_mixer=config.ModuleConfig(name="torch.nn.Identity"),
            d_model=64,
            n_layers=2,
            vocab_size=8192,
            max_position_embeddings=0,
            embed_dropout=0.0,
            resid_dropout=0.0,
        )
    )
    trainer = zoology.train.Trainer(
        model, None, None, learning_rate=learning_rate, weight_decay=0.1, device="cpu"
    )
    trainer.loss_fn = torch.nn.CrossEntropyLoss()
    trainer.optimizer = torch.optim.AdamW(
        model.parameters(), lr=trainer.learning_rate, weight_decay=trainer.weight_decay
    )
    model.train()
    return trainer


def batches(length: int, batch: int, labels_per_row: int, vocab_size: int, seed: int = 0):
    """Endless random tokens, and labels at `labels_per_row` positions of each row (the other labels are -100)."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    while True:
        tokens = torch.randint(vocab_size, (batch, length), generator=generator)
        where = torch.rand(batch, length, generator=generator).topk(labels_per_row, 1).indices
        values = torch.randint(vocab_size, where.shape, generator=generator)
        yield tokens, torch.full_like(tokens, -100).scatter(1, where, values)


def step(trainer, tokens, targets) -> float:
    """The body of its train_epoch, progress bar and logger apart."""
    trainer.optimizer.zero_grad()
    loss, _ = trainer.compute_loss(tokens, targets)
    loss.backward()
    trainer.optimizer.step()
    return loss.item()


def timed_steps(trainer, data, count: int) -> dict:
    """Seconds of each of `count` steps, and of processor time; the batch is made before the clocks start."""
    seconds, processor, losses = [], [], []
    for _ in range(count):
        tokens, targets = next(data)
        start, used = time.perf_counter(), time.process_time()
        losses.append(step(trainer, tokens, targets))
        seconds.append(time.perf_counter() - start)
        processor.append(time.process_time() - used)
    return {"seconds": seconds, "processor": processor, "losses": losses}


def describe(trainer, options) -> dict:
    import torch

    return {
        "side": "zoology",
        "mixer": options.mixer,
        "length": options.length,
        "batch": options.batch,
        "labels_per_row": options.labels,
        "parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "dtype": str(next(trainer.model.parameters()).dtype).removeprefix("torch."),
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
    }


def parse(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time the PyTorch original's training step.")
    parser.add_argument("--zoology", type=pathlib.Path, required=True, help="its checkout")
    parser.add_argument("--mixer", choices=sorted(MIXERS), default="attention")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--labels", type=int, default=4, help="labelled positions per row")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--threads", type=int, default=0, help="0: what torch chooses")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--serve", action="store_true", help="measure on request")
    options = parser.parse_args(arguments)
    if not (options.zoology / "zoology" / "model.py").is_file():
        parser.error(f"no zoology/model.py under {options.zoology}: not a checkout of zoology")
    return options


def main() -> None:
    options = parse()
    answers = sys.stdout  # zoology prints while it is imported; answers go out on the real stdout
    sys.stdout = sys.stderr
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    zoology = import_zoology(options.zoology.resolve())
    trainer = build_trainer(zoology, options.mixer, options.length, options.learning_rate)
    data = batches(options.length, options.batch, options.labels, vocab_size=8192)
    timed_steps(trainer, data, options.warmup)
    if not options.serve:
        result = describe(trainer, options) | timed_steps(trainer, data, options.steps)
        print(json.dumps(result), file=answers, flush=True)
        return
    print(json.dumps(describe(trainer, options)), file=answers, flush=True)
    for line in sys.stdin:
        result = timed_steps(trainer, data, json.loads(line)["steps"])
        print(json.dumps(result), file=answers, flush=True)


if __name__ == "__main__":
    main()
