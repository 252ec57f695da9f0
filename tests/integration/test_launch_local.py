"""`python -m launch local` with real Horovod, and with ranks that fail in each way."""

import fcntl
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import termios
from pathlib import Path

import psutil
import pytest

from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
STANDIN = Path(__file__).with_name("standin.py")


UNSAVED = (
    "had not ended and got SIGKILL: what was not saved by then is lost (--kill-after gives ranks "
    "longer)"
)


def start(*arguments, env=None):
    return subprocess.Popen(
        [sys.executable, "-m", "launch", "local", *arguments],
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*arguments, env=None):
    process = start(*arguments, env=env)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def python(code):
    """A command that runs `code` with `rank` set, without Horovod."""
    return [
        "--",
        "python",
        "-c",
        f"import os, sys, time; rank = os.environ['HOROVOD_RANK']; {code}",
    ]


def wait_for(path):
    wait_until(path.exists, lambda: f"no {path}")


def test_ranks_train_together_and_lines_carry_their_rank(tmp_path):
    env = {"HOROVOD_GLOO_IFACE": "", "OMP_NUM_THREADS": "1"}
    code, out, err = run("-n", "3", "--", "python", str(STANDIN), str(tmp_path), "4", "0", env=env)
    assert (code, err) == (0, "")
    assert out == "[0] from step 0 with 3 ranks\n[0] done: 60.0\n"


def test_late_rank_is_waited_for_beyond_gloos_timeout(tmp_path):
    late = f"sleep $((HOROVOD_RANK * 5)); exec python {STANDIN} {tmp_path} 2 0"
    env = {"HOROVOD_GLOO_TIMEOUT_SECONDS": "2"}
    code, out, err = run("-n", "2", "--quiet", "--", "bash", "-c", late, env=env)
    assert (code, out) == (0, "from step 0 with 2 ranks\ndone: 9.0\n"), err


def test_ranks_that_have_parted_meet_again():
    """As a program does that tries another learning rate after a run that failed on all ranks."""
    again = (
        "import time, horovod.mxnet as hvd\n"
        "for _ in range(2):\n"
        "    hvd.init(); size = hvd.size(); hvd.shutdown(); time.sleep(0.5)\n"
        "print(size)\n"
    )
    code, out, err = run("-n", "2", "--quiet", "--", "python", "-c", again)
    assert (code, out) == (0, "2\n"), err


def test_rank_that_never_comes_is_named(tmp_path):
    never = f"[ $HOROVOD_RANK = 1 ] && sleep 600; exec python {STANDIN} {tmp_path} 2 0"
    options = ["-n", "2", "--start-timeout", "5", "--kill-after", "1"]
    code, _, err = run(*options, "--", "bash", "-c", never)
    assert code != 0
    assert "launch: 1 of 2 ranks called hvd.init() within 5 s; missing: rank 1\n" in err


def test_rank_that_ends_before_the_others_can_meet_it_is_named():
    """`--start-timeout` is longer than the test may take."""
    early = "rank == '1' and sys.exit(0); import horovod.mxnet as h; h.init()"
    code, _, err = run("-n", "3", "--quiet", "--kill-after", "1", *python(early))
    assert code == 1
    assert err == (
        "launch: rank 1 ended with exit code 0 before hvd.init(), where others wait; all other "
        "ranks have been ended\n"
    )


def test_quiet_shows_rank_0_bare_and_hides_the_others():
    code, out, err = run("-n", "3", "--quiet", *python("print('hello', rank)"))
    assert (code, out, err) == (0, "hello 0\n", "")


def test_failing_rank_gives_the_exit_code_and_its_last_lines():
    failing = "print('about to fail') if rank == '1' else time.sleep(600); sys.exit(7)"
    code, _, err = run("-n", "3", "--quiet", *python(failing))
    assert code == 7
    assert err == (
        "launch: last lines of rank 1, which failed:\n"
        "    about to fail\n"
        "launch: rank 1 ended with exit code 7; all other ranks have been ended\n"
    )


