"""Worker: PyTorch as it comes, and feedback alignment in it, of the obvious kind.

A step goes as in PyTorch's own tutorials: forward, `backward`, `optimizer.step()`; batches are rows
of tensors that already lie on the device. Feedback alignment is an `autograd.Function` of the
formula, `y = x Wᵀ + b` forwards and `x_bar = y_bar B` backwards, in every layer after the first.
"""

import functools
import itertools
import os
import sys

import protocol

try:
    import torch
    from torch import nn
    from torch.nn import functional as F
except ImportError as error:
    protocol.fail(error)
    sys.exit()

METHODS = ("bp", "FA", "uSF")


class FeedbackMatmul(torch.autograd.Function):
    """`x Wᵀ + b`, whose error goes back through B."""

    @staticmethod
    def forward(ctx, x, weight, bias, feedback):
        """Keeps x and B."""
        ctx.save_for_backward(x, feedback)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, y_bar):
        """Returns the cotangents of x, W and b."""
        x, feedback = ctx.saved_tensors
        return y_bar @ feedback, y_bar.T @ x, y_bar.sum(0), None


class FeedbackLinear(nn.Linear):
    """A dense layer with feedback weights: fixed, or the signs of W at every call."""

    def __init__(self, in_features, out_features, sign):
        super().__init__(in_features, out_features)
        self.sign = sign
        self.register_buffer("feedback", nn.init.xavier_normal_(torch.empty_like(self.weight)))

    def forward(self, x):
        """Returns the output."""
        if self.sign:
            with torch.no_grad():
                torch.sign(self.weight, out=self.feedback)
        return FeedbackMatmul.apply(x, self.weight, self.bias, self.feedback)


class Trainer:
    """As `protocol.Trainer` says."""

    def __init__(self, model, batch_size):
        self.model, self.batch_size = model, batch_size
        self.dense = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
        self.optimizer = torch.optim.SGD(model.parameters(), lr=protocol.RATE)

    def objective(self, x, labels):
        """The loss, with a graph."""
        return F.cross_entropy(self.model(x), labels)

    def train(self, data, epochs):
        """Goes over all of `data` so many times."""
        x, labels = data
        for _ in range(epochs):
            for rows in torch.randperm(len(x), device=x.device).split(self.batch_size):
                self.optimizer.zero_grad(set_to_none=True)
                self.objective(x[rows], labels[rows]).backward()
                self.optimizer.step()
        if x.is_cuda:
            torch.cuda.synchronize()

    def feedback(self):
        """`(out, in)` of every layer that has it."""
        return [layer.feedback for layer in self.dense[1:] if isinstance(layer, FeedbackLinear)]

    def weights(self):
        """The parameters and feedback as they are."""
        return protocol.Weights(
            [numpy(layer.weight.T) for layer in self.dense],
            [numpy(layer.bias) for layer in self.dense],
            [numpy(feedback.T) for feedback in self.feedback()],
        )


def numpy(tensor):
    """A copy."""
    return tensor.detach().cpu().numpy().copy()


def network(widths, make_later):
    """A tanh network of a plain first layer and others, with Glorot's normal weights."""
    layers = []
    for i, shape in enumerate(itertools.pairwise(widths)):
        layer = make_later(*shape) if i > 0 else nn.Linear(*shape)
        nn.init.xavier_normal_(layer.weight)
        nn.init.zeros_(layer.bias)
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def make(system, method, widths, batch_size):
    """As `protocol.serve` says."""
    later = nn.Linear if method == "bp" else functools.partial(FeedbackLinear, sign=method == "uSF")
    return Trainer(network(widths, later).to(device()), batch_size)


def load(x, labels):
    """Data on the device."""
    return torch.tensor(x, device=device()), torch.tensor(labels, device=device())


def device():
    """The device of the platform that the parent asks for."""
    return "cuda" if sys.argv[1] == "gpu" else "cpu"


def set_up():
    """Sets threads and seed, and makes sure of the device; returns facts for `protocol.serve`."""
    if not (sys.argv[1] == "cpu" or (sys.argv[1] == "gpu" and torch.cuda.is_available())):
        protocol.fail(RuntimeError(f"this PyTorch has no {sys.argv[1]}, where ours runs"))
        sys.exit()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(0)
    return {"threads": torch.get_num_threads(), "versions": {"torch": torch.__version__}}


if __name__ == "__main__":
    offers = [("PyTorch", method) for method in METHODS]
    protocol.serve(set_up() | {"offers": offers}, load, make)
