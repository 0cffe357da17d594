"""The site's pages: their code runs, their links lead somewhere, and every public name has one."""

import dataclasses
import functools
import importlib
import inspect
import pathlib
import re
import shlex
import subprocess
import types
import typing

import flax.linen as nn
import jax
import jax.numpy as jnp
import markdown_blocks as blocks
import numpy as np
import optax
import pytest
from flax import nnx

import soap_jax
from soap_jax import cli, models, sweeps, training

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))
TEXTS = {name: (DOCS / name).read_text() for name in PAGES}
LINKED = [*(DOCS / name for name in PAGES)]
LINKED += [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")]
LINKED += [ROOT / "benchmarks" / "README.md", ROOT / "examples" / "README.md"]
LINKED += [ROOT / name for name in ["studies/README.md"] if (ROOT / name).exists()]

# Which tests run the Python blocks of a page. Those of METHODS share names, page after page.
METHODS = ["learned", "direct", "time-local", "metrics"]  # tests/test_methods_guide.py
HERE = ["any-model", "rules", "training", "checkpoints", "scaling", "compare"]


def guide(name):
    return blocks.python(TEXTS[f"guides/{name}.md"])


def test_every_page_with_code_is_tested():
    with_code = {name for name in PAGES if blocks.python(TEXTS[name])}
    assert with_code == {f"guides/{name}.md" for name in METHODS + HERE}


# The code


def classifier():
    """What the guide to any model refers to."""
    rng = np.random.default_rng(0)
    x, labels = rng.standard_normal((16, 12), np.float32), rng.integers(0, 10, 16)
    model = nn.Sequential([nn.Dense(16), nn.tanh, nn.Dense(10)])

    def loss(params, x, labels):
        return training.cross_entropy(model.apply({"params": params}, x), labels)

    params = model.init(jax.random.key(0), x)["params"]
    return {
        "soap_jax": soap_jax, "jax": jax, "jnp": jnp, "nnx": nnx, "optax": optax,
        "x": jnp.asarray(x), "labels": jnp.asarray(labels), "params": params, "loss": loss,
        "key": jax.random.key(1),
        "nnx_model": nnx.Sequential(
            nnx.Linear(12, 16, rngs=nnx.Rngs(0)), nnx.tanh, nnx.Linear(16, 10, rngs=nnx.Rngs(1))
        ),
    }  # fmt: skip


def test_any_model_gets_pseudo_gradients():
    names = classifier()
    first, second, third = guide("any-model")
    exec(first.code, names)
    true = jax.grad(names["loss"])(names["params"], names["x"], names["labels"])
    same = jax.tree.map(lambda a, b: bool(jnp.allclose(a, b)), names["grads"], true)
    assert same["layers_2"] == {"kernel": True, "bias": True}
    assert same["layers_0"] == {"kernel": False, "bias": False}
    exec(third.code, names)
    found = jax.tree.map(lambda leaf: bool(leaf.any()), names["grads_of_zeros"])
    assert found["layers_2"] == {"kernel": True, "bias": True}
    assert found["layers_0"] == {"kernel": False, "bias": False}
    exec(second.code, names)
    assert jax.tree.structure(names["grads"]) == jax.tree.structure(names["nnx_params"])
    assert np.any(jax.tree.leaves(names["grads"])[0])


@pytest.fixture(scope="module")
def loop():
    rng = np.random.default_rng(0)
    batch = rng.standard_normal((32, 784), np.float32), rng.integers(0, 10, 32)
    names = {"batches": [batch] * 20}
    exec(guide("rules")[0].code, names)
    return names


def test_the_training_loop_learns(loop):
    params, feedback = loop["params"], loop["state"].feedback
    assert loop["loss_fn"](params, feedback, *loop["batches"][0]) < 0.5  # from 2.3
    assert loop["step"] == 19


def test_a_rule_of_ones_own_is_that_small(loop):
    names = {**loop, "key": jax.random.key(2)}
    names["variables"] = loop["model"].init(jax.random.key(0), np.ones((1, 784), np.float32))
    exec(guide("rules")[1].code, names)
    state = soap_jax.sync_feedback(loop["params"], names["state"], 10)
    kernel = loop["params"]["layers_2"]["kernel"]
    noise = state.feedback["layers_2"]["kernel"] - kernel
    assert 0.05 < float(noise.std()) < 0.2
    assert hash(names["NoisyTransport"](period=10, scale=0.1))


def test_feedback_of_the_kernels_is_that_of_a_sync():
    def loss(params, x, labels):
        h = jnp.tanh(jnp.tanh(x @ params["first"]["w"]) @ params["second"]["w"])
        return training.cross_entropy(h @ params["third"]["w"], labels)

    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"first": (12, 16), "second": (16, 16), "third": (16, 10)}
    params = {
        n: {"w": jax.random.normal(k, s)} for k, (n, s) in zip(keys, shapes.items(), strict=True)
    }
    x, labels = jnp.ones((4, 12)), jnp.arange(4)
    names = {**vars(soap_jax), "jax": jax, "loss": loss, "params": params, "x": x, "labels": labels}
    for name in ("with_feedback", "feedback_of", "SignSync"):
        names[name] = getattr(soap_jax, name)
    _, _, block = guide("rules")
    exec(block.code, names)
    rule = soap_jax.SignSync(magnitude="unit")
    state = soap_jax.init_feedback(keys[0], params, rule, where=["second/*", "third/*"])
    state = soap_jax.sync_feedback(params, state, 0)
    expected = jax.grad(soap_jax.with_feedback(loss))(params, state.feedback, x, labels)
    jax.tree.map(np.testing.assert_array_equal, names["grads"], expected)


