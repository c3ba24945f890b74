"""Write tests/golden/zoology_mqar.npz: what the public repository HazyResearch/zoology draws for a few MQAR segments.

    python make_zoology_mqar.py --zoology CHECKOUT      (Python 3.11, numpy, torch, pydantic, pyyaml)

Runs the original's code, unchanged, with torch (the loggers it imports on the way may be absent: see ABSENT): `multiquery_ar` for single segments, and `prepare_data` for the rule that
gives each segment its seed. Stored per case: inputs and labels as the original returns them (int32, filler included, so a
test must look only at positions that are not filler). Torch's generator is seeded for a file that is reproducible.
"""

import argparse
import json
import sys
import types
from pathlib import Path

# (length, pairs, examples, vocabulary, power_a, random_non_queries, seed)
CASES = (
    (64, 4, 12, 8192, 0.01, False, 0),
    (64, 4, 12, 8192, 0.01, True, 4294967295),
    (64, 16, 8, 8192, 0.01, True, 7),  # every slot is taken
    (128, 8, 8, 1000, 0.5, True, 2147483648),
    (66, 3, 8, 67, 1.0, False, 123),  # smallest vocabulary, odd; even power law
    (256, 64, 4, 8192, 0.01, True, 5),
    (512, 32, 4, 2048, 0.1, False, 99),
)
# imported by the original's utilities, never used by the data
ABSENT = ("wandb",)
PREPARED = {"train": ((64, 4, 40), (128, 8, 24)), "test": ((64, 4, 24), (64, 8, 16), (128, 16, 8))}


def single(case):
    from zoology.data.multiquery_ar import multiquery_ar

    length, pairs, examples, vocab_size, power_a, filled, seed = case
    segment = multiquery_ar(
        vocab_size=vocab_size,
        num_examples=examples,
        input_seq_len=length,
        seed=seed,
        power_a=power_a,
        num_kv_pairs=pairs,
        random_non_queries=filled,
    )
    return segment.inputs.numpy(), segment.labels.numpy()


def prepared():
    """The first batch of every segment, through the original's prepare_data with its own seed of 123."""
    from zoology.config import DataConfig
    from zoology.data.multiquery_ar import MQARConfig
    from zoology.data.utils import prepare_data

    segments = {
        split: [
            MQARConfig(vocab_size=256, input_seq_len=length, num_kv_pairs=n, num_examples=count)
            for length, n, count in sizes
        ]
        for split, sizes in PREPARED.items()
    }
    config = DataConfig(
        train_configs=segments["train"], test_configs=segments["test"], batch_size=8
    )
    for split, loader in zip(("train", "test"), prepare_data(config)):
        rows = {}
        for inputs, labels, _ in loader:
            shape = (inputs.shape[1], int((labels[0] != -100).sum()))
            rows.setdefault(shape, (inputs.numpy(), labels.numpy()))
        yield split, list(rows.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--zoology", required=True, help="a checkout of HazyResearch/zoology")
    parser.add_argument("--out", default=Path(__file__).with_name("zoology_mqar.npz"), type=Path)
    args = parser.parse_args()
    sys.path.insert(0, args.zoology)
    for name in ABSENT:
        sys.modules.setdefault(name, types.ModuleType(name))

    import numpy as np
    import torch

    torch.manual_seed(0)
    arrays = {}
    for i, case in enumerate(CASES):
        arrays[f"case{i}/inputs"], arrays[f"case{i}/labels"] = single(case)
    for split, rows in prepared():
        for i, (inputs, labels) in enumerate(rows):
            arrays[f"{split}{i}/inputs"], arrays[f"{split}{i}/labels"] = inputs, labels
    arrays = {name: array.astype(np.int32) for name, array in arrays.items()}
    about = {
        "cases": CASES,
        "prepared": PREPARED,
        "numpy": np.__version__,
        "torch": torch.__version__,
    }
    np.savez_compressed(args.out, about=np.array(json.dumps(about)), **arrays)
    print(f"{args.out}: {len(arrays)} arrays, {args.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
