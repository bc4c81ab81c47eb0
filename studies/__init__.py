"""Studies: populations of models trained and measured to answer one question each, on the microworld."""
