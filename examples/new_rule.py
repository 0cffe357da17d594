"""A template for a rule of your own: how feedback changes outside the optimiser.

    python examples/new_rule.py

Copy this file and fill in the places marked 1 to 4. They state the requirements for a rule. The
tests that every rule of soap_jax passes, tests/test_contract.py, also run this rule. They test your
rule if you add it to the methods there.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

import soap_jax
from soap_jax import data, metrics, models, training


# 1. The name is a noun. The docstring says what the rule does, as an equation.
@dataclasses.dataclass(frozen=True, kw_only=True)
class SignTransport(soap_jax.Rule):
    """Feedback moves slowly towards the signs of its kernel, and keeps its size.

    B <- (1 - rate) B + rate * rms(B) * sign(W)
    """

    # 2. Hyperparameters: numbers and strings, never arrays or functions, since a rule is static.
    #    `period` exists already. Check them when the rule is made.
    rate: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.rate <= 1:
            raise ValueError(f"SignTransport: rate is {self.rate!r}; expected a number in (0, 1].")

    # 3. The rule: it gets the arrays of one layer and returns new feedback of the same shape. It is
    #    pure and traceable, and is called if `step % period == 0`. Draw only from `key`. The key
    #    differs between layers and steps, and is the same in a resumed run.
    def __call__(self, kernel, feedback, key):
        """Returns the new feedback."""
        del key
        size = jnp.sqrt(jnp.mean(feedback**2))
        return (1 - self.rate) * feedback + self.rate * size * jnp.sign(kernel)


RULE = SignTransport(period=1, rate=0.1)


# 4. Try it on real data, and compare it with fixed feedback.
def main(epochs=20):
    """Trains a small network on digits by the rule and by fixed feedback."""
    digits = data.load("digits")
    model = models.MLP((64, 10), feedback=False)
    images = digits.train.images / jnp.float32(digits.max_value)
    test = digits.test.images / jnp.float32(digits.max_value), digits.test.labels

    def loss(params, x, labels):
        return training.cross_entropy(model.apply({"params": params}, x), labels)

    loss_fa = soap_jax.with_feedback(loss)
    optimizer = optax.sgd(0.2)

    def value_and_grad(params, feedback, batch, step):
        del step
        return jax.value_and_grad(loss_fa)(params, feedback, *batch)

    step = training.make_gradient_step(value_and_grad, optimizer)
    found = {}
    for rule in (soap_jax.Fixed(), RULE):
        params = model.init(jax.random.key(0), images[:1])["params"]
        explanation = soap_jax.explain(loss, params, images[:8], digits.train.labels[:8])
        feedback = soap_jax.init_feedback(jax.random.key(1), params, rule, where=explanation)
        state = training.init_train_state(params, optimizer, feedback=feedback)
        for key in jax.random.split(jax.random.key(2), epochs):
            state, _ = training.train_epoch(
                step, state, (images, digits.train.labels), key, batch_size=32
            )
        accuracy = training.evaluate(
            lambda params, feedback, x: model.apply({"params": params}, x), state.params, None, test
        ).accuracy
        feedback = training.feedback_weights(state.feedback)
        angle = metrics.weight_angle(state.params, feedback)["Dense_1"]["kernel"]
        found[type(rule).__name__] = float(accuracy), float(angle)
        print(f"{rule!s:<40} test accuracy {accuracy:.1%}, angle of B to W {angle:.1f}°")
    return found


if __name__ == "__main__":
    main()
