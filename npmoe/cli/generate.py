"""``npmoe generate``: continue a prompt with a trained model."""

from __future__ import annotations

import argparse

from npmoe.errors import RangeError
from npmoe.models import generate, host_backend
from npmoe.training.data import CharVocabulary
from npmoe.training.files import RunFolder
from npmoe.training.loop import load_trained

HELP = "continue a prompt with a trained model"
DESCRIPTION = "Continue a prompt, one character at a time, with the model of a run folder."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("folder", metavar="RUN", help="run folder, as `npmoe train` printed it")
    parser.add_argument("--prompt", default="The ", help="text to continue (default: 'The ')")
    parser.add_argument("--tokens", type=int, default=500, metavar="N", help="characters (500)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0 always takes the likeliest (0.8)"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest only")
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="draw from the likeliest with sum P only"
    )
    parser.add_argument("--seed", type=int, default=0, help="same seed, same text (0)")
    parser.add_argument("--backend", help="of the MoE layers (numpy); 'numba' runs attention too")


def run(options: argparse.Namespace) -> int:
    """Print the continued text as it is drawn."""
    if options.seed < 0:
        raise RangeError(f"generate: seed must not be negative, got {options.seed}.")
    backend = host_backend("generate", options.backend)
    config, params, _ = load_trained(RunFolder(options.folder))
    vocabulary = CharVocabulary(config.characters)
    ids = generate(
        vocabulary.encode(options.prompt),
        options.tokens,
        params,
        config.model,
        seed=options.seed,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        backend=backend,
    )
    print(options.prompt, end="")
    for token in ids:
        print(vocabulary.decode([token]), end="", flush=True)
    print()
    return 0
