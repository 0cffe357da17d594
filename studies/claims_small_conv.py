"""The seven claims on a convolutional network: which survive outside an MLP?

    SOAP_JAX_DATA_DIR=DIR soap-jax study studies/claims_small_conv.py

MNIST at 14 x 14 pixels, SGD. `bp_scaled_live` tests whether the size of raw signs causes their gain
here, too.
"""

import os
import pathlib

from soap_jax.study import preset, preset_claims
from soap_jax.tasks import read, small_conv

task = small_conv(read(pathlib.Path(os.environ.get("SOAP_JAX_DATA_DIR", "data")) / "mnist"))
methods, claims = preset.DEFAULT_METHODS, preset_claims.CLAIMS
learning_rates, seeds, steps = (0.01, 0.02, 0.05, 0.1, 0.2), 5, 600
periods, target_loss, evaluations = (1, 10, 100), 0.5, 5
select, maximise = "validation_accuracy", True
smaller = {"seeds": 2, "steps": 20}
