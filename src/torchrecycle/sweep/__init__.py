"""Which level is right for a task? Quality, time and bytes at each, and a recommendation."""

from torchrecycle.sweep.build import Settings, pair_task, picture_task, text_task
from torchrecycle.sweep.objective_task import Objective, ObjectiveTask
from torchrecycle.sweep.objectives import Classify, Matching, Similar
from torchrecycle.sweep.predict import predict
from torchrecycle.sweep.ready import Classification, Pairs, Regression, Similarity, TokenLabelling
from torchrecycle.sweep.recipes import Recipe
from torchrecycle.sweep.results import Estimate, LevelResult, Prediction, Recommendation, SweepResult, Trial
from torchrecycle.sweep.run import LEVELS, BestWeights, Sweep, SweepError, SweepPlan, sweep
from torchrecycle.sweep.save import save_servable
from torchrecycle.sweep.task import Evaluation, Split, Task
from torchrecycle.sweep.trial import RunningTrial
from torchrecycle.sweep.trunks import Trunk, load_trunk

__all__ = [
    # the sweep
    "LEVELS",
    "Sweep",
    "SweepError",
    "SweepPlan",
    "predict",
    "sweep",
    # what is swept
    "Evaluation",
    "Recipe",
    "RunningTrial",
    "Split",
    "Task",
    # tasks that are ready
    "Classification",
    "Pairs",
    "Regression",
    "Similarity",
    "TokenLabelling",
    # a task from a user's own files
    "Classify",
    "Matching",
    "Objective",
    "ObjectiveTask",
    "Settings",
    "Similar",
    "Trunk",
    "load_trunk",
    "pair_task",
    "picture_task",
    "text_task",
    # its trained weights
    "BestWeights",
    "save_servable",
    # what comes out
    "Estimate",
    "LevelResult",
    "Prediction",
    "Recommendation",
    "SweepResult",
    "Trial",
]
