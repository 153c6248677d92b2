"""How does it depend on the amount of data? Similar cars with a half, a quarter and a tenth of the photos.

    python experiments/amount.py --cars cars/

What is tested stays the same, and so does the number of epochs. All
fractions share the activations that `levels.py` has kept.
"""

from __future__ import annotations

from levels import RECIPES  # pyright: ignore[reportMissingImports]
from sweeps import arguments, given_recipes, run  # pyright: ignore[reportMissingImports]
from tasks import cars  # pyright: ignore[reportMissingImports]
from torchrecycle.sweep import Settings

FRACTIONS = (0.5, 0.25, 0.1)


def main() -> None:
    parser = arguments(__doc__, "--cars", "a folder with images.tar and labels.csv")
    parser.add_argument("--fractions", type=float, nargs="*", default=FRACTIONS)
    given = parser.parse_args()
    for fraction in given.fractions:
        task = cars(given.cars, settings=Settings(fraction=fraction, skip_bad=True))
        run(f"amount-{100 * fraction:.0f}", given_recipes(task, RECIPES), given)


if __name__ == "__main__":
    main()
