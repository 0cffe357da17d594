"""Worker: BioTorch, its layers in a network of one's own.

The network and the step are those of `plain_torch`, with BioTorch's layers after a plain first one,
as its README builds custom models. Direct feedback it offers only through `BioModule`, which
converts all layers, and whose forward pass takes targets and loss. Its uSF is scaled, by the
deviation of Glorot's initial weights.
"""

import sys

import plain_torch
import protocol
from torch import nn
from torch.nn import functional as F

try:
    import importlib.metadata

    from biotorch.layers import brsf, fa, frsf, usf
    from biotorch.module.biomodule import BioModule
except ImportError as error:
    protocol.fail(error)
    sys.exit()

LAYERS = {"FA": fa.Linear, "uSF": usf.Linear, "frSF": frsf.Linear, "brSF": brsf.Linear}


class Trainer(plain_torch.Trainer):
    """As `protocol.Trainer` says."""

    def feedback(self):
        """`(out, in)` of every layer after the first; of frSF its absolute value."""
        return [layer.weight_backward for layer in self.dense[1:]]


class DirectTrainer(Trainer):
    """By direct feedback."""

    def objective(self, x, labels):
        """The loss, with a graph; the model takes it for its own purposes, too."""
        return F.cross_entropy(self.model(x, labels, F.cross_entropy), labels)

    def feedback(self):
        """`(in, classes)` of every layer after the first."""
        return [projection.T for projection in super().feedback()]


def make(system, method, widths, batch_size):
    """As `protocol.serve` says."""
    if method in LAYERS:
        model = plain_torch.network(widths, LAYERS[method])
        return Trainer(model.to(plain_torch.device()), batch_size)
    model = plain_torch.network(widths, nn.Linear)
    model = BioModule(model, mode="dfa", output_dim=widths[-1])
    return DirectTrainer(model.to(plain_torch.device()), batch_size)


if __name__ == "__main__":
    facts = plain_torch.set_up()
    facts["versions"]["biotorch"] = importlib.metadata.version("biotorch")
    facts["offers"] = [("BioTorch", method) for method in (*LAYERS, "DFA")]
    protocol.serve(facts, plain_torch.load, make)
