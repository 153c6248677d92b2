"""Of which service is a question? The paper's own kind of task, at 25, 50 and 75 %.

    python experiments/classification.py --faq cloud_faq_dataset.jsonl

MiniLM with a linear layer over the mean of its tokens tells 32 cloud services apart by a question, with three seeds.
"""

from __future__ import annotations

from sweeps import arguments, given_recipes, run  # pyright: ignore[reportMissingImports]
from tasks import categories  # pyright: ignore[reportMissingImports]
from torchrecycle.sweep import Recipe

RECIPES = {
    "full": Recipe(epochs=4, suffix_rate=1e-4, head_rate=1e-3, batch_size=32),
    "25": Recipe(epochs=4, suffix_rate=1e-4, head_rate=1e-3, batch_size=32),
    "50": Recipe(epochs=5, suffix_rate=1e-4, head_rate=1e-3, batch_size=32),
    "75": Recipe(epochs=5, suffix_rate=1e-4, head_rate=1e-3, batch_size=32),
    "head": Recipe(epochs=20, suffix_rate=0.0, head_rate=1e-3, batch_size=32),
}
"""Around these rates a better one is looked for."""


def main() -> None:
    given = arguments(__doc__, "--faq", "JSONL with question and filename").parse_args()
    task = given_recipes(categories(given.faq), RECIPES)
    run("classification", task, given, levels=("full", "25", "50", "75", "head"))


if __name__ == "__main__":
    main()