def test_rank_0_may_speak_for_all():
    failing = "rank == '0' and (time.sleep(1), print('no such file')); sys.exit(2)"
    code, _, err = run("-n", "2", *python(failing))
    assert code == 2
    assert err.startswith("launch: last lines of rank 0, which failed:\n    no such file\n")


def test_the_rank_that_raised_is_named_not_those_that_lost_it(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text(
        "import horovod.mxnet as hvd, mxnet as mx\n"
        "hvd.init()\n"
        "for step in range(100):\n"
        "    hvd.allreduce(mx.nd.ones(1), name='x').asscalar()\n"
        "    assert hvd.rank() != 1 or step != 3, 'bad record'\n"
    )
    code, _, err = run("-n", "3", "--quiet", "--", "python", str(broken))
    assert code == 1
    assert "AssertionError: bad record\nlaunch: rank 1 ended with exit code 1" in err


def test_killed_rank_and_its_cause(tmp_path):
    process = start("-n", "2", "--", "python", str(STANDIN), str(tmp_path), "600")
    wait_for(tmp_path / "losses")
    victim = rank_process(process, 1)
    victim.kill()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL
    assert "launch: rank 1 was killed by SIGKILL" in err


def test_stopped_rank_is_killed_and_named(tmp_path):
    env = {"HOROVOD_GLOO_TIMEOUT_SECONDS": "2"}
    command = ["--", "python", str(STANDIN), str(tmp_path), "600"]
    process = start("-n", "3", "--kill-after", "1", *command, env=env)
    wait_for(tmp_path / "losses")
    rank_process(process, 2).suspend()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL
    assert "launch: rank 2 stood stopped (SIGSTOP) for 2 s: SIGKILL" in err


def rank_process(launcher, rank):
    return next(
        child
        for child in psutil.Process(launcher.pid).children()
        if child.environ().get("HOROVOD_RANK") == str(rank)
    )


def test_ctrl_c_ends_all_ranks_and_their_children(tmp_path):
    code = (
        "import subprocess; subprocess.Popen(['sleep', '600']); "
        f"open(r'{tmp_path}/' + rank, 'w'); time.sleep(600)"
    )
    process = start("-n", "2", *python(code))
    wait_for(tmp_path / "0")
    wait_for(tmp_path / "1")
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) == 5  # with the watcher
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "launch: interrupted; the ranks have 10 s to save and end" in err
    assert psutil.wait_procs(family, timeout=10)[1] == []


def test_second_ctrl_c_kills_ranks_that_do_not_listen(tmp_path):
    code = (
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        f"open(r'{tmp_path}/' + rank, 'w'); time.sleep(600)"
    )
    process = start("-n", "1", "--kill-after", "600", *python(code))
    wait_for(tmp_path / "0")
    process.send_signal(signal.SIGINT)
    assert "interrupted" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, f"launch: rank 0 {UNSAVED}\n")


def test_ranks_that_are_slower_than_kill_after_are_said_to_be_killed_unsaved(tmp_path):
    code = (
        "import signal; rank != '1' and signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        f"open(r'{tmp_path}/' + rank, 'w'); time.sleep(600)"
    )
    process = start("-n", "3", "--kill-after", "1", *python(code))
    for rank in range(3):
        wait_for(tmp_path / str(rank))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.endswith(f"\nlaunch: ranks 0, 2 {UNSAVED}\n")


def test_warned_ranks_save_and_the_same_command_resumes(tmp_path):
    command = ["-n", "2", "--", "python", str(STANDIN), str(tmp_path), "25", "0.05"]
    process = start(*command)
    wait_for(tmp_path / "losses")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 85, err
    saved = int(re.search(r"saved at step (\d+)", out)[1])
    code, out, _ = run(*command)
    assert code == 0
    assert f"from step {saved} with 2 ranks" in out
    steps = [line.split()[0] for line in (tmp_path / "losses").read_text().splitlines()]
    assert steps == [str(step) for step in range(25)]


