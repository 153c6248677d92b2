"""`recycle`: the one place where the rooms below are joined.

``recycle(model, images, level=0.5, store="activations/")`` runs the model a dozen times on two images, divides it in
its slots, proves that the halves compute what the whole does, freezes the first, and opens the folder of rows that
belongs to it. What it returns, a `Recycling`, fills that folder from data sets and hands out loaders; the model itself
stays the object that it was.
"""

from torchrecycle.recycling.attached import Recycling, fill_many
from torchrecycle.recycling.entry import recycle
from torchrecycle.recycling.reports import CheckReport, Stats

__all__ = ["CheckReport", "Recycling", "Stats", "fill_many", "recycle"]
