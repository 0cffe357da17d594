"""What the README shows works as it stands there."""

import pathlib
import re
import typing

import jax
import numpy as np
import optax
import pytest

import soap_jax
from soap_jax import training

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def block(text):
    """The one Python block that holds the text."""
    (found,) = (block for block in BLOCKS if text in block)
    return found


@pytest.fixture(scope="module")
def loop():
    rng = np.random.default_rng(0)
    batch = rng.standard_normal((32, 784), np.float32), rng.integers(0, 10, 32)
    names = {"batches": [batch] * 20}
    exec(block("batches: yours"), names)
    return names


def test_the_explanation_is_the_one_shown(capsys):
    names = {}
    exec(block("with_feedback"), names)
    printed = capsys.readouterr().out
    assert f"```\n{printed}```" in README
    assert jax.tree.structure(names["grads"]) == jax.tree.structure(names["params"])


def test_the_training_loop_learns(loop):
    params, feedback = loop["params"], loop["state"].feedback
    assert loop["loss_fn"](params, feedback, *loop["batches"][0]) < 0.5  # from 2.3
    assert loop["step"] == 19


def test_a_rule_of_ones_own_is_that_small(loop):
    names = {**loop, "key": jax.random.key(2)}
    names["variables"] = loop["model"].init(jax.random.key(0), np.ones((1, 784), np.float32))
    exec(block("class NoisyTransport"), names)
    state = soap_jax.sync_feedback(loop["params"], names["state"], 10)
    kernel = loop["params"]["layers_2"]["kernel"]
    noise = state.feedback["layers_2"]["kernel"] - kernel
    assert 0.05 < float(noise.std()) < 0.2
    assert hash(names["NoisyTransport"](period=10, scale=0.1))


def test_a_state_survives_its_checkpoint_and_another_rule_is_noticed(loop, tmp_path):
    names = {**loop}
    exec(block("def restore("), names)

    preserve = soap_jax.SignSync(period=10, magnitude="preserve")

    def make_state(rule=preserve):
        feedback = soap_jax.init_feedback(jax.random.key(3), loop["params"], rule)
        return training.init_train_state(loop["params"], optax.adam(0.1), feedback=feedback)

    state = make_state()
    names["save"](tmp_path, state)
    restored = names["restore"](tmp_path, make_state)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), restored, state)
    assert jax.tree.all(same)
    with pytest.raises(ValueError, match="the checkpoint's rule is not Fixed"):
        names["restore"](tmp_path, lambda: make_state(soap_jax.Fixed()))


def test_every_link_leads_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(links) > 10
    missing = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert missing == []


def test_the_rules_table_names_rules_that_exist():
    calls = re.findall(r"\| `((?:Fixed|SignSync|Transport)\([^`]*\))` \|", README)
    rules = [eval(call, {**vars(soap_jax.rules), "T": 10, "r": 0.5}) for call in calls]
    assert {type(rule).__name__ for rule in rules} == {"Fixed", "SignSync", "Transport"}
    shown = [rule.magnitude for rule in rules if isinstance(rule, soap_jax.SignSync)]
    assert sorted(shown) == sorted(typing.get_args(soap_jax.rules.Magnitude))


def test_the_table_of_methods_is_the_registry():
    from soap_jax.study import METHODS

    table = README.split("<!-- methods -->")[1].split("\n\n")[0].strip().splitlines()[2:]
    cells = [re.split(r" (?<!\\)\| ", line.strip("| ").replace("`", "")) for line in table]
    shown = {name: tuple(w.replace("\\|", "|") for w in words) for name, *words in cells}
    assert shown == {
        name: (method.label, method.isolates, method.paper or "here")
        for name, method in METHODS.items()
    }


def test_a_task_of_ones_own_runs_as_a_study(tmp_path, monkeypatch, capsys):
    from soap_jax import cli

    shown = re.findall(r"<!-- file: (.*) -->\n```python\n(.*?)```", README, re.DOTALL)
    ((name, content),) = shown
    assert (ROOT / name).read_text() == content
    assert len(content.splitlines()) < 30
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_start_jax", lambda **options: None)
    command = ["soap-jax", "study", str(ROOT / name), "--quick", "--no-cache"]
    monkeypatch.setattr("sys.argv", command)
    cli.main()
    printed = capsys.readouterr().out
    for words in ("FA, fixed feedback", "signs, every 20 updates", "report.html"):
        assert words in printed
    assert (tmp_path / "results" / "my_task-quick" / "report.html").exists()
