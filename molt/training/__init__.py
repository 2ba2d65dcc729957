"""Training a MOLT on image labels."""

from molt.training.augment import Augmentation
from molt.training.checkpoints import TrainingError
from molt.training.loop import Trained, train
from molt.training.recipe import RECIPES, Recipe, find_recipe

__all__ = [
    "RECIPES",
    "Augmentation",
    "Recipe",
    "Trained",
    "TrainingError",
    "find_recipe",
    "train",
]
