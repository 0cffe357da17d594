"""Feedback methods in plain PyTorch, written from the papers' formulas: what ours must agree with.

All work on a multilayer perceptron, a list of layers `(weight, bias)` with an activation after each
but the last, and on the mean softmax cross-entropy. Arrays are laid out as torch's: a weight W is
`(out, in)`, so y = x·Wᵀ + b, and its feedback B is `(out, in)` too. A cotangent is called `x_bar`,
the derivative of the loss by x or what a method puts in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

torch = pytest.importorskip(  # here, since pytest collects this file too
    "torch", reason="needs PyTorch: pip install torch, or the extra `torch` of soap_jax"
)

Layer = tuple["torch.Tensor", "torch.Tensor"]
Activation = Callable[["torch.Tensor"], "torch.Tensor"]
Loss = Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"]

cross_entropy, linear = torch.nn.functional.cross_entropy, torch.nn.functional.linear


class FeedbackLinear(torch.autograd.Function):
    """y = x·Wᵀ + b; backwards x_bar = y_bar·B, W_bar = y_barᵀ·x, b_bar = Σ y_bar."""

    @staticmethod
    def forward(ctx, x, weight, bias, feedback):
        ctx.save_for_backward(x, feedback)
        return x @ weight.T + bias

    @staticmethod
    def backward(ctx, y_bar):
        x, feedback = ctx.saved_tensors
        return y_bar @ feedback, y_bar.T @ x, y_bar.sum(0), None


class Perturb(torch.autograd.Function):
    """y = a - rate g; backwards a_bar = rate g² / d', which `activity_gradients` explains."""

    @staticmethod
    def forward(ctx, a, g, rate, bias):
        ctx.save_for_backward(g)
        ctx.rate, ctx.bias = rate, bias
        return a - rate * g

    @staticmethod
    def backward(ctx, y_bar):
        (g,) = ctx.saved_tensors
        d = g - y_bar
        d += 2 * ctx.bias * torch.sign(d)
        d[d == 0] = ctx.bias
        return ctx.rate * g**2 / d, None, None, None


def fa_gradients(
    layers: Sequence[Layer],
    feedback: Sequence[torch.Tensor],
    x: torch.Tensor,
    labels: torch.Tensor,
    activation: Activation,
) -> list[Layer]:
    """Feedback alignment: errors go back by x_bar = y_bar·B in place of y_bar·W.

    `feedback` has one matrix per layer after the first, which needs none.

    References:
        Lillicrap et al. Random synaptic feedback weights support error backpropagation for deep
        learning. Nature Communications, 2016. https://doi.org/10.1038/ncomms13276
    """
    first, *others = layers = _with_grad(layers)
    y = linear(x, *first)
    for layer, b in zip(others, feedback, strict=True):
        y = FeedbackLinear.apply(activation(y), *layer, b)
    cross_entropy(y, labels).backward()
    return [(weight.grad, bias.grad) for weight, bias in layers]


def sign_feedback(weight: torch.Tensor, magnitude: torch.Tensor | float) -> torch.Tensor:
    """Sign-symmetric feedback B = m·sign(W).

    m = 1 or a layer's constant is uSF, m = abs(B0) frSF, and m drawn anew at each sync brSF.

    References:
        Liao, Leibo, Poggio. How important is weight symmetry in backpropagation? AAAI, 2016.
        https://arxiv.org/abs/1510.05067
    """
    return magnitude * torch.sign(weight)


def sgd(layers: Sequence[Layer], gradients: Sequence[Layer], rate: float) -> list[Layer]:
    """Gradient descent: W <- W - rate W_bar, and the same for b."""
    return [
        (weight - rate * weight_bar, bias - rate * bias_bar)
        for (weight, bias), (weight_bar, bias_bar) in zip(layers, gradients, strict=True)
    ]


def kolen_pollack_step(
    layers: Sequence[Layer],
    feedback: Sequence[torch.Tensor],
    x: torch.Tensor,
    labels: torch.Tensor,
    activation: Activation,
    *,
    rate: float,
    decay: float,
) -> tuple[list[Layer], list[torch.Tensor]]:
    """Kolen-Pollack: W and B get one update and one decay, so that W - B dies out.

        W <- (1 - rate decay) W - rate W_bar
        B <- (1 - rate decay) B - rate W_bar

    with W_bar the pseudo-gradient through B; biases decay like W.

    References:
        Akrout et al. Deep learning without weight transport. NeurIPS, 2019, equations 16 and 17.
        https://arxiv.org/abs/1904.05391
    """
    gradients = fa_gradients(layers, feedback, x, labels, activation)
    kept = 1 - rate * decay
    shrunk = [(kept * weight, kept * bias) for weight, bias in layers]
    new_feedback = [
        kept * b - rate * weight_bar
        for b, (weight_bar, _) in zip(feedback, gradients[1:], strict=True)
    ]
    return sgd(shrunk, gradients, rate), new_feedback


