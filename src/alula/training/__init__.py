"""Training: recipes, stages, and the Hugging Face Trainer that runs them."""

from alula.training.reading import dump_recipe, load_recipe, parse_recipe, recipe_schema
from alula.training.recipe import Recipe, Stage
from alula.training.records import ReadSource
from alula.training.run import TrainResult, check, train
from alula.training.stage import StageResult
from alula.training.validation import Evaluation

__all__ = [
    "train",
    "TrainResult",
    "StageResult",
    "Evaluation",
    "check",
    "ReadSource",
    "Recipe",
    "Stage",
    "load_recipe",
    "parse_recipe",
    "dump_recipe",
    "recipe_schema",
]
