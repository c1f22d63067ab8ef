"""Train a small character model with MoE blocks from Python, and let it write.

python examples/03_train_text.py --steps 200 --out runs/example
"""

import argparse

from npmoe.models import generate
from npmoe.training import (
    CharVocabulary,
    RunFolder,
    language_recipe,
    python_topics_text,
    read_text,
    train,
)


def show(progress):
    report = progress.report
    if (report.step + 1) % 20 == 0 or report.step + 1 == progress.steps:
        print(
            f"step {report.step + 1}: loss {report.cross_entropy:.3f}, "
            f"imbalance {report.load_imbalance:.2f}, {progress.tokens_per_second:,.0f} tokens/s"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", help="a UTF-8 file; Python's documentation if omitted")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", default="runs/example")
    options = parser.parse_args()
    text = read_text(options.text) if options.text else python_topics_text()

    config = language_recipe(
        text, "example", steps=options.steps, hidden_size=64, num_layers=2, context_length=64
    )
    result = train(config, text, RunFolder.create(options.out), on_step=show)
    print(f"validation loss {result.evaluation.loss:.3f} nats per character")

    vocabulary = CharVocabulary(config.characters)
    prompt = text[:20]
    ids = generate(
        vocabulary.encode(prompt), 200, result.params, config.model, seed=1, temperature=0.7
    )
    print(prompt + vocabulary.decode(list(ids)))


if __name__ == "__main__":
    main()
