"""Does an LSTM hold a cue for 64 steps by direct feedback, or by FA through time?

    soap-jax study studies/recurrent.py

"cue": one cue; the answer is due 64 steps later. "parity": two cues, eight steps apart. The answer
is whether they differ, so the same error for all steps does not fit this task.
"""

import optax

from soap_jax import study
from soap_jax.tasks import delayed_cue


def clipped(base, learning_rate):  # noqa: D103 (the task's optimiser, gradients clipped)
    return optax.chain(optax.clip_by_global_norm(1.0), base)


tasks = {"cue": delayed_cue(64), "parity": delayed_cue(64, cues=(0, 8))}
methods = {name: name for name in ("bp", "fa", "sign_norm", "dfa", "frozen")} | {
    "bp_clipped": study.Method(optimizer=clipped, label="backprop, clipped", color="#444444")
}
optimizer = optax.adam
learning_rates, seeds, steps, evaluations = (0.001, 0.003, 0.01, 0.03), 4, 600, 5
select, maximise, batch_size, extend = "validation_accuracy", True, 32, 1
smaller = {"learning_rates": (0.01,), "seeds": 2, "steps": 20}

claims = [
    study.Difference("dfa", "frozen", metric="test_accuracy", within=(0.2, 1.0)),
    study.Difference("dfa", "bp", metric="test_accuracy", within=(-0.02, 1.0)),
    study.Difference("fa", "dfa", metric="test_accuracy", within=(-1.0, -0.02)),
]
