"""Fine-tune a causal language model with an adapter: python -m benchmarks.examples.causal

options    the command line
job        what it asks for, loaded: models, data, number_words, encoding, methods
training   a step as a value; loop runs it, with checkpoint, progress and evaluation
scoring    what a generated text is worth
results    what a run leaves behind; plots draws it
sweep      a grid of adapters as one stack
task       the same data and scores for benchmarks.examples.finetune
"""

from .methods import TARGETS
from .program import main
from .task import CausalTask, load

__all__ = ["TARGETS", "CausalTask", "load", "main"]
