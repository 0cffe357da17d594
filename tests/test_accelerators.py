"""What steps compile to for an H100 and for TPUs that are not there.

Every rule costs what fixed feedback costs, but for its syncs and its memory. A target needs its
plugin:

    JAX_PLATFORMS=cpu python -m pytest tests/test_accelerators.py

where `pip install "jax[tpu]"` or `pip install "jax[cuda12]"` was; without, tests are skipped.
"""

import functools

import pytest

from benchmarks import compiled, jobs, methods, targets

NETWORK, BATCH = "784-1024-1024-1024-10", 512
KERNELS = 3  # with feedback
DRAWING = ("sign_redraw", "weight_mirror")
# TPUs keep in main memory what they find no room for elsewhere; a kernel has 4 MiB.
SLACK = {"h100": 2**12, "v5e:2x2": 2**20}
ALONE = [("h100", "one"), ("v5e:2x2", "one")]
PLACES = [*ALONE, ("v5e:2x2", "fsdp")]
PERIODS = (1, 10)

each_rule = pytest.mark.parametrize("rule", methods.RULES)
each_period = pytest.mark.parametrize("period", PERIODS)
alone = pytest.mark.parametrize("target, layout", ALONE)
everywhere = pytest.mark.parametrize("target, layout", PLACES)


def facts(target, layout, name, network=NETWORK, batch_size=BATCH):
    """A method's job, and the facts of its compiled step; programs that are alike compile once."""
    if message := targets.missing(target):
        pytest.skip(message)
    one = lower(target, layout, name, network, batch_size)[0]
    return one, read(target, layout, name, network, batch_size)


@functools.cache
def lower(target, layout, name, network, batch_size):
    found = targets.find(target)
    one = jobs.training_job(name, network, batch_size, "float32", layout, found)
    return one, one.lower(found)


PROGRAMS = {}


def read(target, *case):
    one, lowered = lower(target, *case)
    key = target, lowered.as_text()
    if key not in PROGRAMS:
        program = targets.find(target).finish(lowered)
        PROGRAMS[key] = compiled.facts(program, one.kernels)
    return PROGRAMS[key]


def named(rule, period):
    return f"{rule}, T={period}"


@everywhere
def test_fixed_feedback_takes_the_products_and_collectives_of_backprop(target, layout):
    _, reference = facts(target, layout, "bp")
    _, fixed = facts(target, layout, "fa")
    assert fixed.quiet.products == reference.quiet.products == 11  # 4 forward, 3 + 4 back
    assert fixed.quiet.copies <= reference.quiet.copies
    assert fixed.conditionals == fixed.dynamic_loops == 0
    gathered = fixed.quiet.by_kind().get("all-gather", (0, 0))[0]
    assert gathered <= reference.quiet.by_kind().get("all-gather", (0, 0))[0] + KERNELS


@each_period
@each_rule
@everywhere
def test_a_rule_takes_the_products_of_backprop(target, layout, rule, period):
    _, reference = facts(target, layout, "bp")
    _, found = facts(target, layout, named(rule, period))
    mirrored = 2 * KERNELS if rule == "weight_mirror" else 0
    assert found.sync.products == reference.quiet.products + mirrored
    if period > 1:
        assert found.quiet.products == reference.quiet.products


@each_period
@each_rule
@everywhere
def test_a_rule_copies_no_kernel_that_fixed_feedback_does_not_copy(target, layout, rule, period):
    fixed, found = (facts(target, layout, name)[1].quiet for name in ("fa", named(rule, period)))
    assert found.copies <= fixed.copies
    assert found.casts <= fixed.casts


@each_period
@each_rule
@everywhere
def test_nothing_is_sent_outside_a_sync_that_fixed_feedback_does_not_send(
    target, layout, rule, period
):
    _, fixed = facts(target, layout, "fa")
    _, found = facts(target, layout, named(rule, period))
    sent = [one for one in found.quiet.collectives if period > 1 or not one.of_sync]
    assert sorted(sent) == sorted(fixed.quiet.collectives)


@each_period
@each_rule
@alone
def test_a_rule_needs_no_memory_but_its_own(target, layout, rule, period):
    """Beyond what a sync draws, and a few scalars."""
    one, fixed = facts(target, layout, "fa")
    mine, found = facts(target, layout, named(rule, period))
    drawn = jobs.shard_bytes(mine.args[0].feedback.feedback) if rule in DRAWING else 0
    assert found.peak - mine.state <= fixed.peak - one.state + drawn + SLACK[target]


@each_period
@each_rule
@everywhere
def test_a_donated_state_is_written_over(target, layout, rule, period):
    one, found = facts(target, layout, named(rule, period))
    assert found.aliased >= one.state


@each_period
@each_rule
@everywhere
def test_a_rule_decides_once_whether_it_has_its_turn(target, layout, rule, period):
    """A host waits for each decision on GPU: one by a conditional, two at a sync by a loop."""
    _, found = facts(target, layout, named(rule, period))
    assert found.conditionals + found.dynamic_loops <= 1
    assert found.quiet.decisions <= 1
    assert found.sync.decisions <= 2


@alone
def test_transformed_models_keep_to_the_same(target, layout):
    case = "transformer, 2 blocks of 128", 16
    _, reference = facts(target, layout, "bp", *case)
    _, fixed = facts(target, layout, "fa, with_feedback", *case)
    _, synced = facts(target, layout, "sign, T=10, with_feedback", *case)
    products = {found.quiet.products for found in (reference, fixed, synced)}
    assert len(products) == 1
    assert synced.quiet.copies <= fixed.quiet.copies <= reference.quiet.copies


@alone
def test_direct_feedback_by_names_compiles_to_that_by_hand(target, layout):
    _, by_hand = facts(target, layout, "dfa")
    _, by_names = facts(target, layout, "dfa, by names")
    assert by_names.quiet.products == by_hand.quiet.products
    assert by_names.quiet.copies == by_hand.quiet.copies
    assert by_names.peak <= by_hand.peak + SLACK[target]


def test_a_target_is_refused_that_is_none():
    with pytest.raises(ValueError, match="expected 'h100'"):
        targets.missing("a100")
    with pytest.raises(ValueError, match="expected 'h100'"):
        targets.find("v5e")


def test_a_missing_plugin_is_named_with_the_command(monkeypatch):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    assert targets.missing("v5e:2x2").endswith('pip install "jax[tpu]"')
    assert targets.missing("h100").endswith('pip install "jax[cuda12]"')
    targets.find.cache_clear()
    with pytest.raises(targets.MissingPlugin, match="needs its plugin"):
        targets.find("h100:2")