def test_a_script_of_ones_own_around_fit_saves_and_the_same_command_resumes(tmp_path):
    """As a launcher does that resizes a job, or a queue before its limit."""
    command = ["-n", "2", "--", "python", str(STANDIN.with_name("own_script.py")), str(tmp_path)]
    process = start(*command, "100")
    wait_for(tmp_path / "step-5")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 85, err
    assert not (tmp_path / "complete").exists()
    made = len(list(tmp_path.glob("step-*")))
    code, _, err = run(*command, "100")
    assert code == 0, err
    assert (tmp_path / "complete").read_text().startswith("100 ")
    assert made < 100, "it was stopped before its end"


def test_ranks_save_when_their_terminal_is_closed(tmp_path):
    """As at the end of an ssh connection: the kernel sends SIGHUP, and no line can be written."""

    def begin_session():
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup

    keyboard, terminal = pty.openpty()
    command = [sys.executable, "-m", "launch", "local", "-n", "2", "--"]
    process = subprocess.Popen(
        [*command, "python", str(STANDIN), str(tmp_path), "600", "0.05"],
        cwd=ROOT,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        preexec_fn=begin_session,
    )
    os.close(terminal)
    wait_for(tmp_path / "losses")
    os.close(keyboard)
    assert process.wait(timeout=60) == 85
    assert (tmp_path / "checkpoint").exists()


@pytest.mark.parametrize(
    "wrapper",
    [
        [],
        ["bash", "-c", '"$0" "$@"; exit $?'],
        # conda run closes what it inherits, and a container's shim has its own session.
        ["python", "-c", "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))"],
        ["setsid", "--fork", "--wait"],
    ],
    ids=["none", "bash", "python", "another session"],
)
def test_no_rank_outlives_a_killed_launcher(tmp_path, wrapper):
    rank = f"open(r'{tmp_path}/' + rank, 'w'); time.sleep(600)"
    _, *command = python(rank)
    process = start("-n", "2", "--", *wrapper, *command)
    wait_for(tmp_path / "0")
    wait_for(tmp_path / "1")
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) == 1 + 2 * (2 if wrapper else 1)
    process.kill()
    process.communicate()
    assert psutil.wait_procs(family, timeout=30)[1] == []


def test_what_a_job_leaves_running_on_purpose_is_left_alone(tmp_path):
    """A server of the user's in a session of its own, which outlived the ranks before too."""
    server = (
        "import subprocess; p = subprocess.Popen(['sleep', '600'], start_new_session=True); "
        f"open(r'{tmp_path}/pid', 'w').write(str(p.pid))"
    )
    code, _, err = run("-n", "1", *python(server))
    left = psutil.Process(int((tmp_path / "pid").read_text()))
    try:
        assert code == 0 and left.is_running(), err
    finally:
        left.kill()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-n", "2", "--", "nonesuch"], "error: [Errno 2] No such file or directory: 'nonesuch'"),
        (["-n", "0", "--", "true"], "'0' is not a number from 1 to 99999"),
        (["-n", "2"], "what to run is missing: python -m launch local ... -- COMMAND"),
        (["-n", "2", "python", "x.py"], "-- is missing: python -m launch local ... -- python x.py"),
        (["-n", "2", "--x", "--", "true"], "unrecognized arguments: --x"),
    ],
)
def test_wrong_use_is_one_line(arguments, words):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert words in err.splitlines()[-1]