def test_the_rules_table_names_rules_that_exist():
    text = TEXTS["guides/rules.md"]
    calls = re.findall(r"\| `((?:Fixed|SignSync|Transport|WeightMirror)\([^`]*\))` \|", text)
    rules = [eval(call, {**vars(soap_jax.rules), "T": 10, "r": 0.5, "d": 0.5}) for call in calls]
    offered = {
        name
        for name, value in vars(soap_jax.rules).items()
        if isinstance(value, type)
        and issubclass(value, soap_jax.Rule)
        and value is not soap_jax.Rule
    }
    assert {type(rule).__name__ for rule in rules} == offered
    shown = [rule.magnitude for rule in rules if isinstance(rule, soap_jax.SignSync)]
    assert sorted(shown) == sorted(typing.get_args(soap_jax.rules.Magnitude))


def test_training_and_sweeps_run(capsys):
    digits = soap_jax.data.load("digits")
    names = {
        "jax": jax, "optax": optax, "models": models, "training": training, "sweeps": sweeps,
        "init_feedback": soap_jax.init_feedback, "SignSync": soap_jax.SignSync,
        "x": jnp.asarray(digits.train.images.reshape(-1, 64) / np.float32(16)),
        "labels": jnp.asarray(digits.train.labels),
    }  # fmt: skip
    first, second = guide("training")
    exec(first.code, names)
    assert 0.8 < float(capsys.readouterr().out) < 1
    exec(second.code, names)
    assert capsys.readouterr().out == second.shown
    assert np.all(names["losses"][..., -1] < names["losses"][..., 0])


def test_a_state_survives_its_checkpoint_and_another_rule_is_noticed(loop, tmp_path):
    names = {**loop}
    (block,) = guide("checkpoints")
    exec(block.code, names)
    rule = soap_jax.SignSync(period=10, magnitude="preserve")

    def make_state():
        feedback = soap_jax.init_feedback(jax.random.key(3), loop["params"], rule)
        return training.init_train_state(loop["params"], optax.adam(0.1), feedback=feedback)

    state = make_state()
    names["save"](tmp_path, state, rule)
    restored = names["restore"](tmp_path, make_state, rule)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), restored, state)
    assert jax.tree.all(same)
    for other in (soap_jax.Fixed(), dataclasses.replace(rule, period=5)):
        with pytest.raises(ValueError, match=r"the checkpoint's rule is not (Fixed|.*period=5)"):
            names["restore"](tmp_path, make_state, other)


def test_a_batch_over_devices_gives_the_same_gradients():
    names = classifier()
    exec(guide("any-model")[0].code, names)
    (block,) = guide("scaling")
    one, several = dict(names), dict(names)
    for known, code in (
        (one, block.code.replace("jax.device_count()", "1")),
        (several, block.code),
    ):
        known["params"], known["state"] = jax.tree.map(jnp.copy, (names["params"], names["state"]))
        exec(code, known)
    assert len(several["train_state"][0]["layers_0"]["bias"].devices()) == jax.device_count() > 1
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)  # order of sums
    jax.tree.map(close, several["train_state"][0], one["train_state"][0])


