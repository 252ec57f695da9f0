"""How often, and on which slots, a job is restarted."""

import os
import queue
import signal
import sys
import time
from types import SimpleNamespace

import pytest

from launch.__main__ import main
from launch.core.job import Events, Failure, Outcome
from launch.core.rank_process import RankProcess
from launch.local import elastic_rank
from launch.local.elastic import Discovery, Elastic, TerminatedError, visible_devices

KILLED = Outcome(137, Failure(1, "was killed", []))


def begun(**options):
    elastic = Elastic(**options)
    elastic.first_slots(Events())
    return elastic


def test_a_lost_slot_is_given_up_while_enough_are_left(capsys):
    elastic = begun(ranks=4, min_ranks=3, max_restarts=5)
    assert elastic.next_slots(KILLED, Events()) == [0, 2, 3]
    assert elastic.next_slots(KILLED, Events()) == []
    assert capsys.readouterr().err == (
        "launch: rank 1 was killed; continuing with 3 ranks (restart 1 of 5)\n"
        "launch: not started again: slots left: 2, --min-ranks is 3\n"
    )


def test_a_lost_rank_is_replaced_without_min_ranks(capsys):
    elastic = begun(ranks=2, max_restarts=1)
    assert elastic.next_slots(KILLED, Events()) == [0, 1]
    assert elastic.next_slots(KILLED, Events()) == []
    said = capsys.readouterr().err
    assert said.endswith("not started again: it was 1 times already (--max-restarts)\n")


def test_ranks_that_ask_to_be_run_again_keep_their_slots(capsys):
    elastic = begun(ranks=2, min_ranks=1, max_restarts=1)
    assert elastic.next_slots(Outcome(85), Events()) == [0, 1]
    assert "the ranks saved and ask to be run again; continuing with 2 ranks (restart 1 of 1)" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("outcome", "said"),
    [
        (Outcome(0), ""),
        (Outcome(0, outdated=True), ""),
        (Outcome(85, terminated=True), ""),
        (Outcome(130, terminated=True), ""),
        (KILLED._replace(terminated=True), ""),
        (Outcome(2, KILLED.failure), "launch: not started again: exit code 2 means bad input\n"),
    ],
)
def test_what_is_not_started_again(capsys, outcome, said):
    elastic = begun(ranks=2, min_ranks=1, max_restarts=3)
    assert elastic.next_slots(outcome, Events()) == []
    assert capsys.readouterr().err == said


def test_without_elastic_options_every_end_is_the_end(capsys):
    assert begun(ranks=2).next_slots(Outcome(85), Events()) == []
    assert begun(ranks=2).next_slots(KILLED, Events()) == []
    assert capsys.readouterr().err == ""


def test_slots_follow_the_command_that_counts_them(tmp_path, capsys):
    count, asked = tmp_path / "slots", tmp_path / "asked"
    count.write_text("3")
    discovery = Discovery(f"cat {count}; echo >> {asked}", 0.0)
    elastic = Elastic(2, 1, max_ranks=4, max_restarts=1, discovery=discovery, patience=30)
    assert elastic.first_slots(Events()) == [0, 1, 2]
    assert not outdated_after_an_answer(elastic, asked)
    count.write_text("9")
    assert outdated_after_an_answer(elastic, asked)
    assert elastic.next_slots(Outcome(85, outdated=True), Events()) == [0, 1, 2, 3]
    count.write_text("broken")
    assert not outdated_after_an_answer(elastic, asked)
    assert elastic.next_slots(KILLED, Events()) == [0, 1, 2, 3]
    said = capsys.readouterr().err
    assert "the number of slots has changed; continuing with 4 ranks\n" in said
    assert "printed 'broken' and ended with exit code 0" in said and "it stays at 9" in said
    assert said.endswith("continuing with 4 ranks (restart 1 of 1)\n"), "the change was none"


def test_a_number_that_flaps_changes_nothing(tmp_path):
    asked, odd = tmp_path / "asked", tmp_path / "odd"
    command = f"echo >> {asked}; if rm {odd} 2>/dev/null; then echo 1; else touch {odd}; echo 2; fi"
    elastic = Elastic(2, 1, discovery=Discovery(command, 0.0), patience=60)
    elastic.first_slots(Events())
    assert not outdated_after_an_answer(elastic, asked)
    elastic.close()


