"""Which level is right for a task? Quality, time and bytes at each, and a recommendation."""

from torchrecycle.sweep.build import Settings, pair_task, picture_task, text_task
from torchrecycle.sweep.objectives import Classify, Matching, Similar
from torchrecycle.sweep.recipes import Recipe
from torchrecycle.sweep.results import Estimate, LevelResult, Recommendation, SweepResult, Trial
from torchrecycle.sweep.run import LEVELS, BestWeights, SweepError, SweepPlan, best_weights, sweep
from torchrecycle.sweep.save import save_servable
from torchrecycle.sweep.task import Evaluation, Objective, Split, Task
from torchrecycle.sweep.trunks import Trunk, load_trunk

__all__ = [
    # what is swept
    "Classify",
    "Matching",
    "Objective",
    "Evaluation",
    "Recipe",
    "Similar",
    "Split",
    "Task",
    # a task from a user's own data
    "Settings",
    "Trunk",
    "load_trunk",
    "pair_task",
    "picture_task",
    "text_task",
    # the sweep
    "LEVELS",
    "SweepError",
    "SweepPlan",
    "sweep",
    # its trained weights
    "BestWeights",
    "best_weights",
    "save_servable",
    # what comes out
    "Estimate",
    "LevelResult",
    "Recommendation",
    "SweepResult",
    "Trial",
]
