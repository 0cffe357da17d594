"""Federated learning: clients send errors back through the global weights, or by local backprop.

Each of ten clients has the images of one digit. It takes K steps from the server's weights, and the
server averages the results. During these steps, the weights of the clients become different, and so
do their errors. FLFA (Baek et al., 2025, https://arxiv.org/abs/2512.12762) sends errors back
through the global weights, which are the same for all clients: `Transport(period=K)`, since every K
steps a client has the server's weights. After ten rounds, 78% of the digits are right, with
backprop 71% (ten seeds). At rate 0.3, after twenty rounds, it is 89% and 88%.

    python examples/federated.py
"""

import jax
import jax.numpy as jnp
import optax

from soap_jax import Fixed, Transport, data, init_feedback, models, training

K, model, optimizer = 50, models.MLP((64, 64, 64, 10)), optax.sgd(0.1)
RULES = {"backprop": Transport(), "global weights": Transport(period=K), "fixed random": Fixed()}


def train(seed, images, x_test, rule, rounds):
    """Returns the server's logits after some rounds."""
    keys = jax.random.split(jax.random.key(seed), 3)
    variables = model.init({"params": keys[0], "feedback": keys[1]}, x_test)
    params, b0 = variables["params"], variables["feedback"]
    apply_fn = lambda params, b, x: model.apply({"params": params, "feedback": b}, x)  # noqa: E731
    step = training.make_train_step(apply_fn, optimizer)

    def one_round(server, key):
        def client(own):
            mine, digit, key = own
            x = mine[jax.random.randint(key, (K, 16), 0, len(mine))]
            return jax.lax.scan(step, server, (x, jnp.full((K, 16), digit)))[0]

        clients = jax.lax.map(client, (images, jnp.arange(10), jax.random.split(key, 10)))
        first = jax.tree.map(lambda leaf: leaf[0], clients)  # feedback is synced as a round begins
        return first._replace(params=jax.tree.map(lambda w: w.mean(0), clients.params)), None

    feedback = init_feedback(keys[1], params, rule, feedback=b0)
    server = training.init_train_state(params, optimizer, feedback=feedback)
    server, _ = jax.lax.scan(one_round, server, jax.random.split(keys[2], rounds))
    return apply_fn(server.params, b0, x_test)


def main(seeds=2, rounds=10):
    """Trains by every rule; returns accuracies, `(seeds,)`."""
    digits, right, run = data.load("digits"), {}, jax.jit(train, static_argnums=(3, 4))
    x, x_test = (split.images.reshape(-1, 64) / 16.0 for split in (digits.train, digits.test))
    images = jnp.stack([x[digits.train.labels == digit][:139] for digit in range(10)])
    for name, rule in RULES.items():
        logits = jnp.stack([run(seed, images, x_test, rule, rounds) for seed in range(seeds)])
        right[name] = jnp.mean(logits.argmax(-1) == digits.test.labels[None], -1)
        print(f"{name:14} {right[name].mean():.1%} of test digits right")
    return right


if __name__ == "__main__":
    main()
