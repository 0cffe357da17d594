"""Several processes are one study: the same tables, written once, and they end together."""

import contextlib
import pathlib
import socket
import time

import filelock
import pytest
import study_processes as processes


@contextlib.contextmanager
def together(script, *args, cwds, num=2, **more):
    """The command in several processes of two CPU devices each, as SLURM would start them here."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                processes.started(
                    script,
                    *args,
                    "--distributed",
                    cwd=cwds[rank],
                    env=processes.environment(
                        SLURM_JOB_ID="1",
                        SLURM_STEP_NODELIST="127.0.0.1",
                        SLURM_NTASKS=str(num),
                        SLURM_PROCID=str(rank),
                        SLURM_LOCALID=str(rank),
                        JAX_COORDINATOR_ADDRESS=address,
                        JAX_COORDINATOR_BIND_ADDRESS=address,
                        **more,
                    ),
                )
            )
            for rank in range(num)
        ]


def end(group, within):
    """The exit codes, and what was said on either stream, of processes that end in time."""
    deadline = time.monotonic() + within
    ends = [processes.ended(one, max(deadline - time.monotonic(), 0.1)) for one in group]
    return [code for code, *_ in ends], [out for _, out, _ in ends], [err for *_, err in ends]


@pytest.fixture
def cwds(tmp_path):
    """A place for each process: what one writes is seen to be its own."""
    places = [tmp_path / "first", tmp_path / "second"]
    for place in places:
        place.mkdir()
    return places


def assert_first_wrote_everything(cwds, said, task=processes.TASK):
    processes.assert_finished_alike(cwds[0] / "out", task)
    assert not list(cwds[1].iterdir()), "the second wrote something"
    assert "runs" not in said[1], "the second said something"  # of its own: Gloo does


@pytest.mark.slow
def test_two_processes_give_one_processs_bits(cwds):
    command = processes.WITHOUT_REPORT, *processes.arguments("out")
    with together(*command, cwds=cwds) as group:
        codes, said, errors = end(group, within=90)
    assert codes == [0, 0], errors
    assert "32 runs of" in said[0] and "on 4 x cpu" in said[0]
    assert_first_wrote_everything(cwds, said)


@pytest.mark.slow
def test_two_processes_killed_and_started_again_give_one_processs_bits(cwds):
    command = processes.WITHOUT_REPORT, *processes.arguments("out")
    for more_than in (0, 2):
        with together(*command, cwds=cwds) as group:
            processes.await_parts(group[0], cwds[0] / "out", more_than)
            for process in group:
                process.kill()
            assert end(group, within=10)[0] == [-9, -9]
    before = processes.parts(cwds[0] / "out")
    with together(*command, cwds=cwds) as group:
        codes, said, errors = end(group, within=90)
    assert codes == [0, 0], errors
    assert before and f"{4 * len(before)} runs are there already" in said[0]
    assert_first_wrote_everything(cwds, said)


@pytest.mark.slow
def test_two_processes_report_once_and_find_their_results_again(cwds):
    task = processes.TASK + "methods, periods = ['kp', 'sign'], (1, 10)"
    for again in (False, True):
        with together(processes.STUDY, *processes.arguments("out", task), cwds=cwds) as group:
            codes, said, errors = end(group, within=120)
        assert codes == [0, 0], errors
        assert ("96 runs are there already" in said[0]) == again
        assert (cwds[0] / "out" / "report.html").exists()
        assert_first_wrote_everything(cwds, said, task)


def test_all_processes_end_at_once_when_the_first_finds_its_directory_taken(cwds):
    (cwds[0] / "out").mkdir()
    command = processes.WITHOUT_REPORT, *processes.arguments("out")
    with (
        filelock.FileLock(cwds[0] / "out" / ".lock"),
        together(*command, cwds=cwds) as group,
    ):
        codes, _, errors = end(group, within=60)
    assert codes[0] == 2 and codes[1] != 0
    assert errors[0].startswith("error: another process is writing to out.")
    assert not list(cwds[1].iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("problem", ["another configuration", "no task for the second", "full"])
def test_all_processes_end_at_once_when_one_of_them_cannot_go_on(problem, cwds):
    args = list(processes.arguments("out"))
    script = processes.WITHOUT_REPORT
    match problem:
        case "another configuration":
            with processes.started(script, *args, cwd=cwds[0]) as alone:
                processes.await_parts(alone, cwds[0] / "out")
            args.append("--steps=8")
            ends_in_words = 0
        case "no task for the second":
            trouble = "import os\nassert os.environ['SLURM_PROCID'] == '0', 'no data'\n"
            args = list(processes.arguments("out", trouble + processes.TASK))
            ends_in_words = 1
        case "full":
            trouble = "from soap_jax.study import store\nimport errno\n"
            trouble += "def add(*_): raise OSError(errno.ENOSPC, 'cannot write: no space')\n"
            trouble += "store.Store.add = add\n"
            script = trouble + script
            ends_in_words = 0
    with together(script, *args, cwds=cwds) as group:
        codes, _, errors = end(group, within=80)
    assert 0 not in codes
    assert codes[ends_in_words] == 2 and errors[ends_in_words].startswith("error: ")


@pytest.mark.slow
def test_all_processes_end_when_one_is_killed_and_the_next_start_goes_on(cwds):
    command = processes.WITHOUT_REPORT, *processes.arguments("out")
    for victim in (1, 0):
        before = processes.parts(cwds[0] / "out")
        with together(*command, cwds=cwds) as group:
            processes.await_parts(group[0], cwds[0] / "out", more_than=len(before))
            group[victim].kill()
            codes, _, _ = end(group, within=80)
            assert 0 not in codes
        assert before.items() < processes.parts(cwds[0] / "out").items()
    with together(*command, cwds=cwds) as group:
        codes, said, errors = end(group, within=90)
    assert codes == [0, 0], errors
    assert_first_wrote_everything(cwds, said)


@pytest.mark.slow
def test_nothing_leaves_the_machine(cwds):
    def peers(process):
        """The other ends of the process's TCP connections, as Linux tells them."""
        inodes = set()
        for link in pathlib.Path(f"/proc/{process.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                name = str(link.readlink())
                inodes |= {name[8:-1]} if name.startswith("socket:[") else set()
        found = set()
        for table in ("tcp", "tcp6"):
            for line in (
                pathlib.Path(f"/proc/{process.pid}/net/{table}").read_text().splitlines()[1:]
            ):
                fields = line.split()
                if fields[9] in inodes:
                    found |= {fields[1].split(":")[0], fields[2].split(":")[0]}
        return found

    if not pathlib.Path("/proc/self/net/tcp").exists():
        pytest.skip("needs Linux's /proc")
    command = processes.WITHOUT_REPORT, *processes.arguments("out")
    with together(*command, cwds=cwds) as group:
        processes.await_parts(group[0], cwds[0] / "out")
        used = set.union(*map(peers, group))
    here = {"0100007F", "00000000", "0" * 32, "0000000000000000FFFF00000100007F"}
    assert "0100007F" in used or "0000000000000000FFFF00000100007F" in used
    assert used <= here