def outdated_after_an_answer(elastic, asked):
    """Whether the job is outdated, once an answer that was asked for from now on has come.

    The first to come may be an old one, and two must agree: the fourth question shows that the
    third was answered.
    """
    goal = len(asked.read_text()) + 4
    deadline = time.monotonic() + 60
    outdated = False
    while len(asked.read_text()) < goal:
        assert time.monotonic() < deadline
        outdated |= elastic.outdated()
        time.sleep(0.01)
    return outdated


@pytest.mark.parametrize("command", ["echo 0", "sleep 600"], ids=["no slots", "no answer"])
def test_slots_are_waited_for_until_a_signal_comes(command):
    elastic = Elastic(1, 1, discovery=Discovery(command, 60.0), max_restarts=1, patience=600)
    events = Events()
    events.put(signal.SIGINT)
    with pytest.raises(TerminatedError, match="ended by SIGINT before ranks were started") as told:
        elastic.first_slots(events)
    assert told.value.exit_code == 130
    with pytest.raises(queue.Empty):
        events.get_nowait()
    elastic.close()


def test_a_signal_between_two_starts_ends_the_job():
    elastic = Elastic(1, 1, discovery=Discovery("echo 1", 0.0), max_restarts=1, patience=600)
    elastic.first_slots(Events())
    events = Events()
    events.put(signal.SIGTERM)
    with pytest.raises(TerminatedError, match="ended by SIGTERM before ranks were started"):
        elastic.next_slots(KILLED, events)
    elastic.close()


def test_restarts_of_a_command_that_ends_at_once_come_at_longer_and_longer_intervals(
    capsys, monkeypatch
):
    monkeypatch.setattr("launch.local.elastic.LONGEST_PAUSE", 1.5)
    elastic, began = begun(ranks=1, max_restarts=9), time.monotonic()
    for _ in range(4):
        assert elastic.next_slots(KILLED, Events()) == [0]
    assert time.monotonic() - began >= 0 + 1 + 1.5 + 1.5
    said = capsys.readouterr().err.splitlines()
    assert [line.rpartition(")")[2] for line in said] == ["", " in 1 s", " in 1.5 s", " in 1.5 s"]
    events = Events()
    events.put(signal.SIGINT)
    with pytest.raises(TerminatedError) as told:
        elastic.next_slots(KILLED, events)
    assert told.value.exit_code == 130
    monkeypatch.setattr("launch.local.elastic.LONGEST_PAUSE", 0.0)  # it has run for longer now
    assert elastic.next_slots(KILLED, Events()) == [0]
    assert capsys.readouterr().err.endswith("(restart 6 of 9)\n")


def test_ranks_that_could_not_connect_are_started_once_more_whatever_the_options(capsys):
    elastic = begun(ranks=2)
    assert elastic.next_slots(KILLED._replace(unconnected=True), Events()) == [0, 1]
    assert "starting them once more" in capsys.readouterr().err
    assert elastic.next_slots(KILLED._replace(unconnected=True), Events()) == []


def test_ranks_that_saved_are_run_again_at_once(capsys):
    elastic = begun(ranks=1, max_restarts=9)
    for _ in range(2):
        elastic.next_slots(KILLED, Events())
    elastic.next_slots(Outcome(85), Events())
    assert capsys.readouterr().err.endswith("continuing with 1 rank (restart 3 of 9)\n")


def test_what_the_command_leaves_running_is_not_waited_for(tmp_path):
    discovery = Discovery(f"sleep 600 & echo $! > {tmp_path}/left; echo 2", 60.0)
    elastic = Elastic(2, 1, discovery=discovery, patience=600)
    try:
        assert elastic.first_slots(Events()) == [0, 1]
    finally:
        os.kill(int((tmp_path / "left").read_text()), signal.SIGKILL)