def dfa_gradients(
    layers: Sequence[Layer],
    projections: Sequence[torch.Tensor],
    x: torch.Tensor,
    labels: torch.Tensor,
    activation: Activation,
    *,
    sign: bool = False,
) -> list[Layer]:
    """Direct feedback alignment: the output's error goes straight to each hidden activation.

        e = (softmax(y) - onehot) / n        a_bar = e·P        or, by its sign, sign(e)·P / n

    for n examples and P `(classes, features)`.

    References:
        Nøkland. Direct feedback alignment provides learning in deep neural networks. NeurIPS,
        2016. https://arxiv.org/abs/1609.01596. For the signs: Frenkel et al., see `drtp_gradients`.
    """
    layers = _with_grad(layers)
    outputs = _separate_outputs(layers, x, activation)
    error = torch.softmax(outputs[-1].detach(), 1) - _one_hot(labels, outputs[-1])
    told = torch.sign(error) if sign else error
    bars = [*(told @ p / len(x) for p in projections), error / len(x)]
    return list(map(torch.autograd.grad, outputs, layers, bars))


def drtp_gradients(
    layers: Sequence[Layer],
    projections: Sequence[torch.Tensor],
    x: torch.Tensor,
    labels: torch.Tensor,
    activation: Activation,
) -> list[Layer]:
    """Direct random target projection: each hidden activation is told the target, a_bar = t·P / n.

    t is the one-hot label, and n the number of examples; the last layer gets its own gradient.

    References:
        Frenkel, Lefebvre, Bol. Learning without feedback: fixed random learning signals allow for
        feedforward training of deep neural networks. Frontiers in Neuroscience, 2021.
        https://arxiv.org/abs/1909.01311
    """
    layers = _with_grad(layers)
    outputs = _separate_outputs(layers, x, activation)
    target = _one_hot(labels, outputs[-1])
    error = torch.softmax(outputs[-1].detach(), 1) - target
    bars = [*(target @ p / len(x) for p in projections), error / len(x)]
    return list(map(torch.autograd.grad, outputs, layers, bars))


def activity_gradients(
    layers: Sequence[Layer],
    x: torch.Tensor,
    labels: torch.Tensor,
    activation: Activation,
    *,
    rate: float,
    bias: float,
    loss: Loss = cross_entropy,
) -> list[Layer]:
    """Second-order activity propagation: errors are Newton's steps of the hidden activations.

    A first pass gives g, the loss's derivative by an activation a. A second one runs at a - r g,
    r = rate / (number of a's entries), and g' arrives there, the layers above having replaced
    theirs. The slope's change over the way, (g - g') / (r g), is a curvature, and g divided by it
    is what a hands upstream:

        a_bar = r g² / d',      d = g - g',      d' = d + 2 bias sign(d),  but bias where d = 0

    Only the second pass's gradients are the weights'. The method is that of the package SOAP.
    """
    *below, last = layers = _with_grad(layers)
    activations, a = [], x
    for layer in below:
        a = activation(linear(a, *layer))
        activations.append(a)
    slopes = torch.autograd.grad(loss(linear(a, *last), labels), activations)

    a = x
    for layer, g in zip(below, slopes, strict=True):
        a = activation(linear(a, *layer))
        a = Perturb.apply(a, g, rate / a.numel(), bias)
    loss(linear(a, *last), labels).backward()
    return [(weight.grad, bias.grad) for weight, bias in layers]


def _separate_outputs(layers, x, activation):
    """Each hidden activation and the logits, through which no gradient reaches an earlier layer."""
    outputs = []
    for layer in layers[:-1]:
        outputs.append(activation(linear(x, *layer)))
        x = outputs[-1].detach()
    return [*outputs, linear(x, *layers[-1])]


def _one_hot(labels, like):
    return torch.nn.functional.one_hot(labels, like.shape[1]).to(like.dtype)


def _with_grad(layers):
    return [tuple(p.detach().requires_grad_() for p in layer) for layer in layers]
