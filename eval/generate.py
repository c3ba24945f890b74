"""Continue a prompt with a trained model.

    python -m eval generate --checkpoint runs/text --prompt "To be, or" [--max_new_tokens 200] [--temperature 0.8]

Tokens are printed as text; a sample ends where the model ends the document. The memory of decoding is the model's state:
constant for recurrent mixers, growing with the text for attention.
"""

import argparse
import time

from train.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the task."""
    parser.add_argument("--checkpoint", required=True, help="the --workdir of a training run")
    parser.add_argument("--prompt", default="", help="what to go on with (default: a new document)")
    parser.add_argument("--max_new_tokens", type=int, default=200, help="at most this many tokens")
    parser.add_argument("--num_samples", type=int, default=1, help="samples, all in one batch")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0 takes the likeliest token"
    )
    parser.add_argument("--top_k", type=int, default=0, help="draw among the k likeliest; 0: all")
    parser.add_argument(
        "--top_p", type=float, default=1.0, help="draw from the nucleus of this mass"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers")
    parser.add_argument(
        "--step", default="best", help="best (default), latest, or the number of a step"
    )


def run(args: argparse.Namespace) -> None:
    """Restores the model and prints the samples; speed goes to stderr.

    Raises:
      UserError: no run, no whole checkpoint, another task, numbers out of range.
    """
    if args.num_samples < 1:
        raise UserError(f"--num_samples must be at least 1, got {args.num_samples}")

    import sys

    import jax
    import jax.numpy as jnp
    import numpy as np

    from eval.text_run import read_text_run
    from jaxmodels.generate import generate
    from train.tasks.text import decode_until_end, encode_prompt

    text_run = read_text_run(args.checkpoint, args.step)
    tokenizer = text_run.tokenizer
    if tokenizer is None:
        raise UserError(
            f"{args.checkpoint} was trained on tokens without a tokenizer; train it with config.data.tokenizer"
        )
    prompt = jnp.tile(encode_prompt(tokenizer, args.prompt), (args.num_samples, 1))
    before = time.monotonic()
    try:
        tokens = np.asarray(
            generate(
                text_run.model,
                text_run.params,
                prompt,
                max_new_tokens=args.max_new_tokens,
                key=jax.random.key(args.seed),
                temperature=args.temperature,
                top_k=args.top_k,
                top_p=args.top_p,
                end_token=tokenizer.end,
            )
        )
    except ValueError as error:
        raise UserError(f"{args.checkpoint}: {str(error).splitlines()[0]}") from error
    seconds = time.monotonic() - before
    for i, row in enumerate(tokens):
        if i:
            print("-" * 40)
        print(args.prompt + decode_until_end(tokenizer, row))
    print(
        f"[{tokens.size:,} tokens in {seconds:.1f} s with compiling; step {text_run.step}]",
        file=sys.stderr,
    )