def test_a_task_of_ones_own_runs_as_a_study(tmp_path, monkeypatch, capsys):
    shown = re.findall(
        r"<!-- file: (.*) -->\n```python\n(.*?)```", TEXTS["guides/compare.md"], re.DOTALL
    )
    ((name, content),) = shown
    assert [block.code for block in guide("compare")][:1] == [content]
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


def test_strict_normalisation_is_a_method_of_a_study():
    _, block, _ = guide("compare")
    names = {}
    exec(block.code, names)
    strict = names["methods"]["strict"]
    kernel = jnp.array([[3.0, -4.0], [1.0, 2.0]])
    made = strict.rule(kernel, jnp.zeros_like(kernel), jax.random.key(0))
    np.testing.assert_allclose(made, np.sqrt(30 / 4) * np.sign(kernel), rtol=1e-6)
    study, options = names["study"], {"learning_rates": (0.1,), "seeds": 1, "steps": 2}
    result = study.compare(soap_jax.tasks.mlp(1, 8), names["methods"], evaluations=1, **options)
    assert result.label("strict") == "strict normalisation"
    found = result.measured("norm_ratio/Dense_1/kernel", "strict", 0.1, end=True)
    np.testing.assert_allclose(found, 1, rtol=1e-5)


def test_what_a_training_left_is_loaded(tmp_path, monkeypatch):
    *_, block = guide("compare")
    directory = re.search(r'single\.load\("(.*)"\)', block.code)[1]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_start_jax", lambda **options: None)
    (command,) = (c for c in COMMANDS if "soap-jax train" in c)
    words = command_of(command)
    assert directory == f"results/train/digits-{words[words.index('--method') + 1]}"
    words[words.index("--epochs") + 1] = "1"
    monkeypatch.setattr("sys.argv", words)
    cli.main()
    images = soap_jax.data.load("digits").test.images[:5]
    names = {"images": images}
    exec(block.code, names)
    assert names["logits"].shape == (5, 10)


# The commands

COMMANDS = [line for name in PAGES for line in blocks.shell(TEXTS[name])]


def command_of(line):
    """The words of a `soap-jax` command within a line of a shell block."""
    words = shlex.split(line.split("soap-jax ", 1)[1].rstrip('"'))
    return ["soap-jax", *words]


