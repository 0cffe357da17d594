"""Tasks for `soap_jax.study.compare`: a model, its data and a loss, without a learning method.

    task = tasks.mlp(depth=3)                      # or your own: tasks.Task(init, loss, train, ...)
    study.compare(task, ["bp", "fa", "dfa", "frozen"], learning_rates=(0.05, 0.1, 0.2), epochs=5)

Tasks that name their hidden values (`Task.taps`) also work with direct feedback.
"""

from soap_jax.tasks.files import read
from soap_jax.tasks.images import (
    MoskovitzNet,
    Scaling,
    classification,
    mlp,
    moskovitz_conv,
    scaling,
    small_conv,
    split,
)
from soap_jax.tasks.sequences import delayed_cue, sines
from soap_jax.tasks.task import Data, Taps, Task
from soap_jax.tasks.teachers import teacher
from soap_jax.tasks.text import Transformer, char_lm

__all__ = [
    "Data",
    "MoskovitzNet",
    "Scaling",
    "Taps",
    "Task",
    "Transformer",
    "char_lm",
    "classification",
    "delayed_cue",
    "mlp",
    "moskovitz_conv",
    "read",
    "scaling",
    "sines",
    "small_conv",
    "split",
    "teacher",
]
