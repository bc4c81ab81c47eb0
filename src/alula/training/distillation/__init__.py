"""Words held behind an image: text turns in samples with media, and the model held to what its start says to them.

`teacher` asks the start, and its answers are written down with their distributions (`lessons`), once (`preparation`);
`stream` puts them into the samples of a stage; `loss` is the divergence.
"""

from alula.training.distillation.lessons import Lessons
from alula.training.distillation.loss import distillation
from alula.training.distillation.preparation import prepare_lessons
from alula.training.distillation.stream import HeldMixture
from alula.training.distillation.teacher import questions_of

__all__ = ["HeldMixture", "Lessons", "distillation", "prepare_lessons", "questions_of"]
