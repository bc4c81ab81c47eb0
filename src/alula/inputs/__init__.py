"""From messages to tensors: one way for training, evaluation, chat and audits."""

from alula.inputs.intake import Intake, Rendered
from alula.inputs.placing import placed
from alula.inputs.roles import token_roles

__all__ = ["Intake", "Rendered", "placed", "token_roles"]
