"""Training a MOLT on image labels."""

from molt.backbones.weight_files import CheckpointError
from molt.training.augment import AUGMENTATIONS, Augmentation
from molt.training.checkpoints import TrainingError
from molt.training.convert import Converted, convert_checkpoint
from molt.training.loop import Trained, train
from molt.training.recipe import RECIPES, Recipe, find_recipe, read_recipe

__all__ = [
    "AUGMENTATIONS",
    "RECIPES",
    "Augmentation",
    "CheckpointError",
    "Converted",
    "Recipe",
    "Trained",
    "TrainingError",
    "convert_checkpoint",
    "find_recipe",
    "read_recipe",
    "train",
]
