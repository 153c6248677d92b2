"""Which answer belongs to a question? No question and no answer is in two splits.

    python experiments/questions.py --faq cloud_faq_dataset.jsonl

MiniLM with 64 tokens at most and in-batch negatives; all answers of the test split are ranked for each question. By
reciprocal rank and precision@1: untrained, head only, 75 % and 50 % recycled, and full training, with three seeds.
"""

from __future__ import annotations

from sweeps import arguments, given_recipes, run  # pyright: ignore[reportMissingImports]
from tasks import questions  # pyright: ignore[reportMissingImports]
from torchrecycle.sweep import Recipe, Settings

RECIPES = {
    "full": Recipe(epochs=2, suffix_rate=1e-4, head_rate=1e-3, batch_size=32, scale=20.0),
    "50": Recipe(epochs=3, suffix_rate=1e-4, head_rate=1e-3, batch_size=32, scale=20.0),
    "75": Recipe(epochs=3, suffix_rate=1e-4, head_rate=1e-3, batch_size=32, scale=20.0),
    "head": Recipe(epochs=6, suffix_rate=0.0, head_rate=1e-3, batch_size=32, scale=20.0),
}
"""Around these rates a better one is looked for."""


def main() -> None:
    parser = arguments(__doc__, "--faq", "JSONL with question and answer")
    parser.add_argument("--fraction", type=float, default=1.0, help="of the training pairs")
    given = parser.parse_args()
    name = "questions" if given.fraction == 1 else f"questions-{100 * given.fraction:.0f}"
    task = questions(given.faq, settings=Settings(fraction=given.fraction, skip_bad=True))
    run(name, given_recipes(task, RECIPES), given)


if __name__ == "__main__":
    main()