@pytest.mark.parametrize("line", [line for line in COMMANDS if "soap-jax " in line])
def test_the_options_of_commands_exist(line, monkeypatch, capsys):
    words = command_of(line)
    monkeypatch.setattr("sys.argv", [*words[:2], "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    assert {word for word in words if word.startswith("--")} <= known


def test_every_shell_block_is_a_command_of_ours():
    assert COMMANDS and [line for line in COMMANDS if "soap-jax " not in line] == []


def test_the_table_of_methods_is_the_registry():
    from soap_jax.study import METHODS

    text = TEXTS["guides/compare.md"]
    table = text.split("<!-- methods -->")[1].split("\n\n")[0].strip().splitlines()[2:]
    cells = [re.split(r" (?<!\\)\| ", line.strip("| ").replace("`", "")) for line in table]
    shown = {name: tuple(w.replace("\\|", "|") for w in words) for name, *words in cells}
    assert shown == {
        name: (method.label, method.isolates, method.paper or "here")
        for name, method in METHODS.items()
    }


def test_the_tables_of_what_works_where_are_those_of_the_saved_results():
    what_works_where = importlib.import_module("benchmarks.what_works_where")
    rows = what_works_where.read(ROOT / "benchmarks" / "results" / "what_works_where.json")
    page = (ROOT / "studies" / "README.md").read_text()
    made = {
        "table": what_works_where.matrix(rows),
        "claims": what_works_where.claims(what_works_where.CLAIMS),
    }
    for name, table in made.items():
        assert f"<!-- {name} -->\n\n{table}\n<!-- end of {name} -->" in page
    colors = {row["label"]: row["color"] for row in rows}
    assert len(set(colors.values())) == len(colors)
    percent = [row for row in rows if row["metric"].endswith("accuracy") and row["at_edge"]]
    assert percent and "A star marks" in page


# The links


def slug(heading):
    """A heading's anchor, as GitHub and the site make it."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
    return re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")


def anchors(path):
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


@pytest.mark.parametrize("path", LINKED, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(path):
    def leads(link):
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.exists() or not target.is_relative_to(ROOT):
            return False
        return not anchor or anchor in anchors(target)

    text = path.read_text()
    internal = [link for link in blocks.links(text) if "://" not in link]
    assert [link for link in internal if not leads(link)] == []


@pytest.mark.parametrize("path", LINKED, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_text_is_lost_as_a_tag(path):
    text = re.sub(r"^ *```.*?^ *```$|`[^`]*`", "", path.read_text(), flags=re.M | re.DOTALL)
    assert re.findall(r"<[a-zA-Z][^>]*>", text) == []


def tracked():
    """The files of the repository; without git, those in folders that are not hidden."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode == 0:
        return [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    folders = [path for path in ROOT.iterdir() if path.name[0] != "." and path.is_dir()]
    return [*ROOT.glob("*.*"), *(path for folder in folders for path in folder.rglob("*.*"))]


def conflicts(content):
    """The lines of a text that git writes around two versions in conflict."""
    if b"\0" in content:
        return []
    return re.findall(rb"^(?:<{7} |>{7} |\|{7} ).*$", content, re.MULTILINE)


def test_no_file_has_a_conflict():
    files = [path for path in tracked() if path.is_file()]
    assert {ROOT / "CHANGELOG.md", ROOT / "mkdocs.yml", ROOT / "tests" / "test_docs.py"} <= {*files}
    assert [str(path) for path in files if conflicts(path.read_bytes())] == []
    assert len(conflicts(b"a\n" + b"<" * 7 + b" HEAD\n" + b">" * 7 + b" other\n")) == 2


# The API reference

PUBLIC = [
    *(m for name in soap_jax.__all__ if isinstance(m := getattr(soap_jax, name), types.ModuleType)),
    importlib.import_module("soap_jax.feedback"),
]
SHOWN = [
    name
    for page in PAGES
    if page.startswith("api/")
    for name in re.findall(r"^::: (\S+)", TEXTS[page], re.MULTILINE)
]


def resolve(name):
    """The object of a dotted name."""
    parts = name.split(".")
    for i in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:i]))
        except ModuleNotFoundError:
            continue
        return functools.reduce(getattr, parts[i:], value)
    raise ModuleNotFoundError(name)


def test_the_reference_names_what_exists_and_each_once():
    assert len(set(SHOWN)) == len(SHOWN)
    for name in SHOWN:
        assert resolve(name) is not None


@pytest.mark.parametrize("module", PUBLIC, ids=lambda m: m.__name__)
def test_every_module_has_a_page_in_the_reference(module):
    short = module.__name__.removeprefix("soap_jax.")
    assert f"api/{short}.md" in PAGES
    assert f"- {short}: api/{short}.md" in (ROOT / "mkdocs.yml").read_text()


def defined_in(module):
    """What a module shows by itself: functions and classes of its own, or what it lists."""
    for name in getattr(module, "__all__", vars(module)):
        value = getattr(module, name)
        own = getattr(value, "__module__", None)
        of_its_own = own == module.__name__ or hasattr(module, "__all__")
        if not name.startswith("_") and of_its_own and not isinstance(value, types.ModuleType):
            yield name, value


@pytest.mark.parametrize("module", [soap_jax, *PUBLIC], ids=lambda m: m.__name__)
def test_every_public_name_has_a_place_in_the_reference(module):
    shown = [resolve(name) for name in SHOWN]
    whole = [value for value in shown if inspect.ismodule(value)]

    def has_place(name, value):
        if any(value is one for one in shown):
            return True
        home = getattr(value, "__module__", module.__name__)
        return any(m.__name__ == home or value is vars(m).get(name) for m in whole)

    found = dict(defined_in(module))
    assert found
    assert [name for name, value in found.items() if not has_place(name, value)] == []


def test_the_index_of_the_reference_lists_the_top_level():
    text = TEXTS["api/index.md"]
    missing = [
        name
        for name in soap_jax.__all__
        if f"[`{name}`]" not in text and f"[{name}]({name}.md)" not in text
    ]
    assert missing == []
