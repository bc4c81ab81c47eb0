"""Raising the fledgling: tokenizer, language model and vision tower from nothing, on the microworld alone."""