def test_a_command_that_still_runs_at_the_end_is_ended(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    discovery = Discovery(f"sleep 600 > {fifo} & wait", 60.0)
    discovery.ask()
    with open(fifo) as held:  # for as long as the command runs
        discovery.close()
        assert held.read() == ""


def test_a_command_that_keeps_failing_is_reported_once(tmp_path, capsys):
    once = tmp_path / "once"
    asked = tmp_path / "asked"
    discovery = Discovery(f"echo >> {asked}; rm {once} 2>/dev/null && echo 2", 0.0)
    once.touch()
    elastic = Elastic(2, 1, discovery=discovery, patience=600)
    elastic.first_slots(Events())
    assert not outdated_after_an_answer(elastic, asked)
    elastic.close()
    assert capsys.readouterr().err.count("it stays at 2") == 1


def test_too_few_slots_are_waited_for_until_there_are_enough(tmp_path, capsys):
    one_more_each_time = f"cd {tmp_path}; echo >> asked; wc -l < asked"
    discovery = Discovery(one_more_each_time, 0.01)
    elastic = Elastic(3, 1, discovery=discovery, max_restarts=1, patience=60)
    assert elastic.first_slots(Events()) == [0, 1, 2]
    said = "launch: --discover found 1 slots; 3 are needed: waiting for up to 60 s\n"
    assert capsys.readouterr().err == said


def test_a_lost_gpu_is_not_used_again(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_devices([0, 1]) is None
    assert visible_devices([0, 2, 3]) == "0,2,3"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert visible_devices([1, 3]) == "5,7"
    for given in ("", "0", "MIG-a,MIG-b,MIG-c"):  # none, or fewer than ranks, and it stays so
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
        assert visible_devices([1, 3]) is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,MIG-b/1/0")
    assert visible_devices([1]) == "MIG-b/1/0"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "how many ranks? -n N"),
        (["-n", "2", "--min-ranks", "3"], "2 ranks are not between --min-ranks 3 and --max-"),
        (["-n", "2", "--max-ranks", "3"], "--max-ranks 3 is above -n 2, and nothing reports"),
        (["-n", "1", "--discover", "echo many"], "--discover 'echo many' printed 'many'"),
        (["-n", "1", "--discover", "printf '\\377'"], "printed '\ufffd' and ended"),
        (["-n", "1", "--discover", "echo \u00b2"], "printed '\u00b2' and ended"),
        (["-n", "1", "--discover", "exit 3"], "ended with exit code 3"),
        (["-n", "1", "--discover", ""], "--discover '' printed ''"),  # a variable that is not set
    ],
)
def test_wrong_use_is_one_line_before_anything_is_started(capsys, options, words):
    assert main(["local", *options, "--", "false"]) == 2
    said = capsys.readouterr().err
    assert words in said and len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("outcome", "lost_a_peer", "goes_on"),
    [
        (KILLED, False, False),
        (KILLED, True, True),
        (Outcome(85), False, True),
        (Outcome(143, outdated=True), False, True),
        (Outcome(0), False, False),
        (Outcome(2, KILLED.failure), True, False),
        (Outcome(130, terminated=True), True, False),
    ],
)
def test_under_elastic_horovodrun_a_rank_comes_again_unless_its_end_was_its_own(
    outcome, lost_a_peer, goes_on
):
    child = SimpleNamespace(rank=1, lacks_cause=lambda: lost_a_peer)
    assert elastic_rank._should_restart(outcome, child) is goes_on


def test_outside_of_elastic_horovodrun_elastic_rank_says_what_it_is_for(monkeypatch, capsys):
    monkeypatch.delenv("HOROVOD_ELASTIC", raising=False)
    assert main(["elastic-rank", "--", "false"]) == 2
    assert "for the ranks of `horovodrun --min-np N" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "lost"), [("Connection closed by peer", True), ("terminated: bad record", False)]
)
def test_a_long_traceback_does_not_hide_that_a_peer_was_lost(line, lost):
    script = f"import sys; print({line!r}); print('in a call\\n' * 50); sys.exit(1)"
    events = queue.SimpleQueue()
    rank = RankProcess(0, [sys.executable, "-c", script], dict(os.environ), lambda: None, None)
    rank.watch(events, patience=0)
    assert events.get(timeout=60) is rank
    assert line not in rank.last_lines()
    assert rank.lacks_cause() is lost