def test_a_script_that_only_a_shell_would_run_says_what_it_lacks(tmp_path):
    (tmp_path / "script").write_text("echo hi\n")
    (tmp_path / "script").chmod(0o755)
    code, _, err = run("-n", "2", "--", str(tmp_path / "script"))
    assert code == 2
    assert "/script': a script begins with a line such as #!/bin/bash; or put bash" in err


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("HOROVOD_GLOO_IFACE", "eth99", "HOROVOD_GLOO_IFACE=eth99: "),
        ("HOROVOD_GLOO_TIMEOUT_SECONDS", "5 s", "HOROVOD_GLOO_TIMEOUT_SECONDS is '5 s'; it must"),
        ("SLURM_CPUS_ON_NODE", "-4", "SLURM_CPUS_ON_NODE is '-4'; it must be a whole number"),
    ],
)
def test_wrong_variable_is_one_line(variable, value, words):
    code, _, err = run("-n", "2", "--", "true", env={variable: value})
    assert code == 2
    assert err.startswith(f"error: {words}") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("before", "advice"),
    [
        ("true", "ip link set lo up"),
        ("ip link set lo up && ip addr del 127.0.0.1/8 dev lo", "ip addr add 127.0.0.1/8 dev lo"),
    ],
    ids=["no loopback", "IPv6 alone"],
)
def test_where_the_loopback_lacks_its_address_the_advice_helps(before, advice):
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("only root can make network namespaces, with iproute2")
    launch = f"{sys.executable} -m launch local -n 1 -- true"
    line = f"{before} && {{ {launch}; {advice} && exec {launch}; }}"
    done = subprocess.run(
        ["unshare", "-n", "bash", "-c", line],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.endswith(
        f"has the address 127.0.0.1, by which ranks find each other: `{advice}`\n"
    )


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
def test_ranks_run_where_standard_streams_are_closed(tmp_path, closed):
    rank = f"echo; echo >&2; touch {tmp_path}/$HOROVOD_RANK"
    command = [sys.executable, "-m", "launch", "local", "-n", "2", "--", "bash", "-c", rank]
    line = f"{shlex.join(command)} {closed}"
    assert subprocess.run(["bash", "-c", line], cwd=ROOT, timeout=60).returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


def test_a_limit_that_is_too_low_is_named():
    line = f"ulimit -n 20; exec {sys.executable} -m launch local -n 16 -- sleep 600"
    command = ["bash", "-c", line]
    done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 2
    assert "Too many open files: raise the limit" in done.stderr


CROWD = """
import os, resource, socket, time
most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
place = "127.0.0.1", int(os.environ["HOROVOD_GLOO_RENDEZVOUS_PORT"])
silent = [socket.create_connection(place, 30) for _ in range(600)]
time.sleep(2)
print("through")
"""


def test_a_crowd_of_silent_strangers_ends_no_job(tmp_path):
    """Any user of the machine can connect; here there are more than the launcher may have files."""
    (tmp_path / "crowd.py").write_text(CROWD)
    words = [sys.executable, "-m", "launch", "local", "-n", "1", "--", "python"]
    done = subprocess.run(
        ["bash", "-c", 'ulimit -Sn 300; exec "$@"', "bash", *words, tmp_path / "crowd.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "[0] through\n"), done.stderr


# Rank 0 connects to whatever begins to listen, as somebody else on the machine could.
STRANGER = """
import os, socket, subprocess, sys, time
from pathlib import Path
import horovod.mxnet as hvd
WATCH = '''
import socket
def listening():
    rows = [line.split() for line in open("/proc/net/tcp").read().splitlines()[1:]]
    return {row[1] for row in rows if row[3] == "0A"}
known, held = listening(), []
while True:
    for place in listening() - known:
        known.add(place)
        held.append(socket.socket())
        held[-1].setblocking(False)
        held[-1].connect_ex(("127.0.0.1", int(place.split(":")[1], 16)))
'''
begun, stranger = Path(sys.argv[1], "begun"), None
if os.environ["HOROVOD_RANK"] == "0" and not begun.exists():
    begun.touch()
    stranger = subprocess.Popen([sys.executable, "-c", WATCH])
    time.sleep(0.5)
hvd.init()
print("met", hvd.size())
if stranger:
    stranger.kill()
"""


def test_a_start_that_a_stranger_spoilt_is_made_once_more(tmp_path):
    """Each of Gloo's ports takes one connection, whoever's it is; he does not always come first."""
    said = ""
    for attempt in range(8):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        code, out, said = run("-n", "4", "--", "python", "-c", STRANGER, str(folder))
        assert code == 0 and out.count("met 4\n") == 4, said
        if "once more" in said:
            break
    assert "launch: ranks could not connect to each other as they started; starting " in said
